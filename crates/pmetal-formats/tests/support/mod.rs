//! Hand-made files for the tests of storage formats.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "each test program uses a part, and helpers of tests are tests"
)]

use std::path::{Path, PathBuf};

use pmetal_formats::Result;

/// A file of those bytes in a folder that lives as long as the value.
pub(crate) struct Scratch {
    folder: tempfile::TempDir,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

/// Cuts the last byte off, as a program does that rewrites a file in place.
pub(crate) fn shorten(path: &Path) {
    let length = std::fs::metadata(path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(length - 1).unwrap();
}

/// The message of a refusal, which must name the file.
#[track_caller]
pub(crate) fn refusal<T: std::fmt::Debug>(answer: Result<T>, file_name: &str) -> String {
    let message = answer.unwrap_err().to_string();
    assert!(message.contains(file_name), "`{message}` does not name {file_name}");
    assert!(message.len() < 1500, "a message of {} bytes", message.len());
    message
}

/// A safetensors file of that header and data.
pub(crate) fn safetensors_bytes(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(data);
    bytes
}

/// A safetensors file of f32 tensors, one value each.
pub(crate) fn scalars(tensors: &[(&str, f32)]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for (name, value) in tensors {
        let begin = data.len();
        data.extend(value.to_le_bytes());
        let end = data.len();
        entries.push(format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":[{begin},{end}]}}"#));
    }
    safetensors_bytes(format!("{{{}}}", entries.join(",")), &data)
}

/// Builds GGUF files, also broken ones.
pub(crate) struct GgufBuilder {
    pub(crate) magic: [u8; 4],
    pub(crate) version: [u8; 4],
    pub(crate) tensor_count: Option<u64>,
    pub(crate) key_count: Option<u64>,
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: Vec<u8>,
    alignment: usize,
}

pub(crate) const GGUF_U32: u32 = 4;
pub(crate) const GGUF_F32: u32 = 6;
pub(crate) const GGUF_BOOL: u32 = 7;
pub(crate) const GGUF_STRING: u32 = 8;
pub(crate) const GGUF_ARRAY: u32 = 9;

impl GgufBuilder {
    pub(crate) fn new() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3_u32.to_le_bytes(),
            tensor_count: None,
            key_count: None,
            keys: Vec::new(),
            tensors: Vec::new(),
            data: Vec::new(),
            alignment: 32,
        }
    }

    pub(crate) fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.keys.push([string(key.as_bytes()), kind.to_le_bytes().to_vec(), value.to_vec()].concat());
        self
    }

    pub(crate) fn number(self, key: &str, value: u32) -> Self {
        self.raw(key, GGUF_U32, &value.to_le_bytes())
    }

    pub(crate) fn float(self, key: &str, value: f32) -> Self {
        self.raw(key, GGUF_F32, &value.to_le_bytes())
    }

    pub(crate) fn text(self, key: &str, value: &str) -> Self {
        self.raw(key, GGUF_STRING, &string(value.as_bytes()))
    }

    pub(crate) fn alignment(mut self, alignment: u32) -> Self {
        self.alignment = (alignment as usize).max(1);
        self.number("general.alignment", alignment)
    }

    /// A tensor description as it stands, without data.
    pub(crate) fn raw_tensor(mut self, name: &str, lengths: &[u64], kind: u32, offset: u64) -> Self {
        let mut entry = string(name.as_bytes());
        entry.extend((lengths.len() as u32).to_le_bytes());
        lengths.iter().for_each(|length| entry.extend(length.to_le_bytes()));
        entry.extend(kind.to_le_bytes());
        entry.extend(offset.to_le_bytes());
        self.tensors.push(entry);
        self
    }

    /// Appends bytes to the data section.
    pub(crate) fn data(mut self, bytes: &[u8]) -> Self {
        self.data.extend(bytes);
        self
    }

    /// An f32 tensor; `lengths` in GGML's order, the contiguous one first.
    pub(crate) fn floats(mut self, name: &str, lengths: &[u64], values: &[f32]) -> Self {
        self.data.resize(self.data.len().next_multiple_of(self.alignment), 0);
        let offset = self.data.len() as u64;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.raw_tensor(name, lengths, 0, offset).data(&bytes)
    }

    pub(crate) fn build(&self) -> Vec<u8> {
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version);
        bytes.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        bytes.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        bytes.extend(self.keys.concat());
        bytes.extend(self.tensors.concat());
        if !self.data.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
            bytes.extend(&self.data);
        }
        bytes
    }
}

/// A length-prefixed string.
pub(crate) fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}
