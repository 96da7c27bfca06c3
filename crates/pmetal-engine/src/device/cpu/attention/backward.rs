use std::ops::Range;

use super::blocks::{
    BLOCK, Head, STRIDE, Target, Visible, add_by_key, add_by_query, carve, mask_row, multiply_scores, padded,
};
use super::math::{dot, gradient_row, scale_row};
use super::{AttentionParameters, Gradients, Inputs, Saved, Segment, SimdLevel};
use crate::device::cpu::gemm::buffer::with_thread_tile;
use crate::device::cpu::gemm::kernel::{self, F32Call, Kernel};
use crate::device::cpu::gemm::tasks::{Shared, for_each_index};

/// Elements of the query gradients of one group and document that a task may hold until all keys are done.
const HELD_ELEMENTS: usize = 1 << 20;

/// One unit of work for the heads of a group. The parts of a gradient are added in the same order in all of them.
enum Part {
    /// All gradients of a document: each pair of blocks is visited once.
    Document,
    /// The gradients of one block of keys and values, starting at this key.
    Keys(usize),
    /// The gradient of one block of queries, starting at this query.
    Queries(usize),
}

struct Task {
    segment: Segment,
    group: usize,
    part: Part,
}

struct Backward<'a, 'b> {
    level: SimdLevel,
    threads: usize,
    inputs: &'a Inputs<'b>,
    saved: &'a Saved<'b>,
    /// Inner product of output and its gradient, [T_q, H].
    deltas: &'a [f32],
    dq: Target,
    dk: Target,
    dv: Target,
}

pub(super) fn run(
    level: SimdLevel,
    threads: usize,
    inputs: &Inputs<'_>,
    saved: &Saved<'_>,
    gradients: &mut Gradients<'_>,
) {
    let deltas = deltas(level, threads, inputs.parameters, saved);
    if let Some(d_sinks) = &mut gradients.d_sinks {
        sink_gradients(inputs, saved, &deltas, d_sinks);
    }
    let (dq, dk, dv) =
        (Target::new(&mut gradients.dq), Target::new(&mut gradients.dk), Target::new(&mut gradients.dv));
    kernel::dispatch_f32(level, Backward { level, threads, inputs, saved, deltas: &deltas, dq, dk, dv });
}

/// The inner product of each row of the output with its gradient.
fn deltas(level: SimdLevel, threads: usize, p: &AttentionParameters, saved: &Saved<'_>) -> Vec<f32> {
    const ROWS: usize = 256;
    let count = saved.lse.len();
    let mut deltas = vec![0.0f32; count];
    let shared = Shared(deltas.as_mut_ptr());
    let out = Head::new(level, saved.out, 1, p.value_width, 0);
    let d_out = Head::new(level, saved.d_out, 1, p.value_width, 0);
    for_each_index(count.div_ceil(ROWS), threads, |next| {
        with_thread_tile(|buffer| {
            let size = ROWS * p.value_width;
            let [left, right] = carve(buffer, [size, size]);
            while let Some(index) = next.take() {
                let rows = index * ROWS..count.min((index + 1) * ROWS);
                out.copy_rows(rows.clone(), left, p.value_width);
                d_out.copy_rows(rows.clone(), right, p.value_width);
                let pairs = left.chunks_exact(p.value_width).zip(right.chunks_exact(p.value_width));
                for (row, (left, right)) in rows.zip(pairs) {
                    // SAFETY: the rows are within the vector and belong to this task.
                    unsafe { *shared.get().add(row) = dot(level, left, right) };
                }
            }
        });
    });
    deltas
}

