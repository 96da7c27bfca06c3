//! Reading tokenizer files: limits first, then the library that knows the format.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value as Json;
use tokenizers::AddedToken;

use super::{ChatTemplates, Document, Role, Tokenizer};
use crate::{Error, Result};

/// The largest `tokenizer.json`; the largest published ones have 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 128 << 20;
/// The largest of the small files beside it.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// No vocabulary has ids from here on.
const MAX_ID: u64 = 1 << 24;
/// How far the ids may outrun the number of tokens.
const MAX_GAP: u64 = 1 << 16;

/// A file's bytes, or `None` when there is no such file.
pub(super) fn read_limited(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::malformed(path, "", format!("the file has more than {limit} bytes")));
    }
    Ok(Some(bytes))
}

fn parse_json(path: &Path, bytes: &[u8]) -> Result<Json> {
    serde_json::from_slice(bytes).map_err(|error| {
        Error::malformed(path, format!("line {}, column {}", error.line(), error.column()), error.to_string())
    })
}

fn read_json(path: &Path) -> Result<Option<Json>> {
    read_limited(path, MAX_CONFIG_BYTES)?.map(|bytes| parse_json(path, &bytes)).transpose()
}

pub(super) fn from_folder(dir: &Path) -> Result<Tokenizer> {
    let path = dir.join("tokenizer.json");
    let Some(bytes) = read_limited(&path, MAX_TOKENIZER_BYTES)? else {
        return Err(Error::io("open", &path)(std::io::ErrorKind::NotFound.into()));
    };
    let config_path = dir.join("tokenizer_config.json");
    let mut config = read_json(&config_path)?.unwrap_or(Json::Null);
    if let Some(Json::Object(map)) = read_json(&dir.join("special_tokens_map.json"))? {
        if config.is_null() {
            config = Json::Object(serde_json::Map::new());
        }
        if let Json::Object(config) = &mut config {
            for (key, value) in map {
                config.entry(key).or_insert(value);
            }
        }
    }
    let mut tokenizer = build(&path, &bytes, &config_path, &config)?;
    let source_path = dir.join("chat_template.json");
    if let Some(Json::Object(map)) = read_json(&source_path)? {
        read_templates(&source_path, map.get("chat_template"), &mut tokenizer.templates)?;
    }
    let source_path = dir.join("chat_template.jinja");
    if let Some(bytes) = read_limited(&source_path, MAX_CONFIG_BYTES)? {
        let source = String::from_utf8(bytes)
            .map_err(|error| Error::malformed(&source_path, "", format!("not UTF-8: {error}")))?;
        tokenizer.templates.default = Some(source);
    }
    Ok(tokenizer)
}

pub(super) fn from_parts(
    tokenizer_json: &[u8],
    config_json: Option<&[u8]>,
    origin: &Path,
) -> Result<Tokenizer> {
    if tokenizer_json.len() as u64 > MAX_TOKENIZER_BYTES {
        let message = format!(
            "tokenizer.json has {} bytes, at most {MAX_TOKENIZER_BYTES} are read",
            tokenizer_json.len()
        );
        return Err(Error::malformed(origin, "", message));
    }
    let config = config_json.map(|bytes| parse_json(origin, bytes)).transpose()?.unwrap_or(Json::Null);
    build(origin, tokenizer_json, origin, &config)
}

fn build(path: &Path, bytes: &[u8], config_path: &Path, config: &Json) -> Result<Tokenizer> {
    check_ids(path, bytes)?;
    let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(bytes))
        .map_err(|message| Error::malformed(path, "", message))?;
    // Rows are cut and filled elsewhere; a file's own settings would change what `encode` means.
    inner.with_padding(None);
    guarded(|| inner.with_truncation(None).map(|_| ()))
        .map_err(|message| Error::malformed(path, "", message))?;
    // A template of special tokens that are not there shows itself only when it is used.
    guarded(|| inner.post_process(tokenizers::Encoding::default(), None, true).map(|_| ()))
        .map_err(|message| Error::malformed(path, "post_processor", message))?;
    add_missing_tokens(&mut inner, config_path, config)?;
    let vocabulary_size = inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
    check_span(path, vocabulary_size as u64, inner.get_vocab_size(true) as u64)?;
    let mut plain = inner.get_added_vocabulary().clone();
    plain.set_encode_special_tokens(true);
    inner.set_encode_special_tokens(false);
    let flag = |name: &str| config.get(name).map(|value| value.as_bool().unwrap_or(false));
    let document = match (flag("add_bos_token"), flag("add_eos_token")) {
        (None, None) => Document::PostProcessor,
        (bos, eos) => Document::Explicit { bos: bos.unwrap_or(false), eos: eos.unwrap_or(false) },
    };
    let mut templates = ChatTemplates::default();
    read_templates(config_path, config.get("chat_template"), &mut templates)?;
    let mut tokenizer = Tokenizer {
        byte_fallback: inner.token_to_id("<0x00>").is_some() && inner.token_to_id("<0xFF>").is_some(),
        inner,
        plain,
        vocabulary_size,
        document,
        bos: None,
        eos: None,
        pad: None,
        unknown: None,
        templates,
    };
    tokenizer.bos = role(&tokenizer, config_path, config, "bos_token")?;
    tokenizer.eos = role(&tokenizer, config_path, config, "eos_token")?;
    // A filling token that the vocabulary lacks is common in published files, and nothing depends on it.
    tokenizer.pad = role(&tokenizer, config_path, config, "pad_token").unwrap_or(None);
    tokenizer.unknown = role(&tokenizer, config_path, config, "unk_token").unwrap_or(None);
    Ok(tokenizer)
}

