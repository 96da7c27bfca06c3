//! Cross-entropy of rows of logits.

use super::Gpu;
use super::launch::Kernel;
use super::runtime::{Argument, ModuleText};
use crate::device::{CrossEntropyParameters, Sum};
use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Tensor};

static CLUSTERS: ModuleText = ModuleText {
    name: "loss_hopper",
    texts: &[
        include_str!("../../../kernels/prelude/cuda.h"),
        include_str!("../../../kernels/common.cpp"),
        include_str!("../../../kernels/cuda/tiles.cuh"),
        include_str!("../../../kernels/cuda/attention_hopper.cuh"),
        include_str!("../../../kernels/cuda/loss_hopper.cu"),
    ],
};

/// Bytes of a row that a block holds where a smaller cluster is enough, so that several blocks are on a multiprocessor.
const FEW_BYTES: usize = 56 << 10;
/// Bytes of a row that a block of the largest cluster holds.
const MOST_BYTES: usize = 112 << 10;
const LARGEST_CLUSTER: usize = 8;

/// Bytes of a row's part that a block of a cluster holds.
fn held_bytes(columns: usize, cluster: usize) -> usize {
    columns.div_ceil(8).div_ceil(cluster) * 8 * 4
}

/// Blocks that hold a row of so many logits between them; none where a row stays in the second cache anyway, or is too long.
fn cluster_of(columns: usize) -> Option<usize> {
    let least = [1, 2, 4].into_iter().find(|&cluster| held_bytes(columns, cluster) <= FEW_BYTES);
    let cluster = least.unwrap_or(LARGEST_CLUSTER);
    (cluster > 1 && held_bytes(columns, cluster) <= MOST_BYTES).then_some(cluster)
}

impl Gpu {
    /// Logits become their gradient, in the same memory; the losses are added to `sum`.
    pub(super) fn lose(
        &self,
        logits: Tensor,
        labels: &Tensor,
        parameters: &CrossEntropyParameters,
        sum: &mut Sum,
        gradient: DType,
    ) -> Result<Tensor> {
        let (rows, columns, pitch) = (logits.rows(), logits.columns(), logits.pitch());
        let losses = Tensor::scratch(logits.device(), Category::Workspace, DType::F32, &[rows])?;
        let whole = columns.is_multiple_of(8) && pitch.is_multiple_of(8);
        let cluster = cluster_of(columns).filter(|_| whole && self.facts.capability.0 == 9);
        let kernel = match cluster {
            Some(blocks) => Kernel::of(&CLUSTERS, "cross_entropy_cluster")
                .number("CLUSTER", blocks)
                .define("CAPPED", parameters.softcap.is_some()),
            None => Kernel::new("loss", "cross_entropy"),
        };
        let (grid, group) = cluster.map_or(([rows, 1, 1], 1024), |blocks| ([blocks, rows, 1], 512));
        kernel
            .element(gradient)
            .aligned(columns.is_multiple_of(8))
            .arguments(&[(&logits).into(), labels.into(), (&losses).into()])
            .sizes(&[columns, pitch])
            .arguments(&[
                Argument::F32(parameters.logit_scale),
                Argument::F32(parameters.softcap.unwrap_or(0.0)),
                Argument::F32(parameters.gradient_scale),
            ])
            .shared(cluster.map_or(0, |blocks| held_bytes(columns, blocks)))
            .launch(self.runtime.as_ref(), grid, group);
        if let Some(total) = &mut sum.device {
            self.add_values("loss", "add_rows", &losses, total);
        }
        Ok(logits.narrowed_rows(gradient))
    }
}
