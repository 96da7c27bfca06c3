//! Qwen 3: RMSNorm over each head of q and k before the rotation; heads of 128 unless the file says otherwise.

use super::{Defaults, Family, attention_biases, plain, qwen_windows};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::{HeadNorm, Spec};

pub(super) const FAMILY: Family = Family { name: "Qwen 3", model_type: "qwen3", read };

fn read(config: &Config) -> Result<Spec> {
    let defaults = Defaults {
        key_value_heads: Some(32),
        head_width: Some(128),
        context_length: 32_768,
        ..Defaults::LLAMA
    };
    let mut spec = plain("qwen3", config, &defaults)?;
    attention_biases(&mut spec, config, false)?;
    spec.layers.iter_mut().for_each(|layer| layer.attention.head_norm = HeadNorm::Shared);
    qwen_windows(&mut spec, config)?;
    Ok(spec)
}