/// A sink takes the share exp(sink - lse) of a row's probability and gives it no value.
fn sink_gradients(inputs: &Inputs<'_>, saved: &Saved<'_>, deltas: &[f32], d_sinks: &mut [f32]) {
    let heads = inputs.parameters.query_heads;
    for (head, d_sink) in d_sinks.iter_mut().enumerate() {
        let Some(sinks) = inputs.sinks else {
            *d_sink = 0.0;
            continue;
        };
        let mut sum = 0.0f64;
        for segment in inputs.segments {
            for token in segment.queries() {
                let row = token * heads + head;
                let share = f64::from(sinks[head] - saved.lse[row]).exp();
                sum -= share * f64::from(deltas[row]);
            }
        }
        *d_sink = sum as f32;
    }
}

impl F32Call for Backward<'_, '_> {
    fn run<K: Kernel<Packed = f32>>(self) {
        let p = self.inputs.parameters;
        let heads = p.query_heads / p.key_value_heads;
        let width = padded::<K>(p.key_width);
        let documents = self.inputs.segments.len() * p.key_value_heads;
        let longest = self.inputs.segments.iter().map(|segment| segment.query_length).max().unwrap_or(0);
        let held = longest.next_multiple_of(BLOCK) * heads * width;
        // Whole documents cost least; single blocks keep more threads busy.
        let whole = held <= HELD_ELEMENTS && (self.threads <= 1 || documents >= 3 * self.threads);
        let mut tasks = Vec::new();
        for segment in self.inputs.segments {
            for group in 0..p.key_value_heads {
                let mut add = |part| tasks.push(Task { segment: *segment, group, part });
                if whole {
                    add(Part::Document);
                } else {
                    (0..segment.key_length).step_by(BLOCK).for_each(|first| add(Part::Keys(first)));
                    (0..segment.query_length).step_by(BLOCK).for_each(|first| add(Part::Queries(first)));
                }
            }
        }
        for_each_index(tasks.len(), self.threads, |next| {
            with_thread_tile(|buffer| {
                let mut buffers = Buffers::new::<K>(p, carve(buffer, Buffers::sizes::<K>(p, whole, held)));
                while let Some(index) = next.take() {
                    self.task::<K>(&tasks[index], &mut buffers);
                }
            });
        });
    }
}

/// What a task works in; the names of gradients are those of what they belong to.
struct Buffers<'a> {
    q: &'a mut [f32],
    d_out: &'a mut [f32],
    keys: &'a mut [f32],
    key_columns: &'a mut [f32],
    value_columns: &'a mut [f32],
    scores: &'a mut [f32],
    d_scores: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    dq: &'a mut [f32],
    key_width: usize,
    value_width: usize,
}

impl<'a> Buffers<'a> {
    fn sizes<K: Kernel>(p: &AttentionParameters, whole: bool, held: usize) -> [usize; 10] {
        let (key, value) = (BLOCK * padded::<K>(p.key_width), BLOCK * padded::<K>(p.value_width));
        let (key_columns, value_columns) = (p.key_width * STRIDE, p.value_width * STRIDE);
        let dq = if whole { held } else { key * (p.query_heads / p.key_value_heads) };
        let scores = BLOCK * STRIDE;
        [key, value, key, key_columns, value_columns, scores, scores, key, value, dq]
    }

