//! Loss of a model on examples.

use pmetal_engine::Tape;

use crate::data::{BatchOptions, BatchPlan, Example};
use crate::error::Result;
use crate::models::{Decoder, Forward, TokenRun};

/// Tokens that go through the model at one time.
const BATCH_TOKENS: usize = 2048;

/// A model's loss on a dataset.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Mean loss of the scored tokens, in nats.
    pub loss: f64,
    /// Tokens that were scored: those that training would train.
    pub scored_tokens: usize,
    /// Tokens that went through the model.
    pub tokens: usize,
}

/// Scores the trained tokens of examples.
///
/// # Errors
/// [`crate::Error::Usage`] when there are no examples; out of memory; a token beyond the vocabulary.
pub fn score(decoder: &Decoder, examples: &[Example]) -> Result<Score> {
    let lengths: Vec<usize> = examples.iter().map(|example| example.ids.len()).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0).max(1);
    let options = BatchOptions {
        batch_size: (BATCH_TOKENS / longest).max(1),
        max_seq_len: longest,
        packing: true,
        seed: 0,
        shuffle: false,
    };
    let plan = BatchPlan::new(&lengths, options)?;
    let (mut sum, mut scored_tokens, mut tokens) = (0.0, 0, 0);
    for batch in 0..plan.batches_per_epoch() {
        let packed = plan.batch(examples, 0, batch);
        let lengths: Vec<usize> =
            packed.document_starts.windows(2).map(|pair| (pair[1] - pair[0]) as usize).collect();
        let run = TokenRun::documents(packed.ids, &lengths);
        let (_, loss) = decoder.loss(&Tape::off(), &run, &packed.labels, 1.0, Forward::default())?;
        sum += loss.sum.read()?;
        scored_tokens += loss.tokens;
        tokens += run.ids.len();
    }
    Ok(Score { loss: sum / scored_tokens.max(1) as f64, scored_tokens, tokens })
}
