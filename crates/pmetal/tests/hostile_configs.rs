//! A configuration that cannot be honoured, or that the tensors contradict, is an error naming the field or tensor.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]
#![allow(clippy::disallowed_methods)] // tests prepare files as they like

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use pmetal::core::{ModelSource, OpenedModel};
use pmetal::models::families;
use serde_json::{Value, json};
use support::{Stored, copy, load, read_json, read_tensors, write_tensors};

/// Loads a folder and returns the message of the error, which must come at once.
fn refusal(folder: &Path) -> String {
    let start = Instant::now();
    let message = load(folder).map(|_| ()).unwrap_err().to_string();
    assert!(start.elapsed() < Duration::from_secs(5), "{message}");
    message
}

/// A fixture whose configuration is changed again and again.
struct Case {
    folder: tempfile::TempDir,
    config: Value,
}

impl Case {
    fn new(fixture: &str) -> Self {
        let folder = copy(fixture);
        let config = read_json(&folder.path().join("config.json"));
        Self { folder, config }
    }

    fn write(&self, config: &Value) {
        std::fs::write(self.folder.path().join("config.json"), config.to_string()).unwrap();
    }

    #[track_caller]
    fn refused(&self, config: &Value, expected: &str) {
        self.write(config);
        let message = refusal(self.folder.path());
        assert!(message.contains(expected), "expected `{expected}`: {message}");
    }

    /// Refuses the configuration with one field set.
    #[track_caller]
    fn with(&self, field: &str, value: Value, expected: &str) {
        let mut config = self.config.clone();
        config[field] = value;
        self.refused(&config, expected);
    }

    /// Refuses the configuration with one field removed.
    #[track_caller]
    fn without(&self, field: &str, expected: &str) {
        let mut config = self.config.clone();
        config.as_object_mut().unwrap().remove(field).unwrap();
        self.refused(&config, expected);
    }
}

#[test]
fn the_copy_of_a_fixture_loads_as_it_is() {
    for name in ["llama2", "qwen2-tied", "llama31-rope"] {
        load(Case::new(name).folder.path()).unwrap();
    }
}

#[test]
fn sizes_must_be_whole_numbers_in_range() {
    let case = Case::new("llama2");
    for field in
        ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
    {
        case.without(field, &format!("`{field}` is missing"));
        case.with(field, Value::Null, &format!("`{field}` is missing"));
        for value in
            [json!(0), json!(-1), json!(1.5), json!(u64::MAX), json!(1e300), json!("32"), json!([32])]
        {
            case.with(field, value, &format!("config.json: `{field}` is "));
        }
        for value in [json!(true), json!({}), json!(2_147_483_648_u64), json!(i64::MIN)] {
            case.with(field, value, &format!("config.json: `{field}` is "));
        }
    }
    for field in ["num_key_value_heads", "head_dim", "max_position_embeddings"] {
        for value in [json!(0), json!(-4), json!("4"), json!(0.5)] {
            case.with(field, value, &format!("config.json: `{field}` is "));
        }
    }
}

#[test]
fn whole_numbers_may_be_written_as_floats() {
    let case = Case::new("llama2");
    let mut config = case.config.clone();
    config["hidden_size"] = json!(32.0);
    case.write(&config);
    load(case.folder.path()).unwrap();
}

#[test]
fn huge_sizes_are_compared_with_the_file_before_anything_is_allocated() {
    let case = Case::new("llama2");
    case.with(
        "num_hidden_layers",
        json!(1_000_000_000),
        "`num_hidden_layers` is 1000000000, the limit is 10000",
    );
    case.with(
        "num_hidden_layers",
        json!(10_000),
        "tensor `model.layers.2.self_attn.q_proj.weight` [32, 32] is missing",
    );
    case.with("num_hidden_layers", json!(1), "tensor `model.layers.1.input_layernorm.weight` is not used");
    let largest = (1_u64 << 31) - 1;
    case.with("vocab_size", json!(largest), "has shape [64, 32], the config needs [2147483647, 32]");
    case.with(
        "intermediate_size",
        json!(largest),
        "gate_proj.weight` has shape [40, 32], the config needs [2147483647, 32]",
    );
    let mut config = case.config.clone();
    for field in
        ["hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"]
    {
        config[field] = json!(largest);
    }
    config["head_dim"] = json!(largest - 1);
    case.refused(&config, "has shape");
}

