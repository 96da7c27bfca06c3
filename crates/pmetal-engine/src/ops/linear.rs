//! Linear layers, with a bias, a low-rank adapter and a residual where they have them.

use std::sync::Arc;

use crate::device::{Arithmetic, DropoutMask, Finish, Kernels, Operand};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::random::RandomKey;
use crate::tape::{Gradients, Saved};
use crate::{DType, Parameter, Tape, Tensor, Var, Weight};

/// A linear layer: `y = x W^T + b + s (x A^T) B^T`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// W \[N, D\].
    pub weight: Weight,
    /// b \[N\].
    pub bias: Option<Weight>,
    /// The low-rank adapter (Hu et al., arXiv 2106.09685).
    pub lora: Option<Lora>,
}

/// A low-rank adapter of a linear layer.
#[derive(Debug, Clone)]
pub struct Lora {
    /// A \[R, D\].
    pub a: Weight,
    /// B \[N, R\].
    pub b: Weight,
    /// s: alpha / R, or alpha / sqrt(R).
    pub scale: f32,
    /// Probability with which an element of the adapter's input is dropped while training.
    pub dropout: f32,
    /// Distinguishes this adapter's dropout from every other's.
    pub stream: u32,
}

impl Lora {
    /// Whether either half is trained.
    pub(super) fn is_trained(&self) -> bool {
        self.a.parameter().is_some() || self.b.parameter().is_some()
    }
}

/// Where dropout takes its randomness from; absent outside training.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// The run's seed.
    pub seed: u64,
    /// Counts forward passes: optimizer step and micro-batch.
    pub step: u32,
    /// As [`DropoutMask::steps_before`].
    pub steps_before: Option<Tensor>,
}

/// What is added to or multiplied with a linear layer's result in the same pass.
#[derive(Clone, Copy)]
pub struct LinearOptions<'a> {
    /// Added to the result: \[T, N\].
    pub residual: Option<&'a Var>,
    /// Factor on everything but the residual.
    pub scale: f32,
    /// Dropout of the adapter's input.
    pub dropout: Option<&'a Dropout>,
    /// Whether the result is that of a whole [`Tape::checkpoint`]. When the block is computed again for its gradients
    /// it is left out, as nobody reads it: the residual, or nothing in particular, stands in its place.
    pub ends_block: bool,
}

impl Default for LinearOptions<'_> {
    fn default() -> Self {
        Self { residual: None, scale: 1.0, dropout: None, ends_block: false }
    }
}

/// `out = scale x W^T` without a record: x \[T, D\], W \[N, D\], out \[T, N\] of any float type.
///
/// # Errors
/// [`crate::Error::Shape`] when widths disagree.
pub fn project(x: &Tensor, weight: &Tensor, scale: f32, out: &mut Tensor) -> Result<()> {
    expect_shape("project", "input", &[x.columns()], &[weight.columns()])?;
    expect_shape("project", "result", &[out.rows(), out.columns()], &[x.rows(), weight.rows()])?;
    let product = (Operand::plain(x), Operand::transposed(weight));
    x.device().kernels().matmul(&[product], out, &Finish::scaled(scale), Arithmetic::of(x.dtype()))
}

/// The adapter's part of a forward pass that the backward pass needs.
struct LoraRecord {
    lora: Lora,
    /// s x A^T \[T, R\].
    reduced: Tensor,
    dropout: Option<Dropped>,
}

