//! Rows from tokens to experts and back.

use super::Routing;
use crate::device::Held;
use crate::error::{Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::tape::Gradients;
use crate::{DType, Tape, Tensor, Var};

/// Where the weights of a routing are multiplied in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weighting {
    /// Into what the experts read, by [`gather`].
    Input,
    /// Into what they give, by [`combine`].
    Output,
}

/// What a sum over a token's rows is added to.
#[derive(Clone, Copy)]
pub struct SumOptions<'a> {
    /// Added to the result: \[T, D\].
    pub residual: Option<&'a Var>,
    /// Factor on everything but the residual.
    pub scale: f32,
    /// As [`crate::ops::LinearOptions::ends_block`].
    pub ends_block: bool,
}

impl Default for SumOptions<'_> {
    fn default() -> Self {
        Self { residual: None, scale: 1.0, ends_block: false }
    }
}

/// Each token's row once for each of its experts: x \[T, D\] to \[P, D\], times the weights with [`Weighting::Input`].
///
/// The result is not kept for the backward passes of its users: they compute it again from `x`.
/// Bytes: k + 1 times those of x forward, the same backward.
///
/// # Errors
/// [`crate::Error::Shape`] when x has other tokens than the routing; out of memory.
pub fn gather(tape: &Tape, x: &Var, routing: &Routing, weighting: Weighting) -> Result<Var> {
    let (plan, width) = (routing.plan.clone(), x.tensor().columns());
    let shape = [plan.chosen.rows(), width];
    expect_shape("gather", "input", x.tensor().shape(), &shape)?;
    let is_input = weighting == Weighting::Input;
    let weights = is_input.then(|| routing.weights.tensor().clone());
    let spread = {
        let (plan, weights) = (plan.clone(), weights.clone());
        move |x: &Tensor| -> Result<Tensor> {
            let shape = [plan.rows(), x.columns()];
            let mut out = Tensor::scratch(x.device(), Category::Activations, x.dtype(), &shape)?;
            x.device().kernels().experts().spread_tokens(x, &plan, weights.as_ref(), 1.0, &mut out);
            Ok(out)
        }
    };
    let out = spread(x.tensor())?;
    let (input_slot, weight_slot) = (x.slot(), routing.weights.slot().filter(|_| is_input));
    let read = weight_slot.map(|_| x.save());
    let var = tape.push(out, input_slot.is_some() || weight_slot.is_some(), |slot| {
        Box::new(move |gradients| {
            let Some(d_out) = gradients.take(slot) else { return Ok(()) };
            let kernels = d_out.device().kernels().experts();
            if let (Some(slot), Some(read)) = (weight_slot, read) {
                let x = read.get()?;
                let mut d_weights =
                    Tensor::scratch(x.device(), Category::Activations, DType::F32, plan.chosen.shape())?;
                kernels.pair_products(&x, &d_out, &plan, 1.0, &mut d_weights);
                gradients.add(slot, d_weights)?;
            }
            let Some(slot) = input_slot else { return Ok(()) };
            gradients.add_onto(slot, (&d_out, &shape, 0), |d_x, held| {
                kernels.collect_tokens(&d_out, &plan, weights.as_ref(), 1.0, held, d_x);
                Ok(())
            })
        })
    });
    let saved = x.save();
    Ok(tape.with_recipe(var, move || spread(&saved.get()?)))
}

/// Joins what the experts gave: y \[P, D\] to `residual + scale * sum over a token's choices of weight * row`, \[T, D\], summed
/// in f32 in the order of choices. With [`Weighting::Input`] every weight is 1 here.
///
/// Keeps y where the weights want a gradient.
/// Bytes: k + 1 times those of the result forward, twice that backward.
///
/// # Errors
/// [`crate::Error::Shape`] or [`crate::Error::DType`] when the inputs do not fit; out of memory.
pub fn combine(
    tape: &Tape,
    y: &Var,
    routing: &Routing,
    weighting: Weighting,
    options: SumOptions<'_>,
) -> Result<Var> {
    let (plan, scale, width) = (routing.plan.clone(), options.scale, y.tensor().columns());
    expect_shape("combine", "input", y.tensor().shape(), &[plan.rows(), width])?;
    let is_output = weighting == Weighting::Output;
    let weights = is_output.then(|| routing.weights.tensor().clone());
    let shape = [plan.chosen.rows(), width];
    let out = sum_into(tape, "combine", y.tensor(), &shape, &options, |residual, out| {
        let held = residual.map_or(Held::Nothing, Held::Other);
        let kernels = y.tensor().device().kernels().experts();
        kernels.collect_tokens(y.tensor(), &plan, weights.as_ref(), scale, held, out);
    })?;
    let (input_slot, weight_slot) = (y.slot(), routing.weights.slot().filter(|_| is_output));
    let residual_slot = options.residual.and_then(Var::slot);
    let read = weight_slot.map(|_| y.save());
    let wanted = [input_slot, weight_slot, residual_slot].iter().any(Option::is_some);
    Ok(tape.push(out, wanted, |slot| {
        Box::new(move |gradients| {
            let Some(d_out) = gradients.take(slot) else { return Ok(()) };
            let kernels = d_out.device().kernels().experts();
            if let (Some(slot), Some(read)) = (weight_slot, read) {
                let y = read.get()?;
                let mut d_weights =
                    Tensor::scratch(y.device(), Category::Activations, DType::F32, plan.chosen.shape())?;
                kernels.pair_products(&d_out, &y, &plan, scale, &mut d_weights);
                gradients.add(slot, d_weights)?;
            }
            if let Some(slot) = input_slot {
                let shape = [plan.rows(), width];
                let mut d_y = Tensor::scratch(d_out.device(), Category::Activations, d_out.dtype(), &shape)?;
                kernels.spread_tokens(&d_out, &plan, weights.as_ref(), scale, &mut d_y);
                gradients.add(slot, d_y)?;
            }
            pass_on(gradients, residual_slot, d_out)
        })
    }))
}

