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

use super::AdapterPart;
use crate::core::{ModelSource, OpenedModel};
use crate::error::{Error, Result};
use crate::models::{families, loader};

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

/// Writes a Hugging Face folder with W + s B A, computed in f32, for every adapted W. Tensors keep their type and,
/// where no adapter touches them, their bytes; block-quantised ones are expanded to f32, so that nothing is lost.
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
    let spec = families::read(&opened.config)?;
    loader::check(checkpoint, &spec, &mut Vec::new())?;
    let read = super::read(adapter, &loader::linear_shapes(&spec), &loader::expert_matrices(&spec))?;
    if let Some(name) = read.experts.keys().next() {
        let folder = adapter.display();
        return Err(Error::Usage(format!("`{folder}` adapts `{name}`: experts cannot be merged yet")));
    }
    let parts = read.linears;
    for (module, part) in &parts {
        if let Some(value) = part.a.iter().chain(&part.b).find(|value| !value.is_finite()) {
            return Err(Error::Checkpoint(format!(
                "`{}`: the adapter of `{module}` holds {value}",
                adapter.display()
            )));
        }
    }
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
        changed_tensors: parts.len(),
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
                let bytes = tensor_bytes(checkpoint, &next, &parts).map_err(Error::into_format)?;
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

fn tensor_bytes(
    checkpoint: &Checkpoint,
    tensor: &TensorSpec,
    parts: &BTreeMap<String, AdapterPart>,
) -> Result<Vec<u8>> {
    let stored = checkpoint.info(&tensor.name).map(|info| info.dtype);
    let part = tensor.name.strip_suffix(".weight").and_then(|module| parts.get(module));
    let Some(part) = part else {
        if stored == Some(tensor.dtype) {
            return Ok(checkpoint.read_bytes(&tensor.name)?);
        }
        return Ok(encode(&checkpoint.read_f32(&tensor.name)?, tensor.dtype));
    };
    let device = Device::cpu();
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    let upload =
        |shape: [usize; 2], values: &[f32]| Tensor::from_slice(&device, Category::Weights, &shape, values);
    let mut sum = upload([rows, columns], &checkpoint.read_f32(&tensor.name)?)?;
    let (a, b) = (upload([part.rank, columns], &part.a)?, upload([rows, part.rank], &part.b)?);
    let finish = Finish { scale: part.scale as f32, ..Finish::ACCUMULATE };
    let product = (Operand::plain(&b), Operand::plain(&a));
    device.kernels().matmul(&[product], &mut sum, &finish, Arithmetic::F32)?;
    let narrow = |value: f32| match tensor.dtype {
        DType::Bf16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    };
    if let Some(value) = sum.as_slice::<f32>().iter().find(|value| !narrow(**value).is_finite()) {
        let message =
            format!("tensor `{}` would hold {value}, which {} cannot carry", tensor.name, tensor.dtype);
        return Err(Error::Checkpoint(message));
    }
    Ok(encode(sum.as_slice::<f32>(), tensor.dtype))
}

fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Bf16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}
