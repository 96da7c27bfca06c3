//! Gemma 3: as Gemma 2 without soft caps, with normed queries and keys, and rotations of their own for layers with a
//! window. The text model of a multimodal folder is the same.

use serde_json::Value;

use super::gemma2::{DEFAULTS, gemma};
use super::{Defaults, Family, set_windows, sliding_layers};
use crate::error::{Error, Result};
use crate::models::config::Config;
use crate::models::rope::{Rope, RopeKind};
use crate::models::spec::{HeadNorm, Spec};

pub(super) const TEXT: Family = Family { name: "Gemma 3, text", model_type: "gemma3_text", read: read_text };
pub(super) const MULTIMODAL: Family =
    Family { name: "Gemma 3, text part of multimodal models", model_type: "gemma3", read: read_multimodal };

fn read_text(config: &Config) -> Result<Spec> {
    let mut spec = read("gemma3_text", config)?;
    spec.logit_softcap = config.nullable("final_logit_softcapping", None)?.map(|cap| cap as f32);
    Ok(spec)
}

fn read_multimodal(config: &Config) -> Result<Spec> {
    super::text_part(config, &["vision_config", "mm_tokens_per_image"], |text| {
        // The whole has no cap on its logits, whatever its text part says.
        text.get("final_logit_softcapping");
        // Of other multimodal folders a causal language model is the text part alone.
        Ok(Spec { place: "model.language_model.", ..read("gemma3", text)? })
    })
}

fn read(family: &'static str, config: &Config) -> Result<Spec> {
    let defaults = Defaults { vocabulary: Some(262_208), context_length: 131_072, theta: 1e6, ..DEFAULTS };
    let mut spec = gemma(family, config, &defaults)?;
    // Stored, but no attention of this family reads it.
    config.get("attn_logit_softcapping");
    let every = config.optional_size("sliding_window_pattern")?.unwrap_or(6);
    config.get("_sliding_window_pattern");
    let sliding = sliding_layers(config, spec.layers.len(), |index| (index + 1) % every != 0)?;
    set_windows(&mut spec, &sliding, Some(config.optional_size("sliding_window")?.unwrap_or(4096)));
    let head_width = spec.layers.first().map_or(0, |layer| layer.attention.head_width);
    let Defaults { theta, pairing, context_length, .. } = defaults;
    let kind = RopeKind { width: head_width, theta, pairing, context_length, ..RopeKind::LLAMA };
    let rope = |layer_type: &str, theta_field: &str, theta: f64| -> Result<Rope> {
        Rope::from_fields(config, &rope_fields(config, layer_type, theta_field, theta)?, kind)
    };
    spec.ropes = vec![
        rope("full_attention", "rope_theta", theta)?,
        rope("sliding_attention", "rope_local_base_freq", 10_000.0)?,
    ];
    for (layer, sliding) in spec.layers.iter_mut().zip(sliding) {
        layer.attention.head_norm = HeadNorm::Shared;
        layer.attention.rope = Some(usize::from(sliding));
    }
    Ok(spec)
}

/// What a configuration says of the rotation of layers of a type: an entry of `rope_parameters` or none, to which
/// `rope_scaling` is added for layers without a window, and the base of a field of its own.
fn rope_fields(config: &Config, layer_type: &str, theta_field: &str, theta: f64) -> Result<Config> {
    let fields_of = |name: &str| config.get(name).and_then(Value::as_object);
    let entry = fields_of("rope_parameters").and_then(|all| all.get(layer_type)).and_then(Value::as_object);
    let mut fields = match entry {
        Some(entry) => entry.clone(),
        None => [("rope_type".to_owned(), "default".into())].into_iter().collect(),
    };
    if layer_type == "full_attention" {
        fields.extend(fields_of("rope_scaling").cloned().unwrap_or_default());
    }
    let theta = config.positive(theta_field, theta)?;
    if theta <= 1.0 {
        return Err(Error::Config(format!("`{theta_field}` is {theta}, it must be above one")));
    }
    fields.entry("rope_theta").or_insert(theta.into());
    Config::new(Value::Object(fields))
}
