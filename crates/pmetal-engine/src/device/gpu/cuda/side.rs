//! Copies to and from the host's memory on a second stream, beside the kernels of the first.
//!
//! A copy is a branch of the first stream's work: an event there lets the second stream begin, and an event behind the copy
//! is what the first stream waits for. In a capture the branch becomes one of the graph, as every branch is joined again.
//! Host memory is kept for the next step: a recorded graph goes on to use its addresses. Steps follow each other on the
//! first stream, so that two of them never use a buffer at one time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::bindings::*;
use super::staging::{Event, PinnedBuffer};
use super::stream::{Stream, lock};
use crate::device::gpu::runtime::HostCopy;
use crate::error::Result;

/// The second stream, and host memory that nobody uses now, by size.
pub(super) struct Side {
    stream: Arc<Stream>,
    handle: Handle,
    fork: Event,
    idle: Mutex<HashMap<usize, Vec<(PinnedBuffer, Event)>>>,
}

impl Side {
    pub(super) fn open(stream: &Arc<Stream>) -> Result<Self> {
        let fork = Event::new(stream, false)?;
        let mut handle = Handle::NULL;
        // SAFETY: the context is current; the call writes one handle.
        let status =
            stream.relaxed(|driver| unsafe { (driver.cuStreamCreate)(&raw mut handle, STREAM_NON_BLOCKING) });
        stream.check("cuStreamCreate", status)?;
        Ok(Self { stream: stream.clone(), handle, fork, idle: Mutex::default() })
    }

    /// Host memory of so many bytes.
    pub(super) fn copy(self: &Arc<Self>, bytes: usize) -> Result<SideCopy> {
        let held = lock(&self.idle).get_mut(&bytes).and_then(Vec::pop);
        let (buffer, done) = match held {
            Some(held) => held,
            None => (PinnedBuffer::new(&self.stream, bytes)?, Event::new(&self.stream, false)?),
        };
        Ok(SideCopy { side: Arc::clone(self), held: Some((buffer, done)), is_pending: false })
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // SAFETY: nothing else holds the stream; every copy on it was joined, and the driver finishes what is left.
        unsafe { (self.stream.driver().cuStreamDestroy_v2)(self.handle) };
    }
}

/// Host memory with the copy that is under way there.
pub(super) struct SideCopy {
    side: Arc<Side>,
    /// Taken when it is dropped.
    held: Option<(PinnedBuffer, Event)>,
    is_pending: bool,
}

impl SideCopy {
    fn start(&mut self, call: &str, copy: impl FnOnce(&Driver, &PinnedBuffer, Handle) -> i32) {
        self.join();
        let Some((buffer, done)) = &self.held else { return };
        self.side.fork.record();
        self.side.fork.hold_back(self.side.handle);
        let status = copy(self.side.stream.driver(), buffer, self.side.handle);
        self.side.stream.keep_status(call, status);
        done.record_on(self.side.handle);
        self.is_pending = true;
    }
}

impl HostCopy for SideCopy {
    fn store(&mut self, address: u64) {
        // SAFETY: the buffer is as long as the copy and is not read before it is joined; the caller owns the source.
        self.start("copying aside", |driver, buffer, stream| unsafe {
            (driver.cuMemcpyDtoHAsync_v2)(buffer.pointer(), address, buffer.len(), stream)
        });
    }

    fn fetch(&mut self, address: u64) {
        // SAFETY: as above, with the caller's target.
        self.start("copying back", |driver, buffer, stream| unsafe {
            (driver.cuMemcpyHtoDAsync_v2)(address, buffer.pointer(), buffer.len(), stream)
        });
    }

    fn join(&mut self) {
        if std::mem::take(&mut self.is_pending)
            && let Some((_, done)) = &self.held
        {
            done.hold_back(self.side.stream.handle);
        }
    }
}

impl Drop for SideCopy {
    fn drop(&mut self) {
        self.join();
        if let Some((buffer, done)) = self.held.take() {
            lock(&self.side.idle).entry(buffer.len()).or_default().push((buffer, done));
        }
    }
}
