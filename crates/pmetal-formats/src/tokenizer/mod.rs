//! Tokenizers: text to ids and back, from `tokenizer.json` or from the metadata of a GGUF file.

mod encode;
mod gguf;
mod load;
mod pre_tokenizers;
mod stream;

use std::path::Path;

use tokenizers::AddedVocabulary;

use crate::{Error, Result};

pub use gguf::GgufTokenizer;
pub use stream::DecodeStream;

/// Whether text that spells a special token becomes that token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialText {
    /// Special tokens are recognised: for text that a template or this program wrote.
    Parse,
    /// Special tokens are ordinary text: for text that a user wrote.
    Plain,
}

/// Ids with the place in the text that each stands for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    /// The token ids.
    pub ids: Vec<u32>,
    /// Byte ranges `(start, end)` of the text, one for each id; tokens that stand for no text have an empty range.
    pub offsets: Vec<(usize, usize)>,
}

/// The chat templates that came with a tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChatTemplates {
    /// The source of the template that is used when no name is given.
    pub default: Option<String>,
    /// Names and sources of the others, in the order of the file.
    pub named: Vec<(String, String)>,
}

/// A token with a role: its id and its text.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Role {
    id: u32,
    text: String,
}

/// What stands around a whole document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Document {
    /// What the post-processor of `tokenizer.json` adds.
    PostProcessor,
    /// What `add_bos_token` and `add_eos_token` say.
    Explicit { bos: bool, eos: bool },
}

/// Text to token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The added tokens, set up so that special ones are not recognised.
    plain: AddedVocabulary,
    vocabulary_size: usize,
    byte_fallback: bool,
    document: Document,
    bos: Option<Role>,
    eos: Option<Role>,
    pad: Option<Role>,
    unknown: Option<Role>,
    templates: ChatTemplates,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder, and `tokenizer_config.json`, `special_tokens_map.json`,
    /// `chat_template.jinja` and `chat_template.json` where they are present.
    ///
    /// # Errors
    /// When a file cannot be read or is not what its format demands; the message names the file.
    pub fn from_folder(dir: &Path) -> Result<Self> {
        load::from_folder(dir)
    }

    /// Builds a tokenizer from the bytes of `tokenizer.json` and `tokenizer_config.json`.
    ///
    /// `origin` is named in errors.
    ///
    /// # Errors
    /// When the bytes are not what their format demands.
    pub fn from_parts(
        tokenizer_json: &[u8],
        tokenizer_config_json: Option<&[u8]>,
        origin: &Path,
    ) -> Result<Self> {
        load::from_parts(tokenizer_json, tokenizer_config_json, origin)
    }

    /// Builds a tokenizer from the metadata of a GGUF file.
    ///
    /// `origin` is named in errors.
    ///
    /// # Errors
    /// When the kind of tokenizer or its splitting rule is not known, or the lists do not fit each other.
    pub fn from_gguf_fields(origin: &Path, metadata: &GgufTokenizer<'_>) -> Result<Self> {
        gguf::build(origin, metadata)
    }

    /// The files by which a model folder carries this tokenizer: `tokenizer.json`, `tokenizer_config.json` and, where
    /// there is one, `chat_template.jinja`.
    ///
    /// # Errors
    /// When the tokenizer cannot be written as JSON.
    pub fn to_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let body = self.inner.to_string(true).map_err(|error| Error::Tokenizer(error.to_string()))?;
        let mut config = serde_json::Map::new();
        let roles = [
            ("bos_token", self.bos_text()),
            ("eos_token", self.eos_text()),
            ("pad_token", self.pad_text()),
            ("unk_token", self.unknown_text()),
        ];
        for (name, text) in roles {
            if let Some(text) = text {
                config.insert(name.to_owned(), text.into());
            }
        }
        config.insert("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into());
        let config = format!("{:#}\n", serde_json::Value::Object(config));
        let mut files = vec![
            ("tokenizer.json".to_owned(), body.into_bytes()),
            ("tokenizer_config.json".to_owned(), config.into_bytes()),
        ];
        if let Some(template) = &self.templates.default {
            files.push(("chat_template.jinja".to_owned(), template.clone().into_bytes()));
        }
        Ok(files)
    }

    /// The ids that a text to be continued begins with: those of [`Self::encode_document`] without an end token.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode_document(text)?;
        if self.eos().is_some() && ids.last().copied() == self.eos() && ids.len() > 1 {
            ids.pop();
        }
        Ok(ids)
    }

    /// The highest id plus one, added tokens included.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary_size
    }

    /// The ids of `text`, without any beginning or end token.
    ///
    /// # Errors
    /// When the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, special: SpecialText) -> Result<Vec<u32>> {
        Ok(self.encode_with_offsets(text, special)?.ids)
    }

    /// The ids of `text` and the bytes of it that each stands for, without any beginning or end token.
    ///
    /// # Errors
    /// When the tokenizer cannot represent the text.
    pub fn encode_with_offsets(&self, text: &str, special: SpecialText) -> Result<Encoded> {
        self.encode_marked(text, special, None)
    }

    /// The ids of a whole document, with the beginning and end tokens that this tokenizer puts around one.
    ///
    /// # Errors
    /// When the tokenizer cannot represent the text.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        self.document_ids(text)
    }

    /// The text of `ids`; special tokens are left out when `skip_special` is set.
    ///
    /// # Errors
    /// When the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        load::guarded(|| self.inner.decode(ids, skip_special)).map_err(Error::Tokenizer)
    }

    /// A decoder that takes one id at a time and gives text as soon as it is whole.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// The id of the token that is spelled exactly `text` in the vocabulary.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// The spelling of a token in the vocabulary.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether `id` is a special token, which `decode` can leave out.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner
            .id_to_token(id)
            .is_some_and(|text| self.inner.get_added_vocabulary().is_special_token(&text))
    }

    /// The token that begins a document.
    pub fn bos(&self) -> Option<u32> {
        self.bos.as_ref().map(|token| token.id)
    }

    /// The text of the token that begins a document.
    pub fn bos_text(&self) -> Option<&str> {
        self.bos.as_ref().map(|token| token.text.as_str())
    }

    /// The token that ends a document.
    pub fn eos(&self) -> Option<u32> {
        self.eos.as_ref().map(|token| token.id)
    }

    /// The text of the token that ends a document.
    pub fn eos_text(&self) -> Option<&str> {
        self.eos.as_ref().map(|token| token.text.as_str())
    }

    /// The token that fills short rows of a batch.
    pub fn pad(&self) -> Option<u32> {
        self.pad.as_ref().map(|token| token.id)
    }

    /// The text of the token that fills short rows of a batch.
    pub fn pad_text(&self) -> Option<&str> {
        self.pad.as_ref().map(|token| token.text.as_str())
    }

    /// The token that stands for what the vocabulary cannot spell.
    pub fn unknown(&self) -> Option<u32> {
        self.unknown.as_ref().map(|token| token.id)
    }

    /// The text of the token that stands for what the vocabulary cannot spell.
    pub fn unknown_text(&self) -> Option<&str> {
        self.unknown.as_ref().map(|token| token.text.as_str())
    }

    /// The chat templates that came with the tokenizer.
    pub fn chat_templates(&self) -> &ChatTemplates {
        &self.templates
    }

    /// The texts of the special tokens.
    pub fn special_texts(&self) -> impl Iterator<Item = &str> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.values().filter(|token| token.special).map(|token| token.content.as_str())
    }

    fn is_byte_token(&self, id: u32) -> bool {
        self.token_text(id)
            .is_some_and(|text| text.len() == 6 && text.starts_with("<0x") && text.ends_with('>'))
    }
}
