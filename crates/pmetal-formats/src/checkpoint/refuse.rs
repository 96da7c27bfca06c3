//! Refuses formats that can run code or that this program does not read, by extension and by first bytes.

use std::path::Path;

use crate::source::Source;
use crate::{Error, Result};

const PICKLE: &str = "this is a pickle file, which can run any code when it is opened, so it is never read; convert it to \
                      safetensors where you trust it, for example with `save_pretrained(..., safe_serialization=True)` \
                      of transformers";
const ARCHIVE: &str = "this is a zip archive, as PyTorch writes around a pickle that can run any code when it is \
                       opened, so it is never read; convert the model to safetensors where you trust it, for example \
                       with `save_pretrained(..., safe_serialization=True)` of transformers";
const NUMPY: &str = "this is a NumPy file, which may hold a pickle that can run any code when it is opened, so it is \
                     never read; convert it to safetensors, for example with `safetensors.numpy.save_file`";
const HDF5: &str = "this is an HDF5 file, which this program does not read; convert it to safetensors, for example \
                    with `save_pretrained(..., safe_serialization=True)` of transformers";

/// Refuses a path by its extension, before the file is opened.
pub(crate) fn refuse_unsafe_extension(path: &Path) -> Result<()> {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let reason = match extension.to_ascii_lowercase().as_str() {
        "bin" | "pt" | "pth" | "ckpt" | "pkl" | "pickle" => PICKLE,
        "zip" => ARCHIVE,
        "npz" | "npy" => NUMPY,
        "h5" | "hdf5" | "keras" => HDF5,
        _ => return Ok(()),
    };
    Err(Error::unsupported(path, reason))
}

/// Refuses a file by its first bytes.
///
/// Only for a file that was found not to be what its name says: a safetensors file whose header has 640 bytes starts
/// like a pickle of protocol 2.
pub(crate) fn refuse_unsafe_magic(source: &Source) -> Result<()> {
    let mut start = [0_u8; 8];
    let known = start.len().min(usize::try_from(source.length).unwrap_or(usize::MAX));
    source.read_exact_at(0, &mut start[..known], "first bytes")?;
    let reason = match start {
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => ARCHIVE,
        [0x89, b'H', b'D', b'F', b'\r', b'\n', 0x1a, b'\n'] => HDF5,
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => NUMPY,
        [0x80, 2..=5, ..] => PICKLE,
        _ => return Ok(()),
    };
    Err(Error::unsupported(&source.path, reason))
}
