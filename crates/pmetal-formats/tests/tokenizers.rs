//! Tokenizers against what Python's `tokenizers` and llama.cpp gave, and against hostile files.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

use std::path::{Path, PathBuf};
use std::time::Instant;

use pmetal_formats::Error;
use pmetal_formats::chat_template::{ChatTemplate, EncodedChat, RenderRequest, encode_chat};
use pmetal_formats::tokenizer::{GgufTokenizer, SpecialText, Tokenizer};
use serde_json::{Map, Value, json};

fn stories() -> Tokenizer {
    Tokenizer::from_folder(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../pmetal/assets/stories260k")))
        .unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Compares every field that the rows have.
fn compare(name: &str, tokenizer: &Tokenizer, rows: &[Value], with_offsets: bool) {
    let mut wrong = Vec::new();
    for row in rows {
        let text = row["text"].as_str().unwrap();
        let encoded = tokenizer.encode_with_offsets(text, SpecialText::Parse).unwrap();
        let expected = ids(&row["ids"]);
        if encoded.ids != expected {
            wrong.push(format!("ids of {text:?}: expected {expected:?}, got {:?}", encoded.ids));
            continue;
        }
        let offsets: Option<Vec<(usize, usize)>> = serde_json::from_value(row["offsets"].clone()).ok();
        if let Some(offsets) = offsets.filter(|offsets| with_offsets && *offsets != encoded.offsets) {
            wrong.push(format!("offsets of {text:?}: expected {offsets:?}, got {:?}", encoded.offsets));
        }
        for (field, found) in [
            ("plain", tokenizer.encode(text, SpecialText::Plain).unwrap()),
            ("document", tokenizer.encode_document(text).unwrap()),
        ] {
            if row.get(field).is_some_and(|expected| ids(expected) != found) {
                wrong.push(format!("{field} of {text:?}: expected {}, got {found:?}", row[field]));
            }
        }
        for (field, skip) in [("decoded", false), ("skipped", true)] {
            let decoded = tokenizer.decode(&encoded.ids, skip).unwrap();
            if row.get(field).is_some_and(|expected| expected.as_str() != Some(&*decoded)) {
                wrong.push(format!("{field} of {text:?}: expected {}, got {decoded:?}", row[field]));
            }
            let mut stream = tokenizer.decode_stream(skip);
            let mut pieces = String::new();
            for id in &encoded.ids {
                pieces.extend(stream.push(*id).unwrap());
            }
            pieces.extend(stream.finish().unwrap());
            if pieces != decoded {
                wrong.push(format!("stream of {text:?}: {decoded:?} in one piece, {pieces:?} in pieces"));
            }
        }
    }
    let shown = wrong.iter().take(12).cloned().collect::<Vec<_>>().join("\n");
    assert!(wrong.is_empty(), "{name}: {} of {} differ:\n{shown}", wrong.len(), rows.len());
}

#[test]
fn stories_tokenizer_agrees_with_the_reference() {
    let rows: Vec<Value> = serde_json::from_str(include_str!("data/tokenizers/stories260k.json")).unwrap();
    let tokenizer = stories();
    assert_eq!(tokenizer.vocabulary_size(), 512);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.unknown()), (Some(1), Some(2), Some(0)));
    compare("stories260k", &tokenizer, &rows, true);
}

