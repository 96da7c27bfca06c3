//! The weights of one decoder layer, under the names that checkpoints have for them: the one place where these are put
//! together.

use std::sync::Arc;

use pmetal_engine::ops::{self, ExpertLinear, Linear, LinearGroup, Spare};
use pmetal_engine::{DType, Tape, Var, Weight};

use super::spec::{
    AttentionSpec, DeltaSpec, DenseSpec, ExpertsSpec, FeedForwardSpec, HeadNorm, IndexerSpec, LatentSpec,
    LayerSpec, NormKind, Projection, SharedSpec, Spec,
};
use crate::error::Result;

/// Where weights come from: a checkpoint, random numbers, or nowhere, where only names and shapes are asked for.
pub(super) trait Source {
    /// A matrix \[N, D\], or a table.
    fn matrix(&self, name: &str, shape: &[usize]) -> Result<Weight>;
    /// A matrix that is never trained.
    fn frozen(&self, name: &str, shape: &[usize]) -> Result<Weight>;
    /// The weight of a norm, a bias and the like, in f32.
    fn vector(&self, name: &str, shape: &[usize]) -> Result<Weight>;
    /// What is never trained, in f32.
    fn constant(&self, name: &str, shape: &[usize]) -> Result<Weight>;
}

/// Linear layers that read the same input, with their module paths.
#[derive(Clone)]
pub(super) struct Module {
    pub(super) names: Arc<[String]>,
    pub(super) group: LinearGroup,
}

/// A weight and its name in checkpoints.
#[derive(Clone)]
pub(super) struct Named {
    pub(super) name: Arc<str>,
    pub(super) weight: Weight,
}

/// A norm with a weight.
#[derive(Clone)]
pub(super) struct Norm {
    pub(super) weight: Named,
    pub(super) kind: NormKind,
    pub(super) epsilon: f32,
}

/// One layer's weights.
#[derive(Clone)]
pub(super) struct Layer {
    pub(super) spec: LayerSpec,
    /// Of norms without a weight.
    pub(super) epsilon: f32,
    pub(super) mixer: Mixer,
    pub(super) feed_forward: FeedForward,
    pub(super) before_attention: Option<Norm>,
    pub(super) after_attention: Option<Norm>,
    pub(super) before_feed_forward: Option<Norm>,
    pub(super) after_feed_forward: Option<Norm>,
}

/// Attention of grouped queries.
#[derive(Clone)]
pub(super) struct Attention {
    pub(super) projection: Projected,
    pub(super) output: Module,
    pub(super) query_norm: Option<Norm>,
    pub(super) key_norm: Option<Norm>,
    /// A score of each query head, \[H\].
    pub(super) sinks: Option<Named>,
}

/// Linear attention by the gated delta rule.
#[derive(Clone)]
pub(super) struct Delta {
    pub(super) spec: DeltaSpec,
    /// Queries, keys and values, the gate of the result, and the two that steer the rule: four layers, or two grouped by
    /// key heads.
    pub(super) input: Module,
    /// \[C, K\] in memory, \[C, 1, K\] in checkpoints.
    pub(super) convolution: Named,
    pub(super) a_log: Named,
    pub(super) dt_bias: Named,
    pub(super) norm: Named,
    pub(super) epsilon: f32,
    pub(super) output: Module,
}

/// What mixes tokens.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "a model has few layers, most of the larger kind")]
pub(super) enum Mixer {
    Attention(Attention),
    Delta(Box<Delta>),
}

/// What gives queries, keys and values.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "a model has few layers, most of the larger kind")]
pub(super) enum Projected {
    /// Query, key and value, or all three in one.
    Heads(Module),
    Latent(Box<Latent>),
}

/// Queries, keys and values through latent vectors.
#[derive(Clone)]
pub(super) struct Latent {
    pub(super) spec: LatentSpec,
    /// The latent vector of queries, or these themselves, and that of keys and values with the rotated part of keys.
    pub(super) input: Module,
    pub(super) query: Option<(Norm, Module)>,
    pub(super) key_value_norm: Norm,
    pub(super) key_value: Module,
    pub(super) indexer: Option<Indexer>,
}

