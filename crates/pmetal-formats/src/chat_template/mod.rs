//! Chat templates: messages to the text that a model was trained on.
//!
//! Templates are programs that came with a download. minijinja parses them; the interpreter here gives them Python's
//! values and semantics, as `transformers` does, and budgets for work, memory and depth, which it does not.

mod calls;
mod encode;
mod eval;
mod filters;
mod json;
mod methods;
mod operators;
mod predicates;
mod request;
mod scan;
mod sequences;
mod strftime;
mod syntax;
mod value;

use std::ops::Range;

use serde_json::{Map, Value as Json};

use self::eval::Interpreter;
use self::value::{Fault, Value};
use crate::{Error, Result};

pub use encode::{EncodedChat, encode_chat};

/// Native stack for parsing: the parser recurses over the source.
const PARSER_STACK_BYTES: usize = 64 << 20;
/// Native stack for rendering: the interpreter recurses over the tree.
const RENDER_STACK_BYTES: usize = 16 << 20;

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    body: syntax::Block,
}

/// What a template is rendered with.
#[derive(Debug, Clone, Copy)]
pub struct RenderRequest<'a> {
    /// The conversation: an array of mappings.
    pub messages: &'a Json,
    /// The tools that the model may call: an array of mappings.
    pub tools: Option<&'a Json>,
    /// The documents that the model may cite: an array of mappings.
    pub documents: Option<&'a Json>,
    /// Whether the text ends with the beginning of an assistant message.
    pub add_generation_prompt: bool,
    /// Whether the last message is left open, so that the model goes on with it.
    pub continue_final_message: bool,
    /// Further variables: `bos_token`, `eos_token`, `enable_thinking`, `date_string`, ...
    pub variables: &'a Map<String, Json>,
    /// The moment that `strftime_now` prints, in seconds since 1970 of the wanted time zone's clock.
    pub now_unix_s: i64,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges of the text inside `{% generation %}` blocks; empty when the template has none.
    pub generation: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// When the source is too long, nested too deeply or not a template.
    pub fn compile(source: &str) -> Result<Self> {
        let prepared = scan::prepare(source)?;
        let body = on_stack(PARSER_STACK_BYTES, || syntax::parse_template(&prepared))?;
        Ok(Self { source: source.to_owned(), body })
    }

    /// Renders a conversation, to the same bytes as `apply_chat_template` of `transformers` 5.
    ///
    /// As there, message fields that are null are left out, and `reasoning_content`, `thinking` and `reasoning` are
    /// given under the first two names.
    ///
    /// # Errors
    /// [`Error::TemplateRaised`] when the template refuses the conversation by `raise_exception`;
    /// [`Error::Template`] when it is not meant for these messages, or needs more work or memory than they deserve.
    pub fn render(&self, request: &RenderRequest<'_>) -> Result<Rendered> {
        let prepared = request::prepare(request, &self.source)?;
        let rendered = on_stack(RENDER_STACK_BYTES, || self.run(request, &prepared.messages))?;
        request::finish(request, &prepared, rendered)
    }

    fn run(&self, request: &RenderRequest<'_>, messages: &Json) -> Result<Rendered> {
        let inputs = [Some(messages), request.tools, request.documents];
        let input_bytes: usize =
            inputs.into_iter().flatten().chain(request.variables.values()).map(request::size_of_json).sum();
        let rendered = || {
            let mut interpreter = Interpreter::new(memory_for(input_bytes), request.now_unix_s);
            interpreter.define("tools", Value::None);
            interpreter.define("documents", Value::None);
            for (name, value) in request.variables {
                interpreter.define(name, Value::from_json(value)?);
            }
            for (name, value) in ["messages", "tools", "documents"].into_iter().zip(inputs) {
                if let Some(value) = value {
                    interpreter.define(name, Value::from_json(value)?);
                }
            }
            interpreter.define("add_generation_prompt", Value::Bool(request.add_generation_prompt));
            interpreter.run(&self.body)
        };
        match rendered() {
            Ok((text, generation)) => Ok(Rendered { text, generation }),
            Err(Fault::Raised(message)) => Err(Error::TemplateRaised(message)),
            Err(Fault::Failed(message)) => Err(Error::Template(message)),
        }
    }
}

/// What all texts of one rendering may take together: templates copy what they are given, some of them often.
fn memory_for(input_bytes: usize) -> usize {
    (48_usize << 20).saturating_add(input_bytes.saturating_mul(256)).min(1 << 30)
}

/// Runs work on a thread whose stack is large enough for every template that the limits let through.
fn on_stack<T: Send>(bytes: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("chat template".to_owned())
            .stack_size(bytes)
            .spawn_scoped(scope, work)
            .map_err(|error| Error::Template(format!("cannot start a thread: {error}")))?;
        thread
            .join()
            .unwrap_or_else(|_| Err(Error::Template("the parser or interpreter panicked".to_owned())))
    })
}
