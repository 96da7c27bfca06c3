//! The blocks of both passes in bf16, by a matrix unit; scores and sums stay in f32, weights are rounded to bf16.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use super::backward::{Backward, Blocks, Pair, Wanted};
use super::blocks::{BLOCK, Head, STRIDE, Visible, carve, seen_by};
use super::forward::{Forward, Task};
use super::math::{Row, Seen, exp, gradient_rows, scale_row, softmax_weights};
use super::{AttentionParameters, Elements, Inputs, Segment, SimdLevel};
use crate::device::cpu::gemm::MatrixRef;
use crate::device::cpu::gemm::amx::{Left, Order, Prepared, SIDE, STEP, STEP_PAIRS, Tiles, pack};
use crate::device::cpu::gemm::buffer::Buffer;
use crate::device::cpu::gemm::kernel::Sums;

/// Panels of a block, and steps of a sum over one.
const PANELS: usize = BLOCK / SIDE;
/// Pairs of bf16 in a row of a block of weights.
const ROW_PAIRS: usize = BLOCK / 2;

/// Whether this is the way to work on these tensors. Rows of tiles see ranges of keys, not a choice of them.
pub(super) fn apply(level: SimdLevel, inputs: &Inputs<'_>, others: &[Elements<'_>]) -> bool {
    let mut tensors = [inputs.q, inputs.k, inputs.v].into_iter().chain(others.iter().copied());
    level == SimdLevel::Avx512Amx
        && inputs.chosen.is_none()
        && tensors.all(|tensor| matches!(tensor, Elements::Bf16(_)))
}

/// Steps of a sum over the elements of a head; also its panels.
fn steps(width: usize) -> usize {
    width.div_ceil(STEP)
}

/// Packs all panels of a matrix [lanes, K], `stride` pairs apart.
fn pack_panels(matrix: MatrixRef<'_>, order: Order, stride: usize, out: &mut [f32]) {
    let steps = steps(matrix.columns());
    let panels = bytemuck::cast_slice_mut::<f32, u32>(out).chunks_exact_mut(stride);
    for (panel, out) in panels.enumerate().take(matrix.rows().div_ceil(SIDE)) {
        pack(std::iter::once(matrix), panel * SIDE, 0..steps, order, out);
    }
}

/// Rows of a left operand: pairs of bf16, the rows and the steps so many pairs apart.
#[derive(Clone, Copy)]
struct Rows<'a> {
    pairs: &'a [f32],
    row: usize,
    step: usize,
}

impl<'a> Rows<'a> {
    /// A packed panel.
    fn packed(pairs: &'a [f32]) -> Self {
        Rows { pairs, row: STEP / 2, step: STEP_PAIRS }
    }

    /// Rows of a block of weights.
    fn weights(pairs: &'a [f32]) -> Self {
        Rows { pairs, row: ROW_PAIRS, step: STEP / 2 }
    }
}

/// One tile of sums, rows `stride` apart: that of the products, added to what is there if `add`.
fn multiply<T: Tiles>(
    steps: usize,
    left: Rows<'_>,
    right: &[f32],
    (sums, stride): (&mut [f32], usize),
    add: bool,
) {
    if steps == 0 {
        return;
    }
    assert!(left.pairs.len() >= (SIDE - 1) * left.row + (steps - 1) * left.step + STEP / 2);
    assert!(right.len() >= steps * STEP_PAIRS && sums.len() >= (SIDE - 1) * stride + SIDE && stride >= SIDE);
    let pointer = left.pairs.as_ptr().cast();
    let left = Left { pointer, row_stride: left.row * 4, step_stride: left.step * 4 };
    let sums = Sums { pointer: sums.as_mut_ptr(), stride, add };
    // SAFETY: the lengths were checked; every caller holds a `Prepared`.
    unsafe { T::multiply(steps, left, right.as_ptr().cast(), sums, (SIDE, SIDE)) };
}

/// The steps of a sum over a range.
fn steps_of(seen: &Range<usize>) -> Range<usize> {
    seen.start / STEP..seen.end.div_ceil(STEP)
}

