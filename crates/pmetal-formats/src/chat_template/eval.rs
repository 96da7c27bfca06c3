//! The interpreter: walks the syntax tree with budgets for work, memory and depth.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use super::syntax::{Argument, Block, Constant, Expr, ForNode, MacroNode, Node, Operator, Target};
use super::value::{Fault, LoopState, MacroValue, Outcome, Value, failed};

/// Steps of one rendering: about a second of work.
const FUEL: u64 = 5_000_000;
/// Nested evaluations; each costs native stack.
const MAX_DEPTH: usize = 400;
/// The longest text that a template may make.
pub(super) const MAX_TEXT_BYTES: usize = 32 << 20;

/// The arguments of a call, evaluated.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    pub(super) positional: Vec<Value>,
    pub(super) keywords: Vec<(Arc<str>, Value)>,
}

impl Arguments {
    pub(super) fn none() -> Self {
        Self::default()
    }

    /// The argument at a position or of a name.
    pub(super) fn get(&self, position: usize, name: &str) -> Option<Value> {
        self.positional.get(position).cloned().or_else(|| {
            self.keywords.iter().find(|(keyword, _)| &**keyword == name).map(|(_, value)| value.clone())
        })
    }

    /// Fails when there are arguments that nothing looks at.
    pub(super) fn expect(&self, what: &str, names: &[&str]) -> Outcome<()> {
        if self.positional.len() > names.len() {
            return failed(format!("{what} takes {} arguments, got {}", names.len(), self.positional.len()));
        }
        match self.keywords.iter().find(|(keyword, _)| !names.contains(&&**keyword)) {
            Some((keyword, _)) => failed(format!("{what} has no argument `{keyword}`")),
            None => Ok(()),
        }
    }
}

enum Flow {
    Next,
    Continue,
    Break,
}

struct Scope {
    names: Vec<(Arc<str>, Value)>,
    parent: Option<usize>,
    /// A macro was defined in it, so it outlives its block.
    captured: bool,
}

pub(super) struct Interpreter {
    scopes: Vec<Scope>,
    current: usize,
    outputs: Vec<String>,
    pub(super) namespaces: Vec<Vec<(Arc<str>, Value)>>,
    captured: Vec<Value>,
    generation: Vec<Range<usize>>,
    pub(super) now_unix_s: i64,
    fuel: u64,
    memory: usize,
    depth: usize,
}

impl Interpreter {
    /// An interpreter whose texts may take `memory` bytes in all.
    pub(super) fn new(memory: usize, now_unix_s: i64) -> Self {
        Self {
            scopes: vec![Scope { names: Vec::new(), parent: None, captured: true }],
            current: 0,
            outputs: vec![String::new()],
            namespaces: Vec::new(),
            captured: Vec::new(),
            generation: Vec::new(),
            now_unix_s,
            fuel: FUEL,
            memory,
            depth: 0,
        }
    }

    pub(super) fn define(&mut self, name: &str, value: Value) {
        self.assign_name(&name.into(), value);
    }

    pub(super) fn run(mut self, block: &Block) -> Outcome<(String, Vec<Range<usize>>)> {
        self.block(block)?;
        Ok((self.outputs.swap_remove(0), self.generation))
    }

    /// Pays for work.
    pub(super) fn spend(&mut self, steps: usize) -> Outcome<()> {
        match self.fuel.checked_sub(steps as u64) {
            Some(left) => {
                self.fuel = left;
                Ok(())
            }
            None => failed(format!("the template needs more than {FUEL} steps")),
        }
    }

    /// Pays for memory, before it is taken.
    pub(super) fn charge(&mut self, bytes: usize) -> Outcome<()> {
        if bytes > MAX_TEXT_BYTES {
            return failed(format!(
                "the template makes a value of {bytes} bytes, at most {MAX_TEXT_BYTES} are allowed"
            ));
        }
        match self.memory.checked_sub(bytes) {
            Some(left) => {
                self.memory = left;
                self.spend(bytes / 64)
            }
            None => failed("the template makes more text than the conversation can need"),
        }
    }

    /// A text value that was paid for.
    pub(super) fn new_text(&mut self, text: String) -> Outcome<Value> {
        self.charge(text.len())?;
        Ok(Value::text(text))
    }

    /// A list that was paid for.
    pub(super) fn new_list(&mut self, items: Vec<Value>) -> Outcome<Value> {
        self.charge_items(items.len())?;
        Value::list(items)
    }

