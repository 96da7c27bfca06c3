//! What `transformers` does to a conversation before and after the template sees it.

use serde_json::{Map, Value as Json};

use super::value::is_space;
use super::{RenderRequest, Rendered};
use crate::{Error, Result};

/// Stands at the end of the message that is continued, so that its end is found in the text.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Messages as the template sees them.
pub(super) struct Prepared {
    pub(super) messages: Json,
    /// The text of the message that is continued.
    continued: Option<String>,
}

/// Drops null fields, names the reasoning twice, and marks the end of the message to continue.
pub(super) fn prepare(request: &RenderRequest<'_>, source: &str) -> Result<Prepared> {
    let refuse = |message: String| Err(Error::Template(message));
    let Json::Array(given) = request.messages else {
        return refuse("the messages are not a list".to_owned());
    };
    if given.is_empty() {
        return refuse("the conversation has no messages".to_owned());
    }
    let mut messages = Vec::with_capacity(given.len());
    for (at, message) in given.iter().enumerate() {
        let Json::Object(message) = message else {
            return refuse(format!("message {at} is not a mapping"));
        };
        messages.push(with_reasoning(message));
    }
    for (name, list) in [("tool", request.tools), ("document", request.documents)] {
        let Some(list) = list.filter(|list| !list.is_null()) else { continue };
        let Json::Array(items) = list else { return refuse(format!("the {name}s are not a list")) };
        if let Some(at) = items.iter().position(|item| !item.is_object()) {
            return refuse(format!("{name} {at} is not a mapping"));
        }
    }
    let mut continued = None;
    if request.continue_final_message {
        if request.add_generation_prompt {
            return refuse("a message cannot be continued and a new one begun at the same time".to_owned());
        }
        if !source.contains("content") {
            return refuse("the template never looks at the `content` of the message to continue".to_owned());
        }
        continued = messages.last_mut().map(mark_end).transpose()?;
    }
    Ok(Prepared { messages: Json::Array(messages.into_iter().map(Json::Object).collect()), continued })
}

fn with_reasoning(message: &Map<String, Json>) -> Map<String, Json> {
    let kept = || {
        message.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone()))
    };
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|name| message.get(*name).filter(|v| !v.is_null()));
    let mut fields = Map::new();
    if let Some(reasoning) = reasoning {
        fields.insert("thinking".to_owned(), reasoning.clone());
    }
    fields.extend(kept());
    if let Some(reasoning) = reasoning {
        fields.insert("reasoning_content".to_owned(), reasoning.clone());
    }
    fields
}

fn mark_end(message: &mut Map<String, Json>) -> Result<String> {
    let text = match message.get_mut("content") {
        Some(Json::String(text)) => Some(text),
        Some(Json::Array(parts)) => {
            parts.iter_mut().rev().find_map(|part| part.get_mut("text")).and_then(|text| match text {
                Json::String(text) => Some(text),
                _ => None,
            })
        }
        _ => None,
    };
    let Some(text) = text else {
        return Err(Error::Template("the final message has no text to continue".to_owned()));
    };
    let continued = text.clone();
    text.push_str(CONTINUE_TAG);
    Ok(continued)
}

/// Cuts the text at the end of the message that is continued.
pub(super) fn finish(
    request: &RenderRequest<'_>,
    prepared: &Prepared,
    mut rendered: Rendered,
) -> Result<Rendered> {
    let Some(continued) = prepared.continued.as_ref().filter(|_| request.continue_final_message) else {
        return Ok(rendered);
    };
    let text = &rendered.text;
    let Some(end) =
        text.rfind(CONTINUE_TAG.trim_end()).filter(|_| text.contains(continued.trim_matches(is_space)))
    else {
        return Err(Error::Template(
            "the template leaves out or changes the final message to continue".to_owned(),
        ));
    };
    let cut = if text[end..].starts_with(CONTINUE_TAG) {
        end
    } else {
        // The template trims messages, so what stood before the tag is trimmed too.
        text[..end].trim_end_matches(is_space).len()
    };
    rendered.text.truncate(cut);
    rendered.generation.retain_mut(|range| {
        range.end = range.end.min(cut);
        range.start < range.end
    });
    Ok(rendered)
}

/// About how many bytes a value's texts take.
pub(super) fn size_of_json(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len() + 16,
        Json::Array(items) => 16 + items.iter().map(size_of_json).sum::<usize>(),
        Json::Object(map) => {
            16 + map.iter().map(|(key, value)| key.len() + size_of_json(value)).sum::<usize>()
        }
        _ => 16,
    }
}
