use std::ops::Range;

use super::blocks::{
    BLOCK, Head, STRIDE, Target, Visible, add_by_query, carve, mask_row, multiply_scores, padded, seen_by,
};
use super::math::{exp, scale_row, softmax_row};
use super::{ElementsMut, Inputs, Segment, SimdLevel, decode};
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::gemm::amx::{Amx, Tiles};
use crate::device::cpu::gemm::buffer::{Buffer, with_thread_tile};
use crate::device::cpu::gemm::kernel::{self, F32Call, Kernel};
use crate::device::cpu::gemm::tasks::{Shared, for_each_index};

/// Where results go.
#[derive(Clone, Copy)]
pub(super) struct Results {
    pub(super) out: Target,
    pub(super) lse: Shared<f32>,
}

/// A block of queries of one document and the heads of one group; queries are relative to the document.
pub(super) struct Task {
    pub(super) segment: Segment,
    /// Query heads that share a kv head; all of them, unless the queries are few.
    pub(super) heads: Range<usize>,
    pub(super) queries: Range<usize>,
}

pub(super) struct Forward<'a, 'b> {
    pub(super) level: SimdLevel,
    pub(super) threads: usize,
    pub(super) inputs: &'a Inputs<'b>,
    pub(super) results: Results,
}

pub(super) fn run(
    level: SimdLevel,
    threads: usize,
    inputs: &Inputs<'_>,
    out: &mut ElementsMut<'_>,
    lse: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if super::tiles::apply(level, inputs, &[]) {
        return run_tiles::<Amx>(level, threads, inputs, out, lse);
    }
    let results = Results { out: Target::new(out), lse: Shared(lse.as_mut_ptr()) };
    kernel::dispatch_f32(level, Forward { level, threads, inputs, results });
}

/// Does what [`run`] does for tensors of bf16, in tiles of `T`.
#[cfg(target_arch = "x86_64")]
pub(super) fn run_tiles<T: Tiles>(
    level: SimdLevel,
    threads: usize,
    inputs: &Inputs<'_>,
    out: &mut ElementsMut<'_>,
    lse: &mut [f32],
) {
    let results = Results { out: Target::new(out), lse: Shared(lse.as_mut_ptr()) };
    let forward = Forward { level, threads, inputs, results };
    forward.for_each_task(|task, buffer| forward.tile_block::<T>(task, buffer));
}

impl F32Call for Forward<'_, '_> {
    fn run<K: Kernel<Packed = f32>>(self) {
        self.for_each_task(|task, buffer| self.block::<K>(task, buffer));
    }
}

impl Forward<'_, '_> {
    /// Runs `block` on every task of more than a few queries.
    pub(super) fn for_each_task(&self, block: impl Fn(&Task, &mut Buffer) + Sync) {
        let p = self.inputs.parameters;
        let group_heads = p.query_heads / p.key_value_heads;
        let mut tasks = Vec::new();
        // Heads of a group share what is read, but rather keep every thread busy.
        let few = self.inputs.segments.len() * p.key_value_heads < 4 * self.threads;
        for segment in self.inputs.segments {
            if (1..=decode::MAX_QUERIES).contains(&segment.query_length) {
                let heads = if few && self.threads > 1 { 1 } else { group_heads };
                for first in (0..p.query_heads).step_by(heads) {
                    let (heads, queries) = (first..first + heads, 0..segment.query_length);
                    tasks.push(Task { segment: *segment, heads, queries });
                }
                continue;
            }
            // The last queries see most keys, so they come first.
            for first in (0..segment.query_length).step_by(BLOCK).rev() {
                let queries = first..segment.query_length.min(first + BLOCK);
                for group in 0..p.key_value_heads {
                    let heads = group * group_heads..(group + 1) * group_heads;
                    tasks.push(Task { segment: *segment, heads, queries: queries.clone() });
                }
            }
        }
        for_each_index(tasks.len(), self.threads, |next| {
            with_thread_tile(|buffer| {
                while let Some(index) = next.take() {
                    let task = &tasks[index];
                    if task.segment.query_length <= decode::MAX_QUERIES {
                        // SAFETY: the task's rows of the results are its own, and were checked to lie within them.
                        unsafe {
                            decode::run(
                                self.level,
                                self.inputs,
                                &task.segment,
                                task.heads.clone(),
                                self.results,
                                buffer,
                            )
                        };
                    } else {
                        block(task, buffer);
                    }
                }
            });
        });
    }
}

/// One head's running result: row maxima, sums of exponentials, and outputs [BLOCK, V padded].
struct State<'a> {
    maxima: &'a mut [f32],
    sums: &'a mut [f32],
    outputs: &'a mut [f32],
}

