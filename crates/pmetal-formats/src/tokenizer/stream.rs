//! Decoding one token at a time.

use super::Tokenizer;
use crate::Result;

/// Turns ids into text as they arrive; made by [`Tokenizer::decode_stream`].
///
/// The pieces are valid UTF-8 and their concatenation equals [`Tokenizer::decode`] of all ids.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// Ids before `context` play no part in what comes next.
    context: usize,
    /// The text of `ids[context..settled]`, which is out already.
    context_text: String,
    settled: usize,
    emitted: String,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            ids: Vec::new(),
            context: 0,
            context_text: String::new(),
            settled: 0,
            emitted: String::new(),
        }
    }

    /// Takes the next id; gives the text that became certain, or `None` when a character is not whole yet.
    ///
    /// # Errors
    /// When the decoder fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        // Bytes that follow could turn a run of byte tokens into invalid UTF-8, which is then replaced as a whole.
        if self.tokenizer.byte_fallback && self.tokenizer.is_byte_token(id) {
            return Ok(None);
        }
        let text = self.tokenizer.decode(&self.ids[self.context..], self.skip_special)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(None);
        }
        let Some(piece) = text.strip_prefix(&*self.context_text).filter(|piece| !piece.is_empty()) else {
            return Ok(None);
        };
        let piece = piece.to_owned();
        self.emitted.push_str(&piece);
        let context_text = self.tokenizer.decode(&self.ids[self.settled..], self.skip_special)?;
        if context_text.is_empty() {
            // Decoders treat the first token apart, so the context must begin with one that shows.
            self.context_text = text;
        } else {
            self.context = self.settled;
            self.context_text = context_text;
        }
        self.settled = self.ids.len();
        Ok(Some(piece))
    }

    /// Gives what is left when no more ids come.
    ///
    /// # Errors
    /// When the decoder fails.
    pub fn finish(self) -> Result<Option<String>> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        let piece = text.get(self.emitted.len()..).unwrap_or_default();
        Ok((!piece.is_empty()).then(|| piece.to_owned()))
    }
}
