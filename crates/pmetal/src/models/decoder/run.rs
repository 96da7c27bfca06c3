//! The forward pass of one layer.

use std::sync::Arc;

use pmetal_engine::device::{AttentionParameters, GateActivation, NormWeight};
use pmetal_engine::ops::{
    self, Balance, DeltaInputVars, Dropout, GatedOptions, LinearGroup, LinearOptions, Spare, SumOptions,
};
use pmetal_engine::{DType, Tape, Var};

use super::indexer::Indexed;
use crate::error::Result;
use crate::models::cache::KeyValueCache;
use crate::models::inputs::Inputs;
use crate::models::layer::{
    Attention, Delta, Dense, Experts, FeedForward, Latent, Layer, Mixer, Module, Norm, Projected,
    SharedExpert,
};
use crate::models::spec::{AttentionSpec, HeadNorm};

/// What all layers of one forward pass share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) inputs: Arc<Inputs>,
    pub(super) residual_scale: f32,
    pub(super) dropout: Option<Dropout>,
    pub(super) balance: Option<Balance>,
}

impl Shared {
    pub(super) fn options(&self) -> LinearOptions<'_> {
        LinearOptions { dropout: self.dropout.as_ref(), ..LinearOptions::default() }
    }
}

/// What attention reads: queries \[T, H, E\], keys \[Tk, K, E\] and values \[Tk, K, Ev\].
pub(super) struct Heads<'a> {
    pub(super) query: Var,
    pub(super) key: Var,
    pub(super) value: Var,
    /// The gate of the result.
    pub(super) gate: Option<Var>,
    /// What keys are chosen by.
    pub(super) indexed: Option<Indexed>,
    /// Where keys and values are latent vectors, what makes heads of the result.
    pub(super) absorbed: Option<&'a Latent>,
}

/// A cache and the number of the layer that uses it.
pub(super) type LayerCache<'a> = (&'a mut KeyValueCache, usize);

/// As many results as a group has layers.
pub(super) fn projected<const COUNT: usize>(results: Vec<Var>) -> [Var; COUNT] {
    match results.try_into() {
        Ok(results) => results,
        Err(_) => unreachable!("invariant: a group has a result for each layer"),
    }
}

/// The results of a group, whose layers may be one that stands for several.
fn parts<const COUNT: usize>(
    tape: &Tape,
    x: &Var,
    module: &Module,
    options: LinearOptions<'_>,
    widths: [usize; COUNT],
) -> Result<[Var; COUNT]> {
    let mut results = ops::linear_group(tape, x, &module.group, options)?;
    if results.len() == 1 && COUNT > 1 {
        let [whole] = projected(results);
        results = ops::split_columns(tape, whole, &widths)?;
    }
    Ok(projected(results))
}

fn attention_parameters(spec: &AttentionSpec, [key, value]: [&Var; 2]) -> AttentionParameters {
    AttentionParameters {
        query_heads: spec.query_heads,
        key_value_heads: key.tensor().shape()[1],
        key_width: key.tensor().columns(),
        value_width: value.tensor().columns(),
        scale: spec.scale,
        softcap: spec.softcap,
    }
}

/// The norm of what a group reads, with room for what its adapters make of it; x itself where there is none.
pub(super) fn normed(tape: &Tape, x: &Var, norm: Option<&Norm>, reader: Option<&LinearGroup>) -> Result<Var> {
    let spare = reader.map_or(Spare::default(), |reader| Spare {
        result: reader.spare(),
        gradient: 0,
        codes: reader.reads_codes(),
        riding: reader.riding(),
    });
    norm.map_or_else(|| Ok(x.clone()), |norm| norm.apply(tape, x, spare))
}

