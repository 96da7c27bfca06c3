//! The syntax tree that the interpreter walks, and how it is made from the parser's.

use std::sync::Arc;

use minijinja::machinery::{ast, parse};
use minijinja::syntax::SyntaxConfig;

use super::scan::GENERATION;
use crate::{Error, Result};

/// How deeply expressions and statements may nest.
const MAX_DEPTH: usize = 150;

pub(super) type Block = Vec<Node>;

#[derive(Debug)]
pub(super) enum Node {
    Text(Arc<str>),
    Emit(Expr),
    For(Arc<ForNode>),
    If { test: Expr, then: Block, otherwise: Block },
    With { assignments: Vec<(Target, Expr)>, body: Block },
    Set { target: Target, value: Expr },
    SetBlock { target: Target, filter: Option<Expr>, body: Block },
    FilterBlock { filter: Expr, body: Block },
    Macro(Arc<MacroNode>),
    CallBlock { callee: Expr, arguments: Vec<Argument>, caller: Arc<MacroNode> },
    Generation(Block),
    Continue,
    Break,
}

#[derive(Debug)]
pub(super) struct ForNode {
    pub(super) target: Target,
    pub(super) items: Expr,
    pub(super) filter: Option<Expr>,
    pub(super) recursive: bool,
    pub(super) body: Block,
    pub(super) otherwise: Block,
}

#[derive(Debug)]
pub(super) struct MacroNode {
    pub(super) name: Arc<str>,
    pub(super) parameters: Vec<Arc<str>>,
    /// Defaults of the last parameters.
    pub(super) defaults: Vec<Expr>,
    pub(super) body: Block,
}

#[derive(Debug)]
pub(super) enum Target {
    Name(Arc<str>),
    Attribute(Arc<str>, Arc<str>),
    Several(Vec<Target>),
}

#[derive(Debug, Clone)]
pub(super) enum Constant {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Arc<str>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operator {
    And,
    Or,
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Remainder,
    Power,
    Concat,
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    NotIn,
}

#[derive(Debug)]
pub(super) enum Argument {
    Positional(Expr),
    Keyword(Arc<str>, Expr),
    PositionalSplat(Expr),
    KeywordSplat(Expr),
}

#[derive(Debug)]
pub(super) enum Expr {
    Constant(Constant),
    Name(Arc<str>),
    /// The text that a filter block or a `set` block with a filter captured.
    Captured,
    Slice(Box<SliceExpr>),
    Not(Box<Expr>),
    Negative(Box<Expr>),
    Binary(Operator, Box<(Expr, Expr)>),
    Compare(Box<Expr>, Vec<(Operator, Expr)>),
    If(Box<IfExpr>),
    Filter {
        name: Arc<str>,
        value: Box<Expr>,
        arguments: Vec<Argument>,
    },
    Test {
        name: Arc<str>,
        value: Box<Expr>,
        arguments: Vec<Argument>,
    },
    Attribute(Box<Expr>, Arc<str>),
    Item(Box<(Expr, Expr)>),
    Call(Box<Expr>, Vec<Argument>),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Mapping(Vec<(Expr, Expr)>),
}

#[derive(Debug)]
pub(super) struct SliceExpr {
    pub(super) value: Expr,
    pub(super) start: Option<Expr>,
    pub(super) stop: Option<Expr>,
    pub(super) step: Option<Expr>,
}

#[derive(Debug)]
pub(super) struct IfExpr {
    pub(super) test: Expr,
    pub(super) then: Expr,
    pub(super) otherwise: Option<Expr>,
}

/// Parses a prepared source.
pub(super) fn parse_template(source: &str) -> Result<Block> {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|error| Error::Template(error.to_string()))?;
    let tree = parse(source, "template", syntax)
        .map_err(|error| Error::Template(format!("line {}: {error}", error.line().unwrap_or(0))))?;
    match &tree {
        ast::Stmt::Template(template) => Lower { depth: 0 }.block(&template.children),
        _ => Err(Error::Template("the template has no body".to_owned())),
    }
}

struct Lower {
    depth: usize,
}

