//! Qwen 3: RMSNorm over each head of q and k before the rotation; heads of 128 unless the file says otherwise.

use super::{Family, plain, qwen_windows};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::Spec;

pub(super) const FAMILY: Family = Family { model_type: "qwen3", read };

fn read(config: &Config) -> Result<Spec> {
    let mut spec = plain("qwen3", config, Some(128))?;
    let bias = config.flag("attention_bias", false)?;
    for layer in &mut spec.layers {
        layer.attention.head_norm = true;
        layer.attention.input_bias = bias;
        layer.attention.output_bias = bias;
    }
    qwen_windows(&mut spec, config)?;
    Ok(spec)
}
