//! Keys and values of the tokens that a generation has already seen.

use pmetal_engine::ops::{self, ConvolutionState, DeltaState};
use pmetal_engine::{Category, DType, Device, Tensor};

use super::spec::{AttentionSpec, DeltaSpec, Projection, Spec};
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
    /// Keys by which keys are chosen, \[T, E\].
    index_keys: Option<Tensor>,
    /// What a layer of linear attention passes from token to token.
    states: Option<Box<(ConvolutionState, DeltaState)>>,
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
                let AttentionSpec { key_value_heads, head_width, value_width, projection, .. } =
                    layer.attention;
                let empty =
                    |width| Tensor::zeros(device, Category::Cache, dtype, &[0, key_value_heads, width]);
                let indexer = match projection {
                    Projection::Latent(latent) => latent.indexer,
                    Projection::Apart | Projection::Fused => None,
                };
                let index_keys = indexer
                    .map(|indexer| Tensor::zeros(device, Category::Cache, dtype, &[0, indexer.width]))
                    .transpose()?;
                let states = |delta: DeltaSpec| -> Result<_> {
                    let DeltaSpec { value_heads, key_width, value_width, taps, .. } = delta;
                    let channels = delta.widths().iter().sum();
                    let inputs = ConvolutionState::new(device, dtype, channels, taps)?;
                    let state = DeltaState::new(device, [value_heads, key_width, value_width])?;
                    Ok(Box::new((inputs, state)))
                };
                let states = layer.delta.map(states).transpose()?;
                Ok(LayerCache { keys: empty(head_width)?, values: empty(value_width)?, index_keys, states })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { layers, device: device.clone(), dtype, tokens: 0, epochs: Vec::new() })
    }

    /// Tokens held.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Forgets all but the first `tokens`, or everything where what a token left in a state cannot be taken back.
    pub fn truncate(&mut self, tokens: usize) {
        if tokens >= self.tokens {
            return;
        }
        self.tokens = tokens;
        for states in self.layers.iter_mut().filter_map(|layer| layer.states.as_mut()) {
            states.0.reset();
            states.1.reset();
            self.tokens = 0;
        }
    }

    /// What a layer passes from token to token, where it is one of linear attention.
    pub(super) fn states(&mut self, layer: usize) -> Option<(&mut ConvolutionState, &mut DeltaState)> {
        let states = self.layers[layer].states.as_mut()?;
        Some((&mut states.0, &mut states.1))
    }

    /// Makes room for `tokens` tokens in all and returns for how many there is room.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn reserve(&mut self, tokens: usize) -> Result<usize> {
        let (held, device, dtype) = (self.tokens, &self.device, self.dtype);
        for layer in self.layers.iter_mut().filter(|layer| layer.states.is_none()) {
            for store in [&mut layer.keys, &mut layer.values].into_iter().chain(&mut layer.index_keys) {
                grow(store, held, tokens, device, dtype)?;
            }
        }
        Ok(self.capacity())
    }

    /// Tokens that there is room for.
    pub(crate) fn capacity(&self) -> usize {
        self.layers
            .iter()
            .filter(|layer| layer.states.is_none())
            .map(|layer| layer.keys.shape()[0])
            .min()
            .unwrap_or(0)
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
        let (start, device, dtype) = (self.tokens, &self.device, self.dtype);
        let held = &mut self.layers[layer];
        let keys = put(&mut held.keys, keys, start, rows, (device, dtype))?;
        Ok((keys, put(&mut held.values, values, start, rows, (device, dtype))?))
    }

    /// [`Self::append`] for the keys \[T, E\] by which a layer chooses keys.
    pub(super) fn append_index_keys(
        &mut self,
        layer: usize,
        keys: &Tensor,
        rows: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (start, device, dtype) = (self.tokens, &self.device, self.dtype);
        match &mut self.layers[layer].index_keys {
            Some(held) => put(held, keys, start, rows, (device, dtype)),
            None => Ok(keys.clone()),
        }
    }

    /// Counts the rows that every layer has appended.
    pub(crate) fn advance(&mut self, count: usize) {
        self.tokens += count;
    }
}

/// Writes rows from `start` on, or where `rows` says, and returns what is held then, or all that there is room for.
fn put(
    store: &mut Tensor,
    new: &Tensor,
    start: usize,
    rows: Option<&Tensor>,
    (device, dtype): (&Device, DType),
) -> Result<Tensor> {
    if let Some(rows) = rows {
        ops::scatter_rows(new, rows, store)?;
        return Ok(store.clone());
    }
    let end = start + new.shape()[0];
    grow(store, start, end, device, dtype)?;
    store.write_rows(start, new)?;
    Ok(store.slice_rows(0, end)?)
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
