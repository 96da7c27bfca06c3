//! Every field of a configuration that moves the reference's logits moves this program's away from them, and every field
//! that the reference ignores is ignored.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]
#![allow(clippy::disallowed_methods)] // tests prepare files as they like

mod support;

use std::path::Path;

use pmetal::engine::Device;
use pmetal::eval::verify::verify_changed;
use rayon::prelude::*;
use serde_json::{Value, json};
use support::{copy, read_json};

/// What is done to a field of a configuration: a JSON pointer to it, and its new value or none to remove it.
struct Edit {
    pointer: String,
    value: Option<Value>,
}

/// Edits of a fixture's configuration that are made together.
struct Case {
    fixture: String,
    edits: Vec<Edit>,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:", self.fixture)?;
        for Edit { pointer, value } in &self.edits {
            match value {
                Some(value) => write!(f, " {pointer} = {value}")?,
                None => write!(f, " without {pointer}")?,
            }
        }
        Ok(())
    }
}

/// Edits that the generator of the fixtures has tried on the reference: those that move its logits ("matters"), or those
/// that leave them alone ("ignored").
fn tried(kind: &str) -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/config_edits.json");
    let mut cases = Vec::new();
    for (fixture, kinds) in read_json(&path).as_object().unwrap() {
        for edits in kinds[kind].as_array().unwrap() {
            let edits = edits.as_array().unwrap().iter().map(|edit| {
                let pointer = format!("/{}", edit["field"].as_str().unwrap().replace('.', "/"));
                Edit { pointer, value: edit.get("value").cloned() }
            });
            cases.push(Case { fixture: fixture.clone(), edits: edits.collect() });
        }
    }
    cases
}

/// Edits that the reference was not asked about, because they are finer than what it moves by.
fn finer() -> Vec<Case> {
    let edits = [
        ("llama2", "/rms_norm_eps", json!(0.2)),
        ("llama2-bias-head-dim", "/hidden_act", json!("gelu_pytorch_tanh")),
        ("llama31-rope", "/rope_scaling/factor", json!(9.0)),
        ("llama31-rope", "/rope_scaling/low_freq_factor", json!(1.6)),
        ("llama31-rope", "/rope_scaling/high_freq_factor", json!(3.0)),
        ("llama31-rope", "/rope_scaling/original_max_position_embeddings", json!(48)),
        ("llama-rope-dynamic", "/rope_scaling/factor", json!(2.2)),
        ("llama-rope-dynamic", "/max_position_embeddings", json!(24)),
        ("llama-rope-yarn-mscale", "/rope_parameters/mscale", json!(0.7)),
        ("llama-rope-yarn-mscale", "/rope_parameters/mscale_all_dim", Value::Null),
        ("llama-rope-yarn-no-truncate", "/rope_scaling/beta_slow", json!(1.0)),
        ("llama-rope-longrope", "/rope_scaling/original_max_position_embeddings", json!(60)),
        ("llama-rope-longrope-short", "/rope_parameters/short_factor/1", json!(2.0)),
        ("qwen2-layer-types", "/layer_types/1", json!("sliding_attention")),
    ];
    let case = |(fixture, pointer, value): (&str, &str, Value)| Case {
        fixture: fixture.to_owned(),
        edits: vec![Edit { pointer: pointer.to_owned(), value: Some(value) }],
    };
    edits.into_iter().map(case).collect()
}

fn edited(case: &Case) -> tempfile::TempDir {
    let target = copy(&case.fixture);
    let path = target.path().join("config.json");
    let mut config = read_json(&path);
    for Edit { pointer, value } in &case.edits {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        match (config.pointer_mut(parent).unwrap_or_else(|| panic!("{case} has no {parent}")), value) {
            (Value::Object(fields), Some(value)) => {
                fields.insert(key.to_owned(), value.clone());
            }
            (Value::Object(fields), None) => {
                fields.shift_remove(key).unwrap();
            }
            (Value::Array(list), Some(value)) => list[key.parse::<usize>().unwrap()] = value.clone(),
            (other, _) => panic!("{case}: {pointer} leads to {other}"),
        }
    }
    std::fs::write(&path, config.to_string()).unwrap();
    target
}

/// The cases for which `is_wrong` holds of the quantities that differ, or of why nothing was computed.
fn wrong_cases(
    cases: &[Case],
    is_wrong: impl Fn(&Result<Vec<String>, String>) -> bool + Sync,
) -> Vec<String> {
    let one = |case: &Case| {
        let report = verify_changed(edited(case).path(), &Device::cpu(), |_| {});
        let outcome = report.map_err(|error| error.to_string()).map(|report| {
            let missed = report.comparisons.into_iter().filter(|comparison| !comparison.passed);
            missed.map(|comparison| comparison.quantity).collect()
        });
        is_wrong(&outcome).then(|| format!("{case}: {outcome:?}"))
    };
    cases.par_iter().filter_map(one).collect()
}

#[test]
fn every_field_that_moves_the_reference_moves_this_program() {
    let cases: Vec<Case> = tried("matters").into_iter().chain(finer()).collect();
    assert!(cases.len() >= 200, "only {} edits are tried", cases.len());
    let unnoticed = wrong_cases(&cases, |outcome| outcome.as_ref().is_ok_and(Vec::is_empty));
    assert!(unnoticed.is_empty(), "{}", unnoticed.join("\n"));
    let refused = wrong_cases(&cases, Result::is_err);
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

#[test]
fn every_field_that_the_reference_ignores_is_ignored() {
    let cases = tried("ignored");
    assert!(cases.len() >= 50, "only {} edits are tried", cases.len());
    let noticed = wrong_cases(&cases, |outcome| !outcome.as_ref().is_ok_and(Vec::is_empty));
    assert!(noticed.is_empty(), "{}", noticed.join("\n"));
}
