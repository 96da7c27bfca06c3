//! Adapter folders: what does not fit the model is named, and a merge equals the adapter.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]
#![allow(clippy::disallowed_methods)] // tests prepare files as they like

mod support;

use std::collections::BTreeSet;
use std::path::Path;

use pmetal::core::ModelSource;
use pmetal::lora::{self, CONFIG_FILE, WEIGHTS_FILE, fuse};
use pmetal_formats::DType;
use pmetal_formats::adapter::{AdapterConfig, ModuleNames, modules_of};
use pmetal_formats::checkpoint::Checkpoint;
use serde_json::{Value, json};
use support::{
    Stored, Tensors, copy, copy_files, fixture, load, logits, read_json, read_tensors, write_tensors,
};

/// A copy of the adapter of `llama2`, with both of its files in memory.
struct Adapter {
    folder: tempfile::TempDir,
    config: Value,
    tensors: Tensors,
}

impl Adapter {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy_files(&fixture("llama2/adapter"), folder.path());
        let config = read_json(&folder.path().join(CONFIG_FILE));
        let tensors = read_tensors(&folder.path().join(WEIGHTS_FILE));
        Self { folder, config, tensors }
    }

    fn write(&self, config: &Value, tensors: &Tensors) {
        std::fs::write(self.folder.path().join(CONFIG_FILE), config.to_string()).unwrap();
        write_tensors(&self.folder.path().join(WEIGHTS_FILE), tensors);
    }

    fn refusal(&self) -> String {
        let mut decoder = load(&fixture("llama2")).unwrap().decoder;
        let message =
            lora::load(&mut decoder, self.folder.path(), false).map(|_| ()).unwrap_err().to_string();
        assert!(decoder.linears().iter().all(|(_, linear)| linear.lora.is_none()));
        message
    }

    #[track_caller]
    fn refused(&self, config: &Value, tensors: &Tensors, expected: &str) {
        self.write(config, tensors);
        let message = self.refusal();
        assert!(message.contains(expected), "expected `{expected}`: {message}");
    }

    #[track_caller]
    fn with(&self, field: &str, value: Value, expected: &str) {
        let mut config = self.config.clone();
        config[field] = value;
        self.refused(&config, &self.tensors, expected);
    }
}

const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

#[test]
fn configurations_that_are_not_honoured_are_refused_by_field() {
    let adapter = Adapter::new();
    for kind in [json!("LOHA"), json!("lora"), json!(3), json!("IA3")] {
        adapter.with("peft_type", kind, "`peft_type` is ");
    }
    adapter.with("peft_type", Value::Null, "`peft_type` is missing");
    adapter.with("r", json!(0), "`r` is 0, a rank is between 1 and");
    adapter.with("r", json!(-3), "`r` must be a positive whole number");
    adapter.with("r", json!(1_u64 << 40), "`r` is 1099511627776");
    adapter.with("lora_alpha", json!("5"), "`lora_alpha` must be a number");
    adapter.with("use_dora", json!(true), "`use_dora` is true, which is not supported");
    adapter.with("modules_to_save", json!(["lm_head"]), "`modules_to_save`");
    adapter.with("fan_in_fan_out", json!(true), "`fan_in_fan_out` is true");
    adapter.with("bias", json!("all"), "`bias` is \"all\"");
    adapter.with("new_field", json!(1), "the field `new_field`");
    adapter.with("target_modules", json!("(a+"), "target_modules");
    adapter.with("target_modules", json!([]), "`target_modules` is an empty list");
    std::fs::write(adapter.folder.path().join(CONFIG_FILE), "{").unwrap();
    assert!(adapter.refusal().contains(CONFIG_FILE));
    std::fs::remove_file(adapter.folder.path().join(CONFIG_FILE)).unwrap();
    assert!(adapter.refusal().contains(CONFIG_FILE));
}

