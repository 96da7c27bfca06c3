//! Attributes, calls and global functions.

use std::rc::Rc;
use std::sync::Arc;

use super::eval::{Arguments, Interpreter};
use super::strftime::strftime;
use super::value::{Fault, LoopState, Outcome, Value, failed};

/// The longest range, the same as in Jinja's sandbox.
const MAX_RANGE: i64 = 100_000;

const FUNCTIONS: [&str; 5] = ["range", "dict", "namespace", "raise_exception", "strftime_now"];
const MAPPING_METHODS: [&str; 5] = ["get", "items", "keys", "values", "copy"];
const LIST_METHODS: [&str; 3] = ["count", "index", "copy"];
const TEXT_METHODS: [&str; 36] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "find",
    "format",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdigit",
    "islower",
    "isnumeric",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
];
const MORE_TEXT_METHODS: [&str; 2] = ["upper", "zfill"];
/// What Python objects have and the immutable sandbox hides.
const HIDDEN: [&str; 14] = [
    "append",
    "clear",
    "extend",
    "insert",
    "pop",
    "remove",
    "reverse",
    "sort",
    "popitem",
    "setdefault",
    "update",
    "add",
    "discard",
    "fromkeys",
];

/// The global function of a name.
pub(super) fn function(name: &str) -> Option<&'static str> {
    FUNCTIONS.into_iter().find(|known| *known == name)
}

