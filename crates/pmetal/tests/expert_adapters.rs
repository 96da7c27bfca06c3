//! Adapters of experts: those that name every expert, as before transformers 5, and merging into every form in which
//! checkpoints hold experts.
#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)] // tests prepare files as they like, and may panic

mod support;

use std::collections::BTreeSet;
use std::path::Path;

use pmetal::core::ModelSource;
use pmetal::engine::{DType as Element, Device};
use pmetal::eval::verify::verify_model;
use pmetal::formats::checkpoint::Checkpoint;
use pmetal::lora::{self, WEIGHTS_FILE, fuse};
use pmetal::models::loader;
use pmetal_formats::DType;
use serde_json::{Value, json};
use support::{Stored, Tensors, copy, fixture, load, logits, read_json, read_tensors, write_tensors};

const BY_EXPERT: [&str; 2] = ["mixtral-adapter-by-expert", "qwen3-moe-adapter-by-expert"];

/// A fixture whose adapter is changed.
struct Changed {
    folder: tempfile::TempDir,
    config: Value,
    tensors: Tensors,
}

impl Changed {
    fn new(name: &str) -> Self {
        let folder = copy(name);
        let adapter = folder.path().join("adapter");
        let (config, tensors) =
            (read_json(&adapter.join(lora::CONFIG_FILE)), read_tensors(&adapter.join(WEIGHTS_FILE)));
        Self { folder, config, tensors }
    }

    fn set(&mut self, field: &str, value: Value) {
        self.config[field] = value;
    }

    fn path(&self) -> std::path::PathBuf {
        let adapter = self.folder.path().join("adapter");
        std::fs::write(adapter.join(lora::CONFIG_FILE), self.config.to_string()).unwrap();
        write_tensors(&adapter.join(WEIGHTS_FILE), &self.tensors);
        adapter
    }

    fn logits(&self) -> Vec<f32> {
        let mut decoder = load(self.folder.path()).unwrap().decoder;
        lora::load(&mut decoder, &self.path(), false).unwrap();
        logits(&decoder)
    }

    fn refusal(&self) -> String {
        let mut decoder = load(self.folder.path()).unwrap().decoder;
        lora::load(&mut decoder, &self.path(), false).map(|_| ()).unwrap_err().to_string()
    }

    /// Multiplies the tensors whose names contain all of these.
    fn scale(&mut self, parts: &[&str], factor: f32) {
        let mut changed = 0;
        for (_, stored) in self.tensors.iter_mut().filter(|(name, _)| parts.iter().all(|p| name.contains(p)))
        {
            assert_eq!(stored.dtype, DType::F32);
            for raw in stored.bytes.chunks_exact_mut(4) {
                let value = f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
                raw.copy_from_slice(&(factor * value).to_le_bytes());
            }
            changed += 1;
        }
        assert!(changed > 0, "{parts:?}");
    }
}

/// Largest difference over the largest number.
fn difference(one: &[f32], other: &[f32]) -> f32 {
    let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0, f32::max);
    largest(&mut one.iter().zip(other).map(|(a, b)| (a - b).abs()))
        / largest(&mut other.iter().map(|value| value.abs()))
}

