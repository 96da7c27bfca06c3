//! Which examples make which batch, and the token runs that the engine takes.

use std::ops::Range;

use super::Example;
use super::order::Permutation;
use super::packing::first_fit_decreasing;
use crate::error::{Error, Result};

/// The label of a position that has no target.
pub const NO_TARGET: i32 = -100;

/// Documents in one flat run of tokens; attention and positions restart at each document.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PackedBatch {
    /// The tokens \[T\].
    pub ids: Vec<u32>,
    /// For each position the id that should follow, [`NO_TARGET`] where nothing is trained \[T\]. The last position of
    /// a document has no target.
    pub labels: Vec<i32>,
    /// Where each document begins, and the length of the run at the end.
    pub document_starts: Vec<u32>,
    /// The example that each document came from.
    pub examples: Vec<usize>,
    /// How many tokens the batch has room for: windows times `max_seq_len` when packed, the number of tokens when not.
    pub slots: usize,
}

impl PackedBatch {
    /// How many positions have a target.
    pub fn trained_tokens(&self) -> usize {
        self.labels.iter().filter(|&&label| label != NO_TARGET).count()
    }

    fn push(&mut self, index: usize, example: &Example) {
        if self.document_starts.is_empty() {
            self.document_starts.push(0);
        }
        let next = example.ids.iter().zip(&example.trained).skip(1);
        self.labels.extend(next.map(|(&id, &trained)| if trained { id as i32 } else { NO_TARGET }));
        self.labels.extend((!example.ids.is_empty()).then_some(NO_TARGET));
        self.ids.extend_from_slice(&example.ids);
        self.document_starts.push(self.ids.len() as u32);
        self.examples.push(index);
    }
}

/// How examples become batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchOptions {
    /// Rows of a batch: windows when packed, examples when not.
    pub batch_size: usize,
    /// The length of a window.
    pub max_seq_len: usize,
    /// Whether several examples share a window.
    pub packing: bool,
    /// Keys the order.
    pub seed: u64,
    /// Whether the order changes from epoch to epoch; otherwise it is that of the data.
    pub shuffle: bool,
}

/// The batches of a run; which examples batch k holds is a function of (lengths, options, k) alone.
#[derive(Debug, Clone)]
pub struct BatchPlan {
    windows: Vec<Vec<usize>>,
    tokens: usize,
    /// Tokens of the fullest batch that could be drawn.
    most_tokens: usize,
    options: BatchOptions,
}

impl BatchPlan {
    /// Plans batches for examples of the given lengths.
    ///
    /// # Errors
    /// [`Error::Usage`] when the batch size is 0, there are no examples, or an example is longer than a window.
    pub fn new(lengths: &[usize], options: BatchOptions) -> Result<Self> {
        if options.batch_size == 0 {
            return Err(Error::Usage("the batch size is 0, it must be at least 1".to_owned()));
        }
        if lengths.is_empty() {
            return Err(Error::Data("there are no examples to make batches of".to_owned()));
        }
        if let Some(at) = lengths.iter().position(|&length| length > options.max_seq_len) {
            let (length, limit) = (lengths[at], options.max_seq_len);
            return Err(Error::Usage(format!(
                "example {at} has {length} tokens, a window has room for {limit}"
            )));
        }
        // A run's offsets are 32-bit.
        if options.batch_size.checked_mul(options.max_seq_len).is_none_or(|tokens| tokens > u32::MAX as usize)
        {
            let (rows, length) = (options.batch_size, options.max_seq_len);
            return Err(Error::Usage(format!(
                "{rows} windows of {length} tokens are more than {} tokens",
                u32::MAX
            )));
        }
        let windows = if options.packing {
            first_fit_decreasing(lengths, options.max_seq_len)
        } else {
            (0..lengths.len()).map(|example| vec![example]).collect()
        };
        let tokens_of = |window: &Vec<usize>| window.iter().map(|&example| lengths[example]).sum();
        let mut fullest: Vec<usize> = windows.iter().map(tokens_of).collect();
        fullest.sort_unstable_by(|a, b| b.cmp(a));
        let most_tokens = fullest.iter().take(options.batch_size).sum();
        Ok(Self { windows, tokens: lengths.iter().sum(), most_tokens, options })
    }

