//! Whether a device computes what the processor's plain loops compute, kernel group by kernel group.
//!
//! A computation asks its [`Inputs`] for tensors and returns what its kernels wrote. It is done twice: by the plain loops
//! in f32, on values that the device's type holds exactly, and by the device. What is to be written starts as NaN, and on
//! devices with memory of their own, rows may lie apart with NaN between them that must stay.
//!
//! Errors are parts of a value plus the root mean square of all values. Tolerances, for every group: 1e-5 for f32, 2e-2
//! for bf16 (8 bits), 4e-3 for f16 (11 bits), as results and what is stored on the way are rounded.

mod attention;
mod delta;
mod experts;
mod products;
mod rows;
mod steps;
#[cfg(test)]
mod tests;

use std::cell::RefCell;

use half::{bf16, f16};

use crate::device::cpu::simd::reference_pool;
use crate::device::{CrossEntropyParameters, GateActivation, MaskKind, NormWeight, RopePairing};
use crate::error::{Error, Result};
use crate::memory::Category;
use crate::{DType, Device, Tensor};

/// What kernels compute from some inputs.
type Work<'a> = dyn Fn(&Inputs<'_>) -> Result<Vec<Tensor>> + Sync + 'a;

/// How one group of kernels did on one device.
#[derive(Debug, Clone)]
pub struct SelfTest {
    /// The group, such as `norms`.
    pub kernels: &'static str,
    /// Type of the activations.
    pub dtype: DType,
    /// The largest difference from the plain loops, as part of a value plus the root mean square of all.
    pub largest_error: f64,
    /// What it may be.
    pub tolerance: f64,
    /// Why there is no error to tell: the device failed.
    pub failure: Option<String>,
}

impl SelfTest {
    /// Whether the kernels can be trusted.
    pub fn passed(&self) -> bool {
        // Written so that NaN is a failure.
        self.failure.is_none() && self.largest_error <= self.tolerance
    }
}

/// Runs every group of kernels on small inputs, in f32 and in bf16, and compares with the plain loops of the processor.
/// Takes a second, and some more where kernels are compiled for the first time.
pub fn self_test(device: &Device) -> Vec<SelfTest> {
    let types = [DType::F32, DType::Bf16];
    types
        .into_iter()
        .flat_map(|dtype| groups().map(|(name, work)| tested(device, dtype, name, work)))
        .collect()
}

fn tested(
    device: &Device,
    dtype: DType,
    kernels: &'static str,
    work: fn(&Inputs<'_>) -> Result<Vec<Tensor>>,
) -> SelfTest {
    let outcome = expected(dtype, &work).and_then(|expected| {
        let actual = results(device, [dtype, dtype], 0, &work)?;
        Ok(largest_error(&actual, &expected).0)
    });
    let (largest_error, failure) = match outcome {
        Ok(error) => (error, None),
        Err(error) => (f64::NAN, Some(error.to_string())),
    };
    SelfTest { kernels, dtype, largest_error, tolerance: tolerance(dtype), failure }
}

type Group = (&'static str, fn(&Inputs<'_>) -> Result<Vec<Tensor>>);

