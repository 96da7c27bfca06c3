//! Products in bf16 by a matrix unit, which multiplies so fast that packing and memory decide: a panel that one task alone
//! needs is packed by that task and stays in its cache, or is read where it is; the others are packed once, before.

mod pack;
#[cfg(test)]
pub(in crate::device::cpu) mod tests;
mod tiles;
mod wide;

use std::marker::PhantomData;
use std::ops::Range;

use super::blocked::Call;
use super::buffer::{Buffer, Workspace, with_thread_tile};
use super::epilogue::{Output, finish_streams};
use super::kernel::Sums;
use super::matrix::{Elements, MatrixRef};
use super::tasks::{Next, Shared, for_each_index};
use super::{Epilogue, Product};
pub(in crate::device::cpu) use pack::{Order, STEP_PAIRS, pack};
pub(super) use tiles::is_permitted;
pub(in crate::device::cpu) use tiles::{Amx, Left, SIDE, STEP, Tiles};

/// Steps of K that are summed without a break if they are all.
const ALL_STEPS: usize = 96;
/// Steps of K at a time otherwise.
const CHUNK_STEPS: usize = 64;
/// Pairs of one packed operand at a time (8 MiB).
const CHUNK_PAIRS: usize = 2 << 20;
/// Sums that wait for the next chunk of K (8 MiB).
const CHUNK_SUMS: usize = 2 << 20;
/// Pairs of the left operand that a task multiplies over and over (1 MiB), and of the right one (256 KiB): half of the
/// second-level cache.
const TASK_LEFT_PAIRS: usize = 1 << 18;
const TASK_RIGHT_PAIRS: usize = 1 << 16;
/// Rows of a task at most.
const TASK_ROWS: usize = 512;
/// Columns up to which a left operand of bf16 is not packed.
const THIN_COLUMNS: usize = 64;
/// Steps that a task with a single left panel packs and multiplies at a time, for all its columns: it reads few rows of
/// the right operand after the other then, and not each from its first k to its last.
const THIN_STEPS: usize = 4;
/// Multiply-adds below which waking other threads costs more than it gains.
const SERIAL_WORK: usize = 1 << 20;

/// One chunk: the ranges of M, N and the steps of K that are multiplied at present.
#[derive(Clone)]
struct Chunk {
    m: Range<usize>,
    n: Range<usize>,
    steps: Range<usize>,
    /// Whether these are the first and the last of K.
    first: bool,
    last: bool,
}

