//! Command R and its successors: attention and feed-forward read the same LayerNorm and are added at once.

use super::{Defaults, Family, attention_biases, plain, set_windows, sliding_layers};
use crate::error::{Error, Result};
use crate::models::config::Config;
use crate::models::spec::{HeadNorm, LayerNorms, NormKind, Spec};
use pmetal_engine::device::RopePairing;

pub(super) const FIRST: Family =
    Family { name: "Command R, R+, Aya", model_type: "cohere", read: read_first };
pub(super) const SECOND: Family =
    Family { name: "Command R7B, Command A", model_type: "cohere2", read: read_second };

const DEFAULTS: Defaults = Defaults {
    context_length: 8192,
    epsilon_field: "layer_norm_eps",
    epsilon: 1e-5,
    theta: 500_000.0,
    pairing: RopePairing::Neighbours,
    padding_id: Some(0),
    tied_head: true,
    ..Defaults::LLAMA
};

fn read_first(config: &Config) -> Result<Spec> {
    let mut spec = read("cohere", config, &DEFAULTS)?;
    if config.flag("use_qk_norm", false)? {
        spec.layers.iter_mut().for_each(|layer| layer.attention.head_norm = HeadNorm::Each);
    }
    Ok(spec)
}

/// Windows with rotations in most layers; the others see everything and know no positions.
fn read_second(config: &Config) -> Result<Spec> {
    let mut spec = read("cohere2", config, &Defaults { theta: 10_000.0, ..DEFAULTS })?;
    let every = config.optional_size("sliding_window_pattern")?.unwrap_or(4);
    // Old files describe the same in fields that nobody reads.
    config.pass_over(&[
        "layer_switch",
        "order_of_interleaved_layers",
        "position_embedding_type",
        "rotary_pct",
        "use_embedding_sharing",
        "use_gated_activation",
        "use_parallel_block",
        "use_parallel_embedding",
        "_sliding_window_pattern",
    ]);
    if config.has("sliding_window") && config.get("sliding_window").is_none() {
        return Err(Error::Config("`sliding_window` is null, model type cohere2 needs one".to_owned()));
    }
    let sliding = sliding_layers(config, spec.layers.len(), |index| (index + 1) % every != 0)?;
    set_windows(&mut spec, &sliding, Some(config.optional_size("sliding_window")?.unwrap_or(4096)));
    for (layer, sliding) in spec.layers.iter_mut().zip(sliding) {
        layer.attention.rope = sliding.then_some(0);
    }
    Ok(spec)
}

fn read(family: &'static str, config: &Config, defaults: &Defaults) -> Result<Spec> {
    let mut spec = plain(family, config, defaults)?;
    attention_biases(&mut spec, config, false)?;
    spec.norm = NormKind::Layer;
    spec.logit_scale = config.positive("logit_scale", 0.0625)? as f32;
    for layer in &mut spec.layers {
        layer.norms = LayerNorms { before_feed_forward: None, parallel: true, ..LayerNorms::BEFORE };
    }
    Ok(spec)
}
