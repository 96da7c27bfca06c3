//! Released checkpoints whose scales are tensors of their own: FP8 with a scale for each block, and MXFP4.
//!
//! Equal, bit for bit, to `integrations/finegrained_fp8.py` and `integrations/mxfp4.py` of transformers 5.23.

use std::num::NonZero;
use std::sync::Mutex;

use crate::{Error, Result};

/// Elements of one group of MXFP4, which share a scale; each byte holds two.
pub const MXFP4_GROUP: usize = 32;
/// Bytes of one group's codes.
pub(crate) const MXFP4_BYTES: usize = MXFP4_GROUP / 2;
/// Below this, starting threads takes longer than the work.
const ELEMENTS_WORTH_THREADS: usize = 1 << 18;
/// Elements that a thread takes at once, at least.
const ELEMENTS_AT_ONCE: usize = 1 << 15;
const MOST_THREADS: usize = 16;

/// A part of a matrix of FP8 codes: whole rows, from any row on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fp8Rows {
    /// The number of the first row in the matrix.
    pub first: usize,
    /// The length of a row.
    pub width: usize,
    /// Rows and columns that share a scale; the last ones of a matrix may be cut short.
    pub block: [usize; 2],
}

impl Fp8Rows {
    /// Rows of blocks that `rows` rows touch.
    fn block_rows(&self, rows: usize) -> Option<usize> {
        let end = (self.first % self.block[0]).checked_add(rows)?;
        Some(if rows == 0 { 0 } else { end.div_ceil(self.block[0]) })
    }
}

/// E4M3 codes times the scales of their blocks.
///
/// `scales` is row-major, and begins with the row of blocks in which the first row lies. A code that is NaN stays NaN.
///
/// # Errors
/// The lengths disagree, or a length of the block is zero.
pub fn dequantize_fp8(codes: &[u8], scales: &[f32], part: Fp8Rows, out: &mut [f32]) -> Result<()> {
    let Fp8Rows { first, width, block } = part;
    if block.contains(&0) || width == 0 {
        let message = format!("rows of {width} in blocks of {block:?} are no matrix");
        return Err(Error::Conversion(message));
    }
    let rows = codes.len() / width;
    let columns = width.div_ceil(block[1]);
    let needed = part.block_rows(rows).and_then(|count| count.checked_mul(columns));
    if rows * width != codes.len() || codes.len() != out.len() || needed != Some(scales.len()) {
        let message = format!(
            "{} bytes of FP8 in rows of {width} with {} scales of blocks of {block:?} are not {} elements",
            codes.len(),
            scales.len(),
            out.len()
        );
        return Err(Error::Conversion(message));
    }
    let table: [f32; 256] = std::array::from_fn(|code| e4m3(code as u8));
    let start = first % block[0];
    in_parallel(out, width, |row, values| {
        let codes = &codes[row * width..][..width];
        let scales = &scales[(start + row) / block[0] * columns..][..columns];
        for ((values, codes), scale) in values.chunks_mut(block[1]).zip(codes.chunks(block[1])).zip(scales) {
            for (value, &code) in values.iter_mut().zip(codes) {
                *value = table[usize::from(code)] * scale;
            }
        }
    });
    Ok(())
}

/// The value of one E4M3 code of the kind without infinities.
fn e4m3(code: u8) -> f32 {
    let (exponent, fraction) = (u32::from(code >> 3 & 15), u32::from(code & 7));
    let size = match (exponent, fraction) {
        (15, 7) => f32::NAN,
        (0, _) => fraction as f32 / 512.0,
        _ => f32::from_bits((exponent + 120) << 23 | fraction << 20),
    };
    if code & 128 == 0 { size } else { -size }
}

