//! Llama 4: rotated layers that see chunks, among layers that see everything and know no positions; experts whose input
//! is weighted.

use pmetal_engine::device::RopePairing;
use pmetal_engine::ops::{Gate, Weighting};

use super::{
    Defaults, Family, attention_biases, change_dense, experts, layers_of_kind, plain, shared_expert,
    text_part,
};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::rope::{Rope, RopeScaling};
use crate::models::spec::{FeedForwardSpec, HeadNorm, Spec};

pub(super) const TEXT: Family =
    Family { name: "Llama 4, text", model_type: "llama4_text", read: |config| read("llama4_text", config) };
pub(super) const MULTIMODAL: Family =
    Family { name: "Llama 4, text part of multimodal models", model_type: "llama4", read: read_multimodal };

const DEFAULTS: Defaults = Defaults {
    width: Some(5120),
    inner: Some(8192),
    layers: Some(48),
    heads: Some(40),
    key_value_heads: Some(8),
    head_width: Some(128),
    vocabulary: Some(202_048),
    context_length: 131_072,
    epsilon: 1e-5,
    theta: 500_000.0,
    pairing: RopePairing::Neighbours,
    ..Defaults::LLAMA
};

fn read_multimodal(config: &Config) -> Result<Spec> {
    text_part(config, &["vision_config", "boi_token_index", "eoi_token_index"], |text| read("llama4", text))
}

fn read(family: &'static str, config: &Config) -> Result<Spec> {
    // Null divides the width among the heads.
    let divided = config.has("head_dim") && config.get("head_dim").is_none();
    let head_width = if divided { None } else { DEFAULTS.head_width };
    let mut spec = plain(family, config, &Defaults { head_width, ..DEFAULTS })?;
    attention_biases(&mut spec, config, false)?;
    set_attention(&mut spec, config)?;
    let width = spec.inner();
    let dense_width = config.optional_size("intermediate_size_mlp")?.unwrap_or(16_384);
    change_dense(&mut spec, |dense| (dense.path, dense.width) = ("feed_forward", dense_width));
    let mut part = experts(config, "num_local_experts", 16, 1)?;
    (part.path, part.router_path) = ("feed_forward.experts", "feed_forward.router");
    (part.width, part.weighting) = (width, Weighting::Input);
    (part.transposed, part.swapped_adapters) = (true, true);
    part.router.gate = Gate::Sigmoid;
    part.shared = Some(shared_expert(&spec, "feed_forward.shared_expert", width, None));
    // transformers gives this family no balancing loss, whatever is asked for.
    config.pass_over(&["router_aux_loss_coef", "output_router_logits", "router_jitter_noise"]);
    let layers = spec.layers.len();
    let step = config.optional_size("interleave_moe_layer_step")?.unwrap_or(1);
    let listed = config.layer_numbers("moe_layers", layers)?;
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let sparse = listed.as_ref().map_or((index + 1) % step == 0, |listed| listed.contains(&index));
        if sparse {
            layer.feed_forward = FeedForwardSpec::Experts(Box::new(part.clone()));
        }
    }
    Ok(spec)
}

fn set_attention(spec: &mut Spec, config: &Config) -> Result<()> {
    let layers = spec.layers.len();
    let every = config.optional_size("no_rope_layer_interval")?.unwrap_or(4);
    let turned = config.layer_flags("no_rope_layers", layers)?;
    let chunk = config.optional_size("attention_chunk_size")?.unwrap_or(8192);
    let norm = config.flag("use_qk_norm", true)?;
    let tuned = config.flag("attn_temperature_tuning", true)?;
    // Old files count its levels, of which there are four for nobody.
    let (floor, scale) = (config.positive("floor_scale", 8192.0)?, config.number("attn_scale", 0.1)?);
    let rope = spec.ropes[0].clone();
    let head_width = spec.layers.first().map_or(0, |layer| layer.attention.head_width);
    let scaling = RopeScaling::Temperature { floor, scale };
    let pairing = RopePairing::Halves;
    spec.ropes = vec![rope, Rope { theta: 1.0, rotated_width: head_width, pairing, scaling }];
    // The name is the opposite of what the numbers say: 1 is a layer with a rotation.
    let turned = turned.unwrap_or_else(|| (1..=layers).map(|number| number % every != 0).collect());
    let kinds = ["chunked_attention", "full_attention"];
    let chunked = layers_of_kind(config, "layer_types", kinds, layers, |index| turned[index])?;
    for ((layer, turns), chunked) in spec.layers.iter_mut().zip(turned).zip(chunked) {
        let attention = &mut layer.attention;
        attention.mask.chunk = chunked.then_some(chunk);
        attention.rope = turns.then_some(0);
        attention.temperature = (!turns && tuned).then_some(1);
        if turns && norm {
            attention.head_norm = HeadNorm::Rotated;
        }
    }
    Ok(())
}
