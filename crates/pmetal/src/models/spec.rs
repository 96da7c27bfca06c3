//! What distinguishes one decoder from another, as a value.

use pmetal_engine::device::MaskKind;
use pmetal_engine::device::{GateActivation, NormWeight};
use pmetal_engine::ops::{PairedGate, Router, Weighting};

use super::loader::Need;
use super::rope::Rope;

/// A decoder-only language model: everything that its forward pass and its checkpoint depend on.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The `model_type` that it was made from.
    pub family: &'static str,
    /// V: rows of the embedding.
    pub vocabulary: usize,
    /// Token whose row of the embedding receives no gradient from the input side.
    pub padding_id: Option<u32>,
    /// D: width of the residual stream.
    pub width: usize,
    /// Longest document that the model was made for.
    pub context_length: usize,
    /// Added to the mean square, or the variance, in every norm.
    pub norm_epsilon: f32,
    /// What every norm with a weight computes.
    pub norm: NormKind,
    /// Factor on embeddings.
    pub embedding_scale: f32,
    /// Factor on what attention and feed-forward add to the residual stream.
    pub residual_scale: f32,
    /// Factor on logits.
    pub logit_scale: f32,
    /// Logits become `cap * tanh(logits / cap)`, after their factor.
    pub logit_softcap: Option<f32>,
    /// Rotary embeddings; layers refer to them by index.
    pub ropes: Vec<Rope>,
    /// One entry per layer.
    pub layers: Vec<LayerSpec>,
    /// Whether the output head is the embedding.
    pub tied_head: bool,
    /// Layers after the last that predict further tokens; checkpoints may hold them, and they are passed over.
    pub further_layers: usize,
    /// What the paths of its modules begin with in the model that transformers' `AutoModelForCausalLM` makes of the folder.
    pub place: &'static str,
}

/// What a norm computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm with a weight.
    Rms(NormWeight),
    /// LayerNorm with a weight and no bias.
    Layer,
}

/// One decoder layer.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// Its attention.
    pub attention: AttentionSpec,
    /// The gated delta rule, in place of attention.
    pub delta: Option<DeltaSpec>,
    /// Its feed-forward part.
    pub feed_forward: FeedForwardSpec,
    /// Its norms.
    pub norms: LayerNorms,
}

/// Where a layer has norms over D, by the names that checkpoints have for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerNorms {
    /// What attention reads.
    pub before_attention: Option<&'static str>,
    /// What attention adds to the residual stream.
    pub after_attention: Option<&'static str>,
    /// What the feed-forward part reads.
    pub before_feed_forward: Option<&'static str>,
    /// What the feed-forward part adds to the residual stream.
    pub after_feed_forward: Option<&'static str>,
    /// Whether the feed-forward part reads what attention reads, and both are added at once.
    pub parallel: bool,
}

impl LayerNorms {
    /// Before attention and before the feed-forward part.
    pub const BEFORE: Self = Self {
        before_attention: Some("input_layernorm"),
        after_attention: None,
        before_feed_forward: Some("post_attention_layernorm"),
        after_feed_forward: None,
        parallel: false,
    };
}

/// Grouped-query attention.
#[derive(Debug, Clone)]
pub struct AttentionSpec {
    /// H.
    pub query_heads: usize,
    /// K; divides H.
    pub key_value_heads: usize,
    /// E of queries and keys.
    pub head_width: usize,
    /// E of values.
    pub value_width: usize,
    /// How queries, keys and values come from the input.
    pub projection: Projection,
    /// Whether the layers that read the input have biases.
    pub input_bias: bool,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// The norm that q and k go through.
    pub head_norm: HeadNorm,
    /// Factor on the scores.
    pub scale: f32,
    /// Scores become `cap * tanh(scores / cap)`.
    pub softcap: Option<f32>,
    /// Whether queries come with a gate of the result, head by head.
    pub output_gate: bool,
    /// Whether each head has a score of its own that nothing belongs to.
    pub sinks: bool,
    /// Which keys a query sees.
    pub mask: MaskKind,
    /// Index into [`Spec::ropes`] for queries and keys; `None` for no rotation.
    pub rope: Option<usize>,
    /// Index into [`Spec::ropes`] of a factor on queries by position.
    pub temperature: Option<usize>,
}