impl Layer {
    pub(super) fn run(
        &self,
        tape: &Tape,
        states: Var,
        shared: &Shared,
        cache: Option<LayerCache<'_>>,
    ) -> Result<Var> {
        let input = normed(tape, &states, self.before_attention.as_ref(), Some(self.mixer.reader()))?;
        let (mixed, output) = match &self.mixer {
            Mixer::Attention(weights) => {
                (self.attend(tape, &input, weights, shared, cache)?, &weights.output.group)
            }
            Mixer::Delta(delta) => (delta.run(tape, &input, shared, cache)?, &delta.output.group),
        };
        let parallel = self.spec.norms.parallel.then(|| input.clone());
        drop(input);
        let after = self.after_attention.as_ref();
        let states = add_branch(tape, &mixed, (output, after), (shared, shared.options()), &states)?;
        drop(mixed);
        let input = match parallel {
            Some(input) => input,
            None => {
                let (norm, reader) = (self.before_feed_forward.as_ref(), self.feed_forward.first_reader());
                normed(tape, &states, norm, reader)?
            }
        };
        match &self.feed_forward {
            FeedForward::Dense(dense) => {
                let product = dense.gated(tape, input, shared)?;
                let options = LinearOptions { ends_block: true, ..shared.options() };
                let end = (&dense.down.group, self.after_feed_forward.as_ref());
                add_branch(tape, &product, end, (shared, options), &states)
            }
            FeedForward::Experts(experts) => experts.run(tape, &input, shared, &states),
        }
    }

    /// Attention over normed states; the result is \[T, H * E\].
    fn attend(
        &self,
        tape: &Tape,
        input: &Var,
        weights: &Attention,
        shared: &Shared,
        cache: Option<LayerCache<'_>>,
    ) -> Result<Var> {
        let spec = &self.spec.attention;
        let tokens = input.tensor().rows();
        let Heads { query, key, value, gate, indexed, absorbed } = match &weights.projection {
            Projected::Heads(module) => self.heads(tape, input, (weights, module), shared, cache)?,
            Projected::Latent(latent) => latent.heads(tape, input, spec, shared, cache)?,
        };
        let mask = &shared.inputs.seen(spec).mask;
        let parameters = attention_parameters(spec, [&key, &value]);
        let chosen = indexed.map(|indexed| indexed.choose(mask)).transpose()?.flatten();
        let mask = chosen.as_ref().unwrap_or(mask);
        let spare = weights.output.group.spare();
        let own_spare = if gate.is_some() || absorbed.is_some() { 0 } else { spare };
        let sinks = weights.sinks.as_ref().map(|sinks| &sinks.weight);
        let inputs = [&query, &key, &value];
        let mut out = ops::attention_with_spare(tape, &parameters, mask, inputs, sinks, own_spare)?;
        if let Some(latent) = absorbed {
            out = latent.expand_results(tape, &out, spec)?;
        }
        let out = out.reshape(&[tokens, spec.query_heads * spec.value_width])?;
        let Some(gate) = gate else { return Ok(out) };
        let carried = GatedOptions { spare, ..GatedOptions::default() };
        Ok(ops::gated_with_spare(tape, GateActivation::Sigmoid, &gate, &out, carried)?)
    }

    /// Queries \[T, H, E\], keys and values \[T, K, E\] by a linear layer each, or by one; and the gate of the result.
    fn heads(
        &self,
        tape: &Tape,
        input: &Var,
        (weights, module): (&Attention, &Module),
        shared: &Shared,
        cache: Option<LayerCache<'_>>,
    ) -> Result<Heads<'_>> {
        let spec = &self.spec.attention;
        let tokens = input.tensor().rows();
        let counts = [spec.query_heads, spec.key_value_heads, spec.key_value_heads];
        let mut widths = counts.map(|heads| heads * spec.head_width);
        widths[0] *= if spec.output_gate { 2 } else { 1 };
        let [mut query, key, value] = parts(tape, input, module, shared.options(), widths)?;
        let mut gate = None;
        if spec.output_gate {
            let both = query.reshape(&[tokens, spec.query_heads, 2 * spec.head_width])?;
            let [own, other] = projected(ops::split_heads(tape, &both, &[spec.head_width; 2])?);
            let shape = [tokens, spec.query_heads * spec.head_width];
            (query, gate) = (own.reshape(&shape)?, Some(other.reshape(&shape)?));
        }
        let heads = |flat: Var, heads: usize, norm: Option<&Norm>| -> Result<Var> {
            let shape = [tokens, heads, spec.head_width];
            let Some(norm) = norm else { return Ok(flat.reshape(&shape)?) };
            let whole = if spec.head_norm == HeadNorm::Joint { flat } else { flat.reshape(&shape)? };
            // Rotated in place: what it was cannot be computed from what it is.
            let normed = norm.apply(tape, &whole, Spare::default())?.detached_recipe();
            Ok(normed.reshape(&shape)?)
        };
        let mut query = heads(query, spec.query_heads, weights.query_norm.as_ref())?;
        let mut key = heads(key, spec.key_value_heads, weights.key_norm.as_ref())?;
        let mut value = heads(value, spec.key_value_heads, None)?;
        if let Some(rope) = spec.rope {
            [query, key] = ops::rope_all(tape, [query, key], &shared.inputs.ropes[rope])?;
        }
        if spec.head_norm == HeadNorm::Rotated {
            let normed = |x: &Var| ops::rms_norm(tape, x, None, NormWeight::Plain, self.epsilon);
            (query, key) = (normed(&query)?.detached_recipe(), normed(&key)?.detached_recipe());
        }
        if let Some(temperature) = spec.temperature {
            [query] = ops::rope_all(tape, [query], &shared.inputs.ropes[temperature])?;
        }
        if let Some((cache, index)) = cache {
            let row = shared.inputs.seen(spec).row.as_ref();
            let held = cache.append(index, &[key.tensor(), value.tensor()], row)?;
            [key, value] = projected(held.into_iter().map(Var::constant).collect());
        }
        Ok(Heads { query, key, value, gate, indexed: None, absorbed: None })
    }
}

