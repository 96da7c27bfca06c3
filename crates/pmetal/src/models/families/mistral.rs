//! Mistral 7B and its successors with the same architecture: a sliding window in every layer, or none.

use super::{Defaults, Family, plain, set_windows, sliding_layers};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::Spec;

pub(super) const FAMILY: Family = Family { name: "Mistral", model_type: "mistral", read };

fn read(config: &Config) -> Result<Spec> {
    let defaults = Defaults { key_value_heads: Some(8), context_length: 131_072, ..Defaults::LLAMA };
    let mut spec = plain("mistral", config, &defaults)?;
    // Absent means the first release's window; an explicit null means none.
    let absent = !config.has("sliding_window");
    let window = if absent { Some(4096) } else { config.optional_size("sliding_window")? };
    // With a list of layers transformers takes the model for a Ministral, which is this with some windows.
    let sliding = sliding_layers(config, spec.layers.len(), |_| true)?;
    set_windows(&mut spec, &sliding, window);
    Ok(spec)
}
