//! The parity fixtures notice every piece of mathematics that they are there for: each case below breaks one piece
//! through the configuration, and the comparison must fail.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]
#![allow(clippy::disallowed_methods)] // tests prepare files as they like

mod support;

use pmetal::engine::{DType, Device};
use pmetal::eval::verify::verify;
use serde_json::{Value, json};
use support::{copy, read_json};

/// What is done to a field: a JSON pointer to it, and its new value; null removes a scaling or a window.
type Mutation = (&'static str, &'static str, Value);

fn mutations() -> Vec<Mutation> {
    vec![
        ("llama2", "/rms_norm_eps", json!(0.2)),
        ("llama2-bias-head-dim", "/rope_parameters/rope_theta", json!(450.0)),
        ("llama2-bias-head-dim", "/hidden_act", json!("gelu_pytorch_tanh")),
        ("llama31-rope", "/rope_scaling", Value::Null),
        ("llama31-rope", "/rope_scaling/factor", json!(9.0)),
        ("llama31-rope", "/rope_scaling/low_freq_factor", json!(1.6)),
        ("llama31-rope", "/rope_scaling/high_freq_factor", json!(3.0)),
        ("llama31-rope", "/rope_scaling/original_max_position_embeddings", json!(48)),
        ("llama32-rope-tied", "/rope_parameters/factor", json!(8.0)),
        ("llama-rope-linear", "/rope_scaling", Value::Null),
        ("llama-rope-dynamic", "/rope_scaling", Value::Null),
        ("llama-rope-dynamic", "/rope_scaling/factor", json!(2.2)),
        ("llama-rope-dynamic", "/max_position_embeddings", json!(24)),
        ("llama-rope-yarn", "/rope_scaling", Value::Null),
        ("llama-rope-yarn", "/rope_scaling/attention_factor", json!(1.0)),
        ("llama-rope-yarn-mscale", "/rope_parameters/mscale", json!(0.7)),
        ("llama-rope-yarn-mscale", "/rope_parameters/mscale_all_dim", Value::Null),
        ("llama-rope-yarn-mscale", "/rope_parameters/beta_fast", json!(32.0)),
        ("llama-rope-yarn-no-truncate", "/rope_scaling/truncate", json!(true)),
        ("llama-rope-yarn-no-truncate", "/rope_scaling/beta_slow", json!(1.0)),
        ("llama-rope-longrope", "/rope_scaling/original_max_position_embeddings", json!(60)),
        ("llama-rope-longrope", "/rope_scaling/attention_factor", json!(1.0)),
        ("llama-rope-longrope-short", "/rope_parameters/short_factor/1", json!(2.0)),
        ("mistral-window", "/sliding_window", json!(8)),
        ("mistral-window", "/sliding_window", json!(6)),
        ("mistral-window", "/sliding_window", Value::Null),
        ("qwen2-window", "/max_window_layers", json!(2)),
        ("qwen2-window", "/use_sliding_window", json!(false)),
        ("qwen2-layer-types", "/layer_types/1", json!("sliding_attention")),
        ("qwen3", "/rms_norm_eps", json!(0.1)),
        ("qwen3-window", "/max_window_layers", json!(0)),
        ("qwen3-window", "/sliding_window", json!(6)),
    ]
}

fn mutated(fixture: &str, pointer: &str, value: &Value) -> tempfile::TempDir {
    let target = copy(fixture);
    let path = target.path().join("config.json");
    let mut config = read_json(&path);
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match config.pointer_mut(parent).unwrap_or_else(|| panic!("{fixture} has no {parent}")) {
        Value::Object(fields) => {
            fields.insert(key.to_owned(), value.clone());
        }
        Value::Array(list) => list[key.parse::<usize>().unwrap()] = value.clone(),
        other => panic!("{fixture}: {pointer} leads to {other}"),
    }
    std::fs::write(&path, config.to_string()).unwrap();
    target
}

#[test]
fn every_broken_piece_of_mathematics_is_noticed() {
    let mut unnoticed = Vec::new();
    for (fixture, pointer, value) in mutations() {
        let folder = mutated(fixture, pointer, &value);
        let report = verify(folder.path(), &Device::cpu(), DType::F32).unwrap();
        let missed = report.comparisons.iter().filter(|comparison| !comparison.passed).count();
        if missed == 0 {
            unnoticed.push(format!("{fixture} {pointer} = {value}"));
        }
    }
    assert!(unnoticed.is_empty(), "{}", unnoticed.join("\n"));
}
