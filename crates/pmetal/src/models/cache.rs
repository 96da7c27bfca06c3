//! Keys and values of the tokens that a generation has already seen.

use pmetal_engine::{Category, DType, Device, Tensor};

use super::spec::Spec;
use crate::error::Result;

/// Rows are added in steps of this many tokens.
const GROWTH: usize = 256;

/// Rotated keys and values of one sequence, for every layer.
pub struct KeyValueCache {
    layers: Vec<LayerCache>,
    device: Device,
    dtype: DType,
    tokens: usize,
    /// The rotary epochs that the keys were rotated in; see [`super::rope::Rope::epoch`].
    pub(super) epochs: Vec<usize>,
}

struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl KeyValueCache {
    /// An empty cache.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(spec: &Spec, device: &Device, dtype: DType) -> Result<Self> {
        let layers = spec
            .layers
            .iter()
            .map(|layer| {
                let shape = [0, layer.attention.key_value_heads, layer.attention.head_width];
                let empty = || Tensor::zeros(device, Category::Cache, dtype, &shape);
                Ok(LayerCache { keys: empty()?, values: empty()? })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { layers, device: device.clone(), dtype, tokens: 0, epochs: Vec::new() })
    }

    /// Tokens held.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Forgets all but the first `tokens`.
    pub fn truncate(&mut self, tokens: usize) {
        self.tokens = self.tokens.min(tokens);
    }

    /// Writes a layer's new rows after what is held and returns all keys and values.
    pub(super) fn append(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (start, count) = (self.tokens, keys.shape()[0]);
        let (device, dtype) = (&self.device, self.dtype);
        let held = &mut self.layers[layer];
        for (store, new) in [(&mut held.keys, keys), (&mut held.values, values)] {
            if start + count > store.shape()[0] {
                let mut shape = store.shape().to_vec();
                shape[0] = (start + count).next_multiple_of(GROWTH).max(start * 3 / 2);
                let mut larger = Tensor::zeros(device, Category::Cache, dtype, &shape)?;
                larger.write_rows(0, &store.slice_rows(0, start)?)?;
                *store = larger;
            }
            store.write_rows(start, new)?;
        }
        Ok((held.keys.slice_rows(0, start + count)?, held.values.slice_rows(0, start + count)?))
    }

    /// Counts the rows that every layer has appended.
    pub(super) fn advance(&mut self, count: usize) {
        self.tokens += count;
    }
}