fn known(names: &[&'static str], name: &str) -> Option<&'static str> {
    names.iter().copied().find(|known| *known == name)
}

impl Interpreter {
    /// `value.name`: the attribute, else the item, else undefined.
    pub(super) fn attribute(&mut self, value: &Value, name: &Arc<str>) -> Outcome<Value> {
        let method = match value {
            Value::Undefined(missing) => return failed(format!("`{missing}` is undefined")),
            Value::Mapping(_) => known(&MAPPING_METHODS, name),
            Value::List(_) => known(&LIST_METHODS, name),
            Value::Tuple(_) => known(&LIST_METHODS[..2], name),
            Value::Text(_) | Value::Markup(_) => {
                known(&TEXT_METHODS, name).or_else(|| known(&MORE_TEXT_METHODS, name))
            }
            Value::Loop(_) => known(&["cycle", "changed"], name),
            _ => None,
        };
        if let Some(method) = method {
            return Ok(Value::Method(Rc::new((value.clone(), method))));
        }
        let found = match value {
            Value::Mapping(_) if HIDDEN[..].contains(&&**name) && &**name != "add" => None,
            Value::Mapping(mapping) => mapping.get_text(name).cloned(),
            Value::Namespace(index) => self.namespaces[*index]
                .iter()
                .find(|(known, _)| known == name)
                .map(|(_, value)| value.clone()),
            Value::Loop(state) => loop_attribute(state, name),
            Value::Macro(called) => match &**name {
                "name" => Some(Value::Text(called.node.name.clone())),
                "arguments" => {
                    Some(Value::tuple(called.node.parameters.iter().cloned().map(Value::Text).collect())?)
                }
                _ => None,
            },
            Value::Tuple(pair) if pair.items.len() == 2 => match &**name {
                "grouper" => Some(pair.items[0].clone()),
                "list" => Some(pair.items[1].clone()),
                _ => None,
            },
            _ => None,
        };
        Ok(found.unwrap_or_else(|| Value::Undefined(name.clone())))
    }

    pub(super) fn call(&mut self, callee: &Value, arguments: Arguments) -> Outcome<Value> {
        self.spend(1)?;
        match callee {
            Value::Macro(called) => {
                let called = called.clone();
                self.call_macro(&called, arguments)
            }
            Value::Method(method) => self.method(&method.0, method.1, &arguments),
            Value::Loop(state) => self.call_loop(state, &arguments),
            Value::Function(name) => self.function(name, arguments),
            Value::Undefined(name) => failed(format!("`{name}` is undefined")),
            other => failed(format!("a value of type {} cannot be called", other.kind())),
        }
    }

    fn function(&mut self, name: &str, arguments: Arguments) -> Outcome<Value> {
        match name {
            "range" => self.range(&arguments),
            "dict" => self.dict(arguments),
            "namespace" => {
                let Value::Mapping(mapping) = self.dict(arguments)? else {
                    return failed("namespace: not a mapping");
                };
                let mut names = Vec::new();
                for (key, value) in &mapping.pairs {
                    let key = key.to_text();
                    if key.starts_with('_') {
                        return failed(format!(
                            "a namespace cannot hold the underscore-prefixed name `{key}`"
                        ));
                    }
                    names.push((key, value.clone()));
                }
                self.charge_items(1 + names.len())?;
                self.namespaces.push(names);
                Ok(Value::Namespace(self.namespaces.len() - 1))
            }
            "raise_exception" => {
                arguments.expect(name, &["message"])?;
                let Some(message) = arguments.get(0, "message") else {
                    return failed("raise_exception needs a message");
                };
                Err(Fault::Raised(message.to_text().to_string()))
            }
            _ => {
                arguments.expect(name, &["format"])?;
                let format = arguments.get(0, "format");
                match format.as_ref().and_then(Value::as_text) {
                    Some(format) => {
                        self.charge(format.len() * 16)?;
                        let text = strftime(format, self.now_unix_s);
                        self.new_text(text)
                    }
                    None => failed("strftime_now needs a format"),
                }
            }
        }
    }

    fn range(&mut self, arguments: &Arguments) -> Outcome<Value> {
        let bounds: Option<Vec<i64>> = arguments.positional.iter().map(Value::as_int).collect();
        let (start, stop, step) = match bounds.as_deref() {
            Some([stop]) => (0, *stop, 1),
            Some([start, stop]) => (*start, *stop, 1),
            Some([start, stop, step]) if *step != 0 => (*start, *stop, *step),
            _ => return failed("range needs one to three integers, and a step that is not zero"),
        };
        let span = i128::from(stop) - i128::from(start);
        let step_wide = i128::from(step);
        let count = ((span + step_wide - step_wide.signum()) / step_wide).max(0);
        if count > i128::from(MAX_RANGE) {
            return failed(format!("a range of {count} items is too long, at most {MAX_RANGE} are allowed"));
        }
        let items = (0..i64::try_from(count).unwrap_or(0)).map(|at| Value::Int(start + at * step)).collect();
        self.new_list(items)
    }

    fn dict(&mut self, arguments: Arguments) -> Outcome<Value> {
        let mut pairs = Vec::new();
        match arguments.positional.as_slice() {
            [] => {}
            [Value::Mapping(mapping)] => pairs.extend(mapping.pairs.iter().cloned()),
            [items] => {
                for item in self.iterate(items)? {
                    match <[Value; 2]>::try_from(self.iterate(&item)?) {
                        Ok([key, value]) => pairs.push((key, value)),
                        Err(items) => {
                            return failed(format!("a mapping is made of pairs, got {} values", items.len()));
                        }
                    }
                }
            }
            several => return failed(format!("dict takes one argument, got {}", several.len())),
        }
        pairs.extend(arguments.keywords.into_iter().map(|(key, value)| (Value::Text(key), value)));
        self.charge_items(2 * pairs.len())?;
        Value::mapping(pairs)
    }

    pub(super) fn loop_method(
        &mut self,
        state: &LoopState,
        name: &str,
        arguments: &Arguments,
    ) -> Outcome<Value> {
        if name == "cycle" {
            let values = &arguments.positional;
            return match values.get(state.index.get().checked_rem(values.len()).unwrap_or(0)) {
                Some(value) => Ok(value.clone()),
                None => failed("loop.cycle needs values"),
            };
        }
        let mut last = state.last_changed.borrow_mut();
        let same = last.as_ref().is_some_and(|last| {
            last.len() == arguments.positional.len()
                && last.iter().zip(&arguments.positional).all(|(left, right)| left.equals(right))
        });
        if !same {
            // Values that hold loops would let two loops hold each other, and never be freed.
            if arguments.positional.iter().any(|value| matches!(value, Value::Loop(_) | Value::Method(_))) {
                return failed("loop.changed cannot watch a loop");
            }
            *last = Some(arguments.positional.clone());
        }
        Ok(Value::Bool(!same))
    }
}

fn loop_attribute(state: &LoopState, name: &str) -> Option<Value> {
    let (index, length) = (state.index.get(), state.items.len());
    let count = |value: usize| Some(Value::Int(i64::try_from(value).unwrap_or(i64::MAX)));
    match name {
        "index" => count(index + 1),
        "index0" => count(index),
        "revindex" => count(length - index),
        "revindex0" => count(length - index - 1),
        "first" => Some(Value::Bool(index == 0)),
        "last" => Some(Value::Bool(index + 1 == length)),
        "length" => count(length),
        "depth" => count(state.level + 1),
        "depth0" => count(state.level),
        "previtem" => index.checked_sub(1).map(|index| state.items[index].clone()),
        "nextitem" => state.items.get(index + 1).cloned(),
        _ => None,
    }
}
