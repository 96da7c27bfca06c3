//! Mistral 7B and its successors with the same architecture: a sliding window in every layer, or none.

use super::{Family, plain};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::Spec;

pub(super) const FAMILY: Family = Family { model_type: "mistral", read };

fn read(config: &Config) -> Result<Spec> {
    let mut spec = plain("mistral", config, None)?;
    // Absent means the first release's window; an explicit null means none.
    let absent = !config.names().any(|name| name == "sliding_window");
    let window = if absent { Some(4096) } else { config.optional_size("sliding_window")? };
    for layer in &mut spec.layers {
        layer.attention.window = window;
    }
    Ok(spec)
}
