//! Gated activations of feed-forward layers.

use crate::device::GateActivation;
use crate::error::{Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{Tape, Tensor, Var};

/// `activation(gate) * up`, all \[T, F\], in f32 inside (SwiGLU and GeGLU: Shazeer, arXiv 2002.05202).
///
/// The result is not kept for the backward passes of its users: they compute it again.
/// Bytes: three tensors forward, five backward.
///
/// # Errors
/// [`crate::Error::Shape`] or [`crate::Error::DType`] when the two inputs differ; out of memory.
pub fn gated(tape: &Tape, activation: GateActivation, gate: &Var, up: &Var) -> Result<Var> {
    gated_with_spare(tape, activation, gate, up, 0)
}

/// [`gated`] with room for more columns in the rows of the result; see [`Tensor::scratch_with_spare`].
///
/// # Errors
/// As [`gated`].
pub fn gated_with_spare(
    tape: &Tape,
    activation: GateActivation,
    gate: &Var,
    up: &Var,
    spare: usize,
) -> Result<Var> {
    expect_shape("gated", "up", up.tensor().shape(), gate.tensor().shape())?;
    expect_dtype("gated", "up", up.tensor().dtype(), gate.tensor().dtype())?;
    let (gate_value, up_value) = (gate.tensor().clone(), up.tensor().clone());
    let device = gate_value.device().clone();
    let compute = {
        let (gate, up, device) = (gate_value.clone(), up_value.clone(), device.clone());
        move |spare: usize| -> Result<Tensor> {
            let (rows, category) = ([gate.rows(), gate.columns()], Category::Activations);
            let mut out = match spare {
                0 => Tensor::scratch(&device, category, gate.dtype(), gate.shape())?,
                _ => Tensor::scratch_with_spare(&device, category, gate.dtype(), rows, spare)?,
            };
            device.kernels().gated(activation, &gate, &up, &mut out);
            Ok(out)
        }
    };
    let out = compute(spare)?;
    let slots = [gate.slot(), up.slot()];
    let var = tape.push(out, slots.iter().any(Option::is_some), |slot| {
        Box::new(move |gradients| {
            let Some(d_out) = gradients.take(slot) else { return Ok(()) };
            let kernels = device.kernels();
            let (mut gate, mut up) = (gate_value, up_value);
            // Nobody reads them after this.
            let in_place = gate.is_unique()
                && up.is_unique()
                && kernels.gated_backward_in_place(activation, &mut gate, &mut up, &d_out);
            let [d_gate, d_up] = if in_place {
                [gate, up]
            } else {
                let [mut d_gate, mut d_up] = Tensor::scratch_alike(Category::Activations, [&gate, &up])?;
                kernels.gated_backward(activation, &gate, &up, &d_out, &mut d_gate, &mut d_up);
                [d_gate, d_up]
            };
            drop(d_out);
            for (slot, gradient) in slots.into_iter().zip([d_gate, d_up]) {
                if let Some(slot) = slot {
                    gradients.add(slot, gradient)?;
                }
            }
            Ok(())
        })
    });
    // With the same columns to spare, so that products read it alike whether it was kept or not.
    Ok(tape.with_recipe(var, move || compute(spare)))
}
