//! What a run takes of a device's memory, and what would make it take less.

use pmetal_engine::{Category, Device, Recompute};

use super::config::{Effect, FIELDS, TrainConfig, Tuning};
use super::prepare::Description;
use crate::models::{Decoder, StepShape};

/// A change of a run's settings by which it takes less memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advice {
    /// Settings with their new values, as TOML.
    pub settings: Vec<(&'static str, String)>,
    /// Bytes less, estimated for this run.
    pub saved_bytes: usize,
    /// Whether a run that has begun can go on with it.
    pub is_resumable: bool,
}

/// Rows are not cut shorter than this by advice.
const SHORTEST_ROW: usize = 64;
/// f32 value, gradient and two moments of what is trained.
const TRAINED_BYTES: usize = 16;

/// What a step's memory depends on, for the settings of a run.
pub fn step_shape(config: &TrainConfig, decoder: &Decoder, description: &Description) -> StepShape {
    let device = decoder.device();
    StepShape {
        tokens: description.most_tokens,
        element_bytes: description.dtype.bytes(),
        adapter_ranks: decoder.adapter_columns().div_ceil(decoder.spec.layers.len().max(1)),
        recompute: config.gradient_checkpointing,
        offloads: offloads(config, device),
        on_host: device.is_host(),
    }
}

/// Whether the inputs of layers wait in the host's memory.
fn offloads(config: &TrainConfig, device: &Device) -> bool {
    let is_wanted = config.offload_activations && config.gradient_checkpointing == Recompute::Full;
    is_wanted && device.can_put_aside()
}

/// What a dry run estimates, by name, in bytes.
pub fn estimate(
    config: &TrainConfig,
    decoder: &Decoder,
    description: &Description,
) -> [(&'static str, usize); 5] {
    let trained = 4 * description.trained_parameters;
    [
        ("weights", decoder.device().memory().report().live(Category::Weights)),
        ("trained parameters", trained),
        ("gradients", trained),
        ("optimizer", 2 * trained),
        ("activations", decoder.spec.activation_bytes(&step_shape(config, decoder, description))),
    ]
}

/// Changes that are not in force yet, those that save most first.
pub fn advice(config: &TrainConfig, decoder: &Decoder, description: &Description) -> Vec<Advice> {
    let shape = step_shape(config, decoder, description);
    let now = decoder.spec.activation_bytes(&shape);
    let saved = |other: StepShape| now.saturating_sub(decoder.spec.activation_bytes(&other));
    let full = StepShape { recompute: Recompute::Full, ..shape };
    let part = |new: usize, old: usize| StepShape { tokens: shape.tokens * new / old.max(1), ..shape };
    let mut found = Vec::new();
    let mut add = |settings: Vec<(&'static str, String)>, saved_bytes: usize| {
        let is_free = |name: &str| FIELDS.iter().any(|f| f.name == name && f.effect == Effect::Nothing);
        let is_resumable = settings.iter().all(|setting| is_free(setting.0));
        found.push(Advice { settings, saved_bytes, is_resumable });
    };
    if config.gradient_checkpointing != Recompute::Full {
        add(vec![("gradient_checkpointing", "\"full\"".to_owned())], saved(full));
    } else if decoder.device().can_put_aside() && !shape.offloads {
        add(vec![("offload_activations", "true".to_owned())], saved(StepShape { offloads: true, ..shape }));
    }
    if config.batch_size > 1 {
        let (half, accumulation) = (config.batch_size / 2, config.gradient_accumulation_steps);
        let passes = (config.batch_size * accumulation).div_ceil(half);
        let settings =
            vec![("batch_size", half.to_string()), ("gradient_accumulation_steps", passes.to_string())];
        add(settings, saved(part(half, config.batch_size)));
    }
    let length = description.max_seq_len;
    if length >= 2 * SHORTEST_ROW {
        add(vec![("max_seq_len", (length / 2).to_string())], saved(part(length / 2, length)));
    }
    if config.tuning == Tuning::Full {
        let each = TRAINED_BYTES - description.dtype.bytes();
        add(vec![("tuning", "\"lora\"".to_owned())], each * description.trained_parameters);
    } else if config.lora_r > 1 {
        let half = config.lora_r / 2;
        let fewer = description.trained_parameters * (config.lora_r - half) / config.lora_r;
        add(vec![("lora_r", half.to_string())], TRAINED_BYTES * fewer);
    }
    found.retain(|advice| advice.saved_bytes > 0);
    found.sort_by_key(|advice| std::cmp::Reverse(advice.saved_bytes));
    found
}
