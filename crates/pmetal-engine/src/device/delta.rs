//! What linear-attention layers with the gated delta rule ask of a device (Yang, Kautz and Hatamizadeh, arXiv 2412.06464).
//!
//! Letters: T tokens, C channels, K taps of the convolution, G key heads, H value heads, D key width, E value width.

use std::ops::Range;
use std::sync::Arc;

use super::{Device, Segment};
use crate::Tensor;
use crate::error::{Error, Result};
use crate::memory::Category;

/// Which document each token of a run belongs to, in the form that each kind of device reads: made once for all layers.
#[derive(Debug, Clone)]
pub struct Documents {
    pub(crate) ranges: Arc<[Range<usize>]>,
    pub(crate) tokens: usize,
    /// The same for devices: i32 \[2 T + 1\]. For each token the first token of its document f, or -1 - f for padding
    /// behind that document; for each token the end of its document with the padding behind it; the end of the last
    /// document.
    pub(crate) marks: Option<Tensor>,
}

impl Documents {
    /// The documents whose tokens are the queries of `segments`, in ascending order, among `tokens` tokens; the others are
    /// padding, which belongs to no document.
    ///
    /// # Errors
    /// [`Error::Range`] for segments that overlap or are not within the tokens; out of memory.
    pub fn new(device: &Device, segments: &[Segment], tokens: usize) -> Result<Self> {
        let ranges = checked(segments, tokens)?;
        let marks = if device.is_host() {
            None
        } else {
            let marks = marks_of(&ranges, tokens);
            Some(Tensor::from_slice(device, Category::Workspace, &[marks.len()], &marks)?)
        };
        Ok(Self { ranges, tokens, marks })
    }

    /// One document of `tokens` tokens, or the next so many tokens of one whose states are kept.
    ///
    /// # Errors
    /// Out of memory.
    pub fn single(device: &Device, tokens: usize) -> Result<Self> {
        let segment = Segment { query_start: 0, query_length: tokens, key_start: 0, key_length: tokens };
        Self::new(device, &[segment], tokens)
    }

    /// Replaces the documents, in the same memory.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn set(&mut self, segments: &[Segment]) -> Result<()> {
        let ranges = checked(segments, self.tokens)?;
        if let Some(tensor) = &mut self.marks {
            tensor.write_slice(&marks_of(&ranges, self.tokens));
        }
        self.ranges = ranges;
        Ok(())
    }

    /// How many tokens there are, padding included.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The device's marks.
    pub(crate) fn marks(&self) -> &Tensor {
        self.marks.as_ref().expect("invariant: documents are made for the device that reads them")
    }
}

fn checked(segments: &[Segment], tokens: usize) -> Result<Arc<[Range<usize>]>> {
    let mut ranges = Vec::with_capacity(segments.len());
    let mut free = 0;
    for segment in segments {
        let end = segment.query_start.saturating_add(segment.query_length);
        let refuse = |what, actual, most: usize| {
            Err(Error::Range { operation: "documents", what, actual, limit: most.saturating_add(1) })
        };
        if end > tokens {
            return refuse("end of a document", end, tokens);
        }
        if segment.query_start < free {
            return refuse("end of the document before another", free, segment.query_start);
        }
        free = end;
        if segment.query_length > 0 {
            ranges.push(segment.query_start..end);
        }
    }
    Ok(ranges.into())
}

fn marks_of(ranges: &[Range<usize>], tokens: usize) -> Vec<i32> {
    let mut marks = vec![0; 2 * tokens + 1];
    // Padding in front of all documents is behind one without tokens.
    let mut start = 0;
    let none = 0..0;
    for (index, range) in std::iter::once(&none).chain(ranges).enumerate() {
        let end = ranges.get(index).map_or(tokens, |next| next.start);
        for token in start..end {
            let first = range.start as i32;
            marks[token] = if range.contains(&token) { first } else { -1 - first };
            marks[tokens + token] = end as i32;
        }
        start = end;
    }
    marks[2 * tokens] = ranges.last().map_or(0, |range| range.end) as i32;
    marks
}

/// What the gated delta rule reads.
#[derive(Clone, Copy)]
pub struct DeltaInputs<'a> {
    /// \[T, G, D\].
    pub q: &'a Tensor,
    /// \[T, G, D\].
    pub k: &'a Tensor,
    /// \[T, H, E\].
    pub v: &'a Tensor,
    /// \[T, H\]: what the sigmoid is taken of.
    pub beta_logits: &'a Tensor,
    /// \[T, H\].
    pub a_logits: &'a Tensor,
    /// f32 \[H\].
    pub a_log: &'a Tensor,
    /// f32 \[H\].
    pub dt_bias: &'a Tensor,
    /// Where documents begin and end.
    pub documents: &'a Documents,
}

/// Sizes of the gated delta rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeltaSizes {
    pub(crate) tokens: usize,
    pub(crate) key_heads: usize,
    pub(crate) value_heads: usize,
    pub(crate) key_width: usize,
    pub(crate) value_width: usize,
}

