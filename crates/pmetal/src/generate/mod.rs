//! Continuing a text, with the keys and values of what came before kept.

pub mod sampler;
pub mod text;

use pmetal_engine::{Tape, Tensor};

pub use sampler::Sampling;

use crate::error::{Error, Result};
use crate::models::{Decoder, Document, Forward, KeyValueCache, TokenRun};

/// Prompt tokens that go through the model at one time.
const PREFILL_TOKENS: usize = 512;

/// One growing text.
///
/// Logits equal those of a full forward pass over the text: where a rotary scaling depends on the text's
/// length (dynamic NTK beyond the trained length, longrope when it crosses it), the cache is computed again.
pub struct Session<'a> {
    decoder: &'a Decoder,
    cache: KeyValueCache,
    ids: Vec<u32>,
}

/// When a generation ends.
#[derive(Debug, Clone, Default)]
pub struct StopRules {
    /// Tokens that end the text and are not part of it.
    pub tokens: Vec<u32>,
    /// Most tokens to generate.
    pub max_tokens: usize,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token, or the caller, ended it.
    Stopped,
    /// The number of tokens was reached.
    Length,
}

impl<'a> Session<'a> {
    /// An empty text.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(decoder: &'a Decoder) -> Result<Self> {
        let cache = KeyValueCache::new(&decoder.spec, decoder.device(), decoder.dtype)?;
        Ok(Self { decoder, cache, ids: Vec::new() })
    }

    /// The text so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Forgets all but the first `tokens` tokens, for a conversation that goes on from there.
    pub fn truncate(&mut self, tokens: usize) {
        self.ids.truncate(tokens);
        self.cache.truncate(tokens);
    }

    /// Appends tokens and returns the logits after the last one.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is nothing to append; a token beyond the vocabulary; out of memory.
    pub fn extend(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        if tokens.is_empty() {
            return Err(Error::Usage("there is no text to continue: the prompt is empty".to_owned()));
        }
        self.ids.extend_from_slice(tokens);
        let length = self.ids.len();
        if !self.decoder.cache_fits(&self.cache, length) {
            self.cache.truncate(0);
        }
        let mut last = None;
        while self.cache.tokens() < length {
            let start = self.cache.tokens();
            let tokens = PREFILL_TOKENS.min(length - start);
            let document = Document { tokens, first_position: start, rope_length: length };
            let run = TokenRun { ids: self.ids[start..start + tokens].to_vec(), documents: vec![document] };
            let forward = Forward { cache: Some(&mut self.cache), ..Forward::default() };
            let states = self.decoder.hidden(&Tape::off(), &run, forward)?.into_tensor();
            last = Some(states.slice_rows(tokens - 1, 1)?);
        }
        let states: Tensor = last.ok_or_else(|| Error::Usage("the text did not grow".to_owned()))?;
        Ok(self.decoder.logits(&states)?.to_f32_vec()?)
    }

    /// Continues the text from `logits` until a rule or the caller ends it. `accept` sees every token before
    /// the next one is computed and returns whether to go on.
    ///
    /// # Errors
    /// As [`Self::extend`] and [`Sampling::choose`], and what `accept` returns.
    pub fn generate(
        &mut self,
        mut logits: Vec<f32>,
        sampling: &Sampling,
        rules: &StopRules,
        mut accept: impl FnMut(u32) -> Result<bool>,
    ) -> Result<Finish> {
        for generated in 0..rules.max_tokens {
            let token = sampling.choose(&logits, &self.ids, generated)?;
            if rules.tokens.contains(&token) || !accept(token)? {
                return Ok(Finish::Stopped);
            }
            if generated + 1 < rules.max_tokens {
                logits = self.extend(&[token])?;
            } else {
                self.ids.push(token);
            }
        }
        Ok(Finish::Length)
    }
}