/// `y = residual + scale (x W^T + b + s (x A^T) B^T)`: x \[.., D\], y \[T, N\] in the type of x.
///
/// The adapter's two products ride on the main one: the second is a longer inner dimension of the same pass.
/// x may also be \[T, H, E\] with H E = D. Keeps x only when A or W is trained, and s x A^T. The gradient of a
/// frozen W is never computed.
/// Flops: 2 T N D + 2 T R (N + D) forward; backward the same for the input, and 2 T R (N + D) for A and B.
///
/// # Errors
/// [`crate::Error::Shape`] when widths disagree; [`crate::Error::DType`] for a residual of another type; out of memory.
pub fn linear(tape: &Tape, x: &Var, layer: &Linear, options: LinearOptions<'_>) -> Result<Var> {
    let (weight, input) = (layer.weight.value(), x.tensor());
    let (features, width) = (weight.rows(), weight.columns());
    let tokens = token_count(input.shape(), width)?;
    let input = input.reshape(&[tokens, width])?;
    let device = input.device().clone();
    let arithmetic = Arithmetic::of(input.dtype());
    let record = layer.lora.as_ref().map(|lora| reduce(lora, &input, options.dropout)).transpose()?;

    let residual = check_residual(&options, &input, features)?;
    let is_left_out = options.ends_block && tape.is_again();
    let mut out = match residual.filter(|_| is_left_out) {
        Some(residual) => residual.clone(),
        None => Tensor::scratch(&device, Category::Activations, input.dtype(), &[tokens, features])?,
    };
    let bias = layer.bias.as_ref().map(Weight::value);
    if let Some(bias) = &bias {
        expect_shape("linear", "bias", bias.shape(), &[features])?;
    }
    let bias = bias.map(|bias| scaled(bias, options.scale)).transpose()?;
    let finish = Finish { scale: options.scale, bias: bias.as_ref(), accumulate: false, residual };
    let mut products = vec![(Operand::plain(&input), Operand::transposed(&weight))];
    let b = record.as_ref().map(|record| record.lora.b.value());
    if let (Some(record), Some(b)) = (&record, &b) {
        expect_shape("linear", "lora_B", b.shape(), &[features, record.reduced.columns()])?;
        products.push((Operand::plain(&record.reduced), Operand::transposed(b)));
    }
    if !is_left_out {
        device.kernels().matmul(&products, &mut out, &finish, arithmetic)?;
    }

    let (input_slot, residual_slot) = (x.slot(), options.residual.and_then(Var::slot));
    let adapter = layer.lora.as_ref().map(|lora| [&lora.a, &lora.b]);
    let is_trained = |weight: &&Weight| weight.parameter().is_some();
    let trains =
        adapter.into_iter().flatten().chain(&layer.bias).chain([&layer.weight]).any(|w| is_trained(&w));
    let wanted = trains || input_slot.is_some() || residual_slot.is_some();
    let keep_input = is_trained(&&layer.weight) || adapter.is_some_and(|[a, _]| is_trained(&a));
    let node = Node {
        input: keep_input.then(|| x.save()),
        input_shape: [tokens, width],
        weight: layer.weight.clone(),
        bias: layer.bias.as_ref().and_then(Weight::parameter).cloned(),
        record,
        scale: options.scale,
        input_slot,
        residual_slot,
    };
    Ok(tape.push(out, wanted, |slot| Box::new(move |gradients| node.backward(gradients, slot))))
}

/// The residual of a product of `input` with some features.
pub(super) fn check_residual<'a>(
    options: &LinearOptions<'a>,
    input: &Tensor,
    features: usize,
) -> Result<Option<&'a Tensor>> {
    let Some(residual) = options.residual.map(Var::tensor) else { return Ok(None) };
    expect_shape("linear", "residual", residual.shape(), &[input.rows(), features])?;
    expect_dtype("linear", "residual", residual.dtype(), input.dtype())?;
    Ok(Some(residual))
}

/// Tokens of an input whose last sizes make up `width`.
pub(super) fn token_count(shape: &[usize], width: usize) -> Result<usize> {
    let outer = |count: usize| shape[..shape.len().saturating_sub(count)].iter().product();
    let inner = |count: usize| shape[shape.len().saturating_sub(count)..].iter().product::<usize>();
    (1..=shape.len().saturating_sub(1).clamp(1, 2))
        .find(|&count| inner(count) == width)
        .map(outer)
        .ok_or_else(|| Error::Shape {
            operation: "linear",
            what: "input",
            actual: shape.to_vec(),
            expected: [&shape[..shape.len().saturating_sub(1)], &[width]].concat(),
        })
}

