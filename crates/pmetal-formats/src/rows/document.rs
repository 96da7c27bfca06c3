//! A `.json` file: an array of objects, or an object that holds one array.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, IgnoredAny};
use serde_json::Value;

use super::checked::{CheckedValue, message_of};
use super::{BadRow, LARGEST_DOCUMENT_BYTES, LONGEST_ROW_BYTES, Row, bad_row, column_of, kind_name};
use crate::{Error, Result};

/// A cursor over the text of a file, which knows the line it is on.
pub(super) struct Document {
    path: PathBuf,
    text: String,
    position: usize,
    line: usize,
    line_start: usize,
    first: bool,
    done: bool,
}

impl Document {
    /// Reads the file and finds its array; `None` when it holds one object a line.
    pub(super) fn open(path: &Path) -> Result<Option<Self>> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let mut bytes = Vec::new();
        file.take(LARGEST_DOCUMENT_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        if bytes.len() as u64 > LARGEST_DOCUMENT_BYTES {
            let message = format!(
                "the file is larger than {LARGEST_DOCUMENT_BYTES} bytes, the most that is read as one JSON value; write one object a line into a `.jsonl` file"
            );
            return Err(Error::unsupported(path, message));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            let bytes = error.as_bytes();
            let line = bytes[..at].iter().filter(|&&byte| byte == b'\n').count() + 1;
            let start = bytes[..at].iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
            let message = format!("byte 0x{:02x} is not UTF-8 (is the file Latin-1 or UTF-16?)", bytes[at]);
            bad_row(
                path,
                line,
                column_of(&bytes[start..], at - start),
                false,
                &message,
                line_at(bytes, start),
            )
            .error
        })?;
        let position = if text.starts_with('\u{feff}') { 3 } else { 0 };
        let mut document = Self {
            path: path.to_owned(),
            text,
            position,
            line: 1,
            line_start: position,
            first: true,
            done: false,
        };
        document.skip_space();
        match document.peek() {
            None => {
                document.done = true;
                Ok(Some(document))
            }
            Some(b'[') => {
                document.advance(1);
                Ok(Some(document))
            }
            Some(b'{') => document.enter_object(),
            Some(_) => Err(document.fail(false, "the file must begin with `[` or `{`").error),
        }
    }

    /// Finds the one array of the object at the cursor.
    fn enter_object(mut self) -> Result<Option<Self>> {
        let mut array: Option<(String, usize, usize, usize)> = None;
        let mut arrays = Vec::new();
        self.advance(1);
        self.skip_space();
        let mut more = self.peek() != Some(b'}');
        while more {
            let key: String = self.parse().map_err(|bad| bad.error)?;
            self.skip_space();
            self.expect(b':').map_err(|bad| bad.error)?;
            self.skip_space();
            if self.peek() == Some(b'[') {
                arrays.push(format!("`{}`", key.chars().take(80).collect::<String>()));
                array.get_or_insert((key, self.position, self.line, self.line_start));
            }
            let _: IgnoredAny = self.parse().map_err(|bad| bad.error)?;
            self.skip_space();
            more = self.peek() == Some(b',');
            if more {
                self.advance(1);
                self.skip_space();
            }
        }
        self.expect(b'}').map_err(|bad| bad.error)?;
        self.skip_space();
        match self.peek() {
            None => {}
            Some(b'{') => return Ok(None),
            Some(_) => return Err(self.fail(false, "there is text behind the end of the object").error),
        }
        if arrays.len() != 1 {
            let found = if arrays.is_empty() { "none".to_owned() } else { arrays.join(", ") };
            let message = format!(
                "the object must hold one array of rows, it holds {found}; write an array, or one object a line into a `.jsonl` file"
            );
            return Err(Error::malformed(&self.path, "", message));
        }
        if let Some((_, position, line, line_start)) = array {
            (self.position, self.line, self.line_start) = (position + 1, line, line_start);
        }
        Ok(Some(self))
    }

    pub(super) fn next_row(&mut self) -> Option<std::result::Result<Row, BadRow>> {
        if self.done {
            return None;
        }
        let row = self.next_element();
        if matches!(row, None | Some(Err(BadRow { recoverable: false, .. }))) {
            self.done = true;
        }
        row
    }

    fn next_element(&mut self) -> Option<std::result::Result<Row, BadRow>> {
        self.skip_space();
        if self.peek() == Some(b']') {
            self.advance(1);
            return self.check_end();
        }
        if !self.first {
            if let Err(bad) = self.expect(b',') {
                return Some(Err(bad));
            }
            self.skip_space();
        }
        self.first = false;
        let (line, start) = (self.line, self.position);
        let CheckedValue(value) = match self.parse() {
            Ok(value) => value,
            Err(bad) => return Some(Err(bad)),
        };
        let length = self.position - start;
        if length > LONGEST_ROW_BYTES {
            let message = format!("the row has {length} bytes, the most is {LONGEST_ROW_BYTES}");
            return Some(Err(bad_row(&self.path, line, 1, true, &message, &[])));
        }
        match value {
            Value::Object(value) => Some(Ok(Row { line, value })),
            other => {
                let message = format!("a row must be an object, this is {}", kind_name(&other));
                Some(Err(self.fail(true, &message)))
            }
        }
    }

    /// Behind the array: nothing, or the rest of the object, which was read once already.
    fn check_end(&mut self) -> Option<std::result::Result<Row, BadRow>> {
        self.skip_space();
        match self.peek() {
            None | Some(b'}' | b',') => None,
            Some(_) => Some(Err(self.fail(false, "there is text behind the end of the array"))),
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.position).copied()
    }

    /// Moves the cursor, counting the lines that are passed.
    fn advance(&mut self, bytes: usize) {
        let passed = &self.text.as_bytes()[self.position..self.position + bytes];
        if let Some(last) = passed.iter().rposition(|&byte| byte == b'\n') {
            self.line += passed.iter().filter(|&&byte| byte == b'\n').count();
            self.line_start = self.position + last + 1;
        }
        self.position += bytes;
    }

    fn skip_space(&mut self) {
        let rest = &self.text.as_bytes()[self.position..];
        let space = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count();
        self.advance(space);
    }

    fn expect(&mut self, byte: u8) -> std::result::Result<(), BadRow> {
        match self.peek() {
            Some(found) if found == byte => {
                self.advance(1);
                Ok(())
            }
            Some(_) => Err(self.fail(false, &format!("`{}` was expected here", char::from(byte)))),
            None => Err(self.fail(false, "the file ends inside its value (is it truncated?)")),
        }
    }

    /// Reads the value at the cursor and moves behind it.
    fn parse<T: for<'de> Deserialize<'de>>(&mut self) -> std::result::Result<T, BadRow> {
        let mut values = serde_json::Deserializer::from_str(&self.text[self.position..]).into_iter::<T>();
        match values.next() {
            Some(Ok(value)) => {
                let length = values.byte_offset();
                self.advance(length);
                Ok(value)
            }
            Some(Err(error)) => {
                let message = if error.is_eof() {
                    "the file ends inside its value (is it truncated?)".to_owned()
                } else {
                    message_of(&error)
                };
                // The error's lines and columns count from the cursor.
                let rest = &self.text.as_bytes()[self.position..];
                let mut starts = vec![0];
                starts.extend(
                    rest.iter()
                        .enumerate()
                        .filter(|(_, byte)| **byte == b'\n')
                        .map(|(at, _)| at + 1)
                        .take(error.line().saturating_sub(1)),
                );
                let start = starts.last().copied().unwrap_or(0);
                let offset = (start + error.column().saturating_sub(1)).min(rest.len());
                self.advance(offset);
                Err(self.fail(false, &message))
            }
            None => Err(self.fail(false, "the file ends inside its value (is it truncated?)")),
        }
    }

    fn fail(&self, recoverable: bool, message: &str) -> BadRow {
        let bytes = self.text.as_bytes();
        let column = column_of(&bytes[self.line_start..], self.position - self.line_start);
        bad_row(&self.path, self.line, column, recoverable, message, line_at(bytes, self.line_start))
    }
}

fn line_at(bytes: &[u8], start: usize) -> &[u8] {
    let rest = &bytes[start.min(bytes.len())..];
    &rest[..rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len())]
}