    /// How many batches an epoch has; the last one may be smaller.
    pub fn batches_per_epoch(&self) -> usize {
        self.windows.len().div_ceil(self.options.batch_size)
    }

    /// How many optimizer steps an epoch has when each takes `accumulation` batches; the last one may take fewer.
    pub fn steps_per_epoch(&self, accumulation: usize) -> usize {
        self.batches_per_epoch().div_ceil(accumulation.max(1))
    }

    /// The epoch and its batches that step `step` of the run (counted from 0) takes. No step reaches into two epochs.
    pub fn batches_of_step(&self, step: usize, accumulation: usize) -> (usize, Range<usize>) {
        let accumulation = accumulation.max(1);
        let steps = self.steps_per_epoch(accumulation);
        let first = (step % steps) * accumulation;
        (step / steps, first..(first + accumulation).min(self.batches_per_epoch()))
    }

    /// Tokens of the fullest batch that any epoch could have.
    pub fn most_tokens(&self) -> usize {
        self.most_tokens
    }

    /// The share of a window's slots that hold tokens, 1 when not packed.
    pub fn fill_ratio(&self) -> f64 {
        if self.options.packing {
            self.tokens as f64 / (self.windows.len() * self.options.max_seq_len) as f64
        } else {
            1.0
        }
    }

    /// How many windows an epoch has.
    pub fn windows(&self) -> usize {
        self.windows.len()
    }

    /// The examples of a batch, in order; empty beyond the end of the epoch.
    pub fn examples(&self, epoch: usize, batch: usize) -> Vec<usize> {
        self.windows_of(epoch, batch).flatten().copied().collect()
    }

    /// The batch `batch` of epoch `epoch` (counted from 0); `examples` are those whose lengths made the plan.
    pub fn batch(&self, examples: &[Example], epoch: usize, batch: usize) -> PackedBatch {
        let mut packed = PackedBatch::default();
        let mut windows = 0;
        for window in self.windows_of(epoch, batch) {
            windows += 1;
            for &index in window {
                packed.push(index, &examples[index]);
            }
        }
        packed.slots =
            if self.options.packing { windows * self.options.max_seq_len } else { packed.ids.len() };
        packed
    }

