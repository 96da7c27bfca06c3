//! LayerNorm.

use crate::device::LayerNorm;
use crate::error::{Result, expect_shape};
use crate::memory::Category;
use crate::ops::Spare;
use crate::{Tape, Tensor, Var, Weight};

/// `(x - mean) / sqrt(variance + epsilon) * w + b` over the last dimension (Ba, Kiros and Hinton, arXiv 1607.06450), in f32
/// inside; \[.., D\] to \[.., D\]. Weight and bias may be absent; each is \[D\], or \[H, E\] for x \[T, H, E\], whose heads then
/// have their own. The variance is the mean square of what is left without the mean.
///
/// The result is not kept for the backward passes of its users: they compute it again from `x`. Codes are not made, so
/// that groups which read them round the result themselves.
/// Bytes: input and result once forward, three times that backward.
///
/// # Errors
/// [`crate::Error::Shape`] for weights of another shape; out of memory.
pub fn layer_norm(
    tape: &Tape,
    x: &Var,
    weight: Option<&Weight>,
    bias: Option<&Weight>,
    epsilon: f32,
    spare: Spare,
) -> Result<Var> {
    let input = x.tensor().clone();
    let [weight_value, bias_value] = [weight, bias].map(|weight| weight.map(Weight::value));
    for (what, value) in [("weight", &weight_value), ("bias", &bias_value)] {
        let Some(value) = value else { continue };
        let own = input.shape().get(1..).filter(|own| own.len() == 2 && value.shape() == *own);
        expect_shape("layer_norm", what, value.shape(), own.unwrap_or(&[input.columns()]))?;
    }
    let device = input.device().clone();
    let compute = {
        let (input, weight, bias) = (input.clone(), weight_value.clone(), bias_value.clone());
        move || -> Result<Tensor> {
            let (device, category, dtype) = (input.device(), Category::Activations, input.dtype());
            let mut out = match (spare.result, input.shape()) {
                (1.., &[rows, width]) => {
                    Tensor::scratch_with_spare(device, category, dtype, [rows, width], spare.result)?
                }
                (_, shape) => Tensor::scratch(device, category, dtype, shape)?,
            };
            let norm = LayerNorm { weight: weight.as_ref(), bias: bias.as_ref(), epsilon };
            device.kernels().layer_norm(&input, &norm, &mut out);
            Ok(out)
        }
    };
    let out = compute()?;
    let parameters = [weight, bias].map(|weight| weight.and_then(Weight::parameter).cloned());
    let input_slot = x.slot();
    let wanted = input_slot.is_some() || parameters.iter().any(Option::is_some);
    let var = tape.push(out, wanted, |slot| {
        Box::new(move |gradients| {
            let Some(d_out) = gradients.take(slot) else { return Ok(()) };
            let kernels = device.kernels();
            let norm = LayerNorm { weight: weight_value.as_ref(), bias: bias_value.as_ref(), epsilon };
            if let Some(slot) = input_slot {
                gradients.add_onto(slot, (&input, input.shape(), spare.gradient), |d_x, held| {
                    kernels.layer_norm_backward(&input, &norm, &d_out, Some((d_x, held)), [None, None]);
                    Ok(())
                })?;
            }
            let [weight, bias] = parameters;
            if let Some(parameter) = weight {
                parameter.accumulate(|d_weight| {
                    kernels.layer_norm_backward(&input, &norm, &d_out, None, [Some(d_weight), None]);
                    Ok(())
                })?;
            }
            let Some(parameter) = bias else { return Ok(()) };
            parameter.accumulate(|d_bias| {
                kernels.layer_norm_backward(&input, &norm, &d_out, None, [None, Some(d_bias)]);
                Ok(())
            })
        })
    });
    // With the same columns to spare, so that products read it alike whether it was kept or not.
    Ok(tape.with_recipe(var, compute))
}
