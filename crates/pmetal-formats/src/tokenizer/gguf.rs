//! Tokenizers of GGUF files, rebuilt as `tokenizer.json` and read by the same path.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::pre_tokenizers::pre_tokenizer;
use super::{Tokenizer, load};
use crate::gguf::GgufMetadata;
use crate::{Error, Result};

/// What the keys `tokenizer.ggml.*` and `tokenizer.chat_template` of a GGUF file say.
#[derive(Debug, Clone, Default)]
pub struct GgufTokenizer<'a> {
    /// `tokenizer.ggml.model`: "gpt2" is byte-level BPE, "llama" is SentencePiece BPE.
    pub model: &'a str,
    /// `tokenizer.ggml.pre`: how text is split before BPE.
    pub pre: Option<&'a str>,
    /// `tokenizer.ggml.tokens`.
    pub tokens: Vec<&'a str>,
    /// `tokenizer.ggml.token_type`; empty when the file has none.
    pub types: Vec<i64>,
    /// `tokenizer.ggml.scores`; empty when the file has none.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.merges`; empty when the file has none.
    pub merges: Vec<&'a str>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u64>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u64>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u64>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad: Option<u64>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub template: Option<&'a str>,
    /// Names and sources of the templates `tokenizer.chat_template.NAME`.
    pub named_templates: Vec<(&'a str, &'a str)>,
}

impl<'a> GgufTokenizer<'a> {
    /// Collects the fields from a file's metadata; those that are absent stay empty.
    ///
    /// # Errors
    /// A field that is needed is missing, or a field has another type than it must have.
    pub fn from_metadata(metadata: &'a GgufMetadata) -> Result<Self> {
        fn present<T>(
            metadata: &GgufMetadata,
            key: &str,
            get: impl FnOnce(&str) -> Result<T>,
        ) -> Result<Option<T>> {
            let key = format!("tokenizer.{key}");
            if metadata.has(&key) { get(&key).map(Some) } else { Ok(None) }
        }
        let strings = |key: &str| -> Result<Vec<&'a str>> { Ok(metadata.strings(key)?.iter().collect()) };
        let id = |key: &str| present(metadata, key, |key| metadata.u64(key));
        let flag = |key: &str| present(metadata, key, |key| metadata.bool(key));
        let mut named_templates = Vec::new();
        for name in metadata.0.keys().filter_map(|key| key.strip_prefix("tokenizer.chat_template.")) {
            named_templates.push((name, metadata.string(&format!("tokenizer.chat_template.{name}"))?));
        }
        Ok(Self {
            model: metadata.string("tokenizer.ggml.model")?,
            pre: present(metadata, "ggml.pre", |key| metadata.string(key))?,
            tokens: strings("tokenizer.ggml.tokens")?,
            types: present(metadata, "ggml.token_type", |key| metadata.i64s(key))?.unwrap_or_default(),
            scores: present(metadata, "ggml.scores", |key| Ok(metadata.f32s(key)?.to_vec()))?
                .unwrap_or_default(),
            merges: present(metadata, "ggml.merges", strings)?.unwrap_or_default(),
            bos: id("ggml.bos_token_id")?,
            eos: id("ggml.eos_token_id")?,
            unknown: id("ggml.unknown_token_id")?,
            pad: id("ggml.padding_token_id")?,
            add_bos: flag("ggml.add_bos_token")?,
            add_eos: flag("ggml.add_eos_token")?,
            add_space_prefix: flag("ggml.add_space_prefix")?,
            template: present(metadata, "chat_template", |key| metadata.string(key))?,
            named_templates,
        })
    }
}

// Values of `tokenizer.ggml.token_type`.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

pub(super) fn build(origin: &Path, file: &GgufTokenizer<'_>) -> Result<Tokenizer> {
    check(origin, file)?;
    let mut ids = HashMap::with_capacity(file.tokens.len());
    for (id, token) in file.tokens.iter().enumerate() {
        // Of tokens with equal text the first is the one that encoding gives.
        ids.entry(*token).or_insert(id);
    }
    let parts = match file.model {
        "gpt2" => byte_level(origin, file)?,
        "llama" => sentence_piece(file, &ids),
        other => {
            return Err(Error::unsupported(
                origin,
                format!("`tokenizer.ggml.model` is `{other}`, known are `gpt2` and `llama`"),
            ));
        }
    };
    let distinct = file.tokens.iter().enumerate().filter(|(id, token)| ids.get(*token) == Some(id));
    let vocabulary: Map<String, Json> =
        distinct.map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    let mut model = parts.model;
    model.insert("type".to_owned(), json!("BPE"));
    model.insert("vocab".to_owned(), Json::Object(vocabulary));
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(file, &ids),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": null,
        "decoder": parts.decoder,
        "model": model,
    });
    load::from_parts(tokenizer.to_string().as_bytes(), Some(config(file).to_string().as_bytes()), origin)
}

fn check(origin: &Path, file: &GgufTokenizer<'_>) -> Result<()> {
    let count = file.tokens.len();
    for (key, length) in [("token_type", file.types.len()), ("scores", file.scores.len())] {
        if length != 0 && length != count {
            let message =
                format!("`tokenizer.ggml.{key}` has {length} entries, `tokenizer.ggml.tokens` has {count}");
            return Err(Error::malformed(origin, "metadata", message));
        }
    }
    for (key, id) in [("bos", file.bos), ("eos", file.eos), ("unknown", file.unknown), ("padding", file.pad)]
    {
        if let Some(id) = id.filter(|id| *id >= count as u64) {
            let message = format!("`tokenizer.ggml.{key}_token_id` is {id}, there are {count} tokens");
            return Err(Error::malformed(origin, "metadata", message));
        }
    }
    if let Some(id) = file.tokens.iter().position(|token| token.is_empty()) {
        // The library cannot hold such a token; no published file has one that text can reach.
        return Err(Error::malformed(origin, "metadata", format!("token {id} is empty")));
    }
    Ok(())
}

