use std::ops::Range;

use super::buffer::{Buffer, Workspace, with_thread_tile};
use super::convert::Packed;
use super::epilogue::Output;
use super::kernel::{Kernel, Left, Right, Sums};
use super::matrix::{Elements, MatrixMut, MatrixRef};
use super::pack::{self, Panel};
use super::tasks::{Next, Shared, for_each_index};
use super::{Epilogue, Product};

/// Longest block of K: a panel of each operand and the next one fit the first-level cache.
const BLOCK_K: usize = 192;
/// Blocks of K that are packed at a time if they are all.
const ALL_BLOCKS: usize = 8;
/// Blocks of K that are packed at a time otherwise: few, so that the chunk has many rows and columns to reuse them.
const CHUNK_BLOCKS: usize = 4;
/// Elements of one packed operand at a time (8 MiB of f32).
const CHUNK_ELEMENTS: usize = 2 << 20;
/// Rows of a tile, whose packed block stays in the second-level cache.
const TILE_ROWS: usize = 144;
/// Columns of a tile.
const TILE_COLUMNS: usize = 256;
/// Panels of one operand up to which the other one is not packed.
const THIN_PANELS: usize = 4;
/// Multiply-adds below which waking other threads costs more than it gains.
const SERIAL_WORK: usize = 1 << 18;

/// The arguments of a product.
pub(super) struct Call<'a, 'b> {
    pub(super) products: &'a [Product<'b>],
    pub(super) out: MatrixMut<'b>,
    pub(super) epilogue: &'a Epilogue<'b>,
    pub(super) workspace: &'a mut Workspace,
    pub(super) threads: usize,
}

impl<'b> Call<'_, 'b> {
    /// Whether one side is so narrow that packing the other costs as much as multiplying it.
    pub(super) fn is_thin(&self, mr: usize, nr: usize) -> bool {
        self.left_in_place(nr).is_some() || self.right_in_place(mr).is_some()
    }

    /// The left operand if the kernel had better read it where it is.
    fn left_in_place(&self, nr: usize) -> Option<MatrixRef<'b>> {
        let [Product { left, .. }] = self.products else { return None };
        let is_f32 = matches!(left.elements, Elements::F32(_));
        (is_f32 && self.out.columns <= THIN_PANELS * nr).then_some(*left)
    }

    /// The right operand likewise; its columns must be side by side.
    fn right_in_place(&self, mr: usize) -> Option<MatrixRef<'b>> {
        let [Product { right, .. }] = self.products else { return None };
        let fits = matches!(right.elements, Elements::F32(_)) && right.column_stride == 1;
        (fits && self.out.rows <= THIN_PANELS * mr).then_some(*right)
    }
}

/// The length of the blocks of K, the same for every processor, tiling and number of threads.
fn block_length(k: usize) -> usize {
    let blocks = k.div_ceil(BLOCK_K).max(1);
    k.div_ceil(blocks).next_multiple_of(8)
}

/// One chunk: the ranges of M, N and K whose operands are packed at present.
struct Chunk {
    m: Range<usize>,
    n: Range<usize>,
    k: Range<usize>,
    /// Length of a block of K.
    block: usize,
    /// Whether these are the first and the last of K.
    first: bool,
    last: bool,
}