/// `residual + scale * sigmoid(logits) * y`: y \[T, D\], one logit for each row \[T, 1\].
///
/// Keeps y and the logits.
/// Bytes: three times those of y forward, five backward.
///
/// # Errors
/// [`crate::Error::Shape`] or [`crate::Error::DType`] when the inputs do not fit; out of memory.
pub fn gate_rows(tape: &Tape, y: &Var, logits: &Var, options: SumOptions<'_>) -> Result<Var> {
    let (scale, shape) = (options.scale, [y.tensor().rows(), y.tensor().columns()]);
    expect_shape("gate_rows", "input", y.tensor().shape(), &shape)?;
    expect_shape("gate_rows", "logits", logits.tensor().shape(), &[shape[0], 1])?;
    let out = sum_into(tape, "gate_rows", y.tensor(), &shape, &options, |residual, out| {
        let kernels = y.tensor().device().kernels().experts();
        kernels.gate_rows(y.tensor(), logits.tensor(), scale, residual, out);
    })?;
    let slots = [y.slot(), logits.slot()];
    let residual_slot = options.residual.and_then(Var::slot);
    let is_read = slots.iter().any(Option::is_some);
    let read = is_read.then(|| [y.save(), logits.save()]);
    Ok(tape.push(out, is_read || residual_slot.is_some(), |slot| {
        Box::new(move |gradients| {
            let Some(d_out) = gradients.take(slot) else { return Ok(()) };
            if let Some([y, logits]) = read {
                let (y, logits) = (y.get()?, logits.get()?);
                let fresh = |like: &Tensor| {
                    Tensor::scratch(like.device(), Category::Activations, like.dtype(), like.shape())
                };
                let (mut d_y, mut d_logits) = (fresh(&y)?, fresh(&logits)?);
                let kernels = d_out.device().kernels().experts();
                kernels.gate_rows_backward(&y, &logits, scale, &d_out, &mut d_y, &mut d_logits);
                for (slot, gradient) in slots.into_iter().zip([d_y, d_logits]) {
                    if let Some(slot) = slot {
                        gradients.add(slot, gradient)?;
                    }
                }
            }
            pass_on(gradients, residual_slot, d_out)
        })
    }))
}

/// The result of a sum onto a residual, or what stands in its place where nobody reads it.
fn sum_into(
    tape: &Tape,
    operation: &'static str,
    like: &Tensor,
    shape: &[usize; 2],
    options: &SumOptions<'_>,
    write: impl FnOnce(Option<&Tensor>, &mut Tensor),
) -> Result<Tensor> {
    let residual = options.residual.map(Var::tensor);
    if let Some(residual) = residual {
        expect_shape(operation, "residual", residual.shape(), shape)?;
        expect_dtype(operation, "residual", residual.dtype(), like.dtype())?;
    }
    let is_left_out = options.ends_block && tape.is_again();
    if let Some(residual) = residual.filter(|_| is_left_out) {
        return Ok(residual.clone());
    }
    let mut out = Tensor::scratch(like.device(), Category::Activations, like.dtype(), shape)?;
    if !is_left_out {
        write(residual, &mut out);
    }
    Ok(out)
}

fn pass_on(gradients: &mut Gradients, slot: Option<usize>, d_out: Tensor) -> Result<()> {
    slot.map_or(Ok(()), |slot| gradients.add(slot, d_out))
}

/// The same numbers in another type; their gradient comes back in the type of `x`.
///
/// # Errors
/// Out of memory.
pub fn convert(tape: &Tape, x: &Var, dtype: DType) -> Result<Var> {
    let input = x.tensor();
    if input.dtype() == dtype {
        return Ok(x.clone());
    }
    let other = |input: &Tensor, dtype: DType| -> Result<Tensor> {
        let mut out = Tensor::scratch(input.device(), Category::Activations, dtype, input.shape())?;
        input.device().kernels().convert(input, &mut out);
        Ok(out)
    };
    let (own, input_slot, saved) = (input.dtype(), x.slot(), x.save());
    let var = tape.push(other(input, dtype)?, input_slot.is_some(), |slot| {
        Box::new(move |gradients| {
            let (Some(d_out), Some(slot)) = (gradients.take(slot), input_slot) else { return Ok(()) };
            gradients.add(slot, other(&d_out, own)?)
        })
    });
    Ok(tape.with_recipe(var, move || other(&saved.get()?, dtype)))
}
