//! Folders in Hugging Face layout: one safetensors file, or shards with an index.
//!
//! Shard names come from a file and may say anything, so they must be plain names of files in the folder. The
//! files themselves may be symbolic links, as the cache of huggingface_hub makes them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use super::{Checkpoint, Entry, Files, read_text};
use crate::safetensors::SafetensorsFile;
use crate::source::{json_fault, shown};
use crate::{Error, Result, TensorInfo};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// An index of as many tensors as are allowed has about this size.
const INDEX_BYTES: u64 = 24 << 20;
/// The most tensors of an index; the largest released models list about 150 thousand.
const INDEX_TENSORS: usize = 200_000;
/// Faults of one index that are put into words.
const LISTED: usize = 10;

#[derive(Deserialize)]
struct Index {
    #[serde(deserialize_with = "weight_map")]
    weight_map: BTreeMap<String, String>,
}

/// A map from tensors to shards, in which a tensor may be listed once only.
fn weight_map<'de, D: Deserializer<'de>>(
    input: D,
) -> std::result::Result<BTreeMap<String, String>, D::Error> {
    struct Once;
    impl<'de> Visitor<'de> for Once {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            formatter.write_str("a map from tensor names to shard names")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
            let mut shards = BTreeMap::new();
            while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
                if shards.contains_key(&tensor) {
                    let name = shown(&tensor);
                    return Err(de::Error::custom(format_args!("tensor `{name}` is listed twice")));
                }
                if shards.len() == INDEX_TENSORS {
                    return Err(de::Error::custom(format_args!(
                        "more than {INDEX_TENSORS} tensors are listed"
                    )));
                }
                shards.insert(tensor, shard);
            }
            Ok(shards)
        }
    }
    input.deserialize_map(Once)
}

pub(super) fn open(folder: &Path) -> Result<Checkpoint> {
    let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
    if single.is_file() {
        return open_single(folder, &single);
    }
    if index.is_file() {
        return open_shards(folder, &index);
    }
    let names: BTreeSet<String> = std::fs::read_dir(folder)
        .map_err(Error::io("list", folder))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    for name in &names {
        if name.starts_with("pytorch_model") || name.starts_with("model.") || name.starts_with("consolidated")
        {
            super::refuse_unsafe_extension(&folder.join(name))?;
        }
    }
    let weights: Vec<_> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    match weights[..] {
        [name] => open_single(folder, &folder.join(name)),
        _ => Err(Error::malformed(folder, "", format!("the folder holds neither {SINGLE} nor {INDEX}"))),
    }
}

pub(super) fn open_single(folder: &Path, path: &Path) -> Result<Checkpoint> {
    let file = SafetensorsFile::open(path)?;
    let entries = file.tensors().iter().map(|info| (info.name.clone(), Entry::of_file(info, 0)));
    let mut entries = entries.collect();
    super::packed::join(folder, &mut entries)?;
    Ok(Checkpoint { path: folder.to_path_buf(), entries, files: Files::Folder(vec![file]) })
}

fn open_shards(folder: &Path, index_path: &Path) -> Result<Checkpoint> {
    let text = read_text(index_path, INDEX_BYTES)?.unwrap_or_default();
    let index: Index = serde_json::from_str(&text).map_err(|error| {
        let place = format!("line {}, column {}", error.line(), error.column());
        Error::malformed(index_path, place, json_fault(&error))
    })?;
    let names: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
    for name in &names {
        check_name(index_path, name)?;
    }
    let mut files = Vec::with_capacity(names.len());
    for name in &names {
        let path = folder.join(name);
        if !path.is_file() {
            let message = format!("the shard `{}` is missing", shown(name));
            return Err(Error::malformed(index_path, "weight_map", message));
        }
        files.push(SafetensorsFile::open(&path)?);
    }
    let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
    let mut faults = Vec::new();
    for (number, (name, file)) in names.iter().zip(&files).enumerate() {
        for info in file.tensors() {
            match index.weight_map.get(&info.name) {
                Some(listed) if listed == name => {
                    entries.insert(info.name.clone(), Entry::of_file(info, number));
                }
                Some(listed) => faults.push(format!(
                    "tensor `{}` is in `{name}`, and listed in `{}`",
                    shown(&info.name),
                    shown(listed)
                )),
                None => faults.push(format!("tensor `{}` of `{name}` is not listed", shown(&info.name))),
            }
        }
    }
    let absent = index.weight_map.iter().filter(|(tensor, _)| !entries.contains_key(*tensor));
    faults.extend(
        absent.map(|(tensor, shard)| format!("tensor `{}` is not in its shard `{shard}`", shown(tensor))),
    );
    if !faults.is_empty() {
        let more = faults.len().saturating_sub(LISTED);
        faults.truncate(LISTED);
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        return Err(Error::malformed(index_path, "weight_map", format!("{}{more}", faults.join("; "))));
    }
    super::packed::join(folder, &mut entries)?;
    Ok(Checkpoint { path: folder.to_path_buf(), entries, files: Files::Folder(files) })
}

impl Entry {
    /// A tensor as the file of that number holds it.
    fn of_file(info: &TensorInfo, file: usize) -> Self {
        Self { info: info.clone(), file, stored: info.name.clone(), scales: None }
    }
}

/// A shard's name must be the plain name of a safetensors file.
///
/// That alone keeps what an index says inside the folder. The file of that name may be a symbolic link to anywhere,
/// because the cache of huggingface_hub links to `../../blobs`; who placed the link chose its target.
fn check_name(index_path: &Path, name: &str) -> Result<()> {
    refuse_shard_extension(index_path, name)?;
    let plain = !name.contains(['/', '\\', ':', '\0'])
        && name != ".."
        && name.ends_with(".safetensors")
        && Path::new(name).file_name().is_some_and(|file| file == name);
    if plain {
        return Ok(());
    }
    let message = format!("the shard name `{}` is not a plain file name ending in .safetensors", shown(name));
    Err(Error::malformed(index_path, "weight_map", message))
}

/// Says why a shard that is a pickle is not read, instead of merely what its name should end in.
fn refuse_shard_extension(index_path: &Path, name: &str) -> Result<()> {
    match super::refuse_unsafe_extension(Path::new(name)) {
        Err(Error::Unsupported { message, .. }) => {
            Err(Error::unsupported(index_path, format!("shard `{}`: {message}", shown(name))))
        }
        other => other,
    }
}