pub(super) fn run<K: Kernel>(mut call: Call<'_, '_>, round: bool) {
    let (m, n) = (call.out.rows, call.out.columns);
    let k = call.products.iter().map(|product| product.left.columns).sum::<usize>();
    let left_in_place = call.left_in_place(K::NR).filter(|_| K::Packed::GROUP == 1);
    let right_in_place = call.right_in_place(K::MR).filter(|_| K::Packed::GROUP == 1);
    let Call { products, ref mut out, epilogue, workspace, threads } = call;
    // Either all operands are rounded or none is.
    let round = round && left_in_place.is_none() && right_in_place.is_none();
    let output = Output::new(K::LEVEL, out, epilogue);
    if k == 0 {
        let zeros = vec![0.0f32; n];
        // SAFETY: these are all rows and columns of the output, and no task runs.
        unsafe { output.finish(0..m, 0..n, zeros.as_ptr(), 0) };
        return;
    }
    let threads = if m.saturating_mul(n).saturating_mul(k) < SERIAL_WORK { 1 } else { threads };
    let block = block_length(k);
    let chunk_k = if k <= block * ALL_BLOCKS { k } else { block * CHUNK_BLOCKS };
    let lanes = (CHUNK_ELEMENTS / chunk_k).max(96);
    let chunk_m = (lanes / K::MR * K::MR).min(m.next_multiple_of(K::MR));
    // Sums that wait for the next chunk of K are bounded as well.
    let lanes = if chunk_k < k { lanes.min((CHUNK_ELEMENTS / chunk_m).max(K::NR)) } else { lanes };
    let chunk_n = (lanes / K::NR * K::NR).min(n.next_multiple_of(K::NR));
    let packed_k = chunk_k.next_multiple_of(K::Packed::GROUP);
    let Workspace { left, right, totals, tile } = workspace;
    let totals = (chunk_k < k).then(|| Shared(totals.elements::<f32>(chunk_m * chunk_n).as_mut_ptr()));
    let packing = Packing { products, round, threads, level: K::LEVEL };
    let packed_left_lanes = if left_in_place.is_some() { K::MR } else { chunk_m };
    let packed_right_lanes = if right_in_place.is_some() { K::NR } else { chunk_n };
    let mut left = Operand::new(left.elements(packed_left_lanes * packed_k), left_in_place, K::MR);
    let mut right = Operand::new(
        right.elements(packed_right_lanes * packed_k),
        right_in_place.map(|r| r.transposed()),
        K::NR,
    );
    for n0 in (0..n).step_by(chunk_n) {
        for m0 in (0..m).step_by(chunk_m) {
            for k0 in (0..k).step_by(chunk_k) {
                let chunk = Chunk {
                    m: m0..m.min(m0 + chunk_m),
                    n: n0..n.min(n0 + chunk_n),
                    k: k0..k.min(k0 + chunk_k),
                    block,
                    first: k0 == 0,
                    last: k0 + chunk_k >= k,
                };
                packing.pack(&mut left, &mut right, &chunk);
                let totals = totals.map(|totals| (totals, chunk_n));
                let work = Work::<K> { output: &output, chunk: &chunk, left: &left, right: &right, totals };
                work.run(tile, threads);
            }
        }
    }
}

/// One packed operand of a chunk, or the operand where it is with a packed copy of its last, incomplete panel.
struct Operand<P> {
    packed: Shared<P>,
    /// First element, lane stride and k stride.
    in_place: Option<(Shared<P>, usize, usize)>,
    width: usize,
    /// The lanes and the range of K that are packed at present.
    holds: Option<(Range<usize>, Range<usize>)>,
}

impl<P: Packed> Operand<P> {
    /// `in_place` is [lanes, K] and f32, as is `P` then.
    fn new(packed: &mut [P], in_place: Option<MatrixRef<'_>>, width: usize) -> Self {
        let in_place = in_place.and_then(|view| match view.elements {
            Elements::F32(values) if size_of::<P>() == size_of::<f32>() => {
                let first = values[view.offset..].as_ptr().cast_mut().cast::<P>();
                Some((Shared(first), view.row_stride, view.column_stride))
            }
            _ => None,
        });
        Operand { packed: Shared(packed.as_mut_ptr()), in_place, width, holds: None }
    }

    /// The panels that must be packed now.
    fn missing(&mut self, lanes: &Range<usize>, k: &Range<usize>) -> Range<usize> {
        let wanted = Some((lanes.clone(), k.clone()));
        if self.holds == wanted {
            return 0..0;
        }
        self.holds = wanted;
        let first = if self.in_place.is_some() { lanes.len() / self.width } else { 0 };
        first..lanes.len().div_ceil(self.width)
    }