/// `factor * x` as f32 in fresh memory, or `x` itself when it is that already.
fn scaled(x: Tensor, factor: f32) -> Result<Tensor> {
    if factor == 1.0 && x.dtype() == DType::F32 {
        return Ok(x);
    }
    let mut copy = Tensor::scratch(x.device(), Category::Workspace, DType::F32, x.shape())?;
    x.device().kernels().convert(&x, &mut copy);
    x.device().kernels().scale(&mut copy, factor);
    Ok(copy)
}

/// s x A^T, with dropout on x while training.
fn reduce(lora: &Lora, input: &Tensor, dropout: Option<&Dropout>) -> Result<LoraRecord> {
    let a = lora.a.value();
    expect_shape("linear", "lora_A", a.shape(), &[a.rows(), input.columns()])?;
    let (device, tokens) = (input.device(), input.rows());
    let dropout = dropout.filter(|_| lora.dropout > 0.0).map(|source| Dropped {
        probability: lora.dropout,
        key: RandomKey { seed: source.seed, step: source.step, stream: lora.stream },
        steps_before: source.steps_before.clone(),
    });
    let mut reduced = Tensor::scratch(device, Category::Activations, input.dtype(), &[tokens, a.rows()])?;
    let dropped = dropout.as_ref().map(|mask| drop_elements(input, mask)).transpose()?;
    let product = (Operand::plain(dropped.as_ref().unwrap_or(input)), Operand::transposed(&a));
    let arithmetic = Arithmetic::of(input.dtype());
    device.kernels().matmul(&[product], &mut reduced, &Finish::scaled(lora.scale), arithmetic)?;
    Ok(LoraRecord { lora: lora.clone(), reduced, dropout })
}

/// Which elements of an adapter's input were dropped.
struct Dropped {
    probability: f32,
    key: RandomKey,
    steps_before: Option<Tensor>,
}

impl Dropped {
    fn mask(&self) -> DropoutMask<'_> {
        let Self { probability, key, steps_before } = self;
        DropoutMask { probability: *probability, key: *key, steps_before: steps_before.as_ref() }
    }
}

fn drop_elements(input: &Tensor, dropped: &Dropped) -> Result<Tensor> {
    let mut out = Tensor::scratch(input.device(), Category::Activations, input.dtype(), input.shape())?;
    input.device().kernels().dropout(input, &dropped.mask(), &mut out, false);
    Ok(out)
}

/// What the backward pass of one linear layer reads.
struct Node {
    input: Option<Saved>,
    input_shape: [usize; 2],
    weight: Weight,
    bias: Option<Arc<Parameter>>,
    record: Option<LoraRecord>,
    scale: f32,
    input_slot: Option<usize>,
    residual_slot: Option<usize>,
}

impl Node {
    fn backward(mut self, gradients: &mut Gradients, slot: usize) -> Result<()> {
        let Some(d_out) = gradients.take(slot) else { return Ok(()) };
        let features = self.weight.shape()[0];
        let d_out = d_out.reshape(&[self.input_shape[0], features])?;
        let arithmetic = Arithmetic::of(d_out.dtype());
        let input = match &self.input {
            Some(saved) => Some(saved.get()?.reshape(&self.input_shape)?),
            None => None,
        };
        let d_reduced = match &self.record {
            Some(record) => Some(self.adapter_gradients(gradients, record, input.as_ref(), &d_out)?),
            None => None,
        };
        if let (Some(parameter), Some(input)) = (self.weight.parameter(), &input) {
            gradients.add_weight(parameter, d_out.clone(), input.clone(), self.scale)?;
        }
        if let Some(bias) = &self.bias {
            self.bias_gradient(bias, &d_out, features)?;
        }
        // It may have been computed again: it need not be there while its gradient is.
        drop(input);
        self.input = None;
        if let Some(slot) = self.input_slot {
            self.input_gradient(gradients, slot, &d_out, d_reduced.as_ref(), arithmetic)?;
        }
        let Some(slot) = self.residual_slot else { return gradients.settle_weights() };
        gradients.settle_weights()?;
        gradients.add(slot, d_out)
    }