/// What chooses keys; never trained.
#[derive(Clone)]
pub(super) struct Indexer {
    pub(super) spec: IndexerSpec,
    pub(super) query: Named,
    pub(super) key: Named,
    /// Weight and bias.
    pub(super) key_norm: [Named; 2],
    /// Of the heads, in f32.
    pub(super) weights: Named,
}

/// What follows attention.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "a model has few layers, most of the larger kind")]
pub(super) enum FeedForward {
    Dense(Dense),
    Experts(Box<Experts>),
}

/// A gated feed-forward layer.
#[derive(Clone)]
pub(super) struct Dense {
    pub(super) spec: DenseSpec,
    /// Gate and up, or both in one.
    pub(super) gate_up: Module,
    pub(super) down: Module,
}

/// A mixture of experts.
#[derive(Clone)]
pub(super) struct Experts {
    pub(super) spec: ExpertsSpec,
    /// Scores of the experts. Adapters are those of its weight as a parameter.
    pub(super) router: Linear,
    pub(super) router_names: [Option<Arc<str>>; 2],
    pub(super) correction: Option<Named>,
    pub(super) gate_up: ExpertModule,
    pub(super) down: ExpertModule,
    pub(super) shared: Option<SharedExpert>,
}

/// An expert for all tokens.
#[derive(Clone)]
pub(super) struct SharedExpert {
    pub(super) dense: Dense,
    /// Its sigmoid multiplies what the expert gives.
    pub(super) gate: Option<Module>,
}

/// A linear layer of every expert, with the name of its weight.
#[derive(Clone)]
pub(super) struct ExpertModule {
    pub(super) name: Arc<str>,
    pub(super) bias_name: Arc<str>,
    pub(super) layer: ExpertLinear,
}

/// A linear layer to be: its name, inputs, outputs and whether it has a bias.
type Shape<'a> = (&'a str, usize, usize, bool);

/// What reading a layer needs everywhere.
struct Reader<'a> {
    source: &'a dyn Source,
    spec: &'a Spec,
    prefix: String,
}

