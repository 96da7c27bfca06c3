//! Checkpoints of a run: folders that appear whole, are verified before use, and are found without a pointer file.
//!
//! `checkpoints/step-000100/` holds the caller's files, `state.json` and `manifest.json`. The manifest is written
//! last and carries the size and SHA-256 of every file, so a folder is valid or it is skipped with a reason.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pmetal_formats::Error as FormatError;
use pmetal_formats::atomic::{self, DirectoryCommit};
use pmetal_formats::fs::Fs;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// The manifest format that this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";
const MANIFEST_LIMIT_BYTES: u64 = 1 << 20;
const STATE_LIMIT_BYTES: u64 = 16 << 20;
/// Room for the manifest and for what a file system takes beside the bytes of files.
const MARGIN_BYTES: u64 = 1 << 20;

/// What a checkpoint belongs to; a run is resumed only where these agree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// See [`crate::trainer::config::TrainConfig::config_hash`].
    pub config_hash: String,
    /// A hash of the rows that are trained on.
    pub dataset_fingerprint: String,
    /// A hash of the weights that the run started from.
    pub base_model_hash: String,
}

/// One file of a checkpoint, as the manifest records it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// A plain file name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// SHA-256 in lower-case hexadecimal digits.
    pub sha256: String,
}

/// The content of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] of the program that wrote it.
    pub format_version: u32,
    /// Optimizer steps that were finished.
    pub step: u64,
    /// What the checkpoint belongs to.
    #[serde(flatten)]
    pub identity: Identity,
    /// Every other file of the folder.
    pub files: Vec<FileRecord>,
}

type Fill<'a> = Box<dyn FnOnce(&mut dyn Write) -> pmetal_formats::Result<()> + 'a>;

/// A file to save: its name, its exact length, and how to write it.
pub struct NewFile<'a> {
    name: String,
    bytes: u64,
    fill: Fill<'a>,
}

impl<'a> NewFile<'a> {
    /// A file whose bytes are in memory.
    pub fn from_bytes(name: impl Into<String>, content: &'a [u8]) -> Self {
        let name = name.into();
        let path = name.clone();
        Self::streamed(name, content.len() as u64, move |file| {
            file.write_all(content).map_err(FormatError::io("write", path))
        })
    }

    /// A file that `fill` writes, exactly `bytes` long.
    pub fn streamed(
        name: impl Into<String>,
        bytes: u64,
        fill: impl FnOnce(&mut dyn Write) -> pmetal_formats::Result<()> + 'a,
    ) -> Self {
        Self { name: name.into(), bytes, fill: Box::new(fill) }
    }
}

/// A checkpoint whose files agreed with its manifest when it was opened.
#[derive(Clone)]
pub struct Checkpoint {
    fs: Arc<dyn Fs>,
    /// Its folder.
    pub path: PathBuf,
    /// What it says about itself.
    pub manifest: Manifest,
}

impl Checkpoint {
    /// The bytes of one file, compared with the manifest once more.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when the manifest does not name the file or its bytes have changed.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let record = self.manifest.files.iter().find(|file| file.name == name).ok_or_else(|| {
            Error::Checkpoint(format!("checkpoint `{}` has no file `{name}`", self.path.display()))
        })?;
        let path = self.path.join(name);
        let bytes = self.fs.read(&path, record.bytes).map_err(FormatError::io("read", &path))?;
        let mut digest = HashingWriter::discarding();
        digest.write_all(&bytes).map_err(FormatError::io("hash", &path))?;
        digest.check(record).map_err(|reason| refused(&self.path, &reason))?;
        Ok(bytes)
    }

    /// The small state that was saved with the files.
    ///
    /// # Errors
    /// As [`Checkpoint::read`], and when the state has not the fields of `T`.
    pub fn state<T: for<'de> Deserialize<'de>>(&self) -> Result<T> {
        serde_json::from_slice(&self.read(STATE)?)
            .map_err(|error| refused(&self.path, &format!("`{STATE}` cannot be read: {error}")))
    }
}

/// A checkpoint folder that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Its folder.
    pub path: PathBuf,
    /// One sentence that names the file and both values.
    pub reason: String,
}

/// What [`CheckpointStore::latest`] found.
#[derive(Default)]
pub struct Latest {
    /// The valid checkpoint with the highest step.
    pub checkpoint: Option<Checkpoint>,
    /// Those with higher steps that are not valid, highest first; to be shown to the user.
    pub skipped: Vec<Skipped>,
}

/// The checkpoints of one run folder. The run's lock must be held while this exists.
#[derive(Clone)]
pub struct CheckpointStore {
    fs: Arc<dyn Fs>,
    folder: PathBuf,
}

impl CheckpointStore {
    /// Opens `RUN/checkpoints`, creating it when absent, and cleans up after a killed process.
    ///
    /// # Errors
    /// [`Error::Format`] when the folder cannot be created or cleaned.
    pub fn open(fs: Arc<dyn Fs>, run_folder: &Path) -> Result<Self> {
        let folder = run_folder.join("checkpoints");
        fs.create_dir_all(&folder).map_err(FormatError::io("create", &folder))?;
        // A folder that is not synced could vanish with the checkpoints in it.
        fs.sync_dir(run_folder).map_err(FormatError::io("sync", run_folder))?;
        atomic::clean(&*fs, &folder)?;
        Ok(Self { fs, folder })
    }