#[test]
fn patterns_cannot_blow_up() {
    let adapter = Adapter::new();
    let start = std::time::Instant::now();
    adapter.with("target_modules", json!("(a+)+$|(.*)*x{1000}{1000}"), "target_modules");
    adapter.with(
        "target_modules",
        json!("(((m|o|d|e|l|\\.)*)*)*!"),
        "match none of the model's linear layers",
    );
    let many: serde_json::Map<String, Value> =
        (0..10_000).map(|index| (format!("layer{index}x"), json!(2))).collect();
    let mut config = adapter.config.clone();
    config["rank_pattern"] = Value::Object(many);
    adapter.write(&config, &adapter.tensors);
    let mut decoder = load(&fixture("llama2")).unwrap().decoder;
    lora::load(&mut decoder, adapter.folder.path(), false).unwrap();
    let many: serde_json::Map<String, Value> =
        (0..300).map(|index| (format!("[{index}]+"), json!(2))).collect();
    adapter.with("rank_pattern", Value::Object(many), "`rank_pattern` has 300 entries that are patterns");
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

#[test]
fn plain_names_in_rank_patterns_mean_the_ends_of_modules() {
    let adapter = Adapter::new();
    let expected = format!("tensor `{A}` has shape [3, 32], expected [2, 32]");
    for key in
        ["q_proj", "self_attn.q_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn...proj"]
    {
        adapter.with("rank_pattern", json!({ key: 2 }), &expected);
    }
    let mut config = adapter.config.clone();
    for key in ["proj", "_proj", "attn.q_proj", "0.self_attn.q_pro", "x.model.layers.0.self_attn.q_proj", "."]
    {
        config["rank_pattern"] = json!({ key: 2 });
        adapter.write(&config, &adapter.tensors);
        let mut decoder = load(&fixture("llama2")).unwrap().decoder;
        lora::load(&mut decoder, adapter.folder.path(), false).unwrap();
    }
}

#[test]
fn ranks_must_be_those_of_the_tensors() {
    let adapter = Adapter::new();
    adapter.with("r", json!(4), &format!("tensor `{A}` has shape [3, 32], expected [4, 32]"));
    adapter.with("r", json!(4), &format!("tensor `{B}` has shape [32, 3], expected [32, 4]"));
    adapter.with(
        "rank_pattern",
        json!({ "q_proj": 2 }),
        &format!("tensor `{A}` has shape [3, 32], expected [2, 32]"),
    );
    let mut tensors = adapter.tensors.clone();
    let b = tensors[B].clone();
    tensors.insert(B.to_owned(), Stored { shape: vec![3, 32], ..b });
    adapter.refused(&adapter.config, &tensors, &format!("tensor `{B}` has shape [3, 32], expected [32, 3]"));
}

#[test]
fn every_missing_and_extra_tensor_is_named() {
    let adapter = Adapter::new();
    for name in adapter.tensors.keys() {
        let mut tensors = adapter.tensors.clone();
        let taken = tensors.remove(name).unwrap();
        adapter.refused(&adapter.config, &tensors, &format!("tensor `{name}` {:?} is missing", taken.shape));
        tensors.insert(format!("{name}x"), taken);
        adapter.refused(
            &adapter.config,
            &tensors,
            &format!("tensor `{name}x` belongs to no targeted module"),
        );
    }
    for extra in [
        A.replace("layers.0", "layers.2"),
        A.replace("self_attn.q_proj", "lm_head"),
        A.replace("q_proj", "Q_proj"),
    ] {
        let mut tensors = adapter.tensors.clone();
        tensors.insert(extra.clone(), tensors[A].clone());
        adapter.refused(
            &adapter.config,
            &tensors,
            &format!("tensor `{extra}` belongs to no targeted module"),
        );
    }
    adapter.with("target_modules", json!(["q_proj", "v_proj"]), "belongs to no targeted module");
    let mut config = adapter.config.clone();
    config["target_modules"] = json!(["query"]);
    adapter.refused(&config, &Tensors::new(), "match none of the model's linear layers");
    let mut tensors = adapter.tensors.clone();
    tensors.get_mut(A).unwrap().dtype = DType::I32;
    adapter.refused(&adapter.config, &tensors, &format!("tensor `{A}`: I32 has no conversion to f32"));
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let mut decoder = load(&fixture("qwen3")).unwrap().decoder;
    let message =
        lora::load(&mut decoder, &fixture("llama2/adapter"), false).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("has shape") && message.contains("lora_A"), "{message}");
}