    fn new<K: Kernel>(p: &AttentionParameters, pieces: [&'a mut [f32]; 10]) -> Self {
        let [q, d_out, keys, key_columns, value_columns, scores, d_scores, dk, dv, dq] = pieces;
        let (key_width, value_width) = (padded::<K>(p.key_width), padded::<K>(p.value_width));
        Buffers {
            q,
            d_out,
            keys,
            key_columns,
            value_columns,
            scores,
            d_scores,
            dk,
            dv,
            dq,
            key_width,
            value_width,
        }
    }
}

/// Which gradients a visit of a pair of blocks adds to.
#[derive(Clone, Copy)]
struct Wanted {
    queries: bool,
    keys: bool,
}

impl Backward<'_, '_> {
    fn task<K: Kernel<Packed = f32>>(&self, task: &Task, buffers: &mut Buffers<'_>) {
        let Task { segment, group, part } = task;
        let p = self.inputs.parameters;
        let heads = p.query_heads / p.key_value_heads;
        let stride = BLOCK * buffers.key_width;
        match *part {
            Part::Document => {
                buffers.dq.fill(0.0);
                for first in (0..segment.key_length).step_by(BLOCK) {
                    let keys = first..segment.key_length.min(first + BLOCK);
                    self.key_block::<K>(segment, *group, keys, buffers, true);
                }
                for (index, first) in (0..segment.query_length).step_by(BLOCK).enumerate() {
                    let queries = first..segment.query_length.min(first + BLOCK);
                    for head in 0..heads {
                        self.store_queries(
                            segment,
                            *group,
                            head,
                            &queries,
                            buffers,
                            (index * heads + head) * stride,
                        );
                    }
                }
            }
            Part::Keys(first) => {
                let keys = first..segment.key_length.min(first + BLOCK);
                self.key_block::<K>(segment, *group, keys, buffers, false);
            }
            Part::Queries(first) => {
                let queries = first..segment.query_length.min(first + BLOCK);
                buffers.dq.fill(0.0);
                let seen = super::blocks::seen_by(self.inputs, segment, &queries);
                for first in (seen.start / BLOCK * BLOCK..seen.end).step_by(BLOCK) {
                    let keys = first..segment.key_length.min(first + BLOCK);
                    let visible = Visible::new(segment, p, queries.clone(), &keys);
                    if !visible.is_empty() {
                        self.load_keys(segment, *group, &keys, buffers);
                        let wanted = Wanted { queries: true, keys: false };
                        self.pairs::<K>(segment, *group, &visible, &queries, &keys, buffers, (wanted, 0));
                    }
                }
                for head in 0..heads {
                    self.store_queries(segment, *group, head, &queries, buffers, head * stride);
                }
            }
        }
    }

    /// Computes and stores the gradients of a block of keys and values; adds to those of queries if they are held.
    fn key_block<K: Kernel<Packed = f32>>(
        &self,
        segment: &Segment,
        group: usize,
        keys: Range<usize>,
        buffers: &mut Buffers<'_>,
        held: bool,
    ) {
        let p = self.inputs.parameters;
        let heads = p.query_heads / p.key_value_heads;
        buffers.dk.fill(0.0);
        buffers.dv.fill(0.0);
        self.load_keys(segment, group, &keys, buffers);
        for (index, first) in (0..segment.query_length).step_by(BLOCK).enumerate() {
            let queries = first..segment.query_length.min(first + BLOCK);
            let visible = Visible::new(segment, p, queries.clone(), &keys);
            if !visible.is_empty() {
                let wanted = Wanted { queries: held, keys: true };
                let at = if held { index * heads * BLOCK * buffers.key_width } else { 0 };
                self.pairs::<K>(segment, group, &visible, &queries, &keys, buffers, (wanted, at));
            }
        }
        for row in 0..keys.len() {
            let at = (segment.key_start + keys.start + row) * p.key_value_heads + group;
            let dk = &buffers.dk[row * buffers.key_width..][..p.key_width];
            let dv = &buffers.dv[row * buffers.value_width..][..p.value_width];
            // SAFETY: the rows of this group and block belong to this task and lie within the checked tensors.
            unsafe {
                self.dk.store(at * p.key_width, dk);
                self.dv.store(at * p.value_width, dv);
            }
        }
    }

    fn load_keys(&self, segment: &Segment, group: usize, keys: &Range<usize>, buffers: &mut Buffers<'_>) {
        let p = self.inputs.parameters;
        let k = Head::new(self.level, self.inputs.k, p.key_value_heads, p.key_width, group);
        let v = Head::new(self.level, self.inputs.v, p.key_value_heads, p.value_width, group);
        let tokens = segment.key_start + keys.start..segment.key_start + keys.end;
        k.copy_rows(tokens.clone(), buffers.keys, buffers.key_width);
        k.copy_columns(tokens.clone(), buffers.key_columns);
        v.copy_columns(tokens, buffers.value_columns);
    }

