//! The JSON header, read by visitors that accept nothing but the documented form.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::source::{json_fault, shown};
use crate::{DType, TensorInfo};

/// The longest header that is read, the limit of the reference implementation.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The most tensors in one file; the largest released shard has a tenth of this.
pub const MAX_TENSORS: usize = 1 << 16;
/// The most entries of `__metadata__`; training programs write a few hundred.
pub const MAX_METADATA_ENTRIES: usize = 1 << 12;
/// The most bytes of all keys and values of `__metadata__` together, and of any string of the header. Training
/// programs store statistics of their datasets there.
pub const MAX_METADATA_BYTES: usize = 8 << 20;
/// The most dimensions of one tensor.
const MAX_DIMENSIONS: usize = 16;

/// What the header says, checked.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// A place in the file and a sentence about it.
type Refusal = (String, String);

/// Reads and checks a header; the data starts at byte `data_start` of the file and has `data_bytes` bytes.
pub(super) fn parse(bytes: &[u8], data_start: u64, data_bytes: u64) -> Result<Header, Refusal> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        (format!("byte {}", 8 + error.valid_up_to()), "the header is not UTF-8".to_owned())
    })?;
    check_strings(bytes)?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let mut header = deserializer
        .deserialize_map(HeaderVisitor)
        .map_err(|error| ("header".to_owned(), json_fault(&error)))?;
    deserializer.end().map_err(|error| ("header".to_owned(), json_fault(&error)))?;
    check_tiling(&header.tensors, data_bytes)?;
    for tensor in &mut header.tensors {
        tensor.offset += data_start;
    }
    Ok(header)
}

/// Refuses a long string before the parser copies it.
fn check_strings(bytes: &[u8]) -> Result<(), Refusal> {
    let (mut start, mut is_escaped) = (None, false);
    for (index, &byte) in bytes.iter().enumerate() {
        let Some(begin) = start else {
            start = (byte == b'"').then_some(index);
            continue;
        };
        if index - begin > MAX_METADATA_BYTES {
            let message = format!("a string is longer than {MAX_METADATA_BYTES} bytes");
            return Err((format!("byte {}", 8 + begin), message));
        }
        if byte == b'"' && !is_escaped {
            start = None;
        }
        is_escaped = byte == b'\\' && !is_escaped;
    }
    Ok(())
}

/// Demands that the byte ranges cover the data section once, without a gap.
fn check_tiling(tensors: &[TensorInfo], data_bytes: u64) -> Result<(), Refusal> {
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    let mut end = 0_u64;
    for tensor in order {
        let refusal = |what: &str| {
            let message =
                format!("its data starts at byte {} of the data section, {what} byte {end}", tensor.offset);
            Err((format!("tensor `{}`", shown(&tensor.name)), message))
        };
        if tensor.offset < end {
            return refusal("inside the preceding tensor, which ends at");
        }
        if tensor.offset > end {
            return refusal("leaving a gap after");
        }
        end = tensor.offset.saturating_add(tensor.bytes);
        if end > data_bytes {
            let message =
                format!("its data ends at byte {end}, but the file has only {data_bytes} bytes of data");
            return Err((format!("tensor `{}`", shown(&tensor.name)), message));
        }
    }
    if end != data_bytes {
        let message = format!("the tensors end at byte {end}, but the file has {data_bytes} bytes of data");
        return Err(("data section".to_owned(), message));
    }
    Ok(())
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a map from tensor names to their descriptions")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut metadata = None;
        let mut tensors: Vec<TensorInfo> = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if metadata.replace(map.next_value_seed(MetadataSeed)?).is_some() {
                    return Err(de::Error::custom("`__metadata__` is present twice"));
                }
                continue;
            }
            if tensors.len() == MAX_TENSORS {
                return Err(de::Error::custom(format_args!("there are more than {MAX_TENSORS} tensors")));
            }
            tensors.push(map.next_value_seed(TensorSeed { name })?);
        }
        tensors.sort_by(|one, other| one.name.cmp(&other.name));
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(de::Error::custom(format_args!(
                "tensor `{}` is present twice",
                shown(&pair[0].name)
            )));
        }
        tensors.shrink_to_fit();
        Ok(Header { tensors, metadata: metadata.unwrap_or_default() })
    }
}

struct MetadataSeed;

impl<'de> DeserializeSeed<'de> for MetadataSeed {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("`__metadata__` to be a map from strings to strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut metadata, mut bytes) = (BTreeMap::new(), 0_usize);
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            bytes += key.len() + value.len();
            if metadata.len() == MAX_METADATA_ENTRIES || bytes > MAX_METADATA_BYTES {
                return Err(de::Error::custom(format_args!(
                    "`__metadata__` has more than {MAX_METADATA_ENTRIES} entries or {MAX_METADATA_BYTES} bytes"
                )));
            }
            if metadata.contains_key(&key) {
                let key = shown(&key);
                return Err(de::Error::custom(format_args!(
                    "key `{key}` of `__metadata__` is present twice"
                )));
            }
            metadata.insert(key, value);
        }
        Ok(metadata)
    }
}

