//! Methods of texts, mappings and lists.

use std::fmt::Write;

use super::eval::{Arguments, Interpreter};
use super::value::{Outcome, Value, failed, is_space, print_float};

impl Interpreter {
    pub(super) fn method(&mut self, value: &Value, name: &str, arguments: &Arguments) -> Outcome<Value> {
        match value {
            Value::Text(text) => self.text_method(text, name, arguments),
            Value::Markup(text) => Ok(match self.text_method(text, name, arguments)? {
                Value::Text(text) => Value::Markup(text),
                other => other,
            }),
            Value::Mapping(mapping) => match name {
                "get" => {
                    arguments.expect("get", &["key", "default"])?;
                    let Some(key) = arguments.get(0, "key") else { return failed("get needs a key") };
                    self.spend(mapping.pairs.len() / 8)?;
                    let default = || arguments.get(1, "default").unwrap_or(Value::None);
                    Ok(mapping.get(&key).cloned().unwrap_or_else(default))
                }
                "copy" => Ok(value.clone()),
                _ => self.mapping_view(&mapping.pairs, name),
            },
            Value::List(sequence) | Value::Tuple(sequence) => {
                let Some(needle) = arguments.positional.first() else { return Ok(value.clone()) };
                self.spend(sequence.items.len())?;
                let mut places = sequence.items.iter().enumerate().filter(|(_, item)| item.equals(needle));
                match name {
                    "count" => Ok(count_value(places.count())),
                    _ => match places.next() {
                        Some((place, _)) => Ok(count_value(place)),
                        None => failed("index: the value is not in the list"),
                    },
                }
            }
            Value::Loop(state) => self.loop_method(state, name, arguments),
            other => failed(format!("a value of type {} has no method `{name}`", other.kind())),
        }
    }

    fn mapping_view(&mut self, pairs: &[(Value, Value)], name: &str) -> Outcome<Value> {
        self.charge_items(pairs.len())?;
        let mut items = Vec::with_capacity(pairs.len());
        for (key, value) in pairs {
            items.push(match name {
                "keys" => key.clone(),
                "values" => value.clone(),
                _ => Value::tuple(vec![key.clone(), value.clone()])?,
            });
        }
        Value::view(items)
    }

    fn text_method(&mut self, text: &str, name: &str, arguments: &Arguments) -> Outcome<Value> {
        self.spend(text.len() / 64)?;
        match name {
            "split" | "rsplit" => return self.split(text, name == "rsplit", arguments),
            "splitlines" => {
                let keep = arguments.get(0, "keepends").is_some_and(|keep| keep.is_true());
                self.charge(text.len())?;
                return self.new_list(split_lines(text, keep).into_iter().map(Value::text).collect());
            }
            "partition" | "rpartition" => {
                let separator = text_argument(name, arguments, 0)?;
                let found = if name == "partition" {
                    text.split_once(&*separator)
                } else {
                    text.rsplit_once(&*separator)
                };
                self.charge(text.len())?;
                let parts = match found {
                    Some((before, after)) => [before, &separator, after],
                    None if name == "partition" => [text, "", ""],
                    None => ["", "", text],
                };
                return Value::tuple(parts.into_iter().map(Value::text).collect());
            }
            "join" => {
                let Some(items) = arguments.positional.first() else { return failed("join needs a list") };
                return self.join(items, text, true);
            }
            "replace" => {
                let (old, new) = (text_argument(name, arguments, 0)?, text_argument(name, arguments, 1)?);
                let count = arguments.get(2, "count").and_then(|count| count.as_int()).unwrap_or(-1);
                return self.replace(text, &old, &new, count);
            }
            "format" => {
                let formatted = format_braces(text, arguments)?;
                return self.new_text(formatted);
            }
            _ => {}
        }
        if let Some(value) = text_question(text, name, arguments)? {
            return Ok(value);
        }
        let changed = changed_text(text, name, arguments)?;
        self.new_text(changed)
    }

