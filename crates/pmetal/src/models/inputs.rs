//! What a batch gives to the decoder, in its device's memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use pmetal_engine::device::{AttentionMask, Documents, MaskKind, Segment};
use pmetal_engine::ops::{self, Cursor, RopeTable, Targets};
use pmetal_engine::{Category, Tensor};

use super::cache::KeyValueCache;
use super::decoder::{Decoder, TokenRun};
use super::rope::{Positions, Rope};
use super::spec::AttentionSpec;
use crate::error::{Error, Result};

/// Tokens, angles and masks of one run; made anew for each, or overwritten in place by a run of as many tokens.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// u32 \[T\].
    pub(super) ids: Tensor,
    /// By the spec's list of rotary embeddings.
    pub(super) ropes: Vec<RopeTable>,
    /// By the spec's kinds of masks.
    pub(super) seen: Vec<Seen>,
    /// Where documents are, for layers that pass on a state.
    pub(super) documents: Option<Documents>,
    /// Tokens of documents, the others being padding.
    pub(super) tokens: usize,
}

/// What layers of one kind of mask see.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    kind: MaskKind,
    pub(super) mask: AttentionMask,
    /// u32 \[1\]: the row of the cache that the token's keys and values go to, where the device decides. Attention is then
    /// given all rows of the cache, of which the mask shows those that are there.
    pub(super) row: Option<Tensor>,
}

impl Inputs {
    /// Tokens, padding included.
    pub fn rows(&self) -> usize {
        self.ids.elements()
    }

    /// What a layer sees.
    pub(super) fn seen(&self, attention: &AttentionSpec) -> &Seen {
        let found = self.seen.iter().find(|seen| seen.kind == attention.mask);
        found.expect("invariant: every layer's mask was made")
    }

    /// Whether the device moves from token to token, so that whoever reads its tokens counts them.
    pub(super) fn is_step(&self) -> bool {
        self.seen.iter().any(|seen| seen.row.is_some())
    }
}

/// Angles that were computed once, by position, for one rotary embedding and epoch of it.
#[derive(Debug, Clone)]
struct Angles {
    cosines: Tensor,
    sines: Tensor,
}

/// Angles by the number of the rotary embedding and its epoch. Recorded work reads those that it was recorded with, so they stay
/// while others are made.
#[derive(Debug, Default)]
pub(super) struct AngleCache(Mutex<HashMap<(usize, usize), Angles>>);

/// Angles are computed for at least this many positions.
const FEWEST_POSITIONS: usize = 64;

/// Epochs whose angles are held at a time: more are of a base that changes with every length.
const MOST_EPOCHS: usize = 8;

impl Decoder {
    /// A run's inputs, filled up with padding to `rows` tokens, which no document sees. What the run's single document
    /// begins with may be in a cache.
    ///
    /// # Errors
    /// [`Error::Usage`] when documents do not cover the run or it does not fit; a token id beyond the vocabulary; out
    /// of memory.
    pub fn inputs(&self, run: &TokenRun, rows: usize, cache: Option<&KeyValueCache>) -> Result<Inputs> {
        let ids = self.padded_ids(run, rows)?;
        let ids = Tensor::from_slice(&self.device, Category::Activations, &[rows], &ids)?;
        let positions = positions_of(run);
        let ropes = self.spec.ropes.iter().enumerate();
        let ropes =
            ropes.map(|(index, rope)| self.angles(index, rope, &positions, rows)).collect::<Result<_>>()?;
        let kinds = self.spec.mask_kinds();
        let held = cache.map_or_else(|| vec![0; kinds.len()], |cache| cache.held().collect());
        let seen = kinds.into_iter().zip(held).map(|(kind, held)| {
            let mask = AttentionMask::new(&self.device, kind, segments_of(run, held), [rows, held + rows])?;
            Ok(Seen { kind, mask, row: None })
        });
        let seen = seen.collect::<Result<_>>()?;
        let documents =
            self.passes_states().then(|| Documents::new(&self.device, &segments_of(run, 0), rows));
        Ok(Inputs { ids, ropes, seen, documents: documents.transpose()?, tokens: run.ids.len() })
    }

    /// Whether layers pass a state from token to token.
    pub(crate) fn passes_states(&self) -> bool {
        self.spec.layers.iter().any(|layer| layer.delta.is_some())
    }

