//! Gated activations of experts, whose gate and up come as one row.

use crate::device::PairedGate;
use crate::error::{Result, expect_shape};
use crate::memory::Category;
use crate::{Tape, Tensor, Var};

/// The gated activation of each row of \[P, 2 F\], \[P, F\], in f32 inside.
///
/// The result is not kept for the backward passes of its users: they compute it again.
/// Bytes: three times those of the result forward, five backward.
///
/// # Errors
/// [`crate::Error::Shape`] when the columns are not even; out of memory.
pub fn gated_pair(tape: &Tape, gate_up: &Var, kind: PairedGate) -> Result<Var> {
    let (rows, width) = (gate_up.tensor().rows(), gate_up.tensor().columns() / 2);
    expect_shape("gated_pair", "input", gate_up.tensor().shape(), &[rows, 2 * width])?;
    let compute = move |gate_up: &Tensor| -> Result<Tensor> {
        let (device, dtype) = (gate_up.device(), gate_up.dtype());
        let mut out = Tensor::scratch(device, Category::Activations, dtype, &[rows, width])?;
        device.kernels().experts().gated_pair(kind, gate_up, &mut out);
        Ok(out)
    };
    let out = compute(gate_up.tensor())?;
    let (saved, again, input_slot) = (gate_up.save(), gate_up.save(), gate_up.slot());
    let var = tape.push(out, input_slot.is_some(), |slot| {
        Box::new(move |gradients| {
            let (Some(d_out), Some(slot)) = (gradients.take(slot), input_slot) else { return Ok(()) };
            let gate_up = saved.get()?;
            let (device, dtype) = (gate_up.device(), gate_up.dtype());
            let mut d_gate_up = Tensor::scratch(device, Category::Activations, dtype, gate_up.shape())?;
            device.kernels().experts().gated_pair_backward(kind, &gate_up, &d_out, &mut d_gate_up);
            gradients.add(slot, d_gate_up)
        })
    });
    Ok(tape.with_recipe(var, move || compute(&again.get()?)))
}