    pub(super) fn charge_items(&mut self, count: usize) -> Outcome<()> {
        self.charge(count.saturating_mul(size_of::<Value>()))
    }

    fn deeper(&mut self) -> Outcome<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return failed(format!("the template recurses more than {MAX_DEPTH} levels"));
        }
        Ok(())
    }

    fn enter(&mut self, parent: usize) -> usize {
        self.scopes.push(Scope { names: Vec::new(), parent: Some(parent), captured: false });
        std::mem::replace(&mut self.current, self.scopes.len() - 1)
    }

    fn leave(&mut self, previous: usize) {
        if self.current + 1 == self.scopes.len() && !self.scopes[self.current].captured {
            self.scopes.pop();
        }
        self.current = previous;
    }

    fn capture_scope(&mut self) -> usize {
        let mut scope = Some(self.current);
        while let Some(index) = scope {
            if self.scopes[index].captured {
                break;
            }
            self.scopes[index].captured = true;
            scope = self.scopes[index].parent;
        }
        self.current
    }

    fn assign_name(&mut self, name: &Arc<str>, value: Value) {
        let names = &mut self.scopes[self.current].names;
        match names.iter_mut().find(|(known, _)| known == name) {
            Some(pair) => pair.1 = value,
            None => names.push((name.clone(), value)),
        }
    }

    fn lookup(&self, name: &Arc<str>) -> Value {
        let mut scope = self.scopes.get(self.current);
        while let Some(found) = scope {
            if let Some((_, value)) = found.names.iter().find(|(known, _)| known == name) {
                return value.clone();
            }
            scope = found.parent.and_then(|parent| self.scopes.get(parent));
        }
        super::calls::function(name).map_or_else(|| Value::Undefined(name.clone()), Value::Function)
    }

    fn write(&mut self, value: &Value) -> Outcome<()> {
        match value {
            Value::Text(text) | Value::Markup(text) => self.write_text(text),
            Value::Undefined(_) => Ok(()),
            other => {
                let text = other.to_text();
                self.write_text(&text)
            }
        }
    }

    fn write_text(&mut self, text: &str) -> Outcome<()> {
        self.charge(text.len())?;
        if let Some(output) = self.outputs.last_mut() {
            if output.len() + text.len() > MAX_TEXT_BYTES {
                return failed(format!("the text is longer than {MAX_TEXT_BYTES} bytes"));
            }
            output.push_str(text);
        }
        Ok(())
    }

    fn block(&mut self, block: &[Node]) -> Outcome<Flow> {
        self.deeper()?;
        for node in block {
            self.spend(1)?;
            match self.node(node)? {
                Flow::Next => {}
                flow => {
                    self.depth -= 1;
                    return Ok(flow);
                }
            }
        }
        self.depth -= 1;
        Ok(Flow::Next)
    }

    /// The text that a block writes, in a scope of its own.
    fn capture(&mut self, block: &[Node]) -> Outcome<String> {
        let previous = self.enter(self.current);
        self.outputs.push(String::new());
        self.block(block)?;
        self.leave(previous);
        Ok(self.outputs.pop().unwrap_or_default())
    }

    fn node(&mut self, node: &Node) -> Outcome<Flow> {
        match node {
            Node::Text(text) => self.write_text(text)?,
            Node::Emit(expr) => {
                let value = self.expr(expr)?;
                self.write(&value)?;
            }
            Node::For(node) => {
                let items = self.expr(&node.items)?;
                self.for_loop(node, &items, 0)?;
            }
            Node::If { .. } => return self.condition(node),
            Node::With { assignments, body } => {
                let mut values = Vec::new();
                for (_, value) in assignments {
                    values.push(self.expr(value)?);
                }
                let previous = self.enter(self.current);
                for ((target, _), value) in assignments.iter().zip(values) {
                    self.assign(target, value)?;
                }
                let flow = self.block(body)?;
                self.leave(previous);
                return Ok(flow);
            }
            Node::Set { target, value } => {
                let value = self.expr(value)?;
                self.assign(target, value)?;
            }
            Node::SetBlock { target, filter, body } => {
                let text = self.capture(body)?;
                let value = self.filtered(text, filter.as_ref())?;
                self.assign(target, value)?;
            }
            Node::FilterBlock { filter, body } => {
                let text = self.capture(body)?;
                let value = self.filtered(text, Some(filter))?;
                self.write(&value)?;
            }
            Node::Macro(node) => {
                let scope = self.capture_scope();
                let value = MacroValue { node: node.clone(), scope, caller: None };
                self.assign_name(&node.name, Value::Macro(Rc::new(value)));
            }
            Node::CallBlock { callee, arguments, caller } => self.call_block(callee, arguments, caller)?,
            Node::Generation(body) => {
                let text = self.capture(body)?;
                let start = self.outputs[0].len();
                self.generation.push(start..start + text.len());
                self.write_text(&text)?;
            }
            Node::Continue => return Ok(Flow::Continue),
            Node::Break => return Ok(Flow::Break),
        }
        Ok(Flow::Next)
    }

    fn condition(&mut self, mut node: &Node) -> Outcome<Flow> {
        while let Node::If { test, then, otherwise } = node {
            if self.expr(test)?.is_true() {
                return self.block(then);
            }
            match otherwise.as_slice() {
                [next @ Node::If { .. }] => node = next,
                other => return self.block(other),
            }
        }
        Ok(Flow::Next)
    }

    fn filtered(&mut self, text: String, filter: Option<&Expr>) -> Outcome<Value> {
        let text = self.new_text(text)?;
        let Some(filter) = filter else { return Ok(text) };
        self.captured.push(text);
        let value = self.expr(filter);
        self.captured.pop();
        value
    }

    fn call_block(&mut self, callee: &Expr, arguments: &[Argument], caller: &Arc<MacroNode>) -> Outcome<()> {
        let callee = self.expr(callee)?;
        let arguments = self.arguments(arguments)?;
        let scope = self.capture_scope();
        let caller = Rc::new(MacroValue { node: caller.clone(), scope, caller: None });
        let Value::Macro(called) = callee else {
            return failed(format!("`call` needs a macro, got a {}", callee.kind()));
        };
        let called = MacroValue { node: called.node.clone(), scope: called.scope, caller: Some(caller) };
        let value = self.call_macro(&called, arguments)?;
        self.write(&value)
    }

    pub(super) fn assign(&mut self, target: &Target, value: Value) -> Outcome<()> {
        match target {
            Target::Name(name) => self.assign_name(name, value),
            Target::Attribute(object, name) => {
                let Value::Namespace(index) = self.lookup(object) else {
                    return failed(format!("cannot set `{object}.{name}`: `{object}` is not a namespace"));
                };
                if name.starts_with('_') {
                    return failed(format!("a namespace cannot hold the underscore-prefixed name `{name}`"));
                }
                let names = &mut self.namespaces[index];
                match names.iter_mut().find(|(known, _)| known == name) {
                    Some(pair) => pair.1 = value,
                    None => names.push((name.clone(), value)),
                }
            }
            Target::Several(targets) => {
                let values = self.iterate(&value)?;
                if values.len() != targets.len() {
                    return failed(format!(
                        "cannot unpack {} values into {} names",
                        values.len(),
                        targets.len()
                    ));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value)?;
                }
            }
        }
        Ok(())
    }

    /// The items that a loop over the value sees.
    pub(super) fn iterate(&mut self, value: &Value) -> Outcome<Vec<Value>> {
        let items = match value {
            Value::List(sequence) | Value::Tuple(sequence) | Value::View(sequence) => sequence.items.clone(),
            Value::Iterator(iterator) => std::mem::take(&mut *iterator.items.borrow_mut()),
            Value::Mapping(mapping) => mapping.pairs.iter().map(|(key, _)| key.clone()).collect(),
            Value::Text(text) | Value::Markup(text) => {
                self.charge_items(text.len())?;
                text.chars()
                    .map(|character| Value::text(character.encode_utf8(&mut [0; 4]) as &str))
                    .collect()
            }
            Value::Undefined(_) => Vec::new(),
            other => return failed(format!("a value of type {} cannot be iterated", other.kind())),
        };
        self.charge_items(items.len())?;
        Ok(items)
    }

    pub(super) fn for_loop(&mut self, node: &Arc<ForNode>, items: &Value, level: usize) -> Outcome<()> {
        let mut items = self.iterate(items)?;
        let outer = self.current;
        if let Some(filter) = &node.filter {
            let mut kept = Vec::new();
            for item in items {
                let previous = self.enter(outer);
                self.assign(&node.target, item.clone())?;
                if self.expr(filter)?.is_true() {
                    kept.push(item);
                }
                self.leave(previous);
            }
            items = kept;
        }
        if items.is_empty() {
            let previous = self.enter(outer);
            self.block(&node.otherwise)?;
            self.leave(previous);
            return Ok(());
        }
        let state = Rc::new(LoopState::new(items, level, node.clone(), outer)?);
        let loop_name: Arc<str> = "loop".into();
        for at in 0..state.items.len() {
            state.index.set(at);
            self.spend(1)?;
            let previous = self.enter(outer);
            self.assign_name(&loop_name, Value::Loop(state.clone()));
            self.assign(&node.target, state.items[at].clone())?;
            let flow = self.block(&node.body)?;
            self.leave(previous);
            if matches!(flow, Flow::Break) {
                break;
            }
        }
        Ok(())
    }

    /// What `loop(items)` of a recursive loop writes.
    pub(super) fn call_loop(&mut self, state: &LoopState, arguments: &Arguments) -> Outcome<Value> {
        if !state.node.recursive {
            return failed("the loop is not marked as recursive");
        }
        let [items] = arguments.positional.as_slice() else {
            return failed("a recursive loop takes one argument");
        };
        if state.scope >= self.scopes.len() {
            return failed("the loop has ended");
        }
        self.deeper()?;
        self.outputs.push(String::new());
        let previous = std::mem::replace(&mut self.current, state.scope);
        self.for_loop(&state.node.clone(), items, state.level + 1)?;
        self.current = previous;
        self.depth -= 1;
        let text = self.outputs.pop().unwrap_or_default();
        self.new_text(text)
    }

    pub(super) fn call_macro(&mut self, called: &MacroValue, arguments: Arguments) -> Outcome<Value> {
        let node = called.node.clone();
        if called.scope >= self.scopes.len() {
            return failed(format!("the macro `{}` has ended", node.name));
        }
        self.deeper()?;
        let previous = self.enter(called.scope);
        self.bind_parameters(&node, called, arguments)?;
        self.outputs.push(String::new());
        self.block(&node.body)?;
        self.leave(previous);
        self.depth -= 1;
        let text = self.outputs.pop().unwrap_or_default();
        self.new_text(text)
    }

    fn bind_parameters(
        &mut self,
        node: &MacroNode,
        called: &MacroValue,
        arguments: Arguments,
    ) -> Outcome<()> {
        let count = node.parameters.len();
        let mut positional = arguments.positional.into_iter();
        let mut keywords = arguments.keywords;
        for (at, name) in node.parameters.iter().enumerate() {
            let keyword = keywords.iter().position(|(keyword, _)| keyword == name);
            let value = match (positional.next(), keyword) {
                (Some(_), Some(_)) => {
                    return failed(format!("macro `{}` got two values for `{name}`", node.name));
                }
                (Some(value), None) => value,
                (None, Some(place)) => keywords.swap_remove(place).1,
                (None, None) => match (at + node.defaults.len()).checked_sub(count) {
                    Some(default) => self.expr(&node.defaults[default])?,
                    None => Value::Undefined(name.clone()),
                },
            };
            self.assign_name(name, value);
        }
        let rest: Vec<Value> = positional.collect();
        if !rest.is_empty() {
            return failed(format!("macro `{}` takes not more than {count} arguments", node.name));
        }
        if let Some(caller) = &called.caller {
            self.assign_name(&"caller".into(), Value::Macro(caller.clone()));
        }
        match keywords.first() {
            Some((keyword, _)) => failed(format!("macro `{}` has no parameter `{keyword}`", node.name)),
            None => Ok(()),
        }
    }

    fn arguments(&mut self, given: &[Argument]) -> Outcome<Arguments> {
        let mut arguments = Arguments::none();
        for argument in given {
            match argument {
                Argument::Positional(value) => arguments.positional.push(self.expr(value)?),
                Argument::Keyword(name, value) => {
                    let value = self.expr(value)?;
                    arguments.keywords.push((name.clone(), value));
                }
                Argument::PositionalSplat(value) => {
                    let value = self.expr(value)?;
                    arguments.positional.extend(self.iterate(&value)?);
                }
                Argument::KeywordSplat(value) => match self.expr(value)? {
                    Value::Mapping(mapping) => {
                        for (key, value) in &mapping.pairs {
                            arguments.keywords.push((key.to_text(), value.clone()));
                        }
                    }
                    other => return failed(format!("`**` needs a mapping, got a {}", other.kind())),
                },
            }
        }
        Ok(arguments)
    }

    pub(super) fn expr(&mut self, expr: &Expr) -> Outcome<Value> {
        self.spend(1)?;
        match expr {
            Expr::Constant(constant) => Ok(constant_value(constant)),
            Expr::Name(name) => Ok(self.lookup(name)),
            _ => {
                self.deeper()?;
                let value = self.nested(expr)?;
                self.depth -= 1;
                Ok(value)
            }
        }
    }

    fn nested(&mut self, expr: &Expr) -> Outcome<Value> {
        match expr {
            Expr::Constant(constant) => Ok(constant_value(constant)),
            Expr::Name(name) => Ok(self.lookup(name)),
            Expr::Captured => {
                self.captured.last().cloned().ok_or(Fault::Failed("a filter without text".to_owned()))
            }
            Expr::Slice(slice) => {
                let value = self.expr(&slice.value)?;
                let mut bounds = [None; 3];
                for (bound, expr) in bounds.iter_mut().zip([&slice.start, &slice.stop, &slice.step]) {
                    *bound = self.slice_bound(expr.as_ref())?;
                }
                self.slice(&value, bounds)
            }
            Expr::Not(value) => Ok(Value::Bool(!self.expr(value)?.is_true())),
            Expr::Negative(value) => {
                let value = self.expr(value)?;
                self.negative(&value)
            }
            Expr::Binary(operator, operands) => self.binary_expr(*operator, &operands.0, &operands.1),
            Expr::Compare(first, steps) => {
                let mut left = self.expr(first)?;
                for (operator, right) in steps {
                    let right = self.expr(right)?;
                    if !self.binary(*operator, &left, &right)?.is_true() {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Ok(Value::Bool(true))
            }
            Expr::If(node) => match (self.expr(&node.test)?.is_true(), &node.otherwise) {
                (true, _) => self.expr(&node.then),
                (false, Some(otherwise)) => self.expr(otherwise),
                (false, None) => Ok(Value::undefined("the inline if-expression without else")),
            },
            Expr::Filter { name, value, arguments } => {
                let value = self.expr(value)?;
                let arguments = self.arguments(arguments)?;
                self.filter(name, &value, &arguments)
            }
            Expr::Test { name, value, arguments } => {
                let value = self.expr(value)?;
                let arguments = self.arguments(arguments)?;
                self.test(name, &value, &arguments).map(Value::Bool)
            }
            Expr::Attribute(value, name) => {
                let value = self.expr(value)?;
                self.attribute(&value, name)
            }
            Expr::Item(pair) => {
                let value = self.expr(&pair.0)?;
                let key = self.expr(&pair.1)?;
                self.item(&value, &key)
            }
            Expr::Call(callee, arguments) => {
                let callee = self.expr(callee)?;
                let arguments = self.arguments(arguments)?;
                self.call(&callee, arguments)
            }
            Expr::List(items) => {
                let items = self.several(items)?;
                self.new_list(items)
            }
            Expr::Tuple(items) => {
                let items = self.several(items)?;
                self.charge_items(items.len())?;
                Value::tuple(items)
            }
            Expr::Mapping(pairs) => self.mapping_literal(pairs),
        }
    }

    fn binary_expr(&mut self, operator: Operator, left: &Expr, right: &Expr) -> Outcome<Value> {
        let left = self.expr(left)?;
        match operator {
            Operator::And if !left.is_true() => Ok(left),
            Operator::Or if left.is_true() => Ok(left),
            Operator::And | Operator::Or => self.expr(right),
            _ => {
                let right = self.expr(right)?;
                self.binary(operator, &left, &right)
            }
        }
    }

    fn mapping_literal(&mut self, pairs: &[(Expr, Expr)]) -> Outcome<Value> {
        let mut values = Vec::with_capacity(pairs.len());
        for (key, value) in pairs {
            values.push((self.expr(key)?, self.expr(value)?));
        }
        self.charge_items(2 * values.len())?;
        Value::mapping(values)
    }

    fn several(&mut self, items: &[Expr]) -> Outcome<Vec<Value>> {
        items.iter().map(|item| self.expr(item)).collect()
    }

    fn slice_bound(&mut self, expr: Option<&Expr>) -> Outcome<Option<i64>> {
        let Some(expr) = expr else { return Ok(None) };
        match self.expr(expr)? {
            Value::None => Ok(None),
            value => match value.as_int() {
                Some(value) => Ok(Some(value)),
                None => failed(format!("a slice's bound must be an integer, got a {}", value.kind())),
            },
        }
    }
}

fn constant_value(constant: &Constant) -> Value {
    match constant {
        Constant::None => Value::None,
        Constant::Bool(value) => Value::Bool(*value),
        Constant::Int(value) => Value::Int(*value),
        Constant::Float(value) => Value::Float(*value),
        Constant::Text(text) => Value::Text(text.clone()),
    }
}