    fn bias_gradient(&self, bias: &Parameter, d_out: &Tensor, features: usize) -> Result<()> {
        let mut sums = Tensor::zeros(d_out.device(), Category::Workspace, DType::F32, &[features])?;
        let kernels = d_out.device().kernels();
        kernels.sum_rows(d_out, &mut sums);
        kernels.scale(&mut sums, self.scale);
        bias.accumulate(|d_bias| {
            kernels.add_assign(d_bias, &sums);
            Ok(())
        })
    }

    /// Adds to the gradients of A and B and returns d(s x A^T) = s dy B, the layer's factor not included.
    fn adapter_gradients(
        &self,
        gradients: &mut Gradients,
        record: &LoraRecord,
        input: Option<&Tensor>,
        d_out: &Tensor,
    ) -> Result<Tensor> {
        let kernels = d_out.device().kernels();
        let arithmetic = Arithmetic::of(d_out.dtype());
        let b = record.lora.b.value();
        let shape = [d_out.rows(), b.columns()];
        let mut d_reduced = Tensor::scratch(d_out.device(), Category::Activations, d_out.dtype(), &shape)?;
        let product = (Operand::plain(d_out), Operand::plain(&b));
        kernels.matmul(&[product], &mut d_reduced, &Finish::scaled(record.lora.scale), arithmetic)?;
        if let Some(parameter) = record.lora.b.parameter() {
            drop(b);
            gradients.add_weight(parameter, d_out.clone(), record.reduced.clone(), self.scale)?;
        }
        if let (Some(parameter), Some(input)) = (record.lora.a.parameter(), input) {
            let dropped = record.dropout.as_ref().map(|mask| drop_elements(input, mask)).transpose()?;
            let right = dropped.unwrap_or_else(|| input.clone());
            gradients.add_weight(parameter, d_reduced.clone(), right, self.scale)?;
        }
        Ok(d_reduced)
    }

    /// dx = scale (dy W + d_reduced A), the second term through the dropout mask when there is one.
    fn input_gradient(
        &self,
        gradients: &mut Gradients,
        slot: usize,
        d_out: &Tensor,
        d_reduced: Option<&Tensor>,
        arithmetic: Arithmetic,
    ) -> Result<()> {
        let kernels: &dyn Kernels = d_out.device().kernels();
        let weight = self.weight.value();
        let a = self.record.as_ref().map(|record| record.lora.a.value());
        let dropped = self.record.as_ref().and_then(|record| record.dropout.as_ref());
        gradients.add_with(slot, (d_out, &self.input_shape, 0), |d_input, accumulate| {
            let finish = Finish { scale: self.scale, accumulate, ..Finish::STORE };
            let main = (Operand::plain(d_out), Operand::plain(&weight));
            let adapter = d_reduced.zip(a.as_ref()).map(|(d, a)| (Operand::plain(d), Operand::plain(a)));
            match (adapter, dropped) {
                (Some(adapter), None) => kernels.matmul(&[main, adapter], d_input, &finish, arithmetic),
                (None, _) => kernels.matmul(&[main], d_input, &finish, arithmetic),
                (Some(adapter), Some(dropped)) => {
                    kernels.matmul(&[main], d_input, &finish, arithmetic)?;
                    let device = d_out.device();
                    let shape = &self.input_shape;
                    let mut part = Tensor::scratch(device, Category::Activations, d_out.dtype(), shape)?;
                    kernels.matmul(&[adapter], &mut part, &Finish::scaled(self.scale), arithmetic)?;
                    kernels.dropout(&part, &dropped.mask(), d_input, true);
                    Ok(())
                }
            }
        })
    }
}
