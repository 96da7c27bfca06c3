//! Counters that blocks of one launch share.

use std::sync::{Arc, OnceLock};

use super::runtime::Runtime;
use crate::Tensor;
use crate::error::Result;
use crate::memory::Category;

/// Counters, u32, that are zero before and after each launch, so that one set is enough for one stream. Not a tensor, which
/// would keep its device alive from within.
pub(super) struct Counters {
    runtime: Arc<dyn Runtime>,
    address: OnceLock<Option<u64>>,
}

/// How many there are.
pub(super) const COUNTERS: usize = 1024;

const BYTES: usize = 4 * COUNTERS;

impl Counters {
    pub(super) fn new(runtime: &Arc<dyn Runtime>) -> Self {
        Self { runtime: Arc::clone(runtime), address: OnceLock::new() }
    }

    /// The first of them, on the device of `like`.
    pub(super) fn address(&self, like: &Tensor) -> Result<u64> {
        let allocated = *self.address.get_or_init(|| {
            let address = self.runtime.allocate(BYTES)?;
            self.runtime.fill(address, 0, BYTES);
            Some(address)
        });
        allocated.ok_or_else(|| like.device().memory().refuse(Category::Workspace, BYTES))
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        if let Some(address) = self.address.get().copied().flatten() {
            self.runtime.free(address, BYTES);
        }
    }
}
