//! Gradients of thin matrices, several in one launch.

#[cfg(test)]
mod tests;

use super::Gpu;
use super::counters::COUNTERS;
use super::launch::Kernel;
use super::runtime::{Argument, ModuleText};
use crate::device::{Arithmetic, Finish, Operand, WeightGradient};
use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Tensor};

static MODULE: ModuleText = ModuleText {
    name: "weight_gradients",
    texts: &[
        include_str!("../../../kernels/cuda/tiles.cuh"),
        include_str!("../../../kernels/cuda/weight_gradients.cu"),
    ],
};

/// How blocks read tokens.
#[derive(Debug, Clone, Copy)]
struct Tiling {
    /// Tokens of a tile.
    tokens: usize,
    /// Tiles that are on their way at one time.
    stages: usize,
    /// Blocks on a multiprocessor.
    at_once: usize,
}

const TILINGS: [Tiling; 2] =
    [Tiling { tokens: 64, stages: 3, at_once: 3 }, Tiling { tokens: 32, stages: 4, at_once: 4 }];

impl Tiling {
    /// Larger tiles, unless more blocks at once are all blocks.
    fn new(blocks: usize, multiprocessors: usize) -> Self {
        let [large, small] = TILINGS;
        let is_last_round_short = blocks > large.at_once * multiprocessors;
        if is_last_round_short && blocks <= small.at_once * multiprocessors { small } else { large }
    }

    const fn shared_bytes(self) -> usize {
        self.stages * self.tokens * (WIDE_TILE + THIN_TILE) * 2
    }
}

/// Tokens that a block sums at least, where others share its tile.
const LEAST_TOKENS: usize = 256;

/// As in the kernel's text.
const MOST_PRODUCTS: usize = 16;
const WIDE_TILE: usize = 128;
const THIN_TILE: usize = 64;

/// Blocks of a cluster at most: more leave each too little to do.
const MOST_CLUSTER: usize = 4;

/// Parts of the tokens that are summed apart by blocks without clusters, at most.
const MOST_SPLITS: usize = 6;

