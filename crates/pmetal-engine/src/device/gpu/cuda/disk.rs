//! Files that only save time: compiled kernels and the choice of algorithms. A file that cannot be read or written,
//! or whose contents are not what was written, counts as absent.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

const LARGEST_FILE: u64 = 256 << 20;
const HASH_BYTES: usize = 32;

/// A folder of cache files, or none.
#[derive(Debug, Clone)]
pub(super) struct DiskCache(Option<PathBuf>);

/// `$PMETAL_CACHE`, `$XDG_CACHE_HOME/pmetal` or `~/.cache/pmetal`.
pub(super) fn locate(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || set("HOME").or_else(|| set("USERPROFILE")).map(|home| home.join(".cache").join("pmetal"));
    set("PMETAL_CACHE").or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("pmetal"))).or_else(home)
}

/// Hexadecimal name of a key.
pub(super) fn hash(parts: &[&[u8]]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

impl DiskCache {
    /// Caches in this folder, which is made when first written to.
    pub(super) fn new(folder: Option<PathBuf>) -> Self {
        Self(folder)
    }

    /// The contents of a file, if they are what was written.
    pub(super) fn read(&self, name: &str) -> Option<Vec<u8>> {
        let path = self.0.as_ref()?.join(name);
        if std::fs::metadata(&path).ok()?.len() > LARGEST_FILE {
            return None;
        }
        let bytes = std::fs::read(path).ok()?;
        let (digest, contents) = bytes.split_at_checked(HASH_BYTES)?;
        (Sha256::digest(contents).as_slice() == digest).then(|| contents.to_vec())
    }

    /// Replaces a file whole. A failure is no failure of the caller: the next run computes again.
    pub(super) fn write(&self, name: &str, contents: &[u8]) {
        if let Some(folder) = &self.0 {
            let _ = write_whole(folder, name, contents);
        }
    }
}

fn write_whole(folder: &Path, name: &str, contents: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&Sha256::digest(contents))?;
    file.write_all(contents)?;
    file.persist(folder.join(name))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom};

    #[test]
    fn the_folder_is_the_first_variable_that_is_set() {
        let with = |table: &'static [(&str, &str)]| {
            locate(|name| table.iter().find(|entry| entry.0 == name).map(|entry| OsString::from(entry.1)))
        };
        assert_eq!(with(&[("PMETAL_CACHE", "/a"), ("XDG_CACHE_HOME", "/b")]), Some(PathBuf::from("/a")));
        assert_eq!(
            with(&[("PMETAL_CACHE", ""), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c")]),
            Some(PathBuf::from("/b/pmetal"))
        );
        assert_eq!(with(&[("HOME", "/c")]), Some(PathBuf::from("/c/.cache/pmetal")));
        assert_eq!(with(&[]), None);
    }

    #[test]
    fn what_was_written_is_read_and_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::new(Some(folder.path().join("inner/folder")));
        assert_eq!(cache.read("a"), None);
        cache.write("a", b"first contents");
        cache.write("b", b"");
        assert_eq!(cache.read("a").as_deref(), Some(&b"first contents"[..]));
        assert_eq!(cache.read("b").as_deref(), Some(&b""[..]));
        cache.write("a", b"second");
        assert_eq!(cache.read("a").as_deref(), Some(&b"second"[..]));
        assert_eq!(std::fs::read_dir(folder.path().join("inner/folder")).unwrap().count(), 2);
    }

    #[test]
    fn damaged_and_truncated_files_count_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::new(Some(folder.path().to_path_buf()));
        for damage in 0..3 {
            cache.write("a", b"some contents");
            #[allow(clippy::disallowed_methods)]
            let mut file = std::fs::OpenOptions::new().write(true).open(folder.path().join("a")).unwrap();
            match damage {
                0 => file.set_len(40).unwrap(),
                1 => file.set_len(7).unwrap(),
                _ => {
                    file.seek(SeekFrom::Start(35)).unwrap();
                    file.write_all(b"X").unwrap();
                }
            }
            assert_eq!(cache.read("a"), None);
        }
    }

    #[test]
    fn without_a_folder_or_where_none_can_be_made_nothing_is_kept() {
        let cache = DiskCache::new(None);
        cache.write("a", b"x");
        assert_eq!(cache.read("a"), None);
        let file = tempfile::NamedTempFile::new().unwrap();
        let cache = DiskCache::new(Some(file.path().join("below-a-file")));
        cache.write("a", b"x");
        assert_eq!(cache.read("a"), None);
    }

    #[test]
    fn parts_of_a_key_do_not_run_into_each_other() {
        assert_ne!(hash(&[b"ab", b"c"]), hash(&[b"a", b"bc"]));
        assert_eq!(hash(&[b"ab"]).len(), 32);
    }
}