#[test]
fn an_adapter_of_pickles_is_refused() {
    let adapter = Adapter::new();
    let weights = adapter.folder.path().join(WEIGHTS_FILE);
    std::fs::write(&weights, b"\x80\x02}q\x00.aaaaaaaaaaaaaaaa").unwrap();
    assert!(adapter.refusal().contains("pickle"));
    std::fs::remove_file(&weights).unwrap();
    assert!(adapter.refusal().contains(WEIGHTS_FILE));
}

fn fuse_refusal(model: &Path, adapter: &Path) -> String {
    let output = tempfile::tempdir().unwrap();
    let target = output.path().join("fused");
    let message = fuse::fuse(&ModelSource::Path(model.to_path_buf()), adapter, &target)
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert_eq!(std::fs::read_dir(output.path()).unwrap().count(), 0, "nothing stays behind: {message}");
    message
}

#[test]
fn a_merge_that_is_not_finite_is_refused() {
    let adapter = Adapter::new();
    for (name, value) in [(A, f32::NAN), (B, f32::INFINITY), (B, f32::NEG_INFINITY)] {
        let mut tensors = adapter.tensors.clone();
        let stored = tensors.get_mut(name).unwrap();
        assert_eq!(stored.dtype, DType::F32);
        stored.bytes[8..12].copy_from_slice(&value.to_le_bytes());
        adapter.write(&adapter.config, &tensors);
        let message = fuse_refusal(&fixture("llama2"), adapter.folder.path());
        let expected = format!("the adapter of `model.layers.0.self_attn.q_proj` holds {value}");
        assert!(message.contains(&expected), "{message}");
    }
    // Finite, but beyond what the f16 of the base model can hold.
    let mut tensors = adapter.tensors.clone();
    for name in [A, B] {
        let huge = 1e4_f32.to_le_bytes();
        tensors.get_mut(name).unwrap().bytes.chunks_exact_mut(4).for_each(|raw| raw.copy_from_slice(&huge));
    }
    adapter.write(&adapter.config, &tensors);
    let message = fuse_refusal(&fixture("llama2"), adapter.folder.path());
    assert!(message.contains("tensor `model.layers.0.self_attn.q_proj.weight` would hold"), "{message}");
    assert!(message.contains("which F16 cannot carry"), "{message}");
}

#[test]
fn a_merge_into_something_that_exists_is_refused() {
    let output = tempfile::tempdir().unwrap();
    let model = ModelSource::Path(fixture("llama2"));
    let message = fuse::fuse(&model, &fixture("llama2/adapter"), output.path()).unwrap_err().to_string();
    assert!(message.contains("exists already"), "{message}");
    let folder = copy("llama2");
    std::fs::remove_dir_all(folder.path().join("adapter")).unwrap();
    assert!(fuse_refusal(folder.path(), &folder.path().join("adapter")).contains(CONFIG_FILE));
}

