//! Products of weights of eight bits.

use crate::Tensor;
use crate::error::Result;

/// The value of a code of e4m3: sign, four bits of exponent biased by 7, three of mantissa; 0x7f and 0xff are NaN.
pub(crate) fn e4m3_value(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { size } else { -size }
}

/// A matrix of e4m3 with a scale f32 for each row.
#[derive(Debug, Clone)]
pub struct ScaledRows {
    /// e4m3 \[N, K\], without gaps.
    pub codes: Tensor,
    /// f32 \[N\].
    pub scales: Tensor,
}

/// Kernels for matrices of e4m3.
pub trait Fp8Kernels {
    /// Why they cannot be used on this device; `None` where they can.
    fn refusal(&self) -> Option<String>;

    /// Rounds each row of x, its columns times `factors` (f32) first, to codes and a scale.
    ///
    /// # Errors
    /// Out of memory.
    fn quantise_rows(&self, x: &Tensor, factors: Option<&Tensor>) -> Result<ScaledRows>;

    /// Overwrites rows from `start` of `target` by those of x, rounded; nobody else may use these rows.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] or [`crate::Error::Range`] where they do not fit.
    fn quantise_into(&self, x: &Tensor, target: &ScaledRows, start: usize) -> Result<()>;

    /// The transpose of codes whose sizes are multiples of 16.
    ///
    /// # Errors
    /// Out of memory.
    fn transpose_codes(&self, codes: &Tensor) -> Result<Tensor>;

    /// `out = left right^T`, plus a bias f32 \[N\] and an addend of out's type and pitch.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] where the driver's library has no kernel for the sizes.
    fn multiply(
        &self,
        left: &ScaledRows,
        right: &ScaledRows,
        out: &mut Tensor,
        bias: Option<&Tensor>,
        addend: Option<&Tensor>,
    ) -> Result<()>;
}
