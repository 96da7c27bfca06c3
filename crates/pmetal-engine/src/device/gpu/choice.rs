//! The choice of the keys that queries look at.

use super::Gpu;
use super::launch::{Kernel, is_aligned};
use crate::device::AttentionMask;
use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Tensor};

#[cfg(test)]
mod tests;

/// Scores that are held at a time, but for those of one query.
const MOST_SCORES: usize = 1 << 24;

/// Queries of a launch at most, by what grids allow.
const MOST_ROWS: usize = 1 << 15;

/// The widest heads that `kernels/choice_tiles.cpp` has registers for.
const MOST_TILED_WIDTH: usize = 128;

/// Queries that fill so little of a tile that their heads wait for each other longer than plain loops take.
const FEW_QUERIES: usize = 8;

impl Gpu {
    pub(super) fn choose_best_keys(
        &self,
        mask: &AttentionMask,
        inputs: [&Tensor; 3],
        count: usize,
        bits: &mut Tensor,
    ) -> Result<()> {
        let ([tokens, keys], q) = (mask.tokens, inputs[0]);
        let [key_begin, key_end] = ranges(mask);
        let rows = (MOST_SCORES / keys).clamp(1, tokens.min(MOST_ROWS));
        let scores = Tensor::scratch(q.device(), Category::Workspace, DType::F32, &[rows, keys])?;
        let by_units = tokens > FEW_QUERIES && self.scores_by_units(inputs);
        for first in (0..tokens).step_by(rows) {
            let rows = rows.min(tokens - first);
            // Of no more keys than that all are chosen, whatever their scores.
            if keys > count {
                self.score_keys(mask, inputs, [first, rows, count], by_units, &scores);
            }
            Kernel::new("choice", "choose_keys")
                .element(q.dtype())
                .number("WIDTH", q.columns())
                .arguments(&[(&scores).into(), key_begin.into(), key_end.into(), (&mut *bits).into()])
                .sizes(&[first, keys, bits.columns(), count.min(keys)])
                .launch(self.runtime.as_ref(), [rows, 1, 1], 256);
        }
        Ok(())
    }

    fn scores_by_units(&self, [q, k, _]: [&Tensor; 3]) -> bool {
        let width = q.columns();
        self.facts.has_paired_products
            && matches!(q.dtype(), DType::Bf16 | DType::F16)
            && width.is_multiple_of(32)
            && width <= MOST_TILED_WIDTH
            && is_aligned(width, &[q, k])
    }

    /// Overwrites rows of f32 \[queries, Tk\]: scores of `rows` queries from `first` on, of those that see more than `count`
    /// keys, with the keys that they see; other elements may stay as they are.
    fn score_keys(
        &self,
        mask: &AttentionMask,
        [q, k, weights]: [&Tensor; 3],
        [first, rows, count]: [usize; 3],
        by_units: bool,
        scores: &Tensor,
    ) {
        let ([key_begin, key_end], keys) = (ranges(mask), mask.tokens[1]);
        let &[_, heads, width] = q.shape() else { unreachable!("invariant: shapes were checked") };
        let kernel = if by_units {
            Kernel::new("choice_tiles", "score_tiles").paired(q.dtype())
        } else {
            Kernel::new("choice", "score_keys").element(q.dtype())
        };
        let (sizes, grid) = if by_units {
            (vec![first, rows, keys], [keys.div_ceil(256), rows.div_ceil(32), 1])
        } else {
            (vec![first, keys], [keys.div_ceil(32), rows, 1])
        };
        kernel
            .number("WIDTH", width)
            .arguments(&[q.into(), k.into(), weights.into()])
            .arguments(&[key_begin.into(), key_end.into(), scores.into()])
            .sizes(&sizes)
            .sizes(&[heads, q.pitch(), k.pitch(), weights.pitch(), count.min(keys)])
            .launch(self.runtime.as_ref(), grid, 256);
    }
}

/// First and end of the keys of each query.
fn ranges(mask: &AttentionMask) -> [&Tensor; 2] {
    let ranges = mask.ranges.as_ref().expect("invariant: a mask is made on the device of its tensors");
    let [key_begin, key_end, ..] = ranges;
    [key_begin, key_end]
}
