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

/// Starts to record what is enqueued on a stream by this thread.
pub(super) fn begin_recording(stream: &Stream) -> Result<()> {
    // SAFETY: the stream is alive.
    let status = unsafe { (stream.driver().cuStreamBeginCapture_v2)(stream.handle, CAPTURE_THREAD_LOCAL) };
    stream.check("beginning a capture", status)?;
    stream.set_capturing(true);
    Ok(())
}

/// Captured work. Every launch repeats it on the same addresses.
pub(super) struct Executable {
    stream: Arc<Stream>,
    executable: Handle,
    nodes: usize,
}

impl Executable {
    /// Ends what [`begin_recording`] began.
    pub(super) fn end(stream: &Arc<Stream>) -> Result<Self> {
        let driver = stream.driver();
        let mut graph = Handle::NULL;
        // SAFETY: the stream is alive; the call writes one handle, null when the capture was spoilt.
        let status = unsafe { (driver.cuStreamEndCapture)(stream.handle, &raw mut graph) };
        stream.set_capturing(false);
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
        let graph = Self { stream: stream.clone(), executable, nodes };
        // SAFETY: executable and stream are alive.
        stream.check("uploading a graph", unsafe { (driver.cuGraphUpload)(executable, stream.handle) })?;
        Ok(graph)
    }

    pub(super) fn launch(&self) {
        // SAFETY: executable and stream are alive; the memory is kept by the owner of the addresses.
        let status = unsafe { (self.stream.driver().cuGraphLaunch)(self.executable, self.stream.handle) };
        self.stream.keep_status("launching a graph", status);
    }
}

/// Captured work with its memory: what it reads or writes from before the capture must still be allocated, unless it was freed
/// during the capture.
pub(crate) struct Graph {
    work: Executable,
    // Dropped after the work.
    _memory: PrivateMemory,
}

impl Graph {
    pub(super) fn end(stream: &Arc<Stream>, memory: PrivateMemory) -> Result<Self> {
        let work = Executable::end(stream);
        memory.end();
        Ok(Self { work: work?, _memory: memory })
    }

    /// Enqueues the recorded work.
    pub(crate) fn launch(&self) {
        self.work.launch();
    }

    /// How many operations a launch repeats.
    pub(crate) fn nodes(&self) -> usize {
        self.work.nodes
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
        // SAFETY: nothing else has the executable, and its work has finished.
        unsafe { (self.stream.driver().cuGraphExecDestroy)(self.executable) };
    }
}
