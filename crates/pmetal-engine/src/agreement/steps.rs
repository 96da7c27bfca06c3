//! Losses and the optimizer's step.

use super::{Inputs, numbers};
use crate::Tensor;
use crate::device::{AdamWControl, AdamWEntry, AdamWParameters, CrossEntropyParameters, Sum};
use crate::error::Result;
use crate::memory::Category;

/// The gradient of logits and the sum of losses; one row of four is not trained.
pub(super) fn cross_entropy(
    inputs: &Inputs<'_>,
    width: usize,
    parameters: &CrossEntropyParameters,
) -> Result<Vec<Tensor>> {
    let labels = [0, -100, width as i32 - 1, width as i32 / 2];
    let labels = Tensor::from_slice(inputs.device, Category::Workspace, &[4], &labels)?;
    let mut sum = Sum::new(inputs.device)?;
    let logits = inputs.floats(1, &[4, width])?;
    let kernels = inputs.device.kernels();
    let slopes = kernels.cross_entropy(logits, &labels, parameters, &mut sum, inputs.dtype)?;
    Ok(vec![slopes, value_of(inputs, &sum)?])
}

fn value_of(inputs: &Inputs<'_>, sum: &Sum) -> Result<Tensor> {
    Tensor::from_slice(inputs.device, Category::Workspace, &[1], &[sum.read()? as f32])
}

pub(super) const CONSTANTS: AdamWParameters = AdamWParameters {
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.99,
    epsilon: 1e-8,
    weight_decay: 0.1,
    step: 3,
    gradient_scale: 0.5,
    max_norm: 0.0,
};

/// Values, moments and shadows after a step on tensors some of which are several pieces long; the first has a shadow.
pub(super) fn stepped(
    inputs: &Inputs<'_>,
    first: [usize; 2],
    constants: AdamWParameters,
    clips: bool,
    poison: Option<f32>,
) -> Result<Vec<Tensor>> {
    let shapes = [first.to_vec(), vec![9001], vec![5], vec![4104]];
    let mut tensors: Vec<[Tensor; 4]> = Vec::new();
    for (index, shape) in shapes.iter().enumerate() {
        let seed = 10 * index as u64;
        let (value, gradient) = (inputs.floats(seed, shape)?, inputs.floats(seed + 1, shape)?);
        let first = inputs.floats(seed + 2, shape)?;
        let squares: Vec<f32> = numbers(seed + 3, value.elements()).iter().map(|x| x.abs() + 0.1).collect();
        let second = Tensor::from_slice(inputs.device, Category::Workspace, shape, &squares)?;
        tensors.push([value, gradient, first, second]);
    }
    if let Some(poison) = poison {
        let mut gradient = numbers(1, tensors[0][1].elements());
        gradient[230] = poison;
        tensors[0][1].write_slice(&gradient);
    }
    let mut sum = Sum::new(inputs.device)?;
    let kernels = inputs.device.kernels();
    kernels.sum_of_squares(&tensors.iter().map(|parts| &parts[1]).collect::<Vec<_>>(), &mut sum);
    let control = AdamWControl::new(inputs.device, constants)?;
    let mut shadow = inputs.tensor(9, &first)?;
    let mut shadows = Some(&mut shadow).filter(|_| !inputs.device.is_host());
    let mut entries: Vec<AdamWEntry<'_>> = tensors
        .iter_mut()
        .enumerate()
        .map(|(index, [value, gradient, first, second])| AdamWEntry {
            value,
            gradient,
            first,
            second,
            decays: index != 1,
            shadow: shadows.take(),
        })
        .collect();
    kernels.adamw(&mut entries, &control, clips.then_some(&sum));
    drop(entries);
    let mut results = Vec::new();
    // The copy for products follows the value, but where nothing changed.
    if poison.is_none() {
        results.push(if inputs.device.is_host() { tensors[0][0].clone() } else { shadow });
    }
    for [value, _, first, second] in tensors {
        results.extend([value, first, second]);
    }
    if poison.is_none() {
        results.push(value_of(inputs, &sum)?);
    }
    Ok(results)
}
