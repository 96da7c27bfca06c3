//! Qwen 3.5 with experts in every layer, beside one for all tokens.

use super::qwen_hybrid::{DEFAULTS, OTHER_PARTS, read_text};
use super::{Defaults, Family, balance_factor, experts, shared_expert, text_part};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::{FeedForwardSpec, Spec};

pub(super) const TEXT: Family = Family {
    name: "Qwen 3.5, mixtures of experts, text",
    model_type: "qwen3_5_moe_text",
    read: |config| read("qwen3_5_moe_text", config),
};
pub(super) const MULTIMODAL: Family = Family {
    name: "Qwen 3.5, mixtures of experts, text part of multimodal models",
    model_type: "qwen3_5_moe",
    read: |config| text_part(config, &OTHER_PARTS, |text| read("qwen3_5_moe", text)),
};

fn read(family: &'static str, config: &Config) -> Result<Spec> {
    // What dense layers would be as wide as: there are none.
    let mut spec = read_text(family, config, &Defaults { inner: Some(512), ..DEFAULTS })?;
    let mut part = experts(config, "num_experts", 256, 8)?;
    part.width = config.optional_size("moe_intermediate_size")?.unwrap_or(512);
    // Whatever these say: every layer has experts, and the weights of a choice sum to one.
    config.pass_over(&["norm_topk_prob", "decoder_sparse_step"]);
    part.router.normalise = Some(0.0);
    part.balance = balance_factor(config, 0.001)?;
    let width = config.optional_size("shared_expert_intermediate_size")?.unwrap_or(512);
    part.shared = Some(shared_expert(&spec, "mlp.shared_expert", width, Some("mlp.shared_expert_gate")));
    for layer in &mut spec.layers {
        layer.feed_forward = FeedForwardSpec::Experts(Box::new(part.clone()));
    }
    Ok(spec)
}
