//! The registry of model families: `model_type` to the function that reads its configuration.

mod cohere;
mod deepseek;
mod deepseek_v32;
mod gemma2;
mod gemma3;
mod glm4;
mod gpt_oss;
mod granite;
mod granitemoe;
mod granitemoeshared;
mod llama;
mod llama4;
mod mistral;
mod mixtral;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_5_moe;
mod qwen_hybrid;
mod qwen_moe;
mod smollm3;

use pmetal_engine::device::MaskKind;
use pmetal_engine::device::{GateActivation, NormWeight, RopePairing};
use pmetal_engine::ops::{Gate, PairedGate, Router, Weighting};

use super::config::Config;
use super::loader::stored::ALONE;
use super::rope::{Rope, RopeKind};
use super::spec::{
    AttentionSpec, DenseNames, DenseSpec, ExpertsSpec, FeedForwardSpec, HeadNorm, LayerNorms, LayerSpec,
    NormKind, Projection, SharedSpec, Spec,
};
use crate::error::{Error, Result};

/// A family: the `model_type` of its configurations and how one becomes a [`Spec`].
pub struct Family {
    /// What its models are called.
    pub name: &'static str,
    /// The exact `model_type`.
    pub model_type: &'static str,
    /// Reads a configuration.
    pub read: fn(&Config) -> Result<Spec>,
}

/// Every family that this program computes.
pub const FAMILIES: &[Family] = &[
    cohere::FIRST,
    cohere::SECOND,
    deepseek::V3,
    deepseek_v32::FAMILY,
    gemma2::FAMILY,
    gemma3::TEXT,
    gemma3::MULTIMODAL,
    glm4::FAMILY,
    gpt_oss::FAMILY,
    granite::FAMILY,
    granitemoe::FAMILY,
    granitemoeshared::FAMILY,
    llama::FAMILY,
    llama4::TEXT,
    llama4::MULTIMODAL,
    mistral::FAMILY,
    mixtral::FAMILY,
    olmo2::FAMILY,
    phi3::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
    qwen_moe::SECOND,
    qwen_moe::THIRD,
    qwen_hybrid::NEXT,
    qwen_hybrid::TEXT,
    qwen_hybrid::MULTIMODAL,
    qwen3_5_moe::TEXT,
    qwen3_5_moe::MULTIMODAL,
    smollm3::FAMILY,
];

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

/// What a configuration means where it says nothing, by family; `None` = it has to say.
struct Defaults {
    vocabulary: Option<usize>,
    width: Option<usize>,
    inner: Option<usize>,
    layers: Option<usize>,
    heads: Option<usize>,
    /// As many as query heads where this is `None`.
    key_value_heads: Option<usize>,
    /// The width divided by the heads where this is `None`.
    head_width: Option<usize>,
    context_length: usize,
    /// The field that names the activation.
    activation_field: &'static str,
    activation: &'static str,
    /// The field with the epsilon of norms.
    epsilon_field: &'static str,
    epsilon: f64,
    theta: f64,
    pairing: RopePairing,
    /// Share of each head that is rotated, where a configuration may say so.
    rotated_part: Option<f64>,
    /// The context of the first training by which rotations are stretched, if not the context.
    trained_length: Option<usize>,
    padding_id: Option<u32>,
    tied_head: bool,
}

impl Defaults {
    /// Those of Llama.
    const LLAMA: Self = Self {
        vocabulary: None,
        width: None,
        inner: None,
        layers: None,
        heads: None,
        key_value_heads: None,
        head_width: None,
        context_length: 2048,
        activation_field: "hidden_act",
        activation: "silu",
        epsilon_field: "rms_norm_eps",
        epsilon: 1e-6,
        theta: 10_000.0,
        pairing: RopePairing::Halves,
        rotated_part: None,
        trained_length: None,
        padding_id: None,
        tied_head: false,
    };
}

fn size(config: &Config, name: &str, default: Option<usize>) -> Result<usize> {
    match default {
        Some(default) => Ok(config.optional_size(name)?.unwrap_or(default)),
        None => config.size(name),
    }
}

