//! Conversations to ids, with special tokens in the messages kept as ordinary text.
//!
//! A mark, a private-use character that occurs nowhere else, is put into every special token that a message spells.
//! The template carries the marks to where the text ends up; the tokenizer finds no special token across a mark and
//! drops it before it splits the text into words. So the ids are those of the same text with nothing special in it.

use std::collections::BTreeSet;
use std::ops::Range;

use serde_json::Value as Json;

use super::{ChatTemplate, RenderRequest, Rendered};
use crate::tokenizer::{SpecialText, Tokenizer};
use crate::{Error, Result};

/// A conversation as text and ids.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EncodedChat {
    /// The rendered text.
    pub text: String,
    /// The token ids of the text.
    pub ids: Vec<u32>,
    /// Byte ranges `(start, end)` of the text, one for each id.
    pub offsets: Vec<(usize, usize)>,
    /// Byte ranges of the text inside `{% generation %}` blocks.
    pub generation: Vec<Range<usize>>,
}

/// Renders and encodes a conversation.
///
/// With [`SpecialText::Plain`], text of the messages, tools and documents that spells a special token is encoded as
/// ordinary text, while the special tokens that the template writes stay special. Where the template itself looks for
/// a special token in a message (as for the end of the reasoning) and would write another text without it, that token
/// stays special in that message. Special tokens of a single character are not kept apart.
///
/// # Errors
/// When the template or the tokenizer fails.
pub fn encode_chat(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    request: &RenderRequest<'_>,
    special: SpecialText,
) -> Result<EncodedChat> {
    let rendered = template.render(request)?;
    let marks = match special {
        SpecialText::Parse => None,
        SpecialText::Plain => Marks::find(tokenizer, request, &rendered.text),
    };
    let encoded = match marks {
        None => tokenizer.encode_with_offsets(&rendered.text, SpecialText::Parse)?,
        Some(mut marks) => {
            let marked = marks.render(template, request, &rendered.text)?;
            tokenizer.encode_marked(&marked, SpecialText::Parse, Some(marks.mark))?
        }
    };
    let Rendered { text, generation } = rendered;
    Ok(EncodedChat { text, ids: encoded.ids, offsets: encoded.offsets, generation })
}

/// What is marked: a text of the request, by its place among all texts, and a special token in it.
struct Marks {
    mark: char,
    specials: Vec<String>,
    chosen: BTreeSet<(usize, usize)>,
}

impl Marks {
    /// The special tokens that the request spells, or `None` when it spells none.
    fn find(tokenizer: &Tokenizer, request: &RenderRequest<'_>, text: &str) -> Option<Self> {
        let mut specials: Vec<String> = tokenizer
            .special_texts()
            .filter(|text| text.chars().nth(1).is_some())
            .map(str::to_owned)
            .collect();
        specials.sort();
        let mut texts = Vec::new();
        for value in [Some(request.messages), request.tools, request.documents].into_iter().flatten() {
            collect_texts(value, &mut texts);
        }
        let mut chosen = BTreeSet::new();
        for (leaf, text) in texts.iter().enumerate() {
            for (at, special) in specials.iter().enumerate() {
                if text.contains(special.as_str()) {
                    chosen.insert((leaf, at));
                }
            }
        }
        let is_free = |mark: &char| !text.contains(*mark) && !texts.iter().any(|text| text.contains(*mark));
        let mark = ('\u{e000}'..='\u{f8ff}').rev().find(is_free)?;
        (!chosen.is_empty()).then_some(Self { mark, specials, chosen })
    }

    /// The text with marks in it; without them it is `plain`.
    fn render(
        &mut self,
        template: &ChatTemplate,
        request: &RenderRequest<'_>,
        plain: &str,
    ) -> Result<String> {
        if let Some(text) = self.render_chosen(&self.chosen, template, request, plain) {
            return Ok(text);
        }
        let mut harmless = BTreeSet::new();
        for unit in &self.chosen {
            if self.render_chosen(&BTreeSet::from([*unit]), template, request, plain).is_some() {
                harmless.insert(*unit);
            }
        }
        self.chosen = harmless;
        self.render_chosen(&self.chosen, template, request, plain).ok_or_else(|| {
            Error::Template("special tokens in the messages change what the template writes".to_owned())
        })
    }

    fn render_chosen(
        &self,
        chosen: &BTreeSet<(usize, usize)>,
        template: &ChatTemplate,
        request: &RenderRequest<'_>,
        plain: &str,
    ) -> Option<String> {
        let mut leaf = 0;
        let mut marked = |value: &Json| {
            let mut value = value.clone();
            self.mark_texts(&mut value, chosen, &mut leaf);
            value
        };
        let messages = marked(request.messages);
        let tools = request.tools.map(&mut marked);
        let documents = request.documents.map(&mut marked);
        let request = RenderRequest {
            messages: &messages,
            tools: tools.as_ref(),
            documents: documents.as_ref(),
            ..*request
        };
        let text = template.render(&request).ok()?.text;
        (text.replace(self.mark, "") == plain).then_some(text)
    }

    fn mark_texts(&self, value: &mut Json, chosen: &BTreeSet<(usize, usize)>, leaf: &mut usize) {
        match value {
            Json::String(text) => {
                let mut places = BTreeSet::new();
                for (_, at) in chosen.range((*leaf, 0)..(*leaf + 1, 0)) {
                    places.extend(places_of(text, &self.specials[*at]));
                }
                for place in places.into_iter().rev() {
                    text.insert(place, self.mark);
                }
                *leaf += 1;
            }
            Json::Array(items) => items.iter_mut().for_each(|item| self.mark_texts(item, chosen, leaf)),
            Json::Object(map) => map.values_mut().for_each(|value| self.mark_texts(value, chosen, leaf)),
            _ => {}
        }
    }
}

/// Behind the first character of every occurrence, overlapping ones included.
fn places_of(text: &str, special: &str) -> Vec<usize> {
    let width = special.chars().next().map_or(1, char::len_utf8);
    let mut places = Vec::new();
    let mut from = 0;
    while let Some(found) = text[from..].find(special) {
        from += found + width;
        places.push(from);
    }
    places
}

/// All texts of a value, in the order of [`Marks::mark_texts`].
fn collect_texts<'a>(value: &'a Json, texts: &mut Vec<&'a str>) {
    match value {
        Json::String(text) => texts.push(text),
        Json::Array(items) => items.iter().for_each(|item| collect_texts(item, texts)),
        Json::Object(map) => map.values().for_each(|value| collect_texts(value, texts)),
        _ => {}
    }
}
