//! Every operation against its f64 reference, on every device: values, then gradients by central differences.
//!
//! Tolerances are relative to the largest value: 1e-5 for f32, 1.5e-2 for bf16 (8 bits, and intermediate results are
//! rounded too), 2e-3 for f16 (11 bits); operations that round more often state theirs.

mod absorbed;
mod attention;
mod choice;
mod columns;
mod delta;
mod embedding;
mod gated;
mod heads;
mod layer_norm;
mod linear;
mod loss;
mod moe;
mod norm;
mod optimizer;
mod residual;
mod rope;
mod softcap;
mod stack;

use std::sync::Arc;

use crate::random::{RandomKey, stream_of};
use crate::tape::Gradients;
use crate::testing::on_every_device;
use crate::{Category, DType, Device, Parameter, Tape, Tensor, Var, Weight};

/// What an f32 kernel may differ from the reference by, relative to the largest value.
pub(super) const F32_ERROR: f64 = 1e-5;

/// The same for activations of a type; bf16 has 8 bits, f16 has 11, and intermediate results are rounded too.
pub(super) fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 1.5e-2,
        DType::F16 => 2e-3,
        _ => F32_ERROR,
    }
}

/// What a device has for activations.
pub(super) fn types(device: &Device) -> &'static [DType] {
    if device.is_host() { &[DType::F32, DType::Bf16] } else { &[DType::F32, DType::Bf16, DType::F16] }
}

/// Whether a device is too slow for what takes this many times the smallest sizes.
pub(super) fn is_slow(device: &Device) -> bool {
    device.name() == "emulator"
}

/// Numbers in [-1, 1) that a tensor of `dtype` holds exactly, different for every name.
pub(super) fn numbers(name: &str, count: usize, dtype: DType) -> Vec<f64> {
    let key = RandomKey { seed: 1, step: 0, stream: stream_of(name) };
    let round = |value: f32| match dtype {
        DType::Bf16 => half::bf16::from_f32(value).to_f64(),
        DType::F16 => half::f16::from_f32(value).to_f64(),
        _ => f64::from(value),
    };
    (0..count as u64).map(|index| round(key.uniform(index) * 2.0 - 1.0)).collect()
}

/// A tensor of values that its type holds exactly.
pub(super) fn tensor(device: &Device, dtype: DType, shape: &[usize], values: &[f64]) -> Tensor {
    let single: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    let source = Tensor::from_slice(device, Category::Weights, shape, &single).unwrap();
    let mut target = Tensor::scratch(device, Category::Weights, dtype, shape).unwrap();
    device.kernels().convert(&source, &mut target);
    target
}

/// A weight: trained in f32, or frozen in `dtype`.
pub(super) fn weight(
    device: &Device,
    trained: bool,
    dtype: DType,
    shape: &[usize],
    values: &[f64],
) -> Weight {
    if trained {
        Weight::Trainable(Parameter::new("weight", tensor(device, DType::F32, shape, values)))
    } else {
        Weight::Frozen(tensor(device, dtype, shape, values))
    }
}

/// What has arrived at a weight, if it is trained.
pub(super) fn gradient_of(weight: &Weight) -> Option<Vec<f64>> {
    weight.parameter().map(|parameter| wide(&parameter.gradient().expect("no gradient has arrived")))
}

/// What has arrived at a leaf.
pub(super) fn arrived(gradients: &mut Gradients, leaf: &Var) -> Option<Vec<f64>> {
    leaf.slot().map(|slot| wide(&gradients.take(slot).expect("no gradient has arrived")))
}

pub(super) fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f32_vec().unwrap().into_iter().map(f64::from).collect()
}

pub(super) fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect()
}

/// A value with or without a wish for its gradient.
pub(super) fn input(tape: &Tape, wanted: bool, tensor: Tensor) -> Var {
    if wanted { tape.leaf(tensor) } else { Var::constant(tensor) }
}

pub(super) fn assert_close(what: &str, actual: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}: number of values");
    let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
    for (index, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        // Written so that NaN is a failure.
        let close = (actual - expected).abs() <= tolerance * largest + 1e-12;
        assert!(close, "{what}: value {index} is {actual}, the reference has {expected} (largest {largest})");
    }
}

/// What the rounding of f32 leaves of a gradient that is exactly zero.
const ZERO: f64 = 1e-7;

