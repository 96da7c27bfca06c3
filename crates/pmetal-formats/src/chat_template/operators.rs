//! Operators, indices and slices, as Python defines them.

use std::sync::Arc;

use super::eval::Interpreter;
use super::methods::format_percent;
use super::syntax::Operator;
use super::value::{Outcome, Value, failed};

impl Interpreter {
    pub(super) fn binary(&mut self, operator: Operator, left: &Value, right: &Value) -> Outcome<Value> {
        use std::cmp::Ordering;
        let ordered = |accept: fn(Ordering) -> bool| match left.compare(right) {
            Some(ordering) => Ok(Value::Bool(accept(ordering))),
            None => failed(format!("values of type {} and {} have no order", left.kind(), right.kind())),
        };
        match operator {
            Operator::And => Ok(if left.is_true() { right.clone() } else { left.clone() }),
            Operator::Or => Ok(if left.is_true() { left.clone() } else { right.clone() }),
            Operator::Equal => Ok(Value::Bool(left.equals(right))),
            Operator::NotEqual => Ok(Value::Bool(!left.equals(right))),
            Operator::Less => ordered(Ordering::is_lt),
            Operator::LessOrEqual => ordered(Ordering::is_le),
            Operator::Greater => ordered(Ordering::is_gt),
            Operator::GreaterOrEqual => ordered(Ordering::is_ge),
            Operator::In => self.contains(right, left).map(Value::Bool),
            Operator::NotIn => self.contains(right, left).map(|found| Value::Bool(!found)),
            // Without automatic escaping, `~` joins markup as plain text; `+` does escape.
            Operator::Concat => {
                let (left, right) = (left.to_text(), right.to_text());
                self.charge(left.len() + right.len())?;
                Ok(Value::text([&*left, &*right].concat()))
            }
            Operator::Add => self.add(left, right),
            Operator::Multiply => self.multiply(left, right),
            Operator::Remainder if left.as_text().is_some() => {
                let text = format_percent(left.as_text().unwrap_or_default(), right)?;
                self.new_text(text)
            }
            Operator::Subtract
            | Operator::Divide
            | Operator::FloorDivide
            | Operator::Remainder
            | Operator::Power => arithmetic(operator, left, right),
        }
    }

    fn add_texts(&mut self, left: &Value, right: &Value) -> Outcome<Value> {
        let markup = matches!(left, Value::Markup(_)) || matches!(right, Value::Markup(_));
        let (left, right) =
            if markup { (escaped(left), escaped(right)) } else { (left.to_text(), right.to_text()) };
        self.charge(left.len() + right.len())?;
        let text: Arc<str> = [&*left, &*right].concat().into();
        Ok(if markup { Value::Markup(text) } else { Value::Text(text) })
    }

    fn add(&mut self, left: &Value, right: &Value) -> Outcome<Value> {
        match (left, right) {
            _ if left.as_text().is_some() && right.as_text().is_some() => self.add_texts(left, right),
            (Value::List(left), Value::List(right)) => {
                self.charge_items(left.items.len() + right.items.len())?;
                Value::list([&*left.items, &*right.items].concat())
            }
            (Value::Tuple(left), Value::Tuple(right)) => {
                self.charge_items(left.items.len() + right.items.len())?;
                Value::tuple([&*left.items, &*right.items].concat())
            }
            _ => arithmetic(Operator::Add, left, right),
        }
    }

    fn multiply(&mut self, left: &Value, right: &Value) -> Outcome<Value> {
        let (value, count) = match (left.as_int(), right.as_int()) {
            (None, Some(count)) => (left, count),
            (Some(count), None) => (right, count),
            _ => return arithmetic(Operator::Multiply, left, right),
        };
        let count = usize::try_from(count).unwrap_or(0);
        match value {
            Value::Text(text) | Value::Markup(text) => {
                self.charge(text.len().saturating_mul(count))?;
                Ok(Value::text(text.repeat(count)))
            }
            Value::List(sequence) => {
                self.charge_items(sequence.items.len().saturating_mul(count))?;
                Value::list(repeated(&sequence.items, count))
            }
            Value::Tuple(sequence) => {
                self.charge_items(sequence.items.len().saturating_mul(count))?;
                Value::tuple(repeated(&sequence.items, count))
            }
            _ => arithmetic(Operator::Multiply, left, right),
        }
    }

