//! Writes safetensors in the byte order that the Python package writes: wide dtypes first, then by name.

use std::collections::BTreeMap;
use std::io::Write;

use crate::source::shown;
use crate::{DType, Error, Result};

/// A tensor to be written, without its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name; unique in the file.
    pub name: String,
    /// Any dtype but the block formats.
    pub dtype: DType,
    /// Row-major.
    pub shape: Vec<usize>,
}

/// A tensor to be written, with its data in little-endian order.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// The name; unique in the file.
    pub name: &'a str,
    /// Any dtype but the block formats.
    pub dtype: DType,
    /// Row-major.
    pub shape: &'a [usize],
    /// Exactly the bytes of shape and dtype.
    pub data: &'a [u8],
}

/// Writes a whole file to a stream; the same tensors give the same bytes in whatever order they come.
///
/// # Errors
/// Duplicate names, a block dtype, data of another length than shape and dtype demand, or a failing stream.
/// What was written until then stays in the stream.
pub fn write_safetensors(
    writer: &mut dyn Write,
    tensors: &[TensorView<'_>],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let specs = tensors
        .iter()
        .map(|tensor| TensorSpec {
            name: tensor.name.to_owned(),
            dtype: tensor.dtype,
            shape: tensor.shape.to_vec(),
        })
        .collect();
    let by_name: BTreeMap<&str, &[u8]> = tensors.iter().map(|tensor| (tensor.name, tensor.data)).collect();
    let mut stream = SafetensorsWriter::begin(writer, specs, metadata)?;
    while let Some(next) = stream.next_tensor() {
        let data = by_name.get(next.name.as_str()).copied().unwrap_or_default();
        stream.write_tensor(data)?;
    }
    stream.finish()
}

/// Writes a file tensor by tensor, so that not all of them need to be in memory at once.
///
/// The header goes out first; then ask [`next_tensor`](Self::next_tensor) which tensor is due, and give its bytes.
pub struct SafetensorsWriter<'w> {
    writer: &'w mut dyn Write,
    order: Vec<TensorSpec>,
    position: usize,
}

impl<'w> SafetensorsWriter<'w> {
    /// Checks the tensors and writes the header.
    ///
    /// # Errors
    /// Duplicate names, a block dtype, a size beyond 64 bits, a header beyond the format's limit, or a failing stream.
    pub fn begin(
        writer: &'w mut dyn Write,
        tensors: Vec<TensorSpec>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut order = tensors;
        sort(&mut order);
        let header = header_bytes(&order, metadata)?;
        let failed = |source| Error::Write { what: "the safetensors header".to_owned(), source };
        writer.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
        writer.write_all(&header).map_err(failed)?;
        Ok(Self { writer, order, position: 0 })
    }

    /// The length of the file that these tensors and metadata make, in whatever order they are given.
    ///
    /// # Errors
    /// As [`begin`](Self::begin), but for the stream's.
    pub fn file_bytes(tensors: &[TensorSpec], metadata: &BTreeMap<String, String>) -> Result<u64> {
        let mut order = tensors.to_vec();
        sort(&mut order);
        let mut bytes = 8 + header_bytes(&order, metadata)?.len() as u64;
        for spec in &order {
            bytes = bytes.saturating_add(spec_bytes(spec)?);
        }
        Ok(bytes)
    }

    /// The tensor whose data is due; `None` when all were written.
    pub fn next_tensor(&self) -> Option<&TensorSpec> {
        self.order.get(self.position)
    }

    /// Writes the data of the tensor that is due.
    ///
    /// # Errors
    /// No tensor is due, the length is not that of the tensor, or the stream fails.
    pub fn write_tensor(&mut self, data: &[u8]) -> Result<()> {
        let Some(spec) = self.order.get(self.position) else {
            return Err(Error::Unwritable("data was given after the last tensor".to_owned()));
        };
        let needed = spec_bytes(spec)?;
        if data.len() as u64 != needed {
            let name = shown(&spec.name);
            let message = format!("tensor `{name}` needs {needed} bytes, but was given {}", data.len());
            return Err(Error::Unwritable(message));
        }
        self.writer
            .write_all(data)
            .map_err(|source| Error::Write { what: format!("tensor `{}`", shown(&spec.name)), source })?;
        self.position += 1;
        Ok(())
    }

    /// Ends the file; the stream is not flushed or synced.
    ///
    /// # Errors
    /// A tensor of the header was not written.
    pub fn finish(self) -> Result<()> {
        match self.next_tensor() {
            Some(spec) => {
                Err(Error::Unwritable(format!("the data of tensor `{}` is missing", shown(&spec.name))))
            }
            None => Ok(()),
        }
    }
}

fn spec_bytes(spec: &TensorSpec) -> Result<u64> {
    spec.shape
        .iter()
        .try_fold(1_u64, |product, &length| product.checked_mul(length as u64))
        .and_then(|elements| spec.dtype.bytes_for(elements))
        .ok_or_else(|| {
            let name = shown(&spec.name);
            Error::Unwritable(format!("tensor `{name}` of shape {:?} exceeds 64 bits", spec.shape))
        })
}

/// The order of the Python package: wide dtypes first, then by name.
fn sort(tensors: &mut [TensorSpec]) {
    tensors.sort_by(|one, other| {
        other.dtype.block_bytes().cmp(&one.dtype.block_bytes()).then_with(|| one.name.cmp(&other.name))
    });
}

/// The header with its padding: spaces up to a multiple of eight, so that the data is aligned.
fn header_bytes(order: &[TensorSpec], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut names: Vec<&str> = order.iter().map(|spec| spec.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::Unwritable(format!("tensor `{}` is given twice", shown(pair[0]))));
    }
    let mut header = serde_json::Map::new();
    let strings: usize = metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
    if metadata.len() > super::MAX_METADATA_ENTRIES || strings > super::MAX_METADATA_BYTES {
        let message = format!("{} metadata entries of {strings} bytes are beyond the limit", metadata.len());
        return Err(Error::Unwritable(message));
    }
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), serde_json::json!(metadata));
    }
    let mut begin = 0_u64;
    for spec in order {
        let name = spec.name.as_str();
        if name == "__metadata__" {
            return Err(Error::Unwritable(
                "a tensor is named `__metadata__`, which the format reserves".to_owned(),
            ));
        }
        let dtype = spec.dtype.safetensors_name().ok_or_else(|| {
            Error::Unwritable(format!(
                "tensor `{}` has dtype {}, which the format lacks",
                shown(name),
                spec.dtype
            ))
        })?;
        let end = begin
            .checked_add(spec_bytes(spec)?)
            .ok_or_else(|| Error::Unwritable("the tensors exceed 64 bits".to_owned()))?;
        let entry = serde_json::json!({ "dtype": dtype, "shape": spec.shape, "data_offsets": [begin, end] });
        header.insert(name.to_owned(), entry);
        begin = end;
    }
    let mut bytes = serde_json::Value::Object(header).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    if bytes.len() as u64 > super::MAX_HEADER_BYTES || order.len() > super::MAX_TENSORS {
        let message =
            format!("{} tensors make a header of {} bytes, beyond the limit", order.len(), bytes.len());
        return Err(Error::Unwritable(message));
    }
    Ok(bytes)
}
