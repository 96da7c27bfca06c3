//! The comparison with other programs' numbers passes where it should and fails where it should.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // tests prepare files as they like

use std::path::{Path, PathBuf};

use pmetal::engine::{Category, DType, Device};
use pmetal::eval::verify::{Report, verify, verify_model};
use pmetal::formats::safetensors::SafetensorsFile;
use pmetal::models::Config;
use pmetal::models::loader::{self, LoadOptions};

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures")).join(name)
}

/// The fixture's model with one number of one f32 tensor multiplied.
fn planted(folder: &Path, name: &str, tensor: &str, factor: f32) {
    for file in ["config.json", "model.safetensors"] {
        std::fs::write(folder.join(file), std::fs::read(fixture(name).join(file)).unwrap()).unwrap();
    }
    let path = folder.join("model.safetensors");
    let values = SafetensorsFile::open(&path).unwrap().read_f32(tensor).unwrap();
    let stored: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut bytes = std::fs::read(&path).unwrap();
    let start = bytes.windows(stored.len()).position(|window| window == stored).unwrap();
    bytes[start..start + 4].copy_from_slice(&(values[0] * factor).to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
}

fn missed(report: &Report) -> Vec<&str> {
    report.comparisons.iter().filter(|c| !c.passed).map(|c| c.quantity.as_str()).collect()
}

#[test]
fn untouched_fixture_agrees() {
    let report = verify(&fixture("qwen3"), &Device::cpu(), DType::F32).unwrap();
    assert_eq!(missed(&report), Vec::<&str>::new());
    assert!(report.passed());
}

#[test]
fn one_percent_of_one_norm_weight_is_caught_from_its_layer_on() {
    let folder = tempfile::tempdir().unwrap();
    planted(folder.path(), "qwen3", "model.layers.1.input_layernorm.weight", 1.01);
    let report = verify_model(folder.path(), &fixture("qwen3"), &Device::cpu(), DType::F32).unwrap();
    let missed = missed(&report);
    for quantity in ["hidden.2", "logits", "loss"] {
        assert!(missed.contains(&quantity), "{quantity} passed; missed are {missed:?}");
    }
    for quantity in ["hidden.0", "hidden.1"] {
        assert!(!missed.contains(&quantity), "{quantity} lies before the change, yet it is missed");
    }
}

#[test]
fn random_matrices_have_the_type_of_the_checkpoint() {
    let text = std::fs::read_to_string(fixture("qwen3").join("config.json")).unwrap();
    let bytes = |dtype: Option<&str>| {
        let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let fields = value.as_object_mut().unwrap();
        fields.remove("dtype");
        fields.remove("torch_dtype");
        fields.extend(dtype.map(|dtype| ("torch_dtype".to_owned(), dtype.into())));
        let device = Device::cpu();
        let options = LoadOptions { dtype: DType::F32, train_all: false };
        let decoder = loader::random(&Config::new(value).unwrap(), &device, options, 0)?;
        let live = device.memory().report().live(Category::Weights);
        drop(decoder);
        pmetal::Result::Ok(live)
    };
    let (wide, narrow) = (bytes(Some("float32")).unwrap(), bytes(Some("bfloat16")).unwrap());
    assert!(narrow < wide * 6 / 10, "bf16 weights take {narrow} bytes, f32 weights {wide}");
    assert_eq!(bytes(None).unwrap(), wide);
    assert_eq!(bytes(Some("float16")).unwrap(), narrow);
    let refused = bytes(Some("float8_e4m3fn")).unwrap_err().to_string();
    assert!(refused.contains("float8_e4m3fn"), "{refused}");
}