    pub(super) fn contains(&mut self, container: &Value, needle: &Value) -> Outcome<bool> {
        match container {
            Value::Text(text) | Value::Markup(text) => match needle.as_text() {
                Some(needle) => {
                    self.spend(text.len() / 64)?;
                    Ok(text.contains(needle))
                }
                None => failed(format!("`in` of a text needs a text, got a {}", needle.kind())),
            },
            Value::Mapping(mapping) => match needle {
                Value::List(_) | Value::Mapping(_) => failed(format!("a {} cannot be a key", needle.kind())),
                _ => Ok(mapping.get(needle).is_some()),
            },
            Value::List(sequence) | Value::Tuple(sequence) | Value::View(sequence) => {
                self.spend(sequence.items.len())?;
                Ok(sequence.items.iter().any(|item| item.equals(needle)))
            }
            Value::Iterator(_) => Ok(self.iterate(container)?.iter().any(|item| item.equals(needle))),
            Value::Undefined(_) => Ok(false),
            other => failed(format!("a value of type {} contains nothing", other.kind())),
        }
    }

    pub(super) fn negative(&mut self, value: &Value) -> Outcome<Value> {
        match value {
            Value::Float(value) => Ok(Value::Float(-value)),
            _ => match value.as_int().and_then(i64::checked_neg) {
                Some(value) => Ok(Value::Int(value)),
                None => failed(format!("a value of type {} cannot be negated", value.kind())),
            },
        }
    }

    /// `value[key]`: the item, else the attribute, else undefined.
    pub(super) fn item(&mut self, value: &Value, key: &Value) -> Outcome<Value> {
        let found = match value {
            Value::Undefined(name) => return failed(format!("`{name}` is undefined")),
            Value::Mapping(mapping) => mapping.get(key).cloned(),
            Value::List(sequence) | Value::Tuple(sequence) => key
                .as_int()
                .and_then(|index| place(index, sequence.items.len()))
                .map(|index| sequence.items[index].clone()),
            Value::Text(text) | Value::Markup(text) => match key.as_int() {
                Some(index) => {
                    self.spend(text.len() / 64)?;
                    let at =
                        if index < 0 { place(index, text.chars().count()) } else { place(index, text.len()) };
                    at.and_then(|at| text.chars().nth(at))
                        .map(|c| Value::text(c.encode_utf8(&mut [0; 4]) as &str))
                }
                None => None,
            },
            _ => None,
        };
        match (found, key.as_text()) {
            (Some(found), _) => Ok(found),
            (None, Some(name)) => self.attribute(value, &name.into()),
            (None, None) => Ok(Value::Undefined(key.to_text())),
        }
    }

    /// `value[start:stop:step]`.
    pub(super) fn slice(&mut self, value: &Value, [start, stop, step]: [Option<i64>; 3]) -> Outcome<Value> {
        let step = step.unwrap_or(1);
        if step == 0 {
            return failed("a slice's step cannot be zero");
        }
        match value {
            Value::Text(text) | Value::Markup(text) => {
                self.charge(text.len())?;
                if step == 1 && start.unwrap_or(0) >= 0 && stop.is_none() {
                    let skip = usize::try_from(start.unwrap_or(0)).unwrap_or(0);
                    let from = text.char_indices().nth(skip).map_or(text.len(), |(at, _)| at);
                    return Ok(Value::text(&text[from..]));
                }
                self.charge(text.len() * 4)?;
                let characters: Vec<char> = text.chars().collect();
                let picked: String =
                    indices(characters.len(), start, stop, step).map(|at| characters[at]).collect();
                Ok(Value::text(picked))
            }
            Value::List(sequence) | Value::Tuple(sequence) => {
                self.charge_items(sequence.items.len())?;
                let items = &sequence.items;
                let picked = indices(items.len(), start, stop, step).map(|at| items[at].clone()).collect();
                if matches!(value, Value::List(_)) { Value::list(picked) } else { Value::tuple(picked) }
            }
            other => failed(format!("a value of type {} cannot be sliced", other.kind())),
        }
    }
}

