//! A GGUF file under Hugging Face names.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::{Checkpoint, Entry, Files};
use crate::gguf::{GgufArchitecture, GgufFile, hugging_face_name};
use crate::source::shown;
use crate::{Error, Result, TensorInfo, blocks};

/// The tensor that carries Llama 3's rotary divisors; part of the configuration, not of the weights.
pub(super) const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// An open GGUF file of a known architecture.
#[derive(Debug)]
pub(super) struct GgufView {
    file: GgufFile,
    architecture: GgufArchitecture,
    query_heads: usize,
    key_value_heads: usize,
}

pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    let file = GgufFile::open(path)?;
    refuse_partial_models(&file)?;
    let name = file.metadata().string("general.architecture")?;
    let architecture = GgufArchitecture::from_name(name).ok_or_else(|| {
        let message = format!("`general.architecture` is `{}`, known are llama, qwen2, qwen3", shown(name));
        Error::unsupported(path, message)
    })?;
    let count = |key: &str| -> Result<usize> {
        let value = file.metadata().u64(&format!("{name}.{key}"))?;
        if (1..=1 << 16).contains(&value) {
            return Ok(value as usize);
        }
        Err(Error::malformed(path, format!("`{name}.{key}`"), format!("{value} is not a number of heads")))
    };
    let query_heads = count("attention.head_count")?;
    let key_value_heads = match file.metadata().has(&format!("{name}.attention.head_count_kv")) {
        true => count("attention.head_count_kv")?,
        false => query_heads,
    };
    let mut entries = BTreeMap::new();
    for info in file.tensors().iter().filter(|info| info.name != ROPE_DIVISORS) {
        // A name without counterpart stays as it is: the model will say that nothing uses it.
        let renamed = hugging_face_name(architecture, &info.name).unwrap_or_else(|| info.name.clone());
        let entry = Entry {
            info: TensorInfo { name: renamed.clone(), ..info.clone() },
            file: 0,
            stored: info.name.clone(),
            scales: None,
        };
        if let Some(other) = entries.insert(renamed, entry) {
            let message = format!(
                "the tensors `{}` and `{}` are the same one",
                shown(&other.stored),
                shown(&info.name)
            );
            return Err(Error::malformed(path, "header", message));
        }
    }
    let view = GgufView { architecture, query_heads, key_value_heads, file };
    Ok(Checkpoint { path: path.to_path_buf(), entries, files: Files::Gguf(Box::new(view)) })
}

/// Refuses files that hold an adapter, or one part of a model that was split.
fn refuse_partial_models(file: &GgufFile) -> Result<()> {
    let metadata = file.metadata();
    if metadata.has("general.type") {
        let kind = metadata.string("general.type")?;
        if kind != "model" {
            let message = format!("`general.type` is `{}`, only `model` can be opened as one", shown(kind));
            return Err(Error::unsupported(file.path(), message));
        }
    }
    if metadata.has("split.count") {
        let parts = metadata.u64("split.count")?;
        if parts > 1 {
            let message = format!(
                "this is one of {parts} parts of a split model; join them with llama.cpp's `llama-gguf-split`"
            );
            return Err(Error::unsupported(file.path(), message));
        }
    }
    Ok(())
}

impl GgufView {
    pub(super) fn file(&self) -> &GgufFile {
        &self.file
    }

    pub(super) fn architecture(&self) -> GgufArchitecture {
        self.architecture
    }

    pub(super) fn query_heads(&self) -> usize {
        self.query_heads
    }

    pub(super) fn key_value_heads(&self) -> usize {
        self.key_value_heads
    }

    pub(super) fn read(&self, stored: &str, info: &TensorInfo) -> Result<Vec<u8>> {
        let bytes = self.file.read(stored)?;
        let Some(heads) = self.rotated_heads(info) else { return Ok(bytes) };
        let row_elements: usize = info.shape.iter().skip(1).product();
        if !(row_elements as u64).is_multiple_of(info.dtype.block_elements()) {
            let message = format!(
                "tensor `{}` of shape {:?} has rows that are no whole number of {} blocks, so they cannot be reordered",
                shown(&info.name),
                info.shape,
                info.dtype
            );
            return Err(Error::unsupported(self.file.path(), message));
        }
        self.half_split(&bytes, info, heads)
    }

