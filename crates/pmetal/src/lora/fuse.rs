//! Merging an adapter into the weights of its base model.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use pmetal_engine::device::{Arithmetic, Finish, Operand};
use pmetal_engine::{Category, Device, Tensor};
use pmetal_formats::DType;
use pmetal_formats::atomic::DirectoryCommit;
use pmetal_formats::checkpoint::Checkpoint;
use pmetal_formats::fs::RealFs;
use pmetal_formats::safetensors::{SafetensorsWriter, TensorSpec};
use serde_json::json;

use super::{Adaptable, AdapterParts};
use crate::core::{ModelSource, OpenedModel};
use crate::error::{Error, Result};
use crate::models::loader;
use crate::models::loader::stored::StoredNames;

/// Bytes of tensors in one file of the result.
const SHARD_BYTES: u64 = 5_000_000_000;

/// What a merge wrote.
#[derive(Debug, Clone, serde::Serialize)]
pub struct FuseReport {
    /// Tensors in the result.
    pub tensors: usize,
    /// Tensors that the adapter changed.
    pub changed_tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Files that hold them.
    pub files: Vec<String>,
}

/// Writes a Hugging Face folder with W + s B A, computed in f32, for every adapted W, of every expert where those are
/// adapted. Tensors keep their names, their type and, where no adapter touches them, their bytes; block-quantised ones are expanded to f32, so that nothing is lost.
/// The folder appears complete or not at all.
///
/// # Errors
/// [`Error::Usage`] when the folder exists; [`Error::Checkpoint`] when adapter and model disagree or the adapter
/// holds a value that is not finite; what reading and writing return.
pub fn fuse(source: &ModelSource, adapter: &Path, output: &Path) -> Result<FuseReport> {
    if output.exists() {
        return Err(Error::Usage(format!("`{}` exists already", output.display())));
    }
    let opened = OpenedModel::open(source)?;
    let checkpoint = &opened.checkpoint;
    let spec = loader::spec_of(checkpoint, &opened.config)?;
    loader::check(checkpoint, &spec, &mut Vec::new())?;
    let adaptable = Adaptable::of(&spec);
    let read = super::read(adapter, &adaptable)?;
    let linears = read.linears.iter().map(|(module, part)| (module, [&part.a, &part.b]));
    let experts = read.experts.iter().map(|(name, part)| (name, [&part.a.values, &part.b.values]));
    for (module, [a, b]) in linears.chain(experts) {
        if let Some(value) = a.iter().chain(b).find(|value| !value.is_finite()) {
            return Err(Error::Checkpoint(format!(
                "`{}`: the adapter of `{module}` holds {value}",
                adapter.display()
            )));
        }
    }
    let changes = changes(checkpoint, adaptable, &read)?;
    let specs: Vec<TensorSpec> = checkpoint
        .names()
        .filter_map(|name| checkpoint.info(name))
        .map(|info| TensorSpec {
            name: info.name.clone(),
            dtype: written_type(info.dtype),
            shape: info.shape.clone(),
        })
        .collect();
    let shards = shards(specs);
    let report = FuseReport {
        tensors: shards.iter().map(Vec::len).sum(),
        changed_tensors: changes.len(),
        bytes: shards.iter().flatten().map(bytes_of).sum(),
        files: (0..shards.len()).map(|index| file_name(index, shards.len())).collect(),
    };
    let mut commit = DirectoryCommit::begin(&RealFs, output)?;
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut weight_map = BTreeMap::new();
    for (shard, file) in shards.into_iter().zip(&report.files) {
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), file.clone())));
        commit.write_with(file, |writer| {
            let mut stream = SafetensorsWriter::begin(writer, shard, &metadata)?;
            while let Some(next) = stream.next_tensor().cloned() {
                let bytes =
                    tensor_bytes(checkpoint, &next, changes.get(&next.name)).map_err(Error::into_format)?;
                stream.write_tensor(&bytes)?;
            }
            stream.finish()
        })?;
    }
    if report.files.len() > 1 {
        let index = json!({ "metadata": { "total_size": report.bytes }, "weight_map": weight_map });
        commit.write("model.safetensors.index.json", format!("{index:#}").as_bytes())?;
    }
    for (name, bytes) in opened.side_files()? {
        commit.write(&name, &bytes)?;
    }
    commit.commit()?;
    Ok(report)
}

fn written_type(stored: DType) -> DType {
    match stored {
        DType::F16 | DType::Bf16 => stored,
        _ => DType::F32,
    }
}

fn bytes_of(tensor: &TensorSpec) -> u64 {
    let element = if tensor.dtype == DType::F32 { 4 } else { 2 };
    tensor.shape.iter().map(|&size| size as u64).product::<u64>() * element
}

fn shards(specs: Vec<TensorSpec>) -> Vec<Vec<TensorSpec>> {
    let (mut shards, mut filled) = (vec![Vec::new()], 0);
    for tensor in specs {
        let bytes = bytes_of(&tensor);
        if filled + bytes > SHARD_BYTES && filled > 0 {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(last) = shards.last_mut() {
            last.push(tensor);
        }
    }
    shards
}

fn file_name(index: usize, count: usize) -> String {
    if count == 1 {
        return "model.safetensors".to_owned();
    }
    format!("model-{:05}-of-{count:05}.safetensors", index + 1)
}

/// What is added to the matrices of a stored tensor, one after the other: s B A, or its transpose.
struct Change<'a> {
    matrices: usize,
    rank: usize,
    scale: f64,
    /// Of all matrices.
    a: &'a [f32],
    b: &'a [f32],
    transposed: bool,
}

