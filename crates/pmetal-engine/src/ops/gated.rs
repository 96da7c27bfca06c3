//! Gated activations of feed-forward layers.

use crate::device::{GateActivation, GradientCodes, Riding, RowKernel, ScaledRows};
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
    gated_with_spare(tape, activation, gate, up, GatedOptions::default())
}

/// What the rows of [`gated_with_spare`] carry for their readers.
#[derive(Debug, Clone, Default)]
pub struct GatedOptions {
    /// Columns that rows of the result have to spare; see [`Tensor::scratch_with_spare`].
    pub spare: usize,
    /// Whether the result is rounded to eight bits as well, for [`crate::ops::LinearGroup::reads_codes`].
    pub codes: bool,
    /// Factors with which the gradients of gate and up, side by side, are rounded to eight bits as well:
    /// [`crate::ops::LinearGroup::gradient_factors`] of the group whose results they are.
    pub gradient_factors: Option<Tensor>,
    /// Whose product with the result goes into its spare columns: [`crate::ops::LinearGroup::riding`].
    pub riding: Option<Riding>,
}

/// [`gated`] whose rows carry something for their readers.
///
/// # Errors
/// As [`gated`].
pub fn gated_with_spare(
    tape: &Tape,
    activation: GateActivation,
    gate: &Var,
    up: &Var,
    options: GatedOptions,
) -> Result<Var> {
    let GatedOptions { spare, codes, gradient_factors, riding } = options;
    expect_shape("gated", "up", up.tensor().shape(), gate.tensor().shape())?;
    expect_dtype("gated", "up", up.tensor().dtype(), gate.tensor().dtype())?;
    let (gate_value, up_value) = (gate.tensor().clone(), up.tensor().clone());
    let device = gate_value.device().clone();
    let rides = |riding: &Riding| {
        spare == riding.a.rows() && device.kernels().rides(RowKernel::Gated, &gate_value, riding)
    };
    let riding = riding.filter(rides);
    let compute = {
        let (gate, up, device) = (gate_value.clone(), up_value.clone(), device.clone());
        let riding = riding.clone();
        move |spare: usize, codes: bool| -> Result<(Tensor, Option<ScaledRows>)> {
            let (rows, category) = ([gate.rows(), gate.columns()], Category::Activations);
            let mut out = match spare {
                0 => Tensor::scratch(&device, category, gate.dtype(), gate.shape())?,
                _ => Tensor::scratch_with_spare(&device, category, gate.dtype(), rows, spare)?,
            };
            if let Some(fp8) = device.kernels().fp8().filter(|_| codes)
                && let Some(codes) = fp8.gated_rounded(activation, &gate, &up, &mut out)?
            {
                return Ok((out, Some(codes)));
            }
            let kernels = device.kernels();
            match &riding {
                Some(riding) if kernels.gated_riding(activation, [&gate, &up], riding, &mut out) => {}
                _ => {
                    kernels.gated(activation, &gate, &up, &mut out);
                    riding.iter().try_for_each(|riding| riding.put_beside(&out))?;
                }
            }
            Ok((out, None))
        }
    };
    // In a block's second pass its last product, which would read them, is left out.
    let (out, codes) = compute(spare, codes && !tape.is_again())?;
    let slots = [gate.slot(), up.slot()];
    let var = tape.push(out, slots.iter().any(Option::is_some), |slot| {
        Box::new(move |gradients| {
            let Some((mut d_out, share)) = gradients.take_with_share(slot) else { return Ok(()) };
            let kernels = device.kernels();
            let (mut gate, mut up) = (gate_value, up_value);
            // Nobody reads them after this.
            let is_ours = gate.is_unique() && up.is_unique();
            let mut is_done = false;
            if let Some(share) = &share {
                let both = [&mut gate, &mut up];
                is_done = is_ours && kernels.gated_backward_riding(activation, both, (&d_out, share));
                if !is_done {
                    share.add_to(&mut d_out)?;
                }
            }
            let can_round = is_ours && share.is_none();
            let rounded = match kernels.fp8().filter(|_| can_round).zip(gradient_factors) {
                Some((fp8, factors)) => fp8
                    .gated_backward_rounded(activation, &mut gate, &mut up, &d_out, &factors)?
                    .map(|rows| (rows, factors)),
                None => None,
            };
            let in_place = is_done
                || rounded.is_some()
                || is_ours && kernels.gated_backward_in_place(activation, &mut gate, &mut up, &d_out);
            let [d_gate, d_up] = if in_place {
                [gate, up]
            } else {
                let [mut d_gate, mut d_up] = Tensor::scratch_alike(Category::Activations, [&gate, &up])?;
                kernels.gated_backward(activation, &gate, &up, &d_out, &mut d_gate, &mut d_up);
                [d_gate, d_up]
            };
            drop(d_out);
            let mut first = 0;
            for (slot, gradient) in slots.into_iter().zip([d_gate, d_up]) {
                let codes = rounded.clone().map(|(rows, factors)| GradientCodes { rows, factors, first });
                first += gradient.columns();
                if let Some(slot) = slot {
                    gradients.add_with_codes(slot, gradient, codes)?;
                }
            }
            Ok(())
        })
    });
    // With the same columns to spare, so that products read it alike whether it was kept or not.
    let var = tape.with_recipe(var, move || compute(spare, false).map(|computed| computed.0));
    Ok(var.with_codes(codes).with_riding(riding))
}
