//! Qwen 2 MoE and Qwen 3 MoE: Qwen with experts in some layers or all.

use super::{
    Defaults, Family, attention_biases, balance_factor, experts, field_of, plain, set_windows, shared_expert,
    sliding_layers,
};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::{ExpertsSpec, FeedForwardSpec, HeadNorm, Spec};

pub(super) const SECOND: Family =
    Family { name: "Qwen 1.5 and 2, mixtures of experts", model_type: "qwen2_moe", read: read_second };
pub(super) const THIRD: Family =
    Family { name: "Qwen 3, mixtures of experts", model_type: "qwen3_moe", read: read_third };

/// What both are where a configuration says nothing else.
const DEFAULTS: Defaults = Defaults {
    vocabulary: Some(151_936),
    width: Some(2048),
    layers: Some(24),
    context_length: 32_768,
    ..Defaults::LLAMA
};

fn read_second(config: &Config) -> Result<Spec> {
    let defaults = Defaults { heads: Some(16), key_value_heads: Some(16), inner: Some(5632), ..DEFAULTS };
    let mut spec = plain("qwen2_moe", config, &defaults)?;
    let bias = config.flag("qkv_bias", true)?;
    spec.layers.iter_mut().for_each(|layer| layer.attention.input_bias = bias);
    // transformers 5 writes 0 where it is not used; a layer that does use it says that it sees nothing.
    let window = config.optional_count("sliding_window")?.unwrap_or(4096);
    let used = config.flag("use_sliding_window", false)?;
    let first = config.optional_count("max_window_layers")?.unwrap_or(28);
    // The other side of the rule of Qwen 2, and of that every other layer.
    let sliding = sliding_layers(config, spec.layers.len(), |index| used && index % 2 == 0 && index < first)?;
    set_windows(&mut spec, &sliding, Some(window));
    let mut part = experts(config, "num_experts", 60, 4)?;
    let width = config.optional_size("shared_expert_intermediate_size")?.unwrap_or(5632);
    part.shared = Some(shared_expert(&spec, "mlp.shared_expert", width, Some("mlp.shared_expert_gate")));
    sparse_layers(&mut spec, config, part, (false, 1408))?;
    Ok(spec)
}

fn read_third(config: &Config) -> Result<Spec> {
    let defaults = Defaults { heads: Some(32), key_value_heads: Some(4), inner: Some(6144), ..DEFAULTS };
    let mut spec = plain("qwen3_moe", config, &defaults)?;
    attention_biases(&mut spec, config, false)?;
    let used = config.flag("use_sliding_window", false)?;
    let window = config.optional_size("sliding_window")?.unwrap_or(4096);
    config.get("max_window_layers");
    for layer in &mut spec.layers {
        layer.attention.head_norm = HeadNorm::Shared;
        layer.attention.mask.window = used.then_some(window);
    }
    let count = field_of(config, ["num_experts", "num_local_experts"]);
    let part = experts(config, count, 128, 8)?;
    sparse_layers(&mut spec, config, part, (false, 768))?;
    Ok(spec)
}

/// Puts experts where the configuration wants them, with what it means by saying nothing of their weights and width.
pub(super) fn sparse_layers(
    spec: &mut Spec,
    config: &Config,
    mut part: ExpertsSpec,
    (normalise, width): (bool, usize),
) -> Result<()> {
    part.width = config.optional_size("moe_intermediate_size")?.unwrap_or(width);
    part.router.normalise = config.flag("norm_topk_prob", normalise)?.then_some(0.0);
    part.balance = balance_factor(config, 0.001)?;
    let step = config.optional_size("decoder_sparse_step")?.unwrap_or(1);
    let dense = config.layer_numbers("mlp_only_layers", spec.layers.len())?.unwrap_or_default();
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        if (index + 1) % step == 0 && !dense.contains(&index) {
            layer.feed_forward = FeedForwardSpec::Experts(Box::new(part.clone()));
        }
    }
    Ok(())
}
