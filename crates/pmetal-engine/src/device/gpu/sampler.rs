//! Choosing tokens.

use super::Gpu;
use super::launch::Kernel;
use super::runtime::Argument;
use crate::error::Result;
use crate::memory::Category;
use crate::ops::{Cursor, SampleConstants};
use crate::{DType, Tensor};

/// Logits that a group of the first kernel reads.
const LOGITS: usize = 2048;

impl Gpu {
    pub(super) fn choose(&self, logits: &Tensor, constants: &SampleConstants, cursor: &Cursor) -> Result<()> {
        let vocabulary = logits.columns();
        let groups = vocabulary.div_ceil(LOGITS);
        let scratch = |dtype, count| Tensor::scratch(logits.device(), Category::Workspace, dtype, &[count]);
        let scores = scratch(DType::F32, vocabulary.next_multiple_of(8))?;
        let (best, tokens) = (scratch(DType::F32, groups)?, scratch(DType::U32, groups)?);
        Kernel::new("sampler", "sample_scores")
            .arguments(&[logits.into(), cursor.counts.as_ref().into(), (&scores).into()])
            .arguments(&[(&best).into(), (&tokens).into()])
            .sizes(&[vocabulary])
            .arguments(&constants.penalties.map(Argument::F32))
            .launch(self.runtime.as_ref(), [groups, 1, 1], 256);
        let candidates = [Argument::from(&best), Argument::from(&tokens)];
        let place = [
            Argument::from(&cursor.token),
            (&cursor.position).into(),
            (&cursor.rows).into(),
            (&cursor.ranges).into(),
            (&cursor.limits).into(),
            (&cursor.firsts).into(),
            (&cursor.log).into(),
            cursor.counts.as_ref().into(),
            (&cursor.drawn).into(),
        ];
        let sizes = [groups, cursor.firsts.elements(), cursor.log.elements()];
        if constants.is_greedy {
            Kernel::new("sampler", "sample_best")
                .arguments(&candidates)
                .arguments(&place)
                .sizes(&sizes)
                .launch(self.runtime.as_ref(), [1, 1, 1], 256);
            return Ok(());
        }
        let key = constants.key;
        Kernel::new("sampler", "sample_draw")
            .arguments(&[(&scores).into()])
            .arguments(&candidates)
            .arguments(&place)
            .sizes(&sizes)
            .sizes(&[vocabulary])
            .arguments(&[Argument::F32(constants.factor), Argument::U32(constants.top_k)])
            .arguments(&[Argument::U64(constants.top_p), Argument::U64(constants.least_weight)])
            .arguments(&[Argument::U32(key.seed as u32), Argument::U32((key.seed >> 32) as u32)])
            .arguments(&[Argument::U32(key.stream)])
            .launch(self.runtime.as_ref(), [1, 1, 1], 1024);
        Ok(())
    }
}
