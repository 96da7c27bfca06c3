//! Heads that are too wide for the other kernels: scores and results by products of matrices.

use super::{Gpu, Inputs};
use crate::device::gpu::launch::Kernel;
use crate::device::{Arithmetic, Finish, Operand};
use crate::error::{Error, Result};
use crate::memory::Category;
use crate::{DType, Tensor};

/// The widest head of the portable kernels.
const MOST_WIDTH: usize = 256;

/// Scores that are held at a time, but for those of one query.
const MOST_SCORES: usize = 1 << 24;

/// Queries of a launch at most, by what grids allow.
const MOST_QUERIES: usize = 1 << 15;

impl Inputs<'_> {
    pub(super) fn is_wide(&self) -> bool {
        let p = self.parameters;
        p.key_width.max(p.value_width) > MOST_WIDTH
    }

    /// What is said of heads that are too wide where there is nothing for them.
    pub(super) fn too_wide(&self, device: &'static str) -> Error {
        let p = self.parameters;
        let (key, value, heads) = (p.key_width, p.value_width, p.key_value_heads);
        let reason = format!(
            "heads of {key} and {value} elements need kernels for {MOST_WIDTH}, or, without gradients, one key head in place of {heads}"
        );
        Error::Unsupported { operation: "attention", device, reason }
    }
}

impl Gpu {
    /// Attention of all query heads to one key head.
    pub(super) fn attend_wide(
        &self,
        inputs: &Inputs<'_>,
        out: &mut Tensor,
        log_sum_exp: &mut Tensor,
    ) -> Result<()> {
        let (p, [tokens, keys]) = (inputs.parameters, inputs.tokens());
        if p.key_value_heads != 1 {
            return Err(inputs.too_wide(self.runtime.name()));
        }
        let (heads, device, dtype) = (p.query_heads, out.device().clone(), inputs.q.dtype());
        let most = (MOST_SCORES / (heads * keys).max(1)).clamp(1, tokens.clamp(1, MOST_QUERIES));
        let scratch = |dtype| Tensor::scratch(&device, Category::Workspace, dtype, &[most * heads, keys]);
        let (products, mut weights) = (scratch(DType::F32)?, scratch(dtype)?);
        let (mut products, arithmetic) = (products, Arithmetic::of(dtype));
        let (k, v) = (inputs.k.reshape(&[keys, p.key_width])?, inputs.v.reshape(&[keys, p.value_width])?);
        let [key_begin, key_end, ..] = inputs.ranges;
        for first in (0..tokens).step_by(most) {
            let (count, rows) = (most.min(tokens - first), most.min(tokens - first) * heads);
            let q = inputs.q.slice_rows(first, count)?.contiguous()?.reshape(&[rows, p.key_width])?;
            let scores = (Operand::plain(&q), Operand::transposed(&k));
            products.with_rows_mut(0, rows, |products| {
                self.multiply(&[scores], products, &Finish::STORE, arithmetic)
            })?;
            Kernel::new("attention", "attention_weights")
                .element(dtype)
                .arguments(&[(&products).into(), (&mut weights).into(), (&mut *log_sum_exp).into()])
                .arguments(&[key_begin.into(), key_end.into(), inputs.sinks.into(), inputs.chosen.into()])
                .sizes(&[first, keys])
                .arguments(&inputs.scalars())
                .sizes(&[inputs.chosen_words()])
                .launch(self.runtime.as_ref(), [count, heads, 1], 256);
            let weights = weights.slice_rows(0, rows)?;
            let shape = [rows, p.value_width];
            let mut result = Tensor::scratch(&device, Category::Workspace, dtype, &shape)?;
            let means = (Operand::plain(&weights), Operand::plain(&v));
            self.multiply(&[means], &mut result, &Finish::STORE, arithmetic)?;
            let result = result.reshape(&[count, heads, p.value_width])?;
            out.with_rows_mut(first, count, |out| out.write_rows(0, &result))?;
        }
        Ok(())
    }
}