#[test]
fn adapters_of_experts_are_written_as_peft_wrote_them() {
    for name in
        ["mixtral", "mixtral-window", "qwen3-moe-sparse-step", "gpt-oss", "llama4-text", "deepseek-v3"]
    {
        let folder = fixture(name);
        let mut decoder = load(&folder).unwrap().decoder;
        lora::load(&mut decoder, &folder.join("adapter"), true).unwrap();
        let stored = read_tensors(&folder.join("adapter").join(WEIGHTS_FILE));
        let written = lora::tensors(&decoder).unwrap();
        assert!(!decoder.expert_linears().is_empty(), "{name}");
        assert_eq!(written.len(), stored.len(), "{name}");
        for (tensor, values) in written {
            let wanted = &stored[&tensor];
            let bytes: Vec<u8> = values.to_f32_vec().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!((values.shape(), &bytes), (&wanted.shape[..], &wanted.bytes), "{name}: {tensor}");
        }
    }
}

/// What the tensors of a text model's adapters begin with, alone and inside whole models.
const PLACES: [&str; 3] = ["model.layers.", "language_model.model.layers.", "model.language_model.layers."];

/// The folder with the tensors of its adapter renamed from wherever they are to a place.
fn moved_to(place: &str, folder: &Path) -> tempfile::TempDir {
    let moved = tempfile::tempdir().unwrap();
    copy_files(&folder.join("adapter"), moved.path());
    let tensors = read_tensors(&moved.path().join(WEIGHTS_FILE)).into_iter().map(|(name, stored)| {
        let path = name.strip_prefix("base_model.model.").unwrap();
        let rest = PLACES.iter().find_map(|place| path.strip_prefix(place)).unwrap();
        (format!("base_model.model.{place}{rest}"), stored)
    });
    write_tensors(&moved.path().join(WEIGHTS_FILE), &tensors.collect());
    moved
}

#[test]
fn adapters_of_text_models_are_read_wherever_whole_models_have_these() {
    // By experts and by linear layers.
    for name in ["gemma3", "llama4-multimodal", "qwen3-5-multimodal"] {
        let folder = fixture(name);
        let logits_with = |adapter: &Path| {
            let mut decoder = load(&folder).unwrap().decoder;
            lora::load(&mut decoder, adapter, false).unwrap();
            logits(&decoder)
        };
        let expected = logits_with(&folder.join("adapter"));
        for place in PLACES {
            let moved = moved_to(place, &folder);
            assert_eq!(logits_with(moved.path()), expected, "{name} at {place}");
        }
    }
}

#[test]
fn adapters_inside_multimodal_folders_are_written_for_the_causal_language_model_of_the_folder() {
    // Where transformers makes the text model of a folder, adapters are named as if it were alone; Gemma 3 stays whole.
    let folders = [
        ("gemma3", 2),
        ("gemma3-new-layout", 2),
        ("llama4-multimodal", 0),
        ("qwen3-5-multimodal", 0),
        ("qwen3-5-moe-multimodal", 0),
    ];
    for (name, place) in folders {
        let folder = fixture(name);
        let mut decoder = load(&folder).unwrap().decoder;
        let config = lora::load(&mut decoder, &folder.join("adapter"), true).unwrap();
        let moved = moved_to(PLACES[place], &folder);
        let wanted = read_tensors(&moved.path().join(WEIGHTS_FILE));
        let written = lora::tensors(&decoder).unwrap();
        assert!(written.iter().all(|(tensor, _)| wanted.contains_key(tensor)), "{name}");
        assert_eq!(written.len(), wanted.len(), "{name}");
        let written = lora::config_to_write(&decoder, &config).unwrap();
        for (module, linear) in decoder.linears() {
            let path = module.replacen("model.layers.", PLACES[place], 1);
            let shape = written.target(&path).unwrap();
            let ranks = linear.lora.as_ref().map(|lora| (lora.a.shape()[0], lora.scale));
            assert_eq!(shape.map(|shape| (shape.rank, shape.scale as f32)), ranks, "{name}: {module}");
        }
        let matcher = written.matcher().unwrap();
        for (parameter, linear) in decoder.expert_linears() {
            assert_eq!(matcher.parameter(parameter).is_some(), linear.lora.is_some(), "{name}: {parameter}");
        }
        // Layers of the vision tower have the same names.
        let vision = "model.vision_tower.encoder.layers.0.self_attn.q_proj";
        assert!(place == 0 || written.target(vision).unwrap().is_none(), "{name}");
    }
}

