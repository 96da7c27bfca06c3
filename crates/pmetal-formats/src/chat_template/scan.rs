//! What is checked and rewritten in a template's source before it is parsed.

use crate::{Error, Result};

/// The longest template that is read.
pub(super) const MAX_SOURCE_BYTES: usize = 256 * 1024;
/// The most words and signs in one tag; published templates stay below 600.
const MAX_TAG_TOKENS: usize = 4_000;
/// The most `elif` branches in a template; the parser recurses over them.
const MAX_BRANCHES: usize = 1_000;

/// The name of the function that stands for `{% generation %}` blocks.
pub(super) const GENERATION: &str = "__generation_block";

/// Checks the limits, and turns `{% generation %}` blocks into calls of [`GENERATION`].
///
/// `transformers` parses the tag into a call block as well, so white space is treated alike.
pub(super) fn prepare(source: &str) -> Result<String> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(Error::Template(format!(
            "the template has {} bytes, at most {MAX_SOURCE_BYTES} are read",
            source.len()
        )));
    }
    // Jinja reads every line end as a line feed.
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source.as_str();
    let mut branches = 0;
    while let Some(start) = find_tag(rest) {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        if tag.starts_with("{#") {
            let end = tag.find("#}").map_or(tag.len(), |end| end + 2);
            out.push_str(&tag[..end]);
            rest = &tag[end..];
            continue;
        }
        let end = tag_end(tag)?;
        let (tag, after) = tag.split_at(end);
        rest = after;
        match tag_word(tag) {
            Some("raw") => {
                let end = raw_end(rest);
                out.push_str(tag);
                out.push_str(&rest[..end]);
                rest = &rest[end..];
            }
            Some("generation") => {
                out.push_str(&tag.replacen("generation", &format!("call {GENERATION}()"), 1));
            }
            Some("endgeneration") => out.push_str(&tag.replacen("endgeneration", "endcall", 1)),
            word => {
                if word == Some("elif") {
                    branches += 1;
                }
                out.push_str(tag);
            }
        }
    }
    if branches > MAX_BRANCHES {
        return Err(Error::Template(format!(
            "the template has {branches} `elif` branches, at most {MAX_BRANCHES} are read"
        )));
    }
    out.push_str(rest);
    Ok(out)
}

fn find_tag(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    (0..bytes.len().saturating_sub(1))
        .find(|&at| bytes[at] == b'{' && matches!(bytes[at + 1], b'{' | b'%' | b'#'))
}

/// The end of the tag that `text` begins with: closing signs inside strings do not count.
fn tag_end(text: &str) -> Result<usize> {
    let bytes = text.as_bytes();
    let close: &[u8] = if bytes[1] == b'%' { b"%}" } else { b"}}" };
    let mut at = 2;
    let mut tokens = 0;
    let mut braces = 0_usize;
    let mut in_word = false;
    while at < bytes.len() {
        let byte = bytes[at];
        if braces == 0 && bytes[at..].starts_with(close) {
            return Ok(at + 2);
        }
        let is_word = byte == b'_' || byte.is_ascii_alphanumeric();
        if !(byte.is_ascii_whitespace() || is_word && in_word) {
            tokens += 1;
        }
        in_word = is_word;
        match byte {
            b'\'' | b'"' => at = string_end(bytes, at),
            b'{' => braces += 1,
            b'}' => braces = braces.saturating_sub(1),
            _ => {}
        }
        if tokens > MAX_TAG_TOKENS {
            return Err(Error::Template(format!("a tag has more than {MAX_TAG_TOKENS} words and signs")));
        }
        at += 1;
    }
    Ok(bytes.len())
}

/// The place of the quote that ends the string which begins at `start`.
fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != bytes[start] {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    at
}

/// The first word of a block tag.
fn tag_word(tag: &str) -> Option<&str> {
    let inner = tag.strip_prefix("{%")?.trim_start_matches(['-', '+']).trim_start();
    let end = inner.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(inner.len());
    Some(&inner[..end])
}

/// Where the `{% endraw %}` tag begins.
fn raw_end(text: &str) -> usize {
    let mut from = 0;
    while let Some(found) = text[from..].find("{%") {
        let at = from + found;
        if tag_word(&text[at..]) == Some("endraw") {
            return at;
        }
        from = at + 2;
    }
    text.len()
}