#[test]
fn heads_must_divide_evenly() {
    let case = Case::new("llama2");
    case.with(
        "num_key_value_heads",
        json!(3),
        "`num_attention_heads` is 4, not a multiple of `num_key_value_heads`, which is 3",
    );
    case.with("num_key_value_heads", json!(8), "`num_attention_heads` is 4, not a multiple");
    case.with(
        "num_attention_heads",
        json!(12),
        "`hidden_size` is 32, not a multiple of `num_attention_heads`, which is 12",
    );
    case.with(
        "num_key_value_heads",
        json!(2),
        "k_proj.weight` has shape [32, 32], the config needs [16, 32]",
    );
    case.with("head_dim", json!(7), "rotary width 7 of head width 7");
    case.with("head_dim", json!(16), "q_proj.weight` has shape [32, 32], the config needs [64, 32]");
}

#[test]
fn numbers_must_be_finite_in_f32() {
    let case = Case::new("llama2");
    for value in
        [json!(0), json!(-1e-5), json!("1e-5"), json!(true), json!([1e-5]), json!(1e300), json!(1e-300)]
    {
        case.with("rms_norm_eps", value.clone(), "`rms_norm_eps` is ");
        case.with("rope_theta", value, "`rope_theta` is ");
    }
    case.with("rope_theta", json!(1.0), "`rope_theta` is 1, it must be above one");
    let path = case.folder.path().join("config.json");
    for text in ["NaN", "Infinity", "-Infinity", "1e999"] {
        let config = case.config.to_string().replace("0.00001", text);
        assert!(config.contains(text), "{config}");
        std::fs::write(&path, config).unwrap();
        let message = refusal(case.folder.path());
        assert!(message.contains("config.json`, line 1, column"), "{message}");
    }
}

#[test]
fn fields_of_other_types_are_refused() {
    let case = Case::new("llama2");
    for field in ["tie_word_embeddings", "attention_bias", "mlp_bias"] {
        for value in [json!("false"), json!(0), json!([])] {
            case.with(field, value, &format!("`{field}` is "));
        }
    }
    case.with("hidden_act", json!(1), "`hidden_act` is 1");
    case.with("hidden_act", json!("relu"), "`hidden_act` is `relu`");
    case.with("pad_token_id", json!(64), "`pad_token_id` is 64, the vocabulary has 64 tokens");
    case.with("pad_token_id", json!(-65), "`pad_token_id` is -65");
    case.with("pad_token_id", json!("0"), "`pad_token_id` is \"0\"");
    for value in [json!([]), json!("x"), json!(null), json!(3)] {
        case.write(&value);
        let message = refusal(case.folder.path());
        assert!(message.contains("config.json: expected an object"), "{message}");
    }
}

#[test]
fn unknown_fields_that_may_change_the_model_are_refused() {
    let case = Case::new("llama2");
    for (field, value, expected) in [
        ("rope_thetta", json!(5), "field `rope_thetta` is 5, which is not known and may change the model"),
        ("rope_thetta", json!(5), "(did you mean `rope_theta`?)"),
        ("attn_logit_softcapping", json!(50.0), "field `attn_logit_softcapping` is 50.0"),
        ("pretraining_tp", json!("two"), "field `pretraining_tp` is \"two\""),
        ("use_mrope", json!(true), "field `use_mrope` is true"),
        ("rope_interleaved", json!(true), "field `rope_interleaved` is true"),
        ("scale_embeddings", json!(false), "field `scale_embeddings` is false"),
        ("sliding_window", json!(8), "field `sliding_window` is 8"),
        ("qkv_bias", json!(1), "field `qkv_bias` is 1"),
        ("quantization_config", json!({ "bits": 4 }), "field `quantization_config` is {\"bits\":4}"),
    ] {
        case.with(field, value, expected);
    }
    let mut config = case.config.clone();
    (0..9).for_each(|index| config[format!("zz{index}")] = json!("x".repeat(1000)));
    case.refused(&config, "; and 4 more");
    for (field, value) in [
        ("attn_logit_softcapping", Value::Null),
        ("mlp_only_layers", json!([])),
        ("task_specific_params", json!({ "a": 1 })),
        ("pretraining_tp", json!(2)),
        ("use_mrope", json!(false)),
        ("for_llm_compressor", json!(false)),
        ("layer_types", json!(["full_attention", "full_attention"])),
        ("use_sliding_window", json!(false)),
        ("qkv_bias", json!(false)),
        ("_name_or_path", json!("somewhere")),
    ] {
        let mut config = case.config.clone();
        config[field] = value;
        case.write(&config);
        load(case.folder.path()).unwrap();
    }
}