#[test]
fn all_linear_layers_are_written_by_their_names() {
    // PEFT would add Llama 4's router.
    let config = AdapterConfig::all_linear(2, 6.0);
    for (name, count) in [("llama4-multimodal", 7), ("qwen3", 7), ("qwen3-5-text", 12), ("gemma3", 14)] {
        let mut decoder = load(&fixture(name)).unwrap().decoder;
        lora::attach(&mut decoder, &config, 0).unwrap();
        let written = lora::config_to_write(&decoder, &config).unwrap();
        let ModuleNames::List(names) = &written.target_modules else { panic!("{name}") };
        assert_eq!(names.len(), count, "{name}: {names:?}");
        assert_eq!(written.target("model.layers.0.feed_forward.router").unwrap(), None, "{name}");
    }
}

#[test]
fn a_written_configuration_names_layers_of_whole_models_with_their_own_ranks() {
    let mut config = AdapterConfig::new(2, 6.0, ModuleNames::List(vec!["q_proj".into(), "up_proj".into()]));
    config.layers_to_transform = Some(vec![1]);
    config.rank_pattern = vec![("layers.1.mlp.up_proj".into(), 3)];
    config.alpha_pattern = vec![("q_proj".into(), 5.0)];
    let mut decoder = load(&fixture("gemma3")).unwrap().decoder;
    lora::attach(&mut decoder, &config, 0).unwrap();
    let written = lora::config_to_write(&decoder, &config).unwrap();
    let [query, up] =
        ["self_attn.q_proj", "mlp.up_proj"].map(|end| format!("model.language_model.layers.1.{end}"));
    assert_eq!(written.target_modules, ModuleNames::List(vec![query.clone(), up.clone()]));
    assert_eq!(written.rank_pattern, [(up, 3)]);
    assert_eq!(written.alpha_pattern, [(query, 5.0)]);
    assert_eq!((written.layers_to_transform, written.exclude_modules), (None, None));
}

/// Largest difference as a share of the second list's standard deviation.
fn share(values: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(values.len(), wanted.len());
    let mean = wanted.iter().map(|&value| f64::from(value)).sum::<f64>() / wanted.len() as f64;
    let variance =
        wanted.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum::<f64>() / wanted.len() as f64;
    let largest = values.iter().zip(wanted).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
    largest.fold(0.0, |one: f64, other| if other.is_nan() { other } else { one.max(other) }) / variance.sqrt()
}

