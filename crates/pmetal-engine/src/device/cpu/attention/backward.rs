use std::marker::PhantomData;
use std::ops::Range;

use super::blocks::{
    BLOCK, Head, STRIDE, Target, Visible, add_by_key, add_by_query, carve, mask_row, multiply_scores, padded,
};
use super::math::{dot, gradient_row, scale_row};
use super::{AttentionParameters, Gradients, Inputs, Saved, Segment, SimdLevel};
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::gemm::amx::Amx;
use crate::device::cpu::gemm::buffer::{Buffer, with_thread_tile};
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

pub(super) struct Backward<'a, 'b> {
    pub(super) level: SimdLevel,
    pub(super) threads: usize,
    pub(super) inputs: &'a Inputs<'b>,
    pub(super) saved: &'a Saved<'b>,
    /// Inner product of output and its gradient, [T_q, H].
    pub(super) deltas: &'a [f32],
    dq: Target,
    pub(super) dk: Target,
    pub(super) dv: Target,
}

/// The heads of a group with a block of queries and one of keys, both relative to the document.
pub(super) struct Pair<'a> {
    pub(super) segment: &'a Segment,
    pub(super) group: usize,
    pub(super) visible: &'a Visible,
    pub(super) queries: &'a Range<usize>,
    pub(super) keys: &'a Range<usize>,
}

/// The blocks that a task works in, and how they are multiplied.
pub(super) trait Blocks {
    /// What a thread works in; `held` elements of query gradients.
    type Memory<'m>;

    /// The width of a head of queries, padded.
    fn key_width(p: &AttentionParameters) -> usize;

    fn new<'m>(p: &AttentionParameters, buffer: &'m mut Buffer, held: usize) -> Self::Memory<'m>;

    /// The gradients of queries.
    fn dq<'s>(memory: &'s mut Self::Memory<'_>) -> &'s mut [f32];

    /// Reads a block of keys and values and clears its gradients.
    fn load_keys(
        pass: &Backward<'_, '_>,
        segment: &Segment,
        group: usize,
        keys: &Range<usize>,
        memory: &mut Self::Memory<'_>,
    );

    /// Adds what a pair of blocks contributes, head by head of the group; the gradients of queries are held from `at` on.
    fn add_pair(
        pass: &Backward<'_, '_>,
        pair: &Pair<'_>,
        memory: &mut Self::Memory<'_>,
        wanted: Wanted,
        at: usize,
    );

    /// Stores the gradients of a block of keys and values.
    fn store_keys(
        pass: &Backward<'_, '_>,
        segment: &Segment,
        group: usize,
        keys: &Range<usize>,
        memory: &mut Self::Memory<'_>,
    );
}

pub(super) fn run(
    level: SimdLevel,
    threads: usize,
    inputs: &Inputs<'_>,
    saved: &Saved<'_>,
    gradients: &mut Gradients<'_>,
) {
    with_pass(level, threads, inputs, saved, gradients, |pass| {
        #[cfg(target_arch = "x86_64")]
        if super::tiles::apply(level, inputs, &[saved.d_out]) {
            return pass.run_tasks::<super::tiles::TileBlocks<Amx>>();
        }
        kernel::dispatch_f32(level, pass);
    });
}

/// Calls `then` with what all tasks share.
pub(super) fn with_pass(
    level: SimdLevel,
    threads: usize,
    inputs: &Inputs<'_>,
    saved: &Saved<'_>,
    gradients: &mut Gradients<'_>,
    then: impl FnOnce(Backward<'_, '_>),
) {
    let deltas = deltas(level, threads, inputs.parameters, saved);
    if let Some(d_sinks) = &mut gradients.d_sinks {
        sink_gradients(inputs, saved, &deltas, d_sinks);
    }
    let (dq, dk, dv) =
        (Target::new(&mut gradients.dq), Target::new(&mut gradients.dk), Target::new(&mut gradients.dv));
    then(Backward { level, threads, inputs, saved, deltas: &deltas, dq, dk, dv });
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
        self.run_tasks::<F32Blocks<K>>();
    }
}

impl Backward<'_, '_> {
    /// Computes all gradients of queries, keys and values.
    pub(super) fn run_tasks<B: Blocks>(&self) {
        let p = self.inputs.parameters;
        let heads = p.query_heads / p.key_value_heads;
        let width = B::key_width(p);
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
                let held = if whole { held } else { BLOCK * heads * width };
                let mut memory = B::new(p, buffer, held);
                while let Some(index) = next.take() {
                    self.task::<B>(&tasks[index], &mut memory);
                }
            });
        });
    }
}

/// What a task of [`F32Blocks`] works in; the names of gradients are those of what they belong to.
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

/// Blocks of f32, which a kernel multiplies.
struct F32Blocks<K>(PhantomData<K>);

