//! Granite 3: Llama with factors on embeddings, residuals, scores and logits.

use super::{Defaults, Family, attention_biases, change_dense, plain};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::Spec;

pub(super) const FAMILY: Family = Family { name: "Granite 3", model_type: "granite", read };

fn read(config: &Config) -> Result<Spec> {
    let mut spec = plain("granite", config, &Defaults::LLAMA)?;
    attention_biases(&mut spec, config, false)?;
    let bias = config.flag("mlp_bias", false)?;
    change_dense(&mut spec, |dense| dense.bias = bias);
    multipliers(&mut spec, config)?;
    Ok(spec)
}

/// The four factors that all Granite models have.
pub(super) fn multipliers(spec: &mut Spec, config: &Config) -> Result<()> {
    spec.embedding_scale = config.positive("embedding_multiplier", 1.0)? as f32;
    spec.residual_scale = config.positive("residual_multiplier", 1.0)? as f32;
    spec.logit_scale = 1.0 / config.positive("logits_scaling", 1.0)? as f32;
    let scale = config.positive("attention_multiplier", 1.0)? as f32;
    spec.layers.iter_mut().for_each(|layer| layer.attention.scale = scale);
    Ok(())
}
