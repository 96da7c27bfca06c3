//! Llama 2 and 3.x, and the many models that use their architecture.

use super::{Family, plain};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::Spec;

pub(super) const FAMILY: Family = Family { model_type: "llama", read };

fn read(config: &Config) -> Result<Spec> {
    let mut spec = plain("llama", config, None)?;
    let (attention_bias, bias) = (config.flag("attention_bias", false)?, config.flag("mlp_bias", false)?);
    for layer in &mut spec.layers {
        layer.attention.input_bias = attention_bias;
        layer.attention.output_bias = attention_bias;
        layer.feed_forward.bias = bias;
    }
    Ok(spec)
}