/// Which gradients a visit of a pair of blocks adds to.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub(super) queries: bool,
    pub(super) keys: bool,
}

impl Backward<'_, '_> {
    fn task<B: Blocks>(&self, task: &Task, memory: &mut B::Memory<'_>) {
        let Task { segment, group, part } = task;
        let p = self.inputs.parameters;
        let heads = p.query_heads / p.key_value_heads;
        let stride = BLOCK * B::key_width(p);
        match *part {
            Part::Document => {
                B::dq(memory).fill(0.0);
                for first in (0..segment.key_length).step_by(BLOCK) {
                    let keys = first..segment.key_length.min(first + BLOCK);
                    self.key_block::<B>(segment, *group, keys, memory, true);
                }
                for (index, first) in (0..segment.query_length).step_by(BLOCK).enumerate() {
                    let queries = first..segment.query_length.min(first + BLOCK);
                    for head in 0..heads {
                        let dq = &mut B::dq(memory)[(index * heads + head) * stride..];
                        self.store_queries::<B>(segment, group * heads + head, &queries, dq);
                    }
                }
            }
            Part::Keys(first) => {
                let keys = first..segment.key_length.min(first + BLOCK);
                self.key_block::<B>(segment, *group, keys, memory, false);
            }
            Part::Queries(first) => {
                let queries = first..segment.query_length.min(first + BLOCK);
                B::dq(memory).fill(0.0);
                let seen = super::blocks::seen_by(self.inputs, segment, &queries);
                for first in (seen.start / BLOCK * BLOCK..seen.end).step_by(BLOCK) {
                    let keys = first..segment.key_length.min(first + BLOCK);
                    let visible = &Visible::new(segment, self.inputs.kind, queries.clone(), &keys);
                    if !visible.is_empty() {
                        B::load_keys(self, segment, *group, &keys, memory);
                        let pair = Pair { segment, group: *group, visible, queries: &queries, keys: &keys };
                        B::add_pair(self, &pair, memory, Wanted { queries: true, keys: false }, 0);
                    }
                }
                for head in 0..heads {
                    let dq = &mut B::dq(memory)[head * stride..];
                    self.store_queries::<B>(segment, group * heads + head, &queries, dq);
                }
            }
        }
    }

    /// Computes and stores the gradients of a block of keys and values; adds to those of queries if they are held.
    fn key_block<B: Blocks>(
        &self,
        segment: &Segment,
        group: usize,
        keys: Range<usize>,
        memory: &mut B::Memory<'_>,
        held: bool,
    ) {
        let p = self.inputs.parameters;
        let heads = p.query_heads / p.key_value_heads;
        B::load_keys(self, segment, group, &keys, memory);
        for (index, first) in (0..segment.query_length).step_by(BLOCK).enumerate() {
            let queries = first..segment.query_length.min(first + BLOCK);
            let visible = &Visible::new(segment, self.inputs.kind, queries.clone(), &keys);
            if !visible.is_empty() {
                let wanted = Wanted { queries: held, keys: true };
                let at = if held { index * heads * BLOCK * B::key_width(p) } else { 0 };
                let pair = Pair { segment, group, visible, queries: &queries, keys: &keys };
                B::add_pair(self, &pair, memory, wanted, at);
            }
        }
        B::store_keys(self, segment, group, &keys, memory);
    }

    /// Stores the gradient of a block of queries of one head.
    fn store_queries<B: Blocks>(
        &self,
        segment: &Segment,
        head: usize,
        queries: &Range<usize>,
        dq: &mut [f32],
    ) {
        let p = self.inputs.parameters;
        for (row, values) in dq.chunks_exact_mut(B::key_width(p)).enumerate().take(queries.len()) {
            let values = &mut values[..p.key_width];
            scale_row(self.level, values, p.scale);
            let token = segment.query_start + queries.start + row;
            // SAFETY: the rows of this head and block belong to this task and lie within the checked tensor.
            unsafe { self.dq.store((token * p.query_heads + head) * p.key_width, values) };
        }
    }

    /// Turns scores, times `scale`, into probabilities, and gradients of probabilities into gradients of scores.
    pub(super) fn differentiate_row(
        &self,
        visible: &Visible,
        (row, at, first_key): (usize, usize, usize),
        (scores, d_scores): (&mut [f32], &mut [f32]),
        scale: f32,
    ) {
        let seen = visible.of(row);
        mask_row(d_scores, &seen, 0.0);
        let groups = mask_row(scores, &seen, f32::NEG_INFINITY);
        if !groups.is_empty() {
            let (lse, delta, p) = (self.saved.lse[at], self.deltas[at], self.inputs.parameters);
            let values = (&mut scores[groups.clone()], &mut d_scores[groups]);
            gradient_row(self.level, values.0, values.1, scale, p.softcap, lse, delta);
            for values in [scores, d_scores] {
                self.inputs.hide([at / p.query_heads, first_key], &seen, values, 0.0);
            }
        }
    }
}

