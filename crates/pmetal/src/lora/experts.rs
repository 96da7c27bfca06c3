//! Adapters of matrices of experts, which PEFT calls adapters of parameters.
//!
//! Files hold A and B of all experts as one matrix each, in an order of their own, and the adapters of several parameters
//! of one module under nested names. The engine has them as \[X, R, D\] and \[X, N, R\]; everything here is named after the
//! files.

use std::collections::{BTreeMap, BTreeSet};

use pmetal_engine::ops::ExpertLora;
use pmetal_engine::random::{RandomKey, stream_of};
use pmetal_engine::{Category, Device, Parameter, Tensor, Weight};
use pmetal_formats::adapter::{AdapterConfig, LoraHalf, LoraShape, ModuleNames, parameter_tensor_name};

use super::by_expert::{self, OneByOne};
use super::{AdapterFile, Targets};
use crate::error::Result;
use crate::models::Decoder;
use crate::models::loader::stored::stack_of;

/// One half of an adapter as the engine has it: its name, shape and order in files.
#[derive(Debug, Clone)]
pub struct Half {
    /// The tensor in a file.
    pub name: String,
    /// Which half it is in the file.
    pub half: LoraHalf,
    /// X, R and what the other dimension is.
    sizes: [usize; 3],
    /// Whether the engine's order of an expert is \[R, width\].
    rank_first: bool,
}

/// The adapter of one parameter.
#[derive(Debug, Clone)]
struct Target {
    /// The parameter.
    name: String,
    shape: LoraShape,
    /// The engine's A and B.
    halves: [Half; 2],
}

impl Half {
    /// The shape in the engine.
    fn shape(&self) -> [usize; 3] {
        let [experts, rank, width] = self.sizes;
        if self.rank_first { [experts, rank, width] } else { [experts, width, rank] }
    }

    /// The shape in files: A \[X R, width\] by experts, B \[width, R X\] by ranks.
    pub fn file_shape(&self) -> [usize; 2] {
        let [experts, rank, width] = self.sizes;
        match self.half {
            LoraHalf::A => [experts * rank, width],
            LoraHalf::B => [width, rank * experts],
        }
    }

    /// Places of an element in the engine and in the file.
    fn places(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let [experts, ranks, width] = self.sizes;
        let each = (0..experts).flat_map(move |x| (0..ranks).map(move |r| (x, r)));
        each.flat_map(move |(x, r)| (0..width).map(move |i| (x, r, i))).map(move |(x, r, i)| {
            let ours =
                if self.rank_first { (x * ranks + r) * width + i } else { (x * width + i) * ranks + r };
            let theirs = match self.half {
                LoraHalf::A => (x * ranks + r) * width + i,
                LoraHalf::B => (i * ranks + r) * experts + x,
            };
            (ours, theirs)
        })
    }

    /// Values in the engine's order, as a file has them.
    pub fn to_file(&self, values: &[f32]) -> Vec<f32> {
        let mut stored = vec![0.0; values.len()];
        self.places().for_each(|(ours, theirs)| stored[theirs] = values[ours]);
        stored
    }

    fn to_engine(&self, stored: &[f32]) -> Vec<f32> {
        let mut values = vec![0.0; stored.len()];
        self.places().for_each(|(ours, theirs)| values[ours] = stored[theirs]);
        values
    }
}

/// A matrix of experts: its parameter, \[X, N, D\], and whether PEFT takes N for the inputs (Llama 4's matrices are stored
/// transposed without saying so).
pub struct ExpertMatrix {
    /// The parameter's name.
    pub name: String,
    /// X, N and D.
    pub sizes: [usize; 3],
    /// Whether A is on the side of the results.
    pub swapped: bool,
    /// Whether checkpoints hold it as \[X, D, N\].
    pub transposed: bool,
}

/// The module of a parameter.
fn module_of(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(module, _)| module)
}

/// The engine's A and B of one of the adapted matrices, which come with their ranks, in the order in which modules declare
/// them: the last one of a module is wrapped around those before it.
fn halves_of(adapted: &[(&ExpertMatrix, usize)], index: usize) -> [Half; 2] {
    let (matrix, rank) = adapted[index];
    let module = module_of(&matrix.name);
    let depth = adapted[index + 1..].iter().filter(|(other, _)| module_of(&other.name) == module).count();
    let [experts, features, width] = matrix.sizes;
    let half = |half: LoraHalf, width: usize, rank_first: bool| Half {
        name: parameter_tensor_name(module, depth, half),
        half,
        sizes: [experts, rank, width],
        rank_first,
    };
    let (of_inputs, of_results) =
        if matrix.swapped { (LoraHalf::B, LoraHalf::A) } else { (LoraHalf::A, LoraHalf::B) };
    [half(of_inputs, width, true), half(of_results, features, false)]
}

