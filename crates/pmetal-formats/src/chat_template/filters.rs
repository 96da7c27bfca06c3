//! Filters: what stands after `|`.

use std::sync::Arc;

use super::eval::{Arguments, Interpreter};
use super::json::{JsonStyle, print_json};
use super::methods::{capitalize, format_percent, pad, split_lines, strip};
use super::operators::escaped;
use super::value::{Outcome, Value, failed, is_space};

const FILTERS: [&str; 48] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "wordcount",
    "pprint",
];

pub(super) fn is_filter(name: &str) -> bool {
    FILTERS.contains(&name)
}

impl Interpreter {
    pub(super) fn filter(&mut self, name: &str, value: &Value, arguments: &Arguments) -> Outcome<Value> {
        self.spend(1)?;
        match name {
            "default" | "d" => {
                arguments.expect(name, &["default_value", "boolean"])?;
                let falsy =
                    arguments.get(1, "boolean").is_some_and(|boolean| boolean.is_true()) && !value.is_true();
                if falsy || matches!(value, Value::Undefined(_)) {
                    return Ok(arguments.get(0, "default_value").unwrap_or_else(|| Value::text("")));
                }
                Ok(value.clone())
            }
            "length" | "count" => self.length(value),
            "tojson" => self.tojson(value, arguments),
            "items" => match value {
                Value::Mapping(_) => {
                    let Value::View(pairs) = self.method(value, "items", &Arguments::none())? else {
                        return failed("items: not a mapping");
                    };
                    Value::iterator(pairs.items.clone())
                }
                Value::Undefined(_) => Value::iterator(Vec::new()),
                other => failed(format!("items needs a mapping, got a {}", other.kind())),
            },
            "list" => {
                let items = self.iterate(value)?;
                Value::list(items)
            }
            "join" => self.join_filter(value, arguments),
            "first" | "last" => self.end(value, name == "first"),
            "attr" => match arguments.get(0, "name").and_then(|name| name.as_text().map(Arc::from)) {
                Some(name) => match value {
                    // Attributes only, never items.
                    Value::Mapping(_) => Ok(Value::Undefined(name)),
                    _ => self.attribute(value, &name),
                },
                None => failed("attr needs a name"),
            },
            "map" | "select" | "reject" | "selectattr" | "rejectattr" | "sort" | "dictsort" | "unique"
            | "groupby" | "min" | "max" | "sum" | "reverse" | "batch" | "slice" => {
                self.sequence_filter(name, value, arguments)
            }
            "int" | "float" | "abs" | "round" => self.number_filter(name, value, arguments),
            _ => self.text_filter(name, value, arguments),
        }
    }

    fn length(&mut self, value: &Value) -> Outcome<Value> {
        let length = match value {
            Value::Text(text) | Value::Markup(text) => {
                self.spend(text.len() / 64)?;
                text.chars().count()
            }
            Value::List(sequence) | Value::Tuple(sequence) | Value::View(sequence) => sequence.items.len(),
            Value::Mapping(mapping) => mapping.pairs.len(),
            Value::Loop(state) => state.items.len(),
            Value::Undefined(_) => 0,
            other => return failed(format!("a value of type {} has no length", other.kind())),
        };
        Ok(Value::Int(i64::try_from(length).unwrap_or(i64::MAX)))
    }

    fn tojson(&mut self, value: &Value, arguments: &Arguments) -> Outcome<Value> {
        arguments.expect("tojson", &["ensure_ascii", "indent", "separators", "sort_keys"])?;
        let indent = match arguments.get(1, "indent") {
            None | Some(Value::None) => None,
            Some(indent) => match (indent.as_int(), indent.as_text()) {
                (Some(width), _) => Some(" ".repeat(usize::try_from(width).unwrap_or(0).min(64))),
                (None, Some(text)) if text.len() <= 64 => Some(text.to_owned()),
                _ => return failed(format!("tojson: a {} is not an indentation", indent.kind())),
            },
        };
        let (mut item_separator, mut key_separator) =
            (if indent.is_some() { "," } else { ", " }.into(), ": ".into());
        if let Some(separators) = arguments.get(2, "separators").filter(|given| !matches!(given, Value::None))
        {
            match self.iterate(&separators)?.as_slice() {
                [Value::Text(item), Value::Text(key)] => {
                    (item_separator, key_separator) = (item.clone(), key.clone())
                }
                _ => return failed("tojson: separators must be two texts"),
            }
        }
        let set = |position, name| arguments.get(position, name).is_some_and(|value| value.is_true());
        let style = JsonStyle {
            ensure_ascii: set(0, "ensure_ascii"),
            indent,
            item_separator: item_separator.to_string(),
            key_separator: key_separator.to_string(),
            sort_keys: set(3, "sort_keys"),
        };
        let mut out = String::new();
        print_json(value, &style, 0, &mut out)?;
        self.new_text(out)
    }

