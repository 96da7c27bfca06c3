//! The one door to the file system for everything that this project writes.
//!
//! Code that writes takes a `&dyn Fs`, so that a test can count its operations and fail or kill it at any of them
//! ([`fault::FaultFs`]). `clippy.toml` bans the functions of `std` that would go around it.
#![allow(clippy::disallowed_methods)] // the place where those functions belong

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

pub mod fault;

/// An open file that is being written.
pub trait FileHandle: Write + Send {
    /// Returns once the bytes written so far would survive a loss of power.
    ///
    /// # Errors
    /// The operating system's. After an error nothing may be assumed about what reached the disk.
    fn sync_all(&mut self) -> io::Result<()>;
}

/// What [`Fs::read_dir`] says of one entry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The last component of its path.
    pub name: OsString,
    /// Whether it is a folder; a link to a folder is not.
    pub is_dir: bool,
}

/// What [`Fs::metadata`] says of a path, links followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    /// Bytes of a file.
    pub len: u64,
    /// Whether it is a folder.
    pub is_dir: bool,
}

/// The operations on files that this project needs.
///
/// Errors are the operating system's; callers add the path and the action, see [`crate::Error::io`].
#[allow(clippy::missing_errors_doc)]
pub trait Fs: Send + Sync {
    /// Creates a folder and those above it; one that exists is fine.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Creates a file for writing; fails if anything has that name.
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn FileHandle>>;
    /// Opens a file for writing at its end, creating it when absent.
    fn open_append(&self, path: &Path) -> io::Result<Box<dyn FileHandle>>;
    /// Opens a file for reading.
    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + Send>>;
    /// Gives a file or folder another name in the same file system, atomically; replaces a file of that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Returns once creations and renames inside the folder would survive a loss of power.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a folder and what is in it; links are removed, not followed.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// The entries of a folder, sorted by name.
    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>>;
    /// Length and kind of a file or folder.
    fn metadata(&self, path: &Path) -> io::Result<Metadata>;
    /// Bytes that this user may still write to the file system that holds `path`; `None` where that is not known.
    fn free_bytes(&self, path: &Path) -> Option<u64>;

    /// Whether something that can be looked at has that name.
    fn exists(&self, path: &Path) -> bool {
        self.metadata(path).is_ok()
    }

    /// A whole file of at most `limit_bytes`; a longer one is refused before more is read.
    fn read(&self, path: &Path, limit_bytes: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(path)?.take(limit_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit_bytes {
            let message = format!("longer than the {limit_bytes} bytes that are allowed here");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
        }
        Ok(bytes)
    }
}

/// The file system of the machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealFs;

impl FileHandle for File {
    fn sync_all(&mut self) -> io::Result<()> {
        File::sync_all(self)
    }
}

impl Fs for RealFs {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)
    }

    fn create_new(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        Ok(Box::new(File::create_new(path)?))
    }

    fn open_append(&self, path: &Path) -> io::Result<Box<dyn FileHandle>> {
        Ok(Box::new(OpenOptions::new().append(true).create(true).open(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(File::open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        // Windows has no such operation: a folder cannot be opened as a file there.
        if cfg!(windows) { Ok(()) } else { File::open(or_here(path))?.sync_all() }
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir_all(path)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(or_here(path))? {
            let entry = entry?;
            entries.push(Entry { name: entry.file_name(), is_dir: entry.file_type()?.is_dir() });
        }
        entries.sort();
        Ok(entries)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        let metadata = std::fs::metadata(path)?;
        Ok(Metadata { len: metadata.len(), is_dir: metadata.is_dir() })
    }

    #[cfg(unix)]
    fn free_bytes(&self, path: &Path) -> Option<u64> {
        // The folder may not exist yet: its nearest ancestor lies on the same file system.
        let existing = path.ancestors().map(or_here).find(|ancestor| ancestor.exists())?;
        let status = rustix::fs::statvfs(existing).ok()?;
        Some(status.f_bavail.saturating_mul(status.f_frsize))
    }

    #[cfg(not(unix))]
    fn free_bytes(&self, _path: &Path) -> Option<u64> {
        None
    }
}

/// The parent of `file.txt` is the empty path, which no system call accepts.
fn or_here(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_longer_than_the_limit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, [7; 10]).unwrap();
        assert_eq!(RealFs.read(&path, 10).unwrap(), [7; 10]);
        assert_eq!(RealFs.read(&path, 9).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn folders_are_listed_in_the_order_of_names() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b", "a", "c"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        RealFs.create_dir_all(&folder.path().join("aa/deep")).unwrap();
        let entries = RealFs.read_dir(folder.path()).unwrap();
        let names: Vec<_> = entries.iter().map(|entry| entry.name.to_str().unwrap()).collect();
        assert_eq!(names, ["a", "aa", "b", "c"]);
        assert!(entries[1].is_dir && !entries[0].is_dir);
    }

    #[test]
    fn create_new_never_replaces_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        RealFs.create_new(&path).unwrap().write_all(b"one").unwrap();
        assert!(RealFs.create_new(&path).is_err());
        RealFs.open_append(&path).unwrap().write_all(b" two").unwrap();
        assert_eq!(RealFs.read(&path, 100).unwrap(), b"one two");
    }

    #[test]
    #[cfg(unix)]
    fn free_space_is_known_for_a_folder_that_does_not_exist_yet() {
        let folder = tempfile::tempdir().unwrap();
        assert!(RealFs.free_bytes(&folder.path().join("not/yet")).unwrap() > 0);
        assert!(RealFs.free_bytes(Path::new("not-yet")).unwrap() > 0);
    }
}
