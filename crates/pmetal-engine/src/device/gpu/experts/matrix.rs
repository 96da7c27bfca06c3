//! Products of experts on matrix units.

#[cfg(test)]
mod tests;

use super::flag;
use crate::device::gpu::Gpu;
use crate::device::gpu::launch::Kernel;
use crate::device::gpu::runtime::{Argument, ModuleText};
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

/// As in the kernels' texts.
const COLUMN_TILE: usize = 128;
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

/// Tiles that are on their way at one time: as many as leave room for two blocks of a Hopper's multiprocessor.
fn stages(tile_rows: usize, by_warpgroups: bool) -> usize {
    if by_warpgroups || tile_rows > 64 { 3 } else { 4 }
}

fn product_bytes(tile_rows: usize, by_warpgroups: bool) -> usize {
    stages(tile_rows, by_warpgroups) * (tile_rows + COLUMN_TILE) * STEP * 2
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
            && self
                .has_matrix_units(product_bytes(tiles.rows, by_warpgroups(self.facts.capability, tiles.rows)))
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
        let (left, right) = products.first().expect("invariant: something is multiplied");
        let (second_left, second_right) = products.get(1).unwrap_or(&products[0]);
        let second_inner = products.get(1).map_or(0, |(left, _)| left.columns());
        let (columns, out_pitch) = (out.columns(), out.pitch());
        let is_hopper = by_warpgroups(self.facts.capability, tiles.rows);
        let kernel = if is_hopper {
            Kernel::of(&HOPPER_PRODUCTS, "multiply_expert_tiles_hopper")
        } else {
            Kernel::of(&PRODUCTS, "multiply_expert_tiles")
        };
        kernel
            .define("HALVES_F16", out.dtype() == DType::F16)
            .number("TILE_ROWS", tiles.rows)
            .number("STAGES", stages(tiles.rows, is_hopper))
            .define("TURNED", right.transposed)
            .define("SECOND_TURNED", second_right.transposed)
            .arguments(&[
                (*left).into(),
                right.tensor.into(),
                (*second_left).into(),
                second_right.tensor.into(),
            ])
            .arguments(&[finish.bias.into(), (&tiles.tiles).into(), out.into()])
            .sizes(&[columns, left.columns(), second_inner, left.pitch(), second_left.pitch(), out_pitch])
            .arguments(&[Argument::F32(finish.scale), flag(finish.bias.is_some()), flag(finish.accumulate)])
            .shared(product_bytes(tiles.rows, is_hopper))
            .launch(self.runtime.as_ref(), [columns.div_ceil(COLUMN_TILE), tiles.tiles.rows(), 1], 256);
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
