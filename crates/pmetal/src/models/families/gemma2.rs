//! Gemma 2: norms before and after both parts, soft caps, and a window in every other layer.

use pmetal_engine::device::NormWeight;

use super::{Defaults, Family, attention_biases, plain, refuse, set_windows, sliding_layers};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::{LayerNorms, NormKind, Spec};

pub(super) const FAMILY: Family = Family { name: "Gemma 2", model_type: "gemma2", read };

/// Where both Gemmas have norms.
const NORMS: LayerNorms = LayerNorms {
    before_attention: Some("input_layernorm"),
    after_attention: Some("post_attention_layernorm"),
    before_feed_forward: Some("pre_feedforward_layernorm"),
    after_feed_forward: Some("post_feedforward_layernorm"),
    parallel: false,
};

/// What both have in common where a configuration says nothing.
pub(super) const DEFAULTS: Defaults = Defaults {
    vocabulary: Some(256_000),
    width: Some(2304),
    inner: Some(9216),
    layers: Some(26),
    heads: Some(8),
    key_value_heads: Some(4),
    head_width: Some(256),
    context_length: 8192,
    activation_field: "hidden_activation",
    activation: "gelu_pytorch_tanh",
    padding_id: Some(0),
    tied_head: true,
    ..Defaults::LLAMA
};

fn read(config: &Config) -> Result<Spec> {
    let mut spec = gemma("gemma2", config, &DEFAULTS)?;
    let cap = config.nullable("attn_logit_softcapping", Some(50.0))?;
    spec.layers.iter_mut().for_each(|layer| layer.attention.softcap = cap.map(|cap| cap as f32));
    spec.logit_softcap = config.nullable("final_logit_softcapping", Some(30.0))?.map(|cap| cap as f32);
    let sliding = sliding_layers(config, spec.layers.len(), |index| index % 2 == 0)?;
    set_windows(&mut spec, &sliding, Some(config.optional_size("sliding_window")?.unwrap_or(4096)));
    Ok(spec)
}

/// What Gemma 2 and 3 share.
pub(super) fn gemma(family: &'static str, config: &Config, defaults: &Defaults) -> Result<Spec> {
    let mut spec = plain(family, config, defaults)?;
    // Old files name an activation that nobody reads.
    config.get("hidden_act");
    refuse(config, "use_bidirectional_attention")?;
    attention_biases(&mut spec, config, false)?;
    spec.norm = NormKind::Rms(NormWeight::PlusOne);
    spec.embedding_scale = (spec.width as f32).sqrt();
    let scale = config.positive("query_pre_attn_scalar", 256.0)?.powf(-0.5) as f32;
    for layer in &mut spec.layers {
        layer.attention.scale = scale;
        layer.norms = NORMS;
    }
    Ok(spec)
}
