//! Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections, and on some a rotation of a part of each head.

use super::{Defaults, Family, change_dense, plain};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::{DenseNames, Projection, Spec};

pub(super) const FAMILY: Family =
    Family { name: "Phi-3, Phi-3.5, Phi-4, Phi-4-mini", model_type: "phi3", read };

fn read(config: &Config) -> Result<Spec> {
    let defaults = Defaults {
        context_length: 4096,
        trained_length: Some(4096),
        rotated_part: Some(1.0),
        epsilon: 1e-5,
        padding_id: Some(32_000),
        ..Defaults::LLAMA
    };
    let mut spec = plain("phi3", config, &defaults)?;
    let window = config.optional_size("sliding_window")?;
    config.get("original_max_position_embeddings");
    // Written by the makers of Phi-4-mini, read by nobody.
    config.pass_over(&["full_attn_mod", "interpolate_factor"]);
    for layer in &mut spec.layers {
        layer.attention.mask.window = window;
        layer.attention.projection = Projection::Fused;
    }
    change_dense(&mut spec, |dense| dense.names = DenseNames::FUSED);
    Ok(spec)
}
