//! SmolLM3: Llama without rotation in every fourth layer.

use super::{Defaults, Family, attention_biases, change_dense, plain, set_windows, sliding_layers};
use crate::error::{Error, Result};
use crate::models::config::Config;
use crate::models::spec::Spec;

pub(super) const FAMILY: Family = Family { name: "SmolLM3", model_type: "smollm3", read };

fn read(config: &Config) -> Result<Spec> {
    let defaults = Defaults {
        heads: Some(16),
        key_value_heads: Some(4),
        context_length: 32_768,
        theta: 2e6,
        padding_id: Some(128_004),
        tied_head: true,
        ..Defaults::LLAMA
    };
    let mut spec = plain("smollm3", config, &defaults)?;
    attention_biases(&mut spec, config, false)?;
    let bias = config.flag("mlp_bias", false)?;
    // Copied from other families, read by nobody.
    config.pass_over(&["max_window_layers", "pretraining_tp"]);
    let every = config.optional_size("no_rope_layer_interval")?.unwrap_or(4);
    // The name is the opposite of what the numbers say: 1 is a layer with a rotation.
    let listed = config.layer_flags("no_rope_layers", spec.layers.len())?;
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let turns = listed.as_ref().map_or((index + 1) % every != 0, |listed| listed[index]);
        layer.attention.rope = turns.then_some(0);
    }
    change_dense(&mut spec, |dense| dense.bias = bias);
    let still: Vec<bool> = spec.layers.iter().map(|layer| layer.attention.rope.is_none()).collect();
    let used = config.flag("use_sliding_window", false)?;
    let window = config.optional_size("sliding_window")?;
    // A list of layers asks for windows whether they are in use or not.
    let by_rule = |index: usize| used && window.is_some() && still[index];
    let sliding = sliding_layers(config, spec.layers.len(), by_rule)?;
    if window.is_none() && sliding.contains(&true) {
        return Err(Error::Config("`layer_types` asks for windows, `sliding_window` is not set".to_owned()));
    }
    set_windows(&mut spec, &sliding, window);
    Ok(spec)
}
