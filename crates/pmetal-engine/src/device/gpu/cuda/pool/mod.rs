//! A caching allocator over large pieces of a device's memory: best fit, splitting, coalescing. Pure bookkeeping;
//! the pieces come from a [`SegmentSource`]. One stream uses the memory, so a freed block may be handed out at once:
//! whatever the next owner enqueues runs after what the last one did.
//!
//! A captured graph replays reads and writes of fixed addresses. While a private owner is active every allocation
//! belongs to it, and until it is released none of its blocks go to anybody else; blocks that were allocated
//! before it and are freed while it is active are held for it too, because the graph may read them.

use std::collections::{BTreeMap, BTreeSet};

#[cfg(test)]
mod tests;

/// Every address and size is a multiple.
pub(crate) const ALIGNMENT: usize = 256;
const SEGMENT_GRANULARITY: usize = 2 << 20;
const SMALLEST_SEGMENT: usize = 32 << 20;
const LARGEST_GROWTH: usize = 512 << 20;
/// Requests above get a segment of their own size.
const EXACT_ABOVE: usize = 1 << 30;
/// Requests up to here stay out of the segments of larger ones, which they would fragment.
const SMALL: usize = 1 << 20;

/// Where segments come from.
pub(crate) trait SegmentSource {
    /// A piece of memory whose address [`ALIGNMENT`] divides.
    fn take(&mut self, bytes: usize) -> Option<u64>;
    /// Takes a piece back.
    fn give(&mut self, address: u64, bytes: usize);
    /// Whether pieces may be given back now.
    fn can_give(&self) -> bool;
}

/// Whom blocks belong to; zero is everybody.
pub(crate) type Owner = u32;
const COMMON: Owner = 0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Live,
    /// Freed, but not handed out before the owner is released.
    Held,
}

#[derive(Debug, Clone, Copy)]
struct Block {
    bytes: usize,
    segment: u64,
    owner: Owner,
    /// A second owner that a held block waits for.
    also: Owner,
    state: State,
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    bytes: usize,
    small: bool,
}

/// Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PoolReport {
    /// Taken from the source.
    pub(crate) reserved: usize,
    /// Handed out.
    pub(crate) live: usize,
    /// Freed, but kept for a private owner.
    pub(crate) held: usize,
    /// The most that was handed out at one time.
    pub(crate) peak_live: usize,
}

/// The allocator.
pub(crate) struct Pool<S: SegmentSource> {
    source: S,
    segments: BTreeMap<u64, Segment>,
    blocks: BTreeMap<u64, Block>,
    /// (owner, small, bytes, address) of the free blocks.
    free: BTreeSet<(Owner, bool, usize, u64)>,
    active: Owner,
    last_owner: Owner,
    report: PoolReport,
}

impl<S: SegmentSource> Pool<S> {
    /// An empty pool.
    pub(crate) fn new(source: S) -> Self {
        Self {
            source,
            segments: BTreeMap::new(),
            blocks: BTreeMap::new(),
            free: BTreeSet::new(),
            active: COMMON,
            last_owner: COMMON,
            report: PoolReport::default(),
        }
    }

    /// Sizes now.
    #[cfg(test)]
    pub(crate) fn report(&self) -> PoolReport {
        self.report
    }

    /// A block of at least this size (zero counts as one byte).
    pub(crate) fn allocate(&mut self, bytes: usize) -> Option<u64> {
        let bytes = bytes.max(1).checked_next_multiple_of(ALIGNMENT)?;
        let small = bytes <= SMALL;
        let address = self
            .best_fit(self.active, small, bytes)
            .or_else(|| self.best_fit(COMMON, small, bytes))
            .or_else(|| self.grow(bytes, small))
            .or_else(|| self.best_fit(self.active, !small, bytes))
            .or_else(|| self.best_fit(COMMON, !small, bytes))?;
        self.carve(address, bytes);
        self.report.live += bytes;
        self.report.peak_live = self.report.peak_live.max(self.report.live);
        Some(address)
    }

    /// Takes a block back; false when the address is not that of a block handed out.
    #[must_use]
    pub(crate) fn free(&mut self, address: u64) -> bool {
        let Some(block) = self.blocks.get_mut(&address).filter(|block| block.state == State::Live) else {
            return false;
        };
        self.report.live -= block.bytes;
        if block.owner == self.active {
            block.state = State::Free;
            self.insert_free(address);
        } else {
            // Either the active capture may have recorded a use of a block from before it, or an ended one that
            // still lives owns the block.
            if block.owner == COMMON {
                block.owner = self.active;
            } else {
                block.also = self.active;
            }
            block.state = State::Held;
            self.report.held += block.bytes;
        }
        true
    }

    /// Makes sure that `bytes` can be allocated, in one piece, without asking the source.
    #[cfg(test)]
    pub(crate) fn reserve(&mut self, bytes: usize) -> bool {
        match self.allocate(bytes) {
            Some(address) => self.free(address),
            None => false,
        }
    }

    /// Starts to give every allocation to a new owner; `None` while another is active.
    pub(crate) fn begin_private(&mut self) -> Option<Owner> {
        if self.active != COMMON {
            return None;
        }
        self.last_owner += 1;
        self.active = self.last_owner;
        Some(self.active)
    }

    /// Allocations are everybody's again; the owner keeps its blocks.
    pub(crate) fn end_private(&mut self) {
        self.active = COMMON;
    }