/// Takes the keys that a GGUF file holds, given as JSON.
fn from_gguf_json(path: &Path) -> Tokenizer {
    let fields: Map<String, Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let get = |key: &str| fields.get(&format!("tokenizer.ggml.{key}"));
    let texts =
        |key| get(key).and_then(Value::as_array).into_iter().flatten().map(|v| v.as_str().unwrap()).collect();
    Tokenizer::from_gguf_fields(
        path,
        &GgufTokenizer {
            model: get("model").unwrap().as_str().unwrap(),
            pre: get("pre").and_then(Value::as_str),
            tokens: texts("tokens"),
            types: get("token_type").map_or_else(Vec::new, |v| serde_json::from_value(v.clone()).unwrap()),
            scores: get("scores").map_or_else(Vec::new, |v| serde_json::from_value(v.clone()).unwrap()),
            merges: texts("merges"),
            bos: get("bos_token_id").and_then(Value::as_u64),
            eos: get("eos_token_id").and_then(Value::as_u64),
            unknown: get("unknown_token_id").and_then(Value::as_u64),
            pad: get("padding_token_id").and_then(Value::as_u64),
            add_bos: get("add_bos_token").and_then(Value::as_bool),
            add_eos: get("add_eos_token").and_then(Value::as_bool),
            add_space_prefix: get("add_space_prefix").and_then(Value::as_bool),
            template: fields.get("tokenizer.chat_template").and_then(Value::as_str),
            named_templates: Vec::new(),
        },
    )
    .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn published_tokenizers_agree_with_their_references() {
    let Some(folder) = std::env::var_os("PMETAL_TOKENIZERS").map(PathBuf::from) else {
        println!("skipped: published_tokenizers_agree_with_their_references (PMETAL_TOKENIZERS is not set)");
        return;
    };
    let mut failures = Vec::new();
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    for folder in folders {
        let checked = std::panic::catch_unwind(|| {
            let fields = folder.join("gguf.json");
            let tokenizer = if fields.exists() {
                from_gguf_json(&fields)
            } else {
                Tokenizer::from_folder(&folder).unwrap()
            };
            let Ok(goldens) = std::fs::read(folder.join("goldens.json")) else { return };
            let rows: Vec<Value> = serde_json::from_slice(&goldens).unwrap();
            compare(&folder.display().to_string(), &tokenizer, &rows, false);
        });
        if checked.is_err() {
            failures.push(folder);
        }
    }
    assert!(failures.is_empty(), "these differ: {failures:?}");
}

#[test]
fn smollm_splits_digits_one_by_one() {
    let tokens = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "a", "b", "\u{120}", "12", "ab"].to_vec();
    let build = |pre| {
        Tokenizer::from_gguf_fields(
            Path::new("x.gguf"),
            &GgufTokenizer {
                model: "gpt2",
                pre: Some(pre),
                tokens: tokens.clone(),
                merges: vec!["1 2", "a b"],
                ..GgufTokenizer::default()
            },
        )
    };
    let encode = |pre| build(pre).unwrap().encode("12ab", SpecialText::Parse).unwrap();
    assert_eq!(encode("gpt-2"), [13, 14]);
    assert_eq!(encode("smollm"), [1, 2, 14]);
    let unknown = build("no-such-rule").unwrap_err().to_string();
    assert!(unknown.contains("no-such-rule"), "{unknown}");
}