    /// Saves a checkpoint; when this returns it survives a loss of power. One of the same step is replaced.
    ///
    /// # Errors
    /// [`Error::DiskFull`] before anything is written; [`Error::Usage`] for a name that is no plain file name, is
    /// taken, or whose file has another length than announced; otherwise [`Error::Format`] naming the step that
    /// failed. The checkpoints from before are then still there, and saving may be tried again.
    pub fn save(
        &self,
        step: u64,
        identity: &Identity,
        files: Vec<NewFile<'_>>,
        state: &impl Serialize,
    ) -> Result<PathBuf> {
        let path = self.folder.join(folder_name(step));
        let state = serde_json::to_vec_pretty(state)
            .map_err(|error| Error::Usage(format!("the state of step {step} cannot be written: {error}")))?;
        let needed_bytes =
            files.iter().fold(MARGIN_BYTES + state.len() as u64, |sum, file| sum.saturating_add(file.bytes));
        if let Some(free_bytes) = self.fs.free_bytes(&self.folder).filter(|&free| free < needed_bytes) {
            return Err(Error::DiskFull { path, needed_bytes, free_bytes });
        }
        let mut manifest =
            Manifest { format_version: FORMAT_VERSION, step, identity: identity.clone(), files: Vec::new() };
        let mut commit = DirectoryCommit::begin(&*self.fs, &path)?;
        for file in files.into_iter().chain([NewFile::from_bytes(STATE, &state)]) {
            check_new_name(&file.name, &manifest)?;
            let target = path.join(&file.name);
            let record = write_hashed(&mut commit, file).map_err(|error| naming_the_file(error, target))?;
            manifest.files.push(record);
        }
        let text = serde_json::to_vec_pretty(&manifest).map_err(|error| {
            Error::Usage(format!("the manifest of step {step} cannot be written: {error}"))
        })?;
        commit.write(MANIFEST, &text)?;
        commit.commit()?;
        Ok(path)
    }

    /// Removes all checkpoints but the `keep_last` with the highest steps and those whose step is in `keep_also`.
    ///
    /// Call it after a save. Folders are judged by name, so the count includes damaged ones unless they were removed.
    /// Returns the steps that were removed.
    ///
    /// # Errors
    /// [`Error::Format`] when a folder cannot be listed or removed.
    pub fn prune(&self, keep_last: usize, keep_also: &[u64]) -> Result<Vec<u64>> {
        let mut removed = Vec::new();
        for (step, path) in self.by_step()?.into_iter().skip(keep_last) {
            if !keep_also.contains(&step) {
                atomic::remove_directory(&*self.fs, &path)?;
                removed.push(step);
            }
        }
        Ok(removed)
    }

    /// The valid checkpoint with the highest step; all its files are read and hashed.
    ///
    /// # Errors
    /// [`Error::Format`] when the folder cannot be listed. A damaged checkpoint is no error but listed as skipped.
    pub fn latest(&self) -> Result<Latest> {
        let mut skipped = Vec::new();
        for (step, path) in self.by_step()? {
            match self.verify(step, &path) {
                Ok(manifest) => {
                    let checkpoint = Some(Checkpoint { fs: self.fs.clone(), path, manifest });
                    return Ok(Latest { checkpoint, skipped });
                }
                Err(reason) => skipped.push(Skipped { path, reason }),
            }
        }
        Ok(Latest { checkpoint: None, skipped })
    }

    /// The checkpoint of one step.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the reason when it is absent or not valid.
    pub fn at_step(&self, step: u64) -> Result<Checkpoint> {
        let path = self.folder.join(folder_name(step));
        match self.verify(step, &path) {
            Ok(manifest) => Ok(Checkpoint { fs: self.fs.clone(), path, manifest }),
            Err(reason) => Err(refused(&path, &reason)),
        }
    }

    /// Folders with the name of a checkpoint, highest step first.
    fn by_step(&self) -> Result<Vec<(u64, PathBuf)>> {
        let entries = self.fs.read_dir(&self.folder).map_err(FormatError::io("list", &self.folder))?;
        let mut found: Vec<_> = entries
            .iter()
            .filter_map(|entry| {
                let step = entry.name.to_str()?.strip_prefix("step-")?.parse().ok()?;
                let is_ours = entry.is_dir && entry.name == *folder_name(step);
                is_ours.then(|| (step, self.folder.join(&entry.name)))
            })
            .collect();
        found.sort_by_key(|&(step, _)| std::cmp::Reverse(step));
        Ok(found)
    }

    /// Reads the manifest and compares every file with it; the error is the reason to skip.
    fn verify(&self, step: u64, path: &Path) -> std::result::Result<Manifest, String> {
        let bytes = self
            .fs
            .read(&path.join(MANIFEST), MANIFEST_LIMIT_BYTES)
            .map_err(|error| format!("`{MANIFEST}` cannot be read: {error}"))?;
        let manifest = parse_manifest(&bytes)?;
        if manifest.step != step {
            return Err(format!("`{MANIFEST}` is of step {}, the folder of step {step}", manifest.step));
        }
        manifest.files.iter().try_for_each(|record| self.verify_file(path, record))?;
        Ok(manifest)
    }