    /// Gives an owner's memory to everybody; its live blocks follow when they are freed.
    pub(crate) fn release(&mut self, owner: Owner) {
        if self.active == owner {
            self.active = COMMON;
        }
        for block in self.blocks.values_mut().filter(|block| block.also == owner) {
            block.also = COMMON;
        }
        let owned: Vec<u64> = self
            .blocks
            .iter()
            .filter(|(_, block)| block.owner == owner)
            .map(|(&address, _)| address)
            .collect();
        for address in owned {
            // Coalescing may have swallowed the block.
            let Some(block) = self.blocks.get(&address).copied() else { continue };
            if block.also != COMMON {
                self.blocks.insert(address, Block { owner: block.also, also: COMMON, ..block });
                continue;
            }
            match block.state {
                State::Free => self.remove_free(address),
                State::Held => self.report.held -= block.bytes,
                State::Live => {}
            }
            let state = if block.state == State::Live { State::Live } else { State::Free };
            self.blocks.insert(address, Block { owner: COMMON, state, ..block });
            if state == State::Free {
                self.insert_free(address);
            }
        }
    }

    /// Gives segments that nothing uses back to the source and returns their bytes.
    pub(crate) fn trim(&mut self) -> usize {
        if !self.source.can_give() {
            return 0;
        }
        let empty: Vec<(u64, usize)> = self
            .segments
            .iter()
            .filter(|(address, segment)| {
                let block = self.blocks.get(address);
                block.is_some_and(|block| {
                    block.state == State::Free && block.owner == COMMON && block.bytes == segment.bytes
                })
            })
            .map(|(&address, segment)| (address, segment.bytes))
            .collect();
        for &(address, bytes) in &empty {
            self.remove_free(address);
            self.blocks.remove(&address);
            self.segments.remove(&address);
            self.source.give(address, bytes);
            self.report.reserved -= bytes;
        }
        empty.iter().map(|entry| entry.1).sum()
    }

    fn best_fit(&self, owner: Owner, small: bool, bytes: usize) -> Option<u64> {
        let found = self.free.range((owner, small, bytes, 0)..).next()?;
        (found.0 == owner && found.1 == small).then_some(found.3)
    }

    fn grow(&mut self, bytes: usize, small: bool) -> Option<u64> {
        let exact = bytes.checked_next_multiple_of(SEGMENT_GRANULARITY)?;
        let growth = (self.report.reserved / 8).clamp(SMALLEST_SEGMENT, LARGEST_GROWTH);
        let generous = growth.next_multiple_of(SEGMENT_GRANULARITY).max(exact);
        let wanted = if bytes > EXACT_ABOVE { exact } else { generous };
        self.add_segment(wanted, small).or_else(|| {
            self.trim();
            self.add_segment(exact, small)
        })
    }

    fn add_segment(&mut self, bytes: usize, small: bool) -> Option<u64> {
        let address = self.source.take(bytes)?;
        self.report.reserved += bytes;
        self.segments.insert(address, Segment { bytes, small });
        let owner = self.active;
        self.blocks
            .insert(address, Block { bytes, segment: address, owner, also: COMMON, state: State::Free });
        self.insert_free(address);
        Some(address)
    }

    /// Hands out the front of a free block; the rest stays free for its owner.
    fn carve(&mut self, address: u64, bytes: usize) {
        self.remove_free(address);
        let active = self.active;
        let Some(block) = self.blocks.get_mut(&address) else { return };
        let whole = *block;
        *block = Block { bytes, owner: active, state: State::Live, ..whole };
        if whole.bytes > bytes {
            let rest = address + bytes as u64;
            self.blocks.insert(rest, Block { bytes: whole.bytes - bytes, ..whole });
            let key = self.key(rest);
            self.free.extend(key);
        }
    }

    fn key(&self, address: u64) -> Option<(Owner, bool, usize, u64)> {
        let block = self.blocks.get(&address)?;
        let small = self.segments.get(&block.segment)?.small;
        Some((block.owner, small, block.bytes, address))
    }

    fn remove_free(&mut self, address: u64) {
        if let Some(key) = self.key(address) {
            self.free.remove(&key);
        }
    }

    /// Enters a block whose state is free, merged with free neighbours of the same owner and segment.
    fn insert_free(&mut self, address: u64) {
        let Some(mut block) = self.blocks.get(&address).copied() else { return };
        let mut start = address;
        let mates = |other: &Block| {
            other.state == State::Free && other.owner == block.owner && other.segment == block.segment
        };
        let before = self.blocks.range(..address).next_back().filter(|(_, other)| mates(other));
        let before = before.map(|(&address, other)| (address, other.bytes));
        let end = address + block.bytes as u64;
        let after = self.blocks.get(&end).filter(|other| mates(other)).map(|other| other.bytes);
        if let Some(bytes) = after {
            self.remove_free(end);
            self.blocks.remove(&end);
            block.bytes += bytes;
        }
        if let Some((address_before, bytes)) = before {
            self.remove_free(address_before);
            self.blocks.remove(&address);
            start = address_before;
            block.bytes += bytes;
        }
        self.blocks.insert(start, block);
        let key = self.key(start);
        self.free.extend(key);
    }
}

impl<S: SegmentSource> Drop for Pool<S> {
    fn drop(&mut self) {
        for (&address, segment) in &self.segments {
            self.source.give(address, segment.bytes);
        }
    }
}