/// Runs code of the tokenizer library; its panics become messages.
pub(super) fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the tokenizer library panicked on this input".to_owned()),
    }
}

/// The text of a token given as a string or as a mapping with `content`.
fn token_content(value: &Json) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn role(tokenizer: &Tokenizer, path: &Path, config: &Json, name: &str) -> Result<Option<Role>> {
    let Some(text) = config.get(name).and_then(token_content) else { return Ok(None) };
    match tokenizer.token_id(text) {
        Some(id) => Ok(Some(Role { id, text: text.to_owned() })),
        None => Err(Error::malformed(
            path,
            name,
            format!("the token is `{text}`, which the vocabulary does not hold"),
        )),
    }
}

/// Tokens that `tokenizer_config.json` declares and `tokenizer.json` lacks.
fn add_missing_tokens(inner: &mut tokenizers::Tokenizer, path: &Path, config: &Json) -> Result<()> {
    let Some(Json::Object(declared)) = config.get("added_tokens_decoder") else { return Ok(()) };
    let mut missing = BTreeMap::new();
    for (id, token) in declared {
        let (Ok(id), Some(content)) = (id.parse::<u32>(), token_content(token)) else {
            return Err(Error::malformed(
                path,
                "added_tokens_decoder",
                format!("entry `{id}` is not a token"),
            ));
        };
        if inner.token_to_id(content).is_none() && !content.is_empty() {
            missing.insert(id, token);
        }
    }
    for (id, token) in missing {
        let flag = |name: &str, default: bool| token.get(name).and_then(Json::as_bool).unwrap_or(default);
        let special = flag("special", false);
        let content = token_content(token).unwrap_or_default();
        let added = AddedToken::from(content, special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special));
        guarded(|| Ok(inner.add_tokens(&[added]))).map_err(|message| Error::malformed(path, "", message))?;
        let given = inner.token_to_id(content);
        if given != Some(id) {
            let message = format!("token `{content}` has id {id}, but the next free id is {given:?}");
            return Err(Error::malformed(path, "added_tokens_decoder", message));
        }
    }
    Ok(())
}

fn read_templates(path: &Path, value: Option<&Json>, templates: &mut ChatTemplates) -> Result<()> {
    let wrong = || {
        let message = "must be a text, or a list of mappings with `name` and `template`";
        Err(Error::malformed(path, "chat_template", message))
    };
    match value {
        None | Some(Json::Null) => {}
        Some(Json::String(source)) => templates.default = Some(source.clone()),
        Some(Json::Array(list)) => {
            for entry in list {
                let field = |name: &str| entry.get(name).and_then(Json::as_str).map(str::to_owned);
                match (field("name"), field("template")) {
                    (Some(name), Some(source)) if name == "default" => templates.default = Some(source),
                    (Some(name), Some(source)) => templates.named.push((name, source)),
                    _ => return wrong(),
                }
            }
        }
        Some(_) => return wrong(),
    }
    Ok(())
}

/// The parts of `tokenizer.json` that decide how much memory its tables take.
#[derive(Deserialize)]
struct Probe {
    #[serde(default)]
    added_tokens: Vec<ProbeToken>,
    model: ProbeModel,
}

#[derive(Deserialize)]
struct ProbeToken {
    id: u64,
}

#[derive(Deserialize)]
struct ProbeModel {
    vocab: ProbeVocabulary,
}

/// How many entries a vocabulary has and its highest id.
struct ProbeVocabulary {
    count: u64,
    highest: u64,
}

impl<'de> Deserialize<'de> for ProbeVocabulary {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Count;
        impl<'de> Visitor<'de> for Count {
            type Value = ProbeVocabulary;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut probe = ProbeVocabulary { count: 0, highest: 0 };
                while let Some((_, id)) = map.next_entry::<IgnoredAny, u64>()? {
                    probe.count += 1;
                    probe.highest = probe.highest.max(id);
                }
                Ok(probe)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Self::Value, A::Error> {
                let mut count = 0;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(ProbeVocabulary { count, highest: count.saturating_sub(1) })
            }
        }
        deserializer.deserialize_any(Count)
    }
}

fn check_ids(path: &Path, bytes: &[u8]) -> Result<()> {
    let probe: Probe = serde_json::from_slice(bytes).map_err(|error| {
        Error::malformed(path, format!("line {}, column {}", error.line(), error.column()), error.to_string())
    })?;
    let added = probe.added_tokens.iter().map(|token| token.id).max().unwrap_or(0);
    let count = probe.model.vocab.count + probe.added_tokens.len() as u64;
    check_span(path, probe.model.vocab.highest.max(added).saturating_add(1), count)
}

fn check_span(path: &Path, span: u64, count: u64) -> Result<()> {
    if span > MAX_ID || span > 2 * count + MAX_GAP {
        let message = format!("the highest id is {}, for {count} tokens", span - 1);
        return Err(Error::malformed(path, "vocabulary", message));
    }
    Ok(())
}
