//! Heads divided into parts and put together from parts.

use crate::device::HeadCopy;
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::tape::Gradients;
use crate::{DType, Device, Tape, Tensor, Var};

/// Every head of x \[T, H, sum of widths\] divided into parts \[T, H, width\], in order, copied.
///
/// Parts that nobody used count as zero in the gradient of x. Bytes: x twice, forward and backward.
///
/// # Errors
/// [`Error::Shape`] when x is not of that shape; out of memory.
pub fn split_heads(tape: &Tape, x: &Var, widths: &[usize]) -> Result<Vec<Var>> {
    let [tokens, heads] = tokens_and_heads(x.tensor());
    let alone: Vec<&[usize]> = widths.chunks(1).collect();
    let parts = ungroup_heads(tape, &[(x, &alone)])?;
    parts.into_iter().zip(widths).map(|(part, &width)| part.reshape(&[tokens, heads, width])).collect()
}

/// For each x \[T, H, sum of all widths\] every head divided into parts, and those of one array \[T, H * sum of its widths\]
/// put side by side: the first part of all heads, then the second of all. Copied.
///
/// Arrays that nobody used count as zero in the gradient of x. Where all x are columns of one matrix, their gradients are as
/// well. Bytes: each x twice, forward and backward.
///
/// # Errors
/// [`Error::Shape`] when an x is not of that shape; out of memory.
pub fn ungroup_heads(tape: &Tape, inputs: &[(&Var, &[&[usize]])]) -> Result<Vec<Var>> {
    let all: Vec<&Tensor> = inputs.iter().map(|(x, _)| x.tensor()).collect();
    let side_by_side = Tensor::are_side_by_side(&all);
    let inputs = inputs.iter().map(|(x, arrays)| Ungrouped::new(x, arrays)).collect::<Result<Vec<_>>>()?;
    let mut parts = Vec::new();
    for (input, x) in inputs.iter().zip(all) {
        input.divide(x, &mut parts)?;
    }
    if inputs.iter().all(|input| input.slot.is_none()) {
        return Ok(parts.into_iter().map(Var::constant).collect());
    }
    Ok(tape.push_all(parts, true, |slots| {
        Box::new(move |gradients| {
            let mut slots = slots.into_iter();
            let arrived: Vec<Vec<Option<Tensor>>> = inputs
                .iter()
                .map(|input| {
                    slots.by_ref().take(input.arrays.len()).map(|slot| gradients.take(slot)).collect()
                })
                .collect();
            let mut targets = Vec::new();
            if side_by_side && arrived.iter().flatten().all(Option::is_some) {
                let Ungrouped { device, dtype, shape, .. } = &inputs[0];
                let widths: Vec<usize> = inputs.iter().map(|input| input.shape[1] * input.shape[2]).collect();
                targets = Tensor::side_by_side((device, Category::Activations, *dtype), shape[0], &widths)?;
            }
            let mut targets = targets.into_iter();
            for (input, parts) in inputs.iter().zip(&arrived) {
                input.put_together(parts, targets.next(), gradients)?;
            }
            Ok(())
        })
    }))
}

/// One input of [`ungroup_heads`].
struct Ungrouped {
    device: Device,
    dtype: DType,
    /// Tokens, heads, and columns of a head.
    shape: [usize; 3],
    slot: Option<usize>,
    /// Columns of each array, and where its parts come from.
    arrays: Vec<(usize, Vec<HeadCopy>)>,
}

impl Ungrouped {
    fn new(x: &Var, arrays: &[&[usize]]) -> Result<Self> {
        let input = x.tensor();
        let [tokens, heads] = tokens_and_heads(input);
        let shape = [tokens, heads, total("ungroup_heads", &arrays.concat())?];
        expect_shape("ungroup_heads", "x", input.shape(), &shape)?;
        let (device, dtype) = (input.device().clone(), input.dtype());
        let mut first = 0;
        let array = |widths: &&[usize]| {
            let mut column = 0;
            let to_parts = widths.iter().map(|&width| {
                let copy = HeadCopy { heads, width, from: [first, shape[2]], to: [column, width] };
                first += width;
                column += heads * width;
                copy
            });
            let own: Vec<HeadCopy> = to_parts.collect();
            (column, own)
        };
        let arrays = arrays.iter().map(array).collect();
        Ok(Self { device, dtype, shape, slot: x.slot(), arrays })
    }

    fn divide(&self, x: &Tensor, parts: &mut Vec<Tensor>) -> Result<()> {
        for (columns, copies) in &self.arrays {
            let shape = [self.shape[0], *columns];
            let mut array = Tensor::scratch(&self.device, Category::Activations, self.dtype, &shape)?;
            copies.iter().for_each(|copy| self.device.kernels().copy_heads(x, &mut array, copy));
            parts.push(array);
        }
        Ok(())
    }

    /// Hands the gradient of x on, in the memory of `target` if there is one.
    fn put_together(
        &self,
        arrived: &[Option<Tensor>],
        target: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Some(slot) = self.slot.filter(|_| arrived.iter().any(Option::is_some)) else { return Ok(()) };
        let scratch = || Tensor::scratch(&self.device, Category::Activations, self.dtype, &self.shape);
        let mut d_x = target.map_or_else(scratch, |target| target.reshape(&self.shape))?;
        if arrived.iter().any(Option::is_none) {
            d_x.fill_zero();
        }
        for (gradient, (columns, copies)) in arrived.iter().zip(&self.arrays) {
            let Some(gradient) = gradient else { continue };
            let gradient = gradient.clone().reshape(&[self.shape[0], *columns])?;
            for copy in copies {
                let back = HeadCopy { from: copy.to, to: copy.from, ..*copy };
                self.device.kernels().copy_heads(&gradient, &mut d_x, &back);
            }
        }
        gradients.add(slot, d_x)
    }
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
