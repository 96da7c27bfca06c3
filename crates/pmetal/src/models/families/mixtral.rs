//! Mixtral: Mistral with eight experts, two for each token.

use super::{Defaults, Family, balance_factor, experts, field_of, plain};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::{FeedForwardSpec, Spec};

pub(super) const FAMILY: Family = Family { name: "Mixtral", model_type: "mixtral", read };

fn read(config: &Config) -> Result<Spec> {
    let defaults = Defaults {
        context_length: 131_072,
        key_value_heads: Some(8),
        epsilon: 1e-5,
        theta: 1e6,
        ..Defaults::LLAMA
    };
    let mut spec = plain("mixtral", config, &defaults)?;
    let window = config.optional_size("sliding_window")?;
    let count = field_of(config, ["num_local_experts", "num_experts"]);
    let mut part = experts(config, count, 8, 2)?;
    part.width = spec.inner();
    part.router.normalise = Some(0.0);
    part.balance = balance_factor(config, 0.001)?;
    // Noise on the router's input, in transformers' training mode alone.
    config.get("router_jitter_noise");
    for layer in &mut spec.layers {
        layer.attention.mask.window = window;
        layer.feed_forward = FeedForwardSpec::Experts(Box::new(part.clone()));
    }
    Ok(spec)
}
