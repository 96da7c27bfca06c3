//! What the columns of a dataset mean.
//!
//! | layout | columns |
//! | --- | --- |
//! | chat | `messages`, `conversations`, `conversation` or `dialog`: each message `role` and `content`, or `from` and `value`; beside them `tools`, `system`, `chat_template_kwargs` |
//! | prompt-completion | `prompt` and `completion`, each a text or messages |
//! | instruction | `instruction` and `output` or `response`; optional `input` or `context`, `system`, `history` |
//! | turn | `question` and `answer`, `query` and `response`, `prompt` and `response`, `input` and `output`: one turn of a chat |
//! | text | `text` |

use pmetal_formats::rows::Row;
use serde_json::{Map, Value, json};

/// How many rows the layout is detected from.
pub const DETECTION_ROWS: usize = 100;

/// The meaning of a dataset's columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// Conversations in one column.
    Chat {
        /// The column of the messages.
        column: String,
    },
    /// A prompt and what follows it, as texts or as messages.
    PromptCompletion,
    /// An instruction, maybe with an input, and the answer to it.
    Instruction {
        /// The column of the answer.
        output: String,
    },
    /// A user's message and the assistant's.
    Turn {
        /// The column of the user's message.
        user: String,
        /// The column of the assistant's message.
        assistant: String,
    },
    /// Plain text.
    Text {
        /// The column of the text.
        column: String,
    },
}

/// What a row says, whatever its columns were called.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// A text of which every token is trained.
    Text(String),
    /// A text of which the second part is trained.
    Continuation {
        /// The first part.
        prompt: String,
        /// The second part.
        completion: String,
    },
    /// A conversation.
    Chat(Conversation),
}

/// Messages with what belongs to them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// Objects with `role` and `content`, and whatever else the row's messages have.
    pub messages: Vec<Value>,
    /// The tools that the assistant may call.
    pub tools: Option<Value>,
    /// Variables of the template, from the row's `chat_template_kwargs`.
    pub variables: Map<String, Value>,
    /// The first message of the completion, where the row tells prompt and completion apart.
    pub completion_start: Option<usize>,
    /// Whether the row was an instruction, which a model without a template is shown in another form.
    pub is_instruction: bool,
}

const CHAT_COLUMNS: [&str; 4] = ["messages", "conversations", "conversation", "dialog"];
const OUTPUT_COLUMNS: [&str; 2] = ["output", "response"];
const TURNS: [(&str, &str); 5] = [
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("prompt", "response"),
    ("input", "output"),
];

impl Layout {
    /// The layout of a name: `chat`, `messages`, `sharegpt`, `prompt-completion`, `instruction`, `alpaca`,
    /// `question-answer` or `text`; `None` for another name.
    pub fn parse(name: &str) -> Option<Self> {
        let chat = |column: &str| Self::Chat { column: column.to_owned() };
        Some(match name {
            "chat" | "messages" => chat("messages"),
            "sharegpt" | "conversations" => chat("conversations"),
            "prompt-completion" => Self::PromptCompletion,
            "instruction" | "alpaca" => Self::Instruction { output: "output".to_owned() },
            "question-answer" => Self::Turn { user: "question".to_owned(), assistant: "answer".to_owned() },
            "text" => Self::Text { column: "text".to_owned() },
            _ => return None,
        })
    }

    /// The layout that most of the rows fit; of several, the one that stands first in the table of this module.
    ///
    /// # Errors
    /// When no layout fits; the message names the columns that were found.
    pub fn detect(rows: &[Row]) -> Result<Self, String> {
        let mut best: Option<(usize, Self)> = None;
        for layout in Self::candidates() {
            let fitting = rows.iter().take(DETECTION_ROWS).filter(|row| layout.fits(row)).count();
            if fitting > 0 && best.as_ref().is_none_or(|(count, _)| fitting > *count) {
                best = Some((fitting, layout));
            }
        }
        if let Some((_, layout)) = best {
            return Ok(layout);
        }
        let columns: Vec<String> = rows
            .first()
            .map(|row| row.value.keys().take(20).map(|key| format!("`{key}`")).collect())
            .unwrap_or_default();
        let columns = if columns.is_empty() { "no columns".to_owned() } else { columns.join(", ") };
        if rows.first().is_some_and(|row| row.value.contains_key("chosen")) {
            return Err(format!(
                "the rows are preferences ({columns}), which supervised training cannot use"
            ));
        }
        Err(format!(
            "the columns {columns} are of no known layout: `messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, `question` and `answer`, or `text` are"
        ))
    }