#[test]
fn every_layer_of_every_expert_has_its_own_rank_and_alpha() {
    for (name, up, down, expert) in [
        (BY_EXPERT[0], "w3", "w2", "experts.1.w1"),
        (BY_EXPERT[1], "up_proj", "down_proj", "experts.1.gate_proj"),
    ] {
        let plain = Changed::new(name).logits();
        // An alpha twice as large is a B twice as large.
        for (key, others) in [(up, up), (down, down), (expert, expert)] {
            let mut by_alpha = Changed::new(name);
            by_alpha.set("alpha_pattern", json!({ key: 10 }));
            let mut by_values = Changed::new(name);
            by_values.scale(&[&format!("{others}."), "lora_B"], 2.0);
            assert!(difference(&by_alpha.logits(), &by_values.logits()) < 1e-5, "{name}: {key}");
            assert!(difference(&by_alpha.logits(), &plain) > 1e-3, "{name}: {key} changes nothing");
        }
        // A row of A and a column of B more, with alpha so that the scale stays: zero times anything is nothing.
        let mut wider = Changed::new(name);
        wider.set("rank_pattern", json!({ up: 3 }));
        wider.set("alpha_pattern", json!({ up: 7.5 }));
        for (tensor, stored) in wider.tensors.iter_mut().filter(|(name, _)| name.contains(&format!("{up}.")))
        {
            if tensor.contains("lora_A") {
                stored.shape[0] = 3;
                stored.bytes.extend(7.0_f32.to_le_bytes().repeat(stored.shape[1]));
            } else {
                stored.shape[1] = 3;
                let rows = stored.bytes.chunks(8).flat_map(|row| row.iter().copied().chain([0; 4]));
                stored.bytes = rows.collect();
            }
        }
        assert!(difference(&wider.logits(), &plain) < 1e-5, "{name}");
        // alpha / sqrt(rank) of another alpha.
        let mut stabilised = Changed::new(name);
        stabilised.set("use_rslora", json!(true));
        stabilised.set("lora_alpha", json!(5.0 / 2.0_f64.sqrt()));
        assert!(difference(&stabilised.logits(), &plain) < 1e-5, "{name}");
        // Dropout is for training.
        let mut dropped = Changed::new(name);
        dropped.set("lora_dropout", json!(0.1));
        assert_eq!(dropped.logits(), plain);
    }
}

#[test]
fn adapters_of_some_layers_of_experts_leave_the_others_as_they_are() {
    for (name, gate) in [(BY_EXPERT[0], "w1"), (BY_EXPERT[1], "gate_proj")] {
        let mut without = Changed::new(name);
        let targets = without.config["target_modules"].as_array().unwrap().clone();
        without.set("target_modules", targets.into_iter().filter(|target| target != gate).collect());
        without.tensors.retain(|name, _| !name.contains(&format!(".{gate}.")));
        let mut zero = Changed::new(name);
        zero.scale(&[&format!(".{gate}."), "lora_B"], 0.0);
        assert!(difference(&without.logits(), &zero.logits()) < 1e-6, "{name}");
    }
}

#[test]
fn adapters_of_experts_that_do_not_go_together_are_refused() {
    for (name, up) in [(BY_EXPERT[0], "w3"), (BY_EXPERT[1], "up_proj")] {
        let mut missing = Changed::new(name);
        let tensor =
            missing.tensors.keys().find(|name| name.contains(&format!(".{up}.lora_B"))).unwrap().clone();
        missing.tensors.remove(&tensor);
        assert!(missing.refusal().contains(&format!("tensor `{tensor}`")), "{}", missing.refusal());
        let mut beyond = Changed::new(name);
        let stored = beyond.tensors[&tensor].clone();
        let extra = tensor.replace(".experts.0.", ".experts.3.");
        beyond.tensors.insert(extra.clone(), stored);
        assert!(beyond.refusal().contains(&format!("tensor `{extra}` belongs to no targeted module")));
        let mut uneven = Changed::new(name);
        uneven.set("rank_pattern", json!({ format!("experts.1.{up}"): 3 }));
        assert!(uneven.refusal().contains("are not of one rank for all 3 experts"), "{}", uneven.refusal());
        let mut shaped = Changed::new(name);
        let Stored { shape, .. } = shaped.tensors.get_mut(&tensor).unwrap();
        shape.reverse();
        assert!(shaped.refusal().contains("has shape"), "{}", shaped.refusal());
    }
}

#[test]
fn an_adapter_that_names_every_expert_is_not_trained() {
    for name in BY_EXPERT {
        let mut decoder = load(&fixture(name)).unwrap().decoder;
        let error = lora::load(&mut decoder, &fixture(name).join("adapter"), true).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("one by one") && error.to_string().contains("merge"), "{error}");
        assert!(decoder.parameters().is_empty());
    }
}

/// Names of tensors that are not the same, byte for byte.
fn changed_tensors(before: &Checkpoint, after: &Checkpoint) -> BTreeSet<String> {
    let names: Vec<&str> = before.names().collect();
    assert_eq!(names, after.names().collect::<Vec<_>>());
    let differs = |name: &&&str| {
        let (one, other) = (before.info(name).unwrap(), after.info(name).unwrap());
        assert_eq!(one.shape, other.shape);
        if one.dtype == other.dtype {
            return before.read_bytes(name).unwrap() != after.read_bytes(name).unwrap();
        }
        // Blocks were expanded.
        assert_eq!(other.dtype, DType::F32, "{name}");
        before.read_f32(name).unwrap() != after.read_f32(name).unwrap()
    };
    names.iter().filter(differs).map(|name| (*name).to_owned()).collect()
}