/// Scores [queries, keys] of packed rows and columns, where seen.
fn multiply_scores<T: Tiles>(
    visible: &Visible,
    left: &[f32],
    right: &[f32],
    steps: usize,
    scores: &mut [f32],
) {
    let panel = steps * STEP_PAIRS;
    for i in (0..visible.queries).step_by(SIDE) {
        for j in steps_of(&visible.of_queries(i, SIDE)) {
            let left = Rows::packed(&left[i / SIDE * panel..]);
            let sums = (&mut scores[i * STRIDE + j * SIDE..], STRIDE);
            multiply::<T>(steps, left, &right[j * panel..], sums, false);
        }
    }
}

/// Adds to out [queries, width]: weights [queries, keys] times packed columns.
fn add_by_query<T: Tiles>(visible: &Visible, weights: &[f32], right: &[f32], width: usize, out: &mut [f32]) {
    for i in (0..visible.queries).step_by(SIDE) {
        let steps = steps_of(&visible.of_queries(i, SIDE));
        for j in 0..width / SIDE {
            let left = Rows::weights(&weights[i * ROW_PAIRS + steps.start * STEP / 2..]);
            let right = &right[(j * PANELS + steps.start) * STEP_PAIRS..];
            let sums = (&mut out[i * width + j * SIDE..], width);
            multiply::<T>(steps.len(), left, right, sums, true);
        }
    }
}

/// Adds to out [width, keys]: packed rows [width, queries] times packed weights [queries, keys].
fn add_by_key<T: Tiles>(
    visible: &Visible,
    keys: usize,
    left: &[f32],
    weights: &[f32],
    width: usize,
    out: &mut [f32],
) {
    for j in 0..keys.div_ceil(SIDE) {
        let steps = steps_of(&visible.of_keys(j * SIDE, SIDE));
        for i in 0..width / SIDE {
            let left = Rows::packed(&left[(i * PANELS + steps.start) * STEP_PAIRS..]);
            let right = &weights[(j * PANELS + steps.start) * STEP_PAIRS..];
            let sums = (&mut out[i * SIDE * STRIDE + j * SIDE..], STRIDE);
            multiply::<T>(steps.len(), left, right, sums, true);
        }
    }
}

/// One head's running result: row maxima, sums of exponentials, and outputs [BLOCK, width].
struct State<'a> {
    maxima: &'a mut [f32],
    sums: &'a mut [f32],
    outputs: &'a mut [f32],
    width: usize,
}

