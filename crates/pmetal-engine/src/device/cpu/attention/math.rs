//! Exponentials and the row passes over scores: the same bits at every SIMD level, because each is the same sequence of
//! IEEE operations per element, and sums run in 16 chains.

#[cfg(target_arch = "x86_64")]
use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::blocks::BLOCK;
use crate::device::cpu::gemm::convert::Element;
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::gemm::convert::round_to_bf16;
use crate::device::cpu::gemm::{Elements, SimdLevel};
/// Scores are processed in whole groups of [`LANES`].
pub(super) use crate::device::cpu::simd::LANES;
use crate::device::cpu::simd::tree_sum;

/// Below, exp gives zero; the least normal number is exp(-87.33).
const LEAST: f32 = -87.33;

/// e^x to 2 ulp for x in [-87.33, 88], 0 below; NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 leaves n in the low bits of the sum.
    const SHIFT: f32 = 12_582_912.0;
    let clamped = if x < LEAST { LEAST } else { x };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    // ln 2 in two parts, the first with so few bits that n times it is exact.
    let r = n.mul_add(-(355.0 / 512.0), clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut series = 1.0 / 5040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = r.mul_add(series, factor);
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < LEAST { 0.0 } else { series * power }
}

/// tanh x to a few ulp.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    let magnitude = x.abs();
    let e = exp(-2.0 * magnitude);
    let far = (1.0 - e) / (1.0 + e);
    // Near zero the difference cancels; there the series converges.
    let square = x * x;
    let mut series = 62.0 / 2835.0;
    for factor in [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0] {
        series = square.mul_add(series, factor);
    }
    let near = (x * square).mul_add(series, x);
    if magnitude < 0.25 { near } else { far.copysign(x) }
}

/// Defines a function whose body is compiled once for each SIMD level and chosen by its first argument.
macro_rules! for_every_level {
    ($(#[$doc:meta])* $visibility:vis fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $visibility fn $name(level: SimdLevel, $($argument: $kind),*) $(-> $result)? {
            #[inline(always)]
            fn body($($argument: $kind),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($argument: $kind),*) $(-> $result)? { body($($argument),*) }
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($argument: $kind),*) $(-> $result)? { body($($argument),*) }
                match level {
                    // SAFETY: the level is only chosen where the processor has it.
                    SimdLevel::Avx2 => return unsafe { avx2($($argument),*) },
                    // SAFETY: as above.
                    SimdLevel::Avx512 | SimdLevel::Avx512Bf16 | SimdLevel::Avx512Amx => return unsafe { avx512($($argument),*) },
                    _ => {}
                }
            }
            let _ = level;
            body($($argument),*)
        }
    };
}

/// The greatest of 16 lanes, by halves: a chain of 16 comparisons would take longer than a row's exponentials.
#[inline(always)]
fn tree_max(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = if lanes[lane + width] > lanes[lane] { lanes[lane + width] } else { lanes[lane] };
        }
        width /= 2;
    }
    lanes[0]
}

/// Replaces whole groups of scores by exponentials: see [`softmax_row`].
#[inline(always)]
fn exponentials(scores: &mut [f32], softcap: Option<f32>, max: f32) -> (f32, f32) {
    if let Some(cap) = softcap {
        for score in scores.iter_mut() {
            let capped = cap * tanh(*score / cap);
            *score = if *score == f32::NEG_INFINITY { *score } else { capped };
        }
    }
    let mut lanes = [max; LANES];
    for group in scores.chunks_exact(LANES) {
        for (lane, &score) in lanes.iter_mut().zip(group) {
            *lane = if score > *lane { score } else { *lane };
        }
    }
    let max = tree_max(lanes);
    let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let mut lanes = [0.0f32; LANES];
    for group in scores.chunks_exact_mut(LANES) {
        for (lane, score) in lanes.iter_mut().zip(group) {
            *score = exp(*score - base);
            *lane += *score;
        }
    }
    (max, tree_sum(lanes))
}

for_every_level! {
    /// Applies the softcap, if any, to whole groups of scores, raises `max` to their maximum, replaces them by
    /// exp(score - max), and returns the new maximum and the sum. Masked scores are minus infinity and become 0.
    pub(super) fn softmax_row(scores: &mut [f32], softcap: Option<f32>, max: f32) -> (f32, f32) {
        exponentials(scores, softcap, max)
    }
}

/// A row of a block.
#[cfg(target_arch = "x86_64")]
pub(super) type Row<T> = [T; BLOCK];

/// The value where a row is seen, something else elsewhere; without branches, so that loops over it vectorise.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn where_seen(index: usize, seen: (u32, u32), value: f32, otherwise: f32) -> f32 {
    let index = index as u32;
    if (index >= seen.0) & (index < seen.1) { value } else { otherwise }
}

