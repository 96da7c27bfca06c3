//! Attention on the CPU, forward and backward, in blocks: the scores of a block of queries and keys at a time, never
//! those of all. Blocks are fixed and their contributions added in order, so the results are bit-identical for any
//! number of threads, and at every SIMD level; but a matrix unit multiplies tensors of bf16 in tiles, with weights rounded
//! to bf16 as well.
//!
//! Letters: H query heads, K kv heads, G = H / K heads of a group, E key width, V value width, T tokens.

mod backward;
mod blocks;
mod decode;
mod forward;
mod math;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::ops::Range;

pub use super::gemm::{Elements, ElementsMut, SimdLevel};
use super::simd::level_of_products;
use crate::device::MaskKind;

/// The shape of the heads and what is done with scores.
#[derive(Clone, Copy, Debug)]
pub struct AttentionParameters {
    /// H.
    pub query_heads: usize,
    /// K, a divisor of H; H / K consecutive query heads share a kv head.
    pub key_value_heads: usize,
    /// E.
    pub key_width: usize,
    /// V.
    pub value_width: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Scores s become `cap * tanh(s / cap)`.
    pub softcap: Option<f32>,
}

/// One document: query i of it has position `i + key_length - query_length` among its keys; it sees no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Token of the first query.
    pub query_start: usize,
    /// Number of queries.
    pub query_length: usize,
    /// Token of the first key.
    pub key_start: usize,
    /// Number of keys.
    pub key_length: usize,
}

impl Segment {
    /// The keys, relative to the segment's first, that its query sees. Both ends grow with the query.
    pub(crate) fn visible(&self, kind: MaskKind, query: usize) -> Range<usize> {
        let position = (query + self.key_length) as i64 - self.query_length as i64;
        let (mut start, mut end) = (0, self.key_length as i64);
        if !kind.sees_ahead || kind.window.is_some() {
            end = end.min(position + 1);
        }
        if let Some(window) = kind.window {
            start = start.max(position + 1 - i64::try_from(window).unwrap_or(i64::MAX / 2));
        }
        if let Some(chunk) = kind.chunk {
            let chunk = i64::try_from(chunk).unwrap_or(i64::MAX / 2).max(1);
            let first = position.div_euclid(chunk) * chunk;
            start = start.max(first);
            end = end.min(first + chunk);
        }
        let end = end.max(0) as usize;
        (start as usize).min(end)..end
    }

    fn queries(&self) -> Range<usize> {
        self.query_start..self.query_start + self.query_length
    }

    fn keys(&self) -> Range<usize> {
        self.key_start..self.key_start + self.key_length
    }
}

/// What forward and backward read.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The heads.
    pub parameters: &'a AttentionParameters,
    /// Which keys of its document a query sees.
    pub kind: MaskKind,
    /// The documents, in ascending order of queries and of keys, neither overlapping.
    pub segments: &'a [Segment],
    /// Queries, [T_q, H, E].
    pub q: Elements<'a>,
    /// Keys, [T_k, K, E].
    pub k: Elements<'a>,
    /// Values, [T_k, K, V].
    pub v: Elements<'a>,
    /// One more logit per head, \[H\], that takes a share of the probability and has no value.
    pub sinks: Option<&'a [f32]>,
    /// The keys that queries look at, of those that they see; all where there are none.
    pub chosen: Option<Chosen<'a>>,
}

/// A bit for each query and key: bit k % 32 of word k / 32 of a query's row.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'a> {
    /// [T_q, words].
    pub words: &'a [u32],
    /// Words of a row.
    pub stride: usize,
}

impl Inputs<'_> {
    /// Overwrites the values, one for each key from `first_key` on, of keys that are seen but were not chosen.
    fn hide(&self, [query, first_key]: [usize; 2], seen: &Range<usize>, values: &mut [f32], hidden: f32) {
        let Some(chosen) = &self.chosen else { return };
        let row = &chosen.words[query * chosen.stride..][..chosen.stride];
        for at in seen.clone() {
            let key = first_key + at;
            if row[key / 32] >> (key % 32) & 1 == 0 {
                values[at] = hidden;
            }
        }
    }
}

/// What backward reads of the forward pass, and the gradient of its output.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// Output of the forward pass, [T_q, H, V].
    pub out: Elements<'a>,
    /// Logarithm of the denominator, [T_q, H].
    pub lse: &'a [f32],
    /// Gradient of the output, [T_q, H, V].
    pub d_out: Elements<'a>,
}

/// What backward overwrites.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// [T_q, H, E].
    pub dq: ElementsMut<'a>,
    /// [T_k, K, E].
    pub dk: ElementsMut<'a>,
    /// [T_k, K, V].
    pub dv: ElementsMut<'a>,
    /// \[H\].
    pub d_sinks: Option<&'a mut [f32]>,
}

/// Writes attention to `out` [T_q, H, V] and the logarithms of the denominators to `lse` [T_q, H].
///
/// A query that sees no key gets zeros and, without sinks, an lse of minus infinity; so do tokens of no segment. Cost:
/// 2 (E + V) flops for each visible pair of query and key and each head; workspace of a few blocks per thread. Shapes that
/// disagree are a bug of the caller and stop the program.
pub fn forward(inputs: &Inputs<'_>, out: ElementsMut<'_>, lse: &mut [f32]) {
    forward_at(level_of_products(), rayon::current_num_threads(), inputs, out, lse);
}