impl Forward<'_, '_> {
    /// Computes a block of queries.
    pub(super) fn tile_block<T: Tiles>(&self, task: &Task, buffer: &mut Buffer) {
        let _prepared = Prepared::<T>::new();
        let Inputs { parameters: p, q, k, v, sinks, .. } = *self.inputs;
        let Task { segment, heads, queries } = task;
        let (group, first_head, heads) = (heads.start / heads.len(), heads.start, heads.len());
        let (key_steps, width) = (steps(p.key_width), p.value_width.next_multiple_of(SIDE));
        let (key_panel, value_panel) = (key_steps * STEP_PAIRS, PANELS * STEP_PAIRS);
        let [all_q, keys, values, scores, weights, outputs, maxima, sums] = carve(
            buffer,
            [
                heads * PANELS * key_panel,
                PANELS * key_panel,
                width / SIDE * value_panel,
                BLOCK * STRIDE,
                BLOCK * ROW_PAIRS,
                heads * BLOCK * width,
                heads * BLOCK,
                heads * BLOCK,
            ],
        );
        outputs.fill(0.0);
        let tokens = segment.query_start + queries.start..segment.query_start + queries.end;
        for (head, out) in all_q.chunks_exact_mut(PANELS * key_panel).enumerate() {
            let q = Head::new(self.level, q, p.query_heads, p.key_width, first_head + head);
            pack_panels(q.matrix(tokens.clone()), Order::Lanes, key_panel, out);
            let rows = head * BLOCK..(head + 1) * BLOCK;
            maxima[rows.clone()].fill(sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[first_head + head]));
            sums[rows].fill(if sinks.is_some() { 1.0 } else { 0.0 });
        }
        let k = Head::new(self.level, k, p.key_value_heads, p.key_width, group);
        let v = Head::new(self.level, v, p.key_value_heads, p.value_width, group);
        let seen = seen_by(self.inputs, segment, queries);
        for first in (seen.start / BLOCK * BLOCK..seen.end).step_by(BLOCK) {
            let block = first..segment.key_length.min(first + BLOCK);
            let visible = Visible::new(segment, self.inputs.kind, queries.clone(), &block);
            if visible.is_empty() {
                continue;
            }
            let tokens = segment.key_start + block.start..segment.key_start + block.end;
            pack_panels(k.matrix(tokens.clone()), Order::Pairs, key_panel, keys);
            pack_panels(v.matrix(tokens).transposed(), Order::Pairs, value_panel, values);
            for head in 0..heads {
                let rows = head * BLOCK..(head + 1) * BLOCK;
                let q = &all_q[head * PANELS * key_panel..(head + 1) * PANELS * key_panel];
                multiply_scores::<T>(&visible, q, keys, key_steps, scores);
                let mut state = State {
                    maxima: &mut maxima[rows.clone()],
                    sums: &mut sums[rows],
                    outputs: &mut outputs[head * BLOCK * width..(head + 1) * BLOCK * width],
                    width,
                };
                self.weights(&visible, scores, bytemuck::cast_slice_mut(weights), &mut state);
                add_by_query::<T>(&visible, weights, values, width, state.outputs);
            }
        }
        for (at, values) in outputs.chunks_exact_mut(width).enumerate() {
            let (head, row) = (first_head + at / BLOCK, at % BLOCK);
            if row < queries.len() {
                let (token, values) = (tokens.start + row, &mut values[..p.value_width]);
                // SAFETY: the token's row of this head belongs to this task.
                unsafe { self.results.store(self.level, p, token, head, maxima[at], sums[at], values) };
            }
        }
    }

    /// Turns scores into weights relative to the new row maxima, and rescales what was summed so far.
    fn weights(&self, visible: &Visible, scores: &mut [f32], weights: &mut [bf16], state: &mut State<'_>) {
        let p = self.inputs.parameters;
        let rows = scores.chunks_exact_mut(STRIDE).zip(weights.chunks_exact_mut(BLOCK));
        for (row, (scores, weights)) in rows.enumerate().take(visible.queries) {
            let seen = visible.of(row);
            if seen.is_empty() {
                weights.fill(bf16::ZERO);
                continue;
            }
            let (scores, weights) = (row_of(scores), row_of_mut(weights));
            let (old, seen) = (state.maxima[row], (seen.start as u32, seen.end as u32));
            let (max, sum) = softmax_weights(self.level, scores, weights, seen, p.scale, p.softcap, old);
            if max == old {
                state.sums[row] += sum;
                continue;
            }
            let factor = exp(old - max);
            state.maxima[row] = max;
            state.sums[row] = state.sums[row].mul_add(factor, sum);
            scale_row(self.level, &mut state.outputs[row * state.width..(row + 1) * state.width], factor);
        }
    }
}

/// Blocks of bf16, which a matrix unit multiplies.
pub(super) struct TileBlocks<T>(PhantomData<T>);

/// What a task of [`TileBlocks`] works in: operands as packed panels, the names of gradients are those of what they
/// belong to.
pub(super) struct TileBuffers<'a> {
    q: &'a mut [f32],
    q_columns: &'a mut [f32],
    d_out: &'a mut [f32],
    d_out_columns: &'a mut [f32],
    keys: &'a mut [f32],
    key_columns: &'a mut [f32],
    values: &'a mut [f32],
    scores: &'a mut [f32],
    d_scores: &'a mut [f32],
    /// Weights and gradients of scores, packed with keys as lanes.
    weight_pairs: &'a mut [f32],
    d_score_pairs: &'a mut [f32],
    /// Gradients of scores by rows.
    d_score_rows: &'a mut [f32],
    /// [E, keys] and [V, keys], rows `STRIDE` apart.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    dq: &'a mut [f32],
}

impl<T: Tiles> Blocks for TileBlocks<T> {
    type Memory<'m> = TileBuffers<'m>;

    fn key_width(p: &AttentionParameters) -> usize {
        p.key_width.next_multiple_of(SIDE)
    }

