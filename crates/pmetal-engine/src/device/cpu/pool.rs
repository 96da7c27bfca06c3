//! Reuse of freed buffers. A training step allocates the same sizes as the one before it; fresh pages from the
//! operating system would cost a fault and a clearing each, a twentieth of a step's time.
//!
//! What is idle and what is in use together never exceed the most that was ever in use at one time, so that
//! reuse costs no memory: before a new size is allocated, idle buffers of other sizes are let go.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::tensor::AlignedBytes;

/// Smaller buffers go straight to the allocator, which is quick for them.
const SMALLEST_BYTES: usize = 64 << 10;

/// Idle buffers by exact size.
#[derive(Default)]
pub(crate) struct Pool(Mutex<State>);

#[derive(Default)]
struct State {
    idle: BTreeMap<usize, Vec<AlignedBytes>>,
    idle_bytes: usize,
    used_bytes: usize,
    most_used_bytes: usize,
}

impl Pool {
    /// A buffer of exactly this size: an idle one, whose bytes are what they were, or a zeroed one.
    pub(crate) fn take(&self, bytes: usize) -> Option<AlignedBytes> {
        if bytes < SMALLEST_BYTES {
            return AlignedBytes::zeroed(bytes);
        }
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buffer) = state.pop(bytes) {
            state.used_bytes += bytes;
            return Some(buffer);
        }
        state.make_room(bytes);
        let buffer = AlignedBytes::zeroed(bytes)?;
        state.used_bytes += bytes;
        state.most_used_bytes = state.most_used_bytes.max(state.used_bytes);
        Some(buffer)
    }

    /// Takes a buffer of [`Self::take`] back.
    pub(crate) fn give(&self, buffer: AlignedBytes) {
        let bytes = buffer.len();
        if bytes < SMALLEST_BYTES {
            return;
        }
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.used_bytes -= bytes;
        state.idle_bytes += bytes;
        state.idle.entry(bytes).or_default().push(buffer);
    }
}

impl State {
    fn pop(&mut self, bytes: usize) -> Option<AlignedBytes> {
        let buffers = self.idle.get_mut(&bytes)?;
        let buffer = buffers.pop()?;
        if buffers.is_empty() {
            self.idle.remove(&bytes);
        }
        self.idle_bytes -= bytes;
        Some(buffer)
    }

    /// Lets idle buffers go, largest first, until `bytes` more fit under the most that was ever used.
    fn make_room(&mut self, bytes: usize) {
        let limit = self.most_used_bytes.max(self.used_bytes + bytes);
        while self.used_bytes + self.idle_bytes + bytes > limit {
            let Some(largest) = self.idle.keys().next_back().copied() else { return };
            self.pop(largest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(pool: &Pool) -> usize {
        let state = pool.0.lock().unwrap();
        state.idle_bytes + state.used_bytes
    }

    #[test]
    fn a_buffer_is_reused_for_its_own_size_alone_and_once() {
        let pool = Pool::default();
        let mut first = pool.take(SMALLEST_BYTES).unwrap();
        first.as_mut_slice()[7] = 9;
        pool.give(first);
        assert_eq!(pool.take(SMALLEST_BYTES + 64).unwrap().as_slice()[7], 0);
        let pool = Pool::default();
        let mut first = pool.take(SMALLEST_BYTES).unwrap();
        first.as_mut_slice()[7] = 9;
        pool.give(first);
        let again = pool.take(SMALLEST_BYTES).unwrap();
        assert_eq!(again.as_slice()[7], 9);
        assert_eq!(pool.take(SMALLEST_BYTES).unwrap().as_slice()[7], 0);
    }

    #[test]
    fn small_buffers_are_not_held() {
        let pool = Pool::default();
        let small = pool.take(SMALLEST_BYTES - 1).unwrap();
        pool.give(small);
        pool.give(AlignedBytes::default());
        assert_eq!(total(&pool), 0);
    }

    #[test]
    fn idle_and_used_together_never_exceed_the_most_that_was_used() {
        let pool = Pool::default();
        let (mut most, mut held, mut used) = (0, Vec::new(), 0);
        let mut state = 1_u32;
        for _ in 0..2000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if state >> 31 == 0 || held.len() > 12 {
                if !held.is_empty() {
                    let buffer: AlignedBytes = held.swap_remove((state as usize >> 8) % held.len());
                    used -= buffer.len();
                    pool.give(buffer);
                }
            } else {
                let bytes = SMALLEST_BYTES * (1 + (state as usize >> 8) % 9);
                held.push(pool.take(bytes).unwrap());
                used += bytes;
            }
            most = most.max(used);
            assert!(total(&pool) <= most, "{} bytes for at most {most} in use", total(&pool));
        }
    }
}