    fn join_filter(&mut self, value: &Value, arguments: &Arguments) -> Outcome<Value> {
        arguments.expect("join", &["d", "attribute"])?;
        let separator = arguments.get(0, "d").map_or_else(|| "".into(), |separator| separator.to_text());
        let mut items = self.iterate(value)?;
        if let Some(attribute) = arguments.get(1, "attribute") {
            items = self.attributes(&items, &attribute)?;
        }
        let items = Value::list(items)?;
        self.join(&items, &separator, false)
    }

    fn end(&mut self, value: &Value, first: bool) -> Outcome<Value> {
        match value {
            Value::Text(_) | Value::Markup(_) => {
                let key = Value::Int(if first { 0 } else { -1 });
                self.item(value, &key)
            }
            Value::Iterator(_) if !first => failed("last: a generator cannot be reversed"),
            _ => {
                let items = self.iterate(value)?;
                let found = if first { items.first() } else { items.last() };
                Ok(found.cloned().unwrap_or_else(|| Value::undefined("an item of an empty sequence")))
            }
        }
    }

    fn number_filter(&mut self, name: &str, value: &Value, arguments: &Arguments) -> Outcome<Value> {
        match name {
            "int" => {
                let default = arguments.get(0, "default").unwrap_or(Value::Int(0));
                let base = arguments.get(1, "base").and_then(|base| base.as_int()).unwrap_or(10);
                Ok(to_int(value, base).map_or(default, Value::Int))
            }
            "float" => {
                let parsed = match value.as_text() {
                    Some(text) => text.trim().replace('_', "").parse::<f64>().ok(),
                    None => value.as_float(),
                };
                let default = arguments.get(0, "default").unwrap_or(Value::Float(0.0));
                Ok(parsed.map_or(default, Value::Float))
            }
            "abs" => match value {
                Value::Float(number) => Ok(Value::Float(number.abs())),
                _ => match value.as_int().and_then(i64::checked_abs) {
                    Some(number) => Ok(Value::Int(number)),
                    None => failed(format!("abs needs a number, got a {}", value.kind())),
                },
            },
            _ => round(value, arguments),
        }
    }

    fn text_filter(&mut self, name: &str, value: &Value, arguments: &Arguments) -> Outcome<Value> {
        let text = value.to_text();
        self.charge(text.len())?;
        let changed = match name {
            "string" => {
                return Ok(if let Value::Markup(_) = value { value.clone() } else { Value::Text(text) });
            }
            "safe" => return Ok(Value::Markup(text)),
            "e" | "escape" | "forceescape" => {
                self.charge(text.len() * 6)?;
                let plain = Value::Text(text);
                return Ok(Value::Markup(escaped(if name == "forceescape" { &plain } else { value })));
            }
            "trim" => strip(&text, "strip", arguments)?.to_owned(),
            "lower" => text.to_lowercase(),
            "upper" => text.to_uppercase(),
            "capitalize" => capitalize(&text),
            "title" => title(&text),
            "center" => pad(&text, name, arguments)?,
            "pprint" => {
                let mut out = String::new();
                value.print_representation(&mut out);
                out
            }
            "replace" => {
                let (Some(old), Some(new)) = (arguments.get(0, "old"), arguments.get(1, "new")) else {
                    return failed("replace needs two texts");
                };
                let count = arguments.get(2, "count").and_then(|count| count.as_int()).unwrap_or(-1);
                return self.replace(&text, &old.to_text(), &new.to_text(), count);
            }
            "format" => {
                let values = Value::tuple(arguments.positional.clone())?;
                format_percent(&text, &values)?
            }
            "indent" => self.indent(&text, arguments)?,
            "truncate" => truncate(&text, arguments),
            "wordcount" => {
                let words =
                    text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty());
                return Ok(Value::Int(i64::try_from(words.count()).unwrap_or(i64::MAX)));
            }
            "urlencode" => urlencode(&text),
            _ => return failed(format!("no filter is named `{name}`")),
        };
        let changed = self.new_text(changed)?;
        match (value, changed) {
            (Value::Markup(_), Value::Text(text)) => Ok(Value::Markup(text)),
            (_, changed) => Ok(changed),
        }
    }

    fn indent(&mut self, text: &str, arguments: &Arguments) -> Outcome<String> {
        arguments.expect("indent", &["width", "first", "blank"])?;
        let indentation = match arguments.get(0, "width") {
            Some(Value::Text(text)) => text.to_string(),
            Some(width) => " ".repeat(usize::try_from(width.as_int().unwrap_or(4)).unwrap_or(0).min(1024)),
            None => "    ".to_owned(),
        };
        let set = |position, name| arguments.get(position, name).is_some_and(|value| value.is_true());
        let (first, blank) = (set(1, "first"), set(2, "blank"));
        let closed = format!("{text}\n");
        let lines = split_lines(&closed, false);
        self.charge(text.len().saturating_add(lines.len().saturating_mul(indentation.len())))?;
        let mut out = String::with_capacity(text.len());
        for (at, line) in lines.iter().enumerate() {
            if at > 0 {
                out.push('\n');
            }
            if if at == 0 { first } else { blank || !line.is_empty() } {
                out.push_str(&indentation);
            }
            out.push_str(line);
        }
        Ok(out)
    }
}