/// Overwrites the gradients of queries, keys, values and sinks.
///
/// Cost: 2 (3 E + 2 V) flops for each visible pair and head, or, for few long documents on many threads,
/// 2 (5 E + 2 V + ...) since scores are then computed twice; the results are the same.
pub fn backward(inputs: &Inputs<'_>, saved: &Saved<'_>, gradients: Gradients<'_>) {
    backward_at(level_of_products(), rayon::current_num_threads(), inputs, saved, gradients);
}

fn forward_at(
    level: SimdLevel,
    threads: usize,
    inputs: &Inputs<'_>,
    mut out: ElementsMut<'_>,
    lse: &mut [f32],
) {
    check(inputs, out.len(), lse.len());
    let tokens = lse.len() / inputs.parameters.query_heads.max(1);
    for gap in gaps(inputs.segments.iter().map(Segment::queries), tokens) {
        let p = inputs.parameters;
        zero(&mut out, scaled(&gap, p.query_heads * p.value_width));
        lse[scaled(&gap, p.query_heads)].fill(f32::NEG_INFINITY);
    }
    forward::run(level, threads, inputs, &mut out, lse);
}

fn backward_at(
    level: SimdLevel,
    threads: usize,
    inputs: &Inputs<'_>,
    saved: &Saved<'_>,
    mut gradients: Gradients<'_>,
) {
    let p = inputs.parameters;
    check(inputs, saved.out.len(), saved.lse.len());
    let lengths = [saved.d_out.len(), gradients.dq.len(), gradients.dk.len(), gradients.dv.len()];
    let expected = [saved.out.len(), inputs.q.len(), inputs.k.len(), inputs.v.len()];
    assert!(lengths == expected, "invariant: gradients of {lengths:?} elements for tensors of {expected:?}");
    if let Some(d_sinks) = &gradients.d_sinks {
        assert!(
            d_sinks.len() == p.query_heads,
            "invariant: {} gradients of sinks for {} heads",
            d_sinks.len(),
            p.query_heads
        );
    }
    let tokens = saved.lse.len() / p.query_heads.max(1);
    for gap in gaps(inputs.segments.iter().map(Segment::queries), tokens) {
        zero(&mut gradients.dq, scaled(&gap, p.query_heads * p.key_width));
    }
    let tokens = inputs.k.len() / (p.key_value_heads * p.key_width).max(1);
    for gap in gaps(inputs.segments.iter().map(Segment::keys), tokens) {
        zero(&mut gradients.dk, scaled(&gap, p.key_value_heads * p.key_width));
        zero(&mut gradients.dv, scaled(&gap, p.key_value_heads * p.value_width));
    }
    backward::run(level, threads, inputs, saved, &mut gradients);
}

fn check(inputs: &Inputs<'_>, out_length: usize, lse_length: usize) {
    let Inputs { parameters: p, kind: _, segments, q, k, v, sinks, chosen } = inputs;
    assert!(
        p.key_value_heads > 0 && p.query_heads > 0 && p.query_heads.is_multiple_of(p.key_value_heads),
        "invariant: {} query heads do not share {} kv heads evenly",
        p.query_heads,
        p.key_value_heads
    );
    assert!(p.key_width > 0 && p.value_width > 0, "invariant: heads of no width");
    let queries = q.len() / (p.query_heads * p.key_width);
    let keys = k.len() / (p.key_value_heads * p.key_width);
    let lengths = [q.len(), k.len(), v.len(), out_length, lse_length];
    let expected = [
        queries * p.query_heads * p.key_width,
        keys * p.key_value_heads * p.key_width,
        keys * p.key_value_heads * p.value_width,
        queries * p.query_heads * p.value_width,
        queries * p.query_heads,
    ];
    assert!(lengths == expected, "invariant: q, k, v, out, lse have {lengths:?} elements, not {expected:?}");
    if let Some(sinks) = sinks {
        assert!(sinks.len() == p.query_heads, "invariant: {} sinks for {} heads", sinks.len(), p.query_heads);
    }
    if let Some(Chosen { words, stride }) = chosen {
        assert!(
            *stride == keys.div_ceil(32) && words.len() == queries * stride,
            "invariant: {} words of {stride} for {queries} queries and {keys} keys",
            words.len()
        );
    }
    let (mut query, mut key) = (0, 0);
    for segment in *segments {
        assert!(
            segment.query_start >= query
                && segment.key_start >= key
                && segment.query_length <= queries.saturating_sub(segment.query_start)
                && segment.key_length <= keys.saturating_sub(segment.key_start),
            "invariant: {segment:?} overlaps its predecessor or does not fit {queries} queries and {keys} keys"
        );
        (query, key) = (segment.queries().end, segment.keys().end);
    }
}

/// The tokens between ascending ranges.
fn gaps(ranges: impl Iterator<Item = Range<usize>>, tokens: usize) -> Vec<Range<usize>> {
    let mut gaps = Vec::new();
    let mut next = 0;
    for range in ranges.chain(std::iter::once(tokens..tokens)) {
        if next < range.start {
            gaps.push(next..range.start);
        }
        next = range.end;
    }
    gaps
}

fn scaled(range: &Range<usize>, factor: usize) -> Range<usize> {
    range.start * factor..range.end * factor
}

fn zero(elements: &mut ElementsMut<'_>, range: Range<usize>) {
    match elements {
        ElementsMut::F32(values) => values[range].fill(0.0),
        ElementsMut::Bf16(values) => values[range].fill(half::bf16::ZERO),
    }
}
