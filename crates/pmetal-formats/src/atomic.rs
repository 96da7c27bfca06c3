//! Files and folders that appear whole or not at all.
//!
//! What is promised: after the death of the process at any moment, and after a loss of power on a file system that
//! honours fsync, a path holds what it held before or all of the new bytes. What is not: on a network file system,
//! rename and fsync are as good as that system makes them.
//!
//! Names that begin with `.tmp-`, `.trash-` or `.old-` belong to this module; [`clean`] removes what a killed process
//! left of them.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::io::{self, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::fs::Fs;

/// Being written; worthless after a kill.
const TEMPORARY: &str = ".tmp-";
/// Being removed; worthless after a kill.
const TRASH: &str = ".trash-";
/// Being replaced; still the only copy when its replacement did not arrive.
const REPLACED: &str = ".old-";

/// Enough to make system calls rare for tensors written row by row.
const BUFFER_BYTES: usize = 1 << 20;

/// Writes a file: a temporary one in the same folder, fsync, rename, fsync of the folder.
///
/// # Errors
/// [`Error::Io`] naming the step that failed. The old file is then still there and the temporary one is gone; only
/// when the last fsync failed is the new file in place, though perhaps not after a loss of power.
pub fn write_file(fs: &dyn Fs, path: &Path, bytes: &[u8]) -> Result<()> {
    write_file_with(fs, path, |file| file.write_all(bytes).map_err(Error::io("write", path)))
}

/// Like [`write_file`], with the bytes coming from `fill`.
///
/// # Errors
/// As [`write_file`], and those of `fill`.
pub fn write_file_with(
    fs: &dyn Fs,
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    let temporary = private_name(path, TEMPORARY)?;
    discard_file(fs, &temporary);
    let written = write_and_sync(fs, &temporary, fill)
        .and_then(|()| fs.rename(&temporary, path).map_err(Error::io("rename a temporary file to", path)));
    if written.is_err() {
        discard_file(fs, &temporary);
    }
    written?;
    sync_parent(fs, path)
}

/// A folder that appears under its name with all its files, or not at all.
///
/// Files are written into `.tmp-NAME-PID` beside it. Dropping the value without [`DirectoryCommit::commit`] removes
/// that folder.
pub struct DirectoryCommit<'a> {
    fs: &'a dyn Fs,
    target: PathBuf,
    temporary: PathBuf,
    committed: bool,
}

impl<'a> DirectoryCommit<'a> {
    /// Starts an empty folder that is to become `target`; the folders above are created.
    ///
    /// # Errors
    /// [`Error::Io`] when the temporary folder cannot be created.
    pub fn begin(fs: &'a dyn Fs, target: &Path) -> Result<Self> {
        let temporary = private_name(target, TEMPORARY)?;
        if fs.exists(&temporary) {
            fs.remove_dir_all(&temporary).map_err(Error::io("remove", &temporary))?;
        }
        fs.create_dir_all(&temporary).map_err(Error::io("create", &temporary))?;
        Ok(Self { fs, target: target.to_owned(), temporary, committed: false })
    }

    /// Writes one file and syncs it. `name` is a plain file name.
    ///
    /// # Errors
    /// [`Error::Io`] when the file exists already or cannot be written.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.temporary.join(name);
        self.write_with(name, |file| file.write_all(bytes).map_err(Error::io("write", path)))
    }

    /// Like [`DirectoryCommit::write`], with the bytes coming from `fill`.
    ///
    /// # Errors
    /// As [`DirectoryCommit::write`], and those of `fill`.
    pub fn write_with(&mut self, name: &str, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
        write_and_sync(self.fs, &self.temporary.join(name), fill)
    }

    /// Gives the folder its name and syncs the folder above.
    ///
    /// A folder that had the name is first set aside under `.old-NAME-PID`, which [`clean`] puts back if the process
    /// dies before the new one is in place.
    ///
    /// # Errors
    /// [`Error::Io`] naming the step that failed; what had the name before is then still there.
    pub fn commit(mut self) -> Result<()> {
        self.fs.sync_dir(&self.temporary).map_err(Error::io("sync", &self.temporary))?;
        let replaced = if self.fs.exists(&self.target) { Some(self.set_aside()?) } else { None };
        let renamed = self.fs.rename(&self.temporary, &self.target);
        if let (Err(_), Some(old)) = (&renamed, &replaced) {
            self.fs.rename(old, &self.target).map_err(Error::io("rename back to", &self.target))?;
        }
        renamed.map_err(Error::io("rename a temporary folder to", &self.target))?;
        self.committed = true;
        sync_parent(self.fs, &self.target)?;
        if let Some(old) = replaced {
            self.fs.remove_dir_all(&old).map_err(Error::io("remove", old))?;
        }
        Ok(())
    }

    fn set_aside(&self) -> Result<PathBuf> {
        let old = private_name(&self.target, REPLACED)?;
        self.fs.rename(&self.target, &old).map_err(Error::io("set aside", &self.target))?;
        Ok(old)
    }
}