#[cfg(target_arch = "x86_64")]
for_every_level! {
    /// What [`softmax_row`] does to `scale` times the scores that are `seen`, all others being minus infinity, rounded to
    /// bf16 into `weights`; the sum is that of the exponentials before they are rounded. Always the whole row: its
    /// constant length costs less than the branches of a shorter one.
    pub(super) fn softmax_weights(
        scores: &Row<f32>, weights: &mut Row<bf16>, seen: (u32, u32), scale: f32, softcap: Option<f32>, max: f32,
    ) -> (f32, f32) {
        let mut row = *scores;
        for value in &mut row {
            *value *= scale;
        }
        if let Some(cap) = softcap {
            for value in &mut row {
                *value = cap * tanh(*value / cap);
            }
        }
        let mut lanes = [max; LANES];
        for (group, values) in row.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            for lane in 0..LANES {
                values[lane] = where_seen(group * LANES + lane, seen, values[lane], f32::NEG_INFINITY);
                lanes[lane] = if values[lane] > lanes[lane] { values[lane] } else { lanes[lane] };
            }
        }
        let max = tree_max(lanes);
        let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let mut lanes = [0.0f32; LANES];
        for (values, weights) in row.as_chunks::<LANES>().0.iter().zip(weights.as_chunks_mut::<LANES>().0) {
            for lane in 0..LANES {
                let value = exp(values[lane] - base);
                lanes[lane] += value;
                weights[lane] = round_to_bf16(value);
            }
        }
        (max, tree_sum(lanes))
    }
}

/// What [`gradient_rows`] reads of one row besides its scores.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Seen {
    pub(super) range: (u32, u32),
    pub(super) lse: f32,
    pub(super) delta: f32,
}

#[cfg(target_arch = "x86_64")]
for_every_level! {
    /// What [`gradient_row`] does to two rows, zeros where they are not seen, in bf16: both results as pairs of the two
    /// rows, the gradients of scores also by rows.
    pub(super) fn gradient_rows(
        scores: [&Row<f32>; 2], gradients: [&Row<f32>; 2], seen: [Seen; 2], scale: f32, softcap: Option<f32>,
        pairs: [&mut Row<u32>; 2], rows: [&mut Row<bf16>; 2],
    ) {
        let mut probabilities = [[0.0f32; BLOCK]; 2];
        let mut results = [[0.0f32; BLOCK]; 2];
        for row in 0..2 {
            let Seen { range, lse, delta } = seen[row];
            for i in 0..BLOCK {
                let score = scores[row][i] * scale;
                let probability = where_seen(i, range, exp(score - lse), 0.0);
                probabilities[row][i] = probability;
                results[row][i] = where_seen(i, range, probability * (gradients[row][i] - delta), 0.0);
            }
            if let Some(cap) = softcap {
                for i in 0..BLOCK {
                    let capped = tanh(scores[row][i] * scale / cap);
                    let probability = where_seen(i, range, exp(cap * capped - lse), 0.0);
                    let slope = probability * (gradients[row][i] - delta) * (1.0 - capped * capped);
                    probabilities[row][i] = probability;
                    results[row][i] = where_seen(i, range, slope, 0.0);
                }
            }
        }
        let pair = |values: &[Row<f32>; 2], i: usize| {
            let [low, high] = [values[0][i], values[1][i]].map(|value| u32::from(round_to_bf16(value).to_bits()));
            low | high << 16
        };
        for (values, pairs) in [&probabilities, &results].into_iter().zip(pairs) {
            for (i, out) in pairs.iter_mut().enumerate() {
                *out = pair(values, i);
            }
        }
        for (values, rows) in results.iter().zip(rows) {
            for (out, &value) in rows.iter_mut().zip(values) {
                *out = round_to_bf16(value);
            }
        }
    }
}

for_every_level! {
    /// Replaces scores, times `scale` (before the softcap), by probabilities exp(score - lse), and the gradients of the probabilities
    /// by those of the scores: `p * (gradient - delta)`, times the derivative of the softcap.
    pub(super) fn gradient_row(scores: &mut [f32], gradients: &mut [f32], scale: f32, softcap: Option<f32>, lse: f32, delta: f32) {
        match softcap {
            None => {
                for (score, gradient) in scores.iter_mut().zip(gradients) {
                    let probability = exp(*score * scale - lse);
                    *score = probability;
                    *gradient = probability * (*gradient - delta);
                }
            }
            Some(cap) => {
                for (score, gradient) in scores.iter_mut().zip(gradients) {
                    let capped = tanh(*score * scale / cap);
                    let probability = if *score == f32::NEG_INFINITY { 0.0 } else { exp(cap * capped - lse) };
                    *score = probability;
                    *gradient = probability * (*gradient - delta) * (1.0 - capped * capped);
                }
            }
        }
    }
}

for_every_level! {
    /// Multiplies each value.
    pub(super) fn scale_row(values: &mut [f32], factor: f32) {
        for value in values {
            *value *= factor;
        }
    }
}

/// The dot product in 16 chains.
#[inline(always)]
fn dot_lanes<E: Element>(left: &[f32], right: &[E]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = left.len() / LANES * LANES;
    for (left, right) in left[..whole].chunks_exact(LANES).zip(right[..whole].chunks_exact(LANES)) {
        for lane in 0..LANES {
            lanes[lane] = left[lane].mul_add(right[lane].widen(), lanes[lane]);
        }
    }
    for ((lane, left), right) in lanes.iter_mut().zip(&left[whole..]).zip(&right[whole..]) {
        *lane = left.mul_add(right.widen(), *lane);
    }
    tree_sum(lanes)
}

