//! Scaled dot-product attention.

use crate::device::{AttentionMask, AttentionParameters};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{DType, Tape, Tensor, Var, Weight};

/// softmax(scale q k^T + mask) v for every segment on its own: q \[Tq, H, E\], k \[Tk, K, E\], v \[Tk, K, Ev\],
/// result \[Tq, H, Ev\]; `sinks` \[H\] are extra logits that take part in the denominator alone.
///
/// Never holds a Tq x Tk buffer. Keeps q, k, v, the result and one f32 per query and head
/// (Dao, arXiv 2307.08691). Flops: 2 Tq Tk H (E + Ev) forward over the visible part, 2.5 times that backward.
///
/// Tokens of no segment get zeros and give none. A segment's queries are the last of its keys.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] when an input disagrees with the parameters or with `q`; [`Error::Other`]
/// for a mask of other rows; [`Error::Unsupported`] for heads that cannot be grouped and for an
/// empty window; out of memory.
pub fn attention(
    tape: &Tape,
    parameters: &AttentionParameters,
    mask: &AttentionMask,
    inputs: [&Var; 3],
    sinks: Option<&Weight>,
) -> Result<Var> {
    attention_with_spare(tape, parameters, mask, inputs, sinks, 0)
}

/// [`attention`] with room for more columns in the rows of the result; see [`Tensor::scratch_with_spare`].
///
/// # Errors
/// As [`attention`].
pub fn attention_with_spare(
    tape: &Tape,
    parameters: &AttentionParameters,
    mask: &AttentionMask,
    inputs: [&Var; 3],
    sinks: Option<&Weight>,
    spare: usize,
) -> Result<Var> {
    let [q, k, v] = inputs.map(|var| var.tensor().clone());
    let [tokens, keys] = [&q, &k].map(|tensor| tensor.shape().first().copied().unwrap_or(1));
    let heads = [parameters.query_heads, parameters.key_value_heads, parameters.key_value_heads];
    let widths = [parameters.key_width, parameters.key_width, parameters.value_width];
    for (index, (name, tensor)) in [("q", &q), ("k", &k), ("v", &v)].into_iter().enumerate() {
        let rows = if index == 0 { tokens } else { keys };
        expect_shape("attention", name, tensor.shape(), &[rows, heads[index], widths[index]])?;
        expect_dtype("attention", name, tensor.dtype(), q.dtype())?;
    }
    check_parameters(parameters, q.device().name())?;
    let rows = |[queries, keys]: [usize; 2]| format!("{queries} queries and {keys} keys");
    if mask.tokens != [tokens, keys] {
        let (mask, given) = (rows(mask.tokens), rows([tokens, keys]));
        return Err(Error::Other(format!("attention: the mask is for {mask}, there are {given}")));
    }
    if let Some(sinks) = sinks {
        expect_shape("attention", "sinks", &sinks.shape(), &[parameters.query_heads])?;
    }
    let device = q.device().clone();
    let out_shape = [tokens, parameters.query_heads, parameters.value_width];
    let row = parameters.query_heads * parameters.value_width;
    let mut out =
        Tensor::scratch_with_spare(&device, Category::Activations, q.dtype(), [tokens, row], spare)?
            .reshape(&out_shape)?;
    let mut log_sum_exp = Tensor::scratch(&device, Category::Activations, DType::F32, &out_shape[..2])?;
    let sink_values = sinks.map(Weight::value);
    let kernels = device.kernels();
    kernels.attention(parameters, mask, &q, &k, &v, sink_values.as_ref(), &mut out, &mut log_sum_exp);

    let slots = inputs.map(Var::slot);
    let sink_parameter = sinks.and_then(Weight::parameter).cloned();
    let wanted = slots.iter().any(Option::is_some) || sink_parameter.is_some();
    let (parameters, mask, kept_out) = (*parameters, mask.clone(), out.clone());
    Ok(tape.push(out, wanted, |slot| {
        Box::new(move |gradients| {
            let Some(d_out) = gradients.take(slot) else { return Ok(()) };
            let [mut d_q, mut d_k, mut d_v] = Tensor::scratch_alike(Category::Activations, [&q, &k, &v])?;
            let d_out = d_out.reshape(kept_out.shape())?;
            let mut run = |d_sinks: Option<&mut Tensor>| {
                device.kernels().attention_backward(
                    &parameters,
                    &mask,
                    [&q, &k, &v],
                    sink_values.as_ref(),
                    &kept_out,
                    &log_sum_exp,
                    &d_out,
                    [&mut d_q, &mut d_k, &mut d_v],
                    d_sinks,
                );
                Ok(())
            };
            match &sink_parameter {
                Some(parameter) => parameter.accumulate(|d_sinks| run(Some(d_sinks)))?,
                None => run(None)?,
            }
            for (slot, gradient) in slots.into_iter().zip([d_q, d_k, d_v]) {
                if let Some(slot) = slot {
                    gradients.add(slot, gradient)?;
                }
            }
            Ok(())
        })
    }))
}

fn check_parameters(parameters: &AttentionParameters, device: &'static str) -> Result<()> {
    let refuse = |reason| Err(Error::Unsupported { operation: "attention", device, reason });
    let (queries, keys) = (parameters.query_heads, parameters.key_value_heads);
    if keys == 0 || queries % keys != 0 {
        return refuse(format!("{queries} query heads are not a multiple of {keys} key/value heads"));
    }
    Ok(())
}