impl Drop for DirectoryCommit<'_> {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing more can be done about a failure here; `clean` tries again at the next start.
            self.fs.remove_dir_all(&self.temporary).ok();
        }
    }
}

/// Removes a folder so that a kill never leaves half of it under its name: renamed to `.trash-NAME-PID` first.
///
/// # Errors
/// [`Error::Io`] when the rename or the removal fails.
pub fn remove_directory(fs: &dyn Fs, path: &Path) -> Result<()> {
    let trash = private_name(path, TRASH)?;
    fs.rename(path, &trash).map_err(Error::io("rename for removal", path))?;
    fs.remove_dir_all(&trash).map_err(Error::io("remove", trash))
}

/// Removes what killed processes left in `folder`, and restores a folder whose replacement never arrived.
///
/// Only for a folder that no other process writes to now: call it while holding the [`RunLock`]. Not recursive.
/// Returns the names that were removed or restored, sorted; an absent folder has none.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be listed or a name in it cannot be removed.
pub fn clean(fs: &dyn Fs, folder: &Path) -> Result<Vec<OsString>> {
    let mut cleaned = Vec::new();
    if !fs.exists(folder) {
        return Ok(cleaned);
    }
    for entry in fs.read_dir(folder).map_err(Error::io("list", folder))? {
        let path = folder.join(&entry.name);
        let name = entry.name.to_string_lossy();
        if let Some(original) = name.strip_prefix(REPLACED).and_then(without_pid) {
            let original = folder.join(original);
            if !fs.exists(&original) {
                fs.rename(&path, &original).map_err(Error::io("restore", &original))?;
                cleaned.push(entry.name);
                continue;
            }
        } else if !is_left_over(&name) {
            continue;
        }
        let removed = if entry.is_dir { fs.remove_dir_all(&path) } else { fs.remove_file(&path) };
        removed.map_err(Error::io("remove", &path))?;
        cleaned.push(entry.name);
    }
    Ok(cleaned)
}

/// Whether a name has the form that this module gives; a user's own `.tmp-notes` has not.
fn is_left_over(name: &str) -> bool {
    let named = [TEMPORARY, TRASH, REPLACED].iter().find_map(|prefix| name.strip_prefix(prefix));
    named.and_then(without_pid).is_some()
}

/// The right of one process to write to a folder; given up when dropped or when the process ends, however it ends.
///
/// It is the operating system's lock on the file `lock` in that folder, so a lock whose owner died is free. The file
/// itself stays, with the process id of the last owner, since removing it would let two processes lock two files of
/// one name. Where a network file system grants every lock, this one protects nothing.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Takes the lock of an existing folder, without waiting.
    ///
    /// # Errors
    /// [`Error::Io`] whose source has the kind `WouldBlock` and names the process that holds the lock, or the
    /// operating system's error when the file cannot be opened.
    #[allow(clippy::disallowed_methods)] // a lock is held by the process, there is nothing to simulate
    pub fn acquire(folder: &Path) -> Result<Self> {
        let path = folder.join("lock");
        let open = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.map_err(Error::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                // Windows does not let others read a locked file; the message does without the number then.
                (&mut file).take(20).read_to_string(&mut owner).ok();
                let owner = match owner.trim().parse::<u32>() {
                    Ok(pid) => format!("process {pid}"),
                    Err(_) => "another process".to_owned(),
                };
                let message = format!("{owner} is already working in this folder");
                return Err(Error::io("lock", path)(io::Error::new(io::ErrorKind::WouldBlock, message)));
            }
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", path)(error)),
        }
        let write_pid = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write_pid(&mut file).map_err(Error::io("write", path))?;
        Ok(Self { _file: file })
    }
}