impl Reader<'_> {
    fn linear(&self, (name, inputs, outputs, bias): Shape<'_>) -> Result<Linear> {
        let weight = self.source.matrix(&format!("{}.{name}.weight", self.prefix), &[outputs, inputs])?;
        let bias = bias
            .then(|| self.source.vector(&format!("{}.{name}.bias", self.prefix), &[outputs]))
            .transpose()?;
        Ok(Linear { weight, bias, lora: None })
    }

    fn module(&self, layers: &[Shape<'_>]) -> Result<Module> {
        let names = layers.iter().map(|layer| format!("{}.{}", self.prefix, layer.0)).collect();
        let linears = layers.iter().map(|&layer| self.linear(layer)).collect::<Result<Vec<_>>>()?;
        Ok(Module { names, group: LinearGroup::new(linears) })
    }

    fn norm(&self, name: &str, shape: &[usize]) -> Result<Norm> {
        read_norm(self.source, self.spec, &format!("{}.{name}.weight", self.prefix), shape)
    }

    fn optional_norm(&self, name: Option<&str>) -> Result<Option<Norm>> {
        name.map(|name| self.norm(name, &[self.spec.width])).transpose()
    }

    fn attention(&self, attention: &AttentionSpec) -> Result<Attention> {
        let (width, bias) = (self.spec.width, attention.input_bias);
        let gates = if attention.output_gate { 2 } else { 1 };
        let queries = gates * attention.query_heads * attention.head_width;
        let keys = attention.key_value_heads * attention.head_width;
        let results = attention.query_heads * attention.value_width;
        let projection = match attention.projection {
            Projection::Fused => {
                Projected::Heads(self.module(&[("self_attn.qkv_proj", width, queries + 2 * keys, bias)])?)
            }
            Projection::Apart => Projected::Heads(self.module(&[
                ("self_attn.q_proj", width, queries, bias),
                ("self_attn.k_proj", width, keys, bias),
                ("self_attn.v_proj", width, keys, bias),
            ])?),
            Projection::Latent(latent) => Projected::Latent(Box::new(self.latent(attention, latent)?)),
        };
        let head_norm = |name: &str, heads: usize| {
            let shape = match attention.head_norm {
                HeadNorm::None | HeadNorm::Rotated => return Ok(None),
                HeadNorm::Shared => vec![attention.head_width],
                HeadNorm::Each => vec![heads, attention.head_width],
                HeadNorm::Joint => vec![heads * attention.head_width],
            };
            self.norm(name, &shape).map(Some)
        };
        let sinks = || -> Result<Named> {
            let name: Arc<str> = format!("{}.self_attn.sinks", self.prefix).into();
            Ok(Named { weight: self.source.vector(&name, &[attention.query_heads])?, name })
        };
        Ok(Attention {
            projection,
            output: self.module(&[("self_attn.o_proj", results, width, attention.output_bias)])?,
            query_norm: head_norm("self_attn.q_norm", attention.query_heads)?,
            key_norm: head_norm("self_attn.k_norm", attention.key_value_heads)?,
            sinks: attention.sinks.then(sinks).transpose()?,
        })
    }

    fn latent(&self, attention: &AttentionSpec, latent: LatentSpec) -> Result<Latent> {
        let (width, bias, rank) = (self.spec.width, attention.input_bias, latent.key_value_rank);
        let queries = attention.query_heads * attention.head_width;
        let unrotated = attention.head_width - latent.rotated_width;
        let keys_values = attention.query_heads * (unrotated + attention.value_width);
        let norm = |name: &str, width: usize| -> Result<Norm> {
            Ok(Norm { epsilon: latent.norm_epsilon, ..self.norm(name, &[width])? })
        };
        let first = match latent.query_rank {
            Some(rank) => ("self_attn.q_a_proj", width, rank, bias),
            None => ("self_attn.q_proj", width, queries, false),
        };
        let second = ("self_attn.kv_a_proj_with_mqa", width, rank + latent.rotated_width, bias);
        let query = |query_rank: usize| -> Result<(Norm, Module)> {
            let module = self.module(&[("self_attn.q_b_proj", query_rank, queries, false)])?;
            Ok((norm("self_attn.q_a_layernorm", query_rank)?, module))
        };
        Ok(Latent {
            spec: latent,
            input: self.module(&[first, second])?,
            query: latent.query_rank.map(query).transpose()?,
            key_value_norm: norm("self_attn.kv_a_layernorm", rank)?,
            key_value: self.module(&[("self_attn.kv_b_proj", rank, keys_values, false)])?,
            indexer: latent
                .indexer
                .zip(latent.query_rank)
                .map(|(spec, rank)| self.indexer(spec, rank))
                .transpose()?,
        })
    }

    fn indexer(&self, spec: IndexerSpec, query_rank: usize) -> Result<Indexer> {
        let name = |end: &str| -> Arc<str> { format!("{}.self_attn.indexer.{end}", self.prefix).into() };
        let matrix = |end: &str, shape: [usize; 2]| -> Result<Named> {
            let name = name(end);
            Ok(Named { weight: self.source.frozen(&name, &shape)?, name })
        };
        let constant = |end: &str, shape: &[usize]| -> Result<Named> {
            let name = name(end);
            Ok(Named { weight: self.source.constant(&name, shape)?, name })
        };
        let IndexerSpec { heads, width, .. } = spec;
        Ok(Indexer {
            spec,
            query: matrix("wq_b.weight", [heads * width, query_rank])?,
            key: matrix("wk.weight", [width, self.spec.width])?,
            key_norm: [constant("k_norm.weight", &[width])?, constant("k_norm.bias", &[width])?],
            weights: constant("weights_proj.weight", &[heads, self.spec.width])?,
        })
    }

    fn delta(&self, delta: &DeltaSpec) -> Result<Delta> {
        let (width, [queries, keys, values]) = (self.spec.width, delta.widths());
        let (heads, columns) = (delta.value_heads, queries + keys + values);
        let input = if delta.grouped {
            self.module(&[
                ("linear_attn.in_proj_qkvz", width, columns + values, false),
                ("linear_attn.in_proj_ba", width, 2 * heads, false),
            ])?
        } else {
            self.module(&[
                ("linear_attn.in_proj_qkv", width, columns, false),
                ("linear_attn.in_proj_z", width, values, false),
                ("linear_attn.in_proj_b", width, heads, false),
                ("linear_attn.in_proj_a", width, heads, false),
            ])?
        };
        let vector = |name: &str, shape: &[usize]| -> Result<Named> {
            let name: Arc<str> = format!("{}.linear_attn.{name}", self.prefix).into();
            Ok(Named { weight: self.source.vector(&name, shape)?, name })
        };
        Ok(Delta {
            spec: *delta,
            input,
            convolution: vector("conv1d.weight", &[columns, 1, delta.taps])?,
            a_log: vector("A_log", &[heads])?,
            dt_bias: vector("dt_bias", &[heads])?,
            norm: vector("norm.weight", &[delta.value_width])?,
            epsilon: self.spec.norm_epsilon,
            output: self.module(&[("linear_attn.out_proj", values, width, false)])?,
        })
    }

    fn dense(&self, part: &DenseSpec) -> Result<Dense> {
        let (width, inner, bias) = (self.spec.width, part.width, part.bias);
        let name = |name: &str| format!("{}.{name}", part.path);
        let rows = 2 * inner / part.names.inputs.len();
        let inputs: Vec<String> = part.names.inputs.iter().map(|input| name(input)).collect();
        let inputs: Vec<_> = inputs.iter().map(|input| (&**input, width, rows, bias)).collect();
        let gate_up = self.module(&inputs)?;
        let down = self.module(&[(&name(part.names.output), inner, width, bias)])?;
        Ok(Dense { spec: part.clone(), gate_up, down })
    }

    fn feed_forward(&self, part: &FeedForwardSpec) -> Result<FeedForward> {
        Ok(match part {
            FeedForwardSpec::Dense(part) => FeedForward::Dense(self.dense(part)?),
            FeedForwardSpec::Experts(part) => FeedForward::Experts(Box::new(self.experts(part)?)),
        })
    }

    fn experts(&self, part: &ExpertsSpec) -> Result<Experts> {
        let (width, count) = (self.spec.width, part.count);
        let router = self.linear((part.router_path, width, count, part.router_bias))?;
        let router_name =
            |end: &str| -> Arc<str> { format!("{}.{}.{end}", self.prefix, part.router_path).into() };
        let correction = |name: Arc<str>| -> Result<Named> {
            Ok(Named { weight: self.source.constant(&name, &[count])?, name })
        };
        let shared = |shared: &SharedSpec| -> Result<SharedExpert> {
            let gate = shared.gate.map(|gate| self.module(&[(gate, width, 1, false)])).transpose()?;
            Ok(SharedExpert { dense: self.dense(&shared.dense)?, gate })
        };
        Ok(Experts {
            router,
            router_names: [Some(router_name("weight")), part.router_bias.then(|| router_name("bias"))],
            correction: part
                .correction
                .then(|| correction(router_name("e_score_correction_bias")))
                .transpose()?,
            gate_up: self.expert_module(part, "gate_up_proj", [2 * part.width, width])?,
            down: self.expert_module(part, "down_proj", [width, part.width])?,
            shared: part.shared.as_ref().map(shared).transpose()?,
            spec: part.clone(),
        })
    }

    fn expert_module(
        &self,
        part: &ExpertsSpec,
        name: &str,
        [features, inputs]: [usize; 2],
    ) -> Result<ExpertModule> {
        let name: Arc<str> = format!("{}.{}.{name}", self.prefix, part.path).into();
        let bias_name: Arc<str> = format!("{name}_bias").into();
        let shape =
            if part.transposed { [part.count, inputs, features] } else { [part.count, features, inputs] };
        let bias = part.bias.then(|| self.source.vector(&bias_name, &[part.count, features])).transpose()?;
        let weight = self.source.matrix(&name, &shape)?;
        let layer = ExpertLinear { weight, transposed: part.transposed, bias, lora: None };
        Ok(ExpertModule { name, bias_name, layer })
    }
}

