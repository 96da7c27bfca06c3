//! The one forward pass of all families.

use std::sync::Arc;

use pmetal_engine::device::{AttentionParameters, CrossEntropyParameters, Segment};
use pmetal_engine::ops::{
    self, CrossEntropy, Dropout, Linear, LinearOptions, RopeTable, linear_cross_entropy, rms_norm,
};
use pmetal_engine::{Category, DType, Device, Tape, Tensor, Var, Weight};

use super::cache::KeyValueCache;
use super::rope::Positions;
use super::spec::{LayerSpec, Spec};
use crate::error::{Error, Result};

/// A decoder with its weights on a device.
pub struct Decoder {
    /// What is computed.
    pub spec: Spec,
    /// Type of activations.
    pub dtype: DType,
    pub(super) device: Device,
    pub(super) embedding: Weight,
    pub(super) layers: Vec<Arc<Layer>>,
    pub(super) final_norm: Weight,
    /// `None` when the head is the embedding.
    pub(super) head: Option<Weight>,
}

/// One layer's weights.
#[derive(Clone)]
pub(super) struct Layer {
    pub(super) spec: LayerSpec,
    pub(super) input_norm: Weight,
    pub(super) query: Linear,
    pub(super) key: Linear,
    pub(super) value: Linear,
    pub(super) output: Linear,
    pub(super) query_norm: Option<Weight>,
    pub(super) key_norm: Option<Weight>,
    pub(super) post_attention_norm: Weight,
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
}

/// Tokens of one or more documents in one flat run; documents never see each other.
#[derive(Debug, Clone)]
pub struct TokenRun {
    /// Token ids of all documents, one after the other.
    pub ids: Vec<u32>,
    /// Where each document lies; together they cover `ids` in order.
    pub documents: Vec<Document>,
}

/// A document's place in a [`TokenRun`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Document {
    /// Number of tokens in the run.
    pub tokens: usize,
    /// Position of the first of them: tokens in the cache, or left padding of a batch row.
    pub first_position: usize,
    /// Length by which dynamic rotary scalings choose.
    pub rope_length: usize,
}

impl TokenRun {
    /// One document from its first token.
    pub fn single(ids: &[u32]) -> Self {
        Self::documents(ids.to_vec(), &[ids.len()])
    }

    /// Whole documents of the given lengths.
    pub fn documents(ids: Vec<u32>, lengths: &[usize]) -> Self {
        let documents = lengths
            .iter()
            .map(|&tokens| Document { tokens, first_position: 0, rope_length: tokens })
            .collect();
        Self { ids, documents }
    }
}

/// Sees the states after a layer, by number.
pub type Observer<'a> = &'a mut dyn FnMut(usize, &Tensor);

/// How a forward pass runs.
#[derive(Default)]
pub struct Forward<'a> {
    /// Keep one activation per layer and compute the rest again in the backward pass.
    pub checkpointing: bool,
    /// Randomness of adapter dropout; absent outside training.
    pub dropout: Option<Dropout>,
    /// Keys and values of earlier tokens of a single document; extended by the run's.
    pub cache: Option<&'a mut KeyValueCache>,
    /// Called with the embedding's output (0), every layer's (from 1) and, last, the final norm's.
    pub observer: Option<Observer<'a>>,
}

/// What all layers of one forward pass share.
#[derive(Clone)]
struct Shared {
    ropes: Vec<RopeTable>,
    segments: Arc<[Segment]>,
    epsilon: f32,
    norm_weight: pmetal_engine::device::NormWeight,
    dropout: Option<Dropout>,
}

impl Decoder {
    /// The device that the weights are on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The output head: \[V, D\].
    pub fn head(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// States after the final norm: \[T, D\].
    ///
    /// # Errors
    /// [`Error::Usage`] when documents do not cover the run, or a cache is given more than one document;
    /// out of memory; a token id beyond the vocabulary.
    pub fn hidden(&self, tape: &Tape, run: &TokenRun, mut forward: Forward<'_>) -> Result<Var> {
        let shared = self.shared(run, &forward)?;
        let ids = Tensor::from_slice(&self.device, Category::Activations, &[run.ids.len()], &run.ids)?;
        let mut states = ops::embedding(tape, &ids, &self.embedding, 1.0, self.spec.padding_id, self.dtype)?;
        let mut observe = forward.observer.take();
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(observe) = &mut observe {
                observe(index, states.tensor());
            }
            let cache = forward.cache.as_deref_mut();
            states = if forward.checkpointing {
                let (layer, shared) = (Arc::clone(layer), shared.clone());
                tape.checkpoint(states, move |tape, states| {
                    layer.run(tape, states, &shared, None).map_err(Error::into_engine)
                })?
            } else {
                layer.run(tape, states, &shared, cache.map(|cache| (cache, index)))?
            };
        }
        if let Some(cache) = forward.cache {
            cache.advance(run.ids.len());
            cache.epochs = self.epochs(cache.tokens());
        }
        let weight = Some(&self.final_norm);
        let states = rms_norm(tape, &states, weight, self.spec.norm_weight, self.spec.norm_epsilon)?;
        if let Some(observe) = &mut observe {
            observe(self.layers.len(), states.tensor());
        }
        Ok(states)
    }

    /// Logits f32 of rows of [`Self::hidden`]'s result: \[T, V\].
    ///
    /// # Errors
    /// Out of memory.
    pub fn logits(&self, states: &Tensor) -> Result<Tensor> {
        let weight = self.head().value();
        let shape = [states.rows(), weight.rows()];
        let mut logits = Tensor::scratch(&self.device, Category::Activations, DType::F32, &shape)?;
        ops::project(states, &weight, &mut logits)?;
        Ok(logits)
    }

