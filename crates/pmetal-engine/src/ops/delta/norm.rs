//! RMSNorm with a gate.

use super::single;
use crate::error::{Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{Tape, Tensor, Var, Weight};

/// `w * rms_norm(x) * silu(gate)`: x and gate \[T, H, E\], w \[E\], result \[T, H E\], as the projection behind it reads it;
/// in f32 inside, but that the normalised value is rounded to the type of x first.
///
/// The result is not kept for the backward pass of its user, who computes it again. Bytes: three tensors forward, five
/// backward.
///
/// # Errors
/// [`crate::Error::Shape`] or [`crate::Error::DType`] when inputs disagree; out of memory.
pub fn gated_rms_norm(tape: &Tape, x: &Var, gate: &Var, weight: &Weight, epsilon: f32) -> Result<Var> {
    gated_rms_norm_with_spare(tape, x, gate, weight, epsilon, 0)
}

/// [`gated_rms_norm`] with room for more columns in the rows of the result; see [`Tensor::scratch_with_spare`].
///
/// # Errors
/// As [`gated_rms_norm`].
pub fn gated_rms_norm_with_spare(
    tape: &Tape,
    x: &Var,
    gate: &Var,
    weight: &Weight,
    epsilon: f32,
    spare: usize,
) -> Result<Var> {
    let (input, gate_value, value) = (x.tensor().clone(), gate.tensor().clone(), single(weight)?);
    let [tokens, heads, width] = [0, 1, 2].map(|index| input.shape().get(index).copied().unwrap_or(1));
    expect_shape("gated_rms_norm", "x", input.shape(), &[tokens, heads, width])?;
    expect_shape("gated_rms_norm", "gate", gate_value.shape(), input.shape())?;
    expect_dtype("gated_rms_norm", "gate", gate_value.dtype(), input.dtype())?;
    expect_shape("gated_rms_norm", "weight", value.shape(), &[width])?;
    let device = input.device().clone();
    let compute = {
        let (input, gate, value, device) = (input.clone(), gate_value.clone(), value.clone(), device.clone());
        move || -> Result<Tensor> {
            let (rows, category) = ([tokens, heads * width], Category::Activations);
            let mut out = match spare {
                0 => Tensor::scratch(&device, category, input.dtype(), &rows)?,
                _ => Tensor::scratch_with_spare(&device, category, input.dtype(), rows, spare)?,
            };
            device.kernels().delta().gated_rms_norm(&input, &gate, &value, epsilon, &mut out);
            Ok(out)
        }
    };
    let (slots, parameter) = ([x.slot(), gate.slot()], weight.parameter().cloned());
    let wanted = slots.iter().any(Option::is_some) || parameter.is_some();
    let var = tape.push(compute()?, wanted, |slot| {
        Box::new(move |gradients| {
            let Some(d_out) = gradients.take(slot) else { return Ok(()) };
            let mut fresh = Tensor::scratch_alike(Category::Activations, [&input, &gate_value])?;
            let mut run = |d_weight: Option<&mut Tensor>| {
                let [d_x, d_gate] = &mut fresh;
                let (kernels, inputs) = (device.kernels().delta(), [&input, &gate_value, &value]);
                kernels.gated_rms_norm_backward(inputs, epsilon, &d_out, [d_x, d_gate], d_weight)
            };
            match &parameter {
                Some(parameter) => parameter.accumulate(|d_weight| run(Some(d_weight)))?,
                None => run(None)?,
            }
            for (slot, gradient) in slots.into_iter().zip(fresh) {
                if let Some(slot) = slot {
                    gradients.add(slot, gradient)?;
                }
            }
            Ok(())
        })
    });
    Ok(tape.with_recipe(var, compute))
}