impl AttentionSpec {
    /// What chooses keys, where something does.
    pub(super) fn indexer(&self) -> Option<IndexerSpec> {
        match self.projection {
            Projection::Latent(latent) => latent.indexer,
            Projection::Apart | Projection::Fused => None,
        }
    }
}

/// Linear attention by the gated delta rule (Yang, Kautz and Hatamizadeh, arXiv 2412.06464).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaSpec {
    /// G: heads of queries and keys.
    pub key_heads: usize,
    /// H: heads of values; a multiple of G.
    pub value_heads: usize,
    /// Width of a head of queries and keys.
    pub key_width: usize,
    /// Width of a head of values.
    pub value_width: usize,
    /// Tokens that the convolution before it sees.
    pub taps: usize,
    /// Whether projections are two, with the rows of each key head together.
    pub grouped: bool,
}

impl DeltaSpec {
    /// Columns of queries, of keys and of values.
    pub fn widths(&self) -> [usize; 3] {
        let keys = self.key_heads * self.key_width;
        [keys, keys, self.value_heads * self.value_width]
    }
}

/// How queries, keys and values come from the input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Projection {
    /// By a linear layer each.
    Apart,
    /// By one linear layer, `qkv_proj`.
    Fused,
    /// Through narrow latent vectors (DeepSeek-V2, arXiv 2405.04434).
    Latent(LatentSpec),
}

/// Multi-head latent attention. The first part of a head of queries and keys knows no positions, the rest is rotated; of
/// keys all heads share the rotated part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentSpec {
    /// Width of what queries are made from; `None` where they are made from the input.
    pub query_rank: Option<usize>,
    /// Width of what keys and values are made from.
    pub key_value_rank: usize,
    /// Elements of a head that are rotated.
    pub rotated_width: usize,
    /// Epsilon of the norms of both.
    pub norm_epsilon: f32,
    /// What chooses the keys that a query looks at; all that it sees where there is none.
    pub indexer: Option<IndexerSpec>,
}

/// A choice of keys by heads of its own, which is never trained (DeepSeek-V3.2): queries from the latent vector of queries,
/// keys of one head from the input. The first part of a head, as wide as the layer's own, is rotated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct IndexerSpec {
    /// Heads of queries.
    pub heads: usize,
    /// Elements of a head.
    pub width: usize,
    /// Keys that a query looks at.
    pub count: usize,
    /// Epsilon of the norm of keys.
    pub norm_epsilon: f32,
}

/// The norm that queries and keys go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadNorm {
    /// None.
    None,
    /// The model's norm over E, before the rotation, with one weight \[E\] for all heads.
    Shared,
    /// The model's norm over E, before the rotation, with weights \[H, E\].
    Each,
    /// The model's norm over H * E, before the rotation.
    Joint,
    /// RMSNorm over E without a weight, after the rotation.
    Rotated,
}

/// What follows attention in a layer.
#[derive(Debug, Clone)]
pub enum FeedForwardSpec {
    /// One gated layer for all tokens.
    Dense(DenseSpec),
    /// Some of many for each token.
    Experts(Box<ExpertsSpec>),
}

/// A gated feed-forward layer.
#[derive(Debug, Clone)]
pub struct DenseSpec {
    /// Its module in checkpoints.
    pub path: &'static str,
    /// F.
    pub width: usize,
    /// Applied to the gate.
    pub activation: GateActivation,
    /// What checkpoints call its projections.
    pub names: DenseNames,
    /// Whether its projections have biases.
    pub bias: bool,
}

/// Names of the projections of a gated layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DenseNames {
    /// Gate and up, or the linear layer that is both.
    pub inputs: &'static [&'static str],
    /// What gives the result.
    pub output: &'static str,
}

impl DenseNames {
    /// Gate and up apart.
    pub const APART: Self = Self { inputs: &["gate_proj", "up_proj"], output: "down_proj" };
    /// Gate and up in one.
    pub const FUSED: Self = Self { inputs: &["gate_up_proj"], output: "down_proj" };
}

