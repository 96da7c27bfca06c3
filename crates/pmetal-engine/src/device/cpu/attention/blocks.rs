//! Copies and products of blocks, and the tables that the passes share.

use std::ops::Range;

use half::bf16;

use super::math;
use super::{Elements, ElementsMut, Inputs, MaskKind, Segment, SimdLevel};
use crate::device::cpu::gemm::MatrixRef;
use crate::device::cpu::gemm::buffer::Buffer;
use crate::device::cpu::gemm::convert::round_to_bf16;
use crate::device::cpu::gemm::kernel::{Kernel, Left, Right, Sums};
use crate::device::cpu::gemm::pack::{self, Panel};
use crate::device::cpu::gemm::tasks::Shared;

/// Queries and keys of a block: a multiple of the rows and columns of every kernel, and the same on every processor.
pub(super) const BLOCK: usize = 96;
/// Elements between rows of scores; not a power of two, so that columns of them spread over the cache.
pub(super) const STRIDE: usize = BLOCK + 16;

/// The width of a head, padded to what kernels read and write.
pub(super) fn padded<K: Kernel>(width: usize) -> usize {
    width.next_multiple_of(K::NR)
}

/// Splits memory into pieces.
pub(super) fn carve<const N: usize>(buffer: &mut Buffer, sizes: [usize; N]) -> [&mut [f32]; N] {
    // Whole cache lines, so that every piece starts on one.
    let sizes = sizes.map(|size| size.next_multiple_of(16));
    let mut rest = buffer.elements::<f32>(sizes.iter().sum());
    sizes.map(|size| {
        let (piece, others) = std::mem::take(&mut rest).split_at_mut(size);
        rest = others;
        piece
    })
}

/// One head of a tensor [T, heads, width].
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    view: MatrixRef<'a>,
    level: SimdLevel,
}

impl<'a> Head<'a> {
    pub(super) fn new(
        level: SimdLevel,
        elements: Elements<'a>,
        heads: usize,
        width: usize,
        head: usize,
    ) -> Self {
        let tokens = elements.len() / (heads * width);
        let view = MatrixRef::row_major(elements, tokens, heads * width);
        Head { view: view.part(0..tokens, head * width..(head + 1) * width), level }
    }

    /// Copies tokens to rows of `stride` elements, the last padded with zeros.
    pub(super) fn copy_rows(&self, tokens: Range<usize>, out: &mut [f32], stride: usize) {
        let length = tokens.len();
        let source = self.view.part(tokens, 0..self.view.columns()).transposed();
        self.copy(source, &mut out[..length * stride], stride, length);
    }

    /// Copies tokens to columns, of rows of `STRIDE` elements.
    pub(super) fn copy_columns(&self, tokens: Range<usize>, out: &mut [f32]) {
        let width = self.view.columns();
        let source = self.view.part(tokens, 0..width);
        self.copy(source, &mut out[..width * STRIDE], STRIDE, width);
    }

    /// Tokens as a matrix [tokens, width].
    pub(super) fn matrix(&self, tokens: Range<usize>) -> MatrixRef<'a> {
        self.view.part(tokens, 0..self.view.columns())
    }

    /// Tokens, where they are.
    pub(super) fn rows(&self, tokens: Range<usize>) -> math::Rows<'a> {
        let (count, width) = (tokens.len(), self.view.columns());
        let (elements, stride) = self.view.part(tokens, 0..width).first_and_stride();
        math::Rows { elements, stride, count, width }
    }

    /// Tokens, copied as f32.
    pub(super) fn widened<'c>(&self, tokens: Range<usize>, out: &'c mut [f32]) -> math::Rows<'c> {
        let (count, width) = (tokens.len(), self.view.columns());
        self.copy_rows(tokens, out, width);
        math::Rows { elements: Elements::F32(out), stride: width, count, width }
    }

    fn copy(&self, source: MatrixRef<'_>, packed: &mut [f32], width: usize, length: usize) {
        let panel = Panel { packed, width, first_lane: 0, k: 0..length, round: false, level: self.level };
        pack::pack(std::iter::once(source), panel);
    }
}