/// The norm of a model under a full name.
pub(super) fn read_norm(source: &dyn Source, spec: &Spec, name: &str, shape: &[usize]) -> Result<Norm> {
    let weight = Named { name: name.into(), weight: source.vector(name, shape)? };
    Ok(Norm { weight, kind: spec.norm, epsilon: spec.norm_epsilon })
}

impl Norm {
    /// The norm of x, with rows that carry something for their readers.
    pub(super) fn apply(&self, tape: &Tape, x: &Var, spare: Spare) -> Result<Var> {
        let weight = Some(&self.weight.weight);
        Ok(match self.kind {
            NormKind::Rms(kind) => ops::rms_norm_with_spare(tape, x, weight, kind, self.epsilon, spare)?,
            NormKind::Layer => ops::layer_norm(tape, x, weight, None, self.epsilon, spare)?,
        })
    }
}

impl Attention {
    fn modules(&self) -> Vec<&Module> {
        let mut modules = match &self.projection {
            Projected::Heads(module) => vec![module],
            Projected::Latent(latent) => {
                let query = latent.query.iter().map(|(_, module)| module);
                [&latent.input].into_iter().chain(query).chain([&latent.key_value]).collect()
            }
        };
        modules.push(&self.output);
        modules
    }

    fn modules_mut(&mut self) -> Vec<&mut Module> {
        let mut modules = match &mut self.projection {
            Projected::Heads(module) => vec![module],
            Projected::Latent(latent) => {
                let query = latent.query.iter_mut().map(|(_, module)| module);
                [&mut latent.input].into_iter().chain(query).chain([&mut latent.key_value]).collect()
            }
        };
        modules.push(&mut self.output);
        modules
    }

