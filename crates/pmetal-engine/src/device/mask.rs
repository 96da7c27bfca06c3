//! Which keys a query sees, in the form that each kind of device reads.

use std::sync::Arc;

use super::{Device, Segment};
use crate::Tensor;
use crate::error::{Error, Result, expect_shape};
use crate::memory::Category;

/// What masks of documents differ in: layers of one kind share a mask. The default is causal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MaskKind {
    /// The most keys that a token sees, itself included and none behind it.
    pub window: Option<usize>,
    /// Keys of a chunk: a token sees those of its own chunk alone.
    pub chunk: Option<usize>,
    /// Whether a token sees those behind it too, where there is no window.
    pub sees_ahead: bool,
}

impl MaskKind {
    /// The default: a token sees all keys up to its own.
    pub const CAUSAL: Self = Self { window: None, chunk: None, sees_ahead: false };

    /// Refuses what shows nothing.
    pub(crate) fn check(&self, device: &Device) -> Result<()> {
        let refuse = |reason: &str| {
            let (device, reason) = (device.name(), reason.to_owned());
            Err(Error::Unsupported { operation: "attention", device, reason })
        };
        match (self.window, self.chunk) {
            (Some(0), _) => refuse("a window of 0 keys sees nothing"),
            (_, Some(0)) => refuse("chunks of 0 keys see nothing"),
            _ => Ok(()),
        }
    }

    /// The first key that the token at a position sees.
    pub fn first_key(&self, position: usize) -> usize {
        let near = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let own = self.chunk.map_or(0, |chunk| position - position % chunk.max(1));
        near.max(own)
    }

    /// The position from which on rows are kept for tokens from `position` on, such that masks mean the same when positions
    /// are counted from there.
    pub fn first_kept(&self, position: usize) -> usize {
        let first = self.first_key(position);
        first - self.chunk.map_or(0, |chunk| first % chunk.max(1))
    }

    /// The most earlier rows that tokens from some position on need, by [`Self::first_kept`]; `None` where they need all.
    pub fn reach(&self) -> Option<usize> {
        self.chunk.or(self.window).map(|keys| keys.saturating_sub(1))
    }
}

/// Which keys each query sees: made once for all layers of a batch that have the same kind of mask.
#[derive(Debug, Clone)]
pub struct AttentionMask {
    pub(crate) kind: MaskKind,
    pub(crate) segments: Arc<[Segment]>,
    /// The same for devices: i32, first key and end of each query, then first query and end of each key.
    pub(crate) ranges: Option<[Tensor; 4]>,
    pub(crate) tokens: [usize; 2],
    pub(crate) choice: Option<KeyChoice>,
}

/// A bit for each query and key: whether the query looks at the key. Made by [`crate::ops::choose_keys`].
#[derive(Debug, Clone)]
pub struct KeyChoice {
    /// u32 \[queries, ceil(keys / 32)\]: bit k % 32 of word k / 32 is that of key k.
    pub(crate) bits: Tensor,
    pub(crate) tokens: [usize; 2],
}

impl KeyChoice {
    /// The bits, u32 \[queries, ceil(keys / 32)\]: bit k % 32 of word k / 32 is that of key k.
    pub fn bits(&self) -> &Tensor {
        &self.bits
    }
}

impl AttentionMask {
    /// The mask of documents that lie in `tokens` = \[queries, keys\] rows.
    ///
    /// # Errors
    /// [`Error::Range`] for a segment that is not within the rows; [`Error::Unsupported`] for a window or chunks of no key;
    /// out of memory.
    pub fn new(
        device: &Device,
        kind: MaskKind,
        segments: Arc<[Segment]>,
        tokens: [usize; 2],
    ) -> Result<Self> {
        kind.check(device)?;
        check(&segments, tokens)?;
        let ranges = if device.is_host() {
            None
        } else {
            let [key, query] = visible_ranges(kind, &segments, tokens);
            let upload =
                |values: Vec<i32>| Tensor::from_slice(device, Category::Workspace, &[values.len()], &values);
            let ([key_start, key_end], [query_start, query_end]) = (key, query);
            Some([upload(key_start)?, upload(key_end)?, upload(query_start)?, upload(query_end)?])
        };
        Ok(Self { kind, segments, ranges, tokens, choice: None })
    }

    /// A mask that hides, of what this one shows, all keys that were not chosen.
    ///
    /// # Errors
    /// [`Error::Shape`] for a choice among other rows.
    pub fn with_choice(&self, choice: &KeyChoice) -> Result<Self> {
        expect_shape("attention", "choice of keys", &choice.tokens, &self.tokens)?;
        Ok(Self { choice: Some(choice.clone()), ..self.clone() })
    }

    /// Replaces the documents, in the same memory; a choice among the keys of others is given up.
    ///
    /// # Errors
    /// [`Error::Range`] for a segment that is not within the rows.
    pub fn set(&mut self, segments: Arc<[Segment]>) -> Result<()> {
        check(&segments, self.tokens)?;
        if let Some(tensors) = &mut self.ranges {
            let ranges = visible_ranges(self.kind, &segments, self.tokens);
            for (tensor, values) in tensors.iter_mut().zip(ranges.iter().flatten()) {
                tensor.write_bytes(bytemuck::cast_slice(values));
            }
        }
        self.segments = segments;
        self.choice = None;
        Ok(())
    }

    /// The most keys that a query may see, windows and chunks aside.
    pub fn most_keys(&self) -> usize {
        self.segments.iter().map(|segment| segment.key_length).max().unwrap_or(0)
    }