/// A tensor that tasks write disjoint rows of.
#[derive(Clone, Copy)]
pub(super) enum Target {
    F32(Shared<f32>),
    Bf16(Shared<bf16>),
}

impl Target {
    pub(super) fn new(elements: &mut ElementsMut<'_>) -> Self {
        match elements {
            ElementsMut::F32(values) => Target::F32(Shared(values.as_mut_ptr())),
            ElementsMut::Bf16(values) => Target::Bf16(Shared(values.as_mut_ptr())),
        }
    }

    /// Stores values from element `at` on.
    ///
    /// # Safety
    /// The elements lie within the tensor and belong to the calling task.
    pub(super) unsafe fn store(self, at: usize, values: &[f32]) {
        for (i, &value) in values.iter().enumerate() {
            // SAFETY: granted by the caller.
            unsafe {
                match self {
                    Target::F32(out) => *out.get().add(at + i) = value,
                    Target::Bf16(out) => *out.get().add(at + i) = round_to_bf16(value),
                }
            }
        }
    }
}

/// What each query of a block sees of a block of keys.
pub(super) struct Visible {
    /// Relative to the block of keys; both ends grow with the query.
    ranges: [(usize, usize); BLOCK],
    pub(super) queries: usize,
}

impl Visible {
    /// `queries` and `keys` are relative to the segment and at most a block long.
    pub(super) fn new(segment: &Segment, kind: MaskKind, queries: Range<usize>, keys: &Range<usize>) -> Self {
        let mut ranges = [(0, 0); BLOCK];
        for (range, query) in ranges.iter_mut().zip(queries.clone()) {
            let seen = segment.visible(kind, query);
            let start = seen.start.clamp(keys.start, keys.end) - keys.start;
            *range = (start, (seen.end.clamp(keys.start, keys.end) - keys.start).max(start));
        }
        Visible { ranges, queries: queries.len() }
    }

    pub(super) fn of(&self, query: usize) -> Range<usize> {
        self.ranges[query].0..self.ranges[query].1
    }

    /// What at least one of some queries sees.
    pub(super) fn of_queries(&self, first: usize, count: usize) -> Range<usize> {
        let last = (first + count).min(self.queries) - 1;
        self.ranges[first].0..self.ranges[last].1
    }

    /// The queries that see at least one of the keys, as a range that may hold others.
    pub(super) fn of_keys(&self, first: usize, count: usize) -> Range<usize> {
        let ranges = &self.ranges[..self.queries];
        let start = ranges.partition_point(|range| range.1 <= first);
        start..ranges.partition_point(|range| range.0 < first + count).max(start)
    }

    /// Whether no query sees any key.
    pub(super) fn is_empty(&self) -> bool {
        self.ranges[..self.queries].iter().all(|range| range.0 == range.1)
    }
}

/// Keys that some of the queries see, relative to the segment.
pub(super) fn seen_by(inputs: &Inputs<'_>, segment: &Segment, queries: &Range<usize>) -> Range<usize> {
    let first = segment.visible(inputs.kind, queries.start);
    let last = segment.visible(inputs.kind, queries.end - 1);
    first.start..last.end
}

