//! Copies between the host's ordinary memory and the device, through page-locked slots that the device reads and
//! writes by itself while the processor fills or empties the next one.

use std::ffi::c_void;
use std::sync::Arc;

use rayon::prelude::*;

use super::bindings::*;
use super::stream::Stream;
use crate::error::Result;

const SLOT_BYTES: usize = 8 << 20;
const SLOTS: usize = 4;
/// One core copies this much in less time than it takes to wake others.
const PART_BYTES: usize = 1 << 20;

/// Host memory that the device can read and write by itself.
pub(crate) struct PinnedBuffer {
    stream: Arc<Stream>,
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone; shared references only read.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as above.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    /// Where the device copies to.
    pub(super) fn pointer(&self) -> *mut c_void {
        self.pointer.cast()
    }

    pub(super) fn new(stream: &Arc<Stream>, bytes: usize) -> Result<Self> {
        let mut pointer = std::ptr::null_mut::<c_void>();
        // SAFETY: the call writes one pointer.
        let status =
            stream.relaxed(|driver| unsafe { (driver.cuMemAllocHost_v2)(&raw mut pointer, bytes.max(1)) });
        stream.check("cuMemAllocHost", status)?;
        let buffer = Self { stream: stream.clone(), pointer: pointer.cast(), bytes };
        // SAFETY: the driver returned at least that many bytes.
        unsafe { buffer.pointer.write_bytes(0, bytes.max(1)) };
        Ok(buffer)
    }

    /// Its bytes. While a copy from the device is under way they may change: wait for its event first.
    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated and initialised with this size.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }

    /// Its bytes, to be written. A copy to the device that is under way may read either state: wait first.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: allocated and initialised with this size, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
        // SAFETY: allocated by `cuMemAllocHost`, and no copy is under way.
        unsafe { (self.stream.driver().cuMemFreeHost)(self.pointer.cast()) };
    }
}

/// A point in the stream.
pub(crate) struct Event {
    stream: Arc<Stream>,
    handle: Handle,
}

impl Event {
    pub(super) fn new(stream: &Arc<Stream>, timed: bool) -> Result<Self> {
        let mut handle = Handle::NULL;
        let flags = if timed { 0 } else { EVENT_DISABLE_TIMING };
        // SAFETY: the call writes one handle.
        let status = stream.relaxed(|driver| unsafe { (driver.cuEventCreate)(&raw mut handle, flags) });
        stream.check("cuEventCreate", status)?;
        Ok(Self { stream: stream.clone(), handle })
    }

    /// Moves the event behind all work so far.
    pub(crate) fn record(&self) {
        self.record_on(self.stream.handle);
    }

    /// [`Self::record`] of another stream's work.
    pub(super) fn record_on(&self, stream: Handle) {
        // SAFETY: the event is alive, and so is the stream, which the caller has.
        let status = unsafe { (self.stream.driver().cuEventRecord)(self.handle, stream) };
        self.stream.keep_status("cuEventRecord", status);
    }

    /// Lets work that a stream is given from here on wait for the event.
    pub(super) fn hold_back(&self, stream: Handle) {
        // SAFETY: as above; zero is the only flag.
        let status = unsafe { (self.stream.driver().cuStreamWaitEvent)(stream, self.handle, 0) };
        self.stream.keep_status("cuStreamWaitEvent", status);
    }

    /// Waits until the device has passed the event.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] with the first failure so far.
    pub(crate) fn wait(&self) -> Result<()> {
        // SAFETY: the event is alive.
        let status = unsafe { (self.stream.driver().cuEventSynchronize)(self.handle) };
        self.stream.keep_status("work on the device", status);
        self.stream.failure()
    }

    /// Milliseconds from this event to a later one, which was waited for; both timed.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] where the driver has no time.
    pub(crate) fn milliseconds_to(&self, later: &Self) -> Result<f32> {
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive; the call writes one float.
        let status = unsafe {
            (self.stream.driver().cuEventElapsedTime)(&raw mut milliseconds, self.handle, later.handle)
        };
        self.stream.check("cuEventElapsedTime", status)?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: nothing uses the handle any more; the driver defers the end of an event that is under way.
        unsafe { (self.stream.driver().cuEventDestroy_v2)(self.handle) };
    }
}