fn widened(stored: &Stored) -> Stored {
    let halves = stored.bytes.chunks(2);
    let bytes = halves.flat_map(|raw| [0, 0, raw[0], raw[1]]).collect();
    Stored { dtype: DType::F32, shape: stored.shape.clone(), bytes }
}

/// Merges the adapter of a fixture, whose bf16 numbers were widened, and compares logits and loss of the result with those
/// that the reference has of the adapter. As stored, the result must be the same but for its rounding.
fn merged(name: &str) -> BTreeSet<String> {
    let (base, output) = (copy(name), tempfile::tempdir().unwrap());
    let base = base.path();
    let fused = |base: &Path, target: &str| {
        let target = output.path().join(target);
        let report = fuse::fuse(&ModelSource::Path(base.to_owned()), &base.join("adapter"), &target).unwrap();
        (target, report)
    };
    let (narrow, _) = fused(base, "narrow");
    for entry in std::fs::read_dir(base).unwrap() {
        let path = entry.unwrap().path();
        let is_model = path.file_name().unwrap().to_str().unwrap().starts_with("model");
        if !is_model || path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let tensors = read_tensors(&path).into_iter();
        let wide = |stored| {
            if matches!(stored, Stored { dtype: DType::Bf16, .. }) { widened(&stored) } else { stored }
        };
        write_tensors(&path, &tensors.map(|(name, stored)| (name, wide(stored))).collect());
    }
    let (target, report) = fused(base, "wide");
    // The numbers of the adapter, as if they were those of a model.
    let mut expected = read_tensors(&base.join("expected.safetensors"));
    let inputs = ["input_ids", "attention_mask", "labels", "adapter.logits", "adapter.loss"];
    expected.retain(|quantity, _| inputs.contains(&quantity.as_str()));
    let expected =
        expected.into_iter().map(|(quantity, stored)| (quantity.replace("adapter.", ""), stored)).collect();
    write_tensors(&output.path().join("expected.safetensors"), &expected);
    let report_of = |model: &Path| verify_model(model, output.path(), &Device::cpu(), Element::F32).unwrap();
    let compared = report_of(&target).comparisons;
    assert_eq!(compared.len(), 2);
    for (own, before) in compared.iter().zip(report_of(base).comparisons) {
        let (what, error, before) = (&own.quantity, own.relative_error, before.relative_error);
        println!("{name}: {what} {error:.1e}, without the adapter {before:.1e}");
        assert!(own.passed, "{name}: {what} {error}");
        assert!(before > 100.0 * own.tolerance, "{name}: the adapter is not seen");
    }
    let [before, after, narrow] = [base, &target, &narrow].map(|path| Checkpoint::open(path).unwrap());
    let changed = changed_tensors(&before, &after);
    assert_eq!(changed.len(), report.changed_tensors, "{name}");
    for tensor in after.names() {
        let (one, other) = (read_bytes(&after, tensor), read_bytes(&narrow, tensor));
        let rounded = one.chunks(4).flat_map(|raw| {
            let value = f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
            half::bf16::from_f32(value).to_le_bytes()
        });
        let same = if one.len() == other.len() { one == other } else { rounded.eq(other) };
        assert!(same, "{name}: {tensor}");
    }
    changed
}

fn read_bytes(checkpoint: &Checkpoint, name: &str) -> Vec<u8> {
    checkpoint.read_bytes(name).unwrap()
}

#[test]
fn adapters_of_stacked_experts_are_merged_into_the_tensors_of_one_expert_each() {
    // Two layers of four experts with gate, up and down, and four of attention.
    let changed = merged("mixtral");
    assert_eq!(changed.len(), 2 * (4 * 3 + 4));
    assert!(changed.contains("model.layers.1.block_sparse_moe.experts.3.w3.weight"));
    assert!(changed.iter().all(|name| !name.contains("gate.weight") && !name.contains("norm")));
    // Of this one, only down has an adapter.
    let changed = merged("mixtral-window");
    assert!(changed.iter().all(|name| name.contains("w2") || name.contains("self_attn")), "{changed:?}");
    merged("qwen3-moe");
    merged("qwen3-moe-sparse-step");
    merged("qwen2-moe");
    merged("deepseek-v3");
    merged("deepseek-v32-bias");
}

