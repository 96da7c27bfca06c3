//! Fixtures copied to a temporary folder, so that a test can change them.
#![allow(dead_code)] // each test program uses its own part
#![allow(clippy::disallowed_methods)] // tests prepare files as they like

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pmetal::models::loader::{self, LoadOptions, LoadedModel};
use pmetal::models::{Decoder, Document, Forward, TokenRun};
use pmetal_engine::{Device, Tape};
use pmetal_formats::DType;
use pmetal_formats::safetensors::{SafetensorsFile, TensorView, write_safetensors};
use serde_json::Value;

/// One tensor of a file that is being changed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stored {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

pub(crate) type Tensors = BTreeMap<String, Stored>;

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// The names of all fixtures, in order.
pub(crate) fn fixture_names() -> Vec<String> {
    let entries = std::fs::read_dir(fixture("")).unwrap().map(|entry| entry.unwrap());
    let folders = entries.filter(|entry| entry.path().is_dir());
    let mut names: Vec<String> = folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(names.len() >= 60, "only {} fixtures are there", names.len());
    names
}

/// A copy of a fixture with its adapter, if it has one.
pub(crate) fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_files(&fixture(name), folder.path());
    folder
}

pub(crate) fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_files(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub(crate) fn read_tensors(path: &Path) -> Tensors {
    let file = SafetensorsFile::open(path).unwrap();
    let each = file.tensors().iter().map(|info| {
        let bytes = file.read(&info.name).unwrap();
        (info.name.clone(), Stored { dtype: info.dtype, shape: info.shape.clone(), bytes })
    });
    each.collect()
}

pub(crate) fn write_tensors(path: &Path, tensors: &Tensors) {
    let views: Vec<TensorView<'_>> = tensors
        .iter()
        .map(|(name, stored)| TensorView {
            name,
            dtype: stored.dtype,
            shape: &stored.shape,
            data: &stored.bytes,
        })
        .collect();
    let mut bytes = Vec::new();
    write_safetensors(&mut bytes, &views, &BTreeMap::new()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Opens and loads a model in f32.
pub(crate) fn load(folder: &Path) -> Result<LoadedModel, pmetal::error::Error> {
    let (checkpoint, config) = loader::open(folder)?;
    let options = LoadOptions { dtype: pmetal_engine::DType::F32, train_all: false };
    loader::load(&checkpoint, &config, &Device::cpu(), options)
}

/// Logits of one document of 24 tokens.
pub(crate) fn logits(decoder: &Decoder) -> Vec<f32> {
    let ids: Vec<u32> = (0..24).map(|index| (index * 7 + 3) % decoder.spec.vocabulary as u32).collect();
    let documents = vec![Document { tokens: ids.len(), first_position: 0, rope_length: ids.len() }];
    let run = TokenRun { ids, documents };
    let states = decoder.hidden(&Tape::off(), &run, Forward::default()).unwrap().into_tensor();
    decoder.logits(&states).unwrap().to_f32_vec().unwrap()
}
