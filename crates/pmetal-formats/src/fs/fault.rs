//! A file system that fails, dies or loses power at a chosen operation, for tests.
//!
//! It works on real files (give it paths in a temporary folder). Operations are counted from 1: every call of an
//! [`Fs`] method that touches the disk, and every `write` and `sync_all` of an open file. A test runs its subject with
//! the fault at 1, 2, 3, ... until [`FaultFs::fired`] says that the fault was no longer reached.
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Entry, FileHandle, Fs, Metadata, RealFs};

/// What happens at the chosen operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails once with this kind of error (`StorageFull` for a full disk, `Other` for a broken one); a write has
    /// then taken half of its bytes.
    Fail(io::ErrorKind),
    /// The process dies in it: a write takes half of its bytes, removing a folder removes half of its entries, and
    /// anything else does nothing. All later operations are refused.
    Kill,
    /// The process dies right after it.
    KillAfter,
    /// Power is lost before it: files lose the bytes that were not synced. With `entries_survive`, creations and
    /// renames are kept although their folder was not synced; without, they are undone.
    PowerLoss {
        /// Whether names reach the disk before the bytes do.
        entries_survive: bool,
    },
}

/// One counted operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// The name of the method.
    pub name: &'static str,
    /// Its first path.
    pub path: PathBuf,
}

/// A change of names that a loss of power may undo.
#[derive(Debug)]
enum Unsynced {
    Created(PathBuf),
    /// From, to, and the file that the rename replaced.
    Renamed(PathBuf, PathBuf, Option<Vec<u8>>),
}

#[derive(Debug, Default)]
struct State {
    fault: Option<(u64, Fault)>,
    operations: Vec<Operation>,
    fired: bool,
    dead: bool,
    free_bytes: Option<u64>,
    /// Files with bytes that were not synced, and how many of theirs were.
    unsynced_files: Vec<(PathBuf, u64)>,
    unsynced_entries: Vec<Unsynced>,
}

/// The real file system with one fault in it; clones share the fault and the count.
#[derive(Debug, Clone, Default)]
pub struct FaultFs {
    state: Arc<Mutex<State>>,
}

/// How an operation has to behave.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Proceed,
    /// Do half of it, then report this.
    Half(io::ErrorKind),
    /// Do it, then report that the process is dead.
    ThenDie,
}

impl FaultFs {
    /// A file system without a fault, which still counts.
    pub fn new() -> Self {
        Self::default()
    }

    /// A file system with `fault` at operation `at`, counted from 1.
    pub fn with_fault(at: u64, fault: Fault) -> Self {
        let fs = Self::default();
        fs.state().fault = Some((at, fault));
        fs
    }

    /// Makes [`Fs::free_bytes`] answer this.
    pub fn set_free_bytes(&self, free_bytes: u64) {
        self.state().free_bytes = Some(free_bytes);
    }

    /// Whether the chosen operation was reached.
    pub fn fired(&self) -> bool {
        self.state().fired
    }

