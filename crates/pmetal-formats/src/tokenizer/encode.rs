//! From text to ids: the library's steps one by one, so that marked text can be kept from becoming special tokens.

use tokenizers::{Model, OffsetType, PreTokenizer};

use super::load::guarded;
use super::{Document, Encoded, SpecialText, Tokenizer};
use crate::{Error, Result};

impl Tokenizer {
    /// Encodes `text` as if the character `mark` were not in it, except that special tokens end at it.
    ///
    /// Offsets are those of the text without marks.
    pub(crate) fn encode_marked(
        &self,
        text: &str,
        special: SpecialText,
        mark: Option<char>,
    ) -> Result<Encoded> {
        let encoding = self.pieces(text, special, mark)?;
        let mut offsets = encoding.get_offsets().to_vec();
        if let Some(mark) = mark.filter(|mark| text.contains(*mark)) {
            unmark_offsets(text, mark, &mut offsets);
        }
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets })
    }

    fn pieces(&self, text: &str, special: SpecialText, mark: Option<char>) -> Result<tokenizers::Encoding> {
        let added = match special {
            SpecialText::Parse => self.inner.get_added_vocabulary(),
            SpecialText::Plain => &self.plain,
        };
        guarded(|| {
            let mut pieces = added.extract_and_normalize(self.inner.get_normalizer(), text);
            if let Some(mark) = mark {
                pieces.normalize(|piece| {
                    piece.filter(|character| character != mark);
                    Ok(())
                })?;
            }
            if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut pieces)?;
            }
            pieces.tokenize(|piece| self.inner.get_model().tokenize(piece.get()))?;
            pieces.into_encoding(None, 0, OffsetType::Byte)
        })
        .map_err(Error::Tokenizer)
    }

    pub(super) fn document_ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.pieces(text, SpecialText::Parse, None)?;
        match self.document {
            Document::PostProcessor => {
                let whole =
                    guarded(|| self.inner.post_process(encoding, None, true)).map_err(Error::Tokenizer)?;
                Ok(whole.get_ids().to_vec())
            }
            Document::Explicit { bos, eos } => {
                let mut ids = Vec::with_capacity(encoding.get_ids().len() + 2);
                ids.extend(self.bos().filter(|_| bos));
                ids.extend_from_slice(encoding.get_ids());
                ids.extend(self.eos().filter(|_| eos));
                Ok(ids)
            }
        }
    }
}

/// Takes the bytes of the marks before each offset away; offsets come in no order that could be relied on.
fn unmark_offsets(text: &str, mark: char, offsets: &mut [(usize, usize)]) {
    let marks: Vec<usize> = text.match_indices(mark).map(|(at, _)| at).collect();
    let unmarked = |offset: usize| offset - marks.partition_point(|at| *at < offset) * mark.len_utf8();
    for (start, end) in offsets {
        (*start, *end) = (unmarked(*start), unmarked(*end));
    }
}
