//! One JSON object a line, with memory for one line.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use super::checked::{CheckedValue, message_of};
use super::{BadRow, LONGEST_ROW_BYTES, Row, bad_row, column_of, kind_name};
use crate::{Error, Result};

pub(super) struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    line: usize,
    buffer: Vec<u8>,
}

/// How a line ended.
enum Ending {
    Newline,
    EndOfFile,
    TooLong,
    Nothing,
}

impl Lines {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let reader = BufReader::with_capacity(1 << 16, file);
        Ok(Self { path: path.to_owned(), reader, line: 0, buffer: Vec::new() })
    }

    pub(super) fn next_row(&mut self) -> Option<std::result::Result<Row, BadRow>> {
        loop {
            let ending = match self.read_line() {
                Ok(Ending::Nothing) => return None,
                Ok(ending) => ending,
                Err(source) => {
                    let error = Error::Io { action: "read", path: self.path.clone(), source };
                    return Some(Err(BadRow { recoverable: false, error }));
                }
            };
            self.line += 1;
            let mut bytes = self.buffer.as_slice();
            if matches!(ending, Ending::TooLong) {
                let limit = LONGEST_ROW_BYTES;
                let message = format!("the line is longer than {limit} bytes, the most that a row may have");
                return Some(Err(bad_row(&self.path, self.line, 1, true, &message, bytes)));
            }
            if self.line == 1 {
                bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
            }
            bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
            if bytes.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return Some(parse_line(&self.path, self.line, bytes, matches!(ending, Ending::EndOfFile)));
        }
    }

    /// Fills the buffer with the next line, without its newline; of a line that is too long it keeps the beginning
    /// and reads on to the end, so that the next line can be read.
    fn read_line(&mut self) -> std::io::Result<Ending> {
        self.buffer.clear();
        let mut too_long = false;
        let mut any = false;
        loop {
            let available = match self.reader.fill_buf() {
                Ok(available) => available,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if available.is_empty() {
                return Ok(match (any, too_long) {
                    (false, _) => Ending::Nothing,
                    (true, true) => Ending::TooLong,
                    (true, false) => Ending::EndOfFile,
                });
            }
            any = true;
            let newline = available.iter().position(|&byte| byte == b'\n');
            let taken = newline.unwrap_or(available.len());
            if self.buffer.len() + taken > LONGEST_ROW_BYTES {
                too_long = true;
                self.buffer.truncate(1024);
                self.buffer.shrink_to_fit();
            }
            if !too_long {
                self.buffer.extend_from_slice(&available[..taken]);
            } else if self.buffer.is_empty() {
                self.buffer.extend_from_slice(&available[..taken.min(1024)]);
            }
            self.reader.consume(newline.map_or(taken, |at| at + 1));
            if newline.is_some() {
                return Ok(if too_long { Ending::TooLong } else { Ending::Newline });
            }
        }
    }
}

fn parse_line(
    path: &Path,
    line: usize,
    bytes: &[u8],
    at_end_of_file: bool,
) -> std::result::Result<Row, BadRow> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let at = error.valid_up_to();
            let message = if line == 1 && (bytes.starts_with(b"\xFF\xFE") || bytes.starts_with(b"\xFE\xFF")) {
                "the file is UTF-16, rows must be UTF-8".to_owned()
            } else {
                format!("byte 0x{:02x} is not UTF-8 (is the file Latin-1?)", bytes[at])
            };
            return Err(bad_row(path, line, column_of(bytes, at), true, &message, bytes));
        }
    };
    let CheckedValue(value) = serde_json::from_str(text).map_err(|error| {
        let mut message = message_of(&error);
        if error.is_eof() {
            message = if at_end_of_file {
                "the file ends inside this row (is it truncated?)".to_owned()
            } else {
                "the line ends inside a value (a row must be on one line)".to_owned()
            };
        }
        // The position is that of the last byte read, counted from 1.
        bad_row(path, line, column_of(bytes, error.column().saturating_sub(1)), true, &message, bytes)
    })?;
    match value {
        serde_json::Value::Object(value) => Ok(Row { line, value }),
        other => {
            let message = format!("a row must be an object, this is {}", kind_name(&other));
            Err(bad_row(path, line, 1, true, &message, bytes))
        }
    }
}
