//! The model and the data inside the program, so that the first run needs nothing else.

use std::path::{Path, PathBuf};

use pmetal_formats::atomic;
use pmetal_formats::fs::{Fs, RealFs};
use pmetal_formats::{Error, Result};

/// The name that stands for the embedded model.
pub const NAME: &str = "stories260k";
/// The name that stands for the embedded data.
pub const DATASET_NAME: &str = "tinyshakespeare";

/// stories260K of llama2.c, a Llama of 260 thousand parameters that was trained on TinyStories.
const FILES: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("../../assets/stories260k/config.json")),
    ("generation_config.json", include_bytes!("../../assets/stories260k/generation_config.json")),
    ("model.safetensors", include_bytes!("../../assets/stories260k/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../assets/stories260k/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../assets/stories260k/tokenizer_config.json")),
];

/// TinyShakespeare: plays of Shakespeare, in the public domain.
pub const TINY_SHAKESPEARE: &str = include_str!("../../assets/tinyshakespeare/input.txt");

/// Characters of one row of the embedded data: whole speeches up to about this many.
const PASSAGE_CHARACTERS: usize = 600;

/// Embedded files in a folder of their own, removed when dropped.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, files: &[(&str, &[u8])]) -> Result<Self> {
        use std::sync::atomic::{AtomicUsize, Ordering};
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("pmetal-{name}-{}-{number}", std::process::id()));
        RealFs.create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let scratch = Self(folder);
        for (name, bytes) in files {
            atomic::write_file(&RealFs, &scratch.0.join(name), bytes)?;
        }
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A folder that stays behind among the temporary ones harms nobody.
        let _ = RealFs.remove_dir_all(&self.0);
    }
}

/// The embedded model as a folder in Hugging Face layout.
#[derive(Debug)]
pub(super) struct Unpacked(Scratch);

impl Unpacked {
    pub(super) fn new() -> Result<Self> {
        Scratch::new(NAME, &FILES).map(Self)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0.0
    }
}

/// The embedded data as a JSONL file of passages.
#[derive(Debug)]
pub struct Dataset {
    scratch: Scratch,
}

impl Dataset {
    /// Unpacks the data; the files are removed when this is dropped.
    ///
    /// # Errors
    /// When the temporary folder cannot be written.
    pub fn new() -> Result<Self> {
        let mut lines = String::new();
        let mut passage = String::new();
        let mut end = |passage: &mut String| {
            if !passage.is_empty() {
                lines.push_str(&serde_json::json!({ "text": std::mem::take(passage) }).to_string());
                lines.push('\n');
            }
        };
        for speech in TINY_SHAKESPEARE.split("\n\n").map(str::trim).filter(|speech| !speech.is_empty()) {
            if passage.len() + speech.len() > PASSAGE_CHARACTERS {
                end(&mut passage);
            }
            if !passage.is_empty() {
                passage.push_str("\n\n");
            }
            passage.push_str(speech);
        }
        end(&mut passage);
        Ok(Self { scratch: Scratch::new(DATASET_NAME, &[("train.jsonl", lines.as_bytes())])? })
    }

    /// The folder that holds `train.jsonl`.
    pub fn path(&self) -> &Path {
        &self.scratch.0
    }
}
