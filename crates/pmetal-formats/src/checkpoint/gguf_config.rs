//! A GGUF file's metadata as the fields of a Hugging Face `config.json`.
//!
//! Key names: `docs/gguf.md` of ggml.

use serde_json::{Map, Value, json};

use super::gguf_view::GgufView;
use crate::gguf::GgufMetadata;
use crate::{Error, Result};

pub(super) fn config(view: &GgufView) -> Result<Value> {
    let metadata = view.file().metadata();
    let architecture = view.architecture().name();
    let key = |name: &str| format!("{architecture}.{name}");
    let size = |name: &str| metadata.u64(&key(name));
    let optional = |name: &str| -> Result<Option<u64>> {
        if metadata.has(&key(name)) { size(name).map(Some) } else { Ok(None) }
    };
    let width = size("embedding_length")?;
    let head_width = match optional("attention.key_length")? {
        Some(width) => width,
        None => width / view.query_heads() as u64,
    };
    let mut fields = Map::new();
    let mut set = |name: &str, value: Value| {
        fields.insert(name.to_owned(), value);
    };
    // llama.cpp calls Mistral a Llama; only the window tells them apart. It ignores a window of Qwen, as here.
    match optional("attention.sliding_window")? {
        Some(window) if architecture == "llama" && window > 0 => {
            set("model_type", json!("mistral"));
            set("sliding_window", json!(window));
        }
        _ => set("model_type", json!(architecture)),
    }
    set("vocab_size", json!(view.vocabulary()?));
    set("hidden_size", json!(width));
    set("intermediate_size", json!(size("feed_forward_length")?));
    set("num_hidden_layers", json!(size("block_count")?));
    set("num_attention_heads", json!(view.query_heads()));
    set("num_key_value_heads", json!(view.key_value_heads()));
    set("head_dim", json!(head_width));
    set("max_position_embeddings", json!(size("context_length")?));
    // Through text, so that 1e-5 in f32 does not become 9.999999747378752e-6.
    set("rms_norm_eps", short(metadata, &key("attention.layer_norm_rms_epsilon"))?);
    set("hidden_act", json!("silu"));
    set("tie_word_embeddings", json!(!view.has_head()));
    set("attention_bias", json!(architecture != "qwen2" && view.has_attention_bias()));
    set("rope_theta", theta(metadata, &key("rope.freq_base"))?);
    if let Some(rotated) = optional("rope.dimension_count")?
        && rotated != head_width
    {
        set("partial_rotary_factor", json!(rotated as f64 / head_width as f64));
    }
    match view.rope_divisors()? {
        Some(divisors) => set("rope_frequency_factors", json!(divisors)),
        None => {
            if let Some(scaling) = scaling(view, metadata, architecture)? {
                set("rope_scaling", scaling);
            }
        }
    }
    let ids = [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")];
    for (name, stored) in ids {
        let stored = format!("tokenizer.ggml.{stored}_token_id");
        if metadata.has(&stored) {
            set(name, json!(metadata.u64(&stored)?));
        }
    }
    Ok(Value::Object(fields))
}

/// A float key as its shortest f32 text says it; JSON has no NaN and would turn one into an absent field.
fn short(metadata: &GgufMetadata, key: &str) -> Result<Value> {
    let value = metadata.f32(key)?;
    if !value.is_finite() {
        let message = format!("is {value}, it must be finite");
        return Err(Error::GgufKey { key: key.to_owned(), message });
    }
    Ok(value.to_string().parse::<f64>().map_or(json!(value), |number| json!(number)))
}

fn theta(metadata: &GgufMetadata, key: &str) -> Result<Value> {
    if metadata.has(key) { short(metadata, key) } else { Ok(json!(10_000.0)) }
}

fn scaling(view: &GgufView, metadata: &GgufMetadata, architecture: &str) -> Result<Option<Value>> {
    let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
    if !metadata.has(&key("type")) {
        return Ok(None);
    }
    let kind = metadata.string(&key("type"))?;
    match kind {
        "none" => Ok(None),
        "linear" => Ok(Some(json!({ "rope_type": "linear", "factor": short(metadata, &key("factor"))? }))),
        "yarn" => {
            let mut fields = Map::new();
            fields.insert("rope_type".to_owned(), json!("yarn"));
            fields.insert("factor".to_owned(), short(metadata, &key("factor"))?);
            if metadata.has(&key("original_context_length")) {
                let length = metadata.u64(&key("original_context_length"))?;
                fields.insert("original_max_position_embeddings".to_owned(), json!(length));
            }
            if metadata.has(&key("attn_factor")) {
                fields.insert("attention_factor".to_owned(), short(metadata, &key("attn_factor"))?);
            }
            Ok(Some(Value::Object(fields)))
        }
        other => {
            let message = format!("`{}` is `{other}`, known are none, linear, yarn", key("type"));
            Err(Error::unsupported(view.file().path(), message))
        }
    }
}
