//! Tensors that a released checkpoint stores as two, codes and scales, shown as the one that they stand for.
//!
//! FP8, as DeepSeek releases it: `x` of F8_E4M3 and `x_scale_inv`. MXFP4, as gpt-oss is released: `x_blocks` and
//! `x_scales`, of which `x` is the transpose. Sources: `integrations/finegrained_fp8.py` and `integrations/mxfp4.py` of
//! transformers 5.23.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde_json::Value;

use super::Entry;
use crate::blocks::{self, Fp8Rows, MXFP4_BYTES, MXFP4_GROUP};
use crate::safetensors::SafetensorsFile;
use crate::source::shown;
use crate::{DType, Error, Result, TensorInfo};

/// What FP8 checkpoints append to the name of a tensor for that of its scales: `x.weight_scale_inv`.
const FP8_SCALES: &str = "_scale_inv";
const MXFP4_CODES: &str = "_blocks";
const MXFP4_SCALES: &str = "_scales";
/// The block of a configuration that does not say one.
const FP8_BLOCK: [usize; 2] = [128, 128];

/// The scales of a tensor whose codes are its entry's.
#[derive(Debug)]
pub(super) struct Scales {
    file: usize,
    /// As the file describes them, under their name there.
    info: TensorInfo,
    kind: Kind,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Fp8 { block: [usize; 2] },
    Mxfp4,
}

/// What `quantization_config` of a `config.json` says.
enum Method {
    /// Rows and columns of a block; `None` for one scale a matrix.
    Fp8(Option<[usize; 2]>),
    Mxfp4,
}

/// Replaces each pair of codes and scales by the tensor that it stands for, as `config.json` of the folder says.
pub(super) fn join(folder: &Path, entries: &mut BTreeMap<String, Entry>) -> Result<()> {
    // Configurations are read where they are needed only: other folders may hold a broken one.
    let Some(packed) = entries.values().find(|entry| may_be_packed(&entry.info)) else { return Ok(()) };
    match method(folder, &packed.info)? {
        None => Ok(()),
        Some(Method::Fp8(block)) => join_fp8(folder, entries, block),
        Some(Method::Mxfp4) => join_mxfp4(folder, entries),
    }
}

/// Whether a tensor is of a kind that no unquantised model has.
fn may_be_packed(info: &TensorInfo) -> bool {
    let is_plain =
        matches!(info.dtype, DType::F64 | DType::F32 | DType::F16 | DType::Bf16 | DType::I64 | DType::Bool);
    !is_plain || info.name.ends_with(FP8_SCALES)
}

fn method(folder: &Path, packed: &TensorInfo) -> Result<Option<Method>> {
    let config = super::folder_config(folder)?.unwrap_or_default();
    let Some(fields) = config.get("quantization_config").filter(|fields| !fields.is_null()) else {
        return Ok(None);
    };
    let path = folder.join("config.json");
    let refuse = |message: String| Err(Error::unsupported(&path, message));
    let method = fields.get("quant_method").unwrap_or(&Value::Null);
    match method.as_str() {
        Some("fp8") => {}
        Some("mxfp4") => return Ok(Some(Method::Mxfp4)),
        _ => {
            return refuse(format!(
                "`quantization_config.quant_method` is {}, known are `fp8` and `mxfp4`, and tensor `{}` of shape {:?} is {}",
                value_shown(method),
                shown(&packed.name),
                packed.shape,
                packed.dtype
            ));
        }
    }
    match fields.get("expert_dtype") {
        None | Some(Value::Null) => {}
        Some(Value::String(dtype)) if dtype == "fp8" => {}
        Some(other) => {
            let other = value_shown(other);
            return refuse(format!("`quantization_config.expert_dtype` is {other}, only `fp8` is read"));
        }
    }
    let length = |value: &Value| {
        value.as_u64().and_then(|length| usize::try_from(length).ok()).filter(|&length| length > 0)
    };
    let block = match fields.get("weight_block_size") {
        None => Some(FP8_BLOCK),
        Some(Value::Null) => None,
        Some(value) => match value.as_array().map(|list| list.iter().map(length).collect::<Vec<_>>()) {
            Some(lengths) if matches!(lengths[..], [Some(_), Some(_)]) => {
                Some([lengths[0].unwrap_or(1), lengths[1].unwrap_or(1)])
            }
            _ => {
                let value = value_shown(value);
                return refuse(format!(
                    "`quantization_config.weight_block_size` is {value}, it must be two positive numbers or null"
                ));
            }
        },
    };
    Ok(Some(Method::Fp8(block)))
}