impl<K: Kernel<Packed = f32>> Blocks for F32Blocks<K> {
    type Memory<'m> = Buffers<'m>;

    fn key_width(p: &AttentionParameters) -> usize {
        padded::<K>(p.key_width)
    }

    fn new<'m>(p: &AttentionParameters, buffer: &'m mut Buffer, held: usize) -> Buffers<'m> {
        let (key_width, value_width) = (padded::<K>(p.key_width), padded::<K>(p.value_width));
        let (key, value, all_scores) = (BLOCK * key_width, BLOCK * value_width, BLOCK * STRIDE);
        let (key_columns, value_columns) = (p.key_width * STRIDE, p.value_width * STRIDE);
        let sizes = [key, value, key, key_columns, value_columns, all_scores, all_scores, key, value, held];
        let [q, d_out, keys, key_columns, value_columns, scores, d_scores, dk, dv, dq] = carve(buffer, sizes);
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

    fn dq<'s>(memory: &'s mut Buffers<'_>) -> &'s mut [f32] {
        memory.dq
    }

    fn load_keys(
        pass: &Backward<'_, '_>,
        segment: &Segment,
        group: usize,
        keys: &Range<usize>,
        memory: &mut Buffers<'_>,
    ) {
        let p = pass.inputs.parameters;
        let k = Head::new(pass.level, pass.inputs.k, p.key_value_heads, p.key_width, group);
        let v = Head::new(pass.level, pass.inputs.v, p.key_value_heads, p.value_width, group);
        let tokens = segment.key_start + keys.start..segment.key_start + keys.end;
        k.copy_rows(tokens.clone(), memory.keys, memory.key_width);
        k.copy_columns(tokens.clone(), memory.key_columns);
        v.copy_columns(tokens, memory.value_columns);
        memory.dk.fill(0.0);
        memory.dv.fill(0.0);
    }

    fn add_pair(
        pass: &Backward<'_, '_>,
        pair: &Pair<'_>,
        memory: &mut Buffers<'_>,
        wanted: Wanted,
        at: usize,
    ) {
        let Pair { segment, group, visible, queries, keys } = *pair;
        let p = pass.inputs.parameters;
        let heads = p.query_heads / p.key_value_heads;
        let Buffers { key_width, value_width, .. } = *memory;
        let tokens = segment.query_start + queries.start..segment.query_start + queries.end;
        for in_group in 0..heads {
            let head = group * heads + in_group;
            let q = Head::new(pass.level, pass.inputs.q, p.query_heads, p.key_width, head);
            let d_out = Head::new(pass.level, pass.saved.d_out, p.query_heads, p.value_width, head);
            q.copy_rows(tokens.clone(), memory.q, key_width);
            scale_row(pass.level, &mut memory.q[..queries.len() * key_width], p.scale);
            d_out.copy_rows(tokens.clone(), memory.d_out, value_width);
            let left = (&*memory.q, key_width);
            multiply_scores::<K>(visible, left, memory.key_columns, p.key_width, memory.scores);
            let left = (&*memory.d_out, value_width);
            multiply_scores::<K>(visible, left, memory.value_columns, p.value_width, memory.d_scores);
            let rows = memory.scores.chunks_exact_mut(STRIDE).zip(memory.d_scores.chunks_exact_mut(STRIDE));
            for (row, rows) in rows.enumerate().take(visible.queries) {
                pass.differentiate_row(
                    visible,
                    (row, (tokens.start + row) * p.query_heads + head, segment.key_start + keys.start),
                    rows,
                    1.0,
                );
            }
            if wanted.keys {
                add_by_key::<K>(visible, keys.len(), memory.scores, memory.d_out, value_width, memory.dv);
                add_by_key::<K>(visible, keys.len(), memory.d_scores, memory.q, key_width, memory.dk);
            }
            if wanted.queries {
                let dq = &mut memory.dq[at + in_group * BLOCK * key_width..];
                add_by_query::<K>(visible, memory.d_scores, memory.keys, key_width, dq);
            }
        }
    }

    fn store_keys(
        pass: &Backward<'_, '_>,
        segment: &Segment,
        group: usize,
        keys: &Range<usize>,
        memory: &mut Buffers<'_>,
    ) {
        let p = pass.inputs.parameters;
        for row in 0..keys.len() {
            let at = (segment.key_start + keys.start + row) * p.key_value_heads + group;
            let dk = &memory.dk[row * memory.key_width..][..p.key_width];
            let dv = &memory.dv[row * memory.value_width..][..p.value_width];
            // SAFETY: the rows of this group and block belong to this task and lie within the checked tensors.
            unsafe {
                pass.dk.store(at * p.key_width, dk);
                pass.dv.store(at * p.value_width, dv);
            }
        }
    }
}