struct Parts {
    model: Map<String, Json>,
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
}

fn byte_level(origin: &Path, file: &GgufTokenizer<'_>) -> Result<Parts> {
    let name = file.pre.unwrap_or("default");
    let Some(rule) = pre_tokenizer(name) else {
        return Err(Error::unsupported(
            origin,
            format!("`tokenizer.ggml.pre` is `{name}`, which is not known"),
        ));
    };
    let mut merges = Vec::with_capacity(file.merges.len());
    for (at, merge) in file.merges.iter().enumerate() {
        // A merge's first half may itself begin with a space.
        let space = merge.char_indices().skip(1).find(|(_, character)| *character == ' ');
        match space {
            Some((place, _)) => merges.push(json!([merge[..place], merge[place + 1..]])),
            None => {
                let message = format!("merge {at} is `{merge}`, not two tokens");
                return Err(Error::malformed(origin, "`tokenizer.ggml.merges`", message));
            }
        }
    }
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": file.add_space_prefix == Some(true), "trim_offsets": false, "use_regex": use_regex});
    let mut steps = rule.steps;
    steps.push(byte_level(rule.byte_level_splits));
    let mut model = Map::new();
    model.insert("merges".to_owned(), Json::Array(merges));
    model.insert("ignore_merges".to_owned(), json!(rule.ignore_merges));
    Ok(Parts {
        model,
        normalizer: rule.normalizer,
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": steps}),
        decoder: byte_level(true),
    })
}

fn sentence_piece(file: &GgufTokenizer<'_>, ids: &HashMap<&str, usize>) -> Parts {
    let prefix = file.add_space_prefix.unwrap_or(true);
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": "\u{2581}"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}));
    let merges = if file.merges.is_empty() {
        merges_by_score(file, ids).into_iter().map(|(left, right)| json!([left, right])).collect()
    } else {
        file.merges
            .iter()
            .filter_map(|merge| merge.split_once(' '))
            .map(|(left, right)| json!([left, right]))
            .collect()
    };
    let unknown =
        file.unknown.or_else(|| file.types.iter().position(|kind| *kind == UNKNOWN).map(|id| id as u64));
    let mut model = Map::new();
    model.insert("merges".to_owned(), Json::Array(merges));
    model.insert("byte_fallback".to_owned(), json!(true));
    model.insert("fuse_unk".to_owned(), json!(true));
    let unknown = unknown.and_then(|id| file.tokens.get(usize::try_from(id).ok()?));
    model.insert("unk_token".to_owned(), json!(unknown));
    Parts {
        model,
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Json::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
    }
}

/// The merges that a SentencePiece vocabulary stands for: every way to make a piece of two others, best score first.
///
/// Ties are broken as `transformers` does when it converts such a vocabulary.
fn merges_by_score<'a>(file: &GgufTokenizer<'a>, ids: &HashMap<&'a str, usize>) -> Vec<(&'a str, &'a str)> {
    let mut merges = Vec::new();
    for (id, token) in file.tokens.iter().enumerate() {
        let kind = file.types.get(id).copied().unwrap_or(NORMAL);
        if kind != NORMAL && kind != USER_DEFINED {
            continue;
        }
        let score = file.scores.get(id).copied().unwrap_or(-(id as f32));
        let mut own = Vec::new();
        for (place, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(place);
            if let (Some(left_id), Some(right_id)) = (ids.get(left), ids.get(right)) {
                own.push(((*left_id, *right_id), score, left, right));
            }
        }
        own.sort_by_key(|(pair, ..)| *pair);
        merges.extend(own);
    }
    merges.sort_by(|(_, left_score, a, b), (_, right_score, c, d)| {
        let lengths = |left: &str, right: &str| (left.chars().count(), right.chars().count());
        right_score.total_cmp(left_score).then_with(|| lengths(c, d).cmp(&lengths(a, b)))
    });
    merges.into_iter().map(|(_, _, left, right)| (left, right)).collect()
}

fn added_tokens(file: &GgufTokenizer<'_>, ids: &HashMap<&str, usize>) -> Vec<Json> {
    let mut seen = HashSet::new();
    let mut added = Vec::new();
    for (id, token) in file.tokens.iter().enumerate() {
        let kind = file.types.get(id).copied().unwrap_or(NORMAL);
        let special = kind == CONTROL || kind == UNKNOWN;
        if (special || kind == USER_DEFINED) && ids.get(token) == Some(&id) && seen.insert(*token) {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            }));
        }
    }
    added
}

fn config(file: &GgufTokenizer<'_>) -> Json {
    let text = |id: Option<u64>| id.and_then(|id| file.tokens.get(usize::try_from(id).ok()?));
    let mut templates = Vec::new();
    if let Some(template) = file.template {
        templates.push(json!({"name": "default", "template": template}));
    }
    for (name, template) in &file.named_templates {
        templates.push(json!({"name": name, "template": template}));
    }
    json!({
        "bos_token": text(file.bos),
        "eos_token": text(file.eos),
        "unk_token": text(file.unknown),
        "pad_token": text(file.pad),
        "add_bos_token": file.add_bos.unwrap_or(file.model == "llama"),
        "add_eos_token": file.add_eos.unwrap_or(false),
        "chat_template": templates,
    })
}