    fn windows_of(&self, epoch: usize, batch: usize) -> impl Iterator<Item = &Vec<usize>> {
        let order = Permutation::new(self.options.seed, epoch as u32, "data.order", self.windows.len());
        let start = batch.saturating_mul(self.options.batch_size).min(self.windows.len());
        let end = start.saturating_add(self.options.batch_size).min(self.windows.len());
        let shuffle = self.options.shuffle;
        (start..end).map(move |position| &self.windows[if shuffle { order.at(position) } else { position }])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn example(ids: Vec<u32>, trained: Vec<bool>) -> Example {
        Example { ids, trained, line: 1 }
    }

    fn options(batch_size: usize, max_seq_len: usize, packing: bool) -> BatchOptions {
        BatchOptions { batch_size, max_seq_len, packing, seed: 5, shuffle: true }
    }

    #[test]
    fn labels_are_the_next_token_and_stop_at_each_document() {
        let examples = [
            example(vec![1, 2, 3, 4], vec![true, false, true, true]),
            example(vec![7], vec![true]),
            example(vec![5, 6], vec![false, true]),
        ];
        let plan =
            BatchPlan::new(&[4, 1, 2], BatchOptions { shuffle: false, ..options(1, 8, true) }).unwrap();
        let batch = plan.batch(&examples, 0, 0);
        assert_eq!(batch.ids, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(batch.labels, [-100, 3, 4, -100, 6, -100, -100]);
        assert_eq!(batch.document_starts, [0, 4, 6, 7]);
        assert_eq!((batch.examples.as_slice(), batch.slots, batch.trained_tokens()), (&[0, 2, 1][..], 8, 3));
        assert!((plan.fill_ratio() - 7.0 / 8.0).abs() < 1e-12);
    }

    #[test]
    fn last_batch_and_last_step_may_be_smaller() {
        let plan = BatchPlan::new(&[3; 11], options(2, 4, false)).unwrap();
        assert_eq!((plan.batches_per_epoch(), plan.steps_per_epoch(4)), (6, 2));
        assert_eq!(plan.batches_of_step(0, 4), (0, 0..4));
        assert_eq!(plan.batches_of_step(1, 4), (0, 4..6));
        assert_eq!(plan.batches_of_step(2, 4), (1, 0..4));
        assert_eq!(plan.examples(0, 5).len(), 1);
        assert!(plan.examples(0, 6).is_empty());
        assert!(plan.examples(0, usize::MAX).is_empty());
    }

    #[test]
    fn epochs_have_different_orders_and_a_seed_has_one() {
        let order = |epoch, seed| {
            let plan = BatchPlan::new(&[3; 20], BatchOptions { seed, ..options(4, 4, false) }).unwrap();
            (0..5).flat_map(|batch| plan.examples(epoch, batch)).collect::<Vec<_>>()
        };
        assert_eq!(order(0, 1), order(0, 1));
        assert_ne!(order(0, 1), order(1, 1));
        assert_ne!(order(0, 1), order(0, 2));
    }

    #[test]
    fn plans_that_cannot_be_are_refused() {
        assert!(BatchPlan::new(&[3], options(0, 4, false)).is_err());
        assert!(BatchPlan::new(&[], options(1, 4, false)).is_err());
        assert!(BatchPlan::new(&[3, 5], options(1, 4, true)).unwrap_err().to_string().contains("5 tokens"));
        assert!(BatchPlan::new(&[3], options(usize::MAX, 4, true)).is_err());
    }

    proptest! {
        #[test]
        fn packed_or_not_every_token_is_met_once_an_epoch_with_the_same_target(
            lengths in proptest::collection::vec(1_usize..30, 1..60),
            batch_size in 1_usize..5,
            seed in proptest::num::u64::ANY,
            epoch in 0_usize..4,
        ) {
            // Every token of the set is unique, so that a target tells where it came from.
            let mut next = 0;
            let examples: Vec<Example> = lengths.iter().map(|&length| {
                let ids: Vec<u32> = (next..next + length as u32).collect();
                next += length as u32;
                let trained = ids.iter().map(|id| id % 3 != 0).collect();
                example(ids, trained)
            }).collect();
            let mut expected: Vec<(u32, i32)> = examples.iter().flat_map(|example| {
                (0..example.ids.len()).map(|at| {
                    let target = example.ids.get(at + 1).filter(|_| example.trained[at + 1]);
                    (example.ids[at], target.map_or(NO_TARGET, |&id| id as i32))
                })
            }).collect();
            expected.sort_unstable();
            for packing in [false, true] {
                let plan = BatchPlan::new(&lengths, BatchOptions { seed, ..options(batch_size, 30, packing) }).unwrap();
                let mut met = Vec::new();
                let mut slots = 0;
                for index in 0..plan.batches_per_epoch() {
                    let batch = plan.batch(&examples, epoch, index);
                    prop_assert!(batch.ids.len() <= batch.slots && batch.slots <= batch_size * 30);
                    prop_assert_eq!(batch.document_starts.len(), batch.examples.len() + 1);
                    for (document, pair) in batch.examples.iter().zip(batch.document_starts.windows(2)) {
                        let ids = &batch.ids[pair[0] as usize..pair[1] as usize];
                        prop_assert_eq!(ids, &examples[*document].ids[..]);
                    }
                    slots += batch.slots;
                    met.extend(batch.ids.iter().copied().zip(batch.labels.iter().copied()));
                }
                let fill = met.len() as f64 / slots as f64;
                prop_assert!((plan.fill_ratio() - fill).abs() < 1e-12);
                met.sort_unstable();
                prop_assert_eq!(&met, &expected);
            }
        }
    }
}
