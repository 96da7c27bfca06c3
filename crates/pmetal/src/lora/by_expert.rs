//! Adapters that name every expert, as PEFT wrote them before transformers 5, read as adapters of stacked experts.
//!
//! The layers that a matrix of all experts stacks, such as gate and up, have an A each there: that of the matrix holds
//! them one under the other, and of B only the blocks on the diagonal are not zero. Training would fill the others, so
//! that no file of these names could hold the result.

use pmetal_formats::adapter::{LoraHalf, LoraShape, tensor_name};

use super::experts::{ExpertHalf, ExpertMatrix, ExpertPart, Stored};
use super::{AdapterFile, Targets};
use crate::error::Result;
use crate::models::loader::stored::one_by_one;

/// One half of an adapter of stacked experts whose tensors lie apart in files.
#[derive(Debug, Clone)]
pub struct OneByOne {
    /// The name of the half, which no file has.
    pub(super) name: String,
    /// Of an expert's matrix in the engine.
    shape: [usize; 2],
    blocks: Vec<Block>,
}

/// A tensor of a file, and where it is in the engine's half.
#[derive(Debug, Clone)]
struct Block {
    name: String,
    shape: [usize; 2],
    expert: usize,
    /// Row and column of its first element in its expert's matrix.
    corner: [usize; 2],
    /// What the engine's values are multiplied by.
    factor: f32,
}

impl OneByOne {
    /// Places of a block's elements in the engine, in the order of the file.
    fn places(&self, block: &Block) -> impl Iterator<Item = usize> {
        let ([rows, columns], [first_row, first_column]) = (self.shape, block.corner);
        let (expert, [height, width]) = (block.expert, block.shape);
        let row = move |row: usize| (expert * rows + first_row + row) * columns + first_column;
        (0..height).flat_map(move |index| row(index)..row(index) + width)
    }

    /// The engine's values of those of the blocks.
    fn gathered(&self, experts: usize, stored: &[Vec<f32>]) -> Vec<f32> {
        let mut values = vec![0.0; experts * self.shape[0] * self.shape[1]];
        for (block, stored) in self.blocks.iter().zip(stored) {
            self.places(block).zip(stored).for_each(|(place, value)| values[place] = block.factor * value);
        }
        values
    }

    /// See [`Stored::gradients`].
    pub(super) fn gradients(&self, gradient: &[f32]) -> Vec<(String, Vec<f32>)> {
        let of = |block: &Block| self.places(block).map(|place| block.factor * gradient[place]).collect();
        self.blocks.iter().map(|block| (block.name.clone(), of(block))).collect()
    }
}

/// One of the layers that a matrix stacks.
struct Layer {
    /// Its module, with `{}` for the expert's number.
    module: String,
    /// By expert; of one rank.
    shapes: Vec<LoraShape>,
    first_row: usize,
    first_rank: usize,
}

/// The layers of a matrix that a configuration targets, by one way of naming them; `None` where some experts have
/// adapters and others have none or of another rank, which is a fault.
fn targeted(
    file: &mut AdapterFile<'_>,
    matrix: &ExpertMatrix,
    modules: Vec<String>,
    matcher: &Targets,
) -> Option<Vec<Layer>> {
    let [experts, features, _] = matrix.sizes;
    let (height, mut layers, mut first_rank) = (features / modules.len(), Vec::new(), 0);
    for (index, module) in modules.into_iter().enumerate() {
        let shape = |expert: usize| matcher.target(&of_expert(&module, expert));
        let shapes: Vec<LoraShape> = (0..experts).filter_map(shape).collect();
        let Some(rank) = shapes.first().map(|shape| shape.rank) else { continue };
        if shapes.len() < experts || shapes.iter().any(|shape| shape.rank != rank) {
            file.faults.add(format!("adapters of `{module}` are not of one rank for all {experts} experts"));
            return None;
        }
        layers.push(Layer { module, shapes, first_row: index * height, first_rank });
        first_rank += rank;
    }
    Some(layers)
}

fn of_expert(module: &str, expert: usize) -> String {
    module.replace("{}", &expert.to_string())
}

