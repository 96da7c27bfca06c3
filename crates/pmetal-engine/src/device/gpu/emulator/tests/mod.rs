//! The emulator itself, and operations on it that [`crate::agreement`] does not compare. Without a compiler every test says
//! so and passes.

mod fp8;
mod fp8_fused;
mod gemv;
mod groups;
mod levels;
mod runner;
mod sampler;

use std::cell::RefCell;

use super::*;
use crate::agreement::{Inputs, numbers, round};
use crate::memory::Category;
use crate::testing::emulator as emulated;
use crate::{DType, Device, Tensor};

/// Columns between rows: none, odd, and as many as keep rows aligned.
const PADDINGS: [usize; 3] = [0, 3, 8];

/// One computation on one device. The processor computes in f32 from the values as the other's type rounds them.
struct Run<'a> {
    device: &'a Device,
    dtype: DType,
    rounding: DType,
    padding: usize,
    /// Columns behind those that are used.
    pads: RefCell<Vec<Tensor>>,
}

impl Run<'_> {
    fn place(&self, dtype: DType, shape: &[usize], padding: usize, values: &[f32]) -> Tensor {
        let Self { device, dtype: own, rounding, .. } = *self;
        let inputs = Inputs { device, dtype: own, rounding, padding, pads: RefCell::default() };
        let tensor = inputs.place(dtype, shape, padding, values).unwrap();
        self.pads.borrow_mut().append(&mut inputs.pads.borrow_mut());
        tensor
    }

    /// Numbers of the run's type, with columns between the rows.
    fn tensor(&self, seed: u64, shape: &[usize]) -> Tensor {
        let values = numbers(seed, shape.iter().product());
        let rounded: Vec<f32> = values.into_iter().map(|value| round(value, self.rounding)).collect();
        self.place(self.dtype, shape, self.padding, &rounded)
    }

    /// As [`Self::tensor`], without gaps.
    fn dense(&self, seed: u64, shape: &[usize]) -> Tensor {
        Run { padding: 0, pads: RefCell::default(), ..*self }.tensor(seed, shape)
    }

    /// f32 numbers without gaps.
    fn floats(&self, seed: u64, shape: &[usize]) -> Tensor {
        self.place(DType::F32, shape, 0, &numbers(seed, shape.iter().product()))
    }

    /// What is to be written.
    fn empty(&self, shape: &[usize]) -> Tensor {
        let values = vec![f32::NAN; shape.iter().product()];
        self.place(self.dtype, shape, self.padding, &values)
    }
}

fn results(
    device: &Device,
    dtypes: [DType; 2],
    padding: usize,
    work: &dyn Fn(&Run<'_>) -> Vec<Tensor>,
) -> Vec<Vec<f32>> {
    let [dtype, rounding] = dtypes;
    let run = Run { device, dtype, rounding, padding, pads: RefCell::default() };
    let results = work(&run).iter().map(|tensor| tensor.to_f32_vec().unwrap()).collect();
    for pad in run.pads.take() {
        let values = pad.to_f32_vec().unwrap();
        assert!(values.iter().all(|value| value.is_nan()), "columns between rows were written");
    }
    results
}

fn tolerance(dtype: DType) -> f32 {
    if dtype == DType::F32 { 1e-5 } else { 2e-2 }
}

/// Values differ by a part of themselves, or of what values usually are.
fn assert_close(what: &str, actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let finite = || expected.iter().filter(|value| value.is_finite());
    let usual = (finite().map(|value| value * value).sum::<f32>() / finite().count().max(1) as f32).sqrt();
    for (index, (&actual, &expected)) in actual.iter().zip(expected).enumerate() {
        let is_close =
            actual == expected || (actual - expected).abs() <= tolerance * (expected.abs() + usual);
        assert!(is_close, "{what}: {actual} instead of {expected} at {index}");
    }
}

/// Runs `work` on the processor and on two emulators with other orders of threads, which must agree to the bit.
fn check_padded(what: &str, dtype: DType, paddings: &[usize], work: &dyn Fn(&Run<'_>) -> Vec<Tensor>) {
    let (Some(first), Some(second)) = (emulated(1), emulated(2)) else { return };
    let expected = results(&Device::cpu(), [DType::F32, dtype], 0, work);
    for &padding in paddings {
        let what = format!("{what}, {dtype}, {padding} columns between rows");
        let [actual, again] = [&first, &second].map(|device| results(device, [dtype, dtype], padding, work));
        assert_eq!(actual.len(), expected.len());
        for (index, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
            assert_close(&format!("{what}, result {index}"), actual, expected, tolerance(dtype));
        }
        let bits = |all: &[Vec<f32>]| -> Vec<u32> { all.iter().flatten().map(|x| x.to_bits()).collect() };
        assert!(bits(&actual) == bits(&again), "{what}: another order of threads has other bits");
    }
}

fn check(what: &str, dtype: DType, work: &dyn Fn(&Run<'_>) -> Vec<Tensor>) {
    check_padded(what, dtype, &PADDINGS, work);
}

#[test]
fn a_device_goes_with_the_last_tensor_on_it() {
    if !has_compiler() {
        return println!("skipped: no C++ compiler");
    }
    let runtime = Arc::new(Emulator::new(1));
    let device = Device::gpu(Arc::clone(&runtime) as Arc<dyn Runtime>);
    assert!(crate::agreement::self_test(&device).iter().all(|outcome| outcome.passed()));
    drop(device);
    assert_eq!(Arc::strong_count(&runtime), 1, "the device's kernels keep it alive");
    assert!(lock(&runtime.core.memory).is_empty(), "memory is left behind");
}