impl Delta {
    /// Linear attention over normed states; the result is \[T, H * E\].
    fn run(&self, tape: &Tape, input: &Var, shared: &Shared, cache: Option<LayerCache<'_>>) -> Result<Var> {
        let (spec, tokens) = (&self.spec, input.tensor().rows());
        let documents = shared.inputs.documents.as_ref();
        let documents = documents.expect("invariant: inputs of such a decoder say where documents are");
        let results = ops::linear_group(tape, input, &self.input.group, shared.options())?;
        let [mixed, gate, beta, a] =
            if spec.grouped { self.ungrouped(tape, projected(results), tokens)? } else { projected(results) };
        let (inputs, state) = match cache.and_then(|(cache, index)| cache.states(index)) {
            Some((inputs, state)) => (Some(inputs), Some(state)),
            None => (None, None),
        };
        let mixed = ops::short_convolution(tape, &mixed, &self.convolution.weight, documents, inputs)?;
        let [query, key, value] = projected(ops::split_columns(tape, mixed, &spec.widths())?);
        let keys = [tokens, spec.key_heads, spec.key_width];
        let values = [tokens, spec.value_heads, spec.value_width];
        let (query, key, value) = (query.reshape(&keys)?, key.reshape(&keys)?, value.reshape(&values)?);
        let steered = DeltaInputVars { q: &query, k: &key, v: &value, beta_logits: &beta, a_logits: &a };
        let (a_log, dt_bias) = (&self.a_log.weight, &self.dt_bias.weight);
        let out = ops::gated_delta(tape, steered, a_log, dt_bias, documents, state)?;
        let (gate, spare) = (gate.reshape(&values)?, self.output.group.spare());
        Ok(ops::gated_rms_norm_with_spare(tape, &out, &gate, &self.norm.weight, self.epsilon, spare)?)
    }

    /// What is side by side for all heads, from what is side by side for each key head.
    fn ungrouped(&self, tape: &Tape, grouped: [Var; 2], tokens: usize) -> Result<[Var; 4]> {
        let spec = &self.spec;
        let shared_by = spec.value_heads / spec.key_heads;
        let (key, value) = (spec.key_width, shared_by * spec.value_width);
        let heads = |x: Var| {
            let columns = x.tensor().columns() / spec.key_heads;
            x.reshape(&[tokens, spec.key_heads, columns])
        };
        let [both, steering] = grouped;
        let (both, steering) = (heads(both)?, heads(steering)?);
        let inputs: [(&Var, &[&[usize]]); 2] =
            [(&both, &[&[key, key, value], &[value]]), (&steering, &[&[shared_by], &[shared_by]])];
        Ok(projected(ops::ungroup_heads(tape, &inputs)?))
    }
}

