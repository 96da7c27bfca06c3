//! Filters over sequences.

use std::cmp::Ordering;

use super::eval::{Arguments, Interpreter};
use super::syntax::Operator;
use super::value::{Outcome, Value, failed};

impl Interpreter {
    pub(super) fn sequence_filter(
        &mut self,
        name: &str,
        value: &Value,
        arguments: &Arguments,
    ) -> Outcome<Value> {
        match name {
            "map" => self.map(value, arguments),
            "select" | "reject" | "selectattr" | "rejectattr" => self.select(name, value, arguments),
            "sort" => {
                arguments.expect(name, &["reverse", "case_sensitive", "attribute"])?;
                let set = |position, name| arguments.get(position, name).is_some_and(|value| value.is_true());
                let items = self.iterate(value)?;
                let sorted = self.sorted(
                    items,
                    arguments.get(2, "attribute").as_ref(),
                    set(1, "case_sensitive"),
                    set(0, "reverse"),
                )?;
                self.new_list(sorted)
            }
            "dictsort" => self.dictsort(value, arguments),
            "min" | "max" => {
                let items = self.iterate(value)?;
                let attribute = arguments.get(1, "attribute");
                let sensitive = arguments.get(0, "case_sensitive").is_some_and(|value| value.is_true());
                let sorted = self.sorted(items, attribute.as_ref(), sensitive, name == "max")?;
                Ok(sorted
                    .into_iter()
                    .next()
                    .unwrap_or_else(|| Value::undefined("an item of an empty sequence")))
            }
            "sum" => {
                let mut items = self.iterate(value)?;
                if let Some(attribute) =
                    arguments.get(0, "attribute").filter(|given| !matches!(given, Value::None))
                {
                    items = self.attributes(&items, &attribute)?;
                }
                let mut sum = arguments.get(1, "start").unwrap_or(Value::Int(0));
                for item in items {
                    sum = self.binary(Operator::Add, &sum, &item)?;
                }
                Ok(sum)
            }
            "reverse" => match value {
                Value::Text(text) | Value::Markup(text) => self.new_text(text.chars().rev().collect()),
                Value::Iterator(_) => failed("reverse: a generator cannot be reversed"),
                _ => {
                    let mut items = self.iterate(value)?;
                    items.reverse();
                    Value::iterator(items)
                }
            },
            "unique" => self.unique(value, arguments),
            "groupby" => self.groupby(value, arguments),
            _ => self.chunks(name, value, arguments),
        }
    }

    /// `item.a.b` of every item, for an attribute given as a dotted text or an index.
    pub(super) fn attributes(&mut self, items: &[Value], attribute: &Value) -> Outcome<Vec<Value>> {
        items.iter().map(|item| self.dotted(item, attribute)).collect()
    }

    fn dotted(&mut self, item: &Value, attribute: &Value) -> Outcome<Value> {
        self.spend(1)?;
        let Some(path) = attribute.as_text() else { return self.item(item, attribute) };
        let mut value = item.clone();
        for part in path.split('.') {
            let key = part.parse::<i64>().map_or_else(|_| Value::text(part), Value::Int);
            value = self.item(&value, &key)?;
        }
        Ok(value)
    }

    fn map(&mut self, value: &Value, arguments: &Arguments) -> Outcome<Value> {
        let items = self.iterate(value)?;
        let mut mapped = Vec::with_capacity(items.len());
        if let Some(attribute) = arguments.get(usize::MAX, "attribute") {
            let default = arguments.get(usize::MAX, "default");
            for item in &items {
                let value = self.dotted(item, &attribute)?;
                mapped.push(match (&value, &default) {
                    (Value::Undefined(_), Some(default)) => default.clone(),
                    _ => value,
                });
            }
            return Value::iterator(mapped);
        }
        let Some((name, rest)) = arguments.positional.split_first() else {
            return failed("map needs the name of a filter or an attribute");
        };
        let name = name.to_text();
        let rest = Arguments { positional: rest.to_vec(), keywords: arguments.keywords.clone() };
        for item in &items {
            mapped.push(self.filter(&name, item, &rest)?);
        }
        Value::iterator(mapped)
    }

    fn select(&mut self, name: &str, value: &Value, arguments: &Arguments) -> Outcome<Value> {
        let keep = name.starts_with("select");
        let mut rest = arguments.positional.as_slice();
        let mut attribute = None;
        if name.ends_with("attr") {
            let Some((first, others)) = rest.split_first() else {
                return failed(format!("{name} needs the name of an attribute"));
            };
            attribute = Some(first.clone());
            rest = others;
        }
        let test = rest.split_first().map(|(test, rest)| {
            (test.to_text(), Arguments { positional: rest.to_vec(), keywords: arguments.keywords.clone() })
        });
        let mut kept = Vec::new();
        for item in self.iterate(value)? {
            let subject = match &attribute {
                Some(attribute) => self.dotted(&item, attribute)?,
                None => item.clone(),
            };
            let holds = match &test {
                Some((test, arguments)) => self.test(test, &subject, arguments)?,
                None => subject.is_true(),
            };
            if holds == keep {
                kept.push(item);
            }
        }
        Value::iterator(kept)
    }

