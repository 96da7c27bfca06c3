//! Values of templates, with Python's equality, truth and printing.

use std::cell::{Cell, RefCell};
use std::fmt::Write;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use serde_json::Value as Json;

use super::syntax::{ForNode, MacroNode};

/// How deeply lists and mappings may nest; dropping them recurses.
const MAX_NESTING: u32 = 200;

/// Why rendering stopped.
#[derive(Debug)]
pub(super) enum Fault {
    /// The template called `raise_exception`.
    Raised(String),
    /// Anything else.
    Failed(String),
}

pub(super) type Outcome<T> = std::result::Result<T, Fault>;

pub(super) fn failed<T>(message: impl Into<String>) -> Outcome<T> {
    Err(Fault::Failed(message.into()))
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    /// With what was looked for.
    Undefined(Arc<str>),
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Arc<str>),
    /// Text that went through `safe` or `escape`: what is joined to it gets escaped.
    Markup(Arc<str>),
    List(Rc<Sequence>),
    Tuple(Rc<Sequence>),
    /// What `map`, `selectattr` and their like give: no length, and empty after it was read once.
    Iterator(Rc<OneShot>),
    /// What `dict.items()`, `.keys()` and `.values()` give: a length, but no indices.
    View(Rc<Sequence>),
    Mapping(Rc<Mapping>),
    /// An index into the interpreter's namespaces.
    Namespace(usize),
    Macro(Rc<MacroValue>),
    Function(&'static str),
    /// A method that was looked up and not called yet.
    Method(Rc<(Value, &'static str)>),
    Loop(Rc<LoopState>),
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) items: Vec<Value>,
    nesting: u32,
}

#[derive(Debug)]
pub(super) struct OneShot {
    pub(super) items: RefCell<Vec<Value>>,
    nesting: u32,
}

#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) pairs: Vec<(Value, Value)>,
    nesting: u32,
}

#[derive(Debug)]
pub(super) struct MacroValue {
    pub(super) node: Arc<MacroNode>,
    /// The scope in which the macro was defined.
    pub(super) scope: usize,
    pub(super) caller: Option<Rc<MacroValue>>,
}

#[derive(Debug)]
pub(super) struct LoopState {
    pub(super) items: Vec<Value>,
    pub(super) index: Cell<usize>,
    pub(super) level: usize,
    pub(super) node: Arc<ForNode>,
    pub(super) scope: usize,
    pub(super) last_changed: RefCell<Option<Vec<Value>>>,
    nesting: u32,
}

fn nesting_of<'v>(items: impl Iterator<Item = &'v Value>) -> Outcome<u32> {
    let nesting = 1 + items.map(Value::nesting).max().unwrap_or(0);
    if nesting > MAX_NESTING {
        return failed(format!("values nest more than {MAX_NESTING} levels"));
    }
    Ok(nesting)
}

impl Mapping {
    pub(super) fn get(&self, key: &Value) -> Option<&Value> {
        self.pairs.iter().find(|(name, _)| name.equals(key)).map(|(_, value)| value)
    }

    pub(super) fn get_text(&self, key: &str) -> Option<&Value> {
        self.pairs.iter().find(|(name, _)| name.as_text() == Some(key)).map(|(_, value)| value)
    }
}

impl LoopState {
    pub(super) fn new(items: Vec<Value>, level: usize, node: Arc<ForNode>, scope: usize) -> Outcome<Self> {
        let nesting = nesting_of(items.iter())?;
        Ok(Self { items, index: Cell::new(0), level, node, scope, last_changed: RefCell::new(None), nesting })
    }
}

impl Value {
    pub(super) fn text(text: impl Into<Arc<str>>) -> Self {
        Self::Text(text.into())
    }

    pub(super) fn undefined(name: impl Into<Arc<str>>) -> Self {
        Self::Undefined(name.into())
    }

    pub(super) fn list(items: Vec<Value>) -> Outcome<Self> {
        let nesting = nesting_of(items.iter())?;
        Ok(Self::List(Rc::new(Sequence { items, nesting })))
    }

    pub(super) fn tuple(items: Vec<Value>) -> Outcome<Self> {
        let nesting = nesting_of(items.iter())?;
        Ok(Self::Tuple(Rc::new(Sequence { items, nesting })))
    }

    pub(super) fn view(items: Vec<Value>) -> Outcome<Self> {
        let nesting = nesting_of(items.iter())?;
        Ok(Self::View(Rc::new(Sequence { items, nesting })))
    }

    pub(super) fn iterator(items: Vec<Value>) -> Outcome<Self> {
        let nesting = nesting_of(items.iter())?;
        Ok(Self::Iterator(Rc::new(OneShot { items: RefCell::new(items), nesting })))
    }

