//! Reads the header of a GGUF file, comparing every count with the bytes that are left.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::metadata::{GgufArray, GgufMetadata, GgufStrings, GgufValue};
use crate::source::{Source, shown};
use crate::{DType, Error, Result, TensorInfo};

/// The most metadata keys; released files have fewer than a hundred.
const MAX_KEYS: u64 = 1 << 16;
/// The most tensors in one file; released files have a few thousand, since experts are stacked.
const MAX_TENSORS: u64 = 1 << 16;
/// The longest key or tensor name in bytes; the format says 65535 for keys and 64 for tensors.
const MAX_KEY_BYTES: u64 = 65_535;
const MAX_NAME_BYTES: u64 = 255;
/// How deep arrays of arrays may nest, and how many of them a file may hold.
const MAX_ARRAY_DEPTH: u32 = 4;
const MAX_INNER_ARRAYS: u64 = 1 << 16;
/// GGML's own limit.
const MAX_DIMENSIONS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
/// The fewest bytes of a metadata entry (key length, type, one byte) and of a tensor entry.
const LEAST_KEY_ENTRY: u64 = 8 + 4 + 1;
const LEAST_TENSOR_ENTRY: u64 = 8 + 4 + 4 + 8;

/// What the header says, checked.
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: GgufMetadata,
    pub(super) tensors: Vec<TensorInfo>,
}

struct Reader<'a> {
    input: BufReader<&'a File>,
    path: &'a Path,
    length: u64,
    position: u64,
    inner_arrays: u64,
}

/// Reads and checks everything before the data section.
pub(super) fn parse(source: &Source) -> Result<Header> {
    let mut reader = Reader {
        input: BufReader::with_capacity(1 << 16, &source.file),
        path: &source.path,
        length: source.length,
        position: 0,
        inner_arrays: 0,
    };
    let version = reader.version(source)?;
    let tensor_count = reader.count("tensors", MAX_TENSORS, LEAST_TENSOR_ENTRY)?;
    let key_count = reader.count("metadata keys", MAX_KEYS, LEAST_KEY_ENTRY)?;
    let metadata = reader.metadata(key_count)?;
    let alignment = alignment(&metadata).map_err(|message| reader.refuse("metadata", message))?;
    let mut tensors = Vec::new();
    for index in 0..tensor_count {
        tensors.push(reader.tensor(index, alignment)?);
    }
    let data_start = reader.position.next_multiple_of(alignment);
    place_tensors(&mut tensors, data_start, source)?;
    Ok(Header { version, metadata, tensors })
}

fn alignment(metadata: &GgufMetadata) -> std::result::Result<u64, String> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(GgufValue::U32(value)) if value.is_power_of_two() && (8..=1 << 16).contains(value) => {
            Ok((*value).into())
        }
        Some(GgufValue::U32(value)) => {
            Err(format!("`general.alignment` is {value}, not a power of two from 8 to 65536"))
        }
        Some(other) => Err(format!("`general.alignment` has type {}, not u32", other.type_name())),
    }
}

/// Turns offsets into file positions, and demands that tensors lie inside the file and do not overlap.
fn place_tensors(tensors: &mut [TensorInfo], data_start: u64, source: &Source) -> Result<()> {
    let refuse = |tensor: &TensorInfo, message: String| {
        Err(Error::malformed(&source.path, format!("tensor `{}`", shown(&tensor.name)), message))
    };
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    let mut end = 0;
    for tensor in tensors.iter_mut() {
        if tensor.offset < end {
            let message = format!(
                "its data starts at byte {} of the data section, inside the preceding tensor, which ends at {end}",
                tensor.offset
            );
            return refuse(tensor, message);
        }
        let place = data_start.checked_add(tensor.offset);
        let Some(file_end) = place.and_then(|place| place.checked_add(tensor.bytes)) else {
            return refuse(tensor, format!("its data offset {} exceeds 64 bits", tensor.offset));
        };
        if file_end > source.length {
            let message = format!(
                "its {} bytes end at byte {file_end}, but the file has only {}",
                tensor.bytes, source.length
            );
            return refuse(tensor, message);
        }
        end = tensor.offset + tensor.bytes;
        tensor.offset += data_start;
    }
    tensors.sort_by(|one, other| one.name.cmp(&other.name));
    match tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        Some(pair) => refuse(&pair[0], "the name is present twice".to_owned()),
        None => Ok(()),
    }
}

