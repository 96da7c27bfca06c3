//! What a checkpoint calls the tensors of a decoder, and whether it holds them all and no others.

use std::collections::BTreeSet;

use pmetal_formats::checkpoint::Checkpoint;

use super::{EMBEDDING, HEAD, needs};
use crate::error::{Faults, Result};
use crate::models::spec::Spec;

/// What the paths of a text model's modules begin with where it is alone.
pub(crate) const ALONE: &str = "model.";

/// Where checkpoints keep a text model: before its layers, the head's name, and a name that tells. All but the first are
/// multimodal.
const TEXT_MODELS: [(&str, &str, &str); 3] = [
    (ALONE, HEAD, "model.embed_tokens.weight"),
    ("language_model.model.", "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
    ("model.language_model.", HEAD, "model.language_model.embed_tokens.weight"),
];

/// What the paths of a text model's modules may begin with: where it is alone first.
pub(crate) fn places() -> impl Iterator<Item = &'static str> {
    TEXT_MODELS.iter().map(|(place, ..)| *place)
}

/// What the paths of a text model's modules begin with among the paths of a model; where it is alone, if none tells.
pub(crate) fn place_among<'a>(mut names: impl Iterator<Item = &'a str>) -> &'static str {
    names.find_map(|name| places().skip(1).find(|place| name.starts_with(place))).unwrap_or(ALONE)
}

/// The path of a tensor or module in a model that has its text model there.
pub(crate) fn path_at(place: &str, path: &str) -> String {
    match path.strip_prefix(ALONE) {
        Some(rest) => format!("{place}{rest}"),
        None => path.to_owned(),
    }
}

/// Parts of multimodal models that are not computed.
const OTHER_PARTS: [&str; 5] =
    ["vision_tower", "vision_model", "visual", "multi_modal_projector", "audio_tower"];

/// Ends of names that checkpoints have other names for: ours, and theirs, where `{}` stands for an expert's number and
/// several are stacked, one expert after the other and the parts of an expert one under the other.
const OTHER_NAMES: [(&str, &[&str]); 8] = [
    (".mlp.gate.weight", &[".block_sparse_moe.gate.weight"]),
    (".mlp.experts.gate_up_proj", &[".mlp.experts.{}.gate_proj.weight", ".mlp.experts.{}.up_proj.weight"]),
    (".mlp.experts.down_proj", &[".mlp.experts.{}.down_proj.weight"]),
    (
        ".mlp.experts.gate_up_proj",
        &[".block_sparse_moe.experts.{}.w1.weight", ".block_sparse_moe.experts.{}.w3.weight"],
    ),
    (".mlp.experts.down_proj", &[".block_sparse_moe.experts.{}.w2.weight"]),
    (".block_sparse_moe.router.weight", &[".block_sparse_moe.router.layer.weight"]),
    (".block_sparse_moe.experts.gate_up_proj", &[".block_sparse_moe.input_linear.weight"]),
    (".block_sparse_moe.experts.down_proj", &[".block_sparse_moe.output_linear.weight"]),
];

/// Rows of two tables that are compared at a time.
const ROWS_AT_ONCE: usize = 4096;

/// A stored tensor that is a tensor of the decoder, or a part of one: its bytes follow those of the part before.
pub(crate) struct Piece {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
}

/// Names of tensors as they are stored.
pub(crate) struct StoredNames<'a> {
    checkpoint: &'a Checkpoint,
    layers: &'static str,
    head: &'static str,
}

impl<'a> StoredNames<'a> {
    /// As a checkpoint has them.
    pub(crate) fn of(checkpoint: &'a Checkpoint) -> Self {
        let found = TEXT_MODELS.iter().find(|(_, _, name)| checkpoint.info(name).is_some());
        let &(layers, head, _) = found.unwrap_or(&TEXT_MODELS[0]);
        Self { checkpoint, layers, head }
    }

    /// Where a tensor of a causal language model lies. What is nowhere has the name that it should have.
    pub(crate) fn pieces(&self, name: &str, shape: &[usize]) -> Vec<Piece> {
        let name = if name == HEAD { self.head.to_owned() } else { path_at(self.layers, name) };
        let is_there = |name: &str| self.checkpoint.info(name).is_some();
        if !is_there(&name) {
            let named =
                OTHER_NAMES.iter().filter_map(|(end, others)| Some((name.strip_suffix(end)?, others)));
            for (start, others) in named {
                if is_there(&format!("{start}{}", others[0].replace("{}", "0"))) {
                    return parts(start, others, shape);
                }
            }
        }
        vec![Piece { name, shape: shape.to_vec() }]
    }

    /// The name of a stored tensor where the text model is alone.
    pub(super) fn alone(&self, name: &str) -> String {
        match name.strip_prefix(self.layers) {
            Some(rest) => format!("{ALONE}{rest}"),
            None if name == self.head => HEAD.to_owned(),
            None => name.to_owned(),
        }
    }

