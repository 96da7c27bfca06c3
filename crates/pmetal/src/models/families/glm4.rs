//! GLM-4: norms before and after both parts, a rotation of half of each head, gate and up in one.

use pmetal_engine::device::RopePairing;

use super::{Defaults, Family, change_dense, plain};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::{DenseNames, LayerNorms, Spec};

pub(super) const FAMILY: Family = Family { name: "GLM-4", model_type: "glm4", read };

const NORMS: LayerNorms = LayerNorms {
    before_attention: Some("input_layernorm"),
    after_attention: Some("post_self_attn_layernorm"),
    before_feed_forward: Some("post_attention_layernorm"),
    after_feed_forward: Some("post_mlp_layernorm"),
    parallel: false,
};

fn read(config: &Config) -> Result<Spec> {
    let defaults = Defaults {
        key_value_heads: Some(2),
        head_width: Some(128),
        context_length: 131_072,
        epsilon: 1.562_5e-7,
        pairing: RopePairing::Neighbours,
        rotated_part: Some(0.5),
        padding_id: Some(151_329),
        ..Defaults::LLAMA
    };
    let mut spec = plain("glm4", config, &defaults)?;
    let bias = config.flag("attention_bias", true)?;
    for layer in &mut spec.layers {
        layer.attention.input_bias = bias;
        layer.norms = NORMS;
    }
    change_dense(&mut spec, |dense| dense.names = DenseNames::FUSED);
    Ok(spec)
}