/// What a configuration targets.
fn targets(matrices: &[ExpertMatrix], matcher: &Targets) -> Vec<Target> {
    let chosen: Vec<(&ExpertMatrix, LoraShape)> = matrices
        .iter()
        .filter_map(|matrix| matcher.parameter(&matrix.name).map(|shape| (matrix, shape)))
        .collect();
    let ranked: Vec<(&ExpertMatrix, usize)> =
        chosen.iter().map(|(matrix, shape)| (*matrix, shape.rank)).collect();
    let target = |(index, (matrix, shape)): (usize, (&ExpertMatrix, LoraShape))| Target {
        name: matrix.name.clone(),
        shape,
        halves: halves_of(&ranked, index),
    };
    chosen.into_iter().enumerate().map(target).collect()
}

/// How one half of an engine's adapter lies in files.
#[derive(Debug, Clone)]
pub enum Stored {
    /// All experts in one tensor.
    Whole(Half),
    /// A tensor for each expert and each of its layers.
    ByExpert(OneByOne),
}

impl Stored {
    /// The name of the trained parameter.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Whole(half) => &half.name,
            Self::ByExpert(parts) => &parts.name,
        }
    }

    /// The gradients of the tensors of files, by name, of that of the engine's half.
    pub fn gradients(&self, gradient: &[f32]) -> Vec<(String, Vec<f32>)> {
        match self {
            Self::Whole(half) => vec![(half.name.clone(), half.to_file(gradient))],
            Self::ByExpert(parts) => parts.gradients(gradient),
        }
    }
}

/// One half of the adapter of one parameter, in the engine's order.
pub struct ExpertHalf {
    /// Its shape.
    pub shape: [usize; 3],
    /// Its values.
    pub values: Vec<f32>,
    /// Where they came from.
    pub stored: Stored,
}

/// The adapter of one parameter.
pub struct ExpertPart {
    /// s.
    pub scale: f64,
    /// A \[X, R, D\].
    pub a: ExpertHalf,
    /// B \[X, N, R\].
    pub b: ExpertHalf,
}

impl ExpertPart {
    /// Whether files hold it one expert at a time.
    pub fn is_by_expert(&self) -> bool {
        matches!(self.a.stored, Stored::ByExpert(_))
    }
}

/// Adapters of a file, by the name of the parameter.
pub type ExpertParts = BTreeMap<String, ExpertPart>;

/// Reads the adapters of a file that a configuration targets; what is read is taken from `left`.
pub(super) fn read(
    file: &mut AdapterFile<'_>,
    matrices: &[ExpertMatrix],
    matcher: &Targets,
) -> Result<ExpertParts> {
    let mut parts = BTreeMap::new();
    for target in targets(matrices, matcher) {
        let mut read = |half: &Half| -> Result<Option<ExpertHalf>> {
            let stored = file.take(&half.name, half.file_shape())?;
            let whole = |stored: Vec<f32>| ExpertHalf {
                shape: half.shape(),
                values: half.to_engine(&stored),
                stored: Stored::Whole(half.clone()),
            };
            Ok(stored.map(whole))
        };
        let [first, second] = &target.halves;
        if let (Some(a), Some(b)) = (read(first)?, read(second)?) {
            parts.insert(target.name, ExpertPart { scale: target.shape.scale, a, b });
        }
    }
    for matrix in matrices {
        if !parts.contains_key(&matrix.name)
            && let Some(part) = by_expert::read(file, matrix, matcher)?
        {
            parts.insert(matrix.name.clone(), part);
        }
    }
    Ok(parts)
}

/// A weight of an adapter.
fn weight(device: &Device, trainable: bool, name: &str, shape: &[usize], values: &[f32]) -> Result<Weight> {
    let category = if trainable { Category::Parameters } else { Category::Weights };
    let tensor = Tensor::from_slice(device, category, shape, values)?;
    Ok(match trainable {
        true => Weight::Trainable(Parameter::new(name, tensor)),
        false => Weight::Frozen(tensor),
    })
}

/// Puts adapters that were read onto a decoder.
pub(super) fn load(decoder: &mut Decoder, parts: &ExpertParts, trainable: bool) -> Result<()> {
    let device = decoder.device().clone();
    decoder.change_expert_linears(|name, linear| {
        let Some(part) = parts.get(name) else { return Ok(()) };
        let weight =
            |half: &ExpertHalf| weight(&device, trainable, half.stored.name(), &half.shape, &half.values);
        linear.lora = Some(ExpertLora { a: weight(&part.a)?, b: weight(&part.b)?, scale: part.scale as f32 });
        Ok(())
    })
}