#[test]
fn released_configurations_are_understood() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/assets/configs");
    let Ok(entries) = std::fs::read_dir(folder) else {
        return println!("skipped: released_configurations_are_understood");
    };
    let mut understood = 0;
    for path in entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        let config = pmetal::models::Config::new(read_json(&path)).unwrap();
        let is_ours = |kind: &str| families::FAMILIES.iter().any(|family| family.model_type == kind);
        if config.model_type().is_ok_and(is_ours) {
            families::read(&config).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            understood += 1;
        }
    }
    assert!(understood >= 13, "only {understood} configurations were read");
}

#[test]
fn model_types_are_looked_up_exactly() {
    let case = Case::new("llama2");
    case.without("model_type", "`model_type` is missing");
    for value in ["Llama", "llama5", "llama ", "", "qwen", "../llama"] {
        case.with("model_type", json!(value), &format!("model_type `{value}` is not one of cohere, cohere2"));
    }
    case.with("model_type", json!(["llama"]), "`model_type` is [\"llama\"], expected a string");
}

#[test]
fn rope_scaling_must_be_known_and_complete() {
    let case = Case::new("llama2");
    let scaling = |value: Value, expected: &str| {
        case.with("rope_scaling", value.clone(), expected);
        case.with("rope_parameters", value, expected);
    };
    scaling(json!("linear"), "\"linear\", expected an object");
    scaling(json!([1]), "expected an object");
    scaling(json!({ "rope_type": "spiral" }), "rope type `spiral` is not one of default, linear");
    scaling(json!({ "type": "ntk" }), "rope type `ntk` is not one of");
    scaling(json!({ "rope_type": 3 }), "`rope_type` is 3, expected a string");
    for kind in ["linear", "dynamic", "llama3"] {
        scaling(json!({ "rope_type": kind }), &format!("rope type `{kind}` needs `factor`"));
    }
    for factor in [json!(0), json!(-2), json!("8"), json!(null), json!(1e300)] {
        let expected = if factor.is_null() { "needs `factor`" } else { "`factor` is " };
        scaling(json!({ "rope_type": "linear", "factor": factor }), expected);
    }
    let llama3 = |field: &str| {
        let mut fields = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        });
        fields.as_object_mut().unwrap().remove(field).unwrap();
        fields
    };
    for field in ["factor", "low_freq_factor", "high_freq_factor"] {
        scaling(llama3(field), &format!("rope type `llama3` needs `{field}`"));
    }
    let yarn = |field: &str, value: Value| {
        let mut fields =
            json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32 });
        fields[field] = value;
        fields
    };
    for field in ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"]
    {
        scaling(yarn(field, json!(-1)), &format!("`{field}` is -1"));
        scaling(yarn(field, json!("x")), &format!("`{field}` is \"x\""));
    }
    scaling(yarn("truncate", json!("no")), "`truncate` is \"no\"");
}

#[test]
fn rope_lists_must_have_one_number_for_each_pair() {
    let case = Case::new("llama2");
    let longrope = |short: Value, long: Value| {
        json!({
            "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32,
            "short_factor": short, "long_factor": long,
        })
    };
    let good = || json!([1.0, 1.0, 1.0, 1.0]);
    let scaling = |value: Value, expected: &str| case.with("rope_scaling", value, expected);
    scaling(longrope(json!([1.0]), good()), "`short_factor` has 1 entries, the rotary width needs 4");
    scaling(longrope(good(), json!([])), "`long_factor` has 0 entries");
    scaling(longrope(good(), json!([1, 2, 3, 4, 5])), "`long_factor` has 5 entries");
    scaling(longrope(good(), json!([1, 2, 3, 0])), "`long_factor` is 0");
    scaling(longrope(good(), json!([1, 2, 3, "4"])), "`long_factor` is \"4\"");
    scaling(longrope(json!(1.0), good()), "`short_factor` is 1.0, expected a list");
    scaling(longrope(Value::Null, good()), "rope type `longrope` needs `short_factor`");
    case.with("rope_frequency_factors", json!([1.0]), "`rope_frequency_factors` has 1 entries");
    let mut config = case.config.clone();
    config["rope_scaling"] = longrope(good(), good());
    case.write(&config);
    load(case.folder.path()).unwrap();
}

