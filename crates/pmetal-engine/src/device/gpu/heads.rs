//! Columns of heads, divided and put together.

use super::Gpu;
use super::launch::Kernel;
use super::launch::is_aligned;
use super::runtime::Argument;
use crate::Tensor;
use crate::device::{HeadCopy, HeadRows};
use crate::error::Result;

impl Gpu {
    pub(super) fn copy_head_columns(&self, source: &Tensor, target: &mut Tensor, copy: &HeadCopy) {
        let HeadCopy { heads, width, from, to } = *copy;
        let tokens = target.shape()[0];
        let bytes = |first: usize| (first * source.dtype().bytes()) as u64;
        let addresses = [source.address() + bytes(from[0]), target.address_mut() + bytes(to[0])];
        let distances = [width, source.pitch(), from[1], target.pitch(), to[1]];
        let aligned = distances.iter().all(|distance| distance.is_multiple_of(8))
            && addresses.iter().all(|address| address.is_multiple_of(16));
        Kernel::new("heads", "copy_heads")
            .element(source.dtype())
            .aligned(aligned)
            .arguments(&addresses.map(Argument::Address))
            .sizes(&[heads])
            .sizes(&distances)
            .launch(self.runtime.as_ref(), [tokens, (heads * width).div_ceil(2048), 1], 256);
    }

    pub(super) fn sum_head_columns(&self, source: &Tensor, first: usize, target: &mut Tensor) {
        let ([tokens, heads, stride], width) = (sizes(source), target.columns());
        let address = source.address() + (first * source.dtype().bytes()) as u64;
        Kernel::new("heads", "sum_heads")
            .element(source.dtype())
            .aligned(false)
            .arguments(&[Argument::Address(address), (&mut *target).into()])
            .sizes(&[heads, width, source.pitch(), stride, target.pitch()])
            .launch(self.runtime.as_ref(), [tokens, width.div_ceil(256), 1], 256);
    }

    pub(super) fn multiply_heads(
        &self,
        x: &Tensor,
        rows: &HeadRows<'_>,
        out: &mut Tensor,
        adds: bool,
    ) -> Result<()> {
        let matrix = self.in_type(rows.matrix, x.dtype())?;
        let ([tokens, heads, _], inner, [first, features]) = (sizes(x), matrix.columns(), rows.part);
        let (name, groups) = match rows.by_columns {
            true => ("head_columns", inner.div_ceil(512)),
            false => ("head_rows", features.div_ceil(8)),
        };
        // Heads of x are read one element at a time where its columns are not the matrix's.
        let wide: &[&Tensor] = if rows.by_columns { &[&matrix] } else { &[&matrix, x] };
        Kernel::new("heads", name)
            .element(x.dtype())
            .aligned(is_aligned(inner, wide))
            .arguments(&[x.into(), (&matrix).into(), out.into()])
            .sizes(&[tokens, features, inner, rows.rows, first, matrix.pitch(), adds.into()])
            .launch(self.runtime.as_ref(), [groups, heads, tokens.div_ceil(4)], 256);
        Ok(())
    }
}

/// Tokens, heads and the width of a head.
fn sizes(tensor: &Tensor) -> [usize; 3] {
    let shape = tensor.shape();
    [shape[0], shape[1], shape[2]]
}
