//! GPT-OSS: attention with sinks, experts with biases and a clamped activation.

use pmetal_engine::ops::PairedGate;

use super::{
    Defaults, Family, attention_biases, balance_factor, experts, plain, set_windows, sliding_layers,
};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::rope::{RopeScaling, Yarn};
use crate::models::spec::{FeedForwardSpec, Spec};

pub(super) const FAMILY: Family = Family { name: "GPT-OSS", model_type: "gpt_oss", read };

fn read(config: &Config) -> Result<Spec> {
    let defaults = Defaults {
        heads: Some(64),
        key_value_heads: Some(8),
        head_width: Some(64),
        context_length: 131_072,
        epsilon: 1e-5,
        theta: 150_000.0,
        ..Defaults::LLAMA
    };
    let mut spec = plain("gpt_oss", config, &defaults)?;
    attention_biases(&mut spec, config, true)?;
    if !["rope_scaling", "rope_parameters"].into_iter().any(|name| config.get(name).is_some()) {
        spec.ropes[0].scaling = RopeScaling::Yarn(Yarn {
            factor: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            trained_length: 4096.0,
            truncate: false,
            attention_factor: 0.1 * 32.0_f64.ln() + 1.0,
        });
    }
    let sliding = sliding_layers(config, spec.layers.len(), |index| index % 2 == 0)?;
    set_windows(&mut spec, &sliding, Some(config.optional_size("sliding_window")?.unwrap_or(128)));
    let mut part = experts(config, "num_local_experts", 128, 4)?;
    let slope = config.number("swiglu_alpha", 1.702)? as f32;
    let limit = config.positive("swiglu_limit", 7.0)? as f32;
    part.gate = PairedGate::Clamped { slope, limit };
    part.router_path = "mlp.router";
    part.router_bias = true;
    part.router.normalise = Some(0.0);
    part.width = spec.inner();
    (part.transposed, part.bias) = (true, true);
    part.balance = balance_factor(config, 0.001)?;
    // What others say by other names.
    config.pass_over(&["initial_context_length", "experts_per_token"]);
    for layer in &mut spec.layers {
        layer.attention.sinks = true;
        layer.feed_forward = FeedForwardSpec::Experts(Box::new(part.clone()));
    }
    Ok(spec)
}
