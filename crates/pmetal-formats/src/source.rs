//! An open file of which ranges are read by position, never through a memory map.
//!
//! A map of a file that another program shortens kills the process on access; a positioned read gives an error.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::{Error, Result, TensorInfo};

/// A regular file and the length it had when it was opened.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    pub(crate) length: u64,
}

impl Source {
    /// Opens a regular file; folders, pipes and devices are refused before they can block.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let kind = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if !kind.is_file() {
            return Err(Error::unsupported(path, "this is not a regular file"));
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        let length = file.metadata().map_err(Error::io("read the length of", path))?.len();
        Ok(Self { file, path: path.to_path_buf(), length })
    }

    /// Fills `out` from the byte at `offset` on; `place` names the reader's interest in errors.
    pub(crate) fn read_exact_at(&self, offset: u64, out: &mut [u8], place: &str) -> Result<()> {
        read_exact_at(&self.file, offset, out).map_err(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof {
                let message = format!(
                    "the file had {} bytes when it was opened, and now ends before byte {}",
                    self.length,
                    offset.saturating_add(out.len() as u64)
                );
                Error::malformed(&self.path, place, message)
            } else {
                Error::io("read", &self.path)(error)
            }
        })
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, out: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !out.is_empty() {
        match file.seek_read(out, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                out = &mut out[count..];
                offset += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads a part of one tensor.
pub(crate) fn read_tensor_range(
    source: &Source,
    info: &TensorInfo,
    first: u64,
    out: &mut [u8],
) -> Result<()> {
    let length = out.len() as u64;
    if first.checked_add(length).is_none_or(|end| end > info.bytes) {
        let message = format!(
            "bytes {first} to {} of tensor `{}` were asked for, which has {}",
            first.saturating_add(length),
            shown(&info.name),
            info.bytes
        );
        return Err(Error::Conversion(message));
    }
    source.read_exact_at(info.offset + first, out, &format!("tensor `{}`", shown(&info.name)))
}

/// A buffer for a whole tensor, whose range was compared with the file's length when it was opened.
pub(crate) fn tensor_buffer(source: &Source, info: &TensorInfo) -> Result<Vec<u8>> {
    let bytes = usize::try_from(info.bytes).map_err(|_| {
        let message = format!("tensor `{}` exceeds the address space", shown(&info.name));
        Error::unsupported(&source.path, message)
    })?;
    Ok(vec![0; bytes])
}

/// Text from a file as it may stand in a message: control characters escaped, at most 120 characters.
pub(crate) fn shown(text: &str) -> String {
    const LIMIT: usize = 120;
    let mut short: String = text.chars().take(LIMIT).flat_map(char::escape_debug).collect();
    if text.chars().nth(LIMIT).is_some() {
        short.push_str("...");
    }
    short
}

/// What serde_json says, without more than a glimpse of the file's own text, and with the place at the end.
pub(crate) fn json_fault(error: &serde_json::Error) -> String {
    const LIMIT: usize = 400;
    let text = error.to_string();
    if text.len() <= LIMIT && !text.contains(char::is_control) {
        return text;
    }
    format!("{} at line {} column {}", shown(&text), error.line(), error.column())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_text_is_short_and_has_no_control_characters() {
        assert_eq!(shown("model.norm.weight"), "model.norm.weight");
        assert_eq!(shown("a\u{1b}[31m"), "a\\u{1b}[31m");
        assert_eq!(shown(&"x".repeat(1_000_000)).len(), 123);
    }

    #[test]
    fn a_folder_is_not_a_source() {
        let folder = tempfile::tempdir().unwrap();
        let message = Source::open(folder.path()).unwrap_err().to_string();
        assert!(message.contains("not a regular file"), "{message}");
    }
}