    /// What was done so far, the operation with the fault included.
    pub fn operations(&self) -> Vec<Operation> {
        self.state().operations.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an operation and says how it has to behave.
    fn enter(&self, name: &'static str, path: &Path) -> io::Result<Verdict> {
        let mut state = self.state();
        if state.dead {
            return Err(dead());
        }
        state.operations.push(Operation { name, path: path.to_owned() });
        let Some((at, fault)) = state.fault else { return Ok(Verdict::Proceed) };
        if state.operations.len() as u64 != at {
            return Ok(Verdict::Proceed);
        }
        state.fired = true;
        match fault {
            Fault::Fail(kind) => Ok(Verdict::Half(kind)),
            Fault::Kill => {
                state.dead = true;
                Ok(Verdict::Half(io::ErrorKind::BrokenPipe))
            }
            Fault::KillAfter => {
                state.dead = true;
                Ok(Verdict::ThenDie)
            }
            Fault::PowerLoss { entries_survive } => {
                state.dead = true;
                state.lose_power(entries_survive);
                Err(dead())
            }
        }
    }

    /// Runs an operation that cannot be done by halves.
    fn whole<T>(
        &self,
        name: &'static str,
        path: &Path,
        act: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        match self.enter(name, path)? {
            Verdict::Proceed => act(),
            Verdict::Half(kind) => Err(injected(kind)),
            Verdict::ThenDie => act().and(Err(dead())),
        }
    }

    fn handle(&self, path: &Path, file: Box<dyn FileHandle>) -> Box<dyn FileHandle> {
        Box::new(FaultFile { fs: self.clone(), path: path.to_owned(), file })
    }
}

impl State {
    #[allow(clippy::disallowed_methods)]
    fn lose_power(&mut self, entries_survive: bool) {
        for (path, synced_len) in self.unsynced_files.drain(..) {
            // A file that was removed meanwhile has nothing to lose.
            if let Ok(file) = std::fs::OpenOptions::new().write(true).open(path) {
                file.set_len(synced_len).ok();
            }
        }
        if entries_survive {
            return;
        }
        while let Some(entry) = self.unsynced_entries.pop() {
            match entry {
                Unsynced::Created(path) if path.is_dir() => std::fs::remove_dir_all(path).ok(),
                Unsynced::Created(path) => std::fs::remove_file(path).ok(),
                Unsynced::Renamed(from, to, replaced) => {
                    self.follow_rename(&to, &from);
                    std::fs::rename(&to, from).ok();
                    replaced.and_then(|bytes| std::fs::write(to, bytes).ok())
                }
            };
        }
    }

    /// Gives what is remembered about a renamed path, and about everything below it, the new name.
    fn follow_rename(&mut self, from: &Path, to: &Path) {
        let entries = self.unsynced_entries.iter_mut().map(|entry| match entry {
            Unsynced::Created(path) | Unsynced::Renamed(_, path, _) => path,
        });
        for path in entries.chain(self.unsynced_files.iter_mut().map(|(path, _)| path)) {
            if let Ok(rest) = path.strip_prefix(from) {
                *path = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            }
        }
    }

    fn forget_unsynced_entries(&mut self, folder: &Path) {
        self.unsynced_entries.retain(|entry| {
            let (Unsynced::Created(path) | Unsynced::Renamed(_, path, _)) = entry;
            path.parent() != Some(folder)
        });
    }
}

fn dead() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the process is dead")
}

fn injected(kind: io::ErrorKind) -> io::Error {
    io::Error::new(kind, format!("injected: {kind}"))
}

