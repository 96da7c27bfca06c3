//! The one error type of this crate.

/// What this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the library refused or failed. Messages are one sentence that names the thing and both values.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file was refused or could not be read or written.
    #[error(transparent)]
    Format(#[from] pmetal_formats::Error),
    /// A device refused an operation or ran out of memory.
    #[error(transparent)]
    Engine(#[from] pmetal_engine::Error),
    /// A model's configuration is not one that this program computes.
    #[error("config.json: {0}")]
    Config(String),
    /// A checkpoint does not hold what its configuration needs.
    #[error("{0}")]
    Checkpoint(String),
    /// A request contradicts itself or the model.
    #[error("{0}")]
    Usage(String),
    /// A dataset cannot be trained on.
    #[error("{0}")]
    Data(String),
    /// A loss or gradient stopped being finite.
    #[error("{0}")]
    Diverged(String),
    /// A disk has less room than a file needs.
    #[error("`{}` needs {needed_bytes} bytes, its disk has {free_bytes} bytes free", path.display())]
    DiskFull {
        /// What was to be written.
        path: std::path::PathBuf,
        /// Bytes that it would take.
        needed_bytes: u64,
        /// Bytes that this user may still write.
        free_bytes: u64,
    },
}

impl Error {
    /// For closures that must return the formats' error.
    pub(crate) fn into_format(self) -> pmetal_formats::Error {
        match self {
            Self::Format(error) => error,
            other => pmetal_formats::Error::Conversion(other.to_string()),
        }
    }

    /// For closures that must return the engine's error.
    pub(crate) fn into_engine(self) -> pmetal_engine::Error {
        match self {
            Self::Engine(error) => error,
            other => pmetal_engine::Error::Other(other.to_string()),
        }
    }
}

/// Faults that are reported together: the first ones in words, the rest as a number.
#[derive(Default)]
pub(crate) struct Faults {
    listed: Vec<String>,
    pub(crate) unlisted: usize,
}

impl Faults {
    /// Faults of one report that are put into words.
    const LISTED: usize = 20;

    pub(crate) fn add(&mut self, fault: String) {
        if self.listed.len() < Self::LISTED { self.listed.push(fault) } else { self.unlisted += 1 }
    }

    /// [`Error::Checkpoint`] for the file, if there was any fault.
    pub(crate) fn into_result(self, path: &std::path::Path) -> Result<()> {
        if self.listed.is_empty() {
            return Ok(());
        }
        let rest = if self.unlisted > 0 { format!("; and {} more", self.unlisted) } else { String::new() };
        Err(Error::Checkpoint(format!("`{}`: {}{rest}", path.display(), self.listed.join("; "))))
    }
}
