//! The fused operations of a decoder. Each file states its contract, holds the forward and backward pass,
//! and in its tests a slow reference in f64.

mod attention;
mod cursor;
mod embedding;
mod gated;
mod linear;
mod linear_group;
mod loss;
mod norm;
mod optimizer;
mod rope;
mod sample;
#[cfg(test)]
mod tests;

pub use attention::{attention, attention_with_spare};
pub use cursor::{Cursor, sample};
pub use embedding::{check_ids, embedding, scatter_rows};
pub use gated::{GatedOptions, gated, gated_with_spare};
pub use linear::{Dropout, Linear, LinearOptions, Lora, linear, project};
pub use linear_group::{LinearGroup, linear_group};
pub use loss::{CrossEntropy, LOGIT_CHUNK_BYTES, Targets, linear_cross_entropy, logit_chunk_rows};
pub use norm::{Spare, rms_norm, rms_norm_with_spare};
pub use optimizer::{AdamWState, adamw, adamw_step, global_norm, sum_of_squares};
pub use rope::{RopeTable, rope, rope_all};
pub(crate) use sample::SampleConstants;
pub use sample::{SEEN, SampleOptions, choose};
