//! Sums with a factor: residual connections whose branch does not end in a product.

use crate::error::{Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{Tape, Var};

/// `x + factor * y`, of one shape and type, in f32 inside.
///
/// Written where y is, if y is its only handle; a recipe by which y can be computed again stays good. Keeps nothing.
/// Bytes: three tensors forward; backward nothing for a factor of 1, because the gradients of x and y are one tensor, else two.
///
/// # Errors
/// [`crate::Error::Shape`] or [`crate::Error::DType`] when y differs from x; out of memory.
pub fn add_scaled(tape: &Tape, x: &Var, y: Var, factor: f32) -> Result<Var> {
    expect_shape("add_scaled", "y", y.tensor().shape(), x.tensor().shape())?;
    expect_dtype("add_scaled", "y", y.tensor().dtype(), x.tensor().dtype())?;
    let slots = [x.slot(), y.slot()];
    let mut out = y.into_tensor().into_unique()?;
    let device = out.device().clone();
    device.kernels().add_scaled(x.tensor(), factor, &mut out);
    Ok(tape.push(out, slots.iter().any(Option::is_some), |slot| {
        Box::new(move |gradients| {
            let Some(d_out) = gradients.take(slot) else { return Ok(()) };
            let [x_slot, y_slot] = slots;
            if let Some(slot) = y_slot {
                let d_y = if factor == 1.0 {
                    d_out.clone()
                } else {
                    let mut d_y = d_out.scratch_like(Category::Activations)?;
                    device.kernels().scaled(&d_out, factor, &mut d_y);
                    d_y
                };
                gradients.add(slot, d_y)?;
            }
            match x_slot {
                Some(slot) => gradients.add(slot, d_out),
                None => Ok(()),
            }
        })
    }))
}
