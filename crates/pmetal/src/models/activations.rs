//! How much memory the activations of a training step take, before any is asked for.

use pmetal_engine::Recompute;
use pmetal_engine::ops::Weighting;

use super::spec::{
    AttentionSpec, DeltaSpec, ExpertsSpec, FeedForwardSpec, IndexerSpec, LayerSpec, Projection, Spec,
};

/// What the memory of a training step depends on besides the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepShape {
    /// Tokens of one forward pass.
    pub tokens: usize,
    /// Size of an activation.
    pub element_bytes: usize,
    /// Sum of the ranks of a layer's adapters.
    pub adapter_ranks: usize,
    /// What of a layer is kept for the backward pass.
    pub recompute: Recompute,
    /// Whether the inputs of layers wait in the host's memory.
    pub offloads: bool,
    /// Whether a CPU computes it.
    pub on_host: bool,
}

/// Columns in the type of activations, and bytes of what has another type, for each token.
#[derive(Debug, Clone, Copy, Default)]
struct Columns {
    typed: usize,
    bytes: usize,
}

impl Columns {
    fn typed(typed: usize) -> Self {
        Self { typed, bytes: 0 }
    }

    fn with(self, other: Self) -> Self {
        Self { typed: self.typed + other.typed, bytes: self.bytes + other.bytes }
    }

    fn of_tokens(self, step: &StepShape) -> usize {
        step.tokens * (self.typed * step.element_bytes + self.bytes)
    }
}

impl AttentionSpec {
    /// Queries, keys, values and the result, and what they are made from.
    fn kept(&self, step: &StepShape) -> Columns {
        let heads = self.query_heads + self.key_value_heads;
        let typed = heads * (self.head_width + self.value_width);
        let Projection::Latent(latent) = self.projection else { return Columns::typed(typed) };
        let made_from = 2 * (latent.query_rank.unwrap_or(0) + latent.key_value_rank);
        let bytes = latent.indexer.map_or(0, |indexer| indexer.kept_bytes(step));
        Columns { typed: typed + made_from, bytes }
    }
}

impl IndexerSpec {
    /// A bit for each key, where some are left out.
    fn kept_bytes(&self, step: &StepShape) -> usize {
        if step.tokens > self.count { 4 * step.tokens.div_ceil(32) } else { 0 }
    }
}

impl DeltaSpec {
    /// What the convolution reads and gives, the gate and the result, and what steers the state.
    fn kept(&self) -> Columns {
        let values = self.value_heads * self.value_width;
        Columns::typed(2 * self.widths().iter().sum::<usize>() + 2 * values + 2 * self.value_heads)
    }

    /// Gradients of what it reads, and on other devices than a CPU f32 workspace.
    fn passing(&self, step: &StepShape) -> Columns {
        let [queries, keys, values] = self.widths();
        let workspace = self.value_heads * (2 * self.value_width + 3 * self.key_width + 3) + queries + keys;
        let bytes = if step.on_host { 0 } else { 4 * workspace };
        Columns { typed: queries + keys + 2 * values, bytes }
    }
}

impl ExpertsSpec {
    /// What is kept of each of a token's k rows besides gate and up: what the expert gave, for the gradient of its weight; of
    /// the routing the logits, and weight, number, place and order of each row; and what a gate of a shared expert reads.
    fn kept(&self, width: usize) -> Columns {
        let choices = self.router.choices;
        let (narrow, wide) = if self.wide_router { (0, self.count) } else { (self.count, 0) };
        let gated = self.shared.as_ref().and_then(|shared| shared.gate).map_or(0, |_| width + 1);
        Columns { typed: self.given(width) + gated + narrow, bytes: 16 * choices + 4 * wide }
    }

    /// Columns of what a token's experts gave, where that is kept.
    fn given(&self, width: usize) -> usize {
        match self.weighting {
            Weighting::Output => self.router.choices * width,
            Weighting::Input => 0,
        }
    }

    /// What is there besides what is kept while gradients pass: at first those of what the experts gave; what they gave
    /// is gone when the middle is computed again, or gets its gradient, and when gate and up get theirs.
    fn passing(&self, width: usize, recompute: Recompute) -> usize {
        let (rows, middle) = (self.router.choices * width, self.router.choices * self.width);
        let shared = self.shared.as_ref().map_or(0, |shared| width + 3 * shared.dense.width);
        let given = self.given(width);
        // A middle that was kept is gone, too, when gate and up get their gradients.
        let held = if recompute == Recompute::None { given + middle } else { given };
        [rows, (rows + middle.max(shared)).saturating_sub(given), (3 * middle).saturating_sub(held)]
            .into_iter()
            .fold(0, usize::max)
    }
}

impl FeedForwardSpec {
    /// What it keeps for the backward pass.
    fn kept(&self, width: usize) -> Columns {
        let pair = Columns::typed(2 * self.active_width());
        match self {
            Self::Dense(_) => pair,
            Self::Experts(experts) => pair.with(experts.kept(width)),
        }
    }

    /// What it keeps besides where nothing is computed again: its middle, and the rows that experts read.
    fn kept_again(&self, width: usize) -> usize {
        let gathered = match self {
            Self::Dense(_) => 0,
            Self::Experts(experts) => experts.router.choices * width,
        };
        self.active_width() + gathered
    }

