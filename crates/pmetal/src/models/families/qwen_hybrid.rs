//! Qwen3-Next and Qwen 3.5: three layers of linear attention for each of full attention, whose result is gated.

use pmetal_engine::device::{GateActivation, NormWeight};

use super::qwen_moe::sparse_layers;
use super::{Defaults, Family, attention_biases, experts, layers_of_kind, plain, shared_expert, text_part};
use crate::error::{Error, Result};
use crate::models::config::Config;
use crate::models::spec::{DeltaSpec, HeadNorm, NormKind, Spec};

pub(super) const NEXT: Family = Family { name: "Qwen3-Next", model_type: "qwen3_next", read: read_next };
pub(super) const TEXT: Family = Family {
    name: "Qwen 3.5, text",
    model_type: "qwen3_5_text",
    read: |config| read_dense("qwen3_5_text", config),
};
pub(super) const MULTIMODAL: Family = Family {
    name: "Qwen 3.5, text part of multimodal models",
    model_type: "qwen3_5",
    read: |config| text_part(config, &OTHER_PARTS, |text| read_dense("qwen3_5", text)),
};

/// Fields of multimodal Qwen 3.5 that are not those of its text model.
pub(super) const OTHER_PARTS: [&str; 4] =
    ["vision_config", "language_model_only", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"];

/// What those with experts have in common where a configuration says nothing.
pub(super) const DEFAULTS: Defaults = Defaults {
    head_width: Some(256),
    context_length: 32_768,
    rotated_part: Some(0.25),
    key_value_heads: Some(2),
    ..Defaults::LLAMA
};

fn read_next(config: &Config) -> Result<Spec> {
    let defaults =
        Defaults { heads: Some(16), width: Some(2048), inner: Some(5632), layers: Some(48), ..DEFAULTS };
    let mut spec = read("qwen3_next", config, &defaults, true)?;
    let mut part = experts(config, "num_experts", 512, 10)?;
    let width = config.optional_size("shared_expert_intermediate_size")?.unwrap_or(512);
    part.shared = Some(shared_expert(&spec, "mlp.shared_expert", width, Some("mlp.shared_expert_gate")));
    sparse_layers(&mut spec, config, part, (true, 512))?;
    Ok(spec)
}

fn read_dense(family: &'static str, config: &Config) -> Result<Spec> {
    read_text(family, config, &Defaults { key_value_heads: Some(4), ..DEFAULTS })
}

/// What Qwen 3.5 has in common with its mixtures of experts.
pub(super) fn read_text(family: &'static str, config: &Config, defaults: &Defaults) -> Result<Spec> {
    let spec = read(family, config, defaults, false)?;
    // Where some layers would have no experts, and what none of this computes.
    config.pass_over(&[
        "mlp_only_layers",
        "mtp_num_hidden_layers",
        "mtp_use_dedicated_embeddings",
        "mamba_ssm_dtype",
    ]);
    let gate = config.text("output_gate_type", "silu")?;
    if !matches!(gate.as_str(), "silu" | "swish") {
        return Err(Error::Config(format!("`output_gate_type` is `{gate}`, which is not computed")));
    }
    if !config.flag("attn_output_gate", true)? {
        return Err(Error::Config("`attn_output_gate` is false, which is not computed".to_owned()));
    }
    Ok(spec)
}

fn read(family: &'static str, config: &Config, defaults: &Defaults, grouped: bool) -> Result<Spec> {
    let mut spec = plain(family, config, defaults)?;
    if spec.activation() != GateActivation::Silu {
        // It would be that of the convolution too.
        return Err(Error::Config("`hidden_act` is not silu, which is not computed".to_owned()));
    }
    attention_biases(&mut spec, config, false)?;
    spec.norm = NormKind::Rms(NormWeight::PlusOne);
    // Their parts that predict further tokens are not computed.
    spec.further_layers = 1;
    let number =
        |name: &str, default: usize| -> Result<usize> { Ok(config.optional_size(name)?.unwrap_or(default)) };
    let delta = DeltaSpec {
        key_heads: number("linear_num_key_heads", 16)?,
        value_heads: number("linear_num_value_heads", 32)?,
        key_width: number("linear_key_head_dim", 128)?,
        value_width: number("linear_value_head_dim", 128)?,
        taps: number("linear_conv_kernel_dim", 4)?,
        grouped,
    };
    if !delta.value_heads.is_multiple_of(delta.key_heads) {
        return Err(Error::Config(format!(
            "`linear_num_value_heads` is {}, not a multiple of `linear_num_key_heads`, which is {}",
            delta.value_heads, delta.key_heads
        )));
    }
    let every = number("full_attention_interval", 4)?;
    let kinds = ["linear_attention", "full_attention"];
    let is_linear = |index: usize| !(index + 1).is_multiple_of(every);
    let linear = layers_of_kind(config, "layer_types", kinds, spec.layers.len(), is_linear)?;
    for (layer, linear) in spec.layers.iter_mut().zip(linear) {
        layer.delta = linear.then_some(delta);
        layer.attention.output_gate = true;
        layer.attention.head_norm = HeadNorm::Shared;
    }
    Ok(spec)
}