impl Lower {
    fn deeper(&mut self) -> Result<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(Error::Template(format!("the template nests more than {MAX_DEPTH} levels")));
        }
        Ok(())
    }

    fn block(&mut self, statements: &[ast::Stmt<'_>]) -> Result<Block> {
        self.deeper()?;
        let mut nodes = Vec::with_capacity(statements.len());
        for statement in statements {
            nodes.push(self.statement(statement)?);
        }
        self.depth -= 1;
        Ok(nodes)
    }

    fn statement(&mut self, statement: &ast::Stmt<'_>) -> Result<Node> {
        Ok(match statement {
            ast::Stmt::EmitRaw(raw) => Node::Text(raw.raw.into()),
            ast::Stmt::EmitExpr(emit) => Node::Emit(self.expr(&emit.expr)?),
            ast::Stmt::ForLoop(node) => Node::For(Arc::new(ForNode {
                target: target(&node.target)?,
                items: self.expr(&node.iter)?,
                filter: self.optional(node.filter_expr.as_ref())?,
                recursive: node.recursive,
                body: self.block(&node.body)?,
                otherwise: self.block(&node.else_body)?,
            })),
            ast::Stmt::IfCond(node) => self.condition(node)?,
            ast::Stmt::WithBlock(node) => {
                let mut assignments = Vec::new();
                for (name, value) in &node.assignments {
                    assignments.push((target(name)?, self.expr(value)?));
                }
                Node::With { assignments, body: self.block(&node.body)? }
            }
            ast::Stmt::Set(node) => {
                Node::Set { target: target(&node.target)?, value: self.expr(&node.expr)? }
            }
            ast::Stmt::SetBlock(node) => Node::SetBlock {
                target: target(&node.target)?,
                filter: self.optional(node.filter.as_ref())?,
                body: self.block(&node.body)?,
            },
            ast::Stmt::FilterBlock(node) => {
                Node::FilterBlock { filter: self.expr(&node.filter)?, body: self.block(&node.body)? }
            }
            ast::Stmt::Macro(node) => Node::Macro(Arc::new(self.macro_node(node)?)),
            ast::Stmt::CallBlock(node) => self.call_block(node)?,
            ast::Stmt::Continue(_) => Node::Continue,
            ast::Stmt::Break(_) => Node::Break,
            ast::Stmt::Do(_) => return Err(Error::Template("the tag `do` is not known".to_owned())),
            ast::Stmt::AutoEscape(_) => {
                return Err(Error::Template("the tag `autoescape` is not known".to_owned()));
            }
            ast::Stmt::Template(_) => return Err(Error::Template("a template inside a template".to_owned())),
            #[allow(
                unreachable_patterns,
                reason = "the parser has more statements when another crate turns its features on"
            )]
            _ => return Err(Error::Template("a tag that reads other templates is refused".to_owned())),
        })
    }

    /// A chain of `elif` is a list in the source and nested in the parser's tree; it does not count as depth here.
    fn condition(&mut self, node: &ast::IfCond<'_>) -> Result<Node> {
        let test = self.expr(&node.expr)?;
        let then = self.block(&node.true_body)?;
        let otherwise = match node.false_body.as_slice() {
            [ast::Stmt::IfCond(next)] => vec![self.condition(next)?],
            other => self.block(other)?,
        };
        Ok(Node::If { test, then, otherwise })
    }

    fn call_block(&mut self, node: &ast::CallBlock<'_>) -> Result<Node> {
        let caller = self.macro_node(&node.macro_decl)?;
        let callee = self.expr(&node.call.expr)?;
        if matches!(&callee, Expr::Name(name) if &**name == GENERATION) {
            return Ok(Node::Generation(caller.body));
        }
        Ok(Node::CallBlock { callee, arguments: self.arguments(&node.call.args)?, caller: Arc::new(caller) })
    }

    fn macro_node(&mut self, node: &ast::Macro<'_>) -> Result<MacroNode> {
        let mut parameters = Vec::new();
        for argument in &node.args {
            match argument {
                ast::Expr::Var(name) => parameters.push(name.id.into()),
                _ => return Err(Error::Template("a macro's parameter is not a name".to_owned())),
            }
        }
        let mut defaults = Vec::new();
        for default in &node.defaults {
            defaults.push(self.expr(default)?);
        }
        Ok(MacroNode { name: node.name.into(), parameters, defaults, body: self.block(&node.body)? })
    }

    fn optional(&mut self, expr: Option<&ast::Expr<'_>>) -> Result<Option<Expr>> {
        expr.map(|expr| self.expr(expr)).transpose()
    }

    fn boxed(&mut self, expr: &ast::Expr<'_>) -> Result<Box<Expr>> {
        self.expr(expr).map(Box::new)
    }

    fn several(&mut self, items: &[ast::Expr<'_>]) -> Result<Vec<Expr>> {
        items.iter().map(|item| self.expr(item)).collect()
    }

    fn expr(&mut self, expr: &ast::Expr<'_>) -> Result<Expr> {
        self.deeper()?;
        let lowered = self.expr_unguarded(expr)?;
        self.depth -= 1;
        Ok(lowered)
    }

    fn expr_unguarded(&mut self, expr: &ast::Expr<'_>) -> Result<Expr> {
        Ok(match expr {
            ast::Expr::Var(name) => Expr::Name(name.id.into()),
            ast::Expr::Const(value) => Expr::Constant(constant(&value.value)?),
            ast::Expr::Slice(slice) => Expr::Slice(Box::new(SliceExpr {
                value: self.expr(&slice.expr)?,
                start: self.optional(slice.start.as_ref())?,
                stop: self.optional(slice.stop.as_ref())?,
                step: self.optional(slice.step.as_ref())?,
            })),
            ast::Expr::UnaryOp(unary) => match unary.op {
                ast::UnaryOpKind::Not => Expr::Not(self.boxed(&unary.expr)?),
                ast::UnaryOpKind::Neg => Expr::Negative(self.boxed(&unary.expr)?),
            },
            ast::Expr::BinOp(binary) => self.binary(binary)?,
            ast::Expr::Compare(compare) => {
                let first = self.boxed(&compare.expr)?;
                let mut steps = Vec::new();
                for step in &compare.ops {
                    steps.push((comparison(step.op), self.expr(&step.expr)?));
                }
                Expr::Compare(first, steps)
            }
            ast::Expr::IfExpr(node) => Expr::If(Box::new(IfExpr {
                test: self.expr(&node.test_expr)?,
                then: self.expr(&node.true_expr)?,
                otherwise: self.optional(node.false_expr.as_ref())?,
            })),
            ast::Expr::Filter(filter) => Expr::Filter {
                name: filter.name.into(),
                value: match &filter.expr {
                    Some(value) => self.boxed(value)?,
                    None => Box::new(Expr::Captured),
                },
                arguments: self.arguments(&filter.args)?,
            },
            ast::Expr::Test(test) => Expr::Test {
                name: test.name.into(),
                value: self.boxed(&test.expr)?,
                arguments: self.arguments(&test.args)?,
            },
            ast::Expr::GetAttr(node) => Expr::Attribute(self.boxed(&node.expr)?, node.name.into()),
            ast::Expr::GetItem(node) => {
                Expr::Item(Box::new((self.expr(&node.expr)?, self.expr(&node.subscript_expr)?)))
            }
            ast::Expr::Call(call) => Expr::Call(self.boxed(&call.expr)?, self.arguments(&call.args)?),
            ast::Expr::List(list) => Expr::List(self.several(&list.items)?),
            ast::Expr::Tuple(tuple) => Expr::Tuple(self.several(&tuple.items)?),
            ast::Expr::Map(map) => {
                let mut pairs = Vec::new();
                for (key, value) in map.keys.iter().zip(&map.values) {
                    pairs.push((self.expr(key)?, self.expr(value)?));
                }
                Expr::Mapping(pairs)
            }
        })
    }

    /// Left-nested chains (`a ~ b ~ c ...`) are the parser's loops; they count as depth all the same.
    fn binary(&mut self, node: &ast::BinOp<'_>) -> Result<Expr> {
        let operator = match node.op {
            ast::BinOpKind::Eq => Operator::Equal,
            ast::BinOpKind::Ne => Operator::NotEqual,
            ast::BinOpKind::Lt => Operator::Less,
            ast::BinOpKind::Lte => Operator::LessOrEqual,
            ast::BinOpKind::Gt => Operator::Greater,
            ast::BinOpKind::Gte => Operator::GreaterOrEqual,
            ast::BinOpKind::ScAnd => Operator::And,
            ast::BinOpKind::ScOr => Operator::Or,
            ast::BinOpKind::Add => Operator::Add,
            ast::BinOpKind::Sub => Operator::Subtract,
            ast::BinOpKind::Mul => Operator::Multiply,
            ast::BinOpKind::Div => Operator::Divide,
            ast::BinOpKind::FloorDiv => Operator::FloorDivide,
            ast::BinOpKind::Rem => Operator::Remainder,
            ast::BinOpKind::Pow => Operator::Power,
            ast::BinOpKind::Concat => Operator::Concat,
            ast::BinOpKind::In => Operator::In,
        };
        Ok(Expr::Binary(operator, Box::new((self.expr(&node.left)?, self.expr(&node.right)?))))
    }

    fn arguments(&mut self, arguments: &[ast::CallArg<'_>]) -> Result<Vec<Argument>> {
        arguments
            .iter()
            .map(|argument| {
                Ok(match argument {
                    ast::CallArg::Pos(value) => Argument::Positional(self.expr(value)?),
                    ast::CallArg::Kwarg(name, value) => Argument::Keyword((*name).into(), self.expr(value)?),
                    ast::CallArg::PosSplat(value) => Argument::PositionalSplat(self.expr(value)?),
                    ast::CallArg::KwargSplat(value) => Argument::KeywordSplat(self.expr(value)?),
                })
            })
            .collect()
    }
}

fn comparison(operator: ast::CompareOpKind) -> Operator {
    match operator {
        ast::CompareOpKind::Eq => Operator::Equal,
        ast::CompareOpKind::Ne => Operator::NotEqual,
        ast::CompareOpKind::Lt => Operator::Less,
        ast::CompareOpKind::Lte => Operator::LessOrEqual,
        ast::CompareOpKind::Gt => Operator::Greater,
        ast::CompareOpKind::Gte => Operator::GreaterOrEqual,
        ast::CompareOpKind::In => Operator::In,
        ast::CompareOpKind::NotIn => Operator::NotIn,
    }
}

fn target(expr: &ast::Expr<'_>) -> Result<Target> {
    match expr {
        ast::Expr::Var(name) => Ok(Target::Name(name.id.into())),
        ast::Expr::GetAttr(node) => match &node.expr {
            ast::Expr::Var(name) => Ok(Target::Attribute(name.id.into(), node.name.into())),
            _ => Err(Error::Template("only an attribute of a name can be set".to_owned())),
        },
        ast::Expr::List(list) => list.items.iter().map(target).collect::<Result<_>>().map(Target::Several),
        ast::Expr::Tuple(tuple) => tuple.items.iter().map(target).collect::<Result<_>>().map(Target::Several),
        _ => Err(Error::Template(format!("cannot assign to {}", expr.description()))),
    }
}

fn constant(value: &minijinja::Value) -> Result<Constant> {
    use minijinja::value::ValueKind;
    Ok(match value.kind() {
        ValueKind::None => Constant::None,
        ValueKind::Bool => Constant::Bool(value.is_true()),
        ValueKind::String => Constant::Text(value.as_str().unwrap_or_default().into()),
        ValueKind::Number if value.is_integer() => Constant::Int(
            value
                .as_i64()
                .ok_or_else(|| Error::Template(format!("the number {value} does not fit 64 bits")))?,
        ),
        ValueKind::Number => Constant::Float(
            f64::try_from(value.clone())
                .map_err(|_| Error::Template(format!("the number {value} is not known")))?,
        ),
        kind => return Err(Error::Template(format!("a literal of kind {kind} is not known"))),
    })
}