    fn new<'m>(p: &AttentionParameters, buffer: &'m mut Buffer, held: usize) -> TileBuffers<'m> {
        let (key, value) = (steps(p.key_width), steps(p.value_width));
        let packed = |steps: usize| PANELS * steps * STEP_PAIRS;
        let (keys, values, weights, scores) = (packed(key), packed(value), packed(PANELS), BLOCK * STRIDE);
        let (dk, dv, rows) = (key * SIDE * STRIDE, value * SIDE * STRIDE, BLOCK * ROW_PAIRS);
        let sizes = [
            keys, keys, values, values, keys, keys, values, scores, scores, weights, weights, rows, dk, dv,
            held,
        ];
        let [q, q_columns, d_out, d_out_columns, keys, key_columns, values, rest @ ..] = carve(buffer, sizes);
        let [scores, d_scores, weight_pairs, d_score_pairs, d_score_rows, dk, dv, dq] = rest;
        TileBuffers {
            q,
            q_columns,
            d_out,
            d_out_columns,
            keys,
            key_columns,
            values,
            scores,
            d_scores,
            weight_pairs,
            d_score_pairs,
            d_score_rows,
            dk,
            dv,
            dq,
        }
    }

    fn dq<'s>(memory: &'s mut TileBuffers<'_>) -> &'s mut [f32] {
        memory.dq
    }

    fn load_keys(
        pass: &Backward<'_, '_>,
        segment: &Segment,
        group: usize,
        keys: &Range<usize>,
        memory: &mut TileBuffers<'_>,
    ) {
        let p = pass.inputs.parameters;
        let tokens = segment.key_start + keys.start..segment.key_start + keys.end;
        let head = |elements, width| Head::new(pass.level, elements, p.key_value_heads, width, group);
        let k = head(pass.inputs.k, p.key_width).matrix(tokens.clone());
        let v = head(pass.inputs.v, p.value_width).matrix(tokens);
        pack_panels(k, Order::Pairs, steps(p.key_width) * STEP_PAIRS, memory.keys);
        pack_panels(k.transposed(), Order::Pairs, PANELS * STEP_PAIRS, memory.key_columns);
        pack_panels(v, Order::Pairs, steps(p.value_width) * STEP_PAIRS, memory.values);
        memory.dk.fill(0.0);
        memory.dv.fill(0.0);
    }

    fn add_pair(
        pass: &Backward<'_, '_>,
        pair: &Pair<'_>,
        memory: &mut TileBuffers<'_>,
        wanted: Wanted,
        at: usize,
    ) {
        let _prepared = Prepared::<T>::new();
        let Pair { segment, group, visible, queries, keys } = *pair;
        let p = pass.inputs.parameters;
        let heads = p.query_heads / p.key_value_heads;
        let (key_steps, value_steps) = (steps(p.key_width), steps(p.value_width));
        let (key_width, value_width) = (key_steps * SIDE, value_steps * SIDE);
        let tokens = segment.query_start + queries.start..segment.query_start + queries.end;
        for in_group in 0..heads {
            let head = group * heads + in_group;
            let view = |elements, width| {
                Head::new(pass.level, elements, p.query_heads, width, head).matrix(tokens.clone())
            };
            let q = view(pass.inputs.q, p.key_width);
            let d_out = view(pass.saved.d_out, p.value_width);
            pack_panels(q, Order::Lanes, key_steps * STEP_PAIRS, memory.q);
            pack_panels(d_out, Order::Lanes, value_steps * STEP_PAIRS, memory.d_out);
            multiply_scores::<T>(visible, memory.q, memory.keys, key_steps, memory.scores);
            multiply_scores::<T>(visible, memory.d_out, memory.values, value_steps, memory.d_scores);
            differentiate(pass, pair, head, memory);
            if wanted.keys {
                let columns = PANELS * STEP_PAIRS;
                pack_panels(q.transposed(), Order::Lanes, columns, memory.q_columns);
                pack_panels(d_out.transposed(), Order::Lanes, columns, memory.d_out_columns);
                let (left, right) = (&*memory.d_out_columns, &*memory.weight_pairs);
                add_by_key::<T>(visible, keys.len(), left, right, value_width, memory.dv);
                let (left, right) = (&*memory.q_columns, &*memory.d_score_pairs);
                add_by_key::<T>(visible, keys.len(), left, right, key_width, memory.dk);
            }
            if wanted.queries {
                let dq = &mut memory.dq[at + in_group * BLOCK * key_width..];
                add_by_query::<T>(visible, memory.d_score_rows, memory.key_columns, key_width, dq);
            }
        }
    }

    fn store_keys(
        pass: &Backward<'_, '_>,
        segment: &Segment,
        group: usize,
        keys: &Range<usize>,
        memory: &mut TileBuffers<'_>,
    ) {
        let p = pass.inputs.parameters;
        let mut row = vec![0.0f32; p.key_width.max(p.value_width)];
        for key in 0..keys.len() {
            let at = (segment.key_start + keys.start + key) * p.key_value_heads + group;
            let targets =
                [(&*memory.dk, p.key_width, pass.dk, p.scale), (&*memory.dv, p.value_width, pass.dv, 1.0)];
            for (sums, width, target, scale) in targets {
                for (value, sums) in row[..width].iter_mut().zip(sums.chunks_exact(STRIDE)) {
                    *value = sums[key] * scale;
                }
                // SAFETY: the rows of this group and block belong to this task and lie within the checked tensors.
                unsafe { target.store(at * width, &row[..width]) };
            }
        }
    }
}