    /// The documents.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

fn check(segments: &[Segment], [tokens, keys]: [usize; 2]) -> Result<()> {
    for segment in segments {
        let bounds = [
            ("end of a segment's queries", segment.query_start.saturating_add(segment.query_length), tokens),
            ("end of a segment's keys", segment.key_start.saturating_add(segment.key_length), keys),
            ("number of a segment's queries", segment.query_length, segment.key_length),
        ];
        for (what, actual, most) in bounds {
            if actual > most {
                return Err(Error::Range { operation: "attention", what, actual, limit: most + 1 });
            }
        }
    }
    Ok(())
}

/// First and end of the keys that each query sees, and of the queries that see each key; all grow with the row. Rows of
/// no segment have empty ranges.
fn visible_ranges(kind: MaskKind, segments: &[Segment], [tokens, keys]: [usize; 2]) -> [[Vec<i32>; 2]; 2] {
    let mut by_query = [Vec::with_capacity(tokens), Vec::with_capacity(tokens)];
    let mut by_key = [Vec::with_capacity(keys), Vec::with_capacity(keys)];
    let fill = |ranges: &mut [Vec<i32>; 2], rows: usize| {
        let end = ranges[1].last().copied().unwrap_or(0);
        ranges.iter_mut().for_each(|range| range.resize(rows, end));
    };
    for segment in segments {
        fill(&mut by_query, segment.query_start);
        fill(&mut by_key, segment.key_start);
        let visible: Vec<_> = (0..segment.query_length).map(|query| segment.visible(kind, query)).collect();
        for keys in &visible {
            by_query[0].push((segment.key_start + keys.start) as i32);
            by_query[1].push((segment.key_start + keys.end) as i32);
        }
        // Both ends of what is visible grow with the query, so that those who see a key are found by going on from the last.
        let (mut start, mut end) = (0, 0);
        for key in 0..segment.key_length {
            start += visible[start..].iter().take_while(|keys| keys.end <= key).count();
            end += visible[end..].iter().take_while(|keys| keys.start <= key).count();
            by_key[0].push((segment.query_start + start) as i32);
            by_key[1].push((segment.query_start + end.max(start)) as i32);
        }
    }
    fill(&mut by_query, tokens);
    fill(&mut by_key, keys);
    [by_query, by_key]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_say_what_the_mask_says() {
        let segment = |start, query_length, key_length| Segment {
            query_start: start,
            query_length,
            key_start: start,
            key_length,
        };
        let cases: [(&[Segment], [usize; 2]); 4] = [
            (&[segment(0, 9, 9)], [9, 9]),
            (&[segment(0, 3, 3), segment(3, 4, 4)], [7, 7]),
            (&[segment(1, 3, 3), segment(6, 2, 2)], [9, 9]),
            (&[Segment { query_start: 0, query_length: 2, key_start: 0, key_length: 8 }], [2, 8]),
        ];
        for sees_ahead in [false, true] {
            for (window, chunk) in [(None, None), (Some(3), None), (None, Some(2)), (Some(2), Some(4))] {
                let kind = MaskKind { window, chunk, sees_ahead };
                for (segments, tokens) in cases {
                    assert_same(kind, segments, tokens);
                }
            }
        }
    }

    #[test]
    fn a_kind_of_mask_shows_what_attention_sees() {
        let sizes = [None, Some(1), Some(3), Some(8), Some(usize::MAX)];
        for (window, chunk) in sizes.into_iter().flat_map(|w| sizes.into_iter().map(move |c| (w, c))) {
            let kind = MaskKind { window, chunk, sees_ahead: false };
            for position in 0..30 {
                let keys =
                    Segment { query_start: 0, query_length: 1, key_start: 0, key_length: position + 1 };
                let visible = keys.visible(kind, 0);
                assert_eq!(visible, kind.first_key(position)..position + 1, "{kind:?} at {position}");
                let first = kind.first_kept(position);
                assert!(kind.reach().is_none_or(|reach| position - first <= reach), "{kind:?} at {position}");
                for later in position..position + 20 {
                    let key_length = later + 1 - first;
                    let kept = Segment { query_start: 0, query_length: 1, key_start: 0, key_length };
                    let seen = kept.visible(kind, 0);
                    let seen = seen.start + first..seen.end + first;
                    assert_eq!(seen, kind.first_key(later)..later + 1, "{kind:?} at {later} of {first}");
                }
            }
        }
    }

    fn assert_same(kind: MaskKind, segments: &[Segment], tokens: [usize; 2]) {
        let [by_query, by_key] = visible_ranges(kind, segments, tokens);
        assert_eq!([by_query[0].len(), by_key[1].len()], tokens);
        for ranges in by_query.iter().chain(&by_key) {
            assert!(ranges.is_sorted(), "{ranges:?}");
        }
        for (query, (start, end)) in by_query[0].iter().zip(&by_query[1]).enumerate() {
            for key in 0..tokens[1] {
                let sees = segments.iter().any(|segment| {
                    query >= segment.query_start
                        && query < segment.query_start + segment.query_length
                        && key >= segment.key_start
                        && segment
                            .visible(kind, query - segment.query_start)
                            .contains(&(key - segment.key_start))
                });
                let (key_row, query_row) = (key as i32, query as i32);
                let said = (*start..*end).contains(&key_row);
                assert_eq!(said, sees, "query {query}, key {key}, {kind:?}, {segments:?}");
                let within = (by_key[0][key]..by_key[1][key]).contains(&query_row);
                assert!(within || !sees, "key {key} is seen by query {query}: {by_key:?}");
            }
        }
    }
}