/// Computes the call.
///
/// The caller chose tiles that this processor can run.
pub(super) fn run<T: Tiles>(call: Call<'_, '_>) {
    let Call { products, mut out, epilogue, workspace, threads } = call;
    let (mut m, mut n) = (out.rows, out.columns);
    let flipped_products;
    let is_flipped = better_flipped(products, epilogue, m, n);
    let products = if is_flipped {
        (m, n) = (n, m);
        flipped_products = products
            .iter()
            .map(|p| Product { left: p.right.transposed(), right: p.left.transposed() })
            .collect::<Vec<_>>();
        &flipped_products[..]
    } else {
        products
    };
    let steps = products.iter().map(|product| product.left.columns.div_ceil(STEP)).sum::<usize>();
    let output = Output::new(T::LEVEL, &mut out, epilogue).streamed(out.rows);
    if steps == 0 {
        let zeros = vec![0.0f32; n];
        // SAFETY: these are all rows and columns of the output, and no task runs.
        unsafe { output.finish(0..m, 0..n, zeros.as_ptr(), 0) };
        return;
    }
    let threads = if m.saturating_mul(n).saturating_mul(steps * STEP) < SERIAL_WORK { 1 } else { threads };
    let in_place = left_in_place(products, n);
    let is_thin =
        m <= SIDE && in_place.is_none() && (THIN_STEPS + 1..CHUNK_PAIRS / STEP_PAIRS).contains(&steps);
    let chunk_steps = if steps <= ALL_STEPS || is_thin { steps } else { CHUNK_STEPS };
    let lanes = (CHUNK_PAIRS / (chunk_steps * STEP_PAIRS)).max(1) * SIDE;
    let chunk_m = m.min(if in_place.is_some() { CHUNK_SUMS / THIN_COLUMNS } else { lanes });
    let task_rows = panels_within(TASK_LEFT_PAIRS, chunk_steps).min(TASK_ROWS);
    // A right panel that one task alone needs is packed by that task, and never leaves its cache.
    let pack_by_task = chunk_m <= TASK_ROWS;
    let left_by_task = !pack_by_task && in_place.is_none() && chunk_steps == steps;
    let mut chunk_n = if pack_by_task { n } else { n.min(lanes) };
    if chunk_steps < steps {
        chunk_n = chunk_n.min((CHUNK_SUMS / chunk_m.next_multiple_of(SIDE)).max(SIDE) / SIDE * SIDE);
    }
    let Workspace { left, right, totals, tile } = workspace;
    let packed = |lanes: usize| lanes.div_ceil(SIDE) * chunk_steps * STEP_PAIRS;
    let left = left.elements::<u32>(match in_place {
        _ if left_by_task => 0,
        Some(_) => packed(1),
        None => packed(chunk_m),
    });
    let right = right.elements::<u32>(if pack_by_task { 0 } else { packed(chunk_n) });
    let totals_stride = chunk_n.next_multiple_of(SIDE);
    let totals = (chunk_steps < steps)
        .then(|| totals.elements::<f32>(chunk_m.next_multiple_of(SIDE) * totals_stride).as_mut_ptr());
    let mut work = Work {
        products,
        output: &output,
        threads,
        is_flipped,
        is_thin,
        left_by_task,
        in_place,
        left: Shared(left.as_mut_ptr()),
        left_holds: None,
        right: (!pack_by_task).then_some(Shared(right.as_mut_ptr())),
        totals: totals.map(|totals| (Shared(totals), totals_stride)),
        task_rows: if pack_by_task { chunk_m.next_multiple_of(SIDE) } else { task_rows },
        task_columns: panels_within(TASK_RIGHT_PAIRS, chunk_steps),
    };
    for n0 in (0..n).step_by(chunk_n) {
        for m0 in (0..m).step_by(chunk_m) {
            for step in (0..steps).step_by(chunk_steps) {
                let chunk = Chunk {
                    m: m0..m.min(m0 + chunk_m),
                    n: n0..n.min(n0 + chunk_n),
                    steps: step..steps.min(step + chunk_steps),
                    first: step == 0,
                    last: step + chunk_steps >= steps,
                };
                work.pack(&chunk);
                work.run::<T>(&chunk, tile);
            }
        }
    }
}

