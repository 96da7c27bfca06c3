//! OLMo 2: norms after both parts instead of before, and over all heads of queries and of keys together.

use super::{Defaults, Family, attention_biases, plain, without_windows};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::{HeadNorm, LayerNorms, Spec};

pub(super) const FAMILY: Family = Family { name: "OLMo 2", model_type: "olmo2", read };

const NORMS: LayerNorms = LayerNorms {
    before_attention: None,
    after_attention: Some("post_attention_layernorm"),
    before_feed_forward: None,
    after_feed_forward: Some("post_feedforward_layernorm"),
    parallel: false,
};

fn read(config: &Config) -> Result<Spec> {
    let defaults = Defaults { epsilon: 1e-5, padding_id: Some(1), ..Defaults::LLAMA };
    let mut spec = plain("olmo2", config, &defaults)?;
    attention_biases(&mut spec, config, false)?;
    without_windows(&spec, config)?;
    for layer in &mut spec.layers {
        layer.attention.head_norm = HeadNorm::Joint;
        layer.norms = NORMS;
    }
    Ok(spec)
}
