//! One view of a model's tensors, under the names of Hugging Face checkpoints, whatever files hold them.

mod folder;
mod gguf_config;
mod gguf_view;
mod packed;
mod refuse;

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

pub(crate) use refuse::{refuse_unsafe_extension, refuse_unsafe_magic};

use crate::gguf::GgufFile;
use crate::safetensors::SafetensorsFile;
use crate::source::{json_fault, shown};
use crate::{Error, Result, TensorInfo, blocks};

/// A configuration file beyond this is none: in memory, JSON takes up to a hundred times its text.
const CONFIG_BYTES: u64 = 1 << 19;

/// A model's files, opened and checked; tensors are read when they are asked for.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    entries: BTreeMap<String, Entry>,
    files: Files,
}

#[derive(Debug)]
enum Files {
    Folder(Vec<SafetensorsFile>),
    Gguf(Box<gguf_view::GgufView>),
}

/// A tensor under its Hugging Face name.
#[derive(Debug)]
struct Entry {
    info: TensorInfo,
    /// Index into the files of a folder.
    file: usize,
    /// The name inside the file; of a tensor that is stored as two, the name of its codes.
    stored: String,
    /// The scales of a tensor that is stored as two.
    scales: Option<Box<packed::Scales>>,
}

impl Checkpoint {
    /// Opens a folder in Hugging Face layout (one file, or shards with an index), a safetensors file in such a
    /// folder, or a GGUF file.
    ///
    /// # Errors
    /// When the files cannot be read or contradict themselves or each other, and for formats that can run code.
    pub fn open(path: &Path) -> Result<Self> {
        let kind = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if kind.is_dir() {
            return folder::open(path);
        }
        refuse_unsafe_extension(path)?;
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("gguf") => gguf_view::open(path),
            Some("safetensors") => {
                let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                folder::open_single(parent.unwrap_or(Path::new(".")), path)
            }
            _ => Err(Error::unsupported(path, "this is neither a folder nor a .safetensors or .gguf file")),
        }
    }

    /// The folder, or the GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The GGUF file behind it, if it is one.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.files {
            Files::Gguf(view) => Some(view.file()),
            Files::Folder(_) => None,
        }
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Encoding and shape of a tensor.
    ///
    /// Two tensors of codes and scales, as FP8 and MXFP4 checkpoints have them, are one of [`crate::DType::Fp8Blocks`] or
    /// [`crate::DType::Mxfp4`] here, whose shape is that of its values; [`Self::read_f32`] reads it.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.entries.get(name).map(|entry| &entry.info)
    }

    /// A tensor's bytes as stored, but for GGUF query and key rows, which are put back into half-split order.
    ///
    /// # Errors
    /// There is no such tensor, reading fails, it is stored as codes and scales, or rows to be reordered share blocks,
    /// as those of a block-quantised bias do; [`Self::read_f32`] reads those two.
    pub fn read_bytes(&self, name: &str) -> Result<Vec<u8>> {
        let entry = self.entry(name)?.in_one()?;
        match &self.files {
            Files::Folder(files) => files[entry.file].read(&entry.stored),
            Files::Gguf(view) => view.read(&entry.stored, &entry.info),
        }
    }

    /// As [`Self::read_bytes`], into a buffer of exactly the tensor's length.
    ///
    /// # Errors
    /// As [`Self::read_bytes`], or the buffer has another length.
    pub fn read_into(&self, name: &str, out: &mut [u8]) -> Result<()> {
        let entry = self.entry(name)?.in_one()?;
        match &self.files {
            Files::Folder(files) => files[entry.file].read_into(&entry.stored, out),
            Files::Gguf(view) => {
                let bytes = view.read(&entry.stored, &entry.info)?;
                if bytes.len() != out.len() {
                    let message =
                        format!("tensor `{name}` has {} bytes, the buffer {}", bytes.len(), out.len());
                    return Err(Error::Conversion(message));
                }
                out.copy_from_slice(&bytes);
                Ok(())
            }
        }
    }

    /// The first bytes of a tensor as stored; scales that lie elsewhere follow their codes.
    ///
    /// # Errors
    /// There is no such tensor, it is shorter, or reading fails.
    pub fn read_start(&self, name: &str, count: usize) -> Result<Vec<u8>> {
        let entry = self.entry(name)?;
        if let (Files::Folder(files), Some(scales)) = (&self.files, &entry.scales) {
            return entry.read_packed_start(files, scales, count);
        }
        let mut bytes = vec![0; count];
        match &self.files {
            Files::Folder(files) => files[entry.file].read_range_into(&entry.stored, 0, &mut bytes)?,
            Files::Gguf(view) => view.file().read_range_into(&entry.stored, 0, &mut bytes)?,
        }
        Ok(bytes)
    }

    /// A tensor's values, widened or dequantised.
    ///
    /// # Errors
    /// There is no such tensor, it holds no numbers that f32 can carry, or reading fails.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.entry(name)?;
        match &self.files {
            Files::Gguf(view) => view.read_f32(&entry.stored, &entry.info),
            Files::Folder(files) => entry.read_f32_rows(files, 0..entry.rows()),
        }
    }

    /// The values of some rows of a tensor's first dimension, such as one expert of stacked ones.
    ///
    /// No more is read and expanded than that, but for rows of GGUF queries and keys, which are reordered as a whole.
    ///
    /// # Errors
    /// As [`Self::read_f32`], or the tensor has no such rows.
    pub fn read_f32_rows(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>> {
        let entry = self.entry(name)?;
        if entry.info.shape.is_empty() || range.start > range.end || range.end > entry.rows() {
            let (name, shape) = (shown(name), &entry.info.shape);
            let message = format!("tensor `{name}` of shape {shape:?} has no rows {range:?}");
            return Err(Error::Conversion(message));
        }
        match &self.files {
            Files::Gguf(view) => view.read_f32_rows(&entry.stored, &entry.info, range),
            Files::Folder(files) => entry.read_f32_rows(files, range),
        }
    }

    /// The model's configuration: `config.json`, or what a GGUF file's metadata amount to in its fields.
    ///
    /// # Errors
    /// When there is none, or it is not JSON.
    pub fn config(&self) -> Result<Value> {
        if let Files::Gguf(view) = &self.files {
            return gguf_config::config(view);
        }
        folder_config(&self.path)?.ok_or_else(|| {
            Error::malformed(self.path.join("config.json"), "", "the model has no config.json")
        })
    }

    /// A text file beside the weights, `None` when there is none or the checkpoint is a GGUF file.
    ///
    /// # Errors
    /// When the file is longer than `limit_bytes`, not UTF-8, or cannot be read.
    pub fn read_text_file(&self, name: &str, limit_bytes: u64) -> Result<Option<String>> {
        match self.files {
            Files::Gguf(_) => Ok(None),
            Files::Folder(_) => read_text(&self.path.join(name), limit_bytes),
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries
            .get(name)
            .ok_or_else(|| Error::malformed(&self.path, "", format!("there is no tensor `{}`", shown(name))))
    }
}

impl Entry {
    /// The length of the first dimension; a scalar counts as one row.
    fn rows(&self) -> usize {
        self.info.shape.first().copied().unwrap_or(1)
    }

    /// The values of rows that the tensor has.
    fn read_f32_rows(&self, files: &[SafetensorsFile], range: Range<usize>) -> Result<Vec<f32>> {
        if let Some(scales) = &self.scales {
            return self.read_packed(files, scales, range);
        }
        let elements = self.info.elements() / self.rows().max(1) * range.len();
        let bytes = packed::read_rows(&files[self.file], &self.stored, self.rows(), range)?;
        let mut values = vec![0.0; elements];
        blocks::dequantize(self.info.dtype, &bytes, &mut values)
            .map_err(|error| error.of_tensor(&self.info.name))?;
        Ok(values)
    }

    /// Itself, if its bytes are those of one tensor.
    fn in_one(&self) -> Result<&Self> {
        if self.scales.is_none() {
            return Ok(self);
        }
        let message = format!(
            "tensor `{}` is {}, of which codes and scales are two tensors, so it has no bytes of its own",
            shown(&self.info.name),
            self.info.dtype
        );
        Err(Error::Conversion(message))
    }
}

/// The `config.json` of a folder, `None` when it has none.
fn folder_config(folder: &Path) -> Result<Option<Value>> {
    let path = folder.join("config.json");
    let Some(text) = read_text(&path, CONFIG_BYTES)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|error| {
        let place = format!("line {}, column {}", error.line(), error.column());
        Error::malformed(path, place, json_fault(&error))
    })
}

/// A whole text file of at most `limit_bytes`, `None` when it does not exist.
fn read_text(path: &Path, limit_bytes: u64) -> Result<Option<String>> {
    let kind = match std::fs::metadata(path) {
        Ok(kind) => kind,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    // Opening a pipe would wait for a writer.
    if !kind.is_file() {
        return Err(Error::unsupported(path, "this is not a regular file"));
    }
    let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit_bytes {
        return Err(Error::malformed(path, "", format!("the file is longer than {limit_bytes} bytes")));
    }
    String::from_utf8(bytes).map(Some).map_err(|error| {
        let place = format!("byte {}", error.utf8_error().valid_up_to());
        Error::malformed(path, place, "the text is not UTF-8")
    })
}