    fn verify_file(&self, path: &Path, record: &FileRecord) -> std::result::Result<(), String> {
        let path = path.join(&record.name);
        let failed = |error| format!("`{}` cannot be read: {error}", record.name);
        let length = self.fs.metadata(&path).map_err(failed)?.len;
        if length != record.bytes {
            return Err(format!("`{}` has {length} bytes, the manifest says {}", record.name, record.bytes));
        }
        let mut reader = self.fs.open(&path).map_err(failed)?.take(record.bytes);
        let mut digest = HashingWriter::discarding();
        std::io::copy(&mut reader, &mut digest).map_err(failed)?;
        digest.check(record)
    }
}

/// Checks the bytes of a `manifest.json`; the error is one sentence.
///
/// # Errors
/// When it is no JSON of the expected form, of a newer version, or names a file that is no plain file name.
pub fn parse_manifest(bytes: &[u8]) -> std::result::Result<Manifest, String> {
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    // The version first: a newer format may have other fields.
    let unreadable = |error| format!("`{MANIFEST}` cannot be read: {error}");
    let version: Version = serde_json::from_slice(bytes).map_err(unreadable)?;
    if version.format_version != FORMAT_VERSION {
        let found = version.format_version;
        return Err(format!("`{MANIFEST}` has format version {found}, this program reads {FORMAT_VERSION}"));
    }
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(unreadable)?;
    let mut names = std::collections::BTreeSet::new();
    for file in &manifest.files {
        if !is_plain_name(&file.name) || !names.insert(&file.name) {
            return Err(format!(
                "`{MANIFEST}` names the file `{}`, which is not plain or named twice",
                file.name
            ));
        }
    }
    if !names.contains(&STATE.to_owned())
        || manifest.files.iter().any(|f| f.name == STATE && f.bytes > STATE_LIMIT_BYTES)
    {
        return Err(format!("`{MANIFEST}` names no `{STATE}` of at most {STATE_LIMIT_BYTES} bytes"));
    }
    Ok(manifest)
}

fn folder_name(step: u64) -> String {
    format!("step-{step:06}")
}

fn refused(path: &Path, reason: &str) -> Error {
    Error::Checkpoint(format!("checkpoint `{}`: {reason}", path.display()))
}

/// Letters, digits, `.`, `_` and `-`, not beginning with a dot: the same file on every system, inside the folder.
fn is_plain_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    !name.is_empty() && name.len() <= 200 && !name.starts_with('.') && name.bytes().all(allowed)
}

fn check_new_name(name: &str, manifest: &Manifest) -> Result<()> {
    if is_plain_name(name) && name != MANIFEST && manifest.files.iter().all(|file| file.name != name) {
        return Ok(());
    }
    Err(Error::Usage(format!("a checkpoint cannot hold a file `{name}`: the name is not plain or is taken")))
}

fn write_hashed(commit: &mut DirectoryCommit<'_>, file: NewFile<'_>) -> Result<FileRecord> {
    let NewFile { name, bytes, fill } = file;
    let mut written = None;
    commit.write_with(&name, |target| {
        let mut hashing = HashingWriter { target, digest: Sha256::new(), bytes: 0 };
        fill(&mut hashing)?;
        written = Some(hashing.finish());
        Ok(())
    })?;
    let (found, sha256) = written.unwrap_or_default();
    if found != bytes {
        return Err(Error::Usage(format!("`{name}` was announced with {bytes} bytes and has {found}")));
    }
    Ok(FileRecord { name, bytes, sha256 })
}

/// A stream does not know which file it fills; the user must.
fn naming_the_file(error: Error, path: PathBuf) -> Error {
    match error {
        Error::Format(FormatError::Write { source, .. }) => FormatError::io("write", path)(source).into(),
        other => other,
    }
}

/// Hashes and counts what passes through.
struct HashingWriter<W> {
    target: W,
    digest: Sha256,
    bytes: u64,
}

impl HashingWriter<std::io::Sink> {
    fn discarding() -> Self {
        Self { target: std::io::sink(), digest: Sha256::new(), bytes: 0 }
    }

    fn check(self, record: &FileRecord) -> std::result::Result<(), String> {
        let (bytes, sha256) = self.finish();
        if bytes != record.bytes {
            return Err(format!("`{}` has {bytes} bytes, the manifest says {}", record.name, record.bytes));
        }
        if sha256 != record.sha256 {
            return Err(format!(
                "`{}` has SHA-256 {sha256}, the manifest says {}",
                record.name, record.sha256
            ));
        }
        Ok(())
    }
}

impl<W> HashingWriter<W> {
    fn finish(self) -> (u64, String) {
        (self.bytes, self.digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.target.write(bytes)?;
        self.digest.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.target.flush()
    }
}

#[cfg(test)]
mod tests;
