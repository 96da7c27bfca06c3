//! The registry of model families: `model_type` to the function that reads its configuration.

mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use pmetal_engine::device::{GateActivation, NormWeight};

use super::config::Config;
use super::rope::Rope;
use super::spec::{AttentionSpec, FeedForwardSpec, LayerSpec, Spec};
use crate::error::{Error, Result};

/// A family: the `model_type` of its configurations and how one becomes a [`Spec`].
pub struct Family {
    /// The exact `model_type`.
    pub model_type: &'static str,
    /// Reads a configuration.
    pub read: fn(&Config) -> Result<Spec>,
}

/// Every family that this program computes.
pub const FAMILIES: &[Family] = &[llama::FAMILY, mistral::FAMILY, qwen2::FAMILY, qwen3::FAMILY];

/// Most layers that a configuration may ask for.
const MOST_LAYERS: usize = 10_000;

/// The [`Spec`] of a configuration, by its exact `model_type`.
///
/// # Errors
/// [`Error::Config`] for an unknown `model_type` and for fields that are missing, out of range, contradictory or, as
/// far as they may matter, unknown.
pub fn read(config: &Config) -> Result<Spec> {
    let model_type = config.model_type()?;
    let family = FAMILIES.iter().find(|family| family.model_type == model_type).ok_or_else(|| {
        let known: Vec<_> = FAMILIES.iter().map(|family| family.model_type).collect();
        Error::Config(format!("model_type `{model_type}` is not one of {}", known.join(", ")))
    })?;
    let spec = (family.read)(config)?;
    config.check_unread()?;
    Ok(spec)
}

/// What the plain decoders share: RMSNorm before attention and feed-forward, grouped queries, SwiGLU.
/// `head_width` is the width where the file does not say.
fn plain(family: &'static str, config: &Config, head_width: Option<usize>) -> Result<Spec> {
    let (width, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
    let layers = config.size("num_hidden_layers")?;
    if layers > MOST_LAYERS {
        return Err(Error::Config(format!("`num_hidden_layers` is {layers}, the limit is {MOST_LAYERS}")));
    }
    let key_value_heads = config.optional_size("num_key_value_heads")?.unwrap_or(heads);
    if heads % key_value_heads != 0 {
        return Err(Error::Config(format!(
            "`num_attention_heads` is {heads}, not a multiple of `num_key_value_heads`, which is {key_value_heads}"
        )));
    }
    let head_width = match config.optional_size("head_dim")?.or(head_width) {
        Some(head_width) => head_width,
        None if width % heads == 0 => width / heads,
        None => {
            return Err(Error::Config(format!(
                "`hidden_size` is {width}, not a multiple of `num_attention_heads`, which is {heads}"
            )));
        }
    };
    let layer = LayerSpec {
        attention: AttentionSpec {
            query_heads: heads,
            key_value_heads,
            head_width,
            input_bias: false,
            output_bias: false,
            head_norm: false,
            scale: 1.0 / (head_width as f32).sqrt(),
            window: None,
            rope: Some(0),
        },
        feed_forward: FeedForwardSpec {
            width: config.size("intermediate_size")?,
            activation: activation(config)?,
            bias: false,
        },
    };
    let vocabulary = config.size("vocab_size")?;
    Ok(Spec {
        family,
        vocabulary,
        padding_id: padding_id(config, vocabulary)?,
        width,
        context_length: config.optional_size("max_position_embeddings")?.unwrap_or(2048),
        norm_epsilon: config.positive("rms_norm_eps", 1e-6)? as f32,
        norm_weight: NormWeight::Plain,
        ropes: vec![Rope::from_config(config, head_width, None)?],
        layers: vec![layer; layers],
        tied_head: config.flag("tie_word_embeddings", false)?,
    })
}

/// `pad_token_id`, counted from the end of the vocabulary when negative.
fn padding_id(config: &Config, vocabulary: usize) -> Result<Option<u32>> {
    let Some(value) = config.get("pad_token_id") else { return Ok(None) };
    let id = value.as_i64().map(|id| if id < 0 { id + vocabulary as i64 } else { id });
    match id.and_then(|id| u32::try_from(id).ok()) {
        Some(id) if (id as usize) < vocabulary => Ok(Some(id)),
        _ => Err(Error::Config(format!("`pad_token_id` is {value}, the vocabulary has {vocabulary} tokens"))),
    }
}

fn activation(config: &Config) -> Result<GateActivation> {
    match config.text("hidden_act", "silu")?.as_str() {
        "silu" | "swish" => Ok(GateActivation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(GateActivation::GeluTanh),
        other => Err(Error::Config(format!("`hidden_act` is `{other}`, expected silu or gelu_pytorch_tanh"))),
    }
}

/// The Qwen rule for sliding windows: `layer_types`, or all layers from `max_window_layers` on; only with
/// `use_sliding_window`.
fn qwen_windows(spec: &mut Spec, config: &Config) -> Result<()> {
    let window = config.optional_size("sliding_window")?.unwrap_or(4096);
    let used = config.flag("use_sliding_window", false)?;
    let first = config.optional_count("max_window_layers")?.unwrap_or(28);
    let kinds = config.layer_strings("layer_types", spec.layers.len())?;
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let sliding = match kinds.as_ref().map(|kinds| kinds[index].as_str()) {
            Some("sliding_attention") => true,
            Some("full_attention") => false,
            Some(other) => {
                return Err(Error::Config(format!("`layer_types` holds `{other}` for layer {index}")));
            }
            None => index >= first,
        };
        layer.attention.window = (sliding && used).then_some(window);
    }
    Ok(())
}