    fn candidates() -> Vec<Self> {
        let mut layouts: Vec<Self> =
            CHAT_COLUMNS.iter().map(|&column| Self::Chat { column: column.to_owned() }).collect();
        layouts.push(Self::PromptCompletion);
        layouts.extend(OUTPUT_COLUMNS.iter().map(|&output| Self::Instruction { output: output.to_owned() }));
        layouts.extend(
            TURNS.iter().map(|&(user, assistant)| Self::Turn {
                user: user.to_owned(),
                assistant: assistant.to_owned(),
            }),
        );
        layouts.push(Self::Text { column: "text".to_owned() });
        layouts
    }

    fn fits(&self, row: &Row) -> bool {
        let is = |column: &str, test: fn(&Value) -> bool| row.value.get(column).is_some_and(test);
        match self {
            Self::Chat { column } => is(column, Value::is_array),
            Self::PromptCompletion => {
                let either = |value: &Value| value.is_string() || value.is_array();
                is("prompt", either) && is("completion", either)
            }
            Self::Instruction { output } => {
                is("instruction", Value::is_string) && is(output, Value::is_string)
            }
            Self::Turn { user, assistant } => is(user, Value::is_string) && is(assistant, Value::is_string),
            Self::Text { column } => is(column, Value::is_string),
        }
    }

    /// What a row says.
    ///
    /// # Errors
    /// When a column is missing or is not what the layout needs; the message names it.
    pub fn content(&self, row: &Row) -> Result<Content, String> {
        match self {
            Self::Chat { column } => {
                let listed = messages(column, needed(row, column)?)?;
                let mut conversation = conversation(row, listed)?;
                let opens_with_system =
                    conversation.messages.first().is_some_and(|first| first["role"] == "system");
                if let (Some(system), false) = (optional_text(row, "system")?, opens_with_system) {
                    conversation.messages.insert(0, message("system", system));
                }
                Ok(Content::Chat(conversation))
            }
            Self::PromptCompletion => prompt_completion(row),
            Self::Instruction { output } => instruction(row, output),
            Self::Turn { user, assistant } => {
                let mut listed: Vec<Value> = Vec::new();
                if let Some(system) = optional_text(row, "system")? {
                    listed.push(message("system", system));
                }
                listed.push(message("user", text(row, user)?));
                listed.push(message("assistant", text(row, assistant)?));
                conversation(row, listed).map(Content::Chat)
            }
            Self::Text { column } => text(row, column).map(|text| Content::Text(text.to_owned())),
        }
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Chat { column } => write!(formatter, "chat ({column})"),
            Self::PromptCompletion => formatter.write_str("prompt-completion"),
            Self::Instruction { output } => write!(formatter, "instruction (instruction, {output})"),
            Self::Turn { user, assistant } => write!(formatter, "one chat turn ({user}, {assistant})"),
            Self::Text { column } => write!(formatter, "text ({column})"),
        }
    }
}

fn needed<'a>(row: &'a Row, column: &str) -> Result<&'a Value, String> {
    match row.value.get(column) {
        Some(Value::Null) => Err(format!("the key `{column}` is null")),
        Some(value) => Ok(value),
        None => Err(format!("the key `{column}` is missing")),
    }
}

fn text<'a>(row: &'a Row, column: &str) -> Result<&'a str, String> {
    needed(row, column)?.as_str().ok_or_else(|| format!("the key `{column}` is not a text"))
}

