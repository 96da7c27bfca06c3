//! `tojson`, as `transformers` defines it: Python's `json.dumps` without escaping for HTML.

use std::fmt::Write;

use super::sequences::unordered;
use super::value::{Outcome, Value, failed, print_float};

/// How `tojson` lays its text out.
pub(super) struct JsonStyle {
    pub(super) ensure_ascii: bool,
    /// The text of one level of indentation.
    pub(super) indent: Option<String>,
    pub(super) item_separator: String,
    pub(super) key_separator: String,
    pub(super) sort_keys: bool,
}

/// Appends the JSON text of a value.
pub(super) fn print_json(value: &Value, style: &JsonStyle, level: usize, out: &mut String) -> Outcome<()> {
    match value {
        Value::None => out.push_str("null"),
        Value::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        Value::Int(value) => {
            let _ = write!(out, "{value}");
        }
        Value::Float(value) => print_number(*value, out),
        Value::Text(text) | Value::Markup(text) => print_string(text, style.ensure_ascii, out),
        Value::List(sequence) | Value::Tuple(sequence) => {
            if sequence.items.is_empty() {
                out.push_str("[]");
                return Ok(());
            }
            out.push('[');
            for (at, item) in sequence.items.iter().enumerate() {
                separate(style, level + 1, at, out);
                print_json(item, style, level + 1, out)?;
            }
            close(style, level, ']', out);
        }
        Value::Mapping(mapping) => {
            if mapping.pairs.is_empty() {
                out.push_str("{}");
                return Ok(());
            }
            let mut pairs: Vec<&(Value, Value)> = mapping.pairs.iter().collect();
            if style.sort_keys {
                if let Some((left, right)) = unordered(pairs.iter().map(|pair| &pair.0)) {
                    return failed(format!("tojson: keys of type {left} and {right} have no order"));
                }
                pairs.sort_by(|left, right| left.0.compare(&right.0).unwrap_or(std::cmp::Ordering::Equal));
            }
            out.push('{');
            for (at, (key, value)) in pairs.into_iter().enumerate() {
                separate(style, level + 1, at, out);
                print_key(key, style, out)?;
                out.push_str(&style.key_separator);
                print_json(value, style, level + 1, out)?;
            }
            close(style, level, '}', out);
        }
        other => return failed(format!("tojson: a value of type {} is not JSON", other.kind())),
    }
    Ok(())
}

fn separate(style: &JsonStyle, level: usize, at: usize, out: &mut String) {
    if at > 0 {
        out.push_str(&style.item_separator);
    }
    break_line(style, level, out);
}

fn close(style: &JsonStyle, level: usize, bracket: char, out: &mut String) {
    break_line(style, level, out);
    out.push(bracket);
}

fn break_line(style: &JsonStyle, level: usize, out: &mut String) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        for _ in 0..level {
            out.push_str(indent);
        }
    }
}

fn print_key(key: &Value, style: &JsonStyle, out: &mut String) -> Outcome<()> {
    match key {
        Value::Text(text) | Value::Markup(text) => print_string(text, style.ensure_ascii, out),
        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
            out.push('"');
            print_json(key, style, 0, out)?;
            out.push('"');
        }
        other => return failed(format!("tojson: a key of type {} is not JSON", other.kind())),
    }
    Ok(())
}

fn print_number(value: f64, out: &mut String) {
    if value.is_nan() {
        out.push_str("NaN");
    } else if value.is_infinite() {
        out.push_str(if value > 0.0 { "Infinity" } else { "-Infinity" });
    } else {
        print_float(value, out);
    }
}

fn print_string(text: &str, ensure_ascii: bool, out: &mut String) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\0'..='\u{1f}' => {
                let _ = write!(out, "\\u{:04x}", u32::from(character));
            }
            ' '..='~' => out.push(character),
            '\u{7f}' if !ensure_ascii => out.push(character),
            _ if ensure_ascii => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            _ => out.push(character),
        }
    }
    out.push('"');
}
