//! Every fixture against the numbers that transformers and PEFT computed from the same files.
#![allow(clippy::disallowed_methods)] // tests prepare files as they like
#![allow(clippy::unwrap_used, clippy::panic)] // a test that fails may panic, also in its helpers

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pmetal::engine::{DType, Device, Tape, Tensor};
use pmetal::eval::verify::{Report, verify};
use pmetal::formats::safetensors::SafetensorsFile;
use pmetal::generate::Session;
use pmetal::models::families::FAMILIES;
use pmetal::models::loader::{self, LoadOptions};
use pmetal::models::{Decoder, Forward, TokenRun};
use rayon::prelude::*;

fn fixtures() -> Vec<PathBuf> {
    support::fixture_names().iter().map(|name| support::fixture(name)).collect()
}

fn name_of(folder: &Path) -> String {
    folder.file_name().unwrap().to_string_lossy().into_owned()
}

/// What is wrong with a fixture, one line for each quantity.
fn misses(folder: &Path, dtype: DType) -> Vec<String> {
    let name = name_of(folder);
    match verify(folder, &Device::cpu(), dtype) {
        Err(error) => vec![format!("{name}: {error}")],
        Ok(report) => missed(&report)
            .map(|c| {
                format!(
                    "{name}: {} is {:.3e}, at most {:.1e} passes",
                    c.quantity, c.relative_error, c.tolerance
                )
            })
            .chain(report.comparisons.is_empty().then(|| format!("{name}: nothing was compared")))
            .collect(),
    }
}

fn missed(report: &Report) -> impl Iterator<Item = &pmetal::eval::verify::Comparison> {
    report.comparisons.iter().filter(|comparison| !comparison.passed)
}

