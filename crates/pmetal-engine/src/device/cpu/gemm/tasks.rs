use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

/// A pointer that tasks share; each touches other elements.
pub(in crate::device::cpu) struct Shared<T>(pub(in crate::device::cpu) *mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: whoever shares it sees to it that the tasks write disjoint elements, or only read.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// A method, so that closures capture the whole and not the bare pointer.
    pub(in crate::device::cpu) fn get(self) -> *mut T {
        self.0
    }
}

/// Hands out the indices of tasks to whichever thread is free.
pub(in crate::device::cpu) struct Next<'a> {
    counter: &'a AtomicUsize,
    count: usize,
}

impl Next<'_> {
    /// The next index, if any is left.
    pub(in crate::device::cpu) fn take(&self) -> Option<usize> {
        let index = self.counter.fetch_add(1, Ordering::Relaxed);
        (index < self.count).then_some(index)
    }
}

/// Runs `worker` on up to `threads` threads; together they take all indices below `count`.
pub(in crate::device::cpu) fn for_each_index(count: usize, threads: usize, worker: impl Fn(Next<'_>) + Sync) {
    let counter = AtomicUsize::new(0);
    let workers = threads.min(count);
    if workers <= 1 {
        worker(Next { counter: &counter, count });
    } else {
        (0..workers).into_par_iter().with_max_len(1).for_each(|_| worker(Next { counter: &counter, count }));
    }
}
