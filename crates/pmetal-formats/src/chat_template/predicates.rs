//! Tests: what stands after `is`.

use super::eval::{Arguments, Interpreter};
use super::filters::is_filter;
use super::syntax::Operator;
use super::value::{Outcome, Value, failed};

const TESTS: [&str; 32] = [
    "defined",
    "undefined",
    "none",
    "boolean",
    "true",
    "false",
    "integer",
    "float",
    "number",
    "string",
    "mapping",
    "sequence",
    "iterable",
    "callable",
    "odd",
    "even",
    "divisibleby",
    "in",
    "sameas",
    "lower",
    "upper",
    "escaped",
    "filter",
    "test",
    "eq",
    "equalto",
    "ne",
    "lt",
    "lessthan",
    "le",
    "gt",
    "ge",
];

impl Interpreter {
    pub(super) fn test(&mut self, name: &str, value: &Value, arguments: &Arguments) -> Outcome<bool> {
        let operand = || match arguments.positional.first() {
            Some(operand) => Ok(operand),
            None => failed(format!("the test `{name}` needs an argument")),
        };
        Ok(match name {
            "defined" => !matches!(value, Value::Undefined(_)),
            "undefined" => matches!(value, Value::Undefined(_)),
            "none" => matches!(value, Value::None),
            "boolean" => matches!(value, Value::Bool(_)),
            "true" => matches!(value, Value::Bool(true)),
            "false" => matches!(value, Value::Bool(false)),
            "integer" => matches!(value, Value::Int(_)),
            "float" => matches!(value, Value::Float(_)),
            "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
            "string" => value.as_text().is_some(),
            "mapping" => matches!(value, Value::Mapping(_)),
            "sequence" => matches!(
                value,
                Value::Text(_)
                    | Value::Markup(_)
                    | Value::List(_)
                    | Value::Tuple(_)
                    | Value::Mapping(_)
                    | Value::Undefined(_)
            ),
            "iterable" => matches!(
                value,
                Value::Text(_)
                    | Value::Markup(_)
                    | Value::List(_)
                    | Value::Tuple(_)
                    | Value::Mapping(_)
                    | Value::Undefined(_)
                    | Value::Iterator(_)
                    | Value::View(_)
                    | Value::Loop(_)
            ),
            "callable" => {
                matches!(value, Value::Macro(_) | Value::Function(_) | Value::Method(_) | Value::Loop(_))
            }
            "escaped" => matches!(value, Value::Markup(_)),
            "odd" | "even" => match value.as_int() {
                Some(number) => (number % 2 != 0) == (name == "odd"),
                None => return failed(format!("the test `{name}` needs a number, got a {}", value.kind())),
            },
            "divisibleby" => self.binary(Operator::Remainder, value, operand()?)?.equals(&Value::Int(0)),
            "in" => self.contains(operand()?, value)?,
            "sameas" => {
                let other = operand()?;
                value.kind() == other.kind() && value.equals(other)
            }
            "lower" | "upper" => {
                let text = value.to_text();
                let (lower, upper) =
                    (text.chars().any(char::is_lowercase), text.chars().any(char::is_uppercase));
                if name == "lower" { lower && !upper } else { upper && !lower }
            }
            "filter" => is_filter(&value.to_text()),
            "test" => TESTS.contains(&&*value.to_text()),
            _ => {
                let operator = match name {
                    "eq" | "equalto" | "==" => Operator::Equal,
                    "ne" | "!=" => Operator::NotEqual,
                    "lt" | "lessthan" | "<" => Operator::Less,
                    "le" | "<=" => Operator::LessOrEqual,
                    "gt" | "greaterthan" | ">" => Operator::Greater,
                    "ge" | ">=" => Operator::GreaterOrEqual,
                    _ => return failed(format!("no test is named `{name}`")),
                };
                self.binary(operator, value, operand()?)?.is_true()
            }
        })
    }
}