impl Gpu {
    pub(super) fn add_gradients(&self, gradients: &mut [WeightGradient<'_>]) -> Result<()> {
        let facts = &self.facts;
        let has_kernel =
            facts.capability >= (8, 0) && facts.shared_bytes_per_block > TILINGS[0].shared_bytes();
        let mut thin: Vec<&mut WeightGradient<'_>> = Vec::with_capacity(gradients.len());
        for gradient in gradients {
            if has_kernel && is_thin(gradient) {
                thin.push(gradient);
                continue;
            }
            let WeightGradient { left, right, out, scale } = gradient;
            let product = (Operand::transposed(left), Operand::plain(right));
            let finish = Finish { scale: *scale, ..Finish::ACCUMULATE };
            self.multiply(&[product], out, &finish, Arithmetic::of(left.dtype()))?;
        }
        let mut rest = thin.as_mut_slice();
        while let Some(first) = rest.first() {
            let (tokens, dtype) = (first.left.rows(), first.left.dtype());
            let alike =
                |other: &&mut WeightGradient<'_>| other.left.rows() == tokens && other.left.dtype() == dtype;
            let count = rest.iter().take(MOST_PRODUCTS).take_while(|other| alike(other)).count();
            let (batch, others) = rest.split_at_mut(count);
            self.launch_gradients(batch, tokens, dtype)?;
            rest = others;
        }
        Ok(())
    }

    /// Gradients over as many tokens, at most [`MOST_PRODUCTS`].
    fn launch_gradients(
        &self,
        batch: &mut [&mut WeightGradient<'_>],
        tokens: usize,
        dtype: DType,
    ) -> Result<()> {
        let (mut blocks, mut first_blocks) = (0, [0; MOST_PRODUCTS]);
        let products: Vec<Argument> = batch
            .iter_mut()
            .zip(&mut first_blocks)
            .map(|(gradient, first)| {
                *first = blocks;
                blocks += gradient.left.columns().max(gradient.right.columns()).div_ceil(WIDE_TILE);
                describe(gradient)
            })
            .collect();
        let like = batch[0].left;
        let has_clusters = self.facts.capability.0 == 9;
        let splits =
            if has_clusters { cluster(tokens) } else { splits(blocks, self.facts.multiprocessors, tokens) };
        let partials = if has_clusters || splits == 1 {
            None
        } else {
            let shape = [blocks * splits, WIDE_TILE * THIN_TILE];
            Some(Tensor::scratch(like.device(), Category::Workspace, DType::F32, &shape)?)
        };
        let counters = self.counters.address(like)?;
        let tiling = Tiling::new(blocks * splits, self.facts.multiprocessors);
        Kernel::of(&MODULE, "weight_gradients")
            .define("HALVES_F16", dtype == DType::F16)
            .number("TOKEN_TILE", tiling.tokens)
            .number("STAGES", tiling.stages)
            .number("AT_ONCE", tiling.at_once)
            .number("CLUSTER", if has_clusters { splits } else { 1 })
            .arguments(&[Argument::Words(pairs(&first_blocks))])
            .arguments(&products)
            .arguments(&vec![Argument::Words([0; 8]); MOST_PRODUCTS - products.len()])
            .sizes(&[products.len(), tokens])
            .arguments(&[partials.as_ref().into(), Argument::Address(counters)])
            .shared(tiling.shared_bytes())
            .launch(self.runtime.as_ref(), [blocks, splits, 1], 128);
        Ok(())
    }
}

/// Whether the kernel can compute a gradient.
fn is_thin(gradient: &WeightGradient<'_>) -> bool {
    let WeightGradient { left, right, out, .. } = gradient;
    let is_aligned =
        |tensor: &Tensor| tensor.pitch().is_multiple_of(8) && tensor.address().is_multiple_of(16);
    let narrowest = left.columns().min(right.columns());
    (1..=THIN_TILE).contains(&narrowest)
        && left.rows() > 0
        && matches!(left.dtype(), DType::Bf16 | DType::F16)
        && left.dtype() == right.dtype()
        && out.dtype() == DType::F32
        && [left, right].iter().all(|side| side.shape().len() == 2 && is_aligned(side))
}

/// Sixteen numbers as a struct of 64 bytes.
fn pairs(numbers: &[usize; 16]) -> [u64; 8] {
    std::array::from_fn(|i| numbers[2 * i] as u64 | (numbers[2 * i + 1] as u64) << 32)
}

/// The kernel's `Product`.
fn describe(gradient: &mut WeightGradient<'_>) -> Argument {
    let (left, right, pitch) = (gradient.left, gradient.right, gradient.out.pitch());
    let left_is_wide = left.columns() >= right.columns();
    let (wide, thin) = if left_is_wide { (left, right) } else { (right, left) };
    let strides = if left_is_wide { [pitch, 1] } else { [1, pitch] };
    let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
    Argument::Words([
        wide.address(),
        thin.address(),
        gradient.out.address_mut(),
        pair(wide.pitch(), thin.pitch()),
        pair(wide.columns(), thin.columns()),
        pair(strides[0], strides[1]),
        u64::from(gradient.scale.to_bits()),
        0,
    ])
}

/// Blocks of a cluster that divide the tokens, whatever else is in their launch, so that sums do not depend on that.
fn cluster(tokens: usize) -> usize {
    MOST_CLUSTER.min(tokens / LEAST_TOKENS).max(1)
}

/// Parts that the tokens are divided into, so that two blocks of every multiprocessor have work.
fn splits(blocks: usize, multiprocessors: usize, tokens: usize) -> usize {
    let most = MOST_SPLITS.min(tokens.div_ceil(LEAST_TOKENS));
    if blocks > COUNTERS {
        return 1;
    }
    ((2 * multiprocessors + blocks / 2) / blocks.max(1)).clamp(1, most.max(1))
}
