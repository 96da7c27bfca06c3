//! The one error type of this crate.

use crate::DType;

/// What this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two shapes that must agree do not.
    #[error("{operation}: {what} has shape {actual:?}, expected {expected:?}")]
    Shape {
        /// The operation that refused.
        operation: &'static str,
        /// Which operand.
        what: &'static str,
        /// The shape it has.
        actual: Vec<usize>,
        /// The shape it needs.
        expected: Vec<usize>,
    },
    /// An operand has an element type that the operation does not take.
    #[error("{operation}: {what} is {actual}, expected {expected}")]
    DType {
        /// The operation that refused.
        operation: &'static str,
        /// Which operand.
        what: &'static str,
        /// The type it has.
        actual: DType,
        /// The type it needs.
        expected: &'static str,
    },
    /// A value, such as a token id, is outside its range.
    #[error("{operation}: {what} is {actual}, the limit is {limit}")]
    Range {
        /// The operation that refused.
        operation: &'static str,
        /// Which value.
        what: &'static str,
        /// The value.
        actual: usize,
        /// The first value that is too large.
        limit: usize,
    },
    /// The device has no memory left.
    #[error("out of memory: {requested_bytes} bytes for {category} on top of {live_bytes} bytes in use")]
    OutOfMemory {
        /// What the allocation was for.
        category: &'static str,
        /// Its size.
        requested_bytes: usize,
        /// What was live when it was asked for.
        live_bytes: usize,
    },
    /// A call of a device's driver or library failed; for asynchronous work, the first one that did.
    #[error("{device}: {call} failed: {reason}")]
    Driver {
        /// The device's name.
        device: &'static str,
        /// The call or kernel.
        call: String,
        /// What the driver says.
        reason: String,
    },
    /// A recorded block of the caller failed for a reason of its own.
    #[error("{0}")]
    Other(String),
    /// The kernel set cannot do what was asked.
    #[error("{operation} is not available on {device}: {reason}")]
    Unsupported {
        /// The operation.
        operation: &'static str,
        /// The device's name.
        device: &'static str,
        /// What is missing.
        reason: String,
    },
}

/// Checks one operand's element type.
pub(crate) fn expect_dtype(
    operation: &'static str,
    what: &'static str,
    actual: DType,
    expected: DType,
) -> Result<()> {
    if actual == expected {
        return Ok(());
    }
    Err(Error::DType { operation, what, actual, expected: expected.name() })
}

/// Checks one operand's shape.
pub(crate) fn expect_shape(
    operation: &'static str,
    what: &'static str,
    actual: &[usize],
    expected: &[usize],
) -> Result<()> {
    if actual == expected {
        return Ok(());
    }
    Err(Error::Shape { operation, what, actual: actual.to_vec(), expected: expected.to_vec() })
}
