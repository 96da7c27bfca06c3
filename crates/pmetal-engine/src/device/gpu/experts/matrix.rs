//! Products of experts on matrix units.

#[cfg(test)]
mod tests;

use super::flag;
use crate::device::gpu::Gpu;
use crate::device::gpu::launch::Kernel;
use crate::device::gpu::runtime::{Argument, ModuleText, TensorMap};
use crate::device::{ExpertFinish, Operand, RoutingPlan};
use crate::{DType, Tensor};

static PRODUCTS: ModuleText = ModuleText {
    name: "expert_tiles",
    texts: &[
        include_str!("../../../../kernels/cuda/tiles.cuh"),
        include_str!("../../../../kernels/cuda/expert_tiles.cuh"),
        include_str!("../../../../kernels/cuda/expert_products.cu"),
    ],
};

static HOPPER_PRODUCTS: ModuleText = ModuleText {
    name: "expert_tiles_hopper",
    texts: &[
        include_str!("../../../../kernels/cuda/tiles.cuh"),
        include_str!("../../../../kernels/cuda/attention_hopper.cuh"),
        include_str!("../../../../kernels/cuda/expert_tiles.cuh"),
        include_str!("../../../../kernels/cuda/expert_products_hopper.cu"),
    ],
};

static GRADIENTS: ModuleText = ModuleText {
    name: "expert_gradients",
    texts: &[
        include_str!("../../../../kernels/cuda/tiles.cuh"),
        include_str!("../../../../kernels/cuda/expert_gradients.cu"),
    ],
};

/// Columns of a tile, by mma.sync and of gradients.
const COLUMN_TILE: usize = 128;
/// As in the kernels' texts.
const STEP: usize = 64;

#[cfg(test)]
thread_local! {
    /// Whether warpgroups multiply, where a test compares both.
    static FORCED: std::cell::Cell<Option<bool>> = const { std::cell::Cell::new(None) };
}

/// Whether warpgroups multiply tiles of so many rows.
fn by_warpgroups(capability: (u32, u32), tile_rows: usize) -> bool {
    #[cfg(test)]
    if FORCED.get() == Some(false) {
        return false;
    }
    capability.0 == 9 && tile_rows > 16
}

/// Tiles of a product: their columns, and how many are on their way at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tiling {
    rows: usize,
    columns: usize,
    stages: usize,
    by_warpgroups: bool,
}

/// Shared memory that a block of warpgroups takes for its tiles, and besides for its results and barriers.
const HOPPER_STAGE_BYTES: usize = 192 << 10;
const HOPPER_OTHER_BYTES: usize = (16 << 10) + 256;

impl Tiling {
    fn new(capability: (u32, u32), rows: usize, columns: usize) -> Self {
        if !by_warpgroups(capability, rows) {
            let stages = if rows > 64 { 3 } else { 4 };
            return Self { rows, columns: COLUMN_TILE, stages, by_warpgroups: false };
        }
        // Each of two warpgroups has pieces of 64 columns.
        let least = if rows == 128 { 64 } else { 128 };
        let columns = columns.next_power_of_two().clamp(least, 256);
        let stages = (HOPPER_STAGE_BYTES / ((rows + columns) * STEP * 2)).min(6);
        Self { rows, columns, stages, by_warpgroups: true }
    }

    fn shared_bytes(&self) -> usize {
        let other = if self.by_warpgroups { HOPPER_OTHER_BYTES } else { 0 };
        self.stages * (self.rows + self.columns) * STEP * 2 + other
    }
}

/// Boxes of rows \[P, K\].
fn row_boxes(rows: &Tensor, box_rows: usize) -> Argument {
    Argument::TensorMap(TensorMap {
        address: rows.address(),
        dtype: rows.dtype(),
        width: rows.columns(),
        heads: 1,
        head_pitch: rows.columns(),
        rows: rows.rows(),
        pitch: rows.pitch(),
        box_rows,
    })
}

/// Boxes of one matrix of a stack \[X, K, N\] or \[X, N, K\] each.
fn stack_boxes(stack: &Operand<'_>, column_tile: usize) -> Argument {
    let shape = stack.tensor.shape();
    Argument::TensorMap(TensorMap {
        address: stack.tensor.address(),
        dtype: stack.tensor.dtype(),
        width: shape[2],
        heads: shape[0],
        head_pitch: shape[1] * shape[2],
        rows: shape[1],
        pitch: shape[2],
        box_rows: if stack.transposed { column_tile } else { STEP },
    })
}

const GRADIENT_STAGES: usize = 3;

fn gradient_bytes(thin_tile: usize) -> usize {
    GRADIENT_STAGES * STEP * (COLUMN_TILE + thin_tile) * 2
}

/// Whether rows of 16-bit floats can be copied by 16 bytes.
fn is_aligned(tensor: &Tensor) -> bool {
    tensor.pitch().is_multiple_of(8) && tensor.address().is_multiple_of(16)
}

fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::Bf16 | DType::F16)
}

impl Gpu {
    fn has_matrix_units(&self, bytes: usize) -> bool {
        self.facts.capability >= (8, 0) && self.facts.shared_bytes_per_block >= bytes
    }

