//! Heads divided into parts and put together from parts.

use crate::device::HeadCopy;
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{Tape, Tensor, Var};

/// Every head of x \[T, H, sum of widths\] divided into parts \[T, H, width\], in order, copied.
///
/// Parts that nobody used count as zero in the gradient of x. Bytes: x twice, forward and backward.
///
/// # Errors
/// [`Error::Shape`] when x is not of that shape; out of memory.
pub fn split_heads(tape: &Tape, x: &Var, widths: &[usize]) -> Result<Vec<Var>> {
    let [tokens, heads] = tokens_and_heads(x.tensor());
    let alone: Vec<&[usize]> = widths.chunks(1).collect();
    let parts = ungroup_heads(tape, x, &alone)?;
    parts.into_iter().zip(widths).map(|(part, &width)| part.reshape(&[tokens, heads, width])).collect()
}

/// Every head of x \[T, H, sum of all widths\] divided into parts, and those of one array \[T, H * sum of its widths\] put side by
/// side: the first part of all heads, then the second of all. Copied.
///
/// Arrays that nobody used count as zero in the gradient of x. Bytes: x twice, forward and backward.
///
/// # Errors
/// [`Error::Shape`] when x is not of that shape; out of memory.
pub fn ungroup_heads(tape: &Tape, x: &Var, arrays: &[&[usize]]) -> Result<Vec<Var>> {
    let input = x.tensor();
    let [tokens, heads] = tokens_and_heads(input);
    let shape = [tokens, heads, total("ungroup_heads", &arrays.concat())?];
    expect_shape("ungroup_heads", "x", input.shape(), &shape)?;
    let (device, dtype) = (input.device().clone(), input.dtype());
    let mut copies = Vec::with_capacity(arrays.len());
    let mut first = 0;
    for widths in arrays {
        let mut column = 0;
        let to_parts = widths.iter().map(|&width| {
            let copy = HeadCopy { heads, width, from: [first, shape[2]], to: [column, width] };
            first += width;
            column += heads * width;
            copy
        });
        let own: Vec<HeadCopy> = to_parts.collect();
        copies.push((column, own));
    }
    let array = |(columns, copies): &(usize, Vec<HeadCopy>)| {
        let mut array = Tensor::scratch(&device, Category::Activations, dtype, &[tokens, *columns])?;
        copies.iter().for_each(|copy| device.kernels().copy_heads(input, &mut array, copy));
        Ok(array)
    };
    let parts = copies.iter().map(array).collect::<Result<Vec<_>>>()?;
    let Some(input_slot) = x.slot() else { return Ok(parts.into_iter().map(Var::constant).collect()) };
    Ok(tape.push_all(parts, true, |slots| {
        Box::new(move |gradients| {
            let arrived: Vec<Option<Tensor>> = slots.iter().map(|&slot| gradients.take(slot)).collect();
            if arrived.iter().all(Option::is_none) {
                return Ok(());
            }
            let is_whole = arrived.iter().all(Option::is_some);
            let create = if is_whole { Tensor::scratch } else { Tensor::zeros };
            let mut d_x = create(&device, Category::Activations, dtype, &shape)?;
            for (gradient, (columns, copies)) in arrived.into_iter().zip(copies) {
                let Some(gradient) = gradient else { continue };
                let gradient = gradient.reshape(&[tokens, columns])?;
                for copy in copies {
                    let back = HeadCopy { from: copy.to, to: copy.from, ..copy };
                    device.kernels().copy_heads(&gradient, &mut d_x, &back);
                }
            }
            gradients.add(input_slot, d_x)
        })
    }))
}

/// Heads \[T, H, sum of E\] from parts \[T, H, E\], in order; a part \[T, 1, E\] is repeated for all heads, and its gradient is
/// the sum over them, in their order and in f32.
///
/// Bytes: the result twice, forward and backward.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] when a part is of another kind than the first; [`Error::Other`] for no parts; out of
/// memory.
pub fn join_heads(tape: &Tape, parts: &[&Var]) -> Result<Var> {
    let Some(like) = parts.first().map(|part| part.tensor()) else {
        return Err(Error::Other("join_heads: there are no parts".to_owned()));
    };
    let [tokens, _] = tokens_and_heads(like);
    let heads = parts.iter().map(|part| tokens_and_heads(part.tensor())[1]).max().unwrap_or(1);
    let mut widths = Vec::with_capacity(parts.len());
    for part in parts {
        let tensor = part.tensor();
        let own = if tokens_and_heads(tensor)[1] == 1 { 1 } else { heads };
        expect_shape("join_heads", "part", tensor.shape(), &[tokens, own, tensor.columns()])?;
        expect_dtype("join_heads", "part", tensor.dtype(), like.dtype())?;
        widths.push(tensor.columns());
    }
    let (device, dtype) = (like.device().clone(), like.dtype());
    let shape = [tokens, heads, total("join_heads", &widths)?];
    let mut out = Tensor::scratch(&device, Category::Activations, dtype, &shape)?;
    let mut first = 0;
    for part in parts {
        let width = part.tensor().columns();
        let copy = HeadCopy::between(part.tensor(), &out, [0, first], width);
        device.kernels().copy_heads(part.tensor(), &mut out, &copy);
        first += width;
    }
    let receivers: Vec<_> =
        parts.iter().map(|part| (part.slot(), tokens_and_heads(part.tensor())[1])).collect();
    let wanted = receivers.iter().any(|(slot, _)| slot.is_some());
    Ok(tape.push(out, wanted, |slot| {
        Box::new(move |gradients| {
            let Some(d_out) = gradients.take(slot) else { return Ok(()) };
            let d_out = d_out.reshape(&shape)?;
            let mut first = 0;
            for ((slot, own), width) in receivers.into_iter().zip(widths) {
                if let Some(slot) = slot {
                    let shape = [tokens, own, width];
                    let mut gradient = Tensor::scratch(&device, Category::Activations, dtype, &shape)?;
                    if own == heads {
                        let copy = HeadCopy::between(&d_out, &gradient, [first, 0], width);
                        device.kernels().copy_heads(&d_out, &mut gradient, &copy);
                    } else {
                        device.kernels().sum_heads(&d_out, first, &mut gradient);
                    }
                    gradients.add(slot, gradient)?;
                }
                first += width;
            }
            Ok(())
        })
    }))
}

fn tokens_and_heads(tensor: &Tensor) -> [usize; 2] {
    [0, 1].map(|index| tensor.shape().get(index).copied().unwrap_or(1))
}

fn total(operation: &'static str, widths: &[usize]) -> Result<usize> {
    let sum = widths.iter().try_fold(0_usize, |sum, &width| sum.checked_add(width));
    sum.ok_or_else(|| Error::Other(format!("{operation}: the widths {widths:?} have no sum")))
}