    fn split(&mut self, text: &str, from_right: bool, arguments: &Arguments) -> Outcome<Value> {
        arguments.expect("split", &["sep", "maxsplit"])?;
        let limit = arguments.get(1, "maxsplit").and_then(|limit| limit.as_int()).unwrap_or(-1);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX - 1);
        let parts: Vec<&str> = match arguments.get(0, "sep") {
            None | Some(Value::None) => split_spaces(text, limit, from_right),
            Some(separator) => match separator.as_text() {
                Some("") => return failed("split: the separator is empty"),
                Some(separator) if from_right => {
                    let mut parts: Vec<&str> = text.rsplitn(limit + 1, separator).collect();
                    parts.reverse();
                    parts
                }
                Some(separator) => text.splitn(limit + 1, separator).collect(),
                None => return failed(format!("split needs a text, got a {}", separator.kind())),
            },
        };
        self.charge(text.len() + parts.len() * 16)?;
        self.new_list(parts.into_iter().map(Value::text).collect())
    }

    /// Joins the items' texts; `strict` refuses items that are not text, as `str.join` does.
    pub(super) fn join(&mut self, items: &Value, separator: &str, strict: bool) -> Outcome<Value> {
        let items = self.iterate(items)?;
        let mut out = String::new();
        for (at, item) in items.iter().enumerate() {
            if strict && item.as_text().is_none() {
                return failed(format!("join needs texts, item {at} is a {}", item.kind()));
            }
            let start = out.len();
            if at > 0 {
                out.push_str(separator);
            }
            item.print(&mut out);
            self.charge(out.len() - start)?;
        }
        self.new_text(out)
    }

    pub(super) fn replace(&mut self, text: &str, old: &str, new: &str, count: i64) -> Outcome<Value> {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let found = text.matches(old).take(count).count();
        self.charge((text.len()).saturating_add(found.saturating_mul(new.len())))?;
        Ok(Value::text(text.replacen(old, new, count)))
    }
}

fn count_value(count: usize) -> Value {
    Value::Int(i64::try_from(count).unwrap_or(i64::MAX))
}

fn text_argument(name: &str, arguments: &Arguments, position: usize) -> Outcome<std::sync::Arc<str>> {
    match arguments.positional.get(position) {
        Some(Value::Text(text) | Value::Markup(text)) => Ok(text.clone()),
        Some(other) => failed(format!("{name} needs a text, got a {}", other.kind())),
        None => failed(format!("{name} needs {} texts", position + 1)),
    }
}

/// Methods that answer with a truth value or a number.
fn text_question(text: &str, name: &str, arguments: &Arguments) -> Outcome<Option<Value>> {
    let all = |test: fn(char) -> bool| !text.is_empty() && text.chars().all(test);
    let cased = |wanted: fn(char) -> bool, other: fn(char) -> bool| {
        text.chars().any(wanted) && !text.chars().any(other)
    };
    Ok(Some(Value::Bool(match name {
        "startswith" | "endswith" => {
            let matches =
                |part: &str| if name == "startswith" { text.starts_with(part) } else { text.ends_with(part) };
            match arguments.positional.first() {
                Some(Value::Tuple(parts)) => {
                    if let Some(other) = parts.items.iter().find(|part| part.as_text().is_none()) {
                        return failed(format!("{name} needs texts, got a {}", other.kind()));
                    }
                    parts.items.iter().filter_map(Value::as_text).any(matches)
                }
                _ => matches(&text_argument(name, arguments, 0)?),
            }
        }
        "isalnum" => all(char::is_alphanumeric),
        "isalpha" => all(char::is_alphabetic),
        "isascii" => text.is_ascii(),
        "isdigit" | "isnumeric" => all(char::is_numeric),
        "isspace" => all(is_space),
        "islower" => cased(char::is_lowercase, char::is_uppercase),
        "isupper" => cased(char::is_uppercase, char::is_lowercase),
        "istitle" => text.chars().any(char::is_alphabetic) && title(text) == text,
        "count" | "find" | "rfind" | "index" => {
            let needle = text_argument(name, arguments, 0)?;
            let place = match name {
                "count" if needle.is_empty() => return Ok(Some(count_value(text.chars().count() + 1))),
                "count" => return Ok(Some(count_value(text.matches(&*needle).count()))),
                "rfind" => text.rfind(&*needle),
                _ => text.find(&*needle),
            };
            return match place {
                Some(place) => Ok(Some(count_value(text[..place].chars().count()))),
                None if name == "index" => failed("index: the text is not there"),
                None => Ok(Some(Value::Int(-1))),
            };
        }
        _ => return Ok(None),
    })))
}