/// The text with the characters of HTML escaped, unless it is markup already.
pub(super) fn escaped(value: &Value) -> Arc<str> {
    match value {
        Value::Markup(text) => text.clone(),
        other => {
            let text = other.to_text();
            text.replace('&', "&amp;")
                .replace('>', "&gt;")
                .replace('<', "&lt;")
                .replace('\'', "&#39;")
                .replace('"', "&#34;")
                .into()
        }
    }
}

fn repeated(items: &[Value], count: usize) -> Vec<Value> {
    std::iter::repeat_n(items, count).flatten().cloned().collect()
}

/// The place that a Python index means.
fn place(index: i64, length: usize) -> Option<usize> {
    let length_signed = i64::try_from(length).ok()?;
    let index = if index < 0 { index.checked_add(length_signed)? } else { index };
    usize::try_from(index).ok().filter(|index| *index < length)
}

/// The places that a Python slice takes.
fn indices(length: usize, start: Option<i64>, stop: Option<i64>, step: i64) -> impl Iterator<Item = usize> {
    let length = i64::try_from(length).unwrap_or(i64::MAX);
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clamp = |bound: i64| {
        let bound = if bound < 0 { bound.saturating_add(length) } else { bound };
        bound.clamp(low, high)
    };
    let (first, last) = if step > 0 { (low, high) } else { (high, low) };
    let start = start.map_or(first, clamp);
    let stop = stop.map_or(last, clamp);
    let mut at = Some(start);
    std::iter::from_fn(move || {
        let current = at.filter(|at| if step > 0 { *at < stop } else { *at > stop })?;
        at = current.checked_add(step);
        usize::try_from(current).ok()
    })
}

fn arithmetic(operator: Operator, left: &Value, right: &Value) -> Outcome<Value> {
    let sign = sign_of(operator);
    if let (Some(left), Some(right)) = (left.as_int(), right.as_int()) {
        if matches!(operator, Operator::Divide | Operator::FloorDivide | Operator::Remainder) && right == 0 {
            return failed(format!("{left} {sign} 0: division by zero"));
        }
        let value = match operator {
            Operator::Add => left.checked_add(right),
            Operator::Subtract => left.checked_sub(right),
            Operator::Multiply => left.checked_mul(right),
            Operator::FloorDivide => left.checked_div_euclid(right).map(|quotient| {
                // Python rounds down; Euclid's quotient differs for negative divisors with a remainder.
                if right < 0 && left.rem_euclid(right) != 0 { quotient - 1 } else { quotient }
            }),
            Operator::Remainder => left
                .checked_rem(right)
                .map(|rest| if rest != 0 && (rest < 0) != (right < 0) { rest + right } else { rest }),
            Operator::Power if right >= 0 => {
                u32::try_from(right).ok().and_then(|right| left.checked_pow(right))
            }
            Operator::Power => return Ok(Value::Float((left as f64).powf(right as f64))),
            _ => return Ok(Value::Float(left as f64 / right as f64)),
        };
        return match value {
            Some(value) => Ok(Value::Int(value)),
            None => failed(format!("{left} {sign} {right} does not fit 64 bits")),
        };
    }
    let (Some(a), Some(b)) = (left.as_float(), right.as_float()) else {
        if let Value::Undefined(name) = left {
            return failed(format!("`{name}` is undefined"));
        }
        return failed(format!("`{sign}` is not defined for {} and {}", left.kind(), right.kind()));
    };
    if b == 0.0 && matches!(operator, Operator::Divide | Operator::FloorDivide | Operator::Remainder) {
        return failed(format!("{a} {sign} 0: division by zero"));
    }
    Ok(Value::Float(match operator {
        Operator::Add => a + b,
        Operator::Subtract => a - b,
        Operator::Multiply => a * b,
        Operator::FloorDivide => (a / b).floor(),
        Operator::Remainder => a - (a / b).floor() * b,
        Operator::Power => a.powf(b),
        _ => a / b,
    }))
}

fn sign_of(operator: Operator) -> &'static str {
    match operator {
        Operator::Add => "+",
        Operator::Subtract => "-",
        Operator::Multiply => "*",
        Operator::Divide => "/",
        Operator::FloorDivide => "//",
        Operator::Remainder => "%",
        Operator::Power => "**",
        _ => "operator",
    }
}
