//! Granite 3 with experts.

use super::granite::multipliers;
use super::{Defaults, Family, attention_biases, balance_factor, experts, plain};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::{FeedForwardSpec, SharedSpec, Spec};

pub(super) const FAMILY: Family =
    Family { name: "Granite 3, mixtures of experts", model_type: "granitemoe", read };

fn read(config: &Config) -> Result<Spec> {
    mixture("granitemoe", config, |_| Ok(None))
}

/// Granite with experts in every layer, beside what the family has for all tokens.
pub(super) fn mixture(
    family: &'static str,
    config: &Config,
    shared: impl FnOnce(&Spec) -> Result<Option<SharedSpec>>,
) -> Result<Spec> {
    let mut spec = plain(family, config, &Defaults::LLAMA)?;
    attention_biases(&mut spec, config, false)?;
    multipliers(&mut spec, config)?;
    let mut part = experts(config, "num_local_experts", 8, 2)?;
    part.path = "block_sparse_moe.experts";
    part.router_path = "block_sparse_moe.router";
    part.wide_router = true;
    part.width = spec.inner();
    part.router.normalise = Some(0.0);
    part.balance = balance_factor(config, 0.001)?;
    part.shared = shared(&spec)?;
    for layer in &mut spec.layers {
        layer.feed_forward = FeedForwardSpec::Experts(Box::new(part.clone()));
    }
    Ok(spec)
}