/// A mixture of experts.
#[derive(Debug, Clone)]
pub struct ExpertsSpec {
    /// The module in checkpoints that holds them.
    pub path: &'static str,
    /// The module of the layer that scores them.
    pub router_path: &'static str,
    /// X.
    pub count: usize,
    /// F of each.
    pub width: usize,
    /// What is between their two products.
    pub gate: PairedGate,
    /// How a token's experts are chosen and weighed.
    pub router: Router,
    /// Whether scores have biases.
    pub router_bias: bool,
    /// Whether scores are computed in f32 whatever the activations are.
    pub wide_router: bool,
    /// Whether the checkpoint corrects scores for the choice alone.
    pub correction: bool,
    /// Where the weights of the choice are applied.
    pub weighting: Weighting,
    /// Whether matrices are stored as \[X, D, N\].
    pub transposed: bool,
    /// Whether PEFT takes the results of its matrices for inputs, and the other way round.
    pub swapped_adapters: bool,
    /// Whether experts have biases.
    pub bias: bool,
    /// What every token goes through besides.
    pub shared: Option<SharedSpec>,
    /// Factor on the loss that balances the load, where the configuration asks for one.
    pub balance: Option<f32>,
}

/// The loss that balances the load of all experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BalanceSpec {
    /// X.
    pub experts: usize,
    /// Its factor in the loss that is trained.
    pub coefficient: f32,
}

/// An expert for all tokens.
#[derive(Debug, Clone)]
pub struct SharedSpec {
    /// Its layer.
    pub dense: DenseSpec,
    /// The module whose sigmoid it is multiplied by.
    pub gate: Option<&'static str>,
}

impl FeedForwardSpec {
    /// The dense layer, to be changed; `None` for a mixture of experts.
    pub fn dense_mut(&mut self) -> Option<&mut DenseSpec> {
        match self {
            Self::Dense(dense) => Some(dense),
            Self::Experts(_) => None,
        }
    }

    /// Columns that are computed for each token between the two products: F, or that of all its experts.
    pub fn active_width(&self) -> usize {
        match self {
            Self::Dense(dense) => dense.width,
            Self::Experts(experts) => {
                let shared = experts.shared.as_ref().map_or(0, |shared| shared.dense.width);
                experts.router.choices * experts.width + shared
            }
        }
    }
}

impl Spec {
    /// Every kind of mask that layers have.
    pub fn mask_kinds(&self) -> Vec<MaskKind> {
        let mut kinds = Vec::new();
        for layer in &self.layers {
            if !kinds.contains(&layer.attention.mask) {
                kinds.push(layer.attention.mask);
            }
        }
        kinds
    }

    /// F of the first layer that has no experts; 0 where there is none.
    pub(super) fn inner(&self) -> usize {
        self.first_dense().map_or(0, |dense| dense.width)
    }

    /// The activation of that layer.
    pub(super) fn activation(&self) -> GateActivation {
        self.first_dense().map_or(GateActivation::Silu, |dense| dense.activation)
    }

    fn first_dense(&self) -> Option<&DenseSpec> {
        self.layers.iter().find_map(|layer| match &layer.feed_forward {
            FeedForwardSpec::Dense(dense) => Some(dense),
            FeedForwardSpec::Experts(_) => None,
        })
    }

    /// The loss that balances experts, where the configuration asks for one; it is a part of the loss of training, not of
    /// that of evaluation.
    pub fn balance(&self) -> Option<BalanceSpec> {
        self.layers.iter().find_map(|layer| match &layer.feed_forward {
            FeedForwardSpec::Experts(part) => {
                part.balance.map(|coefficient| BalanceSpec { experts: part.count, coefficient })
            }
            FeedForwardSpec::Dense(_) => None,
        })
    }

    /// How many keys layers choose, of those that do.
    pub(super) fn chosen_keys(&self) -> impl Iterator<Item = usize> {
        self.layers.iter().filter_map(|layer| layer.attention.indexer()).map(|indexer| indexer.count)
    }

    /// Parameters of the model, tied weights counted once.
    pub fn parameter_count(&self) -> u128 {
        super::loader::needs(self).iter().map(Need::elements).sum()
    }
}