    /// What is there while gradients pass, besides what is kept.
    fn passing(&self, width: usize, step: &StepShape) -> usize {
        match self {
            Self::Dense(dense) if step.on_host => width + 3 * dense.width,
            Self::Dense(dense) => 2 * width + dense.width,
            Self::Experts(experts) => 2 * width + experts.passing(width, step.recompute),
        }
    }
}

impl LayerSpec {
    fn kept(&self, width: usize, step: &StepShape) -> usize {
        // What is normed before it is added is kept as well.
        let after = [self.norms.after_attention, self.norms.after_feed_forward];
        let streams = 2 + after.into_iter().flatten().count();
        let mixed = self.delta.as_ref().map_or_else(|| self.attention.kept(step), DeltaSpec::kept);
        let again = match step.recompute {
            Recompute::None => 2 * width + self.feed_forward.kept_again(width),
            Recompute::Cheap | Recompute::Full => 0,
        };
        let own = Columns::typed(streams * width + again + step.adapter_ranks);
        own.with(mixed).with(self.feed_forward.kept(width)).of_tokens(step)
    }

    fn passing(&self, width: usize, step: &StepShape) -> usize {
        let last = Columns::typed(self.feed_forward.passing(width, step)).of_tokens(step);
        let Some(delta) = &self.delta else { return last };
        // When gradients reach it, what the feed-forward part kept is gone.
        let first = Columns::typed(2 * width).with(delta.passing(step)).of_tokens(step);
        last.max(first.saturating_sub(self.feed_forward.kept(width).of_tokens(step)))
    }
}

impl Spec {
    /// Estimate of the activations that a training step over `tokens` tokens holds at its peak.
    ///
    /// Counted per layer and token are two residual inputs, q, k, v, the attention's output, gate, up and what the
    /// adapters keep (the sum of their ranks in a layer); of experts gate, up and result of each row and the routing, of linear
    /// attention what its convolution reads and gives, of a choice of keys its bits; without any recomputation also two
    /// norms, the gated products and the rows that experts read; with full recomputation one residual input per layer, or of two
    /// layers where the others wait in the host's memory, and the insides of one while it is passed. To these comes the
    /// larger of two that never meet: the logits of one chunk with the hidden states that enter and leave it, or the
    /// gradients of the layer that takes most while it is passed (the middle of its feed-forward part three times on a CPU,
    /// once on other devices, which turn gate and up into their gradients; three times of experts, less what they gave).
    pub fn activation_bytes(&self, step: &StepShape) -> usize {
        let state = Columns::typed(self.width).of_tokens(step);
        // What is there from the forward to the backward pass, and the most that there is with a layer that is passed.
        let (mut kept, mut most) = (0, 0);
        for (index, layer) in self.layers.iter().enumerate() {
            let own = layer.kept(self.width, step);
            let insides = match step.recompute {
                Recompute::Full => {
                    kept = state * if step.offloads { (index + 1).min(2) } else { index + 1 };
                    own.saturating_sub(state)
                }
                Recompute::None | Recompute::Cheap => {
                    kept += own;
                    0
                }
            };
            most = most.max(kept + insides + layer.passing(self.width, step));
        }
        let chunk_rows = pmetal_engine::ops::logit_chunk_rows(step.on_host, self.vocabulary).min(step.tokens);
        let row = 4 * self.vocabulary + 2 * self.width * step.element_bytes;
        most.max(kept + chunk_rows * row + state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{Config, families};

    #[test]
    fn the_estimate_is_near_what_was_measured_on_a_gpu() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../bench/gpu_sft");
        // MiB of activations and logits at the peak of a bf16 step over 4 rows of 2048 tokens, adapters of rank 16 on all
        // linear layers: `scripts/gpu-check` on an H200.
        let (none, cheap, full) = (Recompute::None, Recompute::Cheap, Recompute::Full);
        let measured = [
            ("llama-3.2-1b", none, false, 9858.5),
            ("llama-3.2-1b", cheap, false, 6794.5),
            ("llama-3.2-1b", full, false, 1043.5),
            ("llama-3.2-1b", full, true, 595.5),
            ("llama-3.1-8b", full, false, 3012.0),
            ("llama-3.1-8b", full, true, 1092.0),
        ];
        for (name, recompute, offloads, mebibytes) in measured {
            let text = std::fs::read_to_string(format!("{folder}/{name}.json")).unwrap();
            let spec = families::read(&Config::new(serde_json::from_str(&text).unwrap()).unwrap()).unwrap();
            let step = StepShape {
                tokens: 4 * 2048,
                element_bytes: 2,
                adapter_ranks: 7 * 16,
                recompute,
                offloads,
                on_host: false,
            };
            let estimate = spec.activation_bytes(&step) as f64 / (1 << 20) as f64;
            let error = estimate / mebibytes - 1.0;
            println!("{name} {recompute:?} {offloads}: {estimate:.0} MiB, {:.1} %", 100.0 * error);
            assert!(error.abs() <= 0.1, "{name} {recompute:?} {offloads}: {estimate} of {mebibytes} MiB");
        }
    }
}