/// Methods that answer with a text.
fn changed_text(text: &str, name: &str, arguments: &Arguments) -> Outcome<String> {
    Ok(match name {
        "strip" | "lstrip" | "rstrip" => strip(text, name, arguments)?.to_owned(),
        "upper" => text.to_uppercase(),
        "lower" | "casefold" => text.to_lowercase(),
        "title" => title(text),
        "capitalize" => capitalize(text),
        "swapcase" => text
            .chars()
            .flat_map(|c| {
                let swapped = if c.is_uppercase() {
                    c.to_lowercase().to_string()
                } else {
                    c.to_uppercase().to_string()
                };
                swapped.chars().collect::<Vec<_>>()
            })
            .collect(),
        "removeprefix" => {
            let part = text_argument(name, arguments, 0)?;
            text.strip_prefix(&*part).unwrap_or(text).to_owned()
        }
        "removesuffix" => {
            let part = text_argument(name, arguments, 0)?;
            text.strip_suffix(&*part).unwrap_or(text).to_owned()
        }
        _ => pad(text, name, arguments)?,
    })
}

pub(super) fn strip<'t>(text: &'t str, name: &str, arguments: &Arguments) -> Outcome<&'t str> {
    let characters = match arguments.get(0, "chars") {
        None | Some(Value::None) => None,
        Some(Value::Text(characters) | Value::Markup(characters)) => Some(characters),
        Some(other) => return failed(format!("{name} needs a text, got a {}", other.kind())),
    };
    let strips =
        |c: char| characters.as_ref().map_or_else(|| is_space(c), |characters| characters.contains(c));
    Ok(match name {
        "lstrip" => text.trim_start_matches(strips),
        "rstrip" => text.trim_end_matches(strips),
        _ => text.trim_matches(strips),
    })
}

pub(super) fn pad(text: &str, name: &str, arguments: &Arguments) -> Outcome<String> {
    let width = arguments.get(0, "width").and_then(|width| width.as_int()).unwrap_or(80);
    let width = usize::try_from(width).unwrap_or(0).min(1 << 20);
    let fill = match arguments.positional.get(1) {
        Some(fill) => fill.as_text().and_then(|fill| fill.chars().next()).unwrap_or(' '),
        None => ' ',
    };
    let missing = width.saturating_sub(text.chars().count());
    let run = |count: usize| fill.to_string().repeat(count);
    Ok(match name {
        "ljust" => format!("{text}{}", run(missing)),
        "rjust" => format!("{}{text}", run(missing)),
        "zfill" => {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", "0".repeat(missing))
        }
        // CPython puts the odd blank to the left when the width is odd.
        _ => {
            let left = missing / 2 + (missing & width & 1);
            format!("{}{text}{}", run(left), run(missing - left))
        }
    })
}

pub(super) fn capitalize(text: &str) -> String {
    let mut characters = text.chars();
    match characters.next() {
        Some(first) => first.to_uppercase().chain(characters.as_str().to_lowercase().chars()).collect(),
        None => String::new(),
    }
}

fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for character in text.chars() {
        if inside {
            out.extend(character.to_lowercase())
        } else {
            out.extend(character.to_uppercase())
        }
        inside = character.is_uppercase() || character.is_lowercase();
    }
    out
}

