//! Columns of a matrix as values of their own.

use crate::device::{GradientCodes, HeadCopy};
use crate::error::{Error, Result, expect_shape};
use crate::memory::Category;
use crate::tape::Gradients;
use crate::{DType, Device, Tape, Tensor, Var};

/// The columns of x \[T, sum of widths\] as matrices \[T, width\], in order: the results of one layer that stand for several.
///
/// On devices they share x's memory where x is its only handle, and the gradient of x takes the memory of theirs where
/// these lie side by side: nothing is copied then. On a CPU they are copies. Parts that nobody used have no gradient, and
/// count as zero. Bytes: none, or x twice.
///
/// # Errors
/// [`crate::Error::Shape`] when the widths do not add up to x's columns; out of memory.
pub fn split_columns(tape: &Tape, x: Var, widths: &[usize]) -> Result<Vec<Var>> {
    let sum = widths.iter().try_fold(0_usize, |sum, &width| sum.checked_add(width));
    let [tokens, columns] = [x.tensor().rows(), sum.unwrap_or(usize::MAX)];
    expect_shape("split_columns", "x", x.tensor().shape(), &[tokens, columns])?;
    if widths.len() == 1 {
        return Ok(vec![x]);
    }
    let (input_slot, whole) = (x.slot(), x.into_tensor());
    let (device, dtype) = (whole.device().clone(), whole.dtype());
    let parts = if whole.is_host() {
        copies(&whole, widths)?
    } else {
        let dense = whole.contiguous()?;
        drop(whole);
        dense.split_columns(widths)?
    };
    let Some(input_slot) = input_slot else { return Ok(parts.into_iter().map(Var::constant).collect()) };
    let node = Node { device, dtype, tokens, widths: widths.to_vec(), input_slot };
    Ok(tape.push_all(parts, true, |slots| Box::new(move |gradients| node.backward(gradients, &slots))))
}

fn copies(whole: &Tensor, widths: &[usize]) -> Result<Vec<Tensor>> {
    let [tokens, columns] = [whole.rows(), whole.columns()];
    let heads = whole.contiguous()?.reshape(&[tokens, 1, columns])?;
    let mut first = 0;
    let copy = |&width: &usize| {
        let shape = [tokens, 1, width];
        let mut part = Tensor::scratch(whole.device(), Category::Activations, whole.dtype(), &shape)?;
        let columns = HeadCopy::between(&heads, &part, [first, 0], width);
        whole.device().kernels().copy_heads(&heads, &mut part, &columns);
        first += width;
        part.reshape(&[tokens, width])
    };
    widths.iter().map(copy).collect()
}

/// A matrix \[T, sum of widths\] of the columns of some matrices: the one that they were divided from, if that is so and nobody
/// else holds a part of it, or a copy.
///
/// # Errors
/// [`Error::Shape`] when their rows differ; [`Error::Other`] for no parts; out of memory for a copy.
pub(crate) fn join_columns(parts: Vec<Tensor>) -> Result<Tensor> {
    if let Some(whole) = Tensor::rejoined_columns(&parts) {
        return Ok(whole);
    }
    let Some(first) = parts.first() else {
        return Err(Error::Other("join_columns: there are no parts".to_owned()));
    };
    let rows = first.rows();
    for part in &parts {
        expect_shape("join_columns", "input", part.shape(), &[rows, part.columns()])?;
    }
    let total = parts.iter().map(Tensor::columns).sum();
    let mut joined =
        Tensor::scratch(first.device(), Category::Activations, first.dtype(), &[rows, 1, total])?;
    let mut column = 0;
    for part in &parts {
        let (width, source) = (part.columns(), if part.is_host() { &part.contiguous()? } else { part });
        let copy = HeadCopy { heads: 1, width, from: [0, 0], to: [column, 0] };
        first.device().kernels().copy_heads(source, &mut joined, &copy);
        column += width;
    }
    joined.reshape(&[rows, total])
}

struct Node {
    device: Device,
    dtype: DType,
    tokens: usize,
    widths: Vec<usize>,
    input_slot: usize,
}

impl Node {
    fn backward(&self, gradients: &mut Gradients, slots: &[usize]) -> Result<()> {
        let arrived = slots.iter().map(|&slot| gradients.take_with_codes(slot).unzip());
        let (arrived, codes): (Vec<Option<Tensor>>, Vec<_>) = arrived.unzip();
        if arrived.iter().all(Option::is_none) {
            return Ok(());
        }
        let codes: Vec<Option<GradientCodes>> = codes.into_iter().map(Option::flatten).collect();
        let parts = arrived.into_iter().zip(&self.widths).map(|(gradient, &width)| {
            let shape = [self.tokens, width];
            match gradient {
                Some(gradient) => gradient.reshape(&shape),
                None => Tensor::zeros(&self.device, Category::Activations, self.dtype, &shape),
            }
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let whole = join_columns(parts)?;
        gradients.add_with_codes(self.input_slot, whole, GradientCodes::of_all(&codes, &self.widths))
    }
}