    /// A mapping; the last of equal keys wins, at the place of the first.
    pub(super) fn mapping(given: Vec<(Value, Value)>) -> Outcome<Self> {
        let mut pairs: Vec<(Value, Value)> = Vec::with_capacity(given.len());
        for (key, value) in given {
            if matches!(key, Self::List(_) | Self::Mapping(_)) {
                return failed(format!("a {} cannot be a key", key.kind()));
            }
            match pairs.iter_mut().find(|(name, _)| name.equals(&key)) {
                Some(pair) => pair.1 = value,
                None => pairs.push((key, value)),
            }
        }
        Self::mapping_of_distinct(pairs)
    }

    fn mapping_of_distinct(pairs: Vec<(Value, Value)>) -> Outcome<Self> {
        let nesting = nesting_of(pairs.iter().flat_map(|(key, value)| [key, value]))?;
        Ok(Self::Mapping(Rc::new(Mapping { pairs, nesting })))
    }

    /// The value that Python's `json.loads` gives.
    pub(super) fn from_json(json: &Json) -> Outcome<Self> {
        Ok(match json {
            Json::Null => Self::None,
            Json::Bool(value) => Self::Bool(*value),
            Json::Number(number) => match number.as_i64() {
                Some(value) => Self::Int(value),
                None => Self::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => Self::text(text.as_str()),
            Json::Array(items) => {
                Self::list(items.iter().map(Self::from_json).collect::<Outcome<Vec<Value>>>()?)?
            }
            Json::Object(map) => {
                let mut pairs = Vec::with_capacity(map.len());
                for (key, value) in map {
                    pairs.push((Self::text(key.as_str()), Self::from_json(value)?));
                }
                Self::mapping_of_distinct(pairs)?
            }
        })
    }

    fn nesting(&self) -> u32 {
        match self {
            Self::List(sequence) | Self::Tuple(sequence) | Self::View(sequence) => sequence.nesting,
            Self::Iterator(iterator) => iterator.nesting,
            Self::Mapping(mapping) => mapping.nesting,
            Self::Loop(state) => state.nesting,
            Self::Method(method) => 1 + method.0.nesting(),
            Self::Macro(value) => value.nesting(),
            _ => 0,
        }
    }

    /// The name that Python gives the type.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(_) => "str",
            Self::Markup(_) => "Markup",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Iterator(_) => "generator",
            Self::View(_) => "dict view",
            Self::Mapping(_) => "dict",
            Self::Namespace(_) => "Namespace",
            Self::Macro(_) => "Macro",
            Self::Function(_) => "function",
            Self::Method(_) => "method",
            Self::Loop(_) => "LoopContext",
        }
    }

    pub(super) fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) | Self::Markup(text) => Some(text),
            _ => None,
        }
    }

    /// Integers, and booleans as Python counts them.
    pub(super) fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(*value),
            Self::Bool(value) => Some(i64::from(*value)),
            _ => None,
        }
    }

    pub(super) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            _ => self.as_int().map(|value| value as f64),
        }
    }

    pub(super) fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Text(text) | Self::Markup(text) => !text.is_empty(),
            Self::List(sequence) | Self::Tuple(sequence) | Self::View(sequence) => !sequence.items.is_empty(),
            Self::Mapping(mapping) => !mapping.pairs.is_empty(),
            _ => true,
        }
    }

    pub(super) fn equals(&self, other: &Self) -> bool {
        if let (Some(left), Some(right)) = (self.as_text(), other.as_text()) {
            return left == right;
        }
        if let (Some(left), Some(right)) = (self.as_int(), other.as_int()) {
            return left == right;
        }
        if let (Some(left), Some(right)) = (self.as_float(), other.as_float()) {
            return left == right;
        }
        match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::List(left), Self::List(right)) | (Self::Tuple(left), Self::Tuple(right)) => {
                left.items.len() == right.items.len()
                    && left.items.iter().zip(&right.items).all(|(left, right)| left.equals(right))
            }
            (Self::Mapping(left), Self::Mapping(right)) => {
                left.pairs.len() == right.pairs.len()
                    && left
                        .pairs
                        .iter()
                        .all(|(key, value)| right.get(key).is_some_and(|other| value.equals(other)))
            }
            (Self::Namespace(left), Self::Namespace(right)) => left == right,
            (Self::Macro(left), Self::Macro(right)) => Rc::ptr_eq(left, right),
            (Self::Function(left), Self::Function(right)) => left == right,
            (Self::Loop(left), Self::Loop(right)) => Rc::ptr_eq(left, right),
            _ => false,
        }
    }

    /// How Python orders two values, or `None` where it raises.
    pub(super) fn compare(&self, other: &Self) -> Option<std::cmp::Ordering> {
        use std::cmp::Ordering;
        if let (Some(left), Some(right)) = (self.as_text(), other.as_text()) {
            return Some(left.cmp(right));
        }
        if let (Some(left), Some(right)) = (self.as_int(), other.as_int()) {
            return Some(left.cmp(&right));
        }
        if let (Some(left), Some(right)) = (self.as_float(), other.as_float()) {
            // NaN: every comparison is false, which no ordering says; equality comes nearest.
            return Some(left.partial_cmp(&right).unwrap_or(Ordering::Equal));
        }
        match (self, other) {
            (Self::List(left), Self::List(right)) | (Self::Tuple(left), Self::Tuple(right)) => {
                for (left, right) in left.items.iter().zip(&right.items) {
                    if !left.equals(right) {
                        return left.compare(right);
                    }
                }
                Some(left.items.len().cmp(&right.items.len()))
            }
            _ => None,
        }
    }

    /// Appends what Python's `str()` gives.
    pub(super) fn print(&self, out: &mut String) {
        match self {
            Self::Undefined(_) => {}
            Self::Text(text) | Self::Markup(text) => out.push_str(text),
            other => other.print_representation(out),
        }
    }

    pub(super) fn to_text(&self) -> Arc<str> {
        match self {
            Self::Text(text) | Self::Markup(text) => text.clone(),
            other => {
                let mut out = String::new();
                other.print(&mut out);
                out.into()
            }
        }
    }

    /// Appends what Python's `repr()` gives.
    pub(super) fn print_representation(&self, out: &mut String) {
        match self {
            Self::Undefined(_) => out.push_str("Undefined"),
            Self::None => out.push_str("None"),
            Self::Bool(value) => out.push_str(if *value { "True" } else { "False" }),
            Self::Int(value) => {
                let _ = write!(out, "{value}");
            }
            Self::Float(value) => print_float(*value, out),
            Self::Text(text) => print_quoted(text, out),
            Self::Markup(text) => {
                out.push_str("Markup(");
                print_quoted(text, out);
                out.push(')');
            }
            Self::List(sequence) => print_items(&sequence.items, "[", "]", out),
            Self::Tuple(sequence) if sequence.items.len() == 1 => {
                print_items(&sequence.items, "(", ",)", out)
            }
            Self::Tuple(sequence) => print_items(&sequence.items, "(", ")", out),
            Self::View(sequence) => print_items(&sequence.items, "dict_items([", "])", out),
            Self::Mapping(mapping) => {
                out.push('{');
                for (at, (key, value)) in mapping.pairs.iter().enumerate() {
                    if at > 0 {
                        out.push_str(", ");
                    }
                    key.print_representation(out);
                    out.push_str(": ");
                    value.print_representation(out);
                }
                out.push('}');
            }
            Self::Iterator(_) => out.push_str("<generator object>"),
            Self::Namespace(_) => out.push_str("<Namespace>"),
            Self::Macro(value) => {
                let _ = write!(out, "<Macro '{}'>", value.node.name);
            }
            Self::Function(name) => {
                let _ = write!(out, "<function {name}>");
            }
            Self::Method(method) => {
                let _ = write!(out, "<method {}>", method.1);
            }
            Self::Loop(state) => {
                let _ = write!(out, "<LoopContext {}/{}>", state.index.get() + 1, state.items.len());
            }
        }
    }
}