    fn other_weights(&self) -> Vec<&Named> {
        let mut named: Vec<&Named> =
            [&self.query_norm, &self.key_norm].into_iter().flatten().map(|norm| &norm.weight).collect();
        named.extend(&self.sinks);
        if let Projected::Latent(latent) = &self.projection {
            named.extend(latent.query.as_ref().map(|(norm, _)| &norm.weight));
            named.push(&latent.key_value_norm.weight);
            if let Some(indexer) = &latent.indexer {
                named.extend([&indexer.query, &indexer.key, &indexer.weights]);
                named.extend(&indexer.key_norm);
            }
        }
        named
    }
}

impl Mixer {
    /// The group that reads the input.
    pub(super) fn reader(&self) -> &LinearGroup {
        match self {
            Self::Attention(attention) => attention.projection.reader(),
            Self::Delta(delta) => &delta.input.group,
        }
    }
}

impl Projected {
    /// The group that reads the input.
    pub(super) fn reader(&self) -> &LinearGroup {
        match self {
            Self::Heads(module) => &module.group,
            Self::Latent(latent) => &latent.input.group,
        }
    }
}

impl Layer {
    /// A layer that is not packed yet.
    pub(super) fn read(source: &dyn Source, spec: &Spec, index: usize) -> Result<Self> {
        let layer = &spec.layers[index];
        let reader = Reader { source, spec, prefix: format!("model.layers.{index}") };
        Ok(Self {
            spec: layer.clone(),
            epsilon: spec.norm_epsilon,
            mixer: match &layer.delta {
                Some(delta) => Mixer::Delta(Box::new(reader.delta(delta)?)),
                None => Mixer::Attention(reader.attention(&layer.attention)?),
            },
            feed_forward: reader.feed_forward(&layer.feed_forward)?,
            before_attention: reader.optional_norm(layer.norms.before_attention)?,
            after_attention: reader.optional_norm(layer.norms.after_attention)?,
            before_feed_forward: reader.optional_norm(layer.norms.before_feed_forward)?,
            after_feed_forward: reader.optional_norm(layer.norms.after_feed_forward)?,
        })
    }

    /// The groups of linear layers.
    pub(super) fn modules(&self) -> Vec<&Module> {
        let mut modules = match &self.mixer {
            Mixer::Attention(attention) => attention.modules(),
            Mixer::Delta(delta) => vec![&delta.input, &delta.output],
        };
        let (dense, gate) = match &self.feed_forward {
            FeedForward::Dense(dense) => (Some(dense), None),
            FeedForward::Experts(experts) => {
                let shared = experts.shared.as_ref();
                (shared.map(|shared| &shared.dense), shared.and_then(|shared| shared.gate.as_ref()))
            }
        };
        modules.extend(dense.into_iter().flat_map(|dense| [&dense.gate_up, &dense.down]).chain(gate));
        modules
    }