impl Forward<'_, '_> {
    fn block<K: Kernel<Packed = f32>>(&self, task: &Task, buffer: &mut Buffer) {
        let Inputs { parameters: p, q, k, v, sinks, .. } = *self.inputs;
        let Task { segment, heads, queries } = task;
        let heads = heads.len();
        let group = task.heads.start / heads;
        let (e, width) = (p.key_width, padded::<K>(p.value_width));
        let [all_q, outputs, maxima, sums, columns, values, scores] = carve(
            buffer,
            [
                heads * BLOCK * e,
                heads * BLOCK * width,
                heads * BLOCK,
                heads * BLOCK,
                e * STRIDE,
                BLOCK * width,
                BLOCK * STRIDE,
            ],
        );
        outputs.fill(0.0);
        for (head, out) in all_q.chunks_exact_mut(BLOCK * e).enumerate() {
            let head = group * heads + head;
            let tokens = segment.query_start + queries.start..segment.query_start + queries.end;
            Head::new(self.level, q, p.query_heads, e, head).copy_rows(tokens, out, e);
            scale_row(self.level, &mut out[..queries.len() * e], p.scale);
        }
        for head in 0..heads {
            let rows = head * BLOCK..(head + 1) * BLOCK;
            maxima[rows.clone()].fill(sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[group * heads + head]));
            sums[rows].fill(if sinks.is_some() { 1.0 } else { 0.0 });
        }
        let k = Head::new(self.level, k, p.key_value_heads, e, group);
        let v = Head::new(self.level, v, p.key_value_heads, p.value_width, group);
        let seen = seen_by(self.inputs, segment, queries);
        for first in (seen.start / BLOCK * BLOCK..seen.end).step_by(BLOCK) {
            let keys = first..segment.key_length.min(first + BLOCK);
            let visible = Visible::new(segment, self.inputs.kind, queries.clone(), &keys);
            if visible.is_empty() {
                continue;
            }
            let tokens = segment.key_start + keys.start..segment.key_start + keys.end;
            k.copy_columns(tokens.clone(), columns);
            v.copy_rows(tokens, values, width);
            for head in 0..heads {
                let rows = head * BLOCK..(head + 1) * BLOCK;
                let q = &all_q[head * BLOCK * e..(head + 1) * BLOCK * e];
                multiply_scores::<K>(&visible, (q, e), columns, e, scores);
                let mut state = State {
                    maxima: &mut maxima[rows.clone()],
                    sums: &mut sums[rows],
                    outputs: &mut outputs[head * BLOCK * width..(head + 1) * BLOCK * width],
                };
                let origin = [segment.query_start + queries.start, segment.key_start + keys.start];
                self.softmax(&visible, origin, scores, &mut state, width);
                add_by_query::<K>(&visible, scores, values, width, state.outputs);
            }
        }
        for head in 0..heads {
            for row in 0..queries.len() {
                let token = segment.query_start + queries.start + row;
                let at = head * BLOCK + row;
                let values = &mut outputs[at * width..at * width + p.value_width];
                // SAFETY: the token's row of this head belongs to this task.
                unsafe {
                    self.results.store(
                        self.level,
                        p,
                        token,
                        group * heads + head,
                        maxima[at],
                        sums[at],
                        values,
                    )
                };
            }
        }
    }

    /// Turns scores into weights relative to the new row maxima, and rescales what was summed so far.
    fn softmax(
        &self,
        visible: &Visible,
        [first_query, first_key]: [usize; 2],
        scores: &mut [f32],
        state: &mut State<'_>,
        width: usize,
    ) {
        for (row, scores) in scores.chunks_exact_mut(STRIDE).enumerate().take(visible.queries) {
            let seen = visible.of(row);
            let groups = mask_row(scores, &seen, f32::NEG_INFINITY);
            if groups.is_empty() {
                continue;
            }
            self.inputs.hide([first_query + row, first_key], &seen, scores, f32::NEG_INFINITY);
            let old = state.maxima[row];
            let (max, sum) =
                softmax_row(self.level, &mut scores[groups], self.inputs.parameters.softcap, old);
            if max == old {
                state.sums[row] += sum;
                continue;
            }
            let factor = exp(old - max);
            state.maxima[row] = max;
            state.sums[row] = state.sums[row].mul_add(factor, sum);
            scale_row(self.level, &mut state.outputs[row * width..(row + 1) * width], factor);
        }
    }
}

impl Results {
    /// Stores the row of a head: `values` divided by the sum of exponentials relative to `max`, and its logarithm.
    ///
    /// # Safety
    /// The row lies within the results and belongs to the calling task.
    #[expect(clippy::too_many_arguments, reason = "one row is named by token and head, and has three parts")]
    pub(super) unsafe fn store(
        self,
        level: SimdLevel,
        p: &super::AttentionParameters,
        token: usize,
        head: usize,
        max: f32,
        sum: f32,
        values: &mut [f32],
    ) {
        let row = token * p.query_heads + head;
        let is_empty = sum == 0.0;
        scale_row(level, values, if is_empty { 0.0 } else { 1.0 / sum });
        // SAFETY: granted by the caller.
        unsafe {
            self.out.store(row * p.value_width, values);
            *self.lse.get().add(row) = if is_empty { f32::NEG_INFINITY } else { max + sum.ln() };
        }
    }
}