fn all_agree(dtype: DType) {
    let wrong: Vec<String> = fixtures().par_iter().flat_map(|folder| misses(folder, dtype)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_fixture_agrees_in_f32() {
    all_agree(DType::F32);
}

#[test]
fn every_fixture_agrees_in_bf16() {
    all_agree(DType::Bf16);
}

#[test]
fn bf16_logits_are_as_good_as_those_of_transformers() {
    let mut compared = 0;
    for folder in fixtures() {
        let report = verify(&folder, &Device::cpu(), DType::Bf16).unwrap();
        for comparison in report.comparisons.iter().filter(|c| c.quantity == "bf16.logits") {
            compared += 1;
            let ratio = comparison.relative_error;
            assert!(ratio <= 2.0, "{}: {ratio} times the error of transformers", name_of(&folder));
            // Numbers that were not rounded to bf16 at all would show nothing.
            assert!(comparison.max_abs_error > 0.0, "{}", name_of(&folder));
        }
    }
    assert!(compared >= 20, "only {compared} fixtures hold bf16 logits");
}

/// The table of README.md: every family, and what proves it.
fn table() -> String {
    let mut rows: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for folder in fixtures() {
        let config = pmetal::models::Config::new(support::read_json(&folder.join("config.json"))).unwrap();
        let model_type = config.model_type().unwrap();
        let family = FAMILIES.iter().find(|family| family.model_type == model_type);
        rows.entry(family.unwrap().model_type).or_default().push(format!("`{}`", name_of(&folder)));
    }
    let mut lines = vec!["| family | `model_type` | fixtures |".to_owned(), "| --- | --- | --- |".to_owned()];
    for family in FAMILIES {
        let proofs = rows.get(family.model_type);
        let proofs = proofs.unwrap_or_else(|| panic!("nothing proves `{}`", family.model_type)).join(", ");
        lines.push(format!("| {} | `{}` | {proofs} |", family.name, family.model_type));
    }
    lines.join("\n") + "\n"
}

#[test]
fn readme_lists_the_families_that_fixtures_prove() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once("<!-- families -->\n").unwrap();
    let (held, after) = rest.split_once("<!-- end of families -->").unwrap();
    let table = table();
    if std::env::var_os("PMETAL_WRITE_README").is_some() {
        let whole = format!("{before}<!-- families -->\n{table}<!-- end of families -->{after}");
        std::fs::write(&path, whole).unwrap();
    } else {
        assert_eq!(held, table, "PMETAL_WRITE_README=1 makes this test write the table");
    }
}

/// Adds `amount` to the number `index` of an f32 tensor of a safetensors file.
fn plant(file: &Path, tensor: &str, index: usize, amount: f32) {
    let mut bytes = std::fs::read(file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    assert_eq!(json[tensor]["dtype"], "F32", "{tensor}");
    let start = 8 + header + json[tensor]["data_offsets"][0].as_u64().unwrap() as usize + 4 * index;
    let value = f32::from_le_bytes(bytes[start..start + 4].try_into().unwrap()) + amount;
    bytes[start..start + 4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn a_wrong_number_is_missed_and_nothing_else() {
    let folder = fixtures().into_iter().find(|folder| name_of(folder) == "qwen3").unwrap();
    // Far below what a reader would see, and above the tolerance of each quantity.
    let planted = [
        ("logits", 3, 2e-3),
        // Judged by the 2-norm of its row, which one number moves little.
        ("hidden.1", 5, 1e-2),
        ("loss", 0, 1e-3),
        ("grad.model.norm.weight", 0, 1e-1),
        ("adapter.logits", 7, 2e-3),
        ("adapter.loss", 0, 1e-3),
    ];
    for (quantity, index, amount) in planted {
        let scratch = tempfile::tempdir().unwrap();
        let copy = scratch.path().join("qwen3");
        support::copy_files(&folder, &copy);
        plant(&copy.join("expected.safetensors"), quantity, index, amount);
        let report = verify(&copy, &Device::cpu(), DType::F32).unwrap();
        let names: Vec<&str> = missed(&report).map(|comparison| comparison.quantity.as_str()).collect();
        assert_eq!(names, [quantity]);
        assert!(!report.passed());
    }
}

#[test]
fn a_number_that_is_not_one_is_missed() {
    let folder = fixtures().into_iter().find(|folder| name_of(folder) == "llama2").unwrap();
    let scratch = tempfile::tempdir().unwrap();
    support::copy_files(&folder, scratch.path());
    plant(&scratch.path().join("expected.safetensors"), "logits", 0, f32::NAN);
    let report = verify(scratch.path(), &Device::cpu(), DType::F32).unwrap();
    assert_eq!(missed(&report).count(), 1);
}

#[test]
fn a_quantity_that_nobody_computes_is_refused() {
    let folder = fixtures().into_iter().find(|folder| name_of(folder) == "llama2").unwrap();
    let scratch = tempfile::tempdir().unwrap();
    support::copy_files(&folder, scratch.path());
    let file = scratch.path().join("expected.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let position = bytes.windows(10).position(|window| window == b"\"hidden.1\"").unwrap();
    let mut changed = bytes;
    changed[position..position + 10].copy_from_slice(b"\"wisdom.1\"");
    std::fs::write(&file, changed).unwrap();
    let error = verify(scratch.path(), &Device::cpu(), DType::F32).unwrap_err().to_string();
    assert!(error.contains("wisdom.1"), "{error}");
}

/// A fixture's decoder, and the tokens of its first row.
fn decoder_of(folder: &Path) -> (Decoder, Vec<u32>) {
    let (checkpoint, config) = loader::open(folder).unwrap();
    let options = LoadOptions { dtype: DType::F32, train_all: false };
    let decoder = loader::load(&checkpoint, &config, &Device::cpu(), options).unwrap().decoder;
    let expected = SafetensorsFile::open(&folder.join("expected.safetensors")).unwrap();
    let length = expected.info("input_ids").unwrap().shape[1];
    let ids = expected.read_i64("input_ids").unwrap()[..length].iter().map(|&id| id as u32).collect();
    (decoder, ids)
}

fn full_forward(decoder: &Decoder, ids: &[u32]) -> Vec<f32> {
    let states = decoder.hidden(&Tape::off(), &TokenRun::single(ids), Forward::default()).unwrap();
    let states: Tensor = states.into_tensor();
    decoder.logits(&states.slice_rows(ids.len() - 1, 1).unwrap()).unwrap().to_f32_vec().unwrap()
}

/// Largest difference, in standard deviations of the expected values.
fn difference(actual: &[f32], expected: &[f32]) -> f64 {
    let count = expected.len() as f64;
    let mean = expected.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
    let deviation = (expected.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / count).sqrt();
    let errors = actual.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
    errors.fold(0.0, |worst: f64, error| if error.is_nan() { f64::NAN } else { worst.max(error) }) / deviation
}

#[test]
fn cached_decoding_equals_a_full_forward_pass_at_every_length() {
    let (mut windows, mut epochs) = (0, 0);
    for folder in fixtures() {
        let (decoder, ids) = decoder_of(&folder);
        let window = decoder.spec.layers.iter().filter_map(|layer| layer.attention.mask.window).min();
        windows += usize::from(window.is_some_and(|window| window < ids.len()));
        let epoch = |length| decoder.spec.ropes.iter().map(|rope| rope.epoch(length)).collect::<Vec<_>>();
        epochs += usize::from(epoch(1) != epoch(ids.len()));
        let mut session = Session::new(&decoder).unwrap();
        // A prompt of a few tokens, then one at a time, as generation goes.
        let mut logits = session.extend(&ids[..3]).unwrap();
        for length in 3..=ids.len() {
            let error = difference(&logits, &full_forward(&decoder, &ids[..length]));
            assert!(error <= 1e-4, "{}: {error:.2e} at length {length}", name_of(&folder));
            if length < ids.len() {
                logits = session.extend(&ids[length..=length]).unwrap();
            }
        }
    }
    assert!(windows >= 4, "only {windows} fixtures cross their window");
    assert!(epochs >= 3, "only {epochs} fixtures cross a rotary boundary");
}

#[test]
fn a_session_that_goes_back_gives_the_same_logits_again() {
    for folder in fixtures() {
        let (decoder, ids) = decoder_of(&folder);
        let mut session = Session::new(&decoder).unwrap();
        session.extend(&ids).unwrap();
        session.truncate(5);
        let logits = session.extend(&ids[5..9]).unwrap();
        let error = difference(&logits, &full_forward(&decoder, &ids[..9]));
        assert!(error <= 1e-4, "{}: {error:.2e}", name_of(&folder));
    }
}