/// The first elements of a slice, of which there are enough.
fn row_of<T>(values: &[T]) -> &Row<T> {
    values.first_chunk().expect("invariant: a row holds a block")
}

fn row_of_mut<T>(values: &mut [T]) -> &mut Row<T> {
    values.first_chunk_mut().expect("invariant: a row holds a block")
}

/// Turns scores and gradients of probabilities into packed probabilities and gradients of scores, two rows at a time.
fn differentiate(pass: &Backward<'_, '_>, pair: &Pair<'_>, head: usize, memory: &mut TileBuffers<'_>) {
    let p = pass.inputs.parameters;
    let first_token = pair.segment.query_start + pair.queries.start;
    let weight_pairs = bytemuck::cast_slice_mut::<f32, u32>(memory.weight_pairs);
    let d_score_pairs = bytemuck::cast_slice_mut::<f32, u32>(memory.d_score_pairs);
    let rows = bytemuck::cast_slice_mut::<f32, bf16>(memory.d_score_rows).chunks_exact_mut(2 * BLOCK);
    let scores = memory.scores.chunks_exact(2 * STRIDE).zip(memory.d_scores.chunks_exact(2 * STRIDE));
    // Sums over queries run to the end of a step: rows beyond the queries see nothing.
    let used = pair.visible.queries.next_multiple_of(STEP) / 2;
    for (couple, ((scores, d_scores), rows)) in scores.zip(rows).enumerate().take(used) {
        let seen = [2 * couple, 2 * couple + 1].map(|row| {
            if row >= pair.visible.queries {
                return Seen { range: (0, 0), lse: 0.0, delta: 0.0 };
            }
            let (seen, at) = (pair.visible.of(row), (first_token + row) * p.query_heads + head);
            let range = (seen.start as u32, seen.end as u32);
            Seen { range, lse: pass.saved.lse[at], delta: pass.deltas[at] }
        });
        let (first, second) = rows.split_at_mut(BLOCK);
        let mut pairs = [[0u32; BLOCK]; 2];
        let [weights, gradients] = &mut pairs;
        gradient_rows(
            pass.level,
            [row_of(scores), row_of(&scores[STRIDE..])],
            [row_of(d_scores), row_of(&d_scores[STRIDE..])],
            seen,
            p.scale,
            p.softcap,
            [weights, gradients],
            [row_of_mut(first), row_of_mut(second)],
        );
        let within = (couple / (STEP / 2)) * STEP_PAIRS + couple % (STEP / 2) * SIDE;
        for (values, packed) in pairs.iter().zip([&mut *weight_pairs, &mut *d_score_pairs]) {
            for (panel, values) in values.chunks_exact(SIDE).enumerate() {
                packed[panel * PANELS * STEP_PAIRS + within..][..SIDE].copy_from_slice(values);
            }
        }
    }
}
