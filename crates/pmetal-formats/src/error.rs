//! The one error type of this crate.

use std::path::{Path, PathBuf};

/// What this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Why bytes were refused, or why a file could not be read or written.
///
/// Each message is one sentence that names the file and, where it is known, the place in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of the file system failed.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was tried, as a verb: "open", "read", "rename".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file is not what its format demands.
    #[error("`{}`{}: {message}", path.display(), place_suffix(place))]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where in the file: "line 7, column 3", "header", "tensor `x`"; may be empty.
        place: String,
        /// One sentence that names the thing and both values.
        message: String,
    },
    /// A file is well-formed, but asks for something that this program does not do.
    #[error("`{}`: {message}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// One sentence that names the field and its value.
        message: String,
    },
    /// Tensor data cannot be turned into what was asked for.
    #[error("cannot convert tensor data: {0}")]
    Conversion(String),
    /// A GGUF metadata key is absent or holds something else than what was asked for.
    #[error("GGUF key `{key}` {message}")]
    GgufKey {
        /// The key.
        key: String,
        /// The rest of the sentence: "is missing", "has type string, not an unsigned integer".
        message: String,
    },
    /// A writer was given what the format cannot hold.
    #[error("cannot write safetensors: {0}")]
    Unwritable(String),
    /// A stream took no more bytes.
    #[error("cannot write {what}")]
    Write {
        /// What was being written: "tensor `x`".
        what: String,
        /// The stream's answer.
        source: std::io::Error,
    },
    /// A chat template failed to compile or to render.
    #[error("chat template: {0}")]
    Template(String),
    /// A chat template refused the conversation by `raise_exception`; the message is the template's own.
    #[error("the chat template refuses the conversation: {0}")]
    TemplateRaised(String),
    /// A tokenizer failed to encode or decode.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
}

fn place_suffix(place: &str) -> String {
    if place.is_empty() { String::new() } else { format!(", {place}") }
}

impl Error {
    /// A [`Error::Malformed`] from its parts.
    pub fn malformed(path: impl Into<PathBuf>, place: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Malformed { path: path.into(), place: place.into(), message: message.into() }
    }

    /// A [`Error::Unsupported`] from its parts.
    pub fn unsupported(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::Unsupported { path: path.into(), message: message.into() }
    }

    /// Gives an error that knows only a metadata key its file; leaves other errors alone.
    #[must_use]
    pub fn in_file(self, path: &Path) -> Self {
        match self {
            Self::GgufKey { key, message } => Self::malformed(path, "metadata", format!("`{key}` {message}")),
            other => other,
        }
    }

    /// Gives an error that knows only a conversion its tensor; leaves other errors alone.
    #[must_use]
    pub(crate) fn of_tensor(self, name: &str) -> Self {
        match self {
            Self::Conversion(message) => {
                Self::Conversion(format!("tensor `{}`: {message}", crate::source::shown(name)))
            }
            other => other,
        }
    }

    /// A closure for `map_err` on file system operations.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