impl Reader<'_> {
    fn refuse(&self, place: &str, message: impl Into<String>) -> Error {
        Error::malformed(self.path, format!("{place}, byte {}", self.position), message)
    }

    fn left(&self) -> u64 {
        self.length - self.position
    }

    /// Refuses `count` things of at least `bytes` bytes each when the file has fewer bytes left.
    fn demand(&self, place: &str, count: u64, bytes: u64) -> Result<()> {
        match count.checked_mul(bytes) {
            Some(needed) if needed <= self.left() => Ok(()),
            _ => {
                let message = format!(
                    "{count} of at least {bytes} bytes are announced, but {} bytes are left",
                    self.left()
                );
                Err(self.refuse(place, message))
            }
        }
    }

    fn fill(&mut self, place: &str, out: &mut [u8]) -> Result<()> {
        let needed = out.len() as u64;
        if needed > self.left() {
            let message = format!("{needed} bytes are needed, but {} are left", self.left());
            return Err(self.refuse(place, message));
        }
        self.input.read_exact(out).map_err(Error::io("read", self.path))?;
        self.position += needed;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, place: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        self.fill(place, &mut out)?;
        Ok(out)
    }

    fn u32(&mut self, place: &str) -> Result<u32> {
        self.bytes(place).map(u32::from_le_bytes)
    }

    fn u64(&mut self, place: &str) -> Result<u64> {
        self.bytes(place).map(u64::from_le_bytes)
    }

    /// A string whose length is compared with `limit` and with the bytes that are left.
    fn string(&mut self, place: &str, limit: u64) -> Result<String> {
        let length = self.u64(place)?;
        if length > limit {
            return Err(
                self.refuse(place, format!("a string of {length} bytes exceeds the limit of {limit}"))
            );
        }
        self.demand(place, length, 1)?;
        let length =
            usize::try_from(length).map_err(|_| self.refuse(place, "a string exceeds the address space"))?;
        let mut bytes = vec![0; length];
        self.fill(place, &mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.refuse(place, "a string is not UTF-8"))
    }

    fn version(&mut self, source: &Source) -> Result<u32> {
        let magic: [u8; 4] = self.bytes("magic")?;
        if &magic != b"GGUF" {
            crate::checkpoint::refuse_unsafe_magic(source)?;
            let message = format!("the file starts with {}, not `GGUF`", magic.escape_ascii());
            return Err(Error::malformed(self.path, "byte 0", message));
        }
        match self.u32("version")? {
            version @ (2 | 3) => Ok(version),
            1 => Err(Error::unsupported(self.path, "GGUF version 1 is not read; convert the model again")),
            swapped if matches!(swapped.swap_bytes(), 1..=0xffff) => Err(Error::unsupported(
                self.path,
                format!(
                    "this is a big-endian GGUF file (version {}), only little-endian is read",
                    swapped.swap_bytes()
                ),
            )),
            other => Err(Error::unsupported(
                self.path,
                format!("GGUF version {other} is not known, only 2 and 3 are"),
            )),
        }
    }

    fn count(&mut self, what: &str, limit: u64, least_bytes: u64) -> Result<u64> {
        let count = self.u64(what)?;
        if count > limit {
            return Err(self.refuse(what, format!("{count} {what} exceed the limit of {limit}")));
        }
        self.demand(what, count, least_bytes)?;
        Ok(count)
    }

    fn metadata(&mut self, count: u64) -> Result<GgufMetadata> {
        let mut metadata = BTreeMap::new();
        for index in 0..count {
            let key = self.string(&format!("metadata key {index}"), MAX_KEY_BYTES)?;
            let place = format!("metadata key `{}`", shown(&key));
            let kind = self.u32(&place)?;
            let value = self.value(kind, &place)?;
            if metadata.insert(key, value).is_some() {
                return Err(self.refuse(&place, "the key is present twice"));
            }
        }
        Ok(GgufMetadata(metadata))
    }

    fn value(&mut self, kind: u32, place: &str) -> Result<GgufValue> {
        Ok(match kind {
            0 => GgufValue::U8(u8::from_le_bytes(self.bytes(place)?)),
            1 => GgufValue::I8(i8::from_le_bytes(self.bytes(place)?)),
            2 => GgufValue::U16(u16::from_le_bytes(self.bytes(place)?)),
            3 => GgufValue::I16(i16::from_le_bytes(self.bytes(place)?)),
            4 => GgufValue::U32(self.u32(place)?),
            5 => GgufValue::I32(i32::from_le_bytes(self.bytes(place)?)),
            6 => GgufValue::F32(f32::from_le_bytes(self.bytes(place)?)),
            7 => {
                let byte = u8::from_le_bytes(self.bytes(place)?);
                GgufValue::Bool(self.truth(byte, place)?)
            }
            8 => GgufValue::String(self.string(place, u64::MAX)?),
            9 => GgufValue::Array(self.array(place, 1)?),
            10 => GgufValue::U64(self.u64(place)?),
            11 => GgufValue::I64(i64::from_le_bytes(self.bytes(place)?)),
            12 => GgufValue::F64(f64::from_le_bytes(self.bytes(place)?)),
            other => return Err(self.refuse(place, format!("value type {other} is not known"))),
        })
    }

    fn truth(&self, byte: u8, place: &str) -> Result<bool> {
        match byte {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.refuse(place, format!("a truth value is {other}, neither 0 nor 1"))),
        }
    }

    fn array(&mut self, place: &str, depth: u32) -> Result<GgufArray> {
        if depth > MAX_ARRAY_DEPTH {
            return Err(self.refuse(place, format!("arrays nest deeper than {MAX_ARRAY_DEPTH}")));
        }
        let kind = self.u32(place)?;
        let count = self.u64(place)?;
        Ok(match kind {
            0 => GgufArray::U8(self.numbers(place, count, u8::from_le_bytes)?),
            1 => GgufArray::I8(self.numbers(place, count, i8::from_le_bytes)?),
            2 => GgufArray::U16(self.numbers(place, count, u16::from_le_bytes)?),
            3 => GgufArray::I16(self.numbers(place, count, i16::from_le_bytes)?),
            4 => GgufArray::U32(self.numbers(place, count, u32::from_le_bytes)?),
            5 => GgufArray::I32(self.numbers(place, count, i32::from_le_bytes)?),
            6 => GgufArray::F32(self.numbers(place, count, f32::from_le_bytes)?),
            7 => {
                let bytes = self.numbers(place, count, u8::from_le_bytes)?;
                GgufArray::Bool(bytes.into_iter().map(|byte| self.truth(byte, place)).collect::<Result<_>>()?)
            }
            8 => GgufArray::Strings(self.strings(place, count)?),
            9 => GgufArray::Arrays(self.arrays(place, count, depth)?),
            10 => GgufArray::U64(self.numbers(place, count, u64::from_le_bytes)?),
            11 => GgufArray::I64(self.numbers(place, count, i64::from_le_bytes)?),
            12 => GgufArray::F64(self.numbers(place, count, f64::from_le_bytes)?),
            other => return Err(self.refuse(place, format!("array element type {other} is not known"))),
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        place: &str,
        count: u64,
        decode: fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        self.demand(place, count, N as u64)?;
        let mut list = Vec::with_capacity(usize::try_from(count).unwrap_or(0));
        for _ in 0..count {
            list.push(decode(self.bytes(place)?));
        }
        Ok(list)
    }

    fn strings(&mut self, place: &str, count: u64) -> Result<GgufStrings> {
        self.demand(place, count, 8)?;
        let mut list = GgufStrings::with_capacity(usize::try_from(count).unwrap_or(0));
        for _ in 0..count {
            list.push(&self.string(place, u64::MAX)?);
        }
        Ok(list)
    }

    fn arrays(&mut self, place: &str, count: u64, depth: u32) -> Result<Vec<GgufArray>> {
        self.demand(place, count, 12)?;
        self.inner_arrays = self.inner_arrays.saturating_add(count);
        if self.inner_arrays > MAX_INNER_ARRAYS {
            return Err(
                self.refuse(place, format!("there are more than {MAX_INNER_ARRAYS} arrays inside arrays"))
            );
        }
        (0..count).map(|_| self.array(place, depth + 1)).collect()
    }

    fn tensor(&mut self, index: u64, alignment: u64) -> Result<TensorInfo> {
        let name = self.string(&format!("tensor {index}"), MAX_NAME_BYTES)?;
        let place = format!("tensor `{}`", shown(&name));
        let dimensions = self.u32(&place)?;
        if dimensions > MAX_DIMENSIONS {
            return Err(
                self.refuse(&place, format!("it has {dimensions} dimensions, more than {MAX_DIMENSIONS}"))
            );
        }
        let lengths = (0..dimensions).map(|_| self.u64(&place)).collect::<Result<Vec<_>>>()?;
        let kind = self.u32(&place)?;
        let dtype = DType::from_gguf_id(kind).ok_or_else(|| {
            let name = unread_type_name(kind).map_or_else(|| format!("number {kind}"), str::to_owned);
            Error::unsupported(
                self.path,
                format!("{place} has type {name}, which this program does not read"),
            )
        })?;
        let offset = self.u64(&place)?;
        if offset % alignment != 0 {
            let message = format!("its data offset {offset} is no multiple of the alignment {alignment}");
            return Err(self.refuse(&place, message));
        }
        let row = lengths.first().copied().unwrap_or(1);
        if row % dtype.block_elements() != 0 {
            let blocks = dtype.block_elements();
            let message =
                format!("its rows of {row} elements are no whole number of {dtype} blocks of {blocks}");
            return Err(self.refuse(&place, message));
        }
        // A dimension of zero must not hide that the product of the others overflows in another order.
        let product = lengths.iter().try_fold(1_u64, |product, &length| product.checked_mul(length.max(1)));
        let bytes = product
            .map(|elements| if lengths.contains(&0) { 0 } else { elements })
            .and_then(|elements| dtype.bytes_for(elements))
            .ok_or_else(|| self.refuse(&place, format!("its size {lengths:?} exceeds 64 bits")))?;
        // GGML lists the contiguous dimension first.
        let shape = lengths
            .iter()
            .rev()
            .map(|&length| usize::try_from(length))
            .collect::<std::result::Result<Vec<_>, _>>();
        let shape = shape
            .map_err(|_| self.refuse(&place, format!("its size {lengths:?} exceeds the address space")))?;
        Ok(TensorInfo { name, dtype, shape, offset, bytes })
    }
}

/// Names of GGML types that are known but not read, so that a message can say more than a number.
fn unread_type_name(kind: u32) -> Option<&'static str> {
    Some(match kind {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        _ => return None,
    })
}
