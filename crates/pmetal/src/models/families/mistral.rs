//! Mistral 7B and its successors with the same architecture: a sliding window in every layer, or none.

use super::{Defaults, Family, plain};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::Spec;

pub(super) const FAMILY: Family = Family { name: "Mistral", model_type: "mistral", read };

fn read(config: &Config) -> Result<Spec> {
    let mut spec = plain("mistral", config, &Defaults::LLAMA)?;
    // Absent means the first release's window; an explicit null means none.
    let absent = !config.has("sliding_window");
    let window = if absent { Some(4096) } else { config.optional_size("sliding_window")? };
    spec.layers.iter_mut().for_each(|layer| layer.attention.mask.window = window);
    Ok(spec)
}
