//! One token's step on a device with memory of its own, recorded once and replayed for every token.

use std::sync::Arc;

use pmetal_engine::device::Recording;
use pmetal_engine::ops::{self, Cursor, SampleOptions};
use pmetal_engine::{Device, Tape};

use crate::error::Result;
use crate::models::{Decoder, Forward, Inputs, KeyValueCache};

/// The step of one text: forward pass, choice of the next token, and the cursor moved on to it. It reads nothing from
/// the host, so that steps can be asked for before the tokens of earlier ones are known.
pub(super) struct Stepper {
    // Dropped first: it uses the memory of all others.
    recording: Option<Recording>,
    inputs: Arc<Inputs>,
    cursor: Cursor,
    options: SampleOptions,
    /// Room of the cache that it was made for.
    rooms: Vec<usize>,
    /// Tokens of the longest text that it was made for.
    most: usize,
    epochs: Vec<usize>,
    /// Whether what a step needs was compiled and allocated.
    is_warm: bool,
    records: bool,
}

impl Stepper {
    /// A step for caches with as much room as this, for texts of the rotary epochs that `length` tokens have and of up to
    /// the next power of two of `most` tokens.
    ///
    /// # Errors
    /// Out of memory.
    pub(super) fn new(
        decoder: &Decoder,
        cache: &KeyValueCache,
        [length, most]: [usize; 2],
        options: SampleOptions,
        records: bool,
    ) -> Result<Self> {
        let cursor = Cursor::new(decoder.device(), &decoder.spec.mask_kinds())?;
        let (rooms, most) = (cache.rooms(), most.next_power_of_two());
        let inputs = Arc::new(decoder.step_inputs(&cursor, &rooms, [most, length])?);
        let epochs = decoder.epochs(length);
        Ok(Self { recording: None, inputs, cursor, options, rooms, most, epochs, is_warm: false, records })
    }

    /// Whether it is the step of such a text.
    pub(super) fn fits(
        &self,
        decoder: &Decoder,
        cache: &KeyValueCache,
        [length, most]: [usize; 2],
        options: &SampleOptions,
    ) -> bool {
        self.rooms == cache.rooms()
            && self.most >= most
            && self.options == *options
            && self.epochs == decoder.epochs(length)
    }

    /// Whether it is replayed.
    pub(super) fn replays(&self) -> bool {
        self.recording.is_some()
    }

    /// Puts it on a token at its position; see [`Cursor::place`].
    ///
    /// # Errors
    /// Out of memory.
    pub(super) fn place(
        &mut self,
        token: (u32, usize),
        cache: &KeyValueCache,
        drawn: u32,
        counts: Option<&[u32]>,
    ) -> Result<()> {
        Ok(self.cursor.place(token, &cache.firsts(), drawn, counts)?)
    }

    /// Asks the device for one more token.
    ///
    /// # Errors
    /// Out of memory; a failure of the device.
    pub(super) fn step(&mut self, decoder: &Decoder, cache: &mut KeyValueCache) -> Result<()> {
        if self.recording.is_none() && self.is_warm && self.records {
            let device: Device = decoder.device().clone();
            let recorded = device.record(|| self.compute(decoder, cache))?;
            self.records = recorded.is_some();
            self.recording = recorded.map(|(recording, ())| recording);
        }
        match &self.recording {
            Some(recording) => recording.replay(),
            None => self.compute(decoder, cache)?,
        }
        self.is_warm = true;
        Ok(())
    }

    fn compute(&self, decoder: &Decoder, cache: &mut KeyValueCache) -> Result<()> {
        let forward = Forward { cache: Some(cache), ..Forward::default() };
        let states = decoder.hidden_of(&Tape::off(), &self.inputs, forward)?.into_tensor();
        let logits = decoder.logits(&states)?;
        Ok(ops::sample(&logits, &self.options, &self.cursor)?)
    }

    /// Tokens of some steps, by the number of the first one's draw; see [`Cursor::chosen`].
    ///
    /// # Errors
    /// A failure of the device.
    pub(super) fn chosen(&self, first: u32, count: usize) -> Result<Vec<Option<u32>>> {
        Ok(self.cursor.chosen(first, count)?)
    }
}