    /// The first element, lane stride and k stride of the panel from `lane` of the chunk on, at `k` of the chunk.
    ///
    /// # Safety
    /// `lane` is the first of a panel within the chunk and `k` the start of a block within it.
    unsafe fn panel(
        &self,
        lanes: &Range<usize>,
        chunk_k: &Range<usize>,
        lane: usize,
        k: usize,
    ) -> (*const P, usize, usize) {
        let packed_k = chunk_k.len().next_multiple_of(P::GROUP);
        // SAFETY: the buffer holds all panels of the chunk, or the incomplete one; the operand in place holds every lane
        // of a complete panel and every k.
        unsafe {
            match self.in_place {
                Some((first, lane_stride, k_stride)) if lanes.len() - lane >= self.width => {
                    let at = (lanes.start + lane) * lane_stride + (chunk_k.start + k) * k_stride;
                    (first.get().add(at), lane_stride, k_stride)
                }
                Some(_) => (self.packed.get().add(k * self.width), 1, self.width),
                None => (self.packed.get().add(lane * packed_k + k * self.width), 1, self.width),
            }
        }
    }
}

/// What packing needs to know beyond the chunk.
struct Packing<'a, 'b> {
    products: &'a [Product<'b>],
    round: bool,
    threads: usize,
    level: super::SimdLevel,
}

impl Packing<'_, '_> {
    /// Packs what the operands do not hold yet.
    fn pack<P: Packed>(&self, left: &mut Operand<P>, right: &mut Operand<P>, chunk: &Chunk) {
        let left_panels = left.missing(&chunk.m, &chunk.k);
        let right_panels = right.missing(&chunk.n, &chunk.k);
        let packed_k = chunk.k.len().next_multiple_of(P::GROUP);
        let panel = |base: Shared<P>, slot: usize, width: usize, first_lane: usize| {
            let size = width * packed_k;
            // SAFETY: each panel is written by one task; all lie within the buffer, which holds the chunk's lanes rounded
            // up to whole panels (or one panel, if only the last is packed) times its K rounded up to the group.
            let packed = unsafe { std::slice::from_raw_parts_mut(base.get().add(slot * size), size) };
            let k = chunk.k.clone();
            Panel { packed, width, first_lane, k, round: self.round, level: self.level }
        };
        let (left_base, left_width) = (left.packed, left.width);
        let (right_base, right_width) = (right.packed, right.width);
        for_each_index(left_panels.len() + right_panels.len(), self.threads, |next| {
            while let Some(slot) = next.take() {
                if slot < left_panels.len() {
                    let first_lane = chunk.m.start + (left_panels.start + slot) * left_width;
                    let sources = self.products.iter().map(|product| product.left);
                    pack::pack(sources, panel(left_base, slot, left_width, first_lane));
                } else {
                    let slot = slot - left_panels.len();
                    let first_lane = chunk.n.start + (right_panels.start + slot) * right_width;
                    let sources = self.products.iter().map(|product| product.right.transposed());
                    pack::pack(sources, panel(right_base, slot, right_width, first_lane));
                }
            }
        });
    }
}

/// The multiplication of one chunk.
struct Work<'a, K: Kernel> {
    output: &'a Output<'a>,
    chunk: &'a Chunk,
    left: &'a Operand<K::Packed>,
    right: &'a Operand<K::Packed>,
    /// Where sums wait for the next chunk of K, if there are several, and the stride.
    totals: Option<(Shared<f32>, usize)>,
}

