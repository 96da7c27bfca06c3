//! Attention through latent vectors: of which keys and values of heads are made, or which stand for them.

use pmetal_engine::ops;
use pmetal_engine::{Tape, Var};

use super::indexer::chooses;
use super::run::{Heads, LayerCache, Shared, normed, projected};
use crate::error::Result;
use crate::models::layer::{Latent, Module, Norm};
use crate::models::spec::AttentionSpec;

impl Latent {
    /// Queries and keys \[T, H, E\], values \[T, H, Ev\], of which keys and values come from one latent vector, and what
    /// keys are chosen by. A cache holds latent vectors, with the rotated part of keys. Few queries go to these as they
    /// are; for many, keys and values of heads are made again.
    pub(super) fn heads(
        &self,
        tape: &Tape,
        input: &Var,
        spec: &AttentionSpec,
        shared: &Shared,
        cache: Option<LayerCache<'_>>,
    ) -> Result<Heads<'_>> {
        let (tokens, heads) = (input.tensor().rows(), spec.query_heads);
        let (rank, turned) = (self.spec.key_value_rank, self.spec.rotated_width);
        let unturned = spec.head_width - turned;
        let [first, second] = projected(ops::linear_group(tape, input, &self.input.group, shared.options())?);
        let normed = |x: &Var, norm: &Norm, module: &Module| normed(tape, x, Some(norm), Some(&module.group));
        let mut indexed = None;
        let query = match &self.query {
            Some((norm, module)) => {
                let latent = normed(&first, norm, module)?;
                // What is chosen by is kept with the keys, also while all of them are chosen.
                let mask = &shared.inputs.seen(spec).mask;
                let needed = |count| cache.is_some() || chooses(mask, count);
                if let Some(indexer) = self.indexer.as_ref().filter(|indexer| needed(indexer.spec.count)) {
                    let table = spec.rope.map(|rope| &shared.inputs.ropes[rope]);
                    indexed = Some(indexer.run(input.tensor(), latent.tensor(), table)?);
                }
                expanded(tape, &latent, module, shared)?
            }
            None => first,
        };
        let query = query.reshape(&[tokens, heads, spec.head_width])?;
        let [mut query, mut turned_query] = projected(ops::split_heads(tape, &query, &[unturned, turned])?);
        let [latent, turned_key] = projected(ops::split_columns(tape, second, &[rank, turned])?);
        let mut latent = normed(&latent, &self.key_value_norm, &self.key_value)?;
        let mut turned_key = turned_key.reshape(&[tokens, 1, turned])?;
        if let Some(rope) = spec.rope {
            let table = &shared.inputs.ropes[rope];
            [turned_query] = ops::rope_all(tape, [turned_query], table)?;
            [turned_key] = ops::rope_all(tape, [turned_key], table)?;
        }
        if let Some((cache, index)) = cache {
            let both = ops::join_heads(tape, &[&latent.reshape(&[tokens, 1, rank])?, &turned_key])?;
            let keys = indexed.as_ref().map(|chosen| &chosen.key);
            let new: Vec<_> = [both.tensor()].into_iter().chain(keys).collect();
            let mut held = cache.append(index, &new, shared.inputs.seen(spec).row.as_ref())?;
            if let Some(indexed) = &mut indexed {
                indexed.key = held.remove(1);
            }
            let held = Var::constant(held.remove(0));
            if self.absorbs(tokens, spec) {
                let layer = &self.key_value.group.layers()[0];
                let own = ops::absorb_queries(query.tensor(), layer, [unturned, spec.value_width])?;
                query = ops::join_heads(tape, &[&Var::constant(own), &turned_query])?;
                let (key, value) = (held.clone(), held);
                return Ok(Heads { query, key, value, gate: None, indexed, absorbed: Some(self) });
            }
            let [all, turned] = projected(ops::split_heads(tape, &held, &[rank, turned])?);
            let keys = all.tensor().rows();
            (latent, turned_key) = (all.reshape(&[keys, rank])?, turned);
        }
        let keys = latent.tensor().rows();
        let both = expanded(tape, &latent, &self.key_value, shared)?;
        let both = both.reshape(&[keys, heads, unturned + spec.value_width])?;
        let [key, value] = projected(ops::split_heads(tape, &both, &[unturned, spec.value_width])?);
        query = ops::join_heads(tape, &[&query, &turned_query])?;
        let key = ops::join_heads(tape, &[&key, &turned_key])?;
        Ok(Heads { query, key, value, gate: None, indexed, absorbed: None })
    }

    /// Whether so many queries go to latent vectors, because longer products with these cost less than making keys and
    /// values of heads. Weights of eight bits are read by products of whole groups alone.
    fn absorbs(&self, tokens: usize, spec: &AttentionSpec) -> bool {
        let rank = self.spec.key_value_rank;
        let (own, heads) = (2 * rank + self.spec.rotated_width, spec.head_width + spec.value_width);
        let made = spec.head_width - self.spec.rotated_width + spec.value_width;
        tokens * own.saturating_sub(heads) <= rank * made && !self.key_value.group.reads_codes()
    }

    /// What heads give, \[T, H, Ev\], from what attention to latent vectors does, of which the rotated part means nothing.
    pub(super) fn expand_results(&self, tape: &Tape, x: &Var, spec: &AttentionSpec) -> Result<Var> {
        let (rank, turned) = (self.spec.key_value_rank, self.spec.rotated_width);
        let [latents, _] = projected(ops::split_heads(tape, x, &[rank, turned])?);
        let (layer, unturned) = (&self.key_value.group.layers()[0], spec.head_width - turned);
        let widths = [unturned, spec.value_width];
        Ok(Var::constant(ops::expand_results(latents.tensor(), layer, widths)?))
    }
}

/// The one result of a module.
fn expanded(tape: &Tape, x: &Var, module: &Module, shared: &Shared) -> Result<Var> {
    let [out] = projected(ops::linear_group(tape, x, &module.group, shared.options())?);
    Ok(out)
}
