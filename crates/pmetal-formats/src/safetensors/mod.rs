//! Safetensors files: a JSON header that is checked as a whole before a byte of data is handed out.
//!
//! Layout: eight bytes with the header's length (little-endian), the header, the data. The tensors' byte
//! ranges must tile the data exactly. Source: the format description in the safetensors repository.

mod header;
mod writer;

use std::collections::BTreeMap;
use std::path::Path;

use crate::source::{Source, shown};
use crate::{DType, Error, Result, TensorInfo};

pub use header::{MAX_HEADER_BYTES, MAX_METADATA_BYTES, MAX_METADATA_ENTRIES, MAX_TENSORS};
pub use writer::{SafetensorsWriter, TensorSpec, TensorView, write_safetensors};

/// A safetensors file, open for positioned reads; share it between threads by reference.
#[derive(Debug)]
pub struct SafetensorsFile {
    source: Source,
    tensors: Vec<TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl SafetensorsFile {
    /// Opens a file and checks its whole header.
    ///
    /// # Errors
    /// The file cannot be read, is another format (pickle and archives are named), or its header disagrees with
    /// its length or with itself.
    pub fn open(path: &Path) -> Result<Self> {
        crate::checkpoint::refuse_unsafe_extension(path)?;
        let source = Source::open(path)?;
        let header_length = header_length(&source)?;
        // Compared with the file's length above, so this allocates no more than the file holds.
        let mut bytes = vec![0_u8; header_length];
        source.read_exact_at(8, &mut bytes, "header")?;
        if bytes.first() != Some(&b'{') {
            crate::checkpoint::refuse_unsafe_magic(&source)?;
            let message = "the header does not start with `{`, so this is no safetensors file";
            return Err(Error::malformed(path, "byte 8", message));
        }
        let data_start = 8 + header_length as u64;
        let header::Header { tensors, metadata } =
            header::parse(&bytes, data_start, source.length - data_start)
                .map_err(|(place, message)| Error::malformed(path, place, message))?;
        Ok(Self { source, tensors, metadata })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.source.path
    }

    /// The free-form strings of the header, empty when it has none.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All tensors, in the order of their names.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        let index = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
        self.tensors.get(index)
    }

    /// Reads a whole tensor into `out`, which has exactly its length.
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
        self.read_range_into(name, 0, out)
    }

    /// Reads `out.len()` bytes of a tensor, starting at its byte `first`.
    ///
    /// # Errors
    /// No such tensor, a range beyond its end, or a file that was shortened after it was opened.
    pub fn read_range_into(&self, name: &str, first: u64, out: &mut [u8]) -> Result<()> {
        let info = self.required(name)?;
        crate::source::read_tensor_range(&self.source, info, first, out)
    }

    /// A tensor's values widened to f32.
    ///
    /// # Errors
    /// No such tensor, a type that f32 cannot carry, or a file that was shortened after it was opened.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let bytes = self.read(name)?;
        let (dtype, elements) = self.info(name).map_or((DType::F32, 0), |info| (info.dtype, info.elements()));
        let mut values = vec![0.0; elements];
        crate::blocks::dequantize(dtype, &bytes, &mut values).map_err(|error| error.of_tensor(name))?;
        Ok(values)
    }

    /// The values of a tensor of whole numbers.
    ///
    /// # Errors
    /// No such tensor, another type than I64, I32 or U8, or a file that was shortened after it was opened.
    pub fn read_i64(&self, name: &str) -> Result<Vec<i64>> {
        let bytes = self.read(name)?;
        match self.info(name).map(|info| info.dtype) {
            Some(DType::I64) => {
                Ok(bytes.as_chunks::<8>().0.iter().map(|raw| i64::from_le_bytes(*raw)).collect())
            }
            Some(DType::I32) => {
                Ok(bytes.as_chunks::<4>().0.iter().map(|raw| i64::from(i32::from_le_bytes(*raw))).collect())
            }
            Some(DType::U8 | DType::Bool) => Ok(bytes.into_iter().map(i64::from).collect()),
            _ => Err(Error::Conversion(format!("tensor `{}` holds no whole numbers", shown(name)))),
        }
    }

    /// Reads a whole tensor.
    ///
    /// # Errors
    /// No such tensor, or a file that was shortened after it was opened.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let mut bytes = crate::source::tensor_buffer(&self.source, self.required(name)?)?;
        self.read_range_into(name, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn required(&self, name: &str) -> Result<&TensorInfo> {
        self.info(name).ok_or_else(|| {
            Error::malformed(self.path(), "header", format!("there is no tensor `{}`", shown(name)))
        })
    }
}

/// Reads the first eight bytes and compares them with the file's length.
fn header_length(source: &Source) -> Result<usize> {
    if source.length < 8 {
        let message = format!("the file has {} bytes, too few for the 8-byte header length", source.length);
        return Err(Error::malformed(&source.path, "byte 0", message));
    }
    let mut length = [0_u8; 8];
    source.read_exact_at(0, &mut length, "header length")?;
    let length = u64::from_le_bytes(length);
    let problem = if length > MAX_HEADER_BYTES {
        format!("the header length is {length}, more than the limit of {MAX_HEADER_BYTES} bytes")
    } else if length > source.length - 8 {
        format!("the header length is {length}, but only {} bytes follow it", source.length - 8)
    } else if length < 2 {
        format!("the header length is {length}, less than the 2 bytes of the smallest header")
    } else {
        return usize::try_from(length)
            .map_err(|_| Error::unsupported(&source.path, "the header exceeds the address space"));
    };
    crate::checkpoint::refuse_unsafe_magic(source)?;
    Err(Error::malformed(&source.path, "byte 0", problem))
}
