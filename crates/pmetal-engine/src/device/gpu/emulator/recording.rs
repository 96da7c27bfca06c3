//! Work that is recorded for replays, as a driver's graphs are.

use std::sync::Arc;

use super::{Core, lock};
use crate::device::gpu::runtime::{Argument, Launch, ModuleText, Replay};

/// One thing to do.
pub(super) type Operation = Box<dyn Fn(&Core) + Send>;

/// A launch that owns what it is described by.
pub(super) struct OwnedLaunch {
    module: &'static ModuleText,
    defines: Vec<(String, String)>,
    kernel: String,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    arguments: Vec<Argument>,
}

impl OwnedLaunch {
    pub(super) fn new(launch: &Launch<'_>) -> Self {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Self {
            module: launch.module,
            defines: launch.defines.iter().map(own).collect(),
            kernel: launch.kernel.to_owned(),
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            arguments: launch.arguments.to_vec(),
        }
    }

    pub(super) fn run(&self, core: &Core) {
        let defines: Vec<(&str, &str)> =
            self.defines.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        core.launch(&Launch {
            module: self.module,
            defines: &defines,
            kernel: &self.kernel,
            grid: self.grid,
            block: self.block,
            shared_bytes: self.shared_bytes,
            arguments: &self.arguments,
        });
    }
}

/// What was recorded, with the memory that nobody but its replays uses.
pub(super) struct Recorded {
    pub(super) core: Arc<Core>,
    pub(super) operations: Vec<Operation>,
    pub(super) memory: Vec<u64>,
}

impl Replay for Recorded {
    fn replay(&self) {
        self.operations.iter().for_each(|operation| operation(&self.core));
    }

    fn operations(&self) -> usize {
        self.operations.len()
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // Another recording may use it too.
        for address in self.memory.drain(..) {
            match lock(&self.core.kept).as_mut() {
                Some(kept) => kept.push(address),
                None => self.core.release(address),
            }
        }
    }
}