fn to_int(value: &Value, base: i64) -> Option<i64> {
    let Some(text) = value.as_text() else {
        return value
            .as_int()
            .or_else(|| value.as_float().filter(|f| f.is_finite()).map(|number| number.trunc() as i64));
    };
    let digits = text.trim_matches(is_space).replace('_', "");
    let radix = u32::try_from(base).ok().filter(|base| (2..=36).contains(base))?;
    i64::from_str_radix(&digits, radix)
        .ok()
        .or_else(|| digits.parse::<f64>().ok().filter(|f| f.is_finite()).map(|number| number.trunc() as i64))
}

fn round(value: &Value, arguments: &Arguments) -> Outcome<Value> {
    let precision =
        arguments.get(0, "precision").and_then(|precision| precision.as_int()).unwrap_or(0).clamp(-300, 300);
    let method = arguments.get(1, "method").map_or_else(|| "common".into(), |method| method.to_text());
    let Some(number) = value.as_float() else {
        return failed(format!("round needs a number, got a {}", value.kind()));
    };
    let scale = 10_f64.powi(i32::try_from(precision).unwrap_or(0));
    Ok(match &*method {
        "ceil" => Value::Float((number * scale).ceil() / scale),
        "floor" => Value::Float((number * scale).floor() / scale),
        "common" if value.as_int().is_some() && precision >= 0 => value.clone(),
        "common" if precision >= 0 => {
            // Printing rounds the exact binary value, halves to even, as Python's round does.
            let digits = usize::try_from(precision).unwrap_or(0);
            Value::Float(format!("{number:.digits$}").parse().unwrap_or(number))
        }
        "common" => Value::Float((number * scale).round_ties_even() / scale),
        other => return failed(format!("round: method `{other}` is not known")),
    })
}

/// Jinja's `title`: capitals after blanks, dashes and opening brackets only.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut start = true;
    for character in text.chars() {
        if start {
            out.extend(character.to_uppercase())
        } else {
            out.extend(character.to_lowercase())
        }
        start = is_space(character) || matches!(character, '-' | '(' | '{' | '[' | '<');
    }
    out
}

fn truncate(text: &str, arguments: &Arguments) -> String {
    let number = |position, name, default: usize| {
        arguments
            .get(position, name)
            .and_then(|v| v.as_int())
            .and_then(|v| usize::try_from(v).ok())
            .unwrap_or(default)
    };
    let (length, leeway) = (number(0, "length", 255), number(3, "leeway", 5));
    let end = arguments.get(2, "end").map_or_else(|| "...".into(), |end| end.to_text());
    if text.chars().count() <= length.saturating_add(leeway) {
        return text.to_owned();
    }
    let kept: String = text.chars().take(length.saturating_sub(end.chars().count())).collect();
    let whole_words = !arguments.get(1, "killwords").is_some_and(|kill| kill.is_true());
    let kept = if whole_words { kept.rsplit_once(' ').map_or(&*kept, |(words, _)| words) } else { &kept };
    format!("{kept}{end}")
}

fn urlencode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"_.-~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
