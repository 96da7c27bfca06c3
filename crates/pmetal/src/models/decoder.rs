//! The one forward pass of all families.

mod reference;

use std::sync::Arc;

use pmetal_engine::device::{AttentionParameters, CrossEntropyParameters};
use pmetal_engine::ops::{
    self, CrossEntropy, Dropout, GatedOptions, LinearGroup, LinearOptions, Spare, Targets,
    linear_cross_entropy, rms_norm,
};
use pmetal_engine::{Category, DType, Device, Recompute, Tape, Tensor, Var, Weight};

use super::cache::KeyValueCache;
use super::inputs::{AngleCache, Inputs};
use super::spec::{AttentionSpec, LayerSpec, Spec};
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
    pub(super) final_norm: Weight,
    /// `None` when the head is the embedding.
    pub(super) head: Option<Weight>,
}

/// One layer's weights.
#[derive(Clone)]
pub(super) struct Layer {
    pub(super) spec: LayerSpec,
    pub(super) input_norm: Weight,
    /// Query, key and value.
    pub(super) projection: LinearGroup,
    pub(super) output: LinearGroup,
    pub(super) query_norm: Option<Weight>,
    pub(super) key_norm: Option<Weight>,
    pub(super) post_attention_norm: Weight,
    pub(super) gate_up: LinearGroup,
    pub(super) down: LinearGroup,
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
    /// Keys and values of earlier tokens of a single document; extended by the run's.
    pub cache: Option<&'a mut KeyValueCache>,
    /// Called with the embedding's output (0), every layer's (from 1) and, last, the final norm's.
    pub observer: Option<Observer<'a>>,
}

/// What all layers of one forward pass share.
#[derive(Clone)]
struct Shared {
    inputs: Arc<Inputs>,
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
    pub fn hidden(&self, tape: &Tape, run: &TokenRun, forward: Forward<'_>) -> Result<Var> {
        let held = forward.cache.as_ref().map_or(0, |cache| cache.tokens());
        if forward.cache.is_some() && run.documents.len() != 1 {
            return Err(Error::Usage(format!("a cache holds one document, not {}", run.documents.len())));
        }
        let inputs = Arc::new(self.inputs(run, run.ids.len(), held)?);
        self.hidden_of(tape, &inputs, forward)
    }

