//! Continuing a text, with the keys and values of what came before kept.

pub mod sampler;
mod step;
pub mod text;

use pmetal_engine::ops::SampleOptions;
use pmetal_engine::{Tape, Tensor};

pub use sampler::Sampling;

use crate::error::{Error, Result};
use crate::models::{Decoder, Document, Forward, KeyValueCache, TokenRun};
use step::Stepper;

/// Prompt tokens that go through the model at one time.
const PREFILL_TOKENS: usize = 512;

/// Steps that a device is asked for before the first of their tokens is read.
const MOST_AHEAD: usize = 8;

/// Tokens that a cache is made larger by for a text that may grow further.
const MOST_RESERVED: usize = 1024;

/// One growing text.
///
/// Logits equal those of a full forward pass over the text: where a rotary scaling depends on the text's
/// length (dynamic NTK beyond the trained length, longrope when it crosses it), the cache is computed again.
pub struct Session<'a> {
    // Dropped first: a recording uses the cache's memory.
    stepper: Option<Stepper>,
    records: bool,
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
        Ok(Self { stepper: None, records: true, decoder, cache, ids: Vec::new() })
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
        self.catch_up()
    }

    /// Computes what of the text is not in the cache and returns the logits after its last token.
    fn catch_up(&mut self) -> Result<Vec<f32>> {
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

    /// Whether a device may record its step and replay it (a CUDA graph); it computes the same without.
    pub fn record_steps(&mut self, records: bool) {
        self.records = records;
        self.stepper = None;
    }

    /// Whether the device replays a step that it recorded.
    pub fn replays_steps(&self) -> bool {
        self.stepper.as_ref().is_some_and(Stepper::replays)
    }

    /// Continues the text from `logits` until a rule or the caller ends it. `accept` sees every token in order and
    /// returns whether to go on; a device with memory of its own may have computed more by then, which nobody sees.
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
        let mut generated = 0;
        while generated < rules.max_tokens {
            let token = sampling.choose(&logits, &self.ids, generated)?;
            if rules.tokens.contains(&token) || !accept(token)? {
                return Ok(Finish::Stopped);
            }
            self.ids.push(token);
            generated += 1;
            let steps_on = !self.decoder.device().is_host() && self.cache.tokens() + 1 == self.ids.len();
            if steps_on && let Some(finish) = self.step_on(sampling, rules, &mut generated, &mut accept)? {
                return Ok(finish);
            }
            if generated < rules.max_tokens {
                logits = self.catch_up()?;
            }
        }
        Ok(Finish::Length)
    }

    /// Lets the device go on by itself from the last token of a text, which is the one that the cache lacks; `None` where it
    /// cannot, from such a text again.
    fn step_on(
        &mut self,
        sampling: &Sampling,
        rules: &StopRules,
        generated: &mut usize,
        accept: &mut impl FnMut(u32) -> Result<bool>,
    ) -> Result<Option<Finish>> {
        // What a token leaves in a state could not be taken back if the text ended before it.
        let most_ahead = if self.decoder.passes_states() { 1 } else { MOST_AHEAD };
        let (options, mut ahead, mut is_placed) = (sampling.options(), 1, false);
        while *generated < rules.max_tokens {
            let length = self.ids.len();
            let fits = |steps: &usize| self.decoder.cache_fits(&self.cache, length + steps - 1);
            let most = ahead.min(rules.max_tokens - *generated);
            let Some(steps) = (1..=most).rev().find(fits) else { return Ok(None) };
            is_placed &= self.prepare_steps(steps, rules.max_tokens - *generated, &options)?;
            let Some(stepper) = &mut self.stepper else { return Ok(None) };
            if !is_placed {
                let vocabulary = self.decoder.spec.vocabulary;
                let counts =
                    options.has_penalties().then(|| sampler::counts_of(vocabulary, &self.ids, *generated));
                let token = (self.ids[length - 1], length - 1);
                stepper.place(token, &self.cache, *generated as u32, counts.as_deref())?;
                is_placed = true;
            }
            for _ in 0..steps {
                stepper.step(self.decoder, &mut self.cache)?;
            }
            for token in stepper.chosen(*generated as u32, steps)? {
                self.cache.advance(1);
                let token = token.ok_or_else(|| sampler::not_finite(self.ids.len()))?;
                if rules.tokens.contains(&token) || !accept(token)? {
                    return Ok(Some(Finish::Stopped));
                }
                self.ids.push(token);
                *generated += 1;
            }
            ahead = (2 * ahead).min(most_ahead);
        }
        Ok(Some(Finish::Length))
    }

    /// Makes a step for a text that grows by `steps` tokens now and by `wanted` in the end; true where the one that is
    /// there will do, and is where the text is.
    fn prepare_steps(&mut self, steps: usize, wanted: usize, options: &SampleOptions) -> Result<bool> {
        let length = self.ids.len();
        let stays = self.cache.make_room(steps, wanted.min(MOST_RESERVED).max(steps))?;
        let lengths = [length, length + steps];
        let held = self.stepper.as_ref();
        if held.is_some_and(|held| held.fits(self.decoder, &self.cache, lengths, options)) {
            return Ok(stays);
        }
        // A recording of memory that was replaced may not be replayed.
        self.stepper = None;
        self.stepper = Some(Stepper::new(self.decoder, &self.cache, lengths, *options, self.records)?);
        Ok(false)
    }
}