/// Every group of kernels, with widths that fill vectors for one type and do not for the other.
fn groups() -> [Group; 20] {
    [
        ("products", |inputs| products::product(inputs, [5, inputs.width(33, 64), inputs.width(19, 48)])),
        ("weight gradients", |inputs| products::weight_gradients(inputs, inputs.width(33, 64))),
        ("embeddings", |inputs| rows::embedding(inputs, inputs.width(33, 64))),
        ("norms", |inputs| rows::norm(inputs, &[5, inputs.width(100, 64)], Some(NormWeight::PlusOne))),
        ("layer norms", |inputs| rows::layer_norm(inputs, &[5, 3, inputs.width(33, 64)], [true, false])),
        ("rotations", |inputs| {
            let half = inputs.width(11, 32);
            rows::rotation(inputs, 2 * half, RopePairing::Halves, half)
        }),
        ("attention", |inputs| {
            let width = inputs.width(7, 64);
            let parameters = crate::device::AttentionParameters {
                key_width: width,
                value_width: width,
                ..attention::PLAIN
            };
            let kind = MaskKind::CAUSAL;
            let mut all = attention::attend(inputs, &parameters, kind, true)?;
            all.extend(attention::attend_chosen(inputs, &parameters, kind)?);
            all.extend(attention::attend_wide(inputs, &parameters)?);
            Ok(all)
        }),
        ("choice of keys", |inputs| attention::choice(inputs, MaskKind::CAUSAL, [3, inputs.width(7, 64), 3])),
        ("activations", |inputs| {
            let width = inputs.width(100, 64);
            let mut all = rows::gated(inputs, width, GateActivation::Silu)?;
            for activation in [GateActivation::Gelu, GateActivation::GeluTanh, GateActivation::Sigmoid] {
                all.extend(rows::gated(inputs, width, activation)?);
            }
            Ok(all)
        }),
        ("rows", |inputs| rows::moved(inputs, inputs.width(33, 64))),
        ("heads", |inputs| rows::heads(inputs, inputs.width(33, 64))),
        ("convolutions", |inputs| delta::convolution(inputs, inputs.width(33, 64), 4)),
        ("delta rules", |inputs| delta::rule(inputs, [1, 2], [inputs.width(9, 32), inputs.width(33, 16)])),
        ("gated norms", |inputs| delta::gated_norm(inputs, [5, 2, inputs.width(33, 64)])),
        ("random numbers", |inputs| rows::dropped(inputs, inputs.width(33, 64))),
        ("choices of experts", |inputs| experts::routed(inputs, inputs.width(12, 64))),
        ("rows of experts", |inputs| {
            let clamped = crate::device::PairedGate::Clamped { slope: 1.702, limit: 0.5 };
            let mut results = experts::rows(inputs, inputs.width(33, 64))?;
            results.extend(experts::paired(inputs, inputs.width(33, 64), clamped)?);
            Ok(results)
        }),
        ("products of experts", |inputs| {
            experts::products(inputs, [inputs.width(19, 48), inputs.width(33, 72), inputs.width(3, 8)])
        }),
        ("losses", |inputs| {
            let parameters =
                CrossEntropyParameters { logit_scale: 6.0, softcap: Some(3.0), gradient_scale: 2.0 };
            let mut results = steps::cross_entropy(inputs, inputs.width(513, 512), &parameters)?;
            results.extend(steps::cross_entropy(inputs, inputs.width(40_001, 40_008), &parameters)?);
            Ok(results)
        }),
        ("optimizer", |inputs| {
            let constants = crate::device::AdamWParameters { max_norm: 0.5, ..steps::CONSTANTS };
            steps::stepped(inputs, [7, inputs.width(33, 64)], constants, true, None)
        }),
    ]
}

/// What a computation is given on one device.
pub(crate) struct Inputs<'a> {
    pub(crate) device: &'a Device,
    /// Type of what is given and written.
    pub(crate) dtype: DType,
    /// Type that holds every value exactly.
    pub(crate) rounding: DType,
    /// Columns between rows.
    pub(crate) padding: usize,
    /// What lies there.
    pub(crate) pads: RefCell<Vec<Tensor>>,
}