/// Scores [queries, keys] = left [queries, width] x right [width, keys], where seen.
pub(super) fn multiply_scores<K: Kernel<Packed = f32>>(
    visible: &Visible,
    (left, left_stride): (&[f32], usize),
    right: &[f32],
    width: usize,
    scores: &mut [f32],
) {
    assert!(right.len() >= width * STRIDE && scores.len() >= BLOCK * STRIDE && left_stride >= width);
    assert!(left.len() >= BLOCK * left_stride);
    for i in (0..visible.queries).step_by(K::MR) {
        let keys = visible.of_queries(i, K::MR);
        for j in (keys.start / K::NR * K::NR..keys.end).step_by(K::NR) {
            // SAFETY: i + MR and j + NR are at most a block, which is a multiple of both, and the lengths were checked.
            unsafe {
                let left = Left {
                    pointer: left.as_ptr().add(i * left_stride),
                    row_stride: left_stride,
                    k_stride: 1,
                };
                let right = Right { pointer: right.as_ptr().add(j), k_stride: STRIDE };
                let sums =
                    Sums { pointer: scores.as_mut_ptr().add(i * STRIDE + j), stride: STRIDE, add: false };
                K::multiply(width, left, right, sums);
            }
        }
    }
}

/// Adds to out [queries, width]: weights [queries, keys] x right [keys, width]. Weights that a query does not see are 0.
pub(super) fn add_by_query<K: Kernel<Packed = f32>>(
    visible: &Visible,
    weights: &[f32],
    right: &[f32],
    width: usize,
    out: &mut [f32],
) {
    assert!(weights.len() >= BLOCK * STRIDE && right.len() >= BLOCK * width && out.len() >= BLOCK * width);
    assert!(width.is_multiple_of(K::NR));
    for i in (0..visible.queries).step_by(K::MR) {
        let keys = visible.of_queries(i, K::MR);
        if keys.is_empty() {
            continue;
        }
        for j in (0..width).step_by(K::NR) {
            // SAFETY: i + MR is at most a block and the keys are within one; j + NR is at most the width.
            unsafe {
                let pointer = weights.as_ptr().add(i * STRIDE + keys.start);
                let left = Left { pointer, row_stride: STRIDE, k_stride: 1 };
                let right = Right { pointer: right.as_ptr().add(keys.start * width + j), k_stride: width };
                let sums = Sums { pointer: out.as_mut_ptr().add(i * width + j), stride: width, add: true };
                K::multiply(keys.len(), left, right, sums);
            }
        }
    }
}

/// Adds to out [keys, width]: the transpose of weights [queries, keys] x right [queries, width].
pub(super) fn add_by_key<K: Kernel<Packed = f32>>(
    visible: &Visible,
    keys: usize,
    weights: &[f32],
    right: &[f32],
    width: usize,
    out: &mut [f32],
) {
    assert!(weights.len() >= BLOCK * STRIDE && right.len() >= BLOCK * width && out.len() >= BLOCK * width);
    assert!(width.is_multiple_of(K::NR) && keys <= BLOCK);
    for i in (0..keys).step_by(K::MR) {
        let queries = visible.of_keys(i, K::MR);
        if queries.is_empty() {
            continue;
        }
        for j in (0..width).step_by(K::NR) {
            // SAFETY: i + MR is at most a block and the queries are within one; j + NR is at most the width.
            unsafe {
                let pointer = weights.as_ptr().add(queries.start * STRIDE + i);
                let left = Left { pointer, row_stride: 1, k_stride: STRIDE };
                let right = Right { pointer: right.as_ptr().add(queries.start * width + j), k_stride: width };
                let sums = Sums { pointer: out.as_mut_ptr().add(i * width + j), stride: width, add: true };
                K::multiply(queries.len(), left, right, sums);
            }
        }
    }
}

/// The part of a row of scores that a query sees, in whole groups, whose unseen lanes become `unseen`; all else
/// becomes zero.
pub(super) fn mask_row(row: &mut [f32], seen: &Range<usize>, unseen: f32) -> Range<usize> {
    if seen.is_empty() {
        row[..BLOCK].fill(0.0);
        return 0..0;
    }
    let start = seen.start / math::LANES * math::LANES;
    let end = seen.end.next_multiple_of(math::LANES);
    row[..start].fill(0.0);
    row[start..seen.start].fill(unseen);
    row[seen.end..end].fill(unseen);
    row[end..BLOCK].fill(0.0);
    start..end
}
