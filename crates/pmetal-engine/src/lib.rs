//! Tensors, fused operations with their backward passes, and the kernels that compute them.
//!
//! The crate knows nothing of files or model families. Its layers, from the bottom:
//! [`Tensor`] is memory on a [`Device`]; a device is a set of [`device::Kernels`]; the functions in
//! [`ops`] check shapes, call kernels and record their backward pass on a [`Tape`].
//!
//! Letters in shapes: T tokens, D width, H query heads, K key/value heads, E head width, F feed-forward
//! width, V vocabulary, R adapter rank, N output features.

mod agreement;
mod aside;
pub mod device;
pub mod dtype;
pub mod error;
pub mod memory;
pub mod ops;
pub mod parameter;
pub mod random;
#[cfg(test)]
mod reference;
pub mod tape;
pub mod tensor;
#[cfg(test)]
mod testing;

pub use agreement::{SelfTest, self_test};
pub use device::Device;
pub use dtype::DType;
pub use error::{Error, Result};
pub use memory::{Category, CategoryBytes, MemoryReport, MemoryTracker, Shortage};
pub use parameter::{Parameter, Weight};
pub use tape::{Recompute, Tape, Var};
pub use tensor::Tensor;