    /// As [`Self::modules`], to be changed.
    pub(super) fn modules_mut(&mut self) -> Vec<&mut Module> {
        let mut modules = match &mut self.mixer {
            Mixer::Attention(attention) => attention.modules_mut(),
            Mixer::Delta(delta) => vec![&mut delta.input, &mut delta.output],
        };
        let (dense, gate) = match &mut self.feed_forward {
            FeedForward::Dense(dense) => (Some(dense), None),
            FeedForward::Experts(experts) => match &mut experts.shared {
                Some(shared) => (Some(&mut shared.dense), shared.gate.as_mut()),
                None => (None, None),
            },
        };
        modules.extend(dense.into_iter().flat_map(|dense| [&mut dense.gate_up, &mut dense.down]).chain(gate));
        modules
    }

    /// The layer that chooses experts, with the name of its weight.
    pub(super) fn router(&self) -> Option<(&str, &Linear)> {
        let FeedForward::Experts(experts) = &self.feed_forward else { return None };
        Some((experts.router_names[0].as_deref()?, &experts.router))
    }

    /// As [`Self::router`], to be changed.
    pub(super) fn router_mut(&mut self) -> Option<(Arc<str>, &mut Linear)> {
        let FeedForward::Experts(experts) = &mut self.feed_forward else { return None };
        Some((experts.router_names[0].clone()?, &mut experts.router))
    }

    /// The layers of all experts.
    pub(super) fn expert_modules(&self) -> impl Iterator<Item = &ExpertModule> {
        let experts = match &self.feed_forward {
            FeedForward::Dense(_) => None,
            FeedForward::Experts(experts) => Some(experts),
        };
        experts.into_iter().flat_map(|experts| [&experts.gate_up, &experts.down])
    }

    /// As [`Self::expert_modules`], to be changed.
    pub(super) fn expert_modules_mut(&mut self) -> impl Iterator<Item = &mut ExpertModule> {
        let experts = match &mut self.feed_forward {
            FeedForward::Dense(_) => None,
            FeedForward::Experts(experts) => Some(experts),
        };
        experts.into_iter().flat_map(|experts| [&mut experts.gate_up, &mut experts.down])
    }

    /// Every weight that is in no group of linear layers.
    pub(super) fn other_weights(&self) -> Vec<(&str, &Weight)> {
        let norms = [
            &self.before_attention,
            &self.after_attention,
            &self.before_feed_forward,
            &self.after_feed_forward,
        ];
        let norms = norms.into_iter().flatten().map(|norm| &norm.weight);
        let named = norms.chain(match &self.mixer {
            Mixer::Attention(attention) => attention.other_weights(),
            Mixer::Delta(delta) => vec![&delta.convolution, &delta.a_log, &delta.dt_bias, &delta.norm],
        });
        let mut weights: Vec<(&str, &Weight)> = named.map(|named| (&*named.name, &named.weight)).collect();
        if let FeedForward::Experts(experts) = &self.feed_forward {
            let [name, bias_name] = experts.router_names.each_ref().map(|name| name.as_deref());
            weights.extend(name.map(|name| (name, &experts.router.weight)));
            weights.extend(bias_name.zip(experts.router.bias.as_ref()));
            weights.extend(experts.correction.iter().map(|named| (&*named.name, &named.weight)));
        }
        for module in self.expert_modules() {
            weights.push((&*module.name, &module.layer.weight));
            weights.extend(module.layer.bias.iter().map(|bias| (&*module.bias_name, bias)));
        }
        weights
    }

    /// Packs the groups; see [`LinearGroup::pack`].
    pub(super) fn pack(&mut self, dtype: DType) -> Result<()> {
        self.modules_mut().into_iter().try_for_each(|module| Ok(module.group.pack(dtype)?))
    }
}