/// A text that may be absent, null or empty.
fn optional_text<'a>(row: &'a Row, column: &str) -> Result<Option<&'a str>, String> {
    match row.value.get(column) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(_) => Err(format!("the key `{column}` is not a text")),
    }
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// A conversation of these messages with the row's tools and variables.
fn conversation(row: &Row, messages: Vec<Value>) -> Result<Conversation, String> {
    let tools = match row.value.get("tools") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) if text.is_empty() => None,
        Some(Value::String(text)) => Some(
            serde_json::from_str(text).map_err(|error| format!("the key `tools` is not JSON: {error}"))?,
        ),
        Some(tools @ Value::Array(_)) => Some(tools.clone()),
        Some(_) => return Err("the key `tools` is neither a list nor a text of JSON".to_owned()),
    };
    let variables = match row.value.get("chat_template_kwargs") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(map)) => map.clone(),
        Some(_) => return Err("the key `chat_template_kwargs` is not an object".to_owned()),
    };
    Ok(Conversation { messages, tools, variables, completion_start: None, is_instruction: false })
}

/// Messages with `role` and `content`, whatever they were called.
fn messages(column: &str, value: &Value) -> Result<Vec<Value>, String> {
    let listed = value.as_array().ok_or_else(|| format!("the key `{column}` is not a list of messages"))?;
    if listed.is_empty() {
        return Err(format!("the list `{column}` is empty"));
    }
    listed.iter().enumerate().map(|(at, value)| normalised(column, at, value)).collect()
}

fn normalised(column: &str, at: usize, value: &Value) -> Result<Value, String> {
    let name = || format!("message {} of `{column}`", at + 1);
    let map = value.as_object().ok_or_else(|| format!("{} is not an object", name()))?;
    if map.contains_key("role") {
        if !map["role"].is_string() {
            return Err(format!("{}: the key `role` is not a text", name()));
        }
        if !map.contains_key("content") && !map.contains_key("tool_calls") {
            return Err(format!("{}: the key `content` is missing", name()));
        }
        return Ok(value.clone());
    }
    let Some(from) = map.get("from") else {
        return Err(format!("{}: the key `role` (or `from`) is missing", name()));
    };
    let said = map.get("value").ok_or_else(|| format!("{}: the key `value` is missing", name()))?;
    let Some(from) = from.as_str() else { return Err(format!("{}: the key `from` is not a text", name())) };
    let role = match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "model" | "chatgpt" | "bot" => "assistant",
        "system" => "system",
        "observation" | "tool" | "function_response" | "tool_response" => "tool",
        "function_call" | "tool_call" => {
            return tool_call(map, said).map_err(|fault| format!("{}: {fault}", name()));
        }
        other => return Err(format!("{}: `from` is `{other}`, which is no known speaker", name())),
    };
    let mut normalised = Map::new();
    normalised.insert("role".to_owned(), json!(role));
    normalised.insert("content".to_owned(), said.clone());
    normalised.extend(rest_of(map));
    Ok(Value::Object(normalised))
}

fn rest_of(map: &Map<String, Value>) -> impl Iterator<Item = (String, Value)> {
    map.iter()
        .filter(|(key, _)| !matches!(key.as_str(), "from" | "value"))
        .map(|(key, value)| (key.clone(), value.clone()))
}

/// A function call that is written as JSON in the message's text.
fn tool_call(map: &Map<String, Value>, said: &Value) -> Result<Value, String> {
    let call: Value = match said {
        Value::String(text) => {
            serde_json::from_str(text).map_err(|error| format!("the function call is not JSON: {error}"))?
        }
        other => other.clone(),
    };
    let calls = if let Value::Array(calls) = call { calls } else { vec![call] };
    if calls.is_empty() || calls.iter().any(|call| !call["name"].is_string()) {
        return Err("the function call has no `name`".to_owned());
    }
    let calls: Vec<Value> =
        calls.into_iter().map(|function| json!({"type": "function", "function": function})).collect();
    let mut normalised = Map::new();
    normalised.insert("role".to_owned(), json!("assistant"));
    normalised.insert("content".to_owned(), json!(""));
    normalised.insert("tool_calls".to_owned(), Value::Array(calls));
    normalised.extend(rest_of(map));
    Ok(Value::Object(normalised))
}