impl DeltaInputs<'_> {
    pub(crate) fn sizes(&self) -> DeltaSizes {
        let [q, v] = [self.q, self.v].map(Tensor::shape);
        DeltaSizes { tokens: q[0], key_heads: q[1], value_heads: v[1], key_width: q[2], value_width: v[2] }
    }
}

/// What [`DeltaKernels::gated_delta_backward`] overwrites, but for the two gradients of weights, f32, to which it adds.
pub struct DeltaGradients<'a> {
    /// As q.
    pub q: &'a mut Tensor,
    /// As k.
    pub k: &'a mut Tensor,
    /// As v.
    pub v: &'a mut Tensor,
    /// As `beta_logits`.
    pub beta_logits: &'a mut Tensor,
    /// As `a_logits`.
    pub a_logits: &'a mut Tensor,
    /// f32 \[H\].
    pub a_log: Option<&'a mut Tensor>,
    /// f32 \[H\].
    pub dt_bias: Option<&'a mut Tensor>,
}

/// Added to sums of squares of queries and keys, as in `kernels/delta.cpp`.
pub(crate) const SQUARES_EPSILON: f32 = 1e-6;

/// Kernels of linear-attention layers; what they mean is said in [`crate::ops`].
pub trait DeltaKernels {
    /// `out = silu(sum of taps)`: weight f32 \[C, K\]; `state` \[K - 1, C\] is what came before the first token.
    fn short_convolution(
        &self,
        x: &Tensor,
        weight: &Tensor,
        documents: &Documents,
        state: Option<&Tensor>,
        out: &mut Tensor,
    );

    /// The last K - 1 inputs of what was before and the document in `x`, to `state`.
    fn move_convolution_state(&self, x: &Tensor, documents: &Documents, state: &mut Tensor);

    /// Gradients of [`Self::short_convolution`]: overwrites `d_x`, adds to `d_weight` (f32).
    ///
    /// # Errors
    /// Out of memory.
    fn short_convolution_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        documents: &Documents,
        d_out: &Tensor,
        d_x: &mut Tensor,
        d_weight: Option<&mut Tensor>,
    ) -> Result<()>;

    /// The gated delta rule; `state` f32 \[H, D, E\] is that of the one document, read and overwritten.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for heads that the device's kernels do not hold; out of memory.
    fn gated_delta(
        &self,
        inputs: &DeltaInputs<'_>,
        state: Option<&mut Tensor>,
        out: &mut Tensor,
    ) -> Result<()>;

    /// Gradients of [`Self::gated_delta`] without a state.
    ///
    /// # Errors
    /// As [`Self::gated_delta`].
    fn gated_delta_backward(
        &self,
        inputs: &DeltaInputs<'_>,
        d_out: &Tensor,
        gradients: DeltaGradients<'_>,
    ) -> Result<()>;

    /// `out = w * normed * silu(gate)` with `normed` \[T, H, E\] rounded to the type of `x`; weight f32 \[E\]; `out` may be
    /// \[T, H E\].
    fn gated_rms_norm(&self, x: &Tensor, gate: &Tensor, weight: &Tensor, epsilon: f32, out: &mut Tensor);

    /// Gradients of [`Self::gated_rms_norm`], as if nothing were rounded: overwrites those of `x` and `gate`, adds to
    /// `d_weight` (f32).
    ///
    /// # Errors
    /// Out of memory.
    fn gated_rms_norm_backward(
        &self,
        inputs: [&Tensor; 3],
        epsilon: f32,
        d_out: &Tensor,
        d_inputs: [&mut Tensor; 2],
        d_weight: Option<&mut Tensor>,
    ) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(start: usize, length: usize) -> Segment {
        Segment { query_start: start, query_length: length, key_start: 0, key_length: length }
    }

    #[test]
    fn marks_say_where_documents_begin_and_end() {
        let marks = |segments: &[Segment], tokens| marks_of(&checked(segments, tokens).unwrap(), tokens);
        assert_eq!(marks(&[segment(0, 2), segment(2, 1)], 3), [0, 0, 2, 2, 2, 3, 3]);
        assert_eq!(marks(&[segment(0, 1), segment(1, 2)], 5), [0, 1, 1, -2, -2, 1, 5, 5, 5, 5, 3]);
        assert_eq!(marks(&[segment(1, 1), segment(3, 1)], 4), [-1, 1, -2, 3, 1, 3, 3, 4, 4]);
        assert_eq!(marks(&[segment(0, 0)], 2), [-1, -1, 2, 2, 0]);
        assert_eq!(marks(&[], 0), [0]);
    }

    #[test]
    fn documents_that_overlap_or_end_too_late_are_refused() {
        let device = Device::cpu();
        for segments in [[segment(0, 3), segment(2, 1)], [segment(0, 3), segment(3, 3)]] {
            assert!(Documents::new(&device, &segments, 5).is_err(), "{segments:?}");
        }
        assert!(Documents::new(&device, &[segment(1, usize::MAX)], 5).is_err());
    }
}