for_every_level! {
    /// The dot product of two rows.
    pub(super) fn dot(left: &[f32], right: &[f32]) -> f32 {
        dot_lanes(left, right)
    }
}

/// Rows of one head, `stride` elements apart, where they are.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    /// From the first row on.
    pub(super) elements: Elements<'a>,
    pub(super) stride: usize,
    pub(super) count: usize,
    pub(super) width: usize,
}

for_every_level! {
    /// The scores of each query [.., width] with each key, a row of `stride` for each query.
    pub(super) fn scores(queries: &[f32], keys: Rows<'_>, scores: &mut [f32], stride: usize) {
        match keys.elements {
            Elements::F32(elements) => scores_with(queries, keys, elements, scores, stride),
            Elements::Bf16(elements) => scores_with(queries, keys, elements, scores, stride),
            Elements::F16(elements) => scores_with(queries, keys, elements, scores, stride),
        }
    }
}

#[inline(always)]
fn scores_with<E: Element>(
    queries: &[f32],
    keys: Rows<'_>,
    elements: &[E],
    scores: &mut [f32],
    stride: usize,
) {
    for j in 0..keys.count {
        let key = &elements[j * keys.stride..][..keys.width];
        for (query, scores) in queries.chunks_exact(keys.width).zip(scores.chunks_exact_mut(stride)) {
            scores[j] = dot_lanes(query, key);
        }
    }
}

for_every_level! {
    /// Adds to each row of out [.., width] the values times the row's weights, of which there is one each.
    pub(super) fn add_values(weights: &[f32], stride: usize, values: Rows<'_>, out: &mut [f32]) {
        match values.elements {
            Elements::F32(elements) => add_values_with(weights, stride, values, elements, out),
            Elements::Bf16(elements) => add_values_with(weights, stride, values, elements, out),
            Elements::F16(elements) => add_values_with(weights, stride, values, elements, out),
        }
    }
}

#[inline(always)]
fn add_values_with<E: Element>(
    weights: &[f32],
    stride: usize,
    values: Rows<'_>,
    elements: &[E],
    out: &mut [f32],
) {
    // So many sums stay in registers over all values.
    const WIDTH: usize = 2 * LANES;
    for (weights, out) in weights.chunks_exact(stride).zip(out.chunks_exact_mut(values.width)) {
        let weights = &weights[..values.count];
        for (column, out) in out.chunks_mut(WIDTH).enumerate() {
            let column = column * WIDTH;
            if let Some(out) = out.first_chunk_mut::<WIDTH>() {
                let mut sums = *out;
                for (j, &weight) in weights.iter().enumerate() {
                    if let Some(values) = elements[j * values.stride + column..].first_chunk::<WIDTH>() {
                        for (sum, value) in sums.iter_mut().zip(values) {
                            *sum = weight.mul_add(value.widen(), *sum);
                        }
                    }
                }
                *out = sums;
            } else {
                for (j, &weight) in weights.iter().enumerate() {
                    for (sum, value) in out.iter_mut().zip(&elements[j * values.stride + column..]) {
                        *sum = weight.mul_add(value.widen(), *sum);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ulp(value: f64) -> f64 {
        let value = value as f32;
        f64::from(f32::from_bits(value.abs().to_bits() + 1) - value.abs())
    }

    #[test]
    fn exp_is_within_two_ulp_and_zero_below_the_normal_range() {
        let mut worst = 0.0f64;
        for i in 0..2_000_000 {
            let x = -87.3 + i as f32 * (175.0 / 2_000_000.0);
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - expected).abs() / ulp(expected));
        }
        assert!(worst <= 2.0, "{worst} ulp");
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_within_four_ulp() {
        let mut worst = 0.0f64;
        for i in 0..400_000 {
            let x = -10.0 + i as f32 / 20_000.0;
            let expected = f64::from(x).tanh();
            worst = worst.max((f64::from(tanh(x)) - expected).abs() / ulp(expected));
        }
        assert!(worst <= 4.0, "{worst} ulp");
    }

    #[test]
    fn row_passes_have_the_same_bits_at_every_level() {
        let row: Vec<f32> = (0..96).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
        let run = |level: SimdLevel, cap: Option<f32>| {
            let (mut scores, mut again, mut gradients) = (row.clone(), row.clone(), row.clone());
            let (max, sum) = softmax_row(level, &mut scores, cap, f32::NEG_INFINITY);
            gradient_row(level, &mut again, &mut gradients, 1.0, cap, max + 1.0, 0.25);
            let dot = dot(level, &scores[..83], &again[..83]);
            let all = scores.into_iter().chain(again).chain(gradients).chain([max, sum, dot]);
            all.map(f32::to_bits).collect::<Vec<_>>()
        };
        for level in SimdLevel::ALL.into_iter().filter(|level| level.is_available()) {
            for cap in [None, Some(3.0)] {
                assert!(run(level, cap) == run(SimdLevel::Portable, cap), "{level:?} {cap:?}");
            }
        }
    }
}