/// What the plain decoders share: RMSNorm before attention and feed-forward, grouped queries, SwiGLU.
fn plain(family: &'static str, config: &Config, defaults: &Defaults) -> Result<Spec> {
    let width = size(config, "hidden_size", defaults.width)?;
    let heads = size(config, "num_attention_heads", defaults.heads)?;
    let layers = size(config, "num_hidden_layers", defaults.layers)?;
    if layers > MOST_LAYERS {
        return Err(Error::Config(format!("`num_hidden_layers` is {layers}, the limit is {MOST_LAYERS}")));
    }
    // A null means what it means in Llama.
    let default_heads = if config.has("num_key_value_heads") { None } else { defaults.key_value_heads };
    let key_value_heads = config.optional_size("num_key_value_heads")?.or(default_heads).unwrap_or(heads);
    if heads % key_value_heads != 0 {
        return Err(Error::Config(format!(
            "`num_attention_heads` is {heads}, not a multiple of `num_key_value_heads`, which is {key_value_heads}"
        )));
    }
    let head_width = match config.optional_size("head_dim")?.or(defaults.head_width) {
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
            value_width: head_width,
            output_gate: false,
            projection: Projection::Apart,
            input_bias: false,
            output_bias: false,
            head_norm: HeadNorm::None,
            scale: 1.0 / (head_width as f32).sqrt(),
            softcap: None,
            sinks: false,
            mask: MaskKind::default(),
            rope: Some(0),
            temperature: None,
        },
        delta: None,
        feed_forward: FeedForwardSpec::Dense(DenseSpec {
            path: "mlp",
            width: size(config, "intermediate_size", defaults.inner)?,
            activation: activation(config, defaults)?,
            names: DenseNames::APART,
            bias: false,
        }),
        norms: LayerNorms::BEFORE,
    };
    let vocabulary = size(config, "vocab_size", defaults.vocabulary)?;
    let Defaults { theta, pairing, rotated_part, context_length, trained_length, .. } = *defaults;
    let kind = RopeKind { width: head_width, theta, pairing, rotated_part, context_length, trained_length };
    Ok(Spec {
        family,
        vocabulary,
        padding_id: padding_id(config, vocabulary, defaults)?,
        width,
        context_length: config.optional_size("max_position_embeddings")?.unwrap_or(defaults.context_length),
        norm_epsilon: config.positive(defaults.epsilon_field, defaults.epsilon)? as f32,
        norm: NormKind::Rms(NormWeight::Plain),
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logit_scale: 1.0,
        logit_softcap: None,
        ropes: vec![Rope::from_config(config, kind)?],
        layers: vec![layer; layers],
        tied_head: config.flag("tie_word_embeddings", defaults.tied_head)?,
        further_layers: 0,
        place: ALONE,
    })
}

/// `pad_token_id`, counted from the end of the vocabulary when negative.
fn padding_id(config: &Config, vocabulary: usize, defaults: &Defaults) -> Result<Option<u32>> {
    if !config.has("pad_token_id") {
        return Ok(defaults.padding_id.filter(|&id| (id as usize) < vocabulary));
    }
    let Some(value) = config.get("pad_token_id") else { return Ok(None) };
    let id = value.as_i64().map(|id| if id < 0 { id + vocabulary as i64 } else { id });
    match id.and_then(|id| u32::try_from(id).ok()) {
        Some(id) if (id as usize) < vocabulary => Ok(Some(id)),
        _ => Err(Error::Config(format!("`pad_token_id` is {value}, the vocabulary has {vocabulary} tokens"))),
    }
}

