//! The values of settings: what files and flags say, and the types that settings have.

use std::fmt;

use toml::de::{DeTable, DeValue};

/// A value as a file states it, whatever the format of the file.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `true` or `false`.
    Boolean(bool),
    /// A number without a fraction.
    Integer(i64),
    /// A number with a fraction or an exponent.
    Float(f64),
    /// A string.
    Text(String),
    /// A list.
    List(Vec<Value>),
}

/// As TOML writes it.
impl fmt::Display for Value {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boolean(value) => write!(formatter, "{value}"),
            Self::Integer(value) => write!(formatter, "{value}"),
            Self::Float(value) => write!(formatter, "{value:?}"),
            Self::Text(value) => write!(formatter, "{}", toml::Value::String(value.clone())),
            Self::List(values) => {
                let texts: Vec<String> = values.iter().map(Self::to_string).collect();
                write!(formatter, "[{}]", texts.join(", "))
            }
        }
    }
}

impl From<&Value> for serde_json::Value {
    fn from(value: &Value) -> Self {
        match value {
            Value::Boolean(value) => (*value).into(),
            Value::Integer(value) => (*value).into(),
            Value::Float(value) => (*value).into(),
            Value::Text(value) => value.as_str().into(),
            Value::List(values) => Self::Array(values.iter().map(Self::from).collect()),
        }
    }
}

/// The type of a setting. Errors complete the sentence "`lora_r` ...".
pub trait Setting: Sized {
    /// The type in words, for help texts.
    fn kind() -> String;
    /// Reads what a file says.
    ///
    /// # Errors
    /// "needs a whole number, found 2.5".
    fn from_value(value: &Value) -> Result<Self, String>;
    /// Reads what follows a flag.
    ///
    /// # Errors
    /// As [`Setting::from_value`].
    fn from_text(text: &str) -> Result<Self, String>;
    /// The value as a file would state it.
    fn to_value(&self) -> Value;
}

fn mismatch<T: Setting>(found: impl fmt::Display) -> String {
    format!("needs {}, found {found}", T::kind())
}

macro_rules! whole_number_setting {
    ($($kind:ty),*) => { $(
        impl Setting for $kind {
            fn kind() -> String {
                "a whole number".to_owned()
            }
            fn from_value(value: &Value) -> Result<Self, String> {
                let whole = match value {
                    Value::Integer(number) => Self::try_from(*number).ok(),
                    _ => None,
                };
                whole.ok_or_else(|| mismatch::<Self>(value))
            }
            fn from_text(text: &str) -> Result<Self, String> {
                // Through i64, the widest that TOML holds: run.toml must be able to repeat the value.
                let number: Option<i64> = text.replace('_', "").parse().ok();
                number.and_then(|number| Self::try_from(number).ok()).ok_or_else(|| mismatch::<Self>(text))
            }
            fn to_value(&self) -> Value {
                Value::Integer(i64::try_from(*self).unwrap_or(i64::MAX))
            }
        }
    )* };
}

whole_number_setting!(u64, usize);

impl Setting for f64 {
    fn kind() -> String {
        "a number".to_owned()
    }
    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Float(number) => Ok(*number),
            Value::Integer(number) => Ok(*number as Self),
            // YAML readers leave 2e-4 a string, and configurations converted from there carry it on.
            Value::Text(text) => Self::from_text(text),
            other => Err(mismatch::<Self>(other)),
        }
    }
    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| mismatch::<Self>(text))
    }
    fn to_value(&self) -> Value {
        Value::Float(*self)
    }
}

impl Setting for bool {
    fn kind() -> String {
        "true or false".to_owned()
    }
    fn from_value(value: &Value) -> Result<Self, String> {
        if let Value::Boolean(value) = value { Ok(*value) } else { Err(mismatch::<Self>(value)) }
    }
    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| mismatch::<Self>(text))
    }
    fn to_value(&self) -> Value {
        Value::Boolean(*self)
    }
}

impl Setting for String {
    fn kind() -> String {
        "a text".to_owned()
    }
    fn from_value(value: &Value) -> Result<Self, String> {
        if let Value::Text(text) = value { Ok(text.clone()) } else { Err(mismatch::<Self>(value)) }
    }
    fn from_text(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }
    fn to_value(&self) -> Value {
        Value::Text(self.clone())
    }
}

impl Setting for Vec<String> {
    fn kind() -> String {
        "a list of texts".to_owned()
    }
    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Text(text) => Ok(vec![text.clone()]),
            Value::List(values) => values
                .iter()
                .map(|value| {
                    String::from_value(value).map_err(|_| mismatch::<Self>(Value::List(values.clone())))
                })
                .collect(),
            other => Err(mismatch::<Self>(other)),
        }
    }
    fn from_text(text: &str) -> Result<Self, String> {
        if text.starts_with('[') {
            let parsed = DeValue::parse(text).map_err(|_| mismatch::<Self>(text))?;
            return Self::from_value(&from_toml(parsed.get_ref())?);
        }
        Ok(text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect())
    }
    fn to_value(&self) -> Value {
        Value::List(self.iter().cloned().map(Value::Text).collect())
    }
}

