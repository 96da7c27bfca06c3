//! Every template of `data/templates` against what `transformers` rendered.
#![allow(clippy::disallowed_methods)] // tests prepare files as they like
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use pmetal_formats::Error;
use pmetal_formats::chat_template::{ChatTemplate, RenderRequest, Rendered};
use serde_json::{Map, Value};

/// 2025-07-04 13:05:09, the moment of the goldens.
const NOW_UNIX_S: i64 = 1_751_634_309;

fn folder() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/templates"))
}

fn fnv(data: &[u8]) -> u64 {
    data.iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn render(template: &ChatTemplate, case: &Value) -> Result<Rendered, Error> {
    let mut variables = Map::new();
    for (name, text) in [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")] {
        variables.insert(name.to_owned(), text.into());
    }
    if let Some(Value::Object(given)) = case.get("variables") {
        variables.extend(given.clone());
    }
    let flag = |name: &str| case.get(name).and_then(Value::as_bool).unwrap_or(false);
    template.render(&RenderRequest {
        messages: &case["messages"],
        tools: case.get("tools"),
        documents: case.get("documents"),
        add_generation_prompt: flag("add_generation_prompt"),
        continue_final_message: flag("continue_final_message"),
        variables: &variables,
        now_unix_s: NOW_UNIX_S,
    })
}

/// The outcome in the notation of `expected.json`; texts of exceptions that the template did not word are left out.
fn outcome(template: &ChatTemplate, case: &Value) -> (String, String) {
    match render(template, case) {
        Ok(rendered) => {
            let mut row = format!("t:{:016x}:{}", fnv(rendered.text.as_bytes()), rendered.text.len());
            if !rendered.generation.is_empty() && case.get("continue_final_message").is_none() {
                let ranges: Vec<String> = rendered
                    .generation
                    .iter()
                    .map(|range| format!("{}-{}", range.start, range.end))
                    .collect();
                row = format!("{row}:{}", ranges.join(","));
            }
            (row, rendered.text)
        }
        Err(Error::TemplateRaised(message)) => (format!("r:{message}"), message),
        Err(error) => ("e:".to_owned(), error.to_string()),
    }
}

#[test]
fn every_template_renders_every_conversation_like_transformers() {
    let read = |name: &str| std::fs::read_to_string(folder().join(name)).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&read("cases.json")).unwrap();
    let expected: BTreeMap<String, Vec<String>> = serde_json::from_str(&read("expected.json")).unwrap();
    let dump = std::env::var_os("PMETAL_TEMPLATE_DUMP").map(PathBuf::from);
    let mut wrong = Vec::new();
    let mut texts = 0;
    for (name, rows) in &expected {
        assert_eq!(rows.len(), cases.len(), "{name}: expected.json is older than cases.json");
        let template = ChatTemplate::compile(&read(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (case, row) in cases.iter().zip(rows) {
            let row = if row.starts_with("e:") { "e:" } else { row };
            let (found, shown) = outcome(&template, case);
            texts += usize::from(found.starts_with("t:"));
            if found != row {
                let case = case["name"].as_str().unwrap();
                if let Some(dump) = &dump {
                    std::fs::create_dir_all(dump.join(name)).unwrap();
                    std::fs::write(dump.join(name).join(format!("{case}.txt")), &shown).unwrap();
                }
                wrong.push(format!("{name}, {case}: expected {row}, got {found}"));
            }
        }
    }
    assert!(texts > 5_000, "only {texts} texts were compared");
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}