/// The change of sum(d_out * function(inputs)) along a direction of one input.
fn slope(
    function: &dyn Fn(&[Vec<f64>]) -> Vec<f64>,
    inputs: &[Vec<f64>],
    d_out: &[f64],
    which: usize,
    direction: &dyn Fn(usize) -> f64,
) -> f64 {
    const STEP: f64 = 1e-4;
    let value = |step: f64| -> f64 {
        let mut moved = inputs.to_vec();
        for (index, value) in moved[which].iter_mut().enumerate() {
            *value += step * direction(index);
        }
        function(&moved).iter().zip(d_out).map(|(y, d)| y * d).sum()
    };
    (value(STEP) - value(-STEP)) / (2.0 * STEP)
}

/// Compares gradients with central differences of the reference: in a random direction, and for single elements
/// (all of a small input, some of a large one). `None` = that input has no gradient to check.
pub(super) fn assert_gradients(
    what: &str,
    function: &dyn Fn(&[Vec<f64>]) -> Vec<f64>,
    inputs: &[Vec<f64>],
    d_out: &[f64],
    gradients: &[Option<Vec<f64>>],
    tolerance: f64,
) {
    assert_gradients_of(200, what, function, inputs, d_out, gradients, tolerance);
}

/// [`assert_gradients`] with every element of an input of at most `small` elements, and some of a larger one.
pub(super) fn assert_gradients_of(
    small: usize,
    what: &str,
    function: &dyn Fn(&[Vec<f64>]) -> Vec<f64>,
    inputs: &[Vec<f64>],
    d_out: &[f64],
    gradients: &[Option<Vec<f64>>],
    tolerance: f64,
) {
    assert_eq!(inputs.len(), gradients.len());
    for (which, gradient) in gradients.iter().enumerate() {
        let Some(gradient) = gradient else { continue };
        assert_eq!(gradient.len(), inputs[which].len(), "{what}: size of the gradient of input {which}");
        let largest = gradient.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        let stride = if gradient.len() <= small { 1 } else { gradient.len().div_ceil(small.min(10)) };
        // From the end, so that the tail of a vector loop is always among them.
        for index in (0..gradient.len()).rev().step_by(stride) {
            let expected =
                slope(function, inputs, d_out, which, &|other| f64::from(u8::from(other == index)));
            let close = (gradient[index] - expected).abs() <= tolerance * largest.max(expected.abs()) + ZERO;
            let actual = gradient[index];
            assert!(
                close,
                "{what}: gradient {index} of input {which} is {actual}, differences give {expected}"
            );
        }
        let direction = numbers(what, gradient.len(), DType::F32);
        let expected = slope(function, inputs, d_out, which, &|index| direction[index]);
        let terms = || gradient.iter().zip(&direction).map(|(gradient, direction)| gradient * direction);
        let (actual, size) = (terms().sum::<f64>(), terms().map(|term| term * term).sum::<f64>().sqrt());
        let close = (actual - expected).abs() <= 2.0 * tolerance * (size + largest) + ZERO;
        assert!(close, "{what}: input {which} along a direction: {actual}, differences give {expected}");
    }
}

/// Bytes of live tensors of one category.
pub(super) fn live(device: &Device, category: Category) -> usize {
    device.memory().report().live(category)
}

/// Runs `compute` on pools of 1, 2 and 5 threads and asserts that its numbers have the same bits every time, and
/// then on every instruction set of this processor.
pub(super) fn assert_same_bits_everywhere(what: &str, compute: &(dyn Fn() -> Vec<Vec<u32>> + Sync)) {
    use crate::device::SimdLevel;
    use crate::device::cpu::simd::forced;
    let alone = forced::pool(SimdLevel::current(), 1).install(compute);
    for threads in [2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert!(pool.install(compute) == alone, "{what}: {threads} threads give other bits than 1");
    }
    for level in SimdLevel::ALL.into_iter().filter(|level| level.is_available()) {
        let result = forced::pool(level, 2).install(compute);
        assert!(
            result == alone,
            "{what}: {} gives other bits than {}",
            level.name(),
            SimdLevel::current().name()
        );
    }
}

/// A parameter handle for tests that look at memory.
pub(super) fn parameter(weight: &Weight) -> Arc<Parameter> {
    Arc::clone(weight.parameter().expect("a trained weight"))
}