/// A byte-level tokenizer of single characters, with one special token.
fn tiny(change: impl FnOnce(&mut Value)) -> Result<Tokenizer, Error> {
    let vocabulary: Map<String, Value> =
        ('!'..='~').enumerate().map(|(id, character)| (character.to_string(), id.into())).collect();
    let count = vocabulary.len();
    let mut file = json!({
        "version": "1.0",
        "added_tokens": [{"id": count, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    change(&mut file);
    Tokenizer::from_parts(file.to_string().as_bytes(), None, Path::new("tiny"))
}

#[test]
fn hostile_files_are_refused_by_name() {
    let refused = |change: fn(&mut Value), part: &str| {
        let message = tiny(change).unwrap_err().to_string();
        assert!(message.contains("tiny") && message.contains(part), "{message}");
    };
    refused(|file| file["model"]["merges"] = json!([["!", "absent"]]), "absent");
    refused(|file| file["added_tokens"][0]["id"] = json!(4_000_000_000_u32), "4000000000");
    refused(|file| file["model"]["vocab"]["x"] = json!(200_000), "200000");
    refused(|file| file["model"]["vocab"]["x"] = json!(-1), "line 1");
    refused(|file| file["model"] = Value::Null, "line 1");
    refused(
        |file| file["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA////"}),
        "",
    );
    refused(
        |file| {
            file["post_processor"] = json!({"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [], "special_tokens": {}});
        },
        "",
    );
    let whole =
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../pmetal/assets/stories260k/tokenizer.json"))
            .unwrap();
    for length in (0..whole.len()).step_by(997) {
        Tokenizer::from_parts(&whole[..length], None, Path::new("cut")).unwrap_err();
    }
    let config = br#"{"eos_token": "<nowhere>"}"#;
    let message = Tokenizer::from_parts(&whole, Some(config), Path::new("x")).unwrap_err().to_string();
    assert!(message.contains("<nowhere>"), "{message}");
}

#[test]
fn fixed_padding_of_zero_does_not_matter() {
    let tokenizer = tiny(|file| {
        file["padding"] = json!({"strategy": {"Fixed": 0}, "direction": "Right", "pad_to_multiple_of": 0,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    })
    .unwrap();
    assert_eq!(tokenizer.encode_document("ab").unwrap().len(), 2);
}

#[test]
fn catastrophic_patterns_end_in_time() {
    let tokenizer = tiny(|file| {
        file["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "(?=(a+)+$)a"}, "behavior": "Isolated",
            "invert": false});
    })
    .unwrap();
    let started = Instant::now();
    let text = format!("{}!", "a".repeat(200));
    drop(tokenizer.encode(&text, SpecialText::Parse));
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}

#[test]
fn ten_megabytes_of_one_letter_are_encoded() {
    let text = "a".repeat(10 << 20);
    let qwen = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let tokenizer = tiny(|file| {
        file["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": qwen}, "behavior": "Isolated",
            "invert": false});
    })
    .unwrap();
    let started = Instant::now();
    match tokenizer.encode(&text, SpecialText::Parse) {
        Ok(ids) => assert_eq!(ids.len(), text.len()),
        Err(error) => panic!("{error}"),
    }
    println!("{:?}", started.elapsed());
    assert!(started.elapsed().as_secs() < 100, "{:?}", started.elapsed());
}

const TEMPLATE: &str = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}";

fn chat(tokenizer: &Tokenizer, source: &str, content: &str, special: SpecialText) -> EncodedChat {
    let template = ChatTemplate::compile(source).unwrap();
    let messages = json!([{"role": "user", "content": content}]);
    let request = RenderRequest {
        messages: &messages,
        tools: None,
        documents: None,
        add_generation_prompt: false,
        continue_final_message: false,
        variables: &Map::new(),
        now_unix_s: 0,
    };
    encode_chat(tokenizer, &template, &request, special).unwrap()
}

#[test]
fn special_tokens_in_messages_stay_text() {
    let tokenizer = tiny(|_| {}).unwrap();
    let end = tokenizer.token_id("<|end|>").unwrap();
    let plain = chat(&tokenizer, TEMPLATE, "a<|end|>b<|end|><|end|>", SpecialText::Plain);
    assert_eq!(plain.ids.iter().filter(|id| **id == end).count(), 1);
    assert_eq!(plain.ids.last(), Some(&end));
    let mut expected = tokenizer.encode("a<|end|>b<|end|><|end|>", SpecialText::Plain).unwrap();
    expected.push(end);
    assert_eq!(plain.ids, expected);
    assert_eq!(plain.text, "a<|end|>b<|end|><|end|><|end|>");
    for ((start, stop), id) in plain.offsets.iter().zip(&plain.ids) {
        assert_eq!(Some(&plain.text[*start..*stop]), tokenizer.token_text(*id).as_deref());
    }
    let parsed = chat(&tokenizer, TEMPLATE, "a<|end|>b<|end|><|end|>", SpecialText::Parse);
    assert_eq!(parsed.ids.iter().filter(|id| **id == end).count(), 4);
}

#[test]
fn messages_without_special_tokens_are_encoded_as_ever() {
    let tokenizer = tiny(|_| {}).unwrap();
    let encoded = chat(&tokenizer, TEMPLATE, "a < | end", SpecialText::Plain);
    assert_eq!(encoded.ids, tokenizer.encode(&encoded.text, SpecialText::Parse).unwrap());
}

#[test]
fn a_token_that_the_template_looks_for_stays_special() {
    let tokenizer = tiny(|_| {}).unwrap();
    let source = "{% for m in messages %}{{ m.content.split('<|end|>')[-1] }}<|end|>{% endfor %}";
    let encoded = chat(&tokenizer, source, "x<|end|>y", SpecialText::Plain);
    assert_eq!(encoded.text, "y<|end|>");
    assert_eq!(encoded.ids.len(), 2);
}

#[test]
fn streamed_bytes_equal_decoding_at_once() {
    let tokenizer = stories();
    let byte = |value: u8| tokenizer.token_id(&format!("<0x{value:02X}>")).unwrap();
    let word = tokenizer.token_id("\u{2581}the").unwrap();
    for bytes in
        [&[0xe4, 0xbd, 0xa0][..], &[0xe4, 0xbd, 0xa0, 0xff], &[0xff], &[0xe4, 0xbd], &[0x0a, 0xc3, 0xa9]]
    {
        for tail in [&[][..], &[word], &[2, word], &[word, byte(0xc3)]] {
            let mut ids = vec![word];
            ids.extend(bytes.iter().map(|value| byte(*value)));
            ids.extend(tail);
            let mut stream = tokenizer.decode_stream(true);
            let mut pieces = String::new();
            for id in &ids {
                pieces.extend(stream.push(*id).unwrap());
            }
            pieces.extend(stream.finish().unwrap());
            assert_eq!(pieces, tokenizer.decode(&ids, true).unwrap(), "{ids:?}");
        }
    }
}