    /// Whether the products can be done on matrix units, given that stacks are converted.
    pub(super) fn multiplies_tiles(
        &self,
        products: &[(&Tensor, Operand<'_>)],
        plan: &RoutingPlan,
        out: &Tensor,
    ) -> bool {
        let Some(tiles) = &plan.tiles else { return false };
        let whole = |size: usize| size.is_multiple_of(8);
        let fits = |(left, right): &(&Tensor, Operand<'_>)| {
            left.dtype() == out.dtype()
                && whole(left.columns())
                && is_aligned(left)
                && (right.tensor.dtype() != out.dtype() || right.tensor.address().is_multiple_of(16))
        };
        is_half(out.dtype())
            && self.has_matrix_units(
                Tiling::new(self.facts.capability, tiles.rows, out.columns()).shared_bytes(),
            )
            && whole(out.columns())
            && is_aligned(out)
            && products.iter().all(fits)
    }

    /// The products, whose stacks are of the type of the output.
    pub(super) fn multiply_tiles(
        &self,
        products: &[(&Tensor, Operand<'_>)],
        plan: &RoutingPlan,
        finish: &ExpertFinish<'_>,
        out: &mut Tensor,
    ) {
        let tiles = plan.tiles.as_ref().expect("invariant: plans of GPUs have tiles");
        let first = products.first().expect("invariant: something is multiplied");
        let second = products.get(1).unwrap_or(first);
        let second_inner = products.get(1).map_or(0, |(left, _)| left.columns());
        let tiling = Tiling::new(self.facts.capability, tiles.rows, out.columns());
        let kernel = match tiling.by_warpgroups {
            true => Kernel::of(&HOPPER_PRODUCTS, "multiply_expert_tiles_hopper"),
            false => Kernel::of(&PRODUCTS, "multiply_expert_tiles"),
        };
        let kernel = kernel
            .define("HALVES_F16", out.dtype() == DType::F16)
            .number("TILE_ROWS", tiling.rows)
            .number("COLUMN_TILE", tiling.columns)
            .number("STAGES", tiling.stages)
            .define("TURNED", first.1.transposed)
            .define("SECOND_TURNED", second.1.transposed)
            .shared(tiling.shared_bytes());
        let (columns, out_pitch, inner) = (out.columns(), out.pitch(), first.0.columns());
        let (across, down) = (columns.div_ceil(tiling.columns), tiles.tiles.rows());
        if tiling.by_warpgroups {
            let boxes = [first, second]
                .map(|(left, right)| [row_boxes(left, tiling.rows), stack_boxes(right, tiling.columns)]);
            let blocks = self.facts.multiprocessors.min(across * down);
            return kernel
                .arguments(&boxes.concat())
                .arguments(&[finish.bias.into(), (&tiles.tiles).into(), out.into()])
                .sizes(&[down, columns, inner, second_inner, out_pitch])
                .arguments(&[Argument::F32(finish.scale), flag(finish.accumulate)])
                .launch(self.runtime.as_ref(), [blocks, 1, 1], 384);
        }
        kernel
            .arguments(&[first.0.into(), first.1.tensor.into(), second.0.into(), second.1.tensor.into()])
            .arguments(&[finish.bias.into(), (&tiles.tiles).into(), out.into()])
            .sizes(&[columns, inner, second_inner, first.0.pitch(), second.0.pitch(), out_pitch])
            .arguments(&[Argument::F32(finish.scale), flag(finish.bias.is_some()), flag(finish.accumulate)])
            .launch(self.runtime.as_ref(), [across, down, 1], 256);
    }

    /// Gradients of stacks on matrix units; false where they cannot.
    pub(super) fn add_gradient_tiles(
        &self,
        left: &Tensor,
        right: &Tensor,
        plan: &RoutingPlan,
        scale: f32,
        out: &mut Tensor,
    ) -> bool {
        let (rows, columns) = (left.columns(), right.columns());
        let (wide, thin, strides) =
            if rows >= columns { (left, right, [columns, 1]) } else { (right, left, [1, columns]) };
        let thin_tile = thin.columns().next_power_of_two().clamp(32, COLUMN_TILE);
        let fits = is_half(left.dtype()) && left.dtype() == right.dtype();
        if !fits
            || !self.has_matrix_units(gradient_bytes(thin_tile))
            || !is_aligned(left)
            || !is_aligned(right)
        {
            return false;
        }
        let grid = [wide.columns().div_ceil(COLUMN_TILE), thin.columns().div_ceil(thin_tile), plan.experts];
        Kernel::of(&GRADIENTS, "expert_gradient_tiles")
            .define("HALVES_F16", left.dtype() == DType::F16)
            .number("THIN_TILE", thin_tile)
            .number("STAGES", GRADIENT_STAGES)
            .arguments(&[wide.into(), thin.into(), (&plan.offsets).into(), out.into()])
            .sizes(&[wide.columns(), thin.columns(), wide.pitch(), thin.pitch()])
            .sizes(&strides)
            .arguments(&[Argument::U64((rows * columns) as u64), Argument::F32(scale)])
            .shared(gradient_bytes(thin_tile))
            .launch(self.runtime.as_ref(), grid, 256);
        true
    }
}
