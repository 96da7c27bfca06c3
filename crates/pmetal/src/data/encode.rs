//! From what a row says to token ids, and which of them are trained.
//!
//! The text is rendered and tokenised once, whole. A token is trained when its text begins inside an assistant's span;
//! a token that begins before the span and reaches into it is context, since at inference the prompt has been
//! tokenised without it. A span reaches from behind the generation prompt to the end of the turn, end token included.
//! Spans come from the template's `{% generation %}` blocks, or, where it has none, from rendering the conversation up
//! to each assistant message. Padding plays no part, so a model whose padding and end tokens are the same learns to end.

use std::ops::Range;

use pmetal_formats::chat_template::{ChatTemplate, EncodedChat, RenderRequest, encode_chat};
use pmetal_formats::tokenizer::{SpecialText, Tokenizer};
use serde_json::{Map, Value};

use super::chat::{ChatForm, ChatFormat};
use super::layout::{Content, Conversation};

/// Which tokens of a conversation are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrainOn {
    /// Every assistant message, or the completion of a prompt-completion row.
    #[default]
    Assistant,
    /// The last assistant message.
    Last,
    /// Everything.
    All,
}

/// A row as the model sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The token ids.
    pub ids: Vec<u32>,
    /// For each token, whether predicting it is trained; the first token has no predictor, so its entry is moot.
    pub trained: Vec<bool>,
    /// The line of the file on which the row began.
    pub line: usize,
}

impl Example {
    /// How many tokens are trained.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().skip(1).filter(|&&trained| trained).count()
    }
}

/// How rows become examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Which tokens of a conversation are trained.
    pub train_on: TrainOn,
    /// Whether text of messages that spells a special token becomes that token. Rows of plain text and
    /// prompt-completion rows of text always may, since that is how a rendered conversation is written down.
    pub special_text: SpecialText,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self { train_on: TrainOn::Assistant, special_text: SpecialText::Plain }
    }
}

/// What happened to a row that a user should know of, once for the dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Remarks {
    /// The template renders earlier turns differently once others follow, so only the last answer is trained.
    pub history_rewritten: bool,
    /// The template's generation prompt is not what it writes before an answer, so the context of the answer differs
    /// from the one at inference.
    pub prompt_differs: bool,
    /// The end of the prompt and the beginning of the completion are one token.
    pub boundary_merged: bool,
    /// The conversation was shown in a built-in form, because the model has no chat template.
    pub built_in_form: bool,
}

/// An encoded row.
pub(super) struct EncodedRow {
    pub(super) ids: Vec<u32>,
    pub(super) trained: Vec<bool>,
    pub(super) remarks: Remarks,
}

/// Encodes what a row says.
///
/// # Errors
/// One sentence, without the place: the template or the tokenizer fails, or no span of the assistant can be found.
pub(super) fn encode(
    format: &ChatFormat<'_>,
    content: &Content,
    options: EncodeOptions,
) -> std::result::Result<EncodedRow, String> {
    let row = match content {
        Content::Text(text) => {
            let ids = document(format.tokenizer(), text)?;
            EncodedRow { trained: vec![true; ids.len()], ids, remarks: Remarks::default() }
        }
        Content::Continuation { prompt, completion } => {
            let tokenizer = format.tokenizer();
            let ids = document(tokenizer, &format!("{prompt}{completion}"))?;
            let mut prompt_ids = tokenizer.encode_document(prompt).map_err(sentence)?;
            drop_second_beginning(tokenizer, &mut prompt_ids, None);
            // A tokenizer that ends every document would end the prompt too.
            if prompt_ids.len() > 1 && prompt_ids.last().copied() == tokenizer.eos() {
                prompt_ids.pop();
            }
            continuation(ids, &prompt_ids, options.train_on)
        }
        Content::Chat(conversation) => Renderer { format, conversation, options }.encode()?,
    };
    if row.ids.is_empty() {
        return Err("the row has no tokens".to_owned());
    }
    let built_in_form = matches!(content, Content::Chat(_)) && format.form() != ChatForm::Template;
    Ok(EncodedRow { remarks: Remarks { built_in_form, ..row.remarks }, ..row })
}

fn sentence(error: pmetal_formats::Error) -> String {
    error.to_string()
}

/// A whole document: the tokenizer's beginning token, at most one of them, and one end token.
fn document(tokenizer: &Tokenizer, text: &str) -> std::result::Result<Vec<u32>, String> {
    let mut ids = tokenizer.encode_document(text).map_err(sentence)?;
    drop_second_beginning(tokenizer, &mut ids, None);
    if let Some(eos) = tokenizer.eos()
        && (ids.last() != Some(&eos) || text.is_empty())
    {
        ids.push(eos);
    }
    Ok(ids)
}