/// A value of a configuration for a message.
fn value_shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{}`", shown(text)),
        other => shown(&other.to_string()),
    }
}

fn fault<T>(folder: &Path, name: &str, message: impl Into<String>) -> Result<T> {
    Err(Error::malformed(folder, format!("tensor `{}`", shown(name)), message))
}

fn join_fp8(folder: &Path, entries: &mut BTreeMap<String, Entry>, block: Option<[usize; 2]>) -> Result<()> {
    let names: Vec<String> = entries.keys().filter(|name| name.ends_with(FP8_SCALES)).cloned().collect();
    for scales_name in names {
        let Some(scales) = entries.remove(&scales_name) else { continue };
        let name = scales_name.strip_suffix(FP8_SCALES).unwrap_or_default();
        let Some(codes) = entries.get_mut(name) else {
            let message =
                format!("these scales of shape {:?} have no tensor `{}`", scales.info.shape, shown(name));
            return fault(folder, &scales_name, message);
        };
        if codes.info.dtype != DType::F8E4m3 {
            let message = format!(
                "it has shape {:?} and dtype {}, but the scales `{}` of shape {:?} are for F8_E4M3",
                codes.info.shape,
                codes.info.dtype,
                shown(&scales_name),
                scales.info.shape
            );
            return fault(folder, name, message);
        }
        let block =
            fp8_block(&codes.info, &scales.info, block).or_else(|message| fault(folder, name, message))?;
        codes.info.dtype = DType::Fp8Blocks;
        codes.info.bytes = codes.info.bytes.saturating_add(scales.info.bytes);
        codes.scales = Some(Box::new(Scales {
            file: scales.file,
            info: TensorInfo { name: scales.stored, ..scales.info },
            kind: Kind::Fp8 { block },
        }));
        // Scales for inputs, which matter to products in eight bits alone.
        let activations = match name.strip_suffix(".weight") {
            Some(module) => format!("{module}.activation_scale"),
            None => format!("{name}_activation_scale"),
        };
        entries.remove(&activations);
    }
    match entries.values().find(|entry| matches!(entry.info.dtype, DType::F8E4m3 | DType::F8E5m2)) {
        None => Ok(()),
        Some(Entry { info, .. }) => {
            let message = format!(
                "it has shape {:?} and dtype {}, but there are no scales `{}{FP8_SCALES}`",
                info.shape,
                info.dtype,
                shown(&info.name)
            );
            fault(folder, &info.name, message)
        }
    }
}

/// The block of a tensor, of which the scales have the shape that it demands.
fn fp8_block(
    codes: &TensorInfo,
    scales: &TensorInfo,
    block: Option<[usize; 2]>,
) -> std::result::Result<[usize; 2], String> {
    if !matches!(scales.dtype, DType::F32 | DType::Bf16 | DType::F16 | DType::U8) {
        let (name, dtype) = (shown(&scales.name), scales.dtype);
        return Err(format!("its scales `{name}` are {dtype}, known are F32, BF16, F16 and U8"));
    }
    let (leading, [rows, columns]) = match codes.shape[..] {
        [rows, columns] if codes.elements() > 0 => (&codes.shape[..0], [rows, columns]),
        [_, rows, columns] if codes.elements() > 0 => (&codes.shape[..1], [rows, columns]),
        _ => return Err(format!("it has shape {:?}, not two or three dimensions", codes.shape)),
    };
    let matrices: usize = leading.iter().product();
    let Some(block) = block else {
        if scales.elements() == matrices {
            return Ok([rows, columns]);
        }
        return Err(format!(
            "it has shape {:?} and one scale a matrix, but `{}` has shape {:?}",
            codes.shape,
            shown(&scales.name),
            scales.shape
        ));
    };
    let grid = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
    if scales.shape == [leading, &grid].concat() {
        return Ok(block);
    }
    // The reference keeps a row of scales for each half of stacked gates and ups, also where both fit in one block.
    let halves = [leading, &[2, grid[1]]].concat();
    if !leading.is_empty() && grid[0] == 1 && rows.is_multiple_of(2) && scales.shape == halves {
        return Ok([rows / 2, block[1]]);
    }
    Err(format!(
        "it has shape {:?} and blocks of {block:?}, but `{}` has shape {:?}, not {:?}",
        codes.shape,
        shown(&scales.name),
        scales.shape,
        [leading, &grid].concat()
    ))
}

fn join_mxfp4(folder: &Path, entries: &mut BTreeMap<String, Entry>) -> Result<()> {
    let paired = |name: &str| -> Option<(String, &'static str)> {
        let (base, other) = match name.strip_suffix(MXFP4_CODES) {
            Some(base) => (base, MXFP4_SCALES),
            None => (name.strip_suffix(MXFP4_SCALES)?, MXFP4_CODES),
        };
        Some((base.to_owned(), other))
    };
    let names: Vec<String> = entries.keys().filter(|name| paired(name).is_some()).cloned().collect();
    for name in names {
        let Some((base, other)) = paired(&name) else { continue };
        // The second of a pair went with the first.
        let Some(one) = entries.remove(&name) else { continue };
        let other_name = format!("{base}{other}");
        let Some(two) = entries.remove(&other_name) else {
            let message =
                format!("it has shape {:?}, but there is no `{}`", one.info.shape, shown(&other_name));
            return fault(folder, &name, message);
        };
        let (codes, scales) = if other == MXFP4_SCALES { (one, two) } else { (two, one) };
        let shape = mxfp4_shape(&codes.info, &scales.info)
            .or_else(|message| fault(folder, &codes.info.name, message))?;
        let entry = Entry {
            info: TensorInfo {
                name: base.clone(),
                dtype: DType::Mxfp4,
                shape,
                offset: codes.info.offset,
                bytes: codes.info.bytes.saturating_add(scales.info.bytes),
            },
            file: codes.file,
            stored: codes.stored,
            scales: Some(Box::new(Scales {
                file: scales.file,
                info: TensorInfo { name: scales.stored, ..scales.info },
                kind: Kind::Mxfp4,
            })),
        };
        if entries.insert(base.clone(), entry).is_some() {
            return fault(folder, &base, "it is there twice, once as blocks and scales");
        }
    }
    Ok(())
}

/// \[X, D, N\] of codes \[X, N, D / 32, 16\].
fn mxfp4_shape(codes: &TensorInfo, scales: &TensorInfo) -> std::result::Result<Vec<usize>, String> {
    let is_pair = codes.dtype == DType::U8
        && scales.dtype == DType::U8
        && codes.shape.len() == 4
        && codes.shape[3] == MXFP4_BYTES
        && scales.shape == codes.shape[..3]
        && codes.elements() > 0;
    if is_pair {
        // No product of these overflows, since each code is there.
        return Ok(vec![codes.shape[0], codes.shape[2] * MXFP4_GROUP, codes.shape[1]]);
    }
    Err(format!(
        "it is {} of shape {:?} and `{}` is {} of shape {:?}, which must be U8 of [X, N, G, 16] and [X, N, G]",
        codes.dtype,
        codes.shape,
        shown(&scales.name),
        scales.dtype,
        scales.shape
    ))
}

impl Entry {
    /// The values of some of the rows of the first dimension, which the tensor has.
    pub(super) fn read_packed(
        &self,
        files: &[SafetensorsFile],
        scales: &Scales,
        range: Range<usize>,
    ) -> Result<Vec<f32>> {
        let shape = &self.info.shape;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let leading = shape.first().copied().unwrap_or(0);
        let elements = self.info.elements() / leading.max(1) * range.len();
        match scales.kind {
            Kind::Fp8 { block } if shape.len() == 2 => {
                let blocks = range.start / block[0]..range.end.div_ceil(block[0]);
                let part = Fp8Rows { first: range.start, width: shape[1], block };
                self.read_fp8(files, scales, range, blocks, leading.div_ceil(block[0]), part)
            }
            Kind::Fp8 { block } => {
                let mut values = Vec::with_capacity(elements);
                let part = Fp8Rows { first: 0, width: shape[2], block };
                for expert in range {
                    let one = expert..expert + 1;
                    values.extend(self.read_fp8(files, scales, one.clone(), one, leading, part)?);
                }
                Ok(values)
            }
            Kind::Mxfp4 => {
                let codes = read_rows(&files[self.file], &self.stored, leading, range.clone())?;
                let factors = read_rows(&files[scales.file], &scales.info.name, leading, range.clone())?;
                let mut values = vec![0.0; elements];
                let groups = [range.len(), shape[2], shape[1] / MXFP4_GROUP];
                blocks::dequantize_mxfp4(&codes, &factors, groups, &mut values)
                    .map_err(|error| error.of_tensor(&self.info.name))?;
                Ok(values)
            }
        }
    }

    /// Rows `range` of the codes with rows `blocks` of the scales, of which there are `block_rows`.
    fn read_fp8(
        &self,
        files: &[SafetensorsFile],
        scales: &Scales,
        range: Range<usize>,
        blocks: Range<usize>,
        block_rows: usize,
        part: Fp8Rows,
    ) -> Result<Vec<f32>> {
        let leading = self.info.shape.first().copied().unwrap_or(0);
        let codes = read_rows(&files[self.file], &self.stored, leading, range)?;
        let bytes = read_rows(&files[scales.file], &scales.info.name, block_rows, blocks)?;
        let count = bytes.len() / (scales.info.dtype.block_bytes() as usize).max(1);
        let mut factors = vec![0.0; count];
        if scales.info.dtype == DType::U8 {
            factors.iter_mut().zip(&bytes).for_each(|(factor, &byte)| *factor = blocks::e8m0(byte));
        } else {
            blocks::dequantize(scales.info.dtype, &bytes, &mut factors)
                .map_err(|error| error.of_tensor(&scales.info.name))?;
        }
        let mut values = vec![0.0; codes.len()];
        blocks::dequantize_fp8(&codes, &factors, part, &mut values)
            .map_err(|error| error.of_tensor(&self.info.name))?;
        Ok(values)
    }

    /// The first bytes of the codes, and behind them of the scales.
    pub(super) fn read_packed_start(
        &self,
        files: &[SafetensorsFile],
        scales: &Scales,
        count: usize,
    ) -> Result<Vec<u8>> {
        if count as u64 > self.info.bytes {
            let (name, bytes) = (shown(&self.info.name), self.info.bytes);
            return Err(Error::Conversion(format!(
                "tensor `{name}` has {bytes} bytes, {count} were asked for"
            )));
        }
        let of_codes = usize::try_from(self.info.bytes - scales.info.bytes).unwrap_or(count).min(count);
        let mut bytes = vec![0; count];
        let (codes, factors) = bytes.split_at_mut(of_codes);
        files[self.file].read_range_into(&self.stored, 0, codes)?;
        files[scales.file].read_range_into(&scales.info.name, 0, factors)?;
        Ok(bytes)
    }
}

/// The bytes of some rows of a tensor that has `leading` of them.
pub(super) fn read_rows(
    file: &SafetensorsFile,
    stored: &str,
    leading: usize,
    range: Range<usize>,
) -> Result<Vec<u8>> {
    let bytes = file.info(stored).map_or(0, |info| info.bytes) / (leading as u64).max(1);
    let length = usize::try_from(bytes).ok().and_then(|bytes| bytes.checked_mul(range.len()));
    let Some(length) = length else {
        let name = shown(stored);
        return Err(Error::unsupported(file.path(), format!("tensor `{name}` exceeds the address space")));
    };
    let mut out = vec![0; length];
    file.read_range_into(stored, bytes * range.start as u64, &mut out)?;
    Ok(out)
}