    /// Whether there is a head with other values than the embedding's.
    pub(super) fn has_head_of_its_own(&self) -> Result<bool> {
        let (checkpoint, embedding) = (self.checkpoint, path_at(self.layers, EMBEDDING));
        let (Some(head), Some(table)) = (checkpoint.info(self.head), checkpoint.info(&embedding)) else {
            return Ok(false);
        };
        if head.shape != table.shape {
            return Ok(false);
        }
        // Some rows at a time: both may be large.
        let rows = head.shape.first().copied().unwrap_or(0);
        for first in (0..rows).step_by(ROWS_AT_ONCE) {
            let range = first..rows.min(first + ROWS_AT_ONCE);
            if checkpoint.read_f32_rows(self.head, range.clone())?
                != checkpoint.read_f32_rows(&embedding, range)?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a tensor belongs to another part of a multimodal model, and to which.
    fn other_part<'b>(&self, name: &'b str) -> Option<&'b str> {
        let inner = name.strip_prefix("model.").unwrap_or(name);
        let part = inner.split('.').next().unwrap_or(inner);
        (self.layers != ALONE && OTHER_PARTS.contains(&part)).then_some(part)
    }
}

/// The parts of a tensor of all experts \[X, N, D\].
fn parts(start: &str, names: &[&str], shape: &[usize]) -> Vec<Piece> {
    if !names[0].contains("{}") {
        return vec![Piece { name: format!("{start}{}", names[0]), shape: shape.to_vec() }];
    }
    let [experts, rows, columns] = *shape else { return Vec::new() };
    let each = (0..experts).flat_map(|expert| names.iter().map(move |name| (expert, name)));
    let piece = |(expert, name): (usize, &&str)| Piece {
        name: format!("{start}{}", name.replace("{}", &expert.to_string())),
        shape: vec![rows / names.len(), columns],
    };
    each.map(piece).collect()
}

/// The name of the tensor that a stored tensor of one expert is a part of; others have their own.
pub(super) fn stacked_name(stored: &str) -> String {
    for (end, others) in OTHER_NAMES {
        for other in others {
            let Some((before, after)) = other.split_once("{}") else { continue };
            let Some((start, rest)) = stored.split_once(before) else { continue };
            let number = rest.strip_suffix(after).is_some_and(|number| number.parse::<usize>().is_ok());
            if number {
                return format!("{start}{end}");
            }
        }
    }
    stored.to_owned()
}

/// Every way in which the parameter of all experts is stored as layers of one expert each: the modules of its parts, where
/// `{}` stands for the expert's number. Adapters of before transformers 5 name these.
pub(crate) fn one_by_one(parameter: &str) -> impl Iterator<Item = Vec<String>> {
    OTHER_NAMES.iter().filter_map(move |(end, others)| {
        let start = parameter.strip_suffix(end)?;
        let module = |other: &&str| {
            let module = other.strip_suffix(".weight").filter(|module| module.contains("{}"))?;
            Some(format!("{start}{module}"))
        };
        others.iter().map(module).collect()
    })
}

/// The last part of the name of the parameter that stacks layers which are called so in each expert.
pub(crate) fn stack_of(layer: &str) -> Option<&'static str> {
    let is_one = |other: &&str| other.ends_with(&format!(".{{}}.{layer}.weight"));
    let (end, _) = OTHER_NAMES.iter().find(|(_, others)| others.iter().any(is_one))?;
    end.rsplit('.').next()
}

/// Buffers that old checkpoints carry and that follow from the configuration.
fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".attn.masked_bias")
}

/// Compares a checkpoint's tensors with what a specification needs.
///
/// # Errors
/// [`crate::error::Error::Checkpoint`] listing what is missing, has another shape or is left over.
pub fn check(checkpoint: &Checkpoint, spec: &Spec, notes: &mut Vec<String>) -> Result<()> {
    let names = StoredNames::of(checkpoint);
    let mut faults = Faults::default();
    let mut left: BTreeSet<&str> = checkpoint.names().collect();
    for need in needs(spec) {
        for Piece { name, shape } in names.pieces(&need.name, &need.shape) {
            match checkpoint.info(&name) {
                None => faults.add(format!("tensor `{name}` {shape:?} is missing")),
                Some(info) if info.shape != shape => {
                    let actual = &info.shape;
                    faults.add(format!("tensor `{name}` has shape {actual:?}, the config needs {shape:?}"));
                }
                Some(_) => {}
            }
            left.remove(name.as_str());
        }
    }
    if spec.tied_head && left.remove(names.head) {
        notes.push(format!("{} is passed over: the config ties the head to the embedding", names.head));
    }
    let further = spec.layers.len()..spec.layers.len() + spec.further_layers;
    for index in further {
        let prefix = format!("{}layers.{index}.", names.layers);
        let held = left.len();
        left.retain(|name| !name.starts_with(&prefix));
        if left.len() < held {
            notes.push(format!("layer {index} is passed over: it predicts further tokens"));
        }
    }
    if spec.further_layers > 0 && left.iter().any(|name| name.starts_with("mtp.")) {
        left.retain(|name| !name.starts_with("mtp."));
        notes.push("mtp is passed over: it predicts further tokens".to_owned());
    }
    let mut parts: BTreeSet<&str> = BTreeSet::new();
    for name in left.into_iter().filter(|name| !is_derived(name)) {
        match names.other_part(name) {
            Some(part) => {
                parts.insert(part);
            }
            None => {
                faults.add(format!("tensor `{name}` is not used by model type `{}`", spec.family));
            }
        }
    }
    for part in parts {
        notes.push(format!("{part} is passed over: only the text model is computed"));
    }
    faults.into_result(checkpoint.path())
}