    /// The inputs of a step that a cursor on [`Spec::mask_kinds`] moves through a document of up to `most` tokens, rotated as
    /// those of `length` tokens are; `rooms` are those of the cache.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn step_inputs(
        &self,
        cursor: &Cursor,
        rooms: &[usize],
        [most, length]: [usize; 2],
    ) -> Result<Inputs> {
        let last = [Positions { first: most - 1, count: 1, document_length: length }];
        let ropes = self.spec.ropes.iter().enumerate();
        let ropes = ropes.map(|(index, rope)| Ok(self.angles(index, rope, &last, 1)?.at(cursor.position())));
        let seen = self.spec.mask_kinds().into_iter().zip(rooms).enumerate().map(|(index, (kind, &room))| {
            Ok(Seen { kind, mask: cursor.mask(index, room)?, row: Some(cursor.row(index)?) })
        });
        let documents = self.passes_states().then(|| Documents::single(&self.device, 1)).transpose()?;
        Ok(Inputs {
            ids: cursor.token(),
            ropes: ropes.collect::<Result<_>>()?,
            seen: seen.collect::<Result<_>>()?,
            documents,
            tokens: 1,
        })
    }

    /// Overwrites inputs by those of another run, in the same memory; false, with nothing changed, when that does not
    /// hold them.
    ///
    /// # Errors
    /// As [`Self::inputs`].
    pub fn overwrite_inputs(&self, inputs: &mut Inputs, run: &TokenRun) -> Result<bool> {
        let rows = inputs.ids.elements();
        if run.ids.len() > rows {
            return Ok(false);
        }
        let segments = segments_of(run, 0);
        // Recorded work chooses keys where those that it was recorded with were more than are chosen.
        let longest = segments.iter().map(|segment| segment.key_length).max().unwrap_or(0);
        let most = inputs.seen.first().map_or(0, |seen| seen.mask.most_keys());
        if self.spec.chosen_keys().any(|count| (most..longest).contains(&count)) {
            return Ok(false);
        }
        let ids = self.padded_ids(run, rows)?;
        let positions = positions_of(run);
        let mut changed = Vec::with_capacity(inputs.ropes.len());
        for (index, rope) in self.spec.ropes.iter().enumerate() {
            // Recorded work reads the angles that it was recorded with.
            match self.held_angles(index, rope, &positions, rows)? {
                Some(angles) if inputs.ropes[index].reads(&angles.cosines) => {
                    changed.push(padded_rows(&positions, rows));
                }
                _ => return Ok(false),
            }
        }
        for (table, rows) in inputs.ropes.iter_mut().zip(changed) {
            table.set_rows(&rows)?;
        }
        inputs.ids.write_slice(&ids);
        if let Some(documents) = &mut inputs.documents {
            documents.set(&segments)?;
        }
        for seen in &mut inputs.seen {
            seen.mask.set(Arc::clone(&segments))?;
        }
        inputs.tokens = run.ids.len();
        Ok(true)
    }

    /// Targets of a run's tokens, filled up with untrained ones.
    ///
    /// # Errors
    /// A label beyond the vocabulary; out of memory.
    pub fn targets(&self, labels: &[i32], rows: usize) -> Result<Targets> {
        Ok(Targets::new(&self.device, &padded_labels(labels, rows), self.spec.vocabulary)?)
    }

    fn padded_ids(&self, run: &TokenRun, rows: usize) -> Result<Vec<u32>> {
        let covered: usize = run.documents.iter().map(|document| document.tokens).sum();
        if covered != run.ids.len() || covered > rows {
            return Err(Error::Usage(format!(
                "documents cover {covered} of {} tokens, in a batch of {rows}",
                run.ids.len()
            )));
        }
        ops::check_ids(&run.ids, self.spec.vocabulary)?;
        let mut ids = run.ids.clone();
        ids.resize(rows, 0);
        Ok(ids)
    }

    /// The angles of a run, from the cache where all of its documents are of one epoch.
    fn angles(&self, index: usize, rope: &Rope, positions: &[Positions], rows: usize) -> Result<RopeTable> {
        if let Some(angles) = self.held_angles(index, rope, positions, rows)? {
            let rows = padded_rows(positions, rows);
            return Ok(RopeTable::indexed(&angles.cosines, &angles.sines, &rows, rope.pairing)?);
        }
        let mut all = positions.to_vec();
        if let Some(&Positions { document_length, .. }) = positions.first() {
            let filler = rows - positions.iter().map(|document| document.count).sum::<usize>();
            all.push(Positions { first: 0, count: filler, document_length });
        }
        rope.table(&self.device, &all)
    }

    /// The angles of all positions of a run's documents, where these are of one epoch. What is made is made for a document of all
    /// rows, so that the longer ones of later runs find the same.
    fn held_angles(
        &self,
        index: usize,
        rope: &Rope,
        positions: &[Positions],
        rows: usize,
    ) -> Result<Option<Angles>> {
        let Some(first) = positions.first() else { return Ok(None) };
        let epoch = rope.epoch(first.document_length);
        if positions.iter().any(|document| rope.epoch(document.document_length) != epoch) {
            return Ok(None);
        }
        let longest = positions.iter().map(|document| document.first + document.count).max().unwrap_or(0);
        let mut cache = self.angle_cache.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(angles) = cache.get(&(index, epoch)).filter(|angles| angles.cosines.rows() >= longest) {
            return Ok(Some(angles.clone()));
        }
        let count = longest.max(rows).next_power_of_two().max(FEWEST_POSITIONS);
        let (cosines, sines) = rope.angles(&self.device, count, first.document_length)?;
        let angles = Angles { cosines, sines };
        if cache.keys().filter(|(other, _)| *other == index).count() >= MOST_EPOCHS {
            cache.retain(|(other, _), _| *other != index);
        }
        cache.insert((index, epoch), angles.clone());
        Ok(Some(angles))
    }
}

/// Labels filled up with untrained tokens.
pub fn padded_labels(labels: &[i32], rows: usize) -> Vec<i32> {
    let mut padded = labels.to_vec();
    padded.resize(rows.max(labels.len()), -100);
    padded
}

fn positions_of(run: &TokenRun) -> Vec<Positions> {
    let position = |document: &super::decoder::Document| Positions {
        first: document.first_position,
        count: document.tokens,
        document_length: document.rope_length,
    };
    run.documents.iter().map(position).collect()
}

/// Each token's row of the angles, which is its position; padding has the first.
fn padded_rows(positions: &[Positions], rows: usize) -> Vec<u32> {
    let each = positions.iter().flat_map(|document| document.first..document.first + document.count);
    let mut all: Vec<u32> = each.map(|position| position as u32).collect();
    all.resize(rows, 0);
    all
}

fn segments_of(run: &TokenRun, held: usize) -> Arc<[Segment]> {
    let mut start = 0;
    let segment = |document: &super::decoder::Document| {
        let segment = Segment {
            query_start: start,
            query_length: document.tokens,
            key_start: start,
            key_length: held + document.tokens,
        };
        start += document.tokens;
        segment
    };
    run.documents.iter().map(segment).collect()
}
