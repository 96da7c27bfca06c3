//! Tensor bytes to f32: plain floats widened, blocks dequantised.
//!
//! The f32 operations and their order are those of `gguf.quants.dequantize` of the Python package `gguf`, so the
//! results agree bit for bit. Source of the layouts: `ggml-common.h` of ggml.

mod scaled;

use half::f16;

use crate::{DType, Error, Result};

pub use scaled::{Fp8Rows, MXFP4_GROUP, dequantize_fp8, dequantize_mxfp4};
pub(crate) use scaled::{MXFP4_BYTES, e8m0};

/// Converts `bytes`, any number of whole blocks or elements of `dtype`, into `out`, one f32 per element.
///
/// # Errors
/// The lengths disagree, or the dtype is no number format: integers, and formats whose scales lie elsewhere, for which
/// there are [`dequantize_fp8`] and [`dequantize_mxfp4`].
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    if dtype.bytes_for(out.len() as u64) != Some(bytes.len() as u64) {
        let message = format!("{} bytes of {dtype} are not {} elements", bytes.len(), out.len());
        return Err(Error::Conversion(message));
    }
    match dtype {
        DType::F64 => elements(bytes, out, |raw| f64::from_le_bytes(raw) as f32),
        DType::F32 => elements(bytes, out, f32::from_le_bytes),
        DType::F16 => elements(bytes, out, |raw| f16::from_le_bytes(raw).to_f32()),
        DType::Bf16 => elements(bytes, out, |raw| f32::from_bits(u32::from(u16::from_le_bytes(raw)) << 16)),
        DType::Q4_0 => blocks::<18, 32>(bytes, out, q4_0),
        DType::Q4_1 => blocks::<20, 32>(bytes, out, q4_1),
        DType::Q5_0 => blocks::<22, 32>(bytes, out, q5_0),
        DType::Q5_1 => blocks::<24, 32>(bytes, out, q5_1),
        DType::Q8_0 => blocks::<34, 32>(bytes, out, q8_0),
        DType::Q4K => blocks::<144, 256>(bytes, out, q4_k),
        DType::Q5K => blocks::<176, 256>(bytes, out, q5_k),
        DType::Q6K => blocks::<210, 256>(bytes, out, q6_k),
        DType::I64
        | DType::I32
        | DType::I16
        | DType::I8
        | DType::U64
        | DType::U32
        | DType::U16
        | DType::U8
        | DType::Bool
        | DType::F8E4m3
        | DType::F8E5m2
        | DType::Fp8Blocks
        | DType::Mxfp4 => return Err(Error::Conversion(format!("{dtype} has no conversion to f32"))),
    }
    Ok(())
}

fn elements<const N: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    let (chunks, _) = bytes.as_chunks::<N>();
    for (value, raw) in out.iter_mut().zip(chunks) {
        *value = decode(*raw);
    }
}

fn blocks<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    let (inputs, _) = bytes.as_chunks::<BYTES>();
    let (outputs, _) = out.as_chunks_mut::<ELEMENTS>();
    for (input, output) in inputs.iter().zip(outputs) {
        decode(input, output);
    }
}

/// The f16 at byte `at`.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    for (index, &pair) in block[2..].iter().enumerate() {
        out[index] = scale * (f32::from(pair & 15) - 8.0);
        out[index + 16] = scale * (f32::from(pair >> 4) - 8.0);
    }
}

fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (index, &pair) in block[4..].iter().enumerate() {
        out[index] = scale * f32::from(pair & 15) + minimum;
        out[index + 16] = scale * f32::from(pair >> 4) + minimum;
    }
}

/// The five bits of element `index` of 32: a nibble, and one bit of a 32-bit word.
fn five_bits(nibbles: &[u8], high: u32, index: usize) -> f32 {
    let low = if index < 16 { nibbles[index] & 15 } else { nibbles[index - 16] >> 4 };
    f32::from(low | (((high >> index) & 1) as u8) << 4)
}

fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for (index, value) in out.iter_mut().enumerate() {
        *value = scale * (five_bits(&block[6..], high, index) - 16.0);
    }
}

fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for (index, value) in out.iter_mut().enumerate() {
        *value = scale * five_bits(&block[8..], high, index) + minimum;
    }
}

fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    for (value, &byte) in out.iter_mut().zip(&block[2..]) {
        *value = f32::from(byte as i8) * scale;
    }
}

/// Scale and minimum of group `group` of eight, six bits each, packed into twelve bytes.
fn scale_and_minimum(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let low = packed[group + 4];
        (low & 15 | (packed[group - 4] >> 6) << 4, low >> 4 | (packed[group] >> 6) << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let nibbles = &block[16..];
    for (group, values) in out.chunks_exact_mut(32).enumerate() {
        let (group_scale, group_minimum) = scale_and_minimum(&block[4..16], group);
        let (step, offset) = (scale * group_scale, minimum * group_minimum);
        let pairs = &nibbles[group / 2 * 32..][..32];
        let shift = group % 2 * 4;
        for (value, &pair) in values.iter_mut().zip(pairs) {
            *value = step * f32::from(pair >> shift & 15) - offset;
        }
    }
}

fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let (high, nibbles) = (&block[16..48], &block[48..]);
    for (group, values) in out.chunks_exact_mut(32).enumerate() {
        let (group_scale, group_minimum) = scale_and_minimum(&block[4..16], group);
        let (step, offset) = (scale * group_scale, minimum * group_minimum);
        let pairs = &nibbles[group / 2 * 32..][..32];
        let shift = group % 2 * 4;
        for ((value, &pair), &bits) in values.iter_mut().zip(pairs).zip(high) {
            *value = step * f32::from(pair >> shift & 15 | (bits >> group & 1) << 4) - offset;
        }
    }
}

fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let scale = half_at(block, 208);
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    for (index, value) in out.iter_mut().enumerate() {
        // Two halves of 128 elements; in each, 64 bytes of nibbles serve twice and 32 bytes of bit pairs four times.
        let (part, within) = (index / 128, index % 128);
        let nibble = low[part * 64 + within % 64] >> (within / 64 * 4) & 15;
        let pair = high[part * 32 + within % 32] >> (within / 32 * 2) & 3;
        let centred = i16::from(nibble | pair << 4) - 32;
        *value = (scale * f32::from(scales[index / 16] as i8)) * f32::from(centred);
    }
}