fn activation(config: &Config, defaults: &Defaults) -> Result<GateActivation> {
    let field = defaults.activation_field;
    match config.text(field, defaults.activation)?.as_str() {
        "silu" | "swish" => Ok(GateActivation::Silu),
        "gelu" => Ok(GateActivation::Gelu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(GateActivation::GeluTanh),
        other => {
            Err(Error::Config(format!("`{field}` is `{other}`, expected silu, gelu or gelu_pytorch_tanh")))
        }
    }
}

/// Biases of all four projections of attention, by one field.
fn attention_biases(spec: &mut Spec, config: &Config, default: bool) -> Result<()> {
    let bias = config.flag("attention_bias", default)?;
    for layer in &mut spec.layers {
        layer.attention.input_bias = bias;
        layer.attention.output_bias = bias;
    }
    Ok(())
}

/// Whether each layer is of the first of two kinds: as a list of the file says, or what the family does without it.
fn layers_of_kind(
    config: &Config,
    field: &str,
    [kind, other_kind]: [&str; 2],
    layers: usize,
    default: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    let Some(kinds) = config.layer_strings(field, layers)? else {
        return Ok((0..layers).map(default).collect());
    };
    let each = kinds.iter().enumerate().map(|(index, held)| match held {
        held if held == kind => Ok(true),
        held if held == other_kind => Ok(false),
        held => Err(Error::Config(format!("`{field}` holds `{held}` for layer {index}"))),
    });
    each.collect()
}

/// Whether each layer has a sliding window: `layer_types`, or what the family does where the file does not say.
fn sliding_layers(config: &Config, layers: usize, default: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
    layers_of_kind(config, "layer_types", ["sliding_attention", "full_attention"], layers, default)
}

/// Refuses layers with a window in a family that has none; some writers list the others.
fn without_windows(spec: &Spec, config: &Config) -> Result<()> {
    if sliding_layers(config, spec.layers.len(), |_| false)?.contains(&true) {
        let family = spec.family;
        return Err(Error::Config(format!("`layer_types` asks for windows, which `{family}` does not have")));
    }
    Ok(())
}

/// An expert for all tokens, like the dense layers of the model but for its width.
fn shared_expert(spec: &Spec, path: &'static str, width: usize, gate: Option<&'static str>) -> SharedSpec {
    let dense =
        DenseSpec { path, width, activation: spec.activation(), names: DenseNames::APART, bias: false };
    SharedSpec { dense, gate }
}

/// Changes the feed-forward part of every layer that has no experts.
fn change_dense(spec: &mut Spec, change: impl Fn(&mut DenseSpec)) {
    let parts = spec.layers.iter_mut().filter_map(|layer| layer.feed_forward.dense_mut());
    parts.for_each(change);
}

/// The window of layers that have one.
fn set_windows(spec: &mut Spec, sliding: &[bool], window: Option<usize>) {
    for (layer, sliding) in spec.layers.iter_mut().zip(sliding) {
        layer.attention.mask.window = window.filter(|_| *sliding);
    }
}

/// The Qwen rule for sliding windows: `layer_types`, or all layers from `max_window_layers` on; only with
/// `use_sliding_window`.
fn qwen_windows(spec: &mut Spec, config: &Config) -> Result<()> {
    let window = config.optional_size("sliding_window")?.unwrap_or(4096);
    let used = config.flag("use_sliding_window", false)?;
    let first = config.optional_count("max_window_layers")?.unwrap_or(28);
    let sliding = sliding_layers(config, spec.layers.len(), |index| index >= first)?;
    set_windows(spec, &sliding, used.then_some(window));
    Ok(())
}

/// The field of the two that a configuration has, else the second: transformers knows some by several names.
fn field_of<'a>(config: &Config, [first, second]: [&'a str; 2]) -> &'a str {
    if config.has(first) { first } else { second }
}

/// A mixture of experts as most families have it, chosen by a softmax; its width is the caller's to say.
fn experts(config: &Config, count_field: &str, count: usize, choices: usize) -> Result<ExpertsSpec> {
    let count = config.optional_size(count_field)?.unwrap_or(count);
    let choices = config.optional_size("num_experts_per_tok")?.unwrap_or(choices);
    if choices > count {
        return Err(Error::Config(format!("`num_experts_per_tok` is {choices}, `{count_field}` is {count}")));
    }
    Ok(ExpertsSpec {
        path: "mlp.experts",
        router_path: "mlp.gate",
        count,
        width: 0,
        gate: PairedGate::Halves(activation(config, &Defaults::LLAMA)?),
        router: Router { gate: Gate::Softmax, choices, normalise: None, groups: None, scale: 1.0 },
        router_bias: false,
        wide_router: false,
        correction: false,
        weighting: Weighting::Output,
        transposed: false,
        swapped_adapters: false,
        bias: false,
        shared: None,
        balance: None,
    })
}

/// The factor of the loss that balances experts, which counts where `output_router_logits` is set.
fn balance_factor(config: &Config, default: f64) -> Result<Option<f32>> {
    let factor = config.number("router_aux_loss_coef", default)?;
    Ok(config.flag("output_router_logits", false)?.then_some(factor as f32))
}

/// Refuses a field that would change the mathematics in a way that is not computed.
fn refuse(config: &Config, name: &str) -> Result<()> {
    match config.flag(name, false)? {
        true => Err(Error::Config(format!("`{name}` is true, which is not computed"))),
        false => Ok(()),
    }
}

/// The text model of a multimodal configuration; `others` are fields of the other parts.
fn text_part(config: &Config, others: &[&str], read: impl FnOnce(&Config) -> Result<Spec>) -> Result<Spec> {
    let text =
        config.object("text_config")?.ok_or_else(|| Error::Config("`text_config` is missing".to_owned()))?;
    let ids = config.names().filter(|name| name.ends_with("_token_id") || name.ends_with("_token_index"));
    for name in ids.chain(others.iter().copied()) {
        config.get(name);
    }
    let mut spec = read(&text)?;
    spec.tied_head = config.flag("tie_word_embeddings", spec.tied_head)?;
    text.check_unread()?;
    Ok(spec)
}
