//! The typed key-value section of a GGUF file.

use std::collections::BTreeMap;

use crate::{Error, Result};

/// The metadata of a file, by key.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GgufMetadata(pub BTreeMap<String, GgufValue>);

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum GgufValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(GgufArray),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of one element type, stored without a wrapper per element.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum GgufArray {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    Strings(GgufStrings),
    Arrays(Vec<GgufArray>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// A list of strings in one buffer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GgufStrings {
    text: String,
    ends: Vec<usize>,
}

impl GgufStrings {
    /// An empty list with room for `count` strings.
    pub fn with_capacity(count: usize) -> Self {
        Self { text: String::new(), ends: Vec::with_capacity(count) }
    }

    /// Adds a string at the end.
    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len());
    }

    /// The number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no string.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The string at `index`.
    pub fn get(&self, index: usize) -> Option<&str> {
        let end = *self.ends.get(index)?;
        let start = index.checked_sub(1).map_or(0, |previous| self.ends[previous]);
        self.text.get(start..end)
    }

    /// All strings in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        (0..self.len()).map(|index| self.get(index).unwrap_or_default())
    }
}

impl<'a> FromIterator<&'a str> for GgufStrings {
    fn from_iter<I: IntoIterator<Item = &'a str>>(strings: I) -> Self {
        let mut list = Self::default();
        strings.into_iter().for_each(|text| list.push(text));
        list
    }
}

impl GgufValue {
    /// The type's name, as it appears in messages.
    pub const fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::F32(_) => "f32",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(array) => array.type_name(),
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F64(_) => "f64",
        }
    }

    /// Any integer that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) | Self::Array(_) => None,
        }
    }
}

impl GgufArray {
    /// The type's name, as it appears in messages.
    pub const fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "array of u8",
            Self::I8(_) => "array of i8",
            Self::U16(_) => "array of u16",
            Self::I16(_) => "array of i16",
            Self::U32(_) => "array of u32",
            Self::I32(_) => "array of i32",
            Self::F32(_) => "array of f32",
            Self::Bool(_) => "array of bool",
            Self::Strings(_) => "array of string",
            Self::Arrays(_) => "array of arrays",
            Self::U64(_) => "array of u64",
            Self::I64(_) => "array of i64",
            Self::F64(_) => "array of f64",
        }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(list) => list.len(),
            Self::I8(list) => list.len(),
            Self::U16(list) => list.len(),
            Self::I16(list) => list.len(),
            Self::U32(list) => list.len(),
            Self::I32(list) => list.len(),
            Self::F32(list) => list.len(),
            Self::Bool(list) => list.len(),
            Self::Strings(list) => list.len(),
            Self::Arrays(list) => list.len(),
            Self::U64(list) => list.len(),
            Self::I64(list) => list.len(),
            Self::F64(list) => list.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as i64 when they are integers and all fit.
    pub fn to_i64s(&self) -> Option<Vec<i64>> {
        fn widen<T: Copy + Into<i64>>(list: &[T]) -> Vec<i64> {
            list.iter().map(|&value| value.into()).collect()
        }
        match self {
            Self::U8(list) => Some(widen(list)),
            Self::I8(list) => Some(widen(list)),
            Self::U16(list) => Some(widen(list)),
            Self::I16(list) => Some(widen(list)),
            Self::U32(list) => Some(widen(list)),
            Self::I32(list) => Some(widen(list)),
            Self::I64(list) => Some(list.clone()),
            Self::U64(list) => list.iter().map(|&value| value.try_into().ok()).collect(),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::Strings(_) | Self::Arrays(_) => None,
        }
    }
}

