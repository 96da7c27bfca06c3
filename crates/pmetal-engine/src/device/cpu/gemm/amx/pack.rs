//! Copies of operands as the tiles read them: panels of 32 lanes, a step of 32 k at a time, in bf16.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::convert::{Element, round_to_bf16};
use super::super::matrix::{Elements, MatrixRef};
use super::tiles::{SIDE, STEP};

/// Pairs of bf16 that a panel holds for each step.
pub(in crate::device::cpu) const STEP_PAIRS: usize = SIDE * STEP / 2;

/// How a panel is laid out within a step.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::device::cpu) enum Order {
    /// Lane by lane, 16 pairs of consecutive k each: rows of the left operand.
    Lanes,
    /// Pair by pair of k, 32 lanes each: columns of the right operand.
    Pairs,
}

/// Packs 32 lanes from `first_lane` on of `sources` [lanes, K_i], each padded with zeros to whole steps, of which `steps`
/// are taken. Lanes beyond the matrices are zeros.
pub(in crate::device::cpu) fn pack<'s>(
    sources: impl Iterator<Item = MatrixRef<'s>>,
    first_lane: usize,
    steps: Range<usize>,
    order: Order,
    out: &mut [u32],
) {
    assert!(std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("f16c"));
    let mut start = 0;
    for source in sources {
        let end = start + source.columns.div_ceil(STEP);
        let (from, to) = (steps.start.max(start), steps.end.min(end));
        if from < to {
            let out = &mut out[(from - steps.start) * STEP_PAIRS..(to - steps.start) * STEP_PAIRS];
            let lanes = SIDE.min(source.rows - first_lane);
            let k = (from - start) * STEP..source.columns.min((to - start) * STEP);
            let part = source.part(first_lane..first_lane + lanes, k);
            let done = super::wide::pack_steps(part, order, out);
            let part = part.part(0..lanes, (done * STEP).min(part.columns)..part.columns);
            let out = &mut out[done * STEP_PAIRS..];
            if out.is_empty() {
                start = end;
                continue;
            }
            // SAFETY: the features were detected.
            unsafe {
                match part.elements {
                    Elements::F32(values) => pack_part(values, part, order, out),
                    Elements::Bf16(values) => pack_part(values, part, order, out),
                    Elements::F16(values) => pack_part(values, part, order, out),
                }
            }
        }
        start = end;
    }
}

/// # Safety
/// The processor has AVX2 and F16C.
#[target_feature(enable = "avx2,f16c")]
unsafe fn pack_part<E: Element>(values: &[E], part: MatrixRef<'_>, order: Order, out: &mut [u32]) {
    if part.row_stride == 1 {
        // Lanes are side by side: all of a k are taken while its cache line is at hand.
        for (step, out) in out.chunks_exact_mut(STEP_PAIRS).enumerate() {
            for k in [0, 16] {
                for lane in (0..SIDE).step_by(8) {
                    pack_block(values, part, order, lane, step * STEP + k, &mut out[place(order, lane, k)..]);
                }
            }
        }
    } else {
        for lane in (0..SIDE).step_by(8) {
            for (step, out) in out.chunks_exact_mut(STEP_PAIRS).enumerate() {
                for k in [0, 16] {
                    pack_block(values, part, order, lane, step * STEP + k, &mut out[place(order, lane, k)..]);
                }
            }
        }
    }
}

/// Where the block from `lane` and `k` of a step on starts.
fn place(order: Order, lane: usize, k: usize) -> usize {
    match order {
        Order::Lanes => lane * STEP / 2 + k / 2,
        Order::Pairs => k / 2 * SIDE + lane,
    }
}

/// Packs 8 lanes times 16 k.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn pack_block<E: Element>(
    values: &[E],
    part: MatrixRef<'_>,
    order: Order,
    lane: usize,
    k: usize,
    out: &mut [u32],
) {
    let lanes = part.rows.saturating_sub(lane).min(8);
    let length = part.columns.saturating_sub(k).min(16);
    let mut block = [_mm256_setzero_si256(); 8];
    if lanes > 0 && length > 0 {
        let first = part.offset + lane * part.row_stride + k * part.column_stride;
        let is_whole = lanes == 8 && length == 16;
        if is_whole && part.column_stride == 1 {
            for (i, vector) in block.iter_mut().enumerate() {
                let values = &values[first + i * part.row_stride..][..16];
                // SAFETY: there are sixteen values.
                *vector = unsafe { E::pairs_along(values.as_ptr()) };
            }
        } else if is_whole && part.row_stride == 1 {
            for (i, vector) in block.iter_mut().enumerate() {
                let low = first + 2 * i * part.column_stride;
                let (low, high) = (&values[low..][..8], &values[low + part.column_stride..][..8]);
                let ahead = 32 * part.column_stride;
                // SAFETY: there are eight values of each; a prefetch reads nothing.
                *vector = unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(low.as_ptr().wrapping_add(ahead).cast());
                    _mm_prefetch::<_MM_HINT_T0>(high.as_ptr().wrapping_add(ahead).cast());
                    E::pairs_across(low.as_ptr(), high.as_ptr())
                };
            }
            return store(if order == Order::Lanes { transpose(block) } else { block }, order, out);
        } else {
            block = gather(values, part, first, lanes, length);
        }
        if order == Order::Pairs {
            block = transpose(block);
        }
    }
    store(block, order, out);
}

/// The pairs of each lane, value by value.
#[target_feature(enable = "avx2,f16c")]
fn gather<E: Element>(
    values: &[E],
    part: MatrixRef<'_>,
    first: usize,
    lanes: usize,
    length: usize,
) -> [__m256i; 8] {
    let mut bits = [[0u16; 16]; 8];
    for (lane, bits) in bits.iter_mut().enumerate().take(lanes) {
        for (k, bits) in bits.iter_mut().enumerate().take(length) {
            let value = values[first + lane * part.row_stride + k * part.column_stride];
            *bits = round_to_bf16(value.widen()).to_bits();
        }
    }
    // SAFETY: a row is 32 bytes.
    bits.map(|bits| unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(block: [__m256i; 8], order: Order, out: &mut [u32]) {
    let stride = if order == Order::Lanes { STEP / 2 } else { SIDE };
    let out = &mut out[..7 * stride + 8];
    for (i, &vector) in block.iter().enumerate() {
        // SAFETY: `out` holds eight rows at the stride, the last of eight pairs.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().add(i * stride).cast(), vector) };
    }
}

/// Exchanges rows and columns of 8 x 8.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(rows: [__m256i; 8]) -> [__m256i; 8] {
    let [a, b, c, d, e, f, g, h] = rows;
    let halves = [(a, e), (b, f), (c, g), (d, h)];
    let upper = halves.map(|(x, y)| _mm256_permute2x128_si256::<0x20>(x, y));
    let lower = halves.map(|(x, y)| _mm256_permute2x128_si256::<0x31>(x, y));
    let [a, b, c, d] = transpose_halves(upper);
    let [e, f, g, h] = transpose_halves(lower);
    [a, b, c, d, e, f, g, h]
}

/// Exchanges rows and columns of 4 x 4 in each half.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_halves([a, b, c, d]: [__m256i; 4]) -> [__m256i; 4] {
    let (ab_low, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (cd_low, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(ab_low, cd_low),
        _mm256_unpackhi_epi64(ab_low, cd_low),
        _mm256_unpacklo_epi64(ab_high, cd_high),
        _mm256_unpackhi_epi64(ab_high, cd_high),
    ]
}