impl<K: Kernel> Work<'_, K> {
    fn run(&self, tile: &mut Buffer, threads: usize) {
        let (rows, columns) = (self.chunk.m.len(), self.chunk.n.len());
        let (tile_rows, tile_columns) = tile_shape::<K>(rows, columns, threads);
        let across = columns.div_ceil(tile_columns);
        let count = rows.div_ceil(tile_rows) * across;
        let worker = |next: Next<'_>, own: *mut f32| {
            while let Some(index) = next.take() {
                let (i, j) = (index / across * tile_rows, index % across * tile_columns);
                let (sums, sums_stride) = match self.totals {
                    // SAFETY: the totals hold the chunk's rows and columns rounded up to whole panels.
                    Some((totals, stride)) => (unsafe { totals.get().add(i * stride + j) }, stride),
                    None => (own, tile_columns),
                };
                let rows = i..rows.min(i + tile_rows);
                let columns = j..columns.min(j + tile_columns);
                self.multiply(&Area { rows, columns, sums, sums_stride });
            }
        };
        let size = tile_rows * tile_columns;
        if threads <= 1 || count <= 1 {
            let own = Shared(tile.elements::<f32>(size).as_mut_ptr());
            for_each_index(count, 1, |next| worker(next, own.get()));
        } else {
            for_each_index(count, threads, |next| {
                with_thread_tile(|tile| worker(next, tile.elements::<f32>(size).as_mut_ptr()));
            });
        }
    }

    /// Multiplies one tile, block by block of K.
    fn multiply(&self, area: &Area) {
        let chunk = self.chunk;
        for k in (0..chunk.k.len()).step_by(chunk.block) {
            let length = chunk.block.min(chunk.k.len() - k);
            let add = !(chunk.first && k == 0);
            let finished = chunk.last && k + length == chunk.k.len();
            for j in area.columns.clone().step_by(K::NR) {
                // SAFETY: j and k start a panel and a block of the chunk.
                let (pointer, _, k_stride) = unsafe { self.right.panel(&chunk.n, &chunk.k, j, k) };
                let right = Right { pointer, k_stride };
                for i in area.rows.clone().step_by(K::MR) {
                    // SAFETY: i and k start a panel and a block of the chunk.
                    let (pointer, row_stride, k_stride) =
                        unsafe { self.left.panel(&chunk.m, &chunk.k, i, k) };
                    let left = Left { pointer, row_stride, k_stride };
                    let rows = i..area.rows.end.min(i + K::MR);
                    let columns = j..area.columns.end.min(j + K::NR);
                    let (sums, in_output) = self.sums(area, &rows, &columns, add);
                    // SAFETY: the panels hold `length` of K from k on; the sums are this task's own; the dispatch chose
                    // a kernel that this processor can run.
                    unsafe { K::multiply(length, left, right, sums) };
                    if finished && !(in_output && self.output.is_plain()) {
                        let rows = chunk.m.start + rows.start..chunk.m.start + rows.end;
                        let columns = chunk.n.start + columns.start..chunk.n.start + columns.end;
                        // SAFETY: the sums were written just now; rows and columns are those of this task.
                        unsafe { self.output.finish(rows, columns, sums.pointer, sums.stride) };
                    }
                }
            }
        }
    }

    /// Where the sums of a micro-tile are kept, and whether that is the output itself.
    fn sums(&self, area: &Area, rows: &Range<usize>, columns: &Range<usize>, add: bool) -> (Sums, bool) {
        if let Some((out, stride)) = self.output.as_sums()
            && rows.len() == K::MR
            && columns.len() == K::NR
        {
            let at = (self.chunk.m.start + rows.start) * stride + self.chunk.n.start + columns.start;
            // SAFETY: the micro-tile lies within the output.
            return (Sums { pointer: unsafe { out.get().add(at) }, stride, add }, true);
        }
        let at = (rows.start - area.rows.start) * area.sums_stride + columns.start - area.columns.start;
        // SAFETY: the tile's sums hold its rows and columns rounded up to whole panels.
        (Sums { pointer: unsafe { area.sums.add(at) }, stride: area.sums_stride, add }, false)
    }
}

/// Rows and columns of the tiles that threads take: smaller where there would be too few, as sums do not depend on them.
fn tile_shape<K: Kernel>(rows: usize, columns: usize, threads: usize) -> (usize, usize) {
    let mut tile_rows = (TILE_ROWS / K::MR * K::MR).min(rows.next_multiple_of(K::MR));
    let mut tile_columns = (TILE_COLUMNS / K::NR * K::NR).min(columns.next_multiple_of(K::NR));
    while threads > 1 && rows.div_ceil(tile_rows) * columns.div_ceil(tile_columns) < 4 * threads {
        if tile_columns > K::NR && tile_columns >= tile_rows {
            tile_columns = (tile_columns / 2).next_multiple_of(K::NR);
        } else if tile_rows > 2 * K::MR {
            tile_rows = (tile_rows / 2).next_multiple_of(K::MR);
        } else {
            break;
        }
    }
    (tile_rows, tile_columns)
}

/// A tile of a chunk, with the place of its sums.
struct Area {
    /// Relative to the chunk, as are the columns.
    rows: Range<usize>,
    columns: Range<usize>,
    sums: *mut f32,
    sums_stride: usize,
}