/// Adds fresh adapters, which begin as PEFT's do: A of the file uniform, B zero. Returns the parameters' names.
pub(super) fn attach(decoder: &mut Decoder, matcher: &Targets, seed: u64) -> Result<Vec<String>> {
    let device = decoder.device().clone();
    let targets = targets(&decoder.expert_matrices(), matcher);
    decoder.change_expert_linears(|name, linear| {
        let Some(target) = targets.iter().find(|target| target.name == name) else { return Ok(()) };
        let key = RandomKey { seed, step: 0, stream: stream_of(name) };
        let values = |half: &Half| -> Vec<f32> {
            let count: usize = half.sizes.iter().product();
            match half.half {
                LoraHalf::A => {
                    let bound = 1.0 / (half.sizes[2] as f32).sqrt();
                    let stored: Vec<f32> =
                        (0..count as u64).map(|i| (2.0 * key.uniform(i) - 1.0) * bound).collect();
                    half.to_engine(&stored)
                }
                LoraHalf::B => vec![0.0; count],
            }
        };
        let weight = |half: &Half| weight(&device, true, &half.name, &half.shape(), &values(half));
        let [a, b] = &target.halves;
        linear.lora = Some(ExpertLora { a: weight(a)?, b: weight(b)?, scale: target.shape.scale as f32 });
        Ok(())
    })?;
    Ok(targets.into_iter().map(|target| target.name).collect())
}

/// The adapters that a decoder's experts have: how each half lies in files, and its values.
fn attached(decoder: &Decoder) -> Vec<(Half, Tensor)> {
    let matrices = decoder.expert_matrices();
    let linears = decoder.expert_linears();
    let adapted: Vec<_> = matrices
        .iter()
        .zip(&linears)
        .filter_map(|(matrix, (_, linear))| linear.lora.as_ref().map(|lora| (matrix, lora)))
        .collect();
    let ranks = adapted.iter().map(|(_, lora)| lora.a.shape()[1]);
    let shaped: Vec<(&ExpertMatrix, usize)> = adapted.iter().map(|(matrix, _)| *matrix).zip(ranks).collect();
    let both = adapted.iter().enumerate().map(|(index, (_, lora))| {
        let [a, b] = halves_of(&shaped, index);
        [(a, lora.a.value().clone()), (b, lora.b.value().clone())]
    });
    both.flatten().collect()
}

/// Adds the experts of a model to what a configuration targets: all of them for all linear layers, else those that a list
/// names, stacked or one by one. False, with nothing changed, where the configuration asks for dropout, which adapters of
/// parameters do not have.
pub fn target(adapter: &mut AdapterConfig, decoder: &Decoder) -> bool {
    let is_named = |end: &str| match &adapter.target_modules {
        ModuleNames::AllLinear => true,
        ModuleNames::List(names) => names.iter().any(|name| name == end || stack_of(name) == Some(end)),
        ModuleNames::Pattern(_) => false,
    };
    let ends: BTreeSet<String> = decoder
        .expert_matrices()
        .iter()
        .filter(|matrix| is_named(matrix.name.rsplit('.').next().unwrap_or_default()))
        // What follows the number of the layer.
        .filter_map(|matrix| matrix.name.splitn(4, '.').nth(3).map(str::to_owned))
        .collect();
    if ends.is_empty() {
        return true;
    }
    if adapter.lora_dropout != 0.0 {
        return false;
    }
    adapter.target_parameters = ends.into_iter().collect();
    true
}

/// The adapters of experts as files have them, in a fixed order.
pub(super) fn tensors(decoder: &Decoder) -> Result<Vec<(String, Tensor)>> {
    let stored = |(half, value): (Half, Tensor)| -> Result<(String, Tensor)> {
        let values = half.to_file(&value.to_f32_vec()?);
        let tensor = Tensor::from_slice(&Device::cpu(), Category::Workspace, &half.file_shape(), &values)?;
        Ok((half.name, tensor))
    };
    attached(decoder).into_iter().map(stored).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_of_peft_are_ordered_by_rank_and_then_by_expert() {
        let [experts, features, rank] = [3, 4, 2];
        let half = Half {
            name: String::new(),
            half: LoraHalf::B,
            sizes: [experts, rank, features],
            rank_first: false,
        };
        // The number at row n and column r X + x.
        let file: Vec<f32> = (0..experts * features * rank).map(|index| index as f32).collect();
        let own = half.to_engine(&file);
        let (x, n, r) = (2, 3, 1);
        assert_eq!(own[(x * features + n) * rank + r], (n * rank * experts + r * experts + x) as f32);
        assert_eq!(half.to_file(&own), file);
    }
}