/// Leaves one beginning token where text and tokenizer both wrote one.
pub(super) fn drop_second_beginning(
    tokenizer: &Tokenizer,
    ids: &mut Vec<u32>,
    offsets: Option<&mut Vec<(usize, usize)>>,
) {
    let Some(bos) = tokenizer.bos() else { return };
    let count = ids.iter().take_while(|&&id| id == bos).count();
    // A tokenizer whose beginning and end tokens are one may mean an empty document by two of them.
    if count > 1 && count < ids.len() {
        ids.drain(..count - 1);
        if let Some(offsets) = offsets {
            offsets.drain(..count - 1);
        }
    }
}

/// As TRL does it, the completion begins where the tokens of the prompt and of the whole part ways.
fn continuation(ids: Vec<u32>, prompt: &[u32], train_on: TrainOn) -> EncodedRow {
    let common = ids.iter().zip(prompt).take_while(|(a, b)| a == b).count();
    let trained = (0..ids.len()).map(|at| at >= common || train_on == TrainOn::All).collect();
    let remarks = Remarks { boundary_merged: common < prompt.len(), ..Remarks::default() };
    EncodedRow { ids, trained, remarks }
}

struct Renderer<'a> {
    format: &'a ChatFormat<'a>,
    conversation: &'a Conversation,
    options: EncodeOptions,
}

impl Renderer<'_> {
    fn encode(&self) -> std::result::Result<EncodedRow, String> {
        let template = self
            .format
            .template(self.conversation.is_instruction)
            .ok_or_else(|| "the model has no chat template".to_owned())?;
        let variables = self.format.variables(&self.conversation.variables);
        let all = Value::Array(self.conversation.messages.clone());
        let mut chat = self.encode_part(template, &variables, &all, false)?;
        drop_second_beginning(self.format.tokenizer(), &mut chat.ids, Some(&mut chat.offsets));
        if let Some(start) = self.conversation.completion_start {
            let prompt = Value::Array(self.conversation.messages[..start].to_vec());
            let mut prompt = self.encode_part(template, &variables, &prompt, true)?;
            drop_second_beginning(self.format.tokenizer(), &mut prompt.ids, Some(&mut prompt.offsets));
            return Ok(continuation(chat.ids, &prompt.ids, self.options.train_on));
        }
        if self.options.train_on == TrainOn::All {
            return Ok(EncodedRow {
                trained: vec![true; chat.ids.len()],
                ids: chat.ids,
                remarks: Remarks::default(),
            });
        }
        let mut remarks = Remarks::default();
        let render = |messages: &[Value], prompt: bool| {
            let messages = Value::Array(messages.to_vec());
            template.render(&self.request(&messages, &variables, prompt)).ok().map(|rendered| rendered.text)
        };
        let turns = Turns { messages: &self.conversation.messages, full: &chat.text, render: &render };
        let spans = if chat.generation.is_empty() {
            turns.by_prefixes(self.options.train_on, &mut remarks)?
        } else {
            turns.by_blocks(self.options.train_on, &chat, self.format.tokenizer())?
        };
        let trained =
            chat.offsets.iter().map(|(start, _)| spans.iter().any(|span| span.contains(start))).collect();
        Ok(EncodedRow { ids: chat.ids, trained, remarks })
    }

    fn request<'r>(
        &'r self,
        messages: &'r Value,
        variables: &'r Map<String, Value>,
        prompt: bool,
    ) -> RenderRequest<'r> {
        RenderRequest {
            messages,
            tools: self.conversation.tools.as_ref(),
            documents: None,
            add_generation_prompt: prompt,
            continue_final_message: false,
            variables,
            now_unix_s: self.format.now_unix_s(),
        }
    }

    fn encode_part(
        &self,
        template: &ChatTemplate,
        variables: &Map<String, Value>,
        messages: &Value,
        prompt: bool,
    ) -> std::result::Result<EncodedChat, String> {
        let request = self.request(messages, variables, prompt);
        encode_chat(self.format.tokenizer(), template, &request, self.options.special_text).map_err(sentence)
    }
}

/// A conversation's assistant messages and where they are in its text.
struct Turns<'a> {
    messages: &'a [Value],
    full: &'a str,
    /// The text of some messages, with or without a generation prompt; `None` when the template refuses them.
    render: &'a dyn Fn(&[Value], bool) -> Option<String>,
}