impl Inputs<'_> {
    /// A tensor of a type with columns between its rows, from values.
    pub(crate) fn place(
        &self,
        dtype: DType,
        shape: &[usize],
        padding: usize,
        values: &[f32],
    ) -> Result<Tensor> {
        let columns: usize = shape[1..].iter().product();
        let mut padded = Vec::new();
        for row in values.chunks(columns.max(1)) {
            padded.extend_from_slice(row);
            padded.extend(std::iter::repeat_n(f32::NAN, padding));
        }
        let whole = [shape[0], columns + padding];
        let category = Category::Workspace;
        let tensor = match dtype {
            DType::Bf16 => {
                let values: Vec<bf16> = padded.into_iter().map(bf16::from_f32).collect();
                Tensor::from_slice(self.device, category, &whole, &values)?
            }
            DType::F16 => {
                let values: Vec<f16> = padded.into_iter().map(f16::from_f32).collect();
                Tensor::from_slice(self.device, category, &whole, &values)?
            }
            _ => Tensor::from_slice(self.device, category, &whole, &padded)?,
        };
        if padding == 0 {
            return tensor.reshape(shape);
        }
        let mut parts = tensor.split_columns(&[columns, padding])?;
        self.pads.borrow_mut().extend(parts.pop());
        parts.pop().expect("invariant: it was split in two").reshape(shape)
    }

    fn values(&self, seed: u64, shape: &[usize]) -> Vec<f32> {
        let values = numbers(seed, shape.iter().product());
        values.into_iter().map(|value| round(value, self.rounding)).collect()
    }

    /// Numbers of the type, with columns between the rows.
    fn tensor(&self, seed: u64, shape: &[usize]) -> Result<Tensor> {
        self.place(self.dtype, shape, self.padding, &self.values(seed, shape))
    }

    /// As [`Self::tensor`], but for one row of zeros.
    fn tensor_without(&self, seed: u64, shape: &[usize], row: usize) -> Result<Tensor> {
        let columns: usize = shape[1..].iter().product();
        let mut values = self.values(seed, shape);
        values[row * columns..][..columns].fill(0.0);
        self.place(self.dtype, shape, self.padding, &values)
    }

    /// As [`Self::tensor`], without gaps.
    fn dense(&self, seed: u64, shape: &[usize]) -> Result<Tensor> {
        self.place(self.dtype, shape, 0, &self.values(seed, shape))
    }

    /// f32 numbers without gaps.
    fn floats(&self, seed: u64, shape: &[usize]) -> Result<Tensor> {
        self.place(DType::F32, shape, 0, &numbers(seed, shape.iter().product()))
    }

    /// What is to be written.
    fn empty(&self, shape: &[usize]) -> Result<Tensor> {
        let values = vec![f32::NAN; shape.iter().product()];
        self.place(self.dtype, shape, self.padding, &values)
    }

    fn indices(&self, values: &[u32]) -> Result<Tensor> {
        Tensor::from_slice(self.device, Category::Workspace, &[values.len()], values)
    }

    /// One of two widths, by the type that was asked for.
    fn width(&self, ragged: usize, whole: usize) -> usize {
        if self.rounding == DType::F32 { ragged } else { whole }
    }
}

pub(crate) fn round(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Numbers from -1 to 1.
pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 2e-2,
        DType::F16 => 4e-3,
        _ => 1e-5,
    }
}

fn results(
    device: &Device,
    [dtype, rounding]: [DType; 2],
    padding: usize,
    work: &Work<'_>,
) -> Result<Vec<Vec<f32>>> {
    let inputs = Inputs { device, dtype, rounding, padding, pads: RefCell::default() };
    let tensors = work(&inputs)?;
    let results = tensors.iter().map(Tensor::to_f32_vec).collect::<Result<Vec<_>>>()?;
    for pad in inputs.pads.take() {
        if !pad.to_f32_vec()?.iter().all(|value| value.is_nan()) {
            return Err(Error::Other("columns between rows were written".to_owned()));
        }
    }
    Ok(results)
}

/// What the plain loops compute from values that `dtype` holds.
fn expected(dtype: DType, work: &Work<'_>) -> Result<Vec<Vec<f32>>> {
    let compute = || results(&Device::cpu(), [DType::F32, dtype], 0, work);
    let pool = reference_pool(1).ok_or_else(|| Error::Other("no thread could be started".to_owned()))?;
    pool.install(compute)
}

/// The largest error, and where it is: a result and an element of it.
fn largest_error(actual: &[Vec<f32>], expected: &[Vec<f32>]) -> (f64, [usize; 2]) {
    let mut largest = (0.0, [0, 0]);
    for (result, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let finite = || expected.iter().filter(|value| value.is_finite());
        let squares: f64 = finite().map(|&value| f64::from(value).powi(2)).sum();
        let usual = (squares / finite().count().max(1) as f64).sqrt();
        for (index, (&actual, &expected)) in actual.iter().zip(expected).enumerate() {
            if actual == expected {
                continue;
            }
            let difference = (f64::from(actual) - f64::from(expected)).abs();
            let error = difference / (f64::from(expected).abs() + usual);
            let error = if error.is_nan() { f64::INFINITY } else { error };
            if error > largest.0 {
                largest = (error, [result, index]);
            }
        }
    }
    let lengths = |all: &[Vec<f32>]| all.iter().map(Vec::len).collect::<Vec<_>>();
    if lengths(actual) == lengths(expected) { largest } else { (f64::INFINITY, [0, 0]) }
}