    /// Sorted stably by the attribute, or by the values themselves.
    fn sorted(
        &mut self,
        items: Vec<Value>,
        attribute: Option<&Value>,
        case_sensitive: bool,
        reverse: bool,
    ) -> Outcome<Vec<Value>> {
        let attribute = attribute.filter(|attribute| !matches!(attribute, Value::None));
        let mut keyed = Vec::with_capacity(items.len());
        for item in items {
            let key = match attribute {
                Some(attribute) => self.dotted(&item, attribute)?,
                None => item.clone(),
            };
            keyed.push((folded(&key, case_sensitive), item));
        }
        self.spend(keyed.len() * 16)?;
        if let Some((left, right)) = unordered(keyed.iter().map(|(key, _)| key)) {
            return failed(format!("values of type {left} and {right} have no order"));
        }
        keyed.sort_by(|(left, _), (right, _)| {
            let ordering = left.compare(right).unwrap_or(Ordering::Equal);
            if reverse { ordering.reverse() } else { ordering }
        });
        Ok(keyed.into_iter().map(|(_, item)| item).collect())
    }

    fn dictsort(&mut self, value: &Value, arguments: &Arguments) -> Outcome<Value> {
        arguments.expect("dictsort", &["case_sensitive", "by", "reverse"])?;
        let Value::Mapping(mapping) = value else {
            return failed(format!("dictsort needs a mapping, got a {}", value.kind()));
        };
        let place = match arguments.get(1, "by").as_ref().and_then(Value::as_text) {
            None | Some("key") => 0,
            Some("value") => 1,
            Some(other) => return failed(format!("dictsort cannot sort by `{other}`")),
        };
        let set = |position, name| arguments.get(position, name).is_some_and(|value| value.is_true());
        let mut pairs = Vec::with_capacity(mapping.pairs.len());
        for (key, value) in &mapping.pairs {
            pairs.push(Value::tuple(vec![key.clone(), value.clone()])?);
        }
        let sorted =
            self.sorted(pairs, Some(&Value::Int(place)), set(0, "case_sensitive"), set(2, "reverse"))?;
        self.new_list(sorted)
    }

    fn unique(&mut self, value: &Value, arguments: &Arguments) -> Outcome<Value> {
        let case_sensitive = arguments.get(0, "case_sensitive").is_some_and(|value| value.is_true());
        let attribute = arguments.get(1, "attribute");
        let mut seen: Vec<Value> = Vec::new();
        let mut kept = Vec::new();
        for item in self.iterate(value)? {
            let key = match &attribute {
                Some(attribute) => self.dotted(&item, attribute)?,
                None => item.clone(),
            };
            let key = folded(&key, case_sensitive);
            self.spend(seen.len())?;
            if !seen.iter().any(|known| known.equals(&key)) {
                seen.push(key);
                kept.push(item);
            }
        }
        Value::iterator(kept)
    }

    fn groupby(&mut self, value: &Value, arguments: &Arguments) -> Outcome<Value> {
        let Some(attribute) = arguments.get(0, "attribute") else {
            return failed("groupby needs an attribute");
        };
        let case_sensitive = arguments.get(2, "case_sensitive").is_some_and(|value| value.is_true());
        let items = self.iterate(value)?;
        let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
        for item in self.sorted(items, Some(&attribute), case_sensitive, false)? {
            let key = self.dotted(&item, &attribute)?;
            match groups.last_mut() {
                Some((known, group))
                    if folded(known, case_sensitive).equals(&folded(&key, case_sensitive)) =>
                {
                    group.push(item);
                }
                _ => groups.push((key, vec![item])),
            }
        }
        let mut pairs = Vec::with_capacity(groups.len());
        for (key, group) in groups {
            pairs.push(Value::tuple(vec![key, Value::list(group)?])?);
        }
        self.new_list(pairs)
    }

    /// `batch(n, fill)`: rows of n items; `slice(n, fill)`: n columns.
    fn chunks(&mut self, name: &str, value: &Value, arguments: &Arguments) -> Outcome<Value> {
        let count = arguments
            .positional
            .first()
            .and_then(Value::as_int)
            .and_then(|count| usize::try_from(count).ok());
        let Some(count) = count.filter(|count| (1..=100_000).contains(count)) else {
            return failed(format!("{name} needs a positive number"));
        };
        let fill = arguments.get(1, "fill_with").filter(|fill| !matches!(fill, Value::None));
        let items = self.iterate(value)?;
        self.charge_items(count)?;
        let mut rows: Vec<Vec<Value>> = Vec::new();
        if name == "batch" {
            rows.extend(items.chunks(count).map(<[Value]>::to_vec));
            if let (Some(fill), Some(last)) = (fill, rows.last_mut()) {
                last.resize(count, fill);
            }
        } else {
            let (whole, longer) = (items.len() / count, items.len() % count);
            let mut rest = items.as_slice();
            for at in 0..count {
                let (row, after) = rest.split_at(whole + usize::from(at < longer));
                rest = after;
                let mut row = row.to_vec();
                if let Some(fill) = fill.as_ref().filter(|_| at >= longer && longer > 0) {
                    row.push(fill.clone());
                }
                rows.push(row);
            }
        }
        Value::iterator(rows.into_iter().map(Value::list).collect::<Outcome<_>>()?)
    }
}

/// The types of two keys that keep a list from being sorted: all must be texts, or all numbers.
pub(super) fn unordered<'v>(keys: impl Iterator<Item = &'v Value>) -> Option<(&'static str, &'static str)> {
    let class = |key: &Value| match key {
        Value::Text(_) | Value::Markup(_) => Some(0),
        Value::Float(number) if number.is_nan() => None,
        Value::Int(_) | Value::Float(_) | Value::Bool(_) => Some(1),
        _ => None,
    };
    let mut keys = keys.peekable();
    let first = *keys.peek()?;
    keys.find(|key| class(key).is_none() || class(key) != class(first)).map(|key| (first.kind(), key.kind()))
}

/// Texts compare without case unless asked otherwise.
fn folded(value: &Value, case_sensitive: bool) -> Value {
    match value {
        Value::Text(text) | Value::Markup(text) if !case_sensitive => Value::text(text.to_lowercase()),
        other => other.clone(),
    }
}