impl MacroValue {
    fn nesting(&self) -> u32 {
        let mut nesting = 1;
        let mut value = &self.caller;
        while let Some(caller) = value {
            nesting += 1;
            value = &caller.caller;
        }
        nesting
    }
}

fn print_items(items: &[Value], open: &str, close: &str, out: &mut String) {
    out.push_str(open);
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            out.push_str(", ");
        }
        item.print_representation(out);
    }
    out.push_str(close);
}

/// The shortest digits that read back as the same number, in Python's layout.
pub(super) fn print_float(value: f64, out: &mut String) {
    if value.is_nan() {
        return out.push_str("nan");
    }
    if value.is_infinite() {
        return out.push_str(if value > 0.0 { "inf" } else { "-inf" });
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        out.push_str(&plain);
        if !plain.contains('.') {
            out.push_str(".0");
        }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        let _ = write!(out, "{digits}e{sign}{:02}", exponent.abs());
    }
}

/// Python's `repr` of a string.
fn print_quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if character == quote => {
                out.push('\\');
                out.push(quote);
            }
            ' '..='~' => out.push(character),
            _ if is_printable(character) => out.push(character),
            _ => drop(match u32::from(character) {
                code @ 0..=0xff => write!(out, "\\x{code:02x}"),
                code @ 0x100..=0xffff => write!(out, "\\u{code:04x}"),
                code => write!(out, "\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
}

fn is_printable(character: char) -> bool {
    static HIDDEN: OnceLock<Option<regex::Regex>> = OnceLock::new();
    let hidden = HIDDEN.get_or_init(|| regex::Regex::new(r"[\p{C}\p{Z}]").ok());
    hidden.as_ref().is_some_and(|hidden| !hidden.is_match(character.encode_utf8(&mut [0; 4])))
}

/// What Python's `str.isspace` and `str.strip` count as white space.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}
