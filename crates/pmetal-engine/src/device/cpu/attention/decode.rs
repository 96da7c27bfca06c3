//! Few queries with many keys: keys and values are read a block at a time for all heads of a task.

use std::ops::Range;

use super::blocks::{BLOCK, Head, STRIDE, carve, mask_row, seen_by};
use super::forward::Results;
use super::math::{add_values, exp, scale_row, scores, softmax_row};
use super::{Inputs, Segment, SimdLevel};
use crate::device::cpu::gemm::buffer::Buffer;

/// Most queries of a document; beyond, tiles pay.
pub(super) const MAX_QUERIES: usize = 8;

/// Rows up to which keys and values are widened anew for each; beyond, a widened copy pays.
const MAX_ROWS_IN_PLACE: usize = 4;

/// Computes query heads, which share a kv head, for all queries of a document.
///
/// # Safety
/// The document's rows of these heads lie within the results and belong to the calling task.
pub(super) unsafe fn run(
    level: SimdLevel,
    inputs: &Inputs<'_>,
    segment: &Segment,
    heads: Range<usize>,
    results: Results,
    buffer: &mut Buffer,
) {
    let Inputs { parameters: p, q, k, v, sinks, .. } = *inputs;
    let group = heads.start / (p.query_heads / p.key_value_heads);
    let (queries, e, width) = (segment.query_length, p.key_width, p.value_width);
    let rows = heads.len() * queries;
    let [all_q, outputs, maxima, sums, weights, keys, values] =
        carve(buffer, [rows * e, rows * width, rows, rows, rows * STRIDE, BLOCK * e, BLOCK * width]);
    for head in 0..heads.len() {
        let out = &mut all_q[head * queries * e..(head + 1) * queries * e];
        Head::new(level, q, p.query_heads, e, heads.start + head).copy_rows(segment.queries(), out, e);
        scale_row(level, out, p.scale);
        let rows = head * queries..(head + 1) * queries;
        maxima[rows.clone()].fill(sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[heads.start + head]));
        sums[rows].fill(if sinks.is_some() { 1.0 } else { 0.0 });
    }
    outputs.fill(0.0);
    let k = Head::new(level, k, p.key_value_heads, e, group);
    let v = Head::new(level, v, p.key_value_heads, width, group);
    let seen = seen_by(inputs, segment, &(0..queries));
    for first in (seen.start / BLOCK * BLOCK..seen.end).step_by(BLOCK) {
        let end = segment.key_length.min(first + BLOCK);
        let tokens = segment.key_start + first..segment.key_start + end;
        let (block_keys, block_values) = if rows > MAX_ROWS_IN_PLACE {
            (k.widened(tokens.clone(), keys), v.widened(tokens, values))
        } else {
            (k.rows(tokens.clone()), v.rows(tokens))
        };
        scores(level, &all_q[..rows * e], block_keys, &mut weights[..rows * STRIDE], STRIDE);
        for (row, weights) in weights[..rows * STRIDE].chunks_exact_mut(STRIDE).enumerate() {
            let seen = segment.visible(inputs.kind, row % queries);
            let start = seen.start.clamp(first, end) - first;
            let seen = start..(seen.end.clamp(first, end) - first).max(start);
            let groups = mask_row(weights, &seen, f32::NEG_INFINITY);
            if groups.is_empty() {
                continue;
            }
            let origin = [segment.query_start + row % queries, segment.key_start + first];
            inputs.hide(origin, &seen, weights, f32::NEG_INFINITY);
            let old = maxima[row];
            let (max, sum) = softmax_row(level, &mut weights[groups], p.softcap, old);
            let factor = if max == old { 1.0 } else { exp(old - max) };
            maxima[row] = max;
            sums[row] = sums[row].mul_add(factor, sum);
            scale_row(level, &mut outputs[row * width..(row + 1) * width], factor);
        }
        add_values(level, &weights[..rows * STRIDE], STRIDE, block_values, &mut outputs[..rows * width]);
    }
    for row in 0..rows {
        let (head, token) = (heads.start + row / queries, segment.query_start + row % queries);
        let values = &mut outputs[row * width..(row + 1) * width];
        // SAFETY: granted by the caller.
        unsafe { results.store(level, p, token, head, maxima[row], sums[row], values) };
    }
}
