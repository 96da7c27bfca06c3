//! The form in which conversations are shown to a model: its own template, or a plain one where it has none.

use pmetal_formats::chat_template::{ChatTemplate, EncodedChat, RenderRequest, encode_chat};
use pmetal_formats::tokenizer::{SpecialText, Tokenizer};
use serde_json::{Map, Value};

use crate::error::Result;

/// ChatML, for models whose tokenizer has its marks.
const CHATML: &str = "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}\
{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}\
{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Speakers by name, the end token behind each answer.
const PLAIN: &str = "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{{ 'Assistant:' }}\
{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}{{ '\n' }}\
{% elif message.role == 'system' %}{{ message.content + '\n' }}\
{% elif message.role == 'user' %}{{ 'User: ' + message.content + '\n' }}\
{% else %}{{ message.role + ': ' + message.content + '\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}";

/// The prompt of Stanford's Alpaca, which instruction data of this shape was made for.
const ALPACA: &str = "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}\
{% generation %}{{ message.content + eos_token }}{% endgeneration %}{{ '\n\n' if not loop.last else '' }}\
{% elif message.role == 'system' %}{{ message.content + '\n\n' }}\
{% elif message.input %}{{ 'Below is an instruction that describes a task, paired with an input that provides further \
context. Write a response that appropriately completes the request.\n\n### Instruction:\n' + message.instruction + \
'\n\n### Input:\n' + message.input + '\n\n### Response:\n' }}\
{% else %}{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\
\n\n### Instruction:\n' + (message.instruction or message.content) + '\n\n### Response:\n' }}{% endif %}{% endfor %}";

/// Which form is used, for a line to the user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatForm {
    /// The model's template.
    Template,
    /// ChatML, because the model has no template but the tokens of one.
    ChatMl,
    /// `User:` and `Assistant:`.
    Plain,
}

/// Renders and encodes conversations for one model.
pub struct ChatFormat<'a> {
    tokenizer: &'a Tokenizer,
    given: Option<&'a ChatTemplate>,
    fallback: Option<ChatTemplate>,
    alpaca: Option<ChatTemplate>,
    form: ChatForm,
    variables: Map<String, Value>,
    now_unix_s: i64,
}

impl<'a> ChatFormat<'a> {
    /// The format of a model: `template` is its own, if it has one.
    ///
    /// `variables` are handed to the template beside `bos_token`, `eos_token`, `pad_token` and `unk_token`;
    /// `now_unix_s` is the moment that a template prints as today.
    ///
    /// # Errors
    /// When a built-in template does not compile, which does not happen; what the tokenizer returns.
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        variables: &Map<String, Value>,
        now_unix_s: i64,
    ) -> Result<Self> {
        let mut all = Map::new();
        let special = [
            ("bos_token", tokenizer.bos_text()),
            ("eos_token", tokenizer.eos_text()),
            ("pad_token", tokenizer.pad_text()),
            ("unk_token", tokenizer.unknown_text()),
        ];
        for (name, text) in special {
            if let Some(text) = text {
                all.insert(name.to_owned(), Value::from(text));
            }
        }
        let has_chatml = ["<|im_start|>", "<|im_end|>"].iter().all(|mark| tokenizer.token_id(mark).is_some());
        let (form, fallback, alpaca) = match template {
            Some(_) => (ChatForm::Template, None, None),
            None => {
                // The built-in templates write the beginning token only where the tokenizer itself puts one.
                if tokenizer.bos().is_none()
                    || tokenizer.encode_document("a")?.first().copied() != tokenizer.bos()
                {
                    all.insert("bos_token".to_owned(), Value::from(""));
                }
                all.entry("eos_token").or_insert_with(|| Value::from(""));
                let (form, source) =
                    if has_chatml { (ChatForm::ChatMl, CHATML) } else { (ChatForm::Plain, PLAIN) };
                (form, Some(ChatTemplate::compile(source)?), Some(ChatTemplate::compile(ALPACA)?))
            }
        };
        all.extend(variables.clone());
        Ok(Self { tokenizer, given: template, fallback, alpaca, form, variables: all, now_unix_s })
    }

    /// Which form conversations have.
    pub fn form(&self) -> ChatForm {
        self.form
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer
    }

    /// What the user should know when the model has no template of its own; `instructions` for instruction data.
    pub fn note(&self, instructions: bool) -> Option<String> {
        let ends = match self.tokenizer.eos_text() {
            Some(text) => format!("`{text}`"),
            None => "nothing, because the tokenizer has no end token".to_owned(),
        };
        match self.form {
            ChatForm::Template => None,
            _ if instructions => Some(format!(
                "the model has no chat template: instructions are shown as the Alpaca prompt, answers end with {ends}"
            )),
            ChatForm::ChatMl => Some(
                "the model has no chat template: conversations are shown as ChatML, whose tokens it has"
                    .to_owned(),
            ),
            ChatForm::Plain => Some(format!(
                "the model has no chat template: conversations are shown as `User: ...` and `Assistant: ...`, answers end with {ends}"
            )),
        }
    }

    /// The template for a conversation of this kind.
    pub(super) fn template(&self, is_instruction: bool) -> Option<&ChatTemplate> {
        self.given.or(if is_instruction { self.alpaca.as_ref() } else { self.fallback.as_ref() })
    }

    /// The variables of a row: the model's, and over them the row's own.
    pub(super) fn variables(&self, of_row: &Map<String, Value>) -> Map<String, Value> {
        let mut variables = self.variables.clone();
        variables.extend(of_row.clone());
        variables
    }

    pub(super) fn now_unix_s(&self) -> i64 {
        self.now_unix_s
    }

    /// The text and ids after which the model should answer `messages`, an array of objects with `role` and
    /// `content`; text of the messages that spells a special token is ordinary text.
    ///
    /// # Errors
    /// When the template refuses the messages, or the tokenizer fails.
    pub fn prompt(&self, messages: &Value, tools: Option<&Value>) -> Result<EncodedChat> {
        let Some(template) = self.template(false) else { return Ok(EncodedChat::default()) };
        let request = RenderRequest {
            messages,
            tools,
            documents: None,
            add_generation_prompt: true,
            continue_final_message: false,
            variables: &self.variables,
            now_unix_s: self.now_unix_s,
        };
        let mut encoded = encode_chat(self.tokenizer, template, &request, SpecialText::Plain)?;
        super::encode::drop_second_beginning(self.tokenizer, &mut encoded.ids, Some(&mut encoded.offsets));
        Ok(encoded)
    }
}
