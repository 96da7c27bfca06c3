//! The one forward pass of all families.

mod indexer;
mod latent;
mod reference;
mod run;

use std::sync::Arc;

use pmetal_engine::device::CrossEntropyParameters;
use pmetal_engine::ops::{
    self, Balance, CrossEntropy, Dropout, LinearGroup, Spare, Targets, linear_cross_entropy,
};
use pmetal_engine::{Category, DType, Device, Recompute, Tape, Tensor, Var, Weight};

use self::run::Shared;
use super::cache::KeyValueCache;
use super::inputs::{AngleCache, Inputs};
use super::layer::{Layer, Norm};
use super::spec::Spec;
use crate::error::{Error, Result};

/// A decoder with its weights on a device.
pub struct Decoder {
    /// What is computed.
    pub spec: Spec,
    /// Type of activations.
    pub dtype: DType,
    pub(super) device: Device,
    pub(super) angle_cache: AngleCache,
    pub(super) embedding: Weight,
    pub(super) layers: Vec<Arc<Layer>>,
    pub(super) final_norm: Norm,
    /// `None` when the head is the embedding.
    pub(super) head: Option<Weight>,
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
    /// What a recording tape keeps of a layer; [`Recompute::None`] needs [`Tape::keeping_all`].
    pub recompute: Recompute,
    /// Randomness of adapter dropout; absent outside training.
    pub dropout: Option<Dropout>,
    /// What balances the load of experts.
    pub balance: Option<Balance>,
    /// Keys and values of earlier tokens of a single document; extended by the run's.
    pub cache: Option<&'a mut KeyValueCache>,
    /// Called with the embedding's output (0), every layer's (from 1) and, last, the final norm's.
    pub observer: Option<Observer<'a>>,
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
        let tokens = run.ids.len();
        if let Some(cache) = &mut forward.cache {
            if run.documents.len() != 1 {
                return Err(Error::Usage(format!("a cache holds one document, not {}", run.documents.len())));
            }
            cache.make_room(tokens, tokens)?;
        }
        let inputs = Arc::new(self.inputs(run, tokens, forward.cache.as_deref())?);
        self.hidden_of(tape, &inputs, forward)
    }

    /// [`Self::hidden`] of inputs that are on the device already.
    ///
    /// # Errors
    /// Out of memory.
    pub fn hidden_of(&self, tape: &Tape, inputs: &Arc<Inputs>, mut forward: Forward<'_>) -> Result<Var> {
        let shared = Shared {
            inputs: Arc::clone(inputs),
            residual_scale: self.spec.residual_scale,
            dropout: forward.dropout,
            balance: forward.balance.take(),
        };
        let mut states = self.embed(tape, inputs)?;
        let mut observe = forward.observer.take();
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(observe) = &mut observe {
                observe(index, states.tensor());
            }
            let cache = forward.cache.as_deref_mut();
            states = if forward.recompute == Recompute::Full {
                let (layer, shared) = (Arc::clone(layer), shared.clone());
                tape.checkpoint(states, move |tape, states| {
                    layer.run(tape, states, &shared, None).map_err(Error::into_engine)
                })?
            } else {
                layer.run(tape, states, &shared, cache.map(|cache| (cache, index)))?
            };
        }
        if let Some(cache) = forward.cache.filter(|_| !inputs.is_step()) {
            cache.advance(inputs.tokens);
            cache.epochs = self.epochs(cache.tokens());
        }
        // What flows back through the residuals starts here; the slopes of the adapters that it meets ride along.
        let last = self.layers.last().and_then(|layer| layer.feed_forward.last_reader());
        let spare = last.map_or(0, LinearGroup::spare);
        let states = self.final_norm.apply(tape, &states, Spare { gradient: spare, ..Spare::default() })?;
        if let Some(observe) = &mut observe {
            observe(self.layers.len(), states.tensor());
        }
        Ok(states)
    }

    /// What the first layer reads.
    fn embed(&self, tape: &Tape, inputs: &Inputs) -> Result<Var> {
        // Rounded as a factor in the type of activations is.
        let scale = match self.dtype {
            DType::Bf16 => half::bf16::from_f32(self.spec.embedding_scale).to_f32(),
            DType::F16 => half::f16::from_f32(self.spec.embedding_scale).to_f32(),
            _ => self.spec.embedding_scale,
        };
        let padding = self.spec.padding_id;
        Ok(ops::embedding(tape, &inputs.ids, &self.embedding, scale, padding, self.dtype)?)
    }

    /// Logits f32 of rows of [`Self::hidden`]'s result: \[T, V\].
    ///
    /// # Errors
    /// Out of memory.
    pub fn logits(&self, states: &Tensor) -> Result<Tensor> {
        let weight = self.head().value();
        let shape = [states.rows(), weight.rows()];
        let mut logits = Tensor::scratch(&self.device, Category::Activations, DType::F32, &shape)?;
        ops::project(states, &weight, self.spec.logit_scale, &mut logits)?;
        if let Some(cap) = self.spec.logit_softcap {
            ops::softcap(&mut logits, cap);
        }
        Ok(logits)
    }

    /// What turns logits into a loss.
    fn loss_parameters(&self, gradient_scale: f32) -> CrossEntropyParameters {
        let (logit_scale, softcap) = (self.spec.logit_scale, self.spec.logit_softcap);
        CrossEntropyParameters { logit_scale, softcap, gradient_scale }
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
        let inputs = Arc::new(self.inputs(run, run.ids.len(), None)?);
        let targets = self.targets(labels, run.ids.len())?;
        self.loss_of(tape, &inputs, &targets, gradient_scale, forward)
    }

    /// [`Self::loss`] of inputs and targets that are on the device already.
    ///
    /// # Errors
    /// Out of memory.
    pub fn loss_of(
        &self,
        tape: &Tape,
        inputs: &Arc<Inputs>,
        targets: &Targets,
        gradient_scale: f32,
        forward: Forward<'_>,
    ) -> Result<(Var, CrossEntropy)> {
        let states = self.hidden_of(tape, inputs, forward)?;
        let parameters = self.loss_parameters(gradient_scale);
        let loss = linear_cross_entropy(tape, &states, self.head(), targets, &parameters)?;
        Ok((states, loss))
    }

    /// Whether a cache's keys are rotated as a document of `length` tokens needs.
    pub fn cache_fits(&self, cache: &KeyValueCache, length: usize) -> bool {
        cache.tokens() == 0 || cache.epochs == self.epochs(length)
    }

    pub(crate) fn epochs(&self, length: usize) -> Vec<usize> {
        self.spec.ropes.iter().map(|rope| rope.epoch(length)).collect()
    }
}
