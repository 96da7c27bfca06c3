//! Qwen 2 and 2.5: biases on q, k and v.

use super::{Defaults, Family, plain, qwen_windows};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::Spec;

pub(super) const FAMILY: Family = Family { name: "Qwen 2, 2.5", model_type: "qwen2", read };

fn read(config: &Config) -> Result<Spec> {
    let defaults = Defaults { key_value_heads: Some(32), context_length: 32_768, ..Defaults::LLAMA };
    let mut spec = plain("qwen2", config, &defaults)?;
    for layer in &mut spec.layers {
        layer.attention.input_bias = true;
    }
    qwen_windows(&mut spec, config)?;
    Ok(spec)
}