/// The getters fail with the key, the type found and the type wanted.
impl GgufMetadata {
    /// The value of a key, of any type.
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.0.get(key)
    }

    /// Whether the key is present.
    pub fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// A string.
    ///
    /// # Errors
    /// The key is missing or no string.
    pub fn string(&self, key: &str) -> Result<&str> {
        match self.required(key)? {
            GgufValue::String(text) => Ok(text),
            other => Err(mismatch(key, other, "string")),
        }
    }

    /// An integer of any width that is not negative.
    ///
    /// # Errors
    /// The key is missing, no integer, or negative.
    pub fn u64(&self, key: &str) -> Result<u64> {
        let value = self.required(key)?;
        value.as_u64().ok_or_else(|| match value {
            GgufValue::I8(_) | GgufValue::I16(_) | GgufValue::I32(_) | GgufValue::I64(_) => {
                Error::GgufKey { key: key.to_owned(), message: "is negative".to_owned() }
            }
            other => mismatch(key, other, "integer"),
        })
    }

    /// A float of 32 or 64 bits, narrowed.
    ///
    /// # Errors
    /// The key is missing or no float.
    pub fn f32(&self, key: &str) -> Result<f32> {
        match self.required(key)? {
            GgufValue::F32(value) => Ok(*value),
            GgufValue::F64(value) => Ok(*value as f32),
            other => Err(mismatch(key, other, "float")),
        }
    }

    /// A truth value.
    ///
    /// # Errors
    /// The key is missing or no truth value.
    pub fn bool(&self, key: &str) -> Result<bool> {
        match self.required(key)? {
            GgufValue::Bool(value) => Ok(*value),
            other => Err(mismatch(key, other, "bool")),
        }
    }

    /// An array of strings.
    ///
    /// # Errors
    /// The key is missing or no array of strings.
    pub fn strings(&self, key: &str) -> Result<&GgufStrings> {
        match self.required(key)? {
            GgufValue::Array(GgufArray::Strings(list)) => Ok(list),
            other => Err(mismatch(key, other, "array of string")),
        }
    }

    /// An array of integers of any width.
    ///
    /// # Errors
    /// The key is missing, no array of integers, or an element exceeds i64.
    pub fn i64s(&self, key: &str) -> Result<Vec<i64>> {
        let value = self.required(key)?;
        let list = if let GgufValue::Array(array) = value { array.to_i64s() } else { None };
        list.ok_or_else(|| mismatch(key, value, "array of integers"))
    }

    /// An array of floats of 32 bits.
    ///
    /// # Errors
    /// The key is missing or no array of f32.
    pub fn f32s(&self, key: &str) -> Result<&[f32]> {
        match self.required(key)? {
            GgufValue::Array(GgufArray::F32(list)) => Ok(list),
            other => Err(mismatch(key, other, "array of f32")),
        }
    }

    fn required(&self, key: &str) -> Result<&GgufValue> {
        self.get(key).ok_or_else(|| Error::GgufKey { key: key.to_owned(), message: "is missing".to_owned() })
    }
}

fn mismatch(key: &str, found: &GgufValue, wanted: &str) -> Error {
    Error::GgufKey { key: key.to_owned(), message: format!("has type {}, not {wanted}", found.type_name()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_come_back_in_order() {
        let list: GgufStrings = ["a", "", "ccc"].into_iter().collect();
        assert_eq!(list.iter().collect::<Vec<_>>(), ["a", "", "ccc"]);
        assert_eq!((list.get(1), list.get(3)), (Some(""), None));
    }

    #[test]
    fn getters_name_key_and_types() {
        let metadata = GgufMetadata(BTreeMap::from([
            ("text".to_owned(), GgufValue::String("x".to_owned())),
            ("minus".to_owned(), GgufValue::I32(-1)),
        ]));
        let say = |error: Error| error.to_string();
        assert_eq!(say(metadata.u64("text").unwrap_err()), "GGUF key `text` has type string, not integer");
        assert_eq!(say(metadata.u64("minus").unwrap_err()), "GGUF key `minus` is negative");
        assert_eq!(say(metadata.strings("absent").unwrap_err()), "GGUF key `absent` is missing");
        assert_eq!(metadata.string("text").unwrap(), "x");
    }
}