struct Slot {
    buffer: PinnedBuffer,
    used: usize,
    event: Event,
}

/// A ring of page-locked slots.
pub(super) struct Staging {
    stream: Arc<Stream>,
    slots: Vec<Slot>,
    current: usize,
}

impl Staging {
    pub(super) fn new(stream: &Arc<Stream>) -> Self {
        Self { stream: stream.clone(), slots: Vec::new(), current: 0 }
    }

    fn prepare(&mut self) -> Result<()> {
        while self.slots.len() < SLOTS {
            let buffer = PinnedBuffer::new(&self.stream, SLOT_BYTES)?;
            self.slots.push(Slot { buffer, used: 0, event: Event::new(&self.stream, false)? });
        }
        Ok(())
    }

    /// Goes on to the next slot, once the device is done with it.
    fn advance(&mut self) -> Result<()> {
        self.slots[self.current].event.record();
        self.current = (self.current + 1) % SLOTS;
        let slot = &mut self.slots[self.current];
        slot.event.wait()?;
        slot.used = 0;
        Ok(())
    }

    pub(super) fn upload(&mut self, mut bytes: &[u8], mut address: u64) -> Result<()> {
        self.prepare()?;
        while !bytes.is_empty() {
            if self.slots[self.current].used == SLOT_BYTES {
                self.advance()?;
            }
            let slot = &mut self.slots[self.current];
            let (part, rest) = bytes.split_at(bytes.len().min(SLOT_BYTES - slot.used));
            let target = &mut slot.buffer.as_mut_slice()[slot.used..][..part.len()];
            copy_in_parts(part, target);
            let source = target.as_ptr();
            // SAFETY: the slot keeps these bytes until its event has passed; the caller owns the device memory.
            let status = unsafe {
                (self.stream.driver().cuMemcpyHtoDAsync_v2)(
                    address,
                    source.cast(),
                    part.len(),
                    self.stream.handle,
                )
            };
            self.stream.check("copying to the device", status)?;
            slot.used += part.len();
            address += part.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    pub(super) fn download(&mut self, mut address: u64, bytes: &mut [u8]) -> Result<()> {
        self.prepare()?;
        // Uploads may still read the slots.
        self.stream.synchronize()?;
        self.slots.iter_mut().for_each(|slot| slot.used = 0);
        let (mut parts, mut waiting) =
            (bytes.chunks_mut(SLOT_BYTES).enumerate(), std::collections::VecDeque::new());
        loop {
            let next = parts.next();
            let more = next.is_some();
            if let Some((index, part)) = next {
                let slot = &mut self.slots[index % SLOTS];
                let target = slot.buffer.as_mut_slice().as_mut_ptr();
                // SAFETY: the slot has room for a part, and is not touched before its event has passed.
                let status = unsafe {
                    (self.stream.driver().cuMemcpyDtoHAsync_v2)(
                        target.cast(),
                        address,
                        part.len(),
                        self.stream.handle,
                    )
                };
                self.stream.check("copying from the device", status)?;
                slot.event.record();
                address += part.len() as u64;
                waiting.push_back((index % SLOTS, part));
            }
            if waiting.len() == SLOTS || !more {
                let Some((index, part)) = waiting.pop_front() else { return self.stream.failure() };
                self.slots[index].event.wait()?;
                copy_in_parts(&self.slots[index].buffer.as_slice()[..part.len()], part);
            }
        }
    }
}

fn copy_in_parts(source: &[u8], target: &mut [u8]) {
    if source.len() <= PART_BYTES {
        target.copy_from_slice(source);
        return;
    }
    target.par_chunks_mut(PART_BYTES).zip(source.par_chunks(PART_BYTES)).for_each(|(target, source)| {
        target.copy_from_slice(source);
    });
}