/// Whether to compute the transpose, of few rows: the left operand, of many more rows than there are columns, is stored
/// by columns, which are packed faster as those of the right operand.
fn better_flipped(products: &[Product<'_>], epilogue: &Epilogue<'_>, m: usize, n: usize) -> bool {
    let is_by_columns = |left: &MatrixRef<'_>| left.row_stride == 1 && left.column_stride > 1;
    let is_empty = products.iter().all(|p| p.left.columns == 0);
    n <= SIDE
        && m > 2 * SIDE
        && !is_empty
        && epilogue.bias.is_none()
        && products.iter().all(|p| is_by_columns(&p.left))
}

/// Lanes of whole panels that hold so many pairs, at least one panel.
fn panels_within(pairs: usize, steps: usize) -> usize {
    (pairs / (steps * STEP_PAIRS)).max(1) * SIDE
}

/// The left operand, if it is in bf16, by rows and in whole steps, and so few columns use it that packing does not pay.
fn left_in_place(products: &[Product<'_>], columns: usize) -> Option<Left> {
    let [Product { left, .. }] = products else { return None };
    let Elements::Bf16(values) = left.elements else { return None };
    let fits = columns <= THIN_COLUMNS && left.column_stride == 1 && left.columns.is_multiple_of(STEP);
    let pointer = values[left.offset.min(values.len())..].as_ptr().cast::<u8>();
    fits.then_some(Left { pointer, row_stride: 2 * left.row_stride, step_stride: 2 * STEP })
}

/// The multiplication of one chunk after the other.
struct Work<'a, 'b> {
    products: &'a [Product<'b>],
    output: &'a Output<'a>,
    threads: usize,
    /// Whether rows and columns are exchanged, but those of the output.
    is_flipped: bool,
    /// Whether there is one left panel, and tasks take few steps at a time.
    is_thin: bool,
    /// Whether tasks pack their own left panels.
    left_by_task: bool,
    /// The left operand if its whole panels are read where they are.
    in_place: Option<Left>,
    /// Packed panels of the left operand, or its incomplete one.
    left: Shared<u32>,
    /// The rows and steps that are packed there at present.
    left_holds: Option<(Range<usize>, Range<usize>)>,
    /// Packed panels of the right operand, unless tasks pack them.
    right: Option<Shared<u32>>,
    /// Where sums wait for the next chunk of K, if there are several, and the stride.
    totals: Option<(Shared<f32>, usize)>,
    task_rows: usize,
    task_columns: usize,
}

impl Work<'_, '_> {
    /// Packs the panels of a chunk that are not at hand and that no task packs itself.
    fn pack(&mut self, chunk: &Chunk) {
        let holds = Some((chunk.m.clone(), chunk.steps.clone()));
        let left_panels = match self.in_place {
            _ if self.left_by_task || self.left_holds == holds => 0..0,
            Some(_) => chunk.m.len() / SIDE..chunk.m.len().div_ceil(SIDE),
            None => 0..chunk.m.len().div_ceil(SIDE),
        };
        self.left_holds = holds;
        let right_panels = self.right.map_or(0, |_| chunk.n.len().div_ceil(SIDE));
        let size = chunk.steps.len() * STEP_PAIRS;
        for_each_index(left_panels.len() + right_panels, self.threads, |next| {
            while let Some(slot) = next.take() {
                if slot < left_panels.len() {
                    // SAFETY: each panel is written by one task; the buffer holds all that are packed.
                    let out =
                        unsafe { std::slice::from_raw_parts_mut(self.left.get().add(slot * size), size) };
                    let first = chunk.m.start + (left_panels.start + slot) * SIDE;
                    let sources = self.products.iter().map(|product| product.left);
                    pack(sources, first, chunk.steps.clone(), Order::Lanes, out);
                } else if let Some(right) = self.right {
                    let slot = slot - left_panels.len();
                    // SAFETY: as above.
                    let out = unsafe { std::slice::from_raw_parts_mut(right.get().add(slot * size), size) };
                    self.pack_right(chunk, slot * SIDE, out);
                }
            }
        });
    }

    /// Packs the right panel from `column` of the chunk on.
    fn pack_right(&self, chunk: &Chunk, column: usize, out: &mut [u32]) {
        let sources = self.products.iter().map(|product| product.right.transposed());
        pack(sources, chunk.n.start + column, chunk.steps.clone(), Order::Pairs, out);
    }

    fn run<T: Tiles>(&self, chunk: &Chunk, tile: &mut Buffer) {
        let (rows, columns) = (chunk.m.len(), chunk.n.len());
        let (task_rows, task_columns) = self.task_shape(rows, columns);
        let across = columns.div_ceil(task_columns);
        let count = rows.div_ceil(task_rows) * across;
        let panel = chunk.steps.len() * STEP_PAIRS;
        let size = match self.right {
            None if self.is_thin => task_columns * SIDE + THIN_STEPS * STEP_PAIRS,
            None => SIDE * SIDE + panel,
            Some(_) if self.left_by_task => SIDE * SIDE + task_rows / SIDE * panel,
            Some(_) => SIDE * SIDE,
        };
        let worker = |next: Next<'_>, own: *mut u32| {
            // SAFETY: every caller below passes memory of its thread that holds so many.
            let own = unsafe { std::slice::from_raw_parts_mut(own, size) };
            let _prepared = Prepared::<T>::new();
            while let Some(index) = next.take() {
                let (i, j) = (index / across * task_rows, index % across * task_columns);
                let (rows, columns) = (i..rows.min(i + task_rows), j..columns.min(j + task_columns));
                if self.is_thin {
                    self.multiply_thin::<T>(chunk, columns, own);
                } else {
                    self.multiply::<T>(chunk, rows, columns, own);
                }
            }
            finish_streams();
        };
        if self.threads <= 1 || count <= 1 {
            let own = Shared(tile.elements::<u32>(size).as_mut_ptr());
            for_each_index(count, 1, |next| worker(next, own.get()));
        } else {
            for_each_index(count, self.threads, |next| {
                with_thread_tile(|tile| worker(next, tile.elements::<u32>(size).as_mut_ptr()));
            });
        }
    }

    /// Rows and columns of the tasks: smaller where there would be too few, as sums do not depend on them.
    fn task_shape(&self, rows: usize, columns: usize) -> (usize, usize) {
        let mut task_rows = self.task_rows.min(rows.next_multiple_of(SIDE));
        if self.left_by_task {
            // As many tasks for each thread, so that all end together.
            let panels = rows.div_ceil(SIDE);
            let tasks = panels.div_ceil(self.task_rows / SIDE).next_multiple_of(self.threads.max(1));
            return (panels.div_ceil(tasks) * SIDE, columns);
        }
        let widest = if self.is_thin { columns } else { self.task_columns };
        let mut task_columns = widest.next_multiple_of(SIDE).min(columns.next_multiple_of(SIDE));
        let tasks = if self.is_thin { 2 } else { 4 } * self.threads;
        while self.threads > 1 && rows.div_ceil(task_rows) * columns.div_ceil(task_columns) < tasks {
            // A task that packs its right panels keeps all rows, or another would pack them again.
            if task_columns > SIDE && (task_columns >= task_rows || self.right.is_none()) {
                task_columns = (task_columns / 2).next_multiple_of(SIDE);
            } else if task_rows > SIDE && self.right.is_some() {
                task_rows = (task_rows / 2).next_multiple_of(SIDE);
            } else {
                break;
            }
        }
        (task_rows, task_columns)
    }

    /// Multiplies the only left panel with the columns of a task, which is the first and last of K. `own` is room for
    /// the sums of all columns and a few steps of a right panel.
    fn multiply_thin<T: Tiles>(&self, chunk: &Chunk, columns: Range<usize>, own: &mut [u32]) {
        let rows = chunk.m.len();
        let (own_sums, panel) = own.split_at_mut(own.len() - THIN_STEPS * STEP_PAIRS);
        let own_sums = bytemuck::cast_slice_mut::<u32, f32>(own_sums);
        let (left, stride) = (self.left_panel(chunk, 0, None), SIDE);
        for first in chunk.steps.clone().step_by(THIN_STEPS) {
            let steps = first..chunk.steps.end.min(first + THIN_STEPS);
            let left = Left { pointer: left.pointer.wrapping_add(first * left.step_stride), ..left };
            for (j, sums) in columns.clone().step_by(SIDE).zip(own_sums.chunks_exact_mut(SIDE * SIDE)) {
                self.pack_right(&Chunk { steps: steps.clone(), ..chunk.clone() }, j, panel);
                let used = (rows, SIDE.min(columns.end - j));
                let sums = Sums { pointer: sums.as_mut_ptr(), stride, add: first > 0 };
                // SAFETY: as in `multiply`; a tile of sums for each panel of columns.
                unsafe { T::multiply(steps.len(), left, panel.as_ptr().cast(), sums, used) };
            }
        }
        for (j, sums) in columns.clone().step_by(SIDE).zip(own_sums.chunks_exact(SIDE * SIDE)) {
            let used = (rows, SIDE.min(columns.end - j));
            // SAFETY: the sums were written just now; rows and columns are those of this task.
            unsafe { self.finish((chunk.m.start, chunk.n.start + j), used, sums.as_ptr(), SIDE) };
        }
    }

    /// Stores a finished tile of sums at (i, j).
    ///
    /// # Safety
    /// As for [`Output::finish`].
    unsafe fn finish(&self, (i, j): (usize, usize), used: (usize, usize), sums: *const f32, stride: usize) {
        if self.is_flipped {
            let mut transposed = [0.0f32; SIDE * SIDE];
            for row in 0..used.0 {
                for column in 0..used.1 {
                    // SAFETY: granted by the caller.
                    transposed[column * SIDE + row] = unsafe { *sums.add(row * stride + column) };
                }
            }
            // SAFETY: granted by the caller.
            unsafe { self.output.finish(j..j + used.1, i..i + used.0, transposed.as_ptr(), SIDE) };
        } else {
            // SAFETY: granted by the caller.
            unsafe { self.output.finish(i..i + used.0, j..j + used.1, sums, stride) };
        }
    }

    /// Multiplies the rows and columns of a task, relative to the chunk. `own` is room for sums and the panels that the
    /// task packs.
    fn multiply<T: Tiles>(&self, chunk: &Chunk, rows: Range<usize>, columns: Range<usize>, own: &mut [u32]) {
        let steps = chunk.steps.len();
        let (own_sums, own_panels) = own.split_at_mut(SIDE * SIDE);
        let own_sums = bytemuck::cast_slice_mut::<u32, f32>(own_sums).as_mut_ptr();
        let own_left = self.left_by_task.then(|| {
            for (out, first) in
                own_panels.chunks_exact_mut(steps * STEP_PAIRS).zip(rows.clone().step_by(SIDE))
            {
                let sources = self.products.iter().map(|product| product.left);
                pack(sources, chunk.m.start + first, chunk.steps.clone(), Order::Lanes, out);
            }
            own_panels.as_ptr()
        });
        for j in columns.clone().step_by(SIDE) {
            let right = match self.right {
                // SAFETY: the buffer holds all panels of the chunk.
                Some(right) => unsafe { right.get().add(j / SIDE * steps * STEP_PAIRS) }.cast_const(),
                None => {
                    self.pack_right(chunk, j, own_panels);
                    own_panels.as_ptr()
                }
            };
            for i in rows.clone().step_by(SIDE) {
                let used = (SIDE.min(rows.end - i), SIDE.min(columns.end - j));
                let (sums, in_output) = self.sums(chunk, (i, j), used, own_sums);
                let own_left =
                    own_left.map(|left| left.wrapping_add((i - rows.start) / SIDE * steps * STEP_PAIRS));
                let left = self.left_panel(chunk, i, own_left);
                if chunk.last && !in_output && !self.is_flipped {
                    let (i, j) = (chunk.m.start + i, chunk.n.start + j);
                    self.output.prefetch(i..i + used.0, j..j + used.1);
                }
                // SAFETY: the panels hold the chunk's steps; the sums are this task's own; whoever chose `T` saw that this
                // processor can run it, and the worker prepared its thread.
                unsafe { T::multiply(steps, left, right.cast(), sums, used) };
                if chunk.last && !(in_output && self.output.is_plain()) {
                    let (i, j) = (chunk.m.start + i, chunk.n.start + j);
                    // SAFETY: the sums were written just now; rows and columns are those of this task.
                    unsafe { self.finish((i, j), used, sums.pointer, sums.stride) };
                }
            }
        }
    }

    /// The left panel from row `i` of the chunk on, or the task's own.
    fn left_panel(&self, chunk: &Chunk, i: usize, own: Option<*const u32>) -> Left {
        if let Some(own) = own {
            return Left { pointer: own.cast(), row_stride: 2 * STEP, step_stride: 2 * STEP * SIDE };
        }
        match self.in_place {
            Some(left) if chunk.m.len() - i >= SIDE => {
                let at = (chunk.m.start + i) * left.row_stride + chunk.steps.start * left.step_stride;
                Left { pointer: left.pointer.wrapping_add(at), ..left }
            }
            in_place => {
                let slot = if in_place.is_some() { 0 } else { i / SIDE };
                let packed = self.left.get().wrapping_add(slot * chunk.steps.len() * STEP_PAIRS);
                let row_stride = 2 * STEP;
                Left { pointer: packed.cast_const().cast(), row_stride, step_stride: SIDE * row_stride }
            }
        }
    }

    /// Where the sums of a tile at (i, j) of the chunk are kept, and whether that is the output itself.
    fn sums(
        &self,
        chunk: &Chunk,
        (i, j): (usize, usize),
        used: (usize, usize),
        own: *mut f32,
    ) -> (Sums, bool) {
        let add = !chunk.first;
        if let Some((out, stride)) = self.output.as_sums()
            && !self.is_flipped
            && used == (SIDE, SIDE)
        {
            let at = (chunk.m.start + i) * stride + chunk.n.start + j;
            // SAFETY: the tile lies within the output.
            return (Sums { pointer: unsafe { out.get().add(at) }, stride, add }, true);
        }
        match self.totals {
            // SAFETY: the totals hold the chunk's rows and columns rounded up to whole panels.
            Some((totals, stride)) => {
                (Sums { pointer: unsafe { totals.get().add(i * stride + j) }, stride, add }, false)
            }
            None => (Sums { pointer: own, stride: SIDE, add }, false),
        }
    }
}

/// A thread that may multiply, until it is dropped.
pub(in crate::device::cpu) struct Prepared<T: Tiles>(PhantomData<*const T>);

impl<T: Tiles> Prepared<T> {
    pub(in crate::device::cpu) fn new() -> Self {
        // SAFETY: whoever chose `T` saw that this processor can run it.
        unsafe { T::begin() };
        Prepared(PhantomData)
    }
}

impl<T: Tiles> Drop for Prepared<T> {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { T::end() };
    }
}