/// Defines an enum of named choices; further names are those of other programs for the same thing.
macro_rules! choice_setting {
    ($(#[$meta:meta])* $name:ident { $($(#[doc = $doc:literal])+ $variant:ident = $text:literal $(| $alias:literal)*,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[doc = $doc])+ $variant,)+ }

        impl $name {
            /// The name in configurations.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl Setting for $name {
            fn kind() -> String {
                let names: &[&str] = &[$($text),+];
                if names.len() == 1 { names[0].to_owned() } else { format!("one of {}", names.join(", ")) }
            }
            fn from_value(value: &Value) -> Result<Self, String> {
                let text = String::from_value(value).map_err(|_| format!("needs {}, found {value}", Self::kind()))?;
                Self::from_text(&text)
            }
            fn from_text(text: &str) -> Result<Self, String> {
                match text {
                    $($text $(| $alias)* => Ok(Self::$variant),)+
                    _ => Err(format!("needs {}, found \"{text}\"", Self::kind())),
                }
            }
            fn to_value(&self) -> Value {
                Value::Text(self.name().to_owned())
            }
        }
    };
}
pub(super) use choice_setting;

/// A key of a file, the value it has, and the line it is on where the format tells.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) value: Result<Value, String>,
    pub(super) line: Option<usize>,
}

/// The entries of a TOML document in the order of the file; `[lora] r = 8` has the key `lora.r`.
///
/// The error is the line and the message.
pub(super) fn toml_entries(text: &str) -> Result<Vec<Entry>, (Option<usize>, String)> {
    let line_of = |offset: usize| 1 + text.bytes().take(offset).filter(|&byte| byte == b'\n').count();
    let document = DeTable::parse(text).map_err(|error| {
        (error.span().map(|span| line_of(span.start)), error.message().replace('\n', ", "))
    })?;
    let mut found = Vec::new();
    flatten_toml(document.get_ref(), "", &mut found);
    found.sort_by_key(|&(offset, _)| offset);
    Ok(found
        .into_iter()
        .map(|(offset, (key, value))| Entry { key, value, line: Some(line_of(offset)) })
        .collect())
}

type Found = (usize, (String, Result<Value, String>));

fn flatten_toml(table: &DeTable<'_>, prefix: &str, found: &mut Vec<Found>) {
    for (key, value) in table {
        let path = format!("{prefix}{}", key.get_ref());
        match value.get_ref() {
            DeValue::Table(inner) => flatten_toml(inner, &format!("{path}."), found),
            other => found.push((key.span().start, (path, from_toml(other)))),
        }
    }
}

fn from_toml(value: &DeValue<'_>) -> Result<Value, String> {
    Ok(match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Boolean(value) => Value::Boolean(*value),
        DeValue::Integer(number) => Value::Integer(
            i64::from_str_radix(number.as_str(), number.radix())
                .map_err(|_| format!("has the number {number}, which does not fit 64 bits"))?,
        ),
        DeValue::Float(number) => {
            let parsed = number.as_str().replace('_', "").parse();
            Value::Float(parsed.map_err(|_| format!("has the number {number}, which cannot be read"))?)
        }
        DeValue::Array(values) => {
            Value::List(values.iter().map(|value| from_toml(value.get_ref())).collect::<Result<_, _>>()?)
        }
        DeValue::Datetime(date) => return Err(format!("has the date {date}, and no setting is a date")),
        DeValue::Table(_) => return Err("holds a list of tables, and no setting is one".to_owned()),
    })
}

/// The entries of a JSON document; null means that the key is not set.
pub(super) fn json_entries(text: &str) -> Result<Vec<Entry>, (Option<usize>, String)> {
    let document: serde_json::Value =
        serde_json::from_str(text).map_err(|error| (Some(error.line()), error.to_string()))?;
    let serde_json::Value::Object(object) = document else {
        return Err((None, "the document is not an object".to_owned()));
    };
    let mut found = Vec::new();
    flatten_json(&object, "", &mut found);
    Ok(found)
}

fn flatten_json(object: &serde_json::Map<String, serde_json::Value>, prefix: &str, found: &mut Vec<Entry>) {
    for (key, value) in object {
        let key = format!("{prefix}{key}");
        match value {
            serde_json::Value::Object(inner) => flatten_json(inner, &format!("{key}."), found),
            serde_json::Value::Null => {}
            other => found.push(Entry { key, value: from_json(other), line: None }),
        }
    }
}

fn from_json(value: &serde_json::Value) -> Result<Value, String> {
    Ok(match value {
        serde_json::Value::Bool(value) => Value::Boolean(*value),
        serde_json::Value::String(text) => Value::Text(text.clone()),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => Value::Integer(whole),
            (None, Some(fraction)) if !number.is_u64() => Value::Float(fraction),
            _ => return Err(format!("has the number {number}, which does not fit 64 bits")),
        },
        serde_json::Value::Array(values) => {
            Value::List(values.iter().map(from_json).collect::<Result<_, _>>()?)
        }
        serde_json::Value::Null => return Err("holds null".to_owned()),
        serde_json::Value::Object(_) => {
            return Err("holds a list of objects, and no setting is one".to_owned());
        }
    })
}
