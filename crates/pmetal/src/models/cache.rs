//! Keys and values of the tokens that a generation has already seen.

use pmetal_engine::ops;
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

    /// Makes room for `tokens` tokens in all and returns for how many there is room.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn reserve(&mut self, tokens: usize) -> Result<usize> {
        let (held, device, dtype) = (self.tokens, &self.device, self.dtype);
        for layer in &mut self.layers {
            for store in [&mut layer.keys, &mut layer.values] {
                grow(store, held, tokens, device, dtype)?;
            }
        }
        Ok(self.capacity())
    }

    /// Tokens that there is room for.
    pub(crate) fn capacity(&self) -> usize {
        self.layers.iter().map(|layer| layer.keys.shape()[0]).min().unwrap_or(0)
    }

    /// Writes a layer's new rows after what is held and returns all keys and values; with `rows`, to these rows on the
    /// device, and returns all that there is room for.
    pub(super) fn append(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        rows: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let (start, count) = (self.tokens, keys.shape()[0]);
        let (device, dtype) = (&self.device, self.dtype);
        let held = &mut self.layers[layer];
        for (store, new) in [(&mut held.keys, keys), (&mut held.values, values)] {
            match rows {
                Some(rows) => ops::scatter_rows(new, rows, store)?,
                None => {
                    grow(store, start, start + count, device, dtype)?;
                    store.write_rows(start, new)?;
                }
            }
        }
        if rows.is_some() {
            return Ok((held.keys.clone(), held.values.clone()));
        }
        Ok((held.keys.slice_rows(0, start + count)?, held.values.slice_rows(0, start + count)?))
    }

    /// Counts the rows that every layer has appended.
    pub(crate) fn advance(&mut self, count: usize) {
        self.tokens += count;
    }
}

/// Makes room for `rows` rows, of which the first `held` are kept.
fn grow(store: &mut Tensor, held: usize, rows: usize, device: &Device, dtype: DType) -> Result<()> {
    if rows > store.shape()[0] {
        let mut shape = store.shape().to_vec();
        shape[0] = rows.next_multiple_of(GROWTH).max(held * 3 / 2);
        let mut larger = Tensor::zeros(device, Category::Cache, dtype, &shape)?;
        larger.write_rows(0, &store.slice_rows(0, held)?)?;
        *store = larger;
    }
    Ok(())
}