/// Merges a fixture's adapter, and compares the result with the adapter on its base model and with the formula.
fn fused_equals_adapter(name: &str, dtype: DType, value_share: f64, rounding: f64) {
    let base = fixture(name);
    let mut decoder = load(&base).unwrap().decoder;
    let without = logits(&decoder);
    lora::load(&mut decoder, &base.join("adapter"), false).unwrap();
    let wanted = logits(&decoder);
    let output = tempfile::tempdir().unwrap();
    let target = output.path().join("fused");
    let report = fuse::fuse(&ModelSource::Path(base.clone()), &base.join("adapter"), &target).unwrap();
    let error = share(&logits(&load(&target).unwrap().decoder), &wanted);
    let effect = share(&without, &wanted);
    println!("{name}: error {error:.2e}, effect of the adapter {effect:.2e}");
    assert!(error <= value_share, "{name}: {error}");
    assert!(effect > 10.0 * value_share, "{name}: the adapter changes too little to be seen: {effect}");

    let (before, after) = (Checkpoint::open(&base).unwrap(), Checkpoint::open(&target).unwrap());
    let names: Vec<&str> = before.names().collect();
    assert_eq!(names, after.names().collect::<Vec<_>>());
    let adapter = read_tensors(&base.join("adapter").join(WEIGHTS_FILE));
    let targeted: BTreeSet<&str> =
        modules_of("adapter", adapter.keys().map(String::as_str)).unwrap().into_iter().collect();
    assert_eq!((report.tensors, report.changed_tensors), (names.len(), targeted.len()));
    let linears = shapes(&before, &targeted);
    let of = lora::Adaptable { linears, routers: Vec::new(), matrices: Vec::new() };
    let parts = lora::read(&base.join("adapter"), &of).unwrap().linears;
    for name in names {
        let (one, other) = (before.info(name).unwrap(), after.info(name).unwrap());
        assert_eq!((one.dtype, &one.shape), (other.dtype, &other.shape));
        let same = before.read_bytes(name).unwrap() == after.read_bytes(name).unwrap();
        let Some(part) = name.strip_suffix(".weight").and_then(|module| parts.get(module)) else {
            assert!(same, "{name} changed");
            continue;
        };
        assert!(!same, "{name} did not change");
        assert_eq!(one.dtype, dtype);
        let (old, new, width) = (before.read_f32(name).unwrap(), after.read_f32(name).unwrap(), one.shape[1]);
        for (index, (old, new)) in old.iter().zip(&new).enumerate() {
            let (row, column) = (index / width, index % width);
            let product: f64 = (0..part.rank)
                .map(|r| f64::from(part.b[row * part.rank + r]) * f64::from(part.a[r * width + column]))
                .sum();
            let exact = f64::from(*old) + part.scale * product;
            let slack = exact.abs() * rounding + 1e-6;
            assert!((f64::from(*new) - exact).abs() <= slack, "{name} [{row}, {column}]: {new}, not {exact}");
        }
    }
    assert_eq!(read_json(&target.join("config.json")), read_json(&base.join("config.json")));
}

fn shapes(checkpoint: &Checkpoint, modules: &BTreeSet<&str>) -> Vec<(String, [usize; 2])> {
    let shape = |module: &str| checkpoint.info(&format!("{module}.weight")).unwrap().shape.clone();
    modules.iter().map(|module| ((*module).to_owned(), shape(module).try_into().unwrap())).collect()
}

#[test]
fn fused_f32_weights_equal_their_adapter() {
    for name in ["qwen3", "llama31-rope", "llama32-rope-tied", "mistral-window", "llama2-bias-head-dim"] {
        fused_equals_adapter(name, DType::F32, 1e-4, 2.0_f64.powi(-22));
    }
}

#[test]
fn fused_f16_weights_equal_their_adapter() {
    fused_equals_adapter("llama2", DType::F16, 1e-2, 2.0_f64.powi(-11));
}

#[test]
fn fused_bf16_weights_equal_their_adapter() {
    for name in ["qwen2-tied", "llama-tied-mqa-pad-is-eos"] {
        fused_equals_adapter(name, DType::Bf16, 5e-2, 2.0_f64.powi(-8));
    }
}

#[test]
fn a_merged_model_can_be_merged_into_again() {
    let output = tempfile::tempdir().unwrap();
    let (once, twice) = (output.path().join("once"), output.path().join("twice"));
    let base = fixture("qwen3");
    fuse::fuse(&ModelSource::Path(base.clone()), &base.join("adapter"), &once).unwrap();
    fuse::fuse(&ModelSource::Path(once.clone()), &base.join("adapter"), &twice).unwrap();
    let (base, once, twice) = (
        Checkpoint::open(&base).unwrap(),
        Checkpoint::open(&once).unwrap(),
        Checkpoint::open(&twice).unwrap(),
    );
    let name = "model.layers.0.mlp.up_proj.weight";
    let read = |checkpoint: &Checkpoint| checkpoint.read_f32(name).unwrap();
    for ((zero, one), two) in read(&base).iter().zip(read(&once)).zip(read(&twice)) {
        assert!(((two - one) - (one - zero)).abs() <= 1e-5, "{zero} {one} {two}");
    }
}