/// The tensors that an adapter changes, by the names that the checkpoint has for them.
fn changes<'a>(
    checkpoint: &Checkpoint,
    Adaptable { linears, routers, matrices }: Adaptable,
    parts: &'a AdapterParts,
) -> Result<BTreeMap<String, Change<'a>>> {
    let names = StoredNames::of(checkpoint);
    let mut changes = BTreeMap::new();
    for (module, shape) in linears.into_iter().chain(routers) {
        let Some(part) = parts.linears.get(&module) else { continue };
        let (rank, scale, a, b) = (part.rank, part.scale, &*part.a, &*part.b);
        for piece in names.pieces(&format!("{module}.weight"), &shape) {
            changes.insert(piece.name, Change { matrices: 1, rank, scale, a, b, transposed: false });
        }
    }
    for matrix in matrices {
        let Some(part) = parts.experts.get(&matrix.name) else { continue };
        let ([experts, features, width], transposed) = (matrix.sizes, matrix.transposed);
        let (rank, scale, a, b) = (part.a.shape[1], part.scale, &*part.a.values, &*part.b.values);
        let shape = if transposed { [experts, width, features] } else { matrix.sizes };
        let pieces = names.pieces(&matrix.name, &shape);
        if transposed && pieces.len() > 1 {
            let message = format!("`{}` is stored one expert at a time and transposed", matrix.name);
            return Err(Error::Checkpoint(message));
        }
        // Stored as one, or an expert after the other, each in as many parts.
        let parts_each = pieces.len() / experts;
        for (index, piece) in pieces.into_iter().enumerate() {
            let change = if parts_each == 0 || piece.shape.len() == shape.len() {
                Change { matrices: experts, rank, scale, a, b, transposed }
            } else {
                let (height, expert) = (features / parts_each, index / parts_each);
                let a = &a[expert * rank * width..][..rank * width];
                let b = &b[index * height * rank..][..height * rank];
                Change { matrices: 1, rank, scale, a, b, transposed }
            };
            changes.insert(piece.name, change);
        }
    }
    Ok(changes)
}

impl Change<'_> {
    /// Adds to one of the matrices, [rows, columns].
    fn add(&self, index: usize, [rows, columns]: [usize; 2], values: &[f32]) -> Result<Tensor> {
        let device = Device::cpu();
        let upload = |shape: [usize; 2], values: &[f32]| {
            Tensor::from_slice(&device, Category::Weights, &shape, values)
        };
        let (features, width) = if self.transposed { (columns, rows) } else { (rows, columns) };
        let [a, b] = [(self.a, width), (self.b, features)].map(|(all, size)| {
            let size = size * self.rank;
            &all[index * size..][..size]
        });
        let (a, b) = (upload([self.rank, width], a)?, upload([features, self.rank], b)?);
        let mut sum = upload([rows, columns], values)?;
        let finish = Finish { scale: self.scale as f32, ..Finish::ACCUMULATE };
        let product = match self.transposed {
            true => (Operand::transposed(&a), Operand::transposed(&b)),
            false => (Operand::plain(&b), Operand::plain(&a)),
        };
        device.kernels().matmul(&[product], &mut sum, &finish, Arithmetic::F32)?;
        Ok(sum)
    }
}

/// What is written of a tensor: its bytes, or those of its matrices with what is added, one of which is in memory at a time.
fn tensor_bytes(
    checkpoint: &Checkpoint,
    tensor: &TensorSpec,
    change: Option<&Change<'_>>,
) -> Result<Vec<u8>> {
    let Some(change) = change else {
        let stored = checkpoint.info(&tensor.name).map(|info| info.dtype);
        if stored == Some(tensor.dtype) {
            return Ok(checkpoint.read_bytes(&tensor.name)?);
        }
        return Ok(encode(&checkpoint.read_f32(&tensor.name)?, tensor.dtype));
    };
    let [.., rows, columns] = tensor.shape[..] else {
        let message = format!("tensor `{}` of shape {:?} is no matrix", tensor.name, tensor.shape);
        return Err(Error::Checkpoint(message));
    };
    let narrow = |value: f32| match tensor.dtype {
        DType::Bf16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    };
    let mut bytes = Vec::with_capacity(bytes_of(tensor) as usize);
    for index in 0..change.matrices {
        let values = match tensor.shape.len() {
            2 => checkpoint.read_f32(&tensor.name)?,
            _ => checkpoint.read_f32_rows(&tensor.name, index..index + 1)?,
        };
        let sum = change.add(index, [rows, columns], &values)?;
        let sum = sum.as_slice::<f32>();
        if let Some(value) = sum.iter().find(|value| !narrow(**value).is_finite()) {
            let (name, dtype) = (&tensor.name, tensor.dtype);
            let message = format!("tensor `{name}` would hold {value}, which {dtype} cannot carry");
            return Err(Error::Checkpoint(message));
        }
        bytes.extend(encode(sum, tensor.dtype));
    }
    Ok(bytes)
}

fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Bf16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}
