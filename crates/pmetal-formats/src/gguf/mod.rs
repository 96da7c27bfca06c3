//! GGUF files of versions 2 and 3, little-endian.
//!
//! Layout: magic, version, counts, typed metadata, tensor descriptions, aligned data. Source: `docs/gguf.md` of ggml.

mod metadata;
mod names;
mod reader;

use std::path::Path;

use crate::source::{Source, shown, tensor_buffer};
use crate::{Error, Result, TensorInfo};

pub use metadata::{GgufArray, GgufMetadata, GgufStrings, GgufValue};
pub use names::{GgufArchitecture, hugging_face_name};

/// A GGUF file, open for positioned reads; share it between threads by reference.
#[derive(Debug)]
pub struct GgufFile {
    source: Source,
    version: u32,
    metadata: GgufMetadata,
    tensors: Vec<TensorInfo>,
}

impl GgufFile {
    /// Opens a file and checks its whole header.
    ///
    /// # Errors
    /// The file cannot be read, is another format, version 1, big-endian, holds tensors of a type that is not
    /// read, or its header disagrees with its length or with itself.
    pub fn open(path: &Path) -> Result<Self> {
        let source = Source::open(path)?;
        let reader::Header { version, metadata, tensors } = reader::parse(&source)?;
        Ok(Self { source, version, metadata, tensors })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.source.path
    }

    /// The format version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The typed key-value section.
    pub fn metadata(&self) -> &GgufMetadata {
        &self.metadata
    }

    /// All tensors under their own names, in name order, with row-major shapes (the reverse of GGML's order).
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        let index = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
        self.tensors.get(index)
    }

    /// Reads a whole tensor as stored into `out`, which has exactly its length.
    ///
    /// # Errors
    /// No such tensor, another length, or a file that was shortened after it was opened.
    pub fn read_into(&self, name: &str, out: &mut [u8]) -> Result<()> {
        let info = self.required(name)?;
        if out.len() as u64 != info.bytes {
            let message =
                format!("tensor `{}` has {} bytes, the buffer {}", shown(name), info.bytes, out.len());
            return Err(Error::Conversion(message));
        }
        crate::source::read_tensor_range(&self.source, info, 0, out)
    }

    /// Reads bytes of a tensor as stored, from byte `first` on.
    ///
    /// # Errors
    /// No such tensor, bytes beyond its end, or a file that was shortened after it was opened.
    pub fn read_range_into(&self, name: &str, first: u64, out: &mut [u8]) -> Result<()> {
        crate::source::read_tensor_range(&self.source, self.required(name)?, first, out)
    }

    /// Reads a whole tensor as stored.
    ///
    /// # Errors
    /// No such tensor, or a file that was shortened after it was opened.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let info = self.required(name)?;
        let mut bytes = tensor_buffer(&self.source, info)?;
        crate::source::read_tensor_range(&self.source, info, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn required(&self, name: &str) -> Result<&TensorInfo> {
        self.info(name).ok_or_else(|| {
            Error::malformed(self.path(), "header", format!("there is no tensor `{}`", shown(name)))
        })
    }
}