fn write_and_sync(fs: &dyn Fs, path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let file = fs.create_new(path).map_err(Error::io("create", path))?;
    let mut buffered = BufWriter::with_capacity(BUFFER_BYTES, file);
    if let Err(error) = fill(&mut buffered) {
        // Without this, dropping the buffer would write the rest after the failure.
        drop(buffered.into_parts());
        return Err(error);
    }
    let flushed = buffered.into_inner().map_err(|failure| {
        let (error, buffer) = failure.into_parts();
        drop(buffer.into_parts());
        error
    });
    let mut file = flushed.map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

fn sync_parent(fs: &dyn Fs, path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs.sync_dir(parent).map_err(Error::io("sync", parent))
}

fn discard_file(fs: &dyn Fs, path: &Path) {
    if fs.exists(path) {
        fs.remove_file(path).ok();
    }
}

/// `folder/NAME` as `folder/PREFIXNAME-PID`.
fn private_name(path: &Path, prefix: &str) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "the path has no last component");
        Error::io("write", path)(error)
    })?;
    let mut private = OsString::from(prefix);
    private.push(name);
    private.push(OsStr::new(&format!("-{}", std::process::id())));
    Ok(path.with_file_name(private))
}

/// `NAME-PID` without the process id.
fn without_pid(name: &str) -> Option<&str> {
    let (original, pid) = name.rsplit_once('-')?;
    pid.parse::<u32>().ok().map(|_| original)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::RealFs;
    use crate::fs::fault::{Fault, FaultFs};

    const EVERY_DEATH: [Fault; 4] = [
        Fault::Kill,
        Fault::KillAfter,
        Fault::PowerLoss { entries_survive: true },
        Fault::PowerLoss { entries_survive: false },
    ];

    fn names(folder: &Path) -> Vec<String> {
        RealFs.read_dir(folder).unwrap().into_iter().map(|entry| entry.name.into_string().unwrap()).collect()
    }

    /// Runs `subject` with the fault at operation 1, 2, 3, ... and returns how many operations there are.
    fn at_every_operation(fault: Fault, mut subject: impl FnMut(&FaultFs) -> bool) -> u64 {
        for at in 1..1000 {
            let fs = FaultFs::with_fault(at, fault);
            let succeeded = subject(&fs);
            if !fs.fired() {
                assert!(succeeded, "without a fault the subject succeeds");
                return at - 1;
            }
        }
        panic!("the subject does not end");
    }

    #[test]
    fn a_file_is_old_or_new_after_a_death_at_every_operation() {
        for fault in EVERY_DEATH {
            let operations = at_every_operation(fault, |fs| {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().join("x");
                write_file(&RealFs, &path, b"old").unwrap();
                let done = write_file(fs, &path, b"newer").is_ok();
                fs.exists(&path); // one more operation, so that a death after success is tried too
                let found = RealFs.read(&path, 100).unwrap();
                assert!(found == b"newer" || (found == b"old" && !done), "{fault:?}: {found:?}");
                clean(&RealFs, folder.path()).unwrap();
                assert_eq!(names(folder.path()), ["x"]);
                done
            });
            assert!(
                operations >= 5,
                "{operations} operations are too few for create, write, sync, rename, sync"
            );
        }
    }

    #[test]
    fn a_failed_write_keeps_the_old_file_and_leaves_no_temporary_one() {
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
            at_every_operation(Fault::Fail(kind), |fs| {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().join("x");
                write_file(&RealFs, &path, b"old").unwrap();
                let result = write_file(fs, &path, b"newer");
                assert_eq!(names(folder.path()), ["x"], "after {:?}", fs.operations());
                if let Err(error) = &result {
                    let Error::Io { source, .. } = error else { panic!("{error}") };
                    assert_eq!(source.kind(), kind);
                    write_file(fs, &path, b"newer").unwrap();
                }
                assert_eq!(RealFs.read(&path, 100).unwrap(), b"newer");
                result.is_ok()
            });
        }
    }

    #[test]
    fn a_folder_is_old_or_new_after_a_death_at_every_operation() {
        for fault in EVERY_DEATH {
            at_every_operation(fault, |fs| {
                let folder = tempfile::tempdir().unwrap();
                let target = folder.path().join("d");
                let save = |fs: &dyn Fs, first: &[u8], second: &[u8]| -> Result<()> {
                    let mut commit = DirectoryCommit::begin(fs, &target)?;
                    commit.write("a", first)?;
                    commit.write("b", second)?;
                    commit.commit()
                };
                save(&RealFs, b"1", b"2").unwrap();
                let done = save(fs, b"33", b"44").is_ok();
                fs.exists(&target); // one more operation, so that a death after success is tried too
                clean(&RealFs, folder.path()).unwrap();
                assert_eq!(names(folder.path()), ["d"], "{fault:?}, {:?}", fs.operations());
                let found = ["a", "b"].map(|name| RealFs.read(&target.join(name), 100).unwrap());
                let (old, new) = ([b"1".to_vec(), b"2".to_vec()], [b"33".to_vec(), b"44".to_vec()]);
                assert!(found == new || (found == old && !done), "{fault:?}: {found:?}");
                done
            });
        }
    }

    #[test]
    fn a_folder_that_is_not_committed_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let mut commit = DirectoryCommit::begin(&RealFs, &folder.path().join("deep/d")).unwrap();
        commit.write("a", b"1").unwrap();
        assert!(commit.write("a", b"1").is_err(), "a name is used once");
        drop(commit);
        assert!(names(&folder.path().join("deep")).is_empty());
    }

    #[test]
    fn what_fails_to_be_produced_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let refused = write_file_with(&RealFs, &path, |file| {
            file.write_all(b"some").map_err(Error::io("write", "x"))?;
            Err(Error::malformed("tensor", "", "has a NaN"))
        });
        assert_eq!(refused.unwrap_err().to_string(), "`tensor`: has a NaN");
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn leftovers_are_cleaned_and_other_files_kept() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in [".tmp-x-1", ".trash-y-2", "x", ".hidden", ".old-z-note", ".tmp-notes"] {
            RealFs.create_new(&at(name)).unwrap();
        }
        for name in [".tmp-d-1", ".old-x-7", ".old-lost-7"] {
            RealFs.create_dir_all(&at(name).join("inner")).unwrap();
        }
        clean(&RealFs, folder.path()).unwrap();
        assert_eq!(names(folder.path()), [".hidden", ".old-z-note", ".tmp-notes", "lost", "x"]);
        assert!(clean(&RealFs, &at("absent")).unwrap().is_empty());
    }

    #[test]
    fn a_path_without_a_name_is_refused() {
        assert!(write_file(&RealFs, Path::new("/"), b"").is_err());
        assert!(write_file(&RealFs, Path::new("a/.."), b"").is_err());
    }

    #[test]
    fn a_second_lock_names_the_process_that_holds_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let first = RunLock::acquire(folder.path()).unwrap();
        let Error::Io { source, .. } = RunLock::acquire(folder.path()).unwrap_err() else { panic!() };
        assert_eq!(source.kind(), io::ErrorKind::WouldBlock);
        assert!(source.to_string().contains(&format!("process {} ", std::process::id())), "{source}");
        drop(first);
        RunLock::acquire(folder.path()).unwrap();
    }

    #[test]
    fn a_lock_file_of_a_dead_process_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        write_file(&RealFs, &folder.path().join("lock"), b"4000000000\n").unwrap();
        let _lock = RunLock::acquire(folder.path()).unwrap();
        let found = RealFs.read(&folder.path().join("lock"), 100).unwrap();
        assert_eq!(found, format!("{}\n", std::process::id()).as_bytes());
    }
}