impl Dense {
    /// The middle of the layer: \[T, F\].
    fn gated(&self, tape: &Tape, input: Var, shared: &Shared) -> Result<Var> {
        let [gate, up] = parts(tape, &input, &self.gate_up, shared.options(), [self.spec.width; 2])?;
        drop(input);
        let down = &self.down.group;
        let carried = GatedOptions {
            spare: down.spare(),
            codes: down.reads_codes(),
            gradient_factors: self.gate_up.group.gradient_factors(),
            riding: down.riding(),
        };
        Ok(ops::gated_with_spare(tape, self.spec.activation, &gate, &up, carried)?)
    }
}

impl Experts {
    /// Adds to the states what the experts make of their input, with what all tokens go through.
    fn run(&self, tape: &Tape, input: &Var, shared: &Shared, states: &Var) -> Result<Var> {
        let spec = &self.spec;
        let scored = if spec.wide_router { ops::convert(tape, input, DType::F32)? } else { input.clone() };
        let logits = ops::linear(tape, &scored, &self.router, LinearOptions::default())?;
        drop(scored);
        let correction = self.correction.as_ref().map(|named| named.weight.value().clone());
        let routing = ops::route(tape, &logits, &spec.router, correction.as_ref(), shared.balance.as_ref())?;
        let rows = ops::gather(tape, input, &routing, spec.weighting)?;
        let gate_up = ops::expert_linear(tape, &rows, &self.gate_up.layer, &routing)?;
        drop(rows);
        let product = ops::gated_pair(tape, &gate_up, spec.gate)?;
        drop(gate_up);
        let out = ops::expert_linear(tape, &product, &self.down.layer, &routing)?;
        drop(product);
        let scale = shared.residual_scale;
        let states = match &self.shared {
            Some(part) => part.run(tape, input, shared, states)?,
            None => states.clone(),
        };
        let options = SumOptions { residual: Some(&states), scale, ends_block: true };
        Ok(ops::combine(tape, &out, &routing, spec.weighting, options)?)
    }
}

impl SharedExpert {
    /// Adds to the states what every token goes through.
    fn run(&self, tape: &Tape, input: &Var, shared: &Shared, states: &Var) -> Result<Var> {
        let product = self.dense.gated(tape, input.clone(), shared)?;
        let Some(gate) = &self.gate else {
            return add_branch(
                tape,
                &product,
                (&self.dense.down.group, None),
                (shared, shared.options()),
                states,
            );
        };
        let [out] = projected(ops::linear_group(tape, &product, &self.dense.down.group, shared.options())?);
        let [gate] = projected(ops::linear_group(tape, input, &gate.group, shared.options())?);
        let options = SumOptions { residual: Some(states), scale: shared.residual_scale, ends_block: false };
        Ok(ops::gate_rows(tape, &out, &gate, options)?)
    }
}

impl FeedForward {
    /// The group that reads the input of this part first, as far as it gains by finding it prepared.
    fn first_reader(&self) -> Option<&LinearGroup> {
        match self {
            Self::Dense(dense) => Some(&dense.gate_up.group),
            Self::Experts(experts) => experts.shared.as_ref().map(|shared| &shared.dense.gate_up.group),
        }
    }

    /// The group whose result is the layer's, where it is one.
    pub(super) fn last_reader(&self) -> Option<&LinearGroup> {
        match self {
            Self::Dense(dense) => Some(&dense.down.group),
            Self::Experts(_) => None,
        }
    }
}

/// Adds a branch of a layer, which ends in a linear layer and perhaps a norm, to the states.
fn add_branch(
    tape: &Tape,
    x: &Var,
    (group, after): (&LinearGroup, Option<&Norm>),
    (shared, options): (&Shared, LinearOptions<'_>),
    states: &Var,
) -> Result<Var> {
    if after.is_none() && shared.residual_scale == 1.0 {
        let options = LinearOptions { residual: Some(states), ..options };
        let [out] = projected(ops::linear_group(tape, x, group, options)?);
        return Ok(out);
    }
    let options = LinearOptions { ends_block: false, ..options };
    let [out] = projected(ops::linear_group(tape, x, group, options)?);
    let branch = match after {
        Some(norm) => norm.apply(tape, &out, Spare::default())?.detached_recipe(),
        None => out,
    };
    Ok(ops::add_scaled(tape, states, branch, shared.residual_scale)?)
}