    /// Stores the gradient of a block of queries of one head of the group, which is held at `at`.
    fn store_queries(
        &self,
        segment: &Segment,
        group: usize,
        head: usize,
        queries: &Range<usize>,
        buffers: &mut Buffers<'_>,
        at: usize,
    ) {
        let p = self.inputs.parameters;
        let head = group * (p.query_heads / p.key_value_heads) + head;
        for row in 0..queries.len() {
            let values = &mut buffers.dq[at + row * buffers.key_width..][..p.key_width];
            scale_row(self.level, values, p.scale);
            let token = segment.query_start + queries.start + row;
            // SAFETY: the rows of this head and block belong to this task and lie within the checked tensor.
            unsafe { self.dq.store((token * p.query_heads + head) * p.key_width, values) };
        }
    }

    /// Adds what a pair of blocks contributes, head by head of the group; the gradients of queries are held from `at` on.
    #[expect(
        clippy::too_many_arguments,
        reason = "a pair of blocks is named by document, group, queries and keys"
    )]
    fn pairs<K: Kernel<Packed = f32>>(
        &self,
        segment: &Segment,
        group: usize,
        visible: &Visible,
        queries: &Range<usize>,
        keys: &Range<usize>,
        buffers: &mut Buffers<'_>,
        (wanted, at): (Wanted, usize),
    ) {
        let p = self.inputs.parameters;
        let heads = p.query_heads / p.key_value_heads;
        let (key_width, value_width) = (buffers.key_width, buffers.value_width);
        let tokens = segment.query_start + queries.start..segment.query_start + queries.end;
        for in_group in 0..heads {
            let head = group * heads + in_group;
            let q = Head::new(self.level, self.inputs.q, p.query_heads, p.key_width, head);
            let d_out = Head::new(self.level, self.saved.d_out, p.query_heads, p.value_width, head);
            q.copy_rows(tokens.clone(), buffers.q, key_width);
            scale_row(self.level, &mut buffers.q[..queries.len() * key_width], p.scale);
            d_out.copy_rows(tokens.clone(), buffers.d_out, value_width);
            multiply_scores::<K>(
                visible,
                (buffers.q, key_width),
                buffers.key_columns,
                p.key_width,
                buffers.scores,
            );
            multiply_scores::<K>(
                visible,
                (buffers.d_out, value_width),
                buffers.value_columns,
                p.value_width,
                buffers.d_scores,
            );
            self.differentiate(visible, tokens.start, head, buffers);
            if wanted.keys {
                add_by_key::<K>(visible, keys.len(), buffers.scores, buffers.d_out, value_width, buffers.dv);
                add_by_key::<K>(visible, keys.len(), buffers.d_scores, buffers.q, key_width, buffers.dk);
            }
            if wanted.queries {
                let dq = &mut buffers.dq[at + in_group * BLOCK * key_width..];
                add_by_query::<K>(visible, buffers.d_scores, buffers.keys, key_width, dq);
            }
        }
    }

    /// Turns scores into probabilities, and gradients of probabilities into gradients of scores.
    fn differentiate(&self, visible: &Visible, first_token: usize, head: usize, buffers: &mut Buffers<'_>) {
        let p = self.inputs.parameters;
        let rows = buffers.scores.chunks_exact_mut(STRIDE).zip(buffers.d_scores.chunks_exact_mut(STRIDE));
        for (row, (scores, d_scores)) in rows.enumerate().take(visible.queries) {
            let seen = visible.of(row);
            mask_row(d_scores, &seen, 0.0);
            let groups = mask_row(scores, &seen, f32::NEG_INFINITY);
            let at = (first_token + row) * p.query_heads + head;
            if !groups.is_empty() {
                let (scores, d_scores) = (&mut scores[groups.clone()], &mut d_scores[groups]);
                gradient_row(self.level, scores, d_scores, p.softcap, self.saved.lse[at], self.deltas[at]);
            }
        }
    }
}
