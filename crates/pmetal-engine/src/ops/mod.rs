//! The fused operations of a decoder. Each file states its contract, holds the forward and backward pass,
//! and in its tests a slow reference in f64.

mod attention;
mod embedding;
mod gated;
mod linear;
mod loss;
mod norm;
mod optimizer;
mod rope;
#[cfg(test)]
mod tests;

pub use attention::attention;
pub use embedding::embedding;
pub use gated::gated;
pub use linear::{Dropout, Linear, LinearOptions, Lora, linear, project};
pub use loss::{CrossEntropy, LOGIT_CHUNK_BYTES, linear_cross_entropy, logit_chunk_rows};
pub use norm::rms_norm;
pub use optimizer::{AdamWState, adamw_step, global_norm};
pub use rope::{RopeTable, rope};