fn prompt_completion(row: &Row) -> Result<Content, String> {
    let (prompt, completion) = (needed(row, "prompt")?, needed(row, "completion")?);
    if let (Value::String(prompt), Value::String(completion)) = (prompt, completion) {
        return Ok(Content::Continuation { prompt: prompt.clone(), completion: completion.clone() });
    }
    let part = |column: &str, value: &Value, role: &str| match value {
        Value::String(text) => Ok(vec![message(role, text)]),
        Value::Array(_) => messages(column, value),
        _ => Err(format!("the key `{column}` is neither a text nor a list of messages")),
    };
    let mut listed = part("prompt", prompt, "user")?;
    let completion_start = listed.len();
    listed.extend(part("completion", completion, "assistant")?);
    let mut conversation = conversation(row, listed)?;
    conversation.completion_start = Some(completion_start);
    Ok(Content::Chat(conversation))
}

fn instruction(row: &Row, output: &str) -> Result<Content, String> {
    let mut listed = Vec::new();
    if let Some(system) = optional_text(row, "system")? {
        listed.push(message("system", system));
    }
    match row.value.get("history") {
        None | Some(Value::Null) => {}
        Some(Value::Array(turns)) => {
            for turn in turns {
                let pair = turn.as_array().filter(|pair| pair.len() == 2);
                let (Some(user), Some(assistant)) =
                    (pair.and_then(|pair| pair[0].as_str()), pair.and_then(|pair| pair[1].as_str()))
                else {
                    return Err("an entry of `history` is not a pair of texts".to_owned());
                };
                listed.extend([message("user", user), message("assistant", assistant)]);
            }
        }
        Some(_) => return Err("the key `history` is not a list".to_owned()),
    }
    let asked = text(row, "instruction")?;
    let input = match optional_text(row, "input")? {
        Some(input) => Some(input),
        None => optional_text(row, "context")?,
    };
    let mut question =
        message("user", &input.map_or_else(|| asked.to_owned(), |input| format!("{asked}\n\n{input}")));
    // The layout for models without a template tells the two apart.
    question["instruction"] = json!(asked);
    question["input"] = json!(input.unwrap_or_default());
    listed.push(question);
    listed.push(message("assistant", text(row, output)?));
    let mut conversation = conversation(row, listed)?;
    conversation.is_instruction = true;
    Ok(Content::Chat(conversation))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(value: Value) -> Row {
        let Value::Object(value) = value else { panic!("not an object") };
        Row { line: 1, value }
    }

    fn chat(value: Value) -> Conversation {
        let row = row(value);
        match Layout::detect(std::slice::from_ref(&row)).unwrap().content(&row).unwrap() {
            Content::Chat(conversation) => conversation,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn layouts_are_detected() {
        for (value, description) in [
            (json!({"messages": [], "text": "x"}), "chat (messages)"),
            (json!({"conversations": []}), "chat (conversations)"),
            (json!({"prompt": "a", "completion": "b"}), "prompt-completion"),
            (json!({"instruction": "a", "input": "", "output": "b"}), "instruction (instruction, output)"),
            (
                json!({"instruction": "a", "context": "", "response": "b"}),
                "instruction (instruction, response)",
            ),
            (json!({"question": "a", "answer": "b"}), "one chat turn (question, answer)"),
            (json!({"input": "a", "output": "b"}), "one chat turn (input, output)"),
            (json!({"text": "a", "meta": 1}), "text (text)"),
        ] {
            assert_eq!(Layout::detect(&[row(value)]).unwrap().to_string(), description);
        }
    }

    #[test]
    fn detection_goes_by_most_rows() {
        let mut rows = vec![row(json!({"messages": [], "text": "a"}))];
        rows.extend((0..5).map(|_| row(json!({"text": "a"}))));
        assert_eq!(Layout::detect(&rows).unwrap().to_string(), "text (text)");
    }

    #[test]
    fn unknown_columns_and_preferences_are_refused_by_name() {
        let message = Layout::detect(&[row(json!({"body": "x", "id": 3}))]).unwrap_err();
        assert!(message.contains("`body`, `id`"), "{message}");
        let message = Layout::detect(&[row(json!({"chosen": "x", "rejected": "y"}))]).unwrap_err();
        assert!(message.contains("preferences"), "{message}");
        assert!(Layout::detect(&[row(json!({"text": 3}))]).is_err());
    }

    #[test]
    fn sharegpt_becomes_roles() {
        let conversation = chat(json!({
            "system": "be brief", "tools": "[{\"name\": \"f\"}]",
            "conversations": [
                {"from": "human", "value": "a", "weight": 0},
                {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
                {"from": "observation", "value": "b"},
                {"from": "gpt", "value": "c"},
            ],
        }));
        assert_eq!(
            conversation.messages,
            [
                json!({"role": "system", "content": "be brief"}),
                json!({"role": "user", "content": "a", "weight": 0}),
                json!({"role": "assistant", "content": "", "tool_calls":
                [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}),
                json!({"role": "tool", "content": "b"}),
                json!({"role": "assistant", "content": "c"}),
            ]
        );
        assert_eq!(conversation.tools, Some(json!([{"name": "f"}])));
    }

    #[test]
    fn instruction_with_history_becomes_a_chat() {
        let conversation = chat(json!({
            "instruction": "add", "input": "1 2", "output": "3", "system": "s", "history": [["q", "a"]],
        }));
        let said: Vec<(&str, &str)> = conversation
            .messages
            .iter()
            .map(|message| (message["role"].as_str().unwrap(), message["content"].as_str().unwrap()))
            .collect();
        assert_eq!(
            said,
            [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "add\n\n1 2"), ("assistant", "3")]
        );
        assert!(conversation.is_instruction);
    }

    #[test]
    fn prompt_and_completion_may_be_messages() {
        let conversation = chat(json!({
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        }));
        assert_eq!((conversation.messages.len(), conversation.completion_start), (2, Some(1)));
    }

    #[test]
    fn missing_keys_are_named() {
        let cases = [
            ("chat", json!({"text": "a"}), "`messages` is missing"),
            ("chat", json!({"messages": null}), "`messages` is null"),
            ("chat", json!({"messages": "x"}), "not a list"),
            ("chat", json!({"messages": []}), "is empty"),
            ("chat", json!({"messages": [{"role": "user"}]}), "message 1 of `messages`: the key `content`"),
            ("chat", json!({"messages": [{"content": "user"}]}), "`role` (or `from`) is missing"),
            ("chat", json!({"messages": [{"role": "user", "content": ""}, 7]}), "message 2"),
            ("sharegpt", json!({"conversations": [{"from": "human"}]}), "`value` is missing"),
            ("sharegpt", json!({"conversations": [{"from": "cat", "value": "x"}]}), "`cat`"),
            ("sharegpt", json!({"conversations": [{"from": "function_call", "value": "x"}]}), "not JSON"),
            ("alpaca", json!({"instruction": "a"}), "`output` is missing"),
            ("alpaca", json!({"instruction": "a", "output": "b", "history": [["a"]]}), "`history`"),
            ("alpaca", json!({"instruction": "a", "output": "b", "input": 7}), "`input`"),
            ("prompt-completion", json!({"prompt": "a"}), "`completion` is missing"),
            ("prompt-completion", json!({"prompt": 7, "completion": "b"}), "`prompt` is neither"),
            ("question-answer", json!({"question": "a", "answer": 4}), "`answer` is not a text"),
            ("text", json!({"text": null}), "`text` is null"),
            ("chat", json!({"messages": [{"role": "user", "content": ""}], "tools": 4}), "`tools`"),
        ];
        for (name, value, part) in cases {
            let message = Layout::parse(name).unwrap().content(&row(value)).unwrap_err();
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
        assert_eq!(Layout::parse("nonsense"), None);
    }
}
