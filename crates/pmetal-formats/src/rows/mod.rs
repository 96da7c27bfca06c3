//! Datasets of JSON rows: `.jsonl` and `.ndjson` line by line, `.json` as one array.
//!
//! Every byte is checked. What JSON does not allow (`NaN`, a lone surrogate, a raw NUL, Latin-1) and what it allows
//! but nobody means (a key given twice) is refused with the line, the column and the beginning of that line.

mod checked;
mod document;
mod files;
mod lines;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, Result};

pub(crate) use checked::parse_checked;
pub use files::DatasetFiles;

/// The longest line, or the longest element of an array, that is read: 64 MiB.
pub const LONGEST_ROW_BYTES: usize = 64 << 20;
/// The largest `.json` file that is read; its bytes are held in memory, unlike those of `.jsonl`: 4 GiB.
pub const LARGEST_DOCUMENT_BYTES: u64 = 4 << 30;
/// How many messages about skipped rows are kept.
pub const KEPT_MESSAGES: usize = 20;

/// One row of a dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The line of the file on which the row begins, counted from 1.
    pub line: usize,
    /// The columns, in the order of the file.
    pub value: Map<String, Value>,
}

/// What happens to a row that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnBadRow {
    /// Reading ends with an error.
    #[default]
    Error,
    /// The row is left out and counted.
    Skip,
}

/// The rows that were left out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Skipped {
    /// How many.
    pub count: usize,
    /// What was wrong with the first [`KEPT_MESSAGES`] of them.
    pub messages: Vec<String>,
}

impl Skipped {
    /// Counts one row, and keeps its message while there is room.
    pub fn add(&mut self, message: impl Into<String>) {
        self.count += 1;
        if self.messages.len() < KEPT_MESSAGES {
            self.messages.push(message.into());
        }
    }
}

/// A bad row: whether reading can go on behind it, and why it was refused.
struct BadRow {
    recoverable: bool,
    error: Error,
}

enum Source {
    Lines(lines::Lines),
    Document(document::Document),
}

/// The rows of one file, in its order.
///
/// `.jsonl` and `.ndjson` are streamed: memory holds one line. `.json` is held whole, as bytes; a `.json` file that
/// holds one object a line is read as lines. After an error the iterator is at its end.
pub struct Rows {
    source: Source,
    on_bad_row: OnBadRow,
    skipped: Skipped,
    rows_seen: usize,
    ended: bool,
    path: PathBuf,
}

impl Rows {
    /// Opens a file whose bad rows are errors.
    ///
    /// # Errors
    /// When the file cannot be read, or is of a kind that is not read.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, OnBadRow::Error)
    }

    /// Opens a file.
    ///
    /// With [`OnBadRow::Skip`], a line that is not a JSON object is left out and counted. An array whose syntax is
    /// broken stays an error, because nothing tells where the next element begins.
    ///
    /// # Errors
    /// When the file cannot be read, or is of a kind that is not read.
    pub fn open_with(path: &Path, on_bad_row: OnBadRow) -> Result<Self> {
        let kind = files::kind_of(path)?;
        let source = match kind {
            files::Kind::Lines => Source::Lines(lines::Lines::open(path)?),
            files::Kind::Document => match document::Document::open(path)? {
                Some(document) => Source::Document(document),
                None => Source::Lines(lines::Lines::open(path)?),
            },
        };
        Ok(Self {
            source,
            on_bad_row,
            skipped: Skipped::default(),
            rows_seen: 0,
            ended: false,
            path: path.to_owned(),
        })
    }

    /// The rows left out so far.
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    fn next_of_source(&mut self) -> Option<std::result::Result<Row, BadRow>> {
        match &mut self.source {
            Source::Lines(lines) => lines.next_row(),
            Source::Document(document) => document.next_row(),
        }
    }
}

impl Iterator for Rows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        while !self.ended {
            match self.next_of_source() {
                Some(Ok(row)) => {
                    self.rows_seen += 1;
                    return Some(Ok(row));
                }
                Some(Err(bad)) => {
                    self.rows_seen += 1;
                    if bad.recoverable && self.on_bad_row == OnBadRow::Skip {
                        self.skipped.add(bad.error.to_string());
                    } else {
                        self.ended = true;
                        return Some(Err(bad.error));
                    }
                }
                None => {
                    self.ended = true;
                    if self.rows_seen == 0 {
                        return Some(Err(Error::malformed(&self.path, "", "the file holds no rows")));
                    }
                }
            }
        }
        None
    }
}

/// The beginning of a line for an error message: 80 characters, control characters spelled out.
fn excerpt(bytes: &[u8]) -> String {
    // Eighty characters have at most 320 bytes; a line can have millions.
    let head = String::from_utf8_lossy(&bytes[..bytes.len().min(400)]);
    let mut text: String = head.chars().take(80).flat_map(escape_control).collect();
    if head.chars().nth(80).is_some() || bytes.len() > 400 {
        text.push_str("...");
    }
    text
}

fn escape_control(character: char) -> Box<dyn Iterator<Item = char>> {
    if character.is_control() {
        Box::new(character.escape_default())
    } else {
        Box::new(std::iter::once(character))
    }
}

fn bad_row(
    path: &Path,
    line: usize,
    column: usize,
    recoverable: bool,
    message: &str,
    line_bytes: &[u8],
) -> BadRow {
    let place = format!("line {line}, column {column}");
    let message = if line_bytes.is_empty() {
        message.to_owned()
    } else {
        format!("{message}; the line begins `{}`", excerpt(line_bytes))
    };
    BadRow { recoverable, error: Error::malformed(path, place, message) }
}

/// The column, counted in characters from 1, of the byte at `offset`.
fn column_of(line: &[u8], offset: usize) -> usize {
    String::from_utf8_lossy(&line[..offset.min(line.len())]).chars().count() + 1
}

fn kind_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
