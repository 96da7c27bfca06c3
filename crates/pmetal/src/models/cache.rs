//! Keys and values of the tokens that a generation has already seen.

use pmetal_engine::device::MaskKind;
use pmetal_engine::ops::{self, ConvolutionState, DeltaState};
use pmetal_engine::{Category, DType, Device, Tensor};

use super::spec::{AttentionSpec, DeltaSpec, LayerSpec, Projection, Spec};
use crate::error::Result;

/// Rows are added in steps of this many tokens.
const GROWTH: usize = 256;

/// Rotated keys and values of one sequence, for every layer: of all its tokens, or of those that tokens to come can see.
pub struct KeyValueCache {
    layers: Vec<LayerCache>,
    /// By the number of the kind of mask.
    spans: Vec<Span>,
    device: Device,
    dtype: DType,
    tokens: usize,
    /// The rotary epochs that the keys were rotated in; see [`super::rope::Rope::epoch`].
    pub(super) epochs: Vec<usize>,
}

/// What the layers of one kind of mask hold of the sequence.
#[derive(Debug, Clone, Copy)]
struct Span {
    kind: MaskKind,
    /// Position of the token in the first row.
    first: usize,
    /// Rows that there is room for.
    room: usize,
}

impl Span {
    /// The most rows that are ever needed where runs have `count` tokens; `None` where there is no such number.
    fn most_rows(&self, count: usize) -> Option<usize> {
        let most = self.kind.reach()?.checked_add(count.max(GROWTH))?;
        most.checked_next_multiple_of(GROWTH)
    }

    /// What it becomes, and the rows that it begins with no longer, when the tokens from position `next` on are `count`
    /// more, and perhaps `wanted`. Rows are let go of where there would be more than are ever needed, all that nobody
    /// sees at once, so that what stays is seldom moved.
    fn grown(self, next: usize, count: usize, wanted: usize) -> (Self, usize) {
        if next + count <= self.first + self.room {
            return (self, 0);
        }
        let most = self.most_rows(count).unwrap_or(usize::MAX);
        let is_full = next + count - self.first > most;
        let first = if is_full { self.kind.first_kept(next) } else { self.first };
        let held = next - first;
        let larger = (held + wanted.max(count)).next_multiple_of(GROWTH).max(held * 3 / 2).min(most);
        let room = if held + count <= self.room { self.room } else { larger };
        (Self { first, room, ..self }, first - self.first)
    }
}

struct LayerCache {
    /// Number of the kind of its mask.
    kind: usize,
    /// What it keeps a row of for each token: keys \[T, K, E\] and values \[T, K, Ev\]; or the latent vectors of both with the
    /// rotated part of keys, \[T, 1, R + E\], and, where it chooses among keys, those by which it does, \[T, E\].
    stores: Vec<Tensor>,
    /// What a layer of linear attention passes from token to token.
    states: Option<Box<(ConvolutionState, DeltaState)>>,
}

impl LayerCache {
    fn new(layer: &LayerSpec, kind: usize, device: &Device, dtype: DType) -> Result<Self> {
        if let Some(delta) = layer.delta {
            let DeltaSpec { value_heads, key_width, value_width, taps, .. } = delta;
            let channels = delta.widths().iter().sum();
            let inputs = ConvolutionState::new(device, dtype, channels, taps)?;
            let state = DeltaState::new(device, [value_heads, key_width, value_width])?;
            return Ok(Self { kind, stores: Vec::new(), states: Some(Box::new((inputs, state))) });
        }
        let AttentionSpec { key_value_heads, head_width, value_width, projection, .. } = layer.attention;
        let shapes = match projection {
            Projection::Apart | Projection::Fused => {
                vec![vec![0, key_value_heads, head_width], vec![0, key_value_heads, value_width]]
            }
            Projection::Latent(latent) => {
                let index_keys = latent.indexer.map(|indexer| vec![0, indexer.width]);
                let both = vec![0, 1, latent.key_value_rank + latent.rotated_width];
                [both].into_iter().chain(index_keys).collect()
            }
        };
        let empty = |shape: Vec<usize>| Tensor::zeros(device, Category::Cache, dtype, &shape);
        let stores = shapes.into_iter().map(empty).collect::<pmetal_engine::Result<_>>()?;
        Ok(Self { kind, stores, states: None })
    }
}