/// Reads the adapter of a matrix whose experts a file names one by one; `None` where it names none of them.
pub(super) fn read(
    file: &mut AdapterFile<'_>,
    matrix: &ExpertMatrix,
    matcher: &Targets,
) -> Result<Option<ExpertPart>> {
    let [experts, features, width] = matrix.sizes;
    let is_there = |file: &AdapterFile<'_>, module: &String| {
        let halves =
            |expert| [LoraHalf::A, LoraHalf::B].map(|half| tensor_name(&of_expert(module, expert), half));
        (0..experts).flat_map(halves).any(|name| file.has(&name))
    };
    let mut named = one_by_one(&matrix.name);
    let Some(modules) = named.find(|modules| modules.iter().any(|module| is_there(file, module))) else {
        return Ok(None);
    };
    let height = features / modules.len();
    let Some(layers) = targeted(file, matrix, modules, matcher).filter(|layers| !layers.is_empty()) else {
        return Ok(None);
    };
    let scales = layers.iter().flat_map(|layer| layer.shapes.iter().map(|shape| shape.scale));
    let scale = scales.fold(0.0, |most: f64, own| if own.abs() > most.abs() { own } else { most });
    let factor = |shape: &LoraShape| if scale == 0.0 { 1.0 } else { (shape.scale / scale) as f32 };
    let rank: usize = layers.iter().map(|layer| layer.shapes[0].rank).sum();
    let mut half = |half: LoraHalf, shape: [usize; 2]| -> Result<Option<ExpertHalf>> {
        let (letter, mut blocks, mut stored) =
            (if half == LoraHalf::A { "A" } else { "B" }, Vec::new(), Vec::new());
        for layer in &layers {
            for (expert, own) in layer.shapes.iter().enumerate() {
                let (shape, corner, factor) = match half {
                    LoraHalf::A => ([own.rank, width], [layer.first_rank, 0], 1.0),
                    LoraHalf::B => ([height, own.rank], [layer.first_row, layer.first_rank], factor(own)),
                };
                let name = tensor_name(&of_expert(&layer.module, expert), half);
                stored.extend(file.take(&name, shape)?);
                blocks.push(Block { name, shape, expert, corner, factor });
            }
        }
        // What is missing is a fault that was noted.
        if stored.len() < blocks.len() {
            return Ok(None);
        }
        let parts = OneByOne { name: format!("{}.lora_{letter}", matrix.name), shape, blocks };
        let values = parts.gathered(experts, &stored);
        let shape = [experts, shape[0], shape[1]];
        Ok(Some(ExpertHalf { shape, values, stored: Stored::ByExpert(parts) }))
    };
    let (a, b) = (half(LoraHalf::A, [rank, width])?, half(LoraHalf::B, [features, rank])?);
    Ok(a.zip(b).map(|(a, b)| ExpertPart { scale, a, b }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_of_tensors_are_those_of_the_elements_that_they_became() {
        let block =
            |expert, shape, corner, factor| Block { name: String::new(), shape, expert, corner, factor };
        let blocks =
            vec![block(0, [2, 1], [0, 0], 1.0), block(0, [2, 2], [2, 1], 0.5), block(1, [2, 2], [2, 1], 3.0)];
        let parts = OneByOne { name: String::new(), shape: [4, 3], blocks };
        let stored = [vec![1.0, 2.0], vec![3.0, 4.0, 5.0, 6.0], vec![7.0, 8.0, 9.0, 10.0]];
        let values = parts.gathered(2, &stored);
        let first = [1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 1.5, 2.0, 0.0, 2.5, 3.0];
        let second = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 21.0, 24.0, 0.0, 27.0, 30.0];
        assert_eq!(values, [first, second].concat());
        let gradient: Vec<f32> = (0..24_u8).map(f32::from).collect();
        let own: Vec<Vec<f32>> = parts.gradients(&gradient).into_iter().map(|(_, values)| values).collect();
        assert_eq!(own[..2], [vec![0.0, 3.0], vec![3.5, 4.0, 5.0, 5.5]]);
        assert_eq!(own[2], [57.0, 60.0, 66.0, 69.0]);
    }
}
