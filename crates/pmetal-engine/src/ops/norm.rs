//! RMSNorm.

use crate::device::{NormWeight, Riding, RowKernel, ScaledRows};
use crate::error::{Result, expect_shape};
use crate::memory::Category;
use crate::{DType, Tape, Tensor, Var, Weight};

/// `x / sqrt(mean(x^2) + epsilon) * w` over the last dimension, in f32 inside; \[.., D\] to \[.., D\], w \[D\].
///
/// The result is not kept for the backward passes of its users: they compute it again from `x`.
/// Bytes: input and result once forward, three times that backward.
///
/// # Errors
/// [`crate::Error::Shape`] when the weight's width is not D; out of memory.
pub fn rms_norm(
    tape: &Tape,
    x: &Var,
    weight: Option<&Weight>,
    kind: NormWeight,
    epsilon: f32,
) -> Result<Var> {
    rms_norm_with_spare(tape, x, weight, kind, epsilon, Spare::default())
}

/// What rows carry for their readers: columns to spare, see [`Tensor::scratch_with_spare`], and codes.
#[derive(Debug, Clone, Default)]
pub struct Spare {
    /// Of the result.
    pub result: usize,
    /// Of the gradient of x, where this operation's is the first.
    pub gradient: usize,
    /// Whether the result is rounded to eight bits as well, for [`crate::ops::LinearGroup::reads_codes`].
    pub codes: bool,
    /// Whose product with the result goes into its spare columns: [`crate::ops::LinearGroup::riding`].
    pub riding: Option<Riding>,
}

/// [`rms_norm`] whose rows carry something for their readers.
///
/// # Errors
/// As [`rms_norm`].
pub fn rms_norm_with_spare(
    tape: &Tape,
    x: &Var,
    weight: Option<&Weight>,
    kind: NormWeight,
    epsilon: f32,
    spare: Spare,
) -> Result<Var> {
    let input = x.tensor().clone();
    let value = weight.map(Weight::value);
    if let Some(value) = &value {
        expect_shape("rms_norm", "weight", value.shape(), &[input.columns()])?;
    }
    let device = input.device().clone();
    let parameter = weight.and_then(Weight::parameter).cloned();
    let rides = |riding: &Riding| {
        let has_room = spare.result == riding.a.rows() && input.shape().len() == 2 && parameter.is_none();
        has_room && device.kernels().rides(RowKernel::Norm, &input, riding)
    };
    let riding = spare.riding.clone().filter(rides);
    let compute = {
        let (input, value, device, riding) = (input.clone(), value.clone(), device.clone(), riding.clone());
        move |spare: usize, codes: bool| -> Result<(Tensor, Option<ScaledRows>)> {
            let rows = [input.rows(), input.columns()];
            let category = Category::Activations;
            let mut out = match spare {
                0 => Tensor::scratch(&device, category, input.dtype(), input.shape())?,
                _ => Tensor::scratch_with_spare(&device, category, input.dtype(), rows, spare)?,
            };
            if let Some(fp8) = device.kernels().fp8().filter(|_| codes)
                && let Some(codes) = fp8.rms_norm_rounded(&input, value.as_ref(), kind, epsilon, &mut out)?
            {
                return Ok((out, Some(codes)));
            }
            let value = value.as_ref();
            let kernels = device.kernels();
            match &riding {
                Some(riding) if kernels.rms_norm_riding(&input, value, (kind, epsilon), riding, &mut out) => {
                }
                _ => {
                    kernels.rms_norm(&input, value, kind, epsilon, &mut out);
                    riding.iter().try_for_each(|riding| riding.put_beside(&out))?;
                }
            }
            Ok((out, None))
        }
    };
    let (out, codes) = compute(spare.result, spare.codes)?;
    let input_slot = x.slot();
    let wanted = input_slot.is_some() || parameter.is_some();
    let gap = spare.gradient;
    let var = tape.push(out, wanted, |slot| {
        Box::new(move |gradients| {
            let Some((mut d_out, share)) = gradients.take_with_share(slot) else { return Ok(()) };
            let (kernels, value) = (device.kernels(), value.as_ref());
            if let Some(slot) = input_slot {
                gradients.add_onto(slot, (&input, input.shape(), gap), |d_x, held| {
                    if let Some(share) = &share {
                        let (norm, with_share) = ((kind, epsilon), (&d_out, share));
                        let d_x = (&mut *d_x, held);
                        if kernels.rms_norm_backward_riding(&input, value, norm, with_share, d_x) {
                            return Ok(());
                        }
                        share.add_to(&mut d_out)?;
                    }
                    let d_x = Some((d_x, held));
                    kernels.rms_norm_backward(&input, value, kind, epsilon, &d_out, d_x, None);
                    Ok(())
                })?;
            }
            let Some(parameter) = parameter else { return Ok(()) };
            parameter.accumulate(|d_weight| {
                debug_assert_eq!(d_weight.dtype(), DType::F32);
                let d_weight = Some(d_weight);
                kernels.rms_norm_backward(&input, value, kind, epsilon, &d_out, None, d_weight);
                Ok(())
            })
        })
    });
    // With the same columns to spare, so that products read it alike whether it was kept or not.
    let var = tape.with_recipe(var, move || compute(spare.result, false).map(|computed| computed.0));
    Ok(var.with_codes(codes).with_riding(riding))
}