#[test]
fn windows_and_layer_types_are_checked() {
    let case = Case::new("qwen2-layer-types");
    case.with("layer_types", json!(["full_attention"]), "`layer_types` has 1 entries for");
    case.with("layer_types", json!("full_attention"), "expected a list");
    let layers = case.config["num_hidden_layers"].as_u64().unwrap() as usize;
    case.with(
        "layer_types",
        json!(vec!["linear_attention"; layers]),
        "`layer_types` holds `linear_attention` for layer 0",
    );
    case.with("layer_types", json!(vec![1; layers]), "`layer_types` is 1");
    case.with("sliding_window", json!(0), "`sliding_window` is 0");
    case.with("sliding_window", json!(-5), "`sliding_window` is -5");
    case.with("use_sliding_window", json!("yes"), "`use_sliding_window` is \"yes\"");
    case.with("max_window_layers", json!(-1), "`max_window_layers` is -1");
    case.with("max_window_layers", json!("1"), "`max_window_layers` is \"1\"");
}

#[test]
fn a_config_that_goes_on_for_ever_is_refused() {
    let case = Case::new("llama2");
    let path = case.folder.path().join("config.json");
    std::fs::write(&path, format!("{{\"auto_map\":{}", "[".repeat(1 << 18))).unwrap();
    assert!(refusal(case.folder.path()).contains("recursion limit"));
    std::fs::write(&path, " ".repeat(17 << 20)).unwrap();
    assert!(refusal(case.folder.path()).contains("longer than"));
    std::fs::remove_file(&path).unwrap();
    assert!(refusal(case.folder.path()).contains("the model has no config.json"));
    let missing = ModelSource::Path(case.folder.path().join("absent"));
    let message = OpenedModel::open(&missing).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("there is no model at"), "{message}");
}

#[test]
fn every_dropped_renamed_or_reshaped_tensor_is_named() {
    for (name, file) in [
        ("llama2", "model.safetensors"),
        ("llama2-bias-head-dim", "model.safetensors"),
        ("qwen2-tied", "model.safetensors"),
        ("qwen3", "model.safetensors"),
        ("mistral-window", "model.safetensors"),
    ] {
        let folder = copy(name);
        let path = folder.path().join(file);
        let whole = read_tensors(&path);
        for tensor in whole.keys() {
            let mut tensors = whole.clone();
            let taken = tensors.remove(tensor).unwrap();
            let check = |tensors: &support::Tensors, expected: &[String]| {
                write_tensors(&path, tensors);
                let message = refusal(folder.path());
                for part in expected {
                    assert!(message.contains(part), "{name}: expected `{part}`: {message}");
                }
            };
            check(&tensors, &[format!("tensor `{tensor}` {:?} is missing", taken.shape)]);
            tensors.insert(format!("{tensor}2"), taken.clone());
            let unused = format!("tensor `{tensor}2` is not used by model type");
            check(&tensors, &[format!("tensor `{tensor}` {:?} is missing", taken.shape), unused]);
            tensors.remove(&format!("{tensor}2"));
            let mut flat = vec![taken.shape.iter().product()];
            if flat == taken.shape {
                flat.push(1);
            }
            let reversed: Vec<usize> = taken.shape.iter().rev().copied().collect();
            for shape in [flat, reversed].into_iter().filter(|shape| *shape != taken.shape) {
                let message =
                    format!("tensor `{tensor}` has shape {shape:?}, the config needs {:?}", taken.shape);
                tensors.insert(tensor.clone(), Stored { shape, ..taken.clone() });
                check(&tensors, &[message]);
            }
        }
        write_tensors(&path, &whole);
        load(folder.path()).unwrap();
    }
}

#[test]
fn a_leftover_tensor_is_named() {
    let folder = copy("llama2");
    let path = folder.path().join("model.safetensors");
    let whole = read_tensors(&path);
    for extra in ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "extra"] {
        let mut tensors = whole.clone();
        tensors.insert(extra.to_owned(), tensors["model.norm.weight"].clone());
        write_tensors(&path, &tensors);
        let message = refusal(folder.path());
        assert!(
            message.contains(&format!("tensor `{extra}` is not used by model type `llama`")),
            "{message}"
        );
    }
}

#[test]
fn tensors_that_hold_no_floats_are_named() {
    let folder = copy("llama2");
    let path = folder.path().join("model.safetensors");
    let whole = read_tensors(&path);
    for tensor in ["model.norm.weight", "lm_head.weight"] {
        let mut tensors = whole.clone();
        let stored = tensors.get_mut(tensor).unwrap();
        stored.dtype = pmetal_formats::DType::I16;
        write_tensors(&path, &tensors);
        let message = refusal(folder.path());
        assert!(message.contains(&format!("tensor `{tensor}`: I16 has no conversion to f32")), "{message}");
    }
}