struct TensorSeed {
    name: String,
}

impl TensorSeed {
    fn refuse<E: de::Error>(&self, problem: impl fmt::Display) -> E {
        E::custom(format_args!("tensor `{}` {problem}", shown(&self.name)))
    }

    fn set_once<T, E: de::Error>(&self, field: &str, slot: &mut Option<T>, value: T) -> Result<(), E> {
        match slot.replace(value) {
            Some(_) => Err(self.refuse(format_args!("has field `{field}` twice"))),
            None => Ok(()),
        }
    }

    fn check<E: de::Error>(
        self,
        dtype: Option<DType>,
        shape: Option<Vec<u64>>,
        range: Option<Vec<u64>>,
    ) -> Result<TensorInfo, E> {
        let dtype = dtype.ok_or_else(|| self.refuse("has no field `dtype`"))?;
        let shape = shape.ok_or_else(|| self.refuse("has no field `shape`"))?;
        let range = range.ok_or_else(|| self.refuse("has no field `data_offsets`"))?;
        let [begin, end] = range[..] else {
            return Err(self.refuse(format_args!("has {} data_offsets, not 2", range.len())));
        };
        let bytes = end
            .checked_sub(begin)
            .ok_or_else(|| self.refuse(format_args!("has reversed data_offsets [{begin}, {end}]")))?;
        // A dimension of zero must not hide that the product of the others overflows in another order.
        let product = shape.iter().try_fold(1_u64, |product, &length| product.checked_mul(length.max(1)));
        let needed = product
            .map(|elements| if shape.contains(&0) { 0 } else { elements })
            .and_then(|elements| dtype.bytes_for(elements))
            .ok_or_else(|| self.refuse(format_args!("has shape {shape:?}, whose size exceeds 64 bits")))?;
        if needed != bytes {
            return Err(self.refuse(format_args!(
                "has dtype {dtype} and shape {shape:?}, that is {needed} bytes, but data_offsets [{begin}, {end}] \
                 hold {bytes}"
            )));
        }
        let shape = shape.iter().map(|&length| usize::try_from(length)).collect::<Result<Vec<_>, _>>();
        let shape = shape.map_err(|_| self.refuse("has a dimension that exceeds the address space"))?;
        Ok(TensorInfo { name: self.name, dtype, shape, offset: begin, bytes })
    }
}

impl<'de> DeserializeSeed<'de> for TensorSeed {
    type Value = TensorInfo;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<TensorInfo, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorSeed {
    type Value = TensorInfo;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "tensor `{}` to be a map", shown(&self.name))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TensorInfo, A::Error> {
        let (mut dtype, mut shape, mut range) = (None, None, None);
        while let Some(field) = map.next_key::<String>()? {
            match field.as_str() {
                "dtype" => {
                    let name = map.next_value::<String>()?;
                    let known = DType::from_safetensors_name(&name).ok_or_else(|| {
                        self.refuse(format_args!("has the unknown dtype `{}`", shown(&name)))
                    })?;
                    self.set_once("dtype", &mut dtype, known)?;
                }
                "shape" => {
                    let list = map.next_value_seed(NumbersSeed { tensor: &self.name, field: "shape" })?;
                    self.set_once("shape", &mut shape, list)?;
                }
                "data_offsets" => {
                    let list =
                        map.next_value_seed(NumbersSeed { tensor: &self.name, field: "data_offsets" })?;
                    self.set_once("data_offsets", &mut range, list)?;
                }
                other => return Err(self.refuse(format_args!("has the unknown field `{}`", shown(other)))),
            }
        }
        self.check(dtype, shape, range)
    }
}

/// A short list of whole numbers; the list's length is bounded while it is read.
struct NumbersSeed<'a> {
    tensor: &'a str,
    field: &'static str,
}

impl<'de> DeserializeSeed<'de> for NumbersSeed<'_> {
    type Value = Vec<u64>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<u64>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for NumbersSeed<'_> {
    type Value = Vec<u64>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "`{}` of tensor `{}` to be a list of whole numbers", self.field, shown(self.tensor))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u64>, A::Error> {
        let mut numbers = Vec::new();
        while let Some(number) = list.next_element::<u64>()? {
            if numbers.len() == MAX_DIMENSIONS {
                return Err(de::Error::custom(format_args!(
                    "`{}` of tensor `{}` has more than {MAX_DIMENSIONS} entries",
                    self.field,
                    shown(self.tensor)
                )));
            }
            numbers.push(number);
        }
        Ok(numbers)
    }
}