#[test]
fn adapters_of_stacked_experts_are_merged_into_stacked_tensors() {
    let changed = merged("granitemoe");
    assert!(changed.contains("model.layers.0.block_sparse_moe.input_linear.weight"), "{changed:?}");
    assert!(changed.contains("model.layers.0.block_sparse_moe.output_linear.weight"), "{changed:?}");
}

#[test]
fn adapters_of_stacked_experts_are_merged_into_transposed_tensors() {
    let changed = merged("gpt-oss");
    assert!(changed.contains("model.layers.0.mlp.experts.gate_up_proj"), "{changed:?}");
    let changed = merged("gpt-oss-no-lists");
    assert!(!changed.contains("model.layers.0.mlp.experts.gate_up_proj"), "{changed:?}");
    merged("llama4-text");
}

#[test]
fn adapters_that_name_every_expert_are_merged() {
    let changed = merged(BY_EXPERT[0]);
    assert_eq!(changed.len(), 2 * (3 * 3 + 2));
    let changed = merged(BY_EXPERT[1]);
    assert_eq!(changed.len(), 2 * (3 * 3 + 1));
}

#[test]
fn adapters_are_merged_into_the_text_part_of_multimodal_folders() {
    for name in ["llama4-multimodal", "gemma3", "qwen3-5-multimodal"] {
        let changed = merged(name);
        assert!(changed.iter().all(|name| name.contains("language_model.")), "{changed:?}");
    }
}

#[test]
fn blocks_are_expanded_where_an_adapter_is_merged() {
    for name in ["deepseek-v3-fp8", "gpt-oss-mxfp4"] {
        merged(name);
    }
}

#[test]
fn an_adapter_of_experts_in_blocks_is_merged_into_their_values() {
    // The fixture's own adapter is of attention: this one is of its experts, with the values of another.
    let base = fixture("gpt-oss-mxfp4");
    let mut decoder = load(&base).unwrap().decoder;
    let mut config =
        pmetal_formats::adapter::AdapterConfig::open(&base.join("adapter/adapter_config.json")).unwrap();
    config.target_parameters =
        vec!["mlp.experts.gate_up_proj".to_owned(), "mlp.experts.down_proj".to_owned()];
    config.target_modules = pmetal_formats::adapter::ModuleNames::List(vec![]);
    lora::attach(&mut decoder, &config, 3).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let tensors = lora::tensors(&decoder).unwrap().into_iter().map(|(name, tensor)| {
        // B begins as zero, which would merge nothing.
        let values = tensor.to_f32_vec().unwrap();
        let values = values.iter().enumerate();
        let value = |(index, &value): (usize, &f32)| {
            if value == 0.0 { (index % 7) as f32 * 0.1 - 0.3 } else { value }
        };
        let bytes = values.flat_map(|each| value(each).to_le_bytes()).collect();
        (name, Stored { dtype: DType::F32, shape: tensor.shape().to_vec(), bytes })
    });
    write_tensors(&folder.path().join(WEIGHTS_FILE), &tensors.collect());
    std::fs::write(folder.path().join(lora::CONFIG_FILE), config.to_json()).unwrap();
    let mut decoder = load(&base).unwrap().decoder;
    let without = logits(&decoder);
    lora::load(&mut decoder, folder.path(), false).unwrap();
    let target = folder.path().join("fused");
    fuse::fuse(&ModelSource::Path(base.clone()), folder.path(), &target).unwrap();
    let (own, wanted) = (logits(&load(&target).unwrap().decoder), logits(&decoder));
    assert!(difference(&own, &wanted) < 1e-4, "{}", difference(&own, &wanted));
    assert!(difference(&without, &wanted) > 1e-2);
    let (checkpoint, _) = loader::open(&target).unwrap();
    assert_eq!(checkpoint.info("model.layers.0.mlp.experts.down_proj").unwrap().dtype, DType::F32);
}
