//! What chooses the keys that queries of a layer look at.

use pmetal_engine::device::{AttentionMask, RopePairing};
use pmetal_engine::ops::{self, Linear, LinearOptions, RopeTable, Spare};
use pmetal_engine::{DType, Tape, Tensor, Var};

use crate::error::Result;
use crate::models::layer::{Indexer, Named};

/// Whether there may be more keys for a query than are chosen.
pub(in crate::models) fn chooses(mask: &AttentionMask, count: usize) -> bool {
    mask.most_keys() > count
}

/// What keys are chosen by: queries \[T, H, E\], keys \[Tk, E\] and weights f32 \[T, H\].
pub(super) struct Indexed {
    pub(super) query: Tensor,
    pub(super) key: Tensor,
    weights: Tensor,
    count: usize,
}

impl Indexer {
    /// Queries from what the layer's own queries are made from, keys and weights from its input; without gradients. The
    /// first part of a head is rotated by halves, whatever the layer's own heads are rotated by.
    pub(super) fn run(&self, input: &Tensor, latent: &Tensor, table: Option<&RopeTable>) -> Result<Indexed> {
        let tape = Tape::off();
        let (tokens, heads, width) = (input.rows(), self.spec.heads, self.spec.width);
        let linear = |x: &Tensor, named: &Named| {
            let layer = Linear { weight: named.weight.clone(), bias: None, lora: None };
            ops::linear(&tape, &Var::constant(x.clone()), &layer, LinearOptions::default())
        };
        let query = linear(latent, &self.query)?.reshape(&[tokens, heads, width])?;
        let [weight, bias] = self.key_norm.each_ref().map(|named| Some(&named.weight));
        let key = linear(input, &self.key)?;
        let key = ops::layer_norm(&tape, &key, weight, bias, self.spec.norm_epsilon, Spare::default())?;
        let key = key.detached_recipe().reshape(&[tokens, 1, width])?;
        let [query, key] = match table {
            Some(table) => ops::rope_all(&tape, [query, key], &table.paired(RopePairing::Halves))?,
            None => [query, key],
        };
        let wide = ops::convert(&tape, &Var::constant(input.clone()), DType::F32)?;
        let weights = linear(wide.tensor(), &self.weights)?.into_tensor();
        let key = key.into_tensor().reshape(&[tokens, width])?;
        Ok(Indexed { query: query.into_tensor(), key, weights, count: self.spec.count })
    }
}

impl Indexed {
    /// The mask of a layer without the keys that were not chosen; `None` where all are.
    pub(super) fn choose(&self, mask: &AttentionMask) -> Result<Option<AttentionMask>> {
        if !chooses(mask, self.count) {
            return Ok(None);
        }
        let inputs = [&self.query, &self.key, &self.weights];
        let choice = ops::choose_keys(mask, inputs, self.count)?;
        Ok(Some(mask.with_choice(&choice)?))
    }
}
