//! GGUF models against what transformers reads from the same files (see `tools/make_gguf_goldens.py`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

use std::path::{Path, PathBuf};

use pmetal_formats::checkpoint::Checkpoint;
use serde_json::Value;

/// FNV-1a over the 64-bit little-endian words of the f32 bytes, the last one padded with zeros.
fn fnv1a(values: &[f32]) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for pair in values.chunks(2) {
        let high = pair.get(1).map_or(0, |value| u64::from(value.to_bits()) << 32);
        hash = (hash ^ (high | u64::from(pair[0].to_bits()))).wrapping_mul(0x100_0000_01b3);
    }
    format!("{hash:016x}")
}

/// The GGUF files beside which a golden lies.
fn models() -> Vec<PathBuf> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data"));
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths
        .filter(|path| {
            path.extension().is_some_and(|ending| ending == "gguf") && path.with_extension("json").exists()
        })
        .collect()
}

#[test]
fn every_tensor_equals_what_transformers_reads_bit_for_bit() {
    let models = models();
    assert!(models.len() >= 3, "{models:?}");
    for path in models {
        let golden: Value =
            serde_json::from_str(&std::fs::read_to_string(path.with_extension("json")).unwrap()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let expected = golden["tensors"].as_object().unwrap();
        let mut names: Vec<&str> = expected.keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), names, "{}", path.display());
        for (name, tensor) in expected {
            let shape: Vec<u64> =
                checkpoint.info(name).unwrap().shape.iter().map(|&length| length as u64).collect();
            assert_eq!(Value::from(shape), tensor["shape"], "{name} of {}", path.display());
            let hash = fnv1a(&checkpoint.read_f32(name).unwrap());
            assert_eq!(hash, tensor["fnv1a"], "{name} of {}", path.display());
        }
    }
}

#[test]
fn the_configuration_has_the_values_that_transformers_derives() {
    for path in models() {
        let golden: Value =
            serde_json::from_str(&std::fs::read_to_string(path.with_extension("json")).unwrap()).unwrap();
        let config = Checkpoint::open(&path).unwrap().config().unwrap();
        for (name, value) in golden["config"].as_object().unwrap() {
            // Python keeps the f32 noise of a stored number, which is not in the original either.
            let same = match (config[name].as_f64(), value.as_f64()) {
                (Some(ours), Some(theirs)) => ours as f32 == theirs as f32,
                _ => &config[name] == value,
            };
            assert!(same, "{name} of {} is {}, transformers has {value}", path.display(), config[name]);
        }
    }
}