fn split_spaces(text: &str, limit: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_matches(is_space);
    while !rest.is_empty() {
        let place = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        match place.filter(|_| parts.len() < limit) {
            Some(place) if from_right => {
                let width = rest[place..].chars().next().map_or(1, char::len_utf8);
                parts.push(&rest[place + width..]);
                rest = rest[..place].trim_end_matches(is_space);
            }
            Some(place) => {
                parts.push(&rest[..place]);
                rest = rest[place..].trim_start_matches(is_space);
            }
            None => {
                // With a limit, Python keeps the blanks at the far end of what is left.
                let start = rest.as_ptr() as usize - text.as_ptr() as usize;
                parts.push(match (parts.len() >= limit, from_right) {
                    (true, false) => &text[start..],
                    (true, true) => &text[..start + rest.len()],
                    _ => rest,
                });
                break;
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// Python's `str.splitlines`.
pub(super) fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let is_break = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(place) = rest.find(is_break) {
        let width = if rest[place..].starts_with("\r\n") {
            2
        } else {
            rest[place..].chars().next().map_or(1, char::len_utf8)
        };
        lines.push(&rest[..if keep_ends { place + width } else { place }]);
        rest = &rest[place + width..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// `str.format` without format specifications.
fn format_braces(format: &str, arguments: &Arguments) -> Outcome<String> {
    let mut out = String::new();
    let mut next = 0;
    let mut characters = format.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '{' | '}' if characters.peek() == Some(&character) => {
                characters.next();
                out.push(character);
            }
            '{' => {
                let field: String = characters.by_ref().take_while(|c| *c != '}').collect();
                let value = if field.is_empty() {
                    next += 1;
                    arguments.positional.get(next - 1).cloned()
                } else if let Ok(place) = field.parse::<usize>() {
                    arguments.positional.get(place).cloned()
                } else {
                    arguments.get(usize::MAX, &field)
                };
                match value {
                    Some(value) => value.print(&mut out),
                    None => return failed(format!("format has no value for `{{{field}}}`")),
                }
            }
            '}' => return failed("format: single `}`"),
            other => out.push(other),
        }
    }
    Ok(out)
}

/// Python's `format % values` with the conversions s, r, d, i, f, x and g, and the flags `0` and `-`.
pub(super) fn format_percent(format: &str, values: &Value) -> Outcome<String> {
    let values: Vec<Value> = match values {
        Value::Tuple(sequence) => sequence.items.clone(),
        other => vec![other.clone()],
    };
    let mut values = values.into_iter();
    let mut out = String::new();
    let mut characters = format.chars().peekable();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut layout = String::new();
        while let Some(part) = characters.next_if(|c| c.is_ascii_digit() || matches!(c, '-' | '.' | '+')) {
            layout.push(part);
        }
        let Some(conversion) = characters.next() else { return failed("format: incomplete conversion") };
        if conversion == '%' {
            out.push('%');
            continue;
        }
        let Some(value) = values.next() else { return failed("format: not enough values") };
        let text = converted(&value, conversion, &layout)?;
        let (width, _) = layout.split_once('.').unwrap_or((&layout, ""));
        let columns = width.trim_start_matches(['-', '+', '0']).parse::<usize>().unwrap_or(0).min(4096);
        if width.starts_with('-') {
            let _ = write!(out, "{text:<columns$}");
        } else if width.starts_with('0') && conversion != 's' {
            let (sign, digits) = text.split_at(usize::from(text.starts_with('-')));
            let columns = columns.saturating_sub(sign.len());
            let _ = write!(out, "{sign}{digits:0>columns$}");
        } else {
            let _ = write!(out, "{text:>columns$}");
        }
    }
    match values.next() {
        Some(_) => failed("format: not all values were used"),
        None => Ok(out),
    }
}

fn converted(value: &Value, conversion: char, layout: &str) -> Outcome<String> {
    let precision =
        layout.split_once('.').and_then(|(_, digits)| digits.parse::<usize>().ok()).map(|p| p.min(300));
    let mut out = String::new();
    match (conversion, value.as_float()) {
        ('s', _) => value.print(&mut out),
        ('r', _) => value.print_representation(&mut out),
        ('d' | 'i', Some(number)) => {
            let _ = write!(out, "{}", value.as_int().unwrap_or(number.trunc() as i64));
        }
        ('x', Some(_)) if value.as_int().is_some() => {
            let _ = write!(out, "{:x}", value.as_int().unwrap_or(0));
        }
        ('f' | 'F', Some(number)) => {
            let _ = write!(out, "{number:.*}", precision.unwrap_or(6));
        }
        ('g', Some(number)) => print_float(number, &mut out),
        _ => return failed(format!("format: `%{conversion}` of a {} is not known", value.kind())),
    }
    Ok(out)
}