    /// A tensor's values; expanded before rows are reordered, so that rows may share blocks.
    pub(super) fn read_f32(&self, stored: &str, info: &TensorInfo) -> Result<Vec<f32>> {
        let mut values = vec![0.0; info.elements()];
        blocks::dequantize(info.dtype, &self.file.read(stored)?, &mut values)
            .map_err(|error| error.of_tensor(&info.name))?;
        match self.rotated_heads(info) {
            Some(heads) => self.half_split(&values, info, heads),
            None => Ok(values),
        }
    }

    /// Some rows of the first dimension, which the tensor has.
    pub(super) fn read_f32_rows(
        &self,
        stored: &str,
        info: &TensorInfo,
        range: Range<usize>,
    ) -> Result<Vec<f32>> {
        let row = info.elements() / info.shape.first().copied().unwrap_or(1).max(1);
        let row_bytes = info.dtype.bytes_for(row as u64);
        let (Some(row_bytes), None) = (row_bytes, self.rotated_heads(info)) else {
            let values = self.read_f32(stored, info)?;
            return Ok(values[range.start * row..range.end * row].to_vec());
        };
        let mut values = vec![0.0; range.len() * row];
        let mut bytes = vec![0; range.len() * row_bytes as usize];
        self.file.read_range_into(stored, range.start as u64 * row_bytes, &mut bytes)?;
        blocks::dequantize(info.dtype, &bytes, &mut values).map_err(|error| error.of_tensor(&info.name))?;
        Ok(values)
    }

    /// The heads of a tensor whose rows llama.cpp's converter has reordered.
    fn rotated_heads(&self, info: &TensorInfo) -> Option<usize> {
        if !self.architecture.permutes_rotary_rows() {
            None
        } else if info.name.contains(".self_attn.q_proj.") {
            Some(self.query_heads)
        } else if info.name.contains(".self_attn.k_proj.") {
            Some(self.key_value_heads)
        } else {
            None
        }
    }

    /// Undoes the row order of llama.cpp's converter: row 2i + j of a head is row i + j * half of the original.
    fn half_split<T: Copy>(&self, content: &[T], info: &TensorInfo, heads: usize) -> Result<Vec<T>> {
        let rows = info.shape.first().copied().unwrap_or(0);
        let half = rows / heads / 2;
        if half == 0 || rows != heads * half * 2 {
            let message = format!("{rows} rows do not make {heads} heads of an even width");
            return Err(Error::malformed(
                self.file.path(),
                format!("tensor `{}`", shown(&info.name)),
                message,
            ));
        }
        let row = content.len() / rows;
        let mut ordered = Vec::with_capacity(content.len());
        for head in 0..heads {
            for part in 0..2 {
                for index in 0..half {
                    let source = (head * 2 * half + 2 * index + part) * row;
                    ordered.extend_from_slice(&content[source..source + row]);
                }
            }
        }
        Ok(ordered)
    }

    /// Llama 3's rotary divisors, when the file carries them.
    pub(super) fn rope_divisors(&self) -> Result<Option<Vec<f32>>> {
        let Some(info) = self.file.info(ROPE_DIVISORS) else { return Ok(None) };
        let mut values = vec![0.0; info.elements()];
        blocks::dequantize(info.dtype, &self.file.read(ROPE_DIVISORS)?, &mut values)?;
        Ok(Some(values))
    }

    /// Whether the file has a head of its own.
    pub(super) fn has_head(&self) -> bool {
        self.file.info("output.weight").is_some()
    }

    /// Rows of the embedding.
    pub(super) fn vocabulary(&self) -> Result<usize> {
        let info = self.file.info("token_embd.weight").ok_or_else(|| {
            Error::malformed(self.file.path(), "", "there is no tensor `token_embd.weight`")
        })?;
        Ok(info.shape.first().copied().unwrap_or(0))
    }

    /// Whether query projections carry biases, which for Llama says `attention_bias`.
    pub(super) fn has_attention_bias(&self) -> bool {
        self.file.info("blk.0.attn_q.bias").is_some()
    }
}