/// MXFP4 groups, for each expert \[N, D\] as rows of codes, to \[D, N\]: the layout that experts of gpt-oss compute with.
///
/// `codes` is \[X, N, G, 16\] and `scales` \[X, N, G\] with D = 32 G; `out` is \[X, D, N\]. The low half of a byte is the even
/// element, and a scale stands for 2^(scale - 127).
///
/// # Errors
/// The lengths disagree with `shape`, which is \[X, N, G\].
pub fn dequantize_mxfp4(codes: &[u8], scales: &[u8], shape: [usize; 3], out: &mut [f32]) -> Result<()> {
    let [experts, rows, groups] = shape;
    let count = experts.checked_mul(rows).and_then(|count| count.checked_mul(groups));
    let is_whole = count == Some(scales.len())
        && scales.len().checked_mul(MXFP4_BYTES) == Some(codes.len())
        && codes.len().checked_mul(2) == Some(out.len());
    if !is_whole {
        let message = format!(
            "{} bytes and {} scales of MXFP4 in shape {shape:?} are not {} elements",
            codes.len(),
            scales.len(),
            out.len()
        );
        return Err(Error::Conversion(message));
    }
    let (blocks, _) = codes.as_chunks::<MXFP4_BYTES>();
    in_parallel(out, MXFP4_GROUP * rows, |item, values| {
        let first = item / groups * rows * groups + item % groups;
        mxfp4_group(rows, values, |row| {
            let at = first + row * groups;
            (&blocks[at], scales[at])
        });
    });
    Ok(())
}

/// Group after group of one column of groups, written across: `out` is \[32, rows\].
fn mxfp4_group<'a>(rows: usize, out: &mut [f32], group: impl Fn(usize) -> (&'a [u8; MXFP4_BYTES], u8)) {
    /// Rows that are turned at once, one cache line of each of the 32 rows of the output.
    const TILE: usize = 16;
    /// Twice the values, so that the factor of the largest scale is finite.
    const DOUBLED: [f32; 16] =
        [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];
    let mut tile = [[0.0_f32; TILE]; MXFP4_GROUP];
    for begin in (0..rows).step_by(TILE) {
        let count = TILE.min(rows - begin);
        for column in 0..count {
            let (codes, scale) = group(begin + column);
            let half = half_scale(scale);
            for (pair, &byte) in tile.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
                pair[0][column] = DOUBLED[usize::from(byte & 15)] * half;
                pair[1][column] = DOUBLED[usize::from(byte >> 4)] * half;
            }
        }
        for (row, values) in tile.iter().zip(out.chunks_exact_mut(rows)) {
            values[begin..begin + count].copy_from_slice(&row[..count]);
        }
    }
}

/// 2^(scale - 128), which is subnormal for the two smallest scales.
fn half_scale(scale: u8) -> f32 {
    let bits = match scale {
        0 => 1 << 21,
        1 => 1 << 22,
        _ => (u32::from(scale) - 1) << 23,
    };
    f32::from_bits(bits)
}

/// 2^(scale - 127) of a scale of eight exponent bits; 255 is infinite.
pub(crate) fn e8m0(scale: u8) -> f32 {
    half_scale(scale) * 2.0
}

/// Calls `work` with the number and the part of `out` of every item, from several threads where there is enough to do.
fn in_parallel(out: &mut [f32], item: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if item == 0 || out.is_empty() {
        return;
    }
    let elements = out.len();
    let at_once = ELEMENTS_AT_ONCE.div_ceil(item);
    let queue = Mutex::new(out.chunks_mut(at_once.saturating_mul(item)).enumerate());
    let next = || queue.lock().ok()?.next();
    let drain = || {
        while let Some((number, part)) = next() {
            for (index, values) in part.chunks_mut(item).enumerate() {
                work(number * at_once + index, values);
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(MOST_THREADS);
    if elements < ELEMENTS_WORTH_THREADS || threads == 1 {
        return drain();
    }
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // Without another thread this one does all of it.
            if std::thread::Builder::new().spawn_scoped(scope, drain).is_err() {
                break;
            }
        }
        drain();
    });
}
