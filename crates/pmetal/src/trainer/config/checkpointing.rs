//! The level of recomputation as a setting.

use pmetal_engine::Recompute;

use super::value::{Setting, Value};

/// Names of the levels, and what files of earlier versions and of other programs say.
const NAMES: [(&str, Recompute); 5] = [
    ("none", Recompute::None),
    ("cheap", Recompute::Cheap),
    ("full", Recompute::Full),
    ("true", Recompute::Full),
    ("false", Recompute::None),
];

impl Setting for Recompute {
    fn kind() -> String {
        "one of none, cheap, full (true = full, false = none)".to_owned()
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Boolean(flag) => Self::from_text(&flag.to_string()),
            Value::Text(text) => Self::from_text(text),
            other => Err(format!("needs {}, found {other}", Self::kind())),
        }
    }

    fn from_text(text: &str) -> Result<Self, String> {
        let found = NAMES.into_iter().find(|(name, _)| *name == text);
        found.map(|found| found.1).ok_or_else(|| format!("needs {}, found \"{text}\"", Self::kind()))
    }

    fn to_value(&self) -> Value {
        let name = NAMES.into_iter().find(|(_, level)| level == self).map_or("", |found| found.0);
        Value::Text(name.to_owned())
    }
}
