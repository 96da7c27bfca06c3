//! Adapter configurations, held against what PEFT 0.21 makes of them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

use std::collections::BTreeMap;
use std::path::Path;

use pmetal_formats::adapter::{
    AdapterConfig, InitLoraWeights, LoraHalf, LoraShape, ModuleNames, modules_of, parameter_depth,
    parameter_tensor_name, parse_tensor_name, tensor_name,
};
use pmetal_formats::safetensors::SafetensorsFile;
use serde_json::{Value, json};

const GOLDENS: &str = include_str!("data/peft_targets.json");

fn parse(value: &Value) -> Result<AdapterConfig, String> {
    AdapterConfig::parse(Path::new("adapter_config.json"), value.to_string().as_bytes())
        .map_err(|error| error.to_string())
}

fn plain() -> Value {
    let goldens: Value = serde_json::from_str(GOLDENS).unwrap();
    serde_json::from_str(goldens["plain_file"].as_str().unwrap()).unwrap()
}

fn with(field: &str, value: Value) -> Value {
    let mut config = plain();
    config[field] = value;
    config
}

#[track_caller]
fn assert_refused(config: &Value, parts: &[&str]) {
    let message = parse(config).unwrap_err();
    for part in parts {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn targets_ranks_and_scales_equal_those_of_peft() {
    let goldens: Value = serde_json::from_str(GOLDENS).unwrap();
    let linear = goldens["linear_modules"].as_array().unwrap();
    let cases = goldens["cases"].as_array().unwrap();
    assert!(cases.len() > 20);
    for case in cases {
        let config = parse(&case["config"]).unwrap();
        let matcher = config.matcher().unwrap();
        let mut found = 0;
        for module in linear {
            let name = module["name"].as_str().unwrap();
            let shape = matcher.target(name, true, module["output_head"].as_bool().unwrap());
            let expected = case["modules"].get(name);
            let seen = shape.map(|shape| (shape.rank as f64, shape.alpha, shape.scale));
            let number = |field: &str| expected.and_then(|module| module[field].as_f64());
            let wanted =
                number("rank").map(|rank| (rank, number("alpha").unwrap(), number("scale").unwrap()));
            assert_eq!(seen, wanted, "{name} of {}", case["config"]);
            found += usize::from(seen.is_some());
        }
        assert_eq!(found, case["modules"].as_object().unwrap().len(), "{}", case["config"]);
    }
}

/// Rank, alpha and scale as the goldens have them.
fn numbers(value: &Value) -> (f64, f64, f64) {
    let number = |field: &str| value[field].as_f64().unwrap();
    (number("rank"), number("alpha"), number("scale"))
}

fn of_shape(shape: LoraShape) -> (f64, f64, f64) {
    (shape.rank as f64, shape.alpha, shape.scale)
}

#[test]
fn targeted_parameters_and_the_names_of_their_tensors_equal_those_of_peft() {
    let goldens: Value = serde_json::from_str(GOLDENS).unwrap();
    let names: Vec<&str> =
        goldens["parameters"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let linear = goldens["stacked_linear_modules"].as_array().unwrap();
    let cases = goldens["parameter_cases"].as_array().unwrap();
    assert!(cases.len() > 15);
    for case in cases {
        let config = parse(&case["config"]).unwrap();
        let matcher = config.matcher().unwrap();
        let mut tensors = Vec::new();
        for name in &names {
            let (seen, wanted) = (matcher.parameter(name), case["parameters"].get(name));
            assert_eq!(seen.map(of_shape), wanted.map(numbers), "{name} of {}", case["config"]);
            let Some(wanted) = wanted else { continue };
            let (module, depth) =
                (wanted["module"].as_str().unwrap(), wanted["depth"].as_u64().unwrap() as usize);
            // The parameters of a module that are declared later lie further out.
            let later = names.iter().skip_while(|other| *other != name).skip(1).filter(|other| {
                other.rsplit_once('.').is_some_and(|(path, _)| path == module)
                    && matcher.parameter(other).is_some()
            });
            assert_eq!(later.count(), depth, "{name} of {}", case["config"]);
            for (half, written) in
                [LoraHalf::A, LoraHalf::B].into_iter().zip(wanted["names"].as_array().unwrap())
            {
                let tensor = parameter_tensor_name(module, depth, half);
                assert_eq!(tensor, written.as_str().unwrap());
                let (found, found_half) = parse_tensor_name(&tensor).unwrap();
                assert_eq!((parameter_depth(found), found_half), ((module, depth), half));
                tensors.push(tensor);
            }
        }
        assert_eq!(tensors.len(), 2 * case["parameters"].as_object().unwrap().len(), "{}", case["config"]);
        assert_eq!(modules_of("f", tensors.iter().map(String::as_str)).unwrap().len(), tensors.len() / 2);
        for module in linear {
            let name = module["name"].as_str().unwrap();
            let seen = matcher.target(name, true, module["output_head"].as_bool().unwrap());
            let wanted = case["modules"].get(name).map(numbers);
            assert_eq!(seen.map(of_shape), wanted, "{name} of {}", case["config"]);
        }
    }
}

#[test]
fn adapters_of_fixtures_have_the_tensors_of_their_parameters() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures"));
    let mut seen = 0;
    for fixture in std::fs::read_dir(folder).into_iter().flatten() {
        let adapter = fixture.unwrap().path().join("adapter");
        let Ok(config) = AdapterConfig::open(&adapter.join("adapter_config.json")) else { continue };
        if config.target_parameters.is_empty() {
            continue;
        }
        let matcher = config.matcher().unwrap();
        let file = SafetensorsFile::open(&adapter.join("adapter_model.safetensors")).unwrap();
        let modules = modules_of(file.path(), file.tensors().iter().map(|info| info.name.as_str())).unwrap();
        let mut depths = BTreeMap::<&str, Vec<usize>>::new();
        for module in modules.into_iter().filter(|module| matcher.target(module, true, false).is_none()) {
            let (path, depth) = parameter_depth(module);
            depths.entry(path).or_default().push(depth);
        }
        assert!(!depths.is_empty(), "{}", adapter.display());
        for (path, mut depths) in depths {
            // In the order of their declaration; what chooses experts has one.
            let own: &[&str] =
                if path.ends_with("experts") { &["gate_up_proj", "down_proj"] } else { &["weight"] };
            let declared: Vec<String> = own.iter().map(|name| format!("{path}.{name}")).collect();
            let targeted: Vec<&String> =
                declared.iter().filter(|name| matcher.parameter(name).is_some()).collect();
            depths.sort_unstable();
            assert_eq!(depths, (0..targeted.len()).collect::<Vec<_>>(), "{path} of {}", adapter.display());
            for (later, name) in targeted.iter().rev().enumerate() {
                let [a, b] = [LoraHalf::A, LoraHalf::B]
                    .map(|half| file.info(&parameter_tensor_name(path, later, half)).unwrap().shape.clone());
                assert_eq!(a[0], b[1], "{name}");
                assert_eq!(a[0] % matcher.parameter(name).unwrap().rank, 0, "{name}");
                seen += 1;
            }
        }
    }
    if seen == 0 {
        println!("skipped: adapters_of_fixtures_have_the_tensors_of_their_parameters");
    }
}

#[test]
fn parameters_need_something_to_target_and_no_dropout() {
    let mut config = with("target_parameters", json!(["mlp.experts.gate_up_proj"]));
    config["target_modules"] = json!([]);
    assert!(parse(&config).is_ok());
    config["lora_dropout"] = json!(0.1);
    assert_refused(&config, &["lora_dropout", "0.1", "target_parameters"]);
    config["target_parameters"] = json!([]);
    assert_refused(&config, &["target_modules", "empty list", "target_parameters"]);
    config["target_parameters"] = json!(null);
    assert_refused(&config, &["target_modules", "empty list", "target_parameters"]);
    config["target_modules"] = json!(["q_proj"]);
    assert!(parse(&config).is_ok());
    let mut config = AdapterConfig::new(8, 16.0, ModuleNames::List(Vec::new()));
    assert!(config.check().is_err());
    config.target_parameters.push("experts.down_proj".to_owned());
    assert!(config.check().is_ok());
}

#[test]
fn depths_of_parameters_are_read_from_the_end_of_a_module() {
    for (module, expected) in [
        ("a.experts", ("a.experts", 0)),
        ("a.experts.base_layer", ("a.experts", 1)),
        ("a.experts.base_layer.base_layer", ("a.experts", 2)),
        ("a.base_layer.experts", ("a.base_layer.experts", 0)),
        ("a.my_base_layer", ("a.my_base_layer", 0)),
        (".base_layer", (".base_layer", 0)),
        ("", ("", 0)),
    ] {
        assert_eq!(parameter_depth(module), expected);
    }
}

#[test]
fn written_file_is_the_one_that_peft_writes() {
    let goldens: Value = serde_json::from_str(GOLDENS).unwrap();
    let mut config = AdapterConfig::new(8, 16.0, ModuleNames::List(vec!["q_proj".to_owned()]));
    assert_eq!(config.to_json(), goldens["plain_file"].as_str().unwrap());
    config.task_type = None;
    assert!(config.to_json().contains("\"task_type\": null"));
    let mut config = AdapterConfig::new(8, 16.0, ModuleNames::List(Vec::new()));
    config.target_parameters =
        vec!["mlp.experts.gate_up_proj".to_owned(), "mlp.experts.down_proj".to_owned()];
    assert_eq!(config.to_json(), goldens["parameter_file"].as_str().unwrap());
}

#[test]
fn every_configuration_is_written_as_it_was_read() {
    let goldens: Value = serde_json::from_str(GOLDENS).unwrap();
    let cases = ["cases", "parameter_cases"].map(|list| goldens[list].as_array().unwrap());
    for case in cases.into_iter().flatten() {
        let config = parse(&case["config"]).unwrap();
        let again = AdapterConfig::parse(Path::new("again"), config.to_json().as_bytes()).unwrap();
        assert_eq!(config, again);
    }
}

#[test]
fn every_field_of_peft_has_a_policy() {
    let goldens: Value = serde_json::from_str(GOLDENS).unwrap();
    let written: Value =
        serde_json::from_str(&AdapterConfig::new(8, 16.0, ModuleNames::AllLinear).to_json()).unwrap();
    let mut written: Vec<&str> = written.as_object().unwrap().keys().map(String::as_str).collect();
    written.sort_unstable();
    let fields: Vec<&str> =
        goldens["fields"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(fields, written);
    for field in fields {
        // A value that no field has by default must be honoured, named in a refusal, or known to be without effect.
        let without_effect = [
            "auto_mapping",
            "peft_version",
            "megatron_core",
            "qalora_group_size",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
        ];
        let outcome = parse(&with(field, json!({"unheard": ["of"]})));
        match outcome {
            Ok(_) => assert!(without_effect.contains(&field), "{field} was ignored"),
            Err(message) => assert!(message.contains(field), "{field}: {message}"),
        }
    }
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (field, value) in [
        ("peft_type", json!("ADALORA")),
        ("peft_type", json!(null)),
        ("bias", json!("all")),
        ("bias", json!("lora_only")),
        ("task_type", json!("SEQ_CLS")),
        ("use_dora", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("lora_bias", json!(true)),
        ("use_qalora", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("target_parameters", json!("mlp.experts.gate_up_proj")),
        ("target_parameters", json!(["mlp.experts.gate_up_proj", 1])),
        ("target_parameters", json!({"mlp.experts.gate_up_proj": 1})),
        ("target_parameters", json!(vec!["x"; 16_385])),
        ("trainable_token_indices", json!([1, 2])),
        ("layer_replication", json!([[0, 4], [2, 5]])),
        ("megatron_config", json!({"a": 1})),
        ("alora_invocation_tokens", json!([1])),
        ("ensure_weight_tying", json!(true)),
        ("use_bdlora", json!({"nblocks": 2})),
        ("arrow_config", json!({"top_k": 3})),
        ("kasa_config", json!({"beta": 1})),
        ("velora_config", json!({"a": 1})),
        ("monteclora_config", json!({"a": 1})),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("olora")),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("a_field_of_tomorrow", json!(null)),
        ("target_modules", json!(null)),
        ("target_modules", json!([])),
        ("target_modules", json!([1])),
        ("r", json!(0)),
        ("r", json!(-8)),
        ("r", json!(1.5)),
        ("r", json!(1u64 << 40)),
        ("r", json!("8")),
        ("lora_alpha", json!("16")),
        ("lora_dropout", json!(1.0)),
        ("lora_dropout", json!(-0.1)),
        ("rank_pattern", json!({"q_proj": 0})),
        ("rank_pattern", json!(["q_proj"])),
        ("alpha_pattern", json!({"q_proj": "x"})),
        ("layers_to_transform", json!([-1])),
        ("layers_pattern", json!("layers")),
    ] {
        assert_refused(&with(field, value), &[field]);
    }
}

#[test]
fn layers_to_transform_needs_a_list_of_targets() {
    let mut config = with("layers_to_transform", json!([1]));
    config["target_modules"] = json!(".*q_proj");
    assert_refused(&config, &["layers_to_transform", "list"]);
}

#[test]
fn patterns_are_checked_and_capped() {
    assert_refused(
        &with("target_modules", json!("(q_proj")),
        &["target_modules", "(q_proj", "unclosed group"],
    );
    assert_refused(&with("target_modules", json!("a)|(b")), &["target_modules"]);
    assert_refused(&with("target_modules", json!("(?!visual).*q_proj")), &["target_modules", "look-around"]);
    assert_refused(&with("target_modules", json!("q".repeat(20_000))), &["target_modules", "20000", "16384"]);
    assert_refused(&with("rank_pattern", json!({"q{1000}{1000}": 4})), &["rank_pattern"]);
    assert_refused(&with("exclude_modules", json!("[")), &["exclude_modules"]);
}

#[test]
fn pattern_that_blows_up_elsewhere_is_answered_at_once() {
    let config = parse(&with("target_modules", json!("(a+)+$"))).unwrap();
    let start = std::time::Instant::now();
    assert_eq!(config.target(&format!("{}b", "a".repeat(100_000))).unwrap(), None);
    assert!(start.elapsed().as_secs() < 5);
}

#[test]
fn broken_json_is_refused_with_its_place() {
    for (bytes, part) in [
        (&b"{\"r\": 8,\n \"r\": 9}"[..], "line 2"),
        (b"{\"peft_type\": ", "line 1"),
        (b"[]", "object"),
        (b"\xff", "line 1"),
        (b"", "line 1"),
    ] {
        let message = AdapterConfig::parse(Path::new("a.json"), bytes).unwrap_err().to_string();
        assert!(message.contains(part) && message.contains("a.json"), "{message}");
    }
}

#[test]
fn initialisations_are_read() {
    for (value, expected) in [
        (json!(true), InitLoraWeights::Kaiming),
        (json!(null), InitLoraWeights::Kaiming),
        (json!(false), InitLoraWeights::Random),
        (json!("gaussian"), InitLoraWeights::Gaussian),
    ] {
        assert_eq!(parse(&with("init_lora_weights", value)).unwrap().init_lora_weights, expected);
    }
}

#[test]
fn tensor_names_are_made_and_understood() {
    let module = "model.layers.0.self_attn.q_proj";
    let name = tensor_name(module, LoraHalf::B);
    assert_eq!(name, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight");
    assert_eq!(parse_tensor_name(&name), Some((module, LoraHalf::B)));
    assert_eq!(parse_tensor_name("base_model.model.lora_A.weight"), None);
    assert_eq!(parse_tensor_name("model.q_proj.lora_A.weight"), None);
    assert_eq!(parse_tensor_name("base_model.model.q_proj.lora_embedding_A"), None);
    let a = tensor_name(module, LoraHalf::A);
    assert_eq!(modules_of("f", [a.as_str(), name.as_str()]).unwrap(), [module]);
    let message = modules_of("f", [a.as_str()]).unwrap_err().to_string();
    assert!(message.contains(&name), "{message}");
    let message = modules_of("f", ["base_model.model.q.lora_magnitude_vector"]).unwrap_err().to_string();
    assert!(message.contains("lora_magnitude_vector"), "{message}");
}

proptest::proptest! {
    #[test]
    fn arbitrary_values_never_panic(
        target in "[a-z.*+?()\\[\\]{}|\\\\0-9]{0,20}",
        rank in proptest::num::i64::ANY,
        bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..80),
        name in "([a-z.]{0,4}|(\\.base_layer){1,3}){0,3}",
    ) {
        let _ = AdapterConfig::parse(Path::new("a"), &bytes);
        let mut config = with("target_modules", json!(target));
        config["r"] = json!(rank);
        config["rank_pattern"] = json!({target.as_str(): rank});
        config["target_parameters"] = json!([target, name]);
        if let Ok(config) = parse(&config) {
            let _ = config.target("model.layers.0.q_proj");
            let matcher = config.matcher().unwrap();
                proptest::prop_assert!(matcher.parameter(&name).is_some());
            let deeper = format!("{target}{name}");
            proptest::prop_assert_eq!(
                matcher.parameter(&deeper).is_some(),
                deeper == target || deeper.ends_with(&format!(".{target}")) || deeper == name
                    || deeper.ends_with(&format!(".{name}"))
            );
        }
        let (path, depth) = parameter_depth(&name);
        proptest::prop_assert_eq!(format!("{path}{}", ".base_layer".repeat(depth)), name.as_str());
        let tensor = parameter_tensor_name(&name, depth % 3, LoraHalf::A);
        proptest::prop_assert!(name.is_empty() && depth % 3 == 0 || parse_tensor_name(&tensor).is_some());
    }
}