    /// [`Self::hidden`] of inputs that are on the device already.
    ///
    /// # Errors
    /// Out of memory.
    pub fn hidden_of(&self, tape: &Tape, inputs: &Arc<Inputs>, mut forward: Forward<'_>) -> Result<Var> {
        let shared = Shared {
            inputs: Arc::clone(inputs),
            epsilon: self.spec.norm_epsilon,
            norm_weight: self.spec.norm_weight,
            dropout: forward.dropout,
        };
        let ids = &inputs.ids;
        let mut states = ops::embedding(tape, ids, &self.embedding, 1.0, self.spec.padding_id, self.dtype)?;
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
        // Where the device decides on rows, whoever reads its tokens counts them.
        if let Some(cache) = forward.cache.filter(|_| inputs.cache_rows.is_none()) {
            cache.advance(inputs.tokens);
            cache.epochs = self.epochs(cache.tokens());
        }
        let weight = Some(&self.final_norm);
        // What flows back through the residuals starts here; the slopes of the adapters that it meets ride along.
        let spare = self.layers.last().map_or(0, |layer| layer.down.spare());
        let spare = Spare { gradient: spare, ..Spare::default() };
        let (kind, epsilon) = (self.spec.norm_weight, self.spec.norm_epsilon);
        let states = ops::rms_norm_with_spare(tape, &states, weight, kind, epsilon, spare)?;
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
        let inputs = Arc::new(self.inputs(run, run.ids.len(), 0)?);
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
        let parameters = CrossEntropyParameters { logit_scale: 1.0, softcap: None, gradient_scale };
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

impl Shared {
    fn options(&self) -> LinearOptions<'_> {
        LinearOptions { dropout: self.dropout.as_ref(), ..LinearOptions::default() }
    }
}

/// The results of a group of as many layers.
fn projected<const COUNT: usize>(results: Vec<Var>) -> [Var; COUNT] {
    match results.try_into() {
        Ok(results) => results,
        Err(_) => unreachable!("invariant: a group has a result for each layer"),
    }
}

pub(super) fn attention_parameters(spec: &AttentionSpec) -> AttentionParameters {
    AttentionParameters {
        query_heads: spec.query_heads,
        key_value_heads: spec.key_value_heads,
        key_width: spec.head_width,
        value_width: spec.head_width,
        scale: spec.scale,
        softcap: None,
        window: spec.window,
        chunk: None,
        causal: true,
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
        let norm = |x: &Var, weight: &Weight, reader: &LinearGroup| {
            let kind = shared.norm_weight;
            let spare = Spare { result: reader.spare(), gradient: 0, codes: reader.reads_codes() };
            ops::rms_norm_with_spare(tape, x, Some(weight), kind, shared.epsilon, spare)
        };
        let normed = norm(&states, &self.input_norm, &self.projection)?;
        let attended = self.attend(tape, &normed, shared, cache)?;
        drop(normed);
        let states = self.apply(tape, &attended, &self.output, shared.options(), &states)?;
        drop(attended);
        let normed = norm(&states, &self.post_attention_norm, &self.gate_up)?;
        let [gate, up] = projected(ops::linear_group(tape, &normed, &self.gate_up, shared.options())?);
        drop(normed);
        let activation = self.spec.feed_forward.activation;
        let carried = GatedOptions {
            spare: self.down.spare(),
            codes: self.down.reads_codes(),
            gradient_factors: self.gate_up.gradient_factors(),
        };
        let product = ops::gated_with_spare(tape, activation, &gate, &up, carried)?;
        drop((gate, up));
        let options = LinearOptions { ends_block: true, ..shared.options() };
        self.apply(tape, &product, &self.down, options, &states)
    }

    /// One linear layer whose result is added to the states.
    fn apply<'a>(
        &self,
        tape: &Tape,
        x: &Var,
        group: &LinearGroup,
        options: LinearOptions<'a>,
        states: &'a Var,
    ) -> Result<Var> {
        let options = LinearOptions { residual: Some(states), ..options };
        let [out] = projected(ops::linear_group(tape, x, group, options)?);
        Ok(out)
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
        let heads = |flat: Var, heads: usize, head_norm: Option<&Weight>| -> Result<Var> {
            let states = flat.reshape(&[tokens, heads, spec.head_width])?;
            match head_norm {
                Some(weight) => {
                    let normed = rms_norm(tape, &states, Some(weight), shared.norm_weight, shared.epsilon)?;
                    Ok(normed.detached_recipe())
                }
                None => Ok(states),
            }
        };
        let [query, key, value] =
            projected(ops::linear_group(tape, normed, &self.projection, shared.options())?);
        let mut query = heads(query, spec.query_heads, self.query_norm.as_ref())?;
        let mut key = heads(key, spec.key_value_heads, self.key_norm.as_ref())?;
        let mut value = heads(value, spec.key_value_heads, None)?;
        if let Some(rope) = spec.rope {
            [query, key] = ops::rope_all(tape, [query, key], &shared.inputs.ropes[rope])?;
        }
        if let Some((cache, index)) = cache {
            let rows = shared.inputs.cache_rows.as_ref();
            let (keys, values) = cache.append(index, key.tensor(), value.tensor(), rows)?;
            (key, value) = (Var::constant(keys), Var::constant(values));
        }
        let mask = shared.inputs.mask(spec);
        let parameters = attention_parameters(spec);
        let (inputs, spare) = ([&query, &key, &value], self.output.spare());
        let out = ops::attention_with_spare(tape, &parameters, mask, inputs, None, spare)?;
        Ok(out.reshape(&[tokens, spec.query_heads * spec.head_width])?)
    }
}
