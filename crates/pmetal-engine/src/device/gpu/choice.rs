//! The choice of the keys that queries look at.

use super::Gpu;
use super::launch::Kernel;
use crate::device::AttentionMask;
use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Tensor};

/// Scores that are held at a time, but for those of one query.
const MOST_SCORES: usize = 1 << 24;

/// Queries of a launch at most, by what grids allow.
const MOST_ROWS: usize = 1 << 15;

impl Gpu {
    pub(super) fn choose_best_keys(
        &self,
        mask: &AttentionMask,
        [q, k, weights]: [&Tensor; 3],
        count: usize,
        bits: &mut Tensor,
    ) -> Result<()> {
        let ranges = mask.ranges.as_ref().expect("invariant: a mask is made on the device of its tensors");
        let [key_begin, key_end, ..] = ranges;
        let ([tokens, keys], &[_, heads, width]) = (mask.tokens, q.shape()) else {
            unreachable!("invariant: shapes were checked")
        };
        let rows = (MOST_SCORES / keys).clamp(1, tokens.min(MOST_ROWS));
        let scores = Tensor::scratch(q.device(), Category::Workspace, DType::F32, &[rows, keys])?;
        for first in (0..tokens).step_by(rows) {
            let rows = rows.min(tokens - first);
            // Of no more keys than that all are chosen, whatever their scores.
            if keys > count {
                Kernel::new("choice", "score_keys")
                    .element(q.dtype())
                    .number("WIDTH", width)
                    .arguments(&[q.into(), k.into(), weights.into()])
                    .arguments(&[key_begin.into(), key_end.into(), (&scores).into()])
                    .sizes(&[first, keys, heads, q.pitch(), k.pitch(), weights.pitch()])
                    .launch(self.runtime.as_ref(), [keys.div_ceil(32), rows, 1], 256);
            }
            Kernel::new("choice", "choose_keys")
                .element(q.dtype())
                .number("WIDTH", width)
                .arguments(&[(&scores).into(), key_begin.into(), key_end.into(), (&mut *bits).into()])
                .sizes(&[first, keys, bits.columns(), count.min(keys)])
                .launch(self.runtime.as_ref(), [rows, 1, 1], 256);
        }
        Ok(())
    }
}