impl Turns<'_> {
    fn assistants(&self) -> Vec<usize> {
        let is_assistant = |message: &Value| matches!(message["role"].as_str(), Some("assistant" | "model"));
        (0..self.messages.len()).filter(|&at| is_assistant(&self.messages[at])).collect()
    }

    /// Whether the message's own `weight` or `train` says that it is trained.
    fn is_wanted(&self, at: usize) -> std::result::Result<bool, String> {
        let message = &self.messages[at];
        let by_weight = match &message["weight"] {
            Value::Null => true,
            Value::Number(number) if number.as_f64() == Some(0.0) => false,
            Value::Number(number) if number.as_f64() == Some(1.0) => true,
            other => return Err(format!("message {}: `weight` is {other}, only 0 and 1 are known", at + 1)),
        };
        match &message["train"] {
            Value::Null => Ok(by_weight),
            Value::Bool(train) => Ok(by_weight && *train),
            other => Err(format!("message {}: `train` is {other}, only true and false are known", at + 1)),
        }
    }

    fn by_blocks(
        &self,
        train_on: TrainOn,
        chat: &EncodedChat,
        tokenizer: &Tokenizer,
    ) -> std::result::Result<Vec<Range<usize>>, String> {
        let assistants = self.assistants();
        let mut blocks = chat.generation.clone();
        let paired = blocks.len() == assistants.len();
        for (at, block) in blocks.iter_mut().enumerate() {
            if let Some(end) = end_token_behind(block, chat, tokenizer) {
                let turn_end = assistants.get(at).filter(|_| paired).and_then(|&message| self.end(message));
                if turn_end.is_some_and(|turn_end| end <= turn_end) {
                    block.end = end;
                }
            }
        }
        let mut wanted = Vec::new();
        for &message in &assistants {
            wanted.push(self.is_wanted(message)?);
        }
        if wanted.contains(&false) && !paired {
            return Err(format!(
                "messages have weights, but the template marks {} answers and there are {}",
                blocks.len(),
                assistants.len()
            ));
        }
        let last = blocks.len() - 1;
        let kept = blocks
            .into_iter()
            .enumerate()
            .filter(|(at, _)| (train_on != TrainOn::Last || *at == last) && (!paired || wanted[*at]));
        Ok(kept.map(|(_, block)| block).collect())
    }

    fn by_prefixes(
        &self,
        train_on: TrainOn,
        remarks: &mut Remarks,
    ) -> std::result::Result<Vec<Range<usize>>, String> {
        let mut assistants = self.assistants();
        let Some(&last) = assistants.last() else { return Ok(Vec::new()) };
        if train_on == TrainOn::Last {
            assistants = vec![last];
        }
        let mut spans = Vec::new();
        for &message in &assistants {
            // A message without weight is looked at all the same: it must not hide that history is rewritten.
            if let Some(span) = self.span(message, remarks) {
                spans.extend(self.is_wanted(message)?.then_some(span));
                continue;
            }
            let of_last = if message == last { None } else { self.span(last, remarks) };
            let Some(span) = of_last else {
                return Err(format!(
                    "the chat template does not render the messages up to message {} as the beginning of the whole, so the answer cannot be found in the text; use a template with `{{% generation %}}` blocks, or train on all",
                    last + 1
                ));
            };
            remarks.history_rewritten = true;
            return Ok(if self.is_wanted(last)? { vec![span] } else { Vec::new() });
        }
        Ok(spans)
    }

    /// Where the answer of a message is in the whole text, `None` when the template writes it differently there.
    fn span(&self, message: usize, remarks: &mut Remarks) -> Option<Range<usize>> {
        let before = &self.messages[..message];
        let prompt = (self.render)(before, true)?;
        let start = if self.full.starts_with(&prompt) {
            prompt.len()
        } else {
            let plain = (self.render)(before, false)?;
            let common = common_prefix(self.full, &prompt);
            if !self.full.starts_with(&plain) || common < plain.len() {
                return None;
            }
            remarks.prompt_differs = true;
            common
        };
        let end = self.end(message)?;
        (start < end).then_some(start..end)
    }

    /// The end of a message's turn in the whole text.
    fn end(&self, message: usize) -> Option<usize> {
        if message + 1 == self.messages.len() {
            return Some(self.full.len());
        }
        let text = (self.render)(&self.messages[..=message], false)?;
        self.full.starts_with(&text).then_some(text.len())
    }
}

/// The length of the common beginning of two texts, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y).map_or(a.len().min(b.len()), |((at, _), _)| at)
}

/// The end of the special token right behind a block whose own end has none: some templates close the block too early.
fn end_token_behind(block: &Range<usize>, chat: &EncodedChat, tokenizer: &Tokenizer) -> Option<usize> {
    let next = chat.offsets.iter().position(|(start, end)| *start >= block.end && end > start)?;
    let tail = chat.ids[next.saturating_sub(2)..next].iter().zip(&chat.offsets[next.saturating_sub(2)..next]);
    let has_special = tail.clone().any(|(&id, (start, _))| block.contains(start) && tokenizer.is_special(id));
    let (start, end) = chat.offsets[next];
    (!has_special && start == block.end && tokenizer.is_special(chat.ids[next])).then_some(end)
}
