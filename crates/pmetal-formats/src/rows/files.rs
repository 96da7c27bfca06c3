//! Which files a dataset consists of, and which of them can be read.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The files of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetFiles {
    /// What is trained on.
    pub train: PathBuf,
    /// What is evaluated during training.
    pub valid: Option<PathBuf>,
    /// What is evaluated at the end.
    pub test: Option<PathBuf>,
}

const ENDINGS: [&str; 3] = ["jsonl", "ndjson", "json"];

impl DatasetFiles {
    /// Finds the files of a dataset: a file is the training file, in a folder it is `train.jsonl`, with `valid`
    /// (or `validation`, `val`) and `test` beside it where they exist, each also as `.ndjson` or `.json`.
    ///
    /// # Errors
    /// When nothing is at the path, the folder has no training file, or two files claim the same part.
    pub fn resolve(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if !metadata.is_dir() {
            return Ok(Self { train: path.to_owned(), valid: None, test: None });
        }
        let Some(train) = find(path, &["train"])? else {
            let message = "the folder has no `train.jsonl`, `train.ndjson` or `train.json`";
            return Err(Error::unsupported(path, message));
        };
        Ok(Self { train, valid: find(path, &["valid", "validation", "val"])?, test: find(path, &["test"])? })
    }
}

fn find(folder: &Path, stems: &[&str]) -> Result<Option<PathBuf>> {
    let mut found: Option<PathBuf> = None;
    for stem in stems {
        for ending in ENDINGS {
            let candidate = folder.join(format!("{stem}.{ending}"));
            if !candidate.is_file() {
                continue;
            }
            if let Some(first) = found {
                let message = format!(
                    "`{}` and `{}` are both the {} part of the dataset; keep one",
                    first.display(),
                    candidate.display(),
                    stems[0]
                );
                return Err(Error::unsupported(folder, message));
            }
            found = Some(candidate);
        }
    }
    Ok(found)
}

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Lines,
    Document,
}

/// Decides by ending and by the first bytes, which betray a compressed or pickled file whatever its name.
pub(super) fn kind_of(path: &Path) -> Result<Kind> {
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default();
    if let Some(message) = refusal_by_ending(&ending) {
        return Err(Error::unsupported(path, message));
    }
    let kind = match ending.as_str() {
        "jsonl" | "ndjson" => Kind::Lines,
        "json" => Kind::Document,
        _ => {
            let message =
                format!("a dataset ends in `.jsonl`, `.ndjson` or `.json`, this file in `.{ending}`");
            return Err(Error::unsupported(path, message));
        }
    };
    if !std::fs::metadata(path).map_err(Error::io("open", path))?.is_file() {
        return Err(Error::unsupported(path, "a dataset must be a regular file"));
    }
    let mut first = Vec::new();
    let file = File::open(path).map_err(Error::io("open", path))?;
    file.take(4).read_to_end(&mut first).map_err(Error::io("read", path))?;
    match refusal_by_content(&first) {
        Some(message) => Err(Error::unsupported(path, message)),
        None => Ok(kind),
    }
}

const PICKLE: &str = "a pickle can run code when it is opened and is never read; write the rows as `.jsonl`";
const GZIP: &str = "gzip is not read yet; unpack the file with `gunzip -k`";
const ZSTD: &str = "zstd is not read yet; unpack the file with `unzstd`";
const PARQUET: &str =
    "Parquet is not read yet; write the rows as `.jsonl` (pandas: `to_json(lines=True, orient='records')`)";

fn refusal_by_ending(ending: &str) -> Option<&'static str> {
    Some(match ending {
        "gz" => GZIP,
        "zst" => ZSTD,
        "parquet" => PARQUET,
        "arrow" | "feather" => "Arrow files are not read yet; write the rows as `.jsonl`",
        "csv" | "tsv" => {
            "CSV is not read yet; write the rows as `.jsonl` (pandas: `to_json(lines=True, orient='records')`)"
        }
        "txt" | "md" => {
            "plain text has no rows; write one object `{\"text\": ...}` a line into a `.jsonl` file"
        }
        "zip" | "xz" | "bz2" | "tar" | "7z" => "archives are not read; unpack the file",
        "pkl" | "pickle" | "pt" | "pth" | "bin" | "ckpt" | "npz" | "npy" | "joblib" => PICKLE,
        _ => return None,
    })
}

fn refusal_by_content(first: &[u8]) -> Option<&'static str> {
    match first {
        [0x1f, 0x8b, ..] => Some(GZIP),
        [0x28, 0xb5, 0x2f, 0xfd] => Some(ZSTD),
        b"PAR1" => Some(PARQUET),
        [b'P', b'K', 3, 4] => Some("the file is a zip archive, which is not read; unpack it"),
        [0x80, 2..=5, ..] => Some(PICKLE),
        _ => None,
    }
}
