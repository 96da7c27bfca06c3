//! The fused operations of a decoder. Each file states its contract, holds the forward and backward pass,
//! and in its tests a slow reference in f64.

mod absorbed;
mod attention;
mod choice;
pub(crate) mod columns;
mod cursor;
mod delta;
mod embedding;
mod gated;
mod heads;
mod layer_norm;
mod linear;
mod linear_group;
mod loss;
mod moe;
mod norm;
mod optimizer;
mod residual;
mod rope;
mod sample;
mod softcap;
#[cfg(test)]
mod tests;

pub use crate::device::{Gate, Groups, PairedGate, Router};
pub use absorbed::{absorb_queries, expand_results};
pub use attention::{attention, attention_with_spare};
pub use choice::choose_keys;
pub use columns::split_columns;
pub use cursor::{Cursor, sample};
pub use delta::{
    ConvolutionState, DeltaInputVars, DeltaState, gated_delta, gated_rms_norm, gated_rms_norm_with_spare,
    short_convolution,
};
pub use embedding::{check_ids, embedding, scatter_rows};
pub use gated::{GatedOptions, gated, gated_with_spare};
pub use heads::{join_heads, split_heads, ungroup_heads};
pub use layer_norm::layer_norm;
pub use linear::{Dropout, Linear, LinearOptions, Lora, linear, project};
pub use linear_group::{LinearGroup, linear_group};
pub use loss::{CrossEntropy, LOGIT_CHUNK_BYTES, Targets, linear_cross_entropy, logit_chunk_rows};
pub use moe::{
    Balance, ExpertLinear, ExpertLora, Routing, SumOptions, Weighting, combine, convert, expert_linear,
    gate_rows, gated_pair, gather, route,
};
pub use norm::{Spare, rms_norm, rms_norm_with_spare};
pub use optimizer::{AdamWState, adamw, adamw_step, global_norm, sum_of_squares};
pub use residual::add_scaled;
pub use rope::{RopeTable, rope, rope_all};
pub(crate) use sample::SampleConstants;
pub use sample::{SEEN, SampleOptions, choose};
pub use softcap::softcap;