    /// The loss of a run: `labels[t]` is the target of token t, -100 where nothing is trained.
    ///
    /// # Errors
    /// As [`Self::hidden`]; a label beyond the vocabulary.
    pub fn loss(
        &self,
        tape: &Tape,
        run: &TokenRun,
        labels: &[i32],
        gradient_scale: f32,
        forward: Forward<'_>,
    ) -> Result<(Var, CrossEntropy)> {
        let states = self.hidden(tape, run, forward)?;
        let parameters = CrossEntropyParameters { logit_scale: 1.0, softcap: None, gradient_scale };
        let loss = linear_cross_entropy(tape, &states, self.head(), labels, &parameters)?;
        Ok((states, loss))
    }

    /// Whether a cache's keys are rotated as a document of `length` tokens needs.
    pub fn cache_fits(&self, cache: &KeyValueCache, length: usize) -> bool {
        cache.tokens() == 0 || cache.epochs == self.epochs(length)
    }

    fn epochs(&self, length: usize) -> Vec<usize> {
        self.spec.ropes.iter().map(|rope| rope.epoch(length)).collect()
    }

    fn shared(&self, run: &TokenRun, forward: &Forward<'_>) -> Result<Shared> {
        let covered: usize = run.documents.iter().map(|document| document.tokens).sum();
        if covered != run.ids.len() {
            return Err(Error::Usage(format!("documents cover {covered} of {} tokens", run.ids.len())));
        }
        let held = forward.cache.as_ref().map_or(0, |cache| cache.tokens());
        if forward.cache.is_some() && run.documents.len() != 1 {
            return Err(Error::Usage(format!("a cache holds one document, not {}", run.documents.len())));
        }
        let positions: Vec<Positions> = run
            .documents
            .iter()
            .map(|document| Positions {
                first: document.first_position,
                count: document.tokens,
                document_length: document.rope_length,
            })
            .collect();
        let ropes = self.spec.ropes.iter().map(|rope| rope.table(&self.device, &positions));
        let mut start = 0;
        let segments = run
            .documents
            .iter()
            .map(|document| {
                let segment = Segment {
                    query_start: start,
                    query_length: document.tokens,
                    key_start: start,
                    key_length: held + document.tokens,
                };
                start += document.tokens;
                segment
            })
            .collect();
        Ok(Shared {
            ropes: ropes.collect::<Result<_>>()?,
            segments,
            epsilon: self.spec.norm_epsilon,
            norm_weight: self.spec.norm_weight,
            dropout: forward.dropout,
        })
    }
}

impl Layer {
    fn run(
        &self,
        tape: &Tape,
        states: Var,
        shared: &Shared,
        cache: Option<(&mut KeyValueCache, usize)>,
    ) -> Result<Var> {
        let norm =
            |x: &Var, weight: &Weight| rms_norm(tape, x, Some(weight), shared.norm_weight, shared.epsilon);
        let apply = |x: &Var, layer: &Linear, residual: Option<&Var>| {
            ops::linear(tape, x, layer, LinearOptions { residual, scale: 1.0, dropout: shared.dropout })
        };
        let normed = norm(&states, &self.input_norm)?;
        let attended = self.attend(tape, &normed, shared, cache)?;
        drop(normed);
        let states = apply(&attended, &self.output, Some(&states))?;
        drop(attended);
        let normed = norm(&states, &self.post_attention_norm)?;
        let (gate, up) = (apply(&normed, &self.gate, None)?, apply(&normed, &self.up, None)?);
        drop(normed);
        let product = ops::gated(tape, self.spec.feed_forward.activation, &gate, &up)?;
        Ok(apply(&product, &self.down, Some(&states))?)
    }

    /// Attention over normed states; the result is \[T, H * E\].
    fn attend(
        &self,
        tape: &Tape,
        normed: &Var,
        shared: &Shared,
        cache: Option<(&mut KeyValueCache, usize)>,
    ) -> Result<Var> {
        let spec = &self.spec.attention;
        let tokens = normed.tensor().rows();
        let options = || LinearOptions { dropout: shared.dropout, ..LinearOptions::default() };
        let heads =
            |layer: &Linear, heads: usize, head_norm: Option<&Weight>, rotated: bool| -> Result<Var> {
                let flat = ops::linear(tape, normed, layer, options())?;
                let mut states = flat.reshape(&[tokens, heads, spec.head_width])?;
                if let Some(weight) = head_norm {
                    states = rms_norm(tape, &states, Some(weight), shared.norm_weight, shared.epsilon)?
                        .detached_recipe();
                }
                match spec.rope.filter(|_| rotated) {
                    Some(rope) => Ok(ops::rope(tape, states, &shared.ropes[rope])?),
                    None => Ok(states),
                }
            };
        let query = heads(&self.query, spec.query_heads, self.query_norm.as_ref(), true)?;
        let mut key = heads(&self.key, spec.key_value_heads, self.key_norm.as_ref(), true)?;
        let mut value = heads(&self.value, spec.key_value_heads, None, false)?;
        if let Some((cache, index)) = cache {
            let (keys, values) = cache.append(index, key.tensor(), value.tensor())?;
            (key, value) = (Var::constant(keys), Var::constant(values));
        }
        let parameters = AttentionParameters {
            query_heads: spec.query_heads,
            key_value_heads: spec.key_value_heads,
            key_width: spec.head_width,
            value_width: spec.head_width,
            scale: spec.scale,
            softcap: None,
            window: spec.window,
            chunk: None,
            causal: true,
        };
        let out = ops::attention(tape, &parameters, &shared.segments, [&query, &key, &value], None)?;
        Ok(out.reshape(&[tokens, spec.query_heads * spec.head_width])?)
    }
}