impl KeyValueCache {
    /// An empty cache.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(spec: &Spec, device: &Device, dtype: DType) -> Result<Self> {
        let kinds = spec.mask_kinds();
        let layer = |layer: &LayerSpec| {
            let kind = kinds.iter().position(|kind| *kind == layer.attention.mask);
            let kind = kind.expect("invariant: every layer's kind of mask is among the kinds");
            LayerCache::new(layer, kind, device, dtype)
        };
        let layers = spec.layers.iter().map(layer).collect::<Result<_>>()?;
        let spans = kinds.iter().map(|&kind| Span { kind, first: 0, room: 0 }).collect();
        Ok(Self { layers, spans, device: device.clone(), dtype, tokens: 0, epochs: Vec::new() })
    }

    /// Tokens of the sequence that went through the model.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Forgets all but the first `tokens`, or everything where the token after them would see what was let go of, or
    /// where what a token left in a state cannot be taken back: [`Self::tokens`] says.
    pub fn truncate(&mut self, tokens: usize) {
        if tokens >= self.tokens {
            return;
        }
        let is_held = |span: &Span| span.first <= span.kind.first_key(tokens);
        let has_states = self.layers.iter().any(|layer| layer.states.is_some());
        if !has_states && self.spans.iter().all(is_held) {
            self.tokens = tokens;
            return;
        }
        self.tokens = 0;
        self.spans.iter_mut().for_each(|span| span.first = 0);
        for states in self.layers.iter_mut().filter_map(|layer| layer.states.as_mut()) {
            states.0.reset();
            states.1.reset();
        }
    }

    /// What a layer passes from token to token, where it is one of linear attention.
    pub(super) fn states(&mut self, layer: usize) -> Option<(&mut ConvolutionState, &mut DeltaState)> {
        let states = self.layers[layer].states.as_mut()?;
        Some((&mut states.0, &mut states.1))
    }

    /// Makes room for `count` more tokens, and for `wanted` where room is made, and lets go of what is not seen any more
    /// where that makes room. Returns whether rows that are held are where they were.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn make_room(&mut self, count: usize, wanted: usize) -> Result<bool> {
        let mut stay = true;
        for index in 0..self.spans.len() {
            let (span, gone) = self.spans[index].grown(self.tokens, count, wanted);
            let kept = self.tokens - span.first;
            let layers = self.layers.iter_mut().filter(|layer| layer.kind == index);
            for store in layers.flat_map(|layer| &mut layer.stores) {
                rearrange(store, [gone, kept], span.room, (&self.device, self.dtype))?;
            }
            self.spans[index] = span;
            stay &= gone == 0;
        }
        Ok(stay)
    }

    /// For each kind of mask the position of the token in the first row.
    pub(crate) fn firsts(&self) -> Vec<usize> {
        self.spans.iter().map(|span| span.first).collect()
    }

    /// For each kind of mask the rows that there is room for.
    pub(crate) fn rooms(&self) -> Vec<usize> {
        self.spans.iter().map(|span| span.room).collect()
    }

    /// For each kind of mask the rows that are held.
    pub(super) fn held(&self) -> impl Iterator<Item = usize> {
        self.spans.iter().map(|span| self.tokens - span.first)
    }

    /// Writes what a layer keeps of new tokens after what is held, where [`Self::make_room`] made room, and returns all that
    /// is held then; with `row`, to this row on the device, and returns all that there is room for.
    pub(super) fn append(
        &mut self,
        layer: usize,
        new: &[&Tensor],
        row: Option<&Tensor>,
    ) -> Result<Vec<Tensor>> {
        let layer = &mut self.layers[layer];
        let start = self.tokens - self.spans[layer.kind].first;
        let put = |(store, new): (&mut Tensor, &&Tensor)| -> Result<Tensor> {
            if let Some(row) = row {
                ops::scatter_rows(new, row, store)?;
                return Ok(store.clone());
            }
            store.write_rows(start, new)?;
            Ok(store.slice_rows(0, start + new.shape()[0])?)
        };
        layer.stores.iter_mut().zip(new).map(put).collect()
    }

    /// Counts the rows that every layer has appended.
    pub(crate) fn advance(&mut self, count: usize) {
        self.tokens += count;
    }
}

/// Keeps `kept` rows behind the first `gone`, and makes room for `room` in all.
fn rearrange(
    store: &mut Tensor,
    [gone, kept]: [usize; 2],
    room: usize,
    (device, dtype): (&Device, DType),
) -> Result<()> {
    let held = store.slice_rows(gone, kept)?;
    if room > store.shape()[0] {
        let mut shape = store.shape().to_vec();
        shape[0] = room;
        let mut larger = Tensor::zeros(device, Category::Cache, dtype, &shape)?;
        larger.write_rows(0, &held)?;
        *store = larger;
    } else if gone > 0 {
        let kept = held.copy(Category::Workspace)?;
        drop(held);
        store.write_rows(0, &kept)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_hold_what_is_seen_in_a_bounded_number_of_rows() {
        let kinds =
            [(Some(7), None), (Some(700), None), (None, Some(24)), (Some(5), Some(600)), (None, None)];
        for (window, chunk) in kinds {
            let kind = MaskKind { window, chunk, ..MaskKind::CAUSAL };
            let mut span = Span { kind, first: 0, room: 0 };
            let (mut next, mut moves) = (0, 0);
            for count in [300, 512, 512, 9].into_iter().chain(std::iter::repeat_n(1, 4000)) {
                let (grown, gone) = span.grown(next, count, count.max(8));
                assert_eq!(grown.first, span.first + gone);
                assert!(grown.first <= kind.first_key(next), "{kind:?} lets go of what {next} sees");
                assert!(grown.first + grown.room >= next + count, "{kind:?} has no room for {next}");
                assert!(grown.room >= span.room);
                moves += usize::from(gone > 0);
                (span, next) = (grown, next + count);
            }
            match kind.reach() {
                Some(reach) => assert!(span.room <= (reach + 512).next_multiple_of(GROWTH), "{span:?}"),
                None => assert_eq!(span.first, 0),
            }
            assert!(moves <= 5000 / GROWTH + 4, "{kind:?} moved {moves} times");
        }
        // A limit that no number of rows can reach.
        let span =
            Span { kind: MaskKind { window: Some(usize::MAX), ..MaskKind::CAUSAL }, first: 0, room: 0 };
        assert_eq!(span.grown(0, 10, 10).0.room, GROWTH);
    }
}
