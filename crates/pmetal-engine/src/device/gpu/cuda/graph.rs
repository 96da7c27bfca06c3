//! Work recorded once and replayed without the host.

use std::sync::{Arc, Mutex};

use super::bindings::*;
use super::pool::{Owner, Pool};
use super::stream::{DriverMemory, Stream, failed, lock};
use crate::error::Result;

/// Keeps the memory that a graph touches from everybody else until it is dropped.
pub(super) struct PrivateMemory {
    pool: Arc<Mutex<Pool<DriverMemory>>>,
    owner: Owner,
}

impl PrivateMemory {
    /// `None` while another capture records.
    pub(super) fn begin(pool: &Arc<Mutex<Pool<DriverMemory>>>) -> Option<Self> {
        let owner = lock(pool).begin_private()?;
        Some(Self { pool: pool.clone(), owner })
    }

    pub(super) fn end(&self) {
        lock(&self.pool).end_private();
    }
}

impl Drop for PrivateMemory {
    fn drop(&mut self) {
        lock(&self.pool).release(self.owner);
    }
}

/// Captured work. Every launch repeats it on the same addresses: memory from before the capture that it reads or
/// writes must still be allocated, unless it was freed during the capture.
pub(crate) struct Graph {
    stream: Arc<Stream>,
    executable: Handle,
    nodes: usize,
    // Dropped after the executable.
    _memory: PrivateMemory,
}

impl Graph {
    pub(super) fn end(stream: &Arc<Stream>, memory: PrivateMemory) -> Result<Self> {
        let driver = stream.driver();
        let mut graph = Handle::NULL;
        // SAFETY: the stream is alive; the call writes one handle, null when the capture was spoilt.
        let status = unsafe { (driver.cuStreamEndCapture)(stream.handle, &raw mut graph) };
        stream.set_capturing(false);
        memory.end();
        stream.check("ending a capture", status)?;
        if graph == Handle::NULL {
            return Err(failed("ending a capture", "nothing was recorded"));
        }
        let (mut executable, mut nodes) = (Handle::NULL, 0);
        // SAFETY: the graph is alive; the first call only counts; the graph is destroyed after its last use.
        let status = unsafe {
            (driver.cuGraphGetNodes)(graph, std::ptr::null_mut(), &raw mut nodes);
            let status = (driver.cuGraphInstantiateWithFlags)(&raw mut executable, graph, 0);
            (driver.cuGraphDestroy)(graph);
            status
        };
        stream.check("instantiating a graph", status)?;
        let graph = Self { stream: stream.clone(), executable, nodes, _memory: memory };
        // SAFETY: executable and stream are alive.
        stream.check("uploading a graph", unsafe { (driver.cuGraphUpload)(executable, stream.handle) })?;
        Ok(graph)
    }

    /// Enqueues the recorded work.
    pub(crate) fn launch(&self) {
        // SAFETY: executable and stream are alive; the memory is kept by the owner of the addresses.
        let status = unsafe { (self.stream.driver().cuGraphLaunch)(self.executable, self.stream.handle) };
        self.stream.keep_status("launching a graph", status);
    }

    /// How many operations a launch repeats.
    pub(crate) fn nodes(&self) -> usize {
        self.nodes
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
        // SAFETY: nothing else has the executable, and its work has finished.
        unsafe { (self.stream.driver().cuGraphExecDestroy)(self.executable) };
    }
}