impl Fs for FaultFs {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.whole("create_dir_all", path, || {
            if !path.exists() {
                self.state().unsynced_entries.push(Unsynced::Created(path.to_owned()));
            }
            RealFs.create_dir_all(path)
        })
    }

    fn create_new(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        self.whole("create_new", path, || {
            let file = RealFs.create_new(path)?;
            self.state().unsynced_entries.push(Unsynced::Created(path.to_owned()));
            Ok(self.handle(path, file))
        })
    }

    fn open_append(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        self.whole("open_append", path, || {
            if !path.exists() {
                self.state().unsynced_entries.push(Unsynced::Created(path.to_owned()));
            }
            Ok(self.handle(path, RealFs.open_append(path)?))
        })
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        self.whole("open", path, || RealFs.open(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.whole("rename", from, || {
            let replaced = RealFs.read(to, u64::MAX).ok();
            RealFs.rename(from, to)?;
            let mut state = self.state();
            state.follow_rename(from, to);
            state.unsynced_entries.push(Unsynced::Renamed(from.to_owned(), to.to_owned(), replaced));
            Ok(())
        })
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.whole("sync_dir", path, || {
            RealFs.sync_dir(path)?;
            self.state().forget_unsynced_entries(path);
            Ok(())
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.whole("remove_file", path, || RealFs.remove_file(path))
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        match self.enter("remove_dir_all", path)? {
            Verdict::Proceed => RealFs.remove_dir_all(path),
            Verdict::ThenDie => RealFs.remove_dir_all(path).and(Err(dead())),
            Verdict::Half(kind) => {
                let entries = RealFs.read_dir(path)?;
                for entry in &entries[..entries.len().div_ceil(2)] {
                    let inner = path.join(&entry.name);
                    if entry.is_dir { RealFs.remove_dir_all(&inner) } else { RealFs.remove_file(&inner) }?;
                }
                Err(injected(kind))
            }
        }
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.whole("read_dir", path, || RealFs.read_dir(path))
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        self.whole("metadata", path, || RealFs.metadata(path))
    }

    fn free_bytes(&self, path: &Path) -> Option<u64> {
        let chosen = self.state().free_bytes;
        chosen.or_else(|| RealFs.free_bytes(path))
    }
}

struct FaultFile {
    fs: FaultFs,
    path: PathBuf,
    file: Box<dyn FileHandle>,
}

impl Write for FaultFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let verdict = self.fs.enter("write", &self.path)?;
        let synced_len = RealFs.metadata(&self.path).map_or(0, |metadata| metadata.len);
        let mut state = self.fs.state();
        if !state.unsynced_files.iter().any(|(path, _)| *path == self.path) {
            state.unsynced_files.push((self.path.clone(), synced_len));
        }
        drop(state);
        match verdict {
            Verdict::Proceed => self.file.write(bytes),
            Verdict::Half(kind) => {
                self.file.write_all(&bytes[..bytes.len() / 2])?;
                Err(injected(kind))
            }
            Verdict::ThenDie => self.file.write_all(bytes).and(Err(dead())),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl FileHandle for FaultFile {
    fn sync_all(&mut self) -> io::Result<()> {
        let (fs, path, file) = (&self.fs, &self.path, &mut self.file);
        fs.whole("sync_all", path, || {
            file.sync_all()?;
            fs.state().unsynced_files.retain(|(unsynced, _)| unsynced != path);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_two(fs: &FaultFs, folder: &Path) -> io::Result<()> {
        let mut file = fs.create_new(&folder.join("a"))?;
        file.write_all(b"12345678")?;
        file.sync_all()?;
        file.write_all(b"90")?;
        fs.rename(&folder.join("a"), &folder.join("b"))
    }

    fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
        let entries = RealFs.read_dir(folder).unwrap();
        let name = |entry: &Entry| entry.name.to_str().unwrap().to_owned();
        entries.iter().map(|e| (name(e), RealFs.read(&folder.join(&e.name), 100).unwrap())).collect()
    }

    #[test]
    fn a_kill_leaves_half_a_write_and_refuses_what_follows() {
        let folder = tempfile::tempdir().unwrap();
        let fs = FaultFs::with_fault(2, Fault::Kill);
        assert!(write_two(&fs, folder.path()).is_err());
        assert!(fs.fired());
        assert_eq!(files(folder.path()), [("a".to_owned(), b"1234".to_vec())]);
        assert!(fs.create_new(&folder.path().join("c")).is_err());
        assert_eq!(fs.operations().len(), 2);
    }

    #[test]
    fn an_injected_error_has_the_chosen_kind_and_is_the_only_one() {
        let folder = tempfile::tempdir().unwrap();
        let fs = FaultFs::with_fault(3, Fault::Fail(io::ErrorKind::StorageFull));
        let error = write_two(&fs, folder.path()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(fs.create_new(&folder.path().join("c")).is_ok());
    }

    #[test]
    fn a_loss_of_power_takes_unsynced_bytes_and_names() {
        for (entries_survive, expected) in
            [(true, vec![("b".to_owned(), b"12345678".to_vec())]), (false, vec![])]
        {
            let folder = tempfile::tempdir().unwrap();
            let fs = FaultFs::with_fault(6, Fault::PowerLoss { entries_survive });
            write_two(&fs, folder.path()).unwrap();
            assert!(fs.sync_dir(folder.path()).is_err());
            assert_eq!(files(folder.path()), expected);
        }
    }

    #[test]
    fn synced_bytes_and_names_survive_a_loss_of_power() {
        let folder = tempfile::tempdir().unwrap();
        let fs = FaultFs::with_fault(7, Fault::PowerLoss { entries_survive: false });
        write_two(&fs, folder.path()).unwrap();
        fs.sync_dir(folder.path()).unwrap();
        assert!(fs.sync_dir(folder.path()).is_err());
        assert_eq!(files(folder.path()), [("b".to_owned(), b"12345678".to_vec())]);
    }
}
