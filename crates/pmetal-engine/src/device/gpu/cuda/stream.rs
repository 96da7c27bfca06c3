//! One device's context and the stream that everything is ordered on.

use std::ffi::{CStr, c_char};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::bindings::*;
use super::discovery::{self, DriverFunctions};
use super::pool::SegmentSource;
use crate::error::{Error, Result};

/// Locks; a panic of another thread leaves counters and caches that are whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn failed(call: &str, reason: impl Into<String>) -> Error {
    Error::Driver { device: "cuda", call: call.to_owned(), reason: reason.into() }
}

/// A graphics processor that the driver offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaDevice {
    /// Its number, from 0.
    pub ordinal: usize,
    /// A name such as `NVIDIA H200`.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// All of its memory.
    pub memory_bytes: usize,
    /// Shared memory that one block can have.
    pub shared_bytes_per_block: usize,
    /// Second-level cache.
    pub l2_bytes: usize,
    /// CUDA version that the driver supports, such as `13.0`.
    pub driver: String,
}

/// The devices that the driver offers, in its order.
///
/// # Errors
/// [`Error::Unsupported`] without a driver, [`Error::Driver`] where it fails.
pub fn cuda_devices() -> Result<Vec<CudaDevice>> {
    let calls = driver()?;
    let mut count = 0;
    // SAFETY: the call writes one integer to valid memory.
    check(calls, "cuDeviceGetCount", unsafe { (calls.calls.cuDeviceGetCount)(&raw mut count) })?;
    (0..count.unsigned_abs() as usize).map(|ordinal| describe(calls, ordinal).map(|found| found.1)).collect()
}

/// The initialised driver.
fn driver() -> Result<&'static DriverFunctions> {
    let unsupported = |reason| Error::Unsupported { operation: "computing", device: "cuda", reason };
    let driver = discovery::driver().map_err(unsupported)?;
    // SAFETY: may be called any number of times, from any thread.
    check(&driver.functions, "cuInit", unsafe { (driver.functions.calls.cuInit)(0) })?;
    Ok(&driver.functions)
}

fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return "unknown error".to_owned();
    }
    // SAFETY: not null, so it is a string constant of the library, with its zero.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

fn check(driver: &DriverFunctions, call: &str, status: i32) -> Result<()> {
    if status == SUCCESS {
        return Ok(());
    }
    let (mut name, mut description) = (std::ptr::null(), std::ptr::null());
    // SAFETY: the calls write one pointer each, or leave it null for an unknown status.
    unsafe {
        (driver.calls.cuGetErrorName)(status, &raw mut name);
        (driver.calls.cuGetErrorString)(status, &raw mut description);
    }
    Err(failed(call, format!("{} ({status}, {})", text(description), text(name))))
}

fn describe(driver: &DriverFunctions, ordinal: usize) -> Result<(i32, CudaDevice)> {
    let calls = &driver.calls;
    let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
    let mut device = 0;
    // SAFETY: the call writes one integer to valid memory.
    check(driver, "cuDeviceGet", unsafe { (calls.cuDeviceGet)(&raw mut device, number) })?;
    let mut name = [0_u8; 256];
    // SAFETY: at most 256 bytes are written, the last of them zero.
    let status = unsafe { (calls.cuDeviceGetName)(name.as_mut_ptr().cast(), 256, device) };
    check(driver, "cuDeviceGetName", status)?;
    let mut memory_bytes = 0;
    // SAFETY: the call writes one size to valid memory.
    check(driver, "cuDeviceTotalMem", unsafe { (calls.cuDeviceTotalMem_v2)(&raw mut memory_bytes, device) })?;
    let attribute = |which: i32| -> Result<usize> {
        let mut value = 0;
        // SAFETY: the call writes one integer to valid memory.
        let status = unsafe { (calls.cuDeviceGetAttribute)(&raw mut value, which, device) };
        check(driver, "cuDeviceGetAttribute", status)?;
        Ok(value.unsigned_abs() as usize)
    };
    let version = discovery::driver().map_or(0, |driver| driver.version);
    let found = CudaDevice {
        ordinal,
        name: CStr::from_bytes_until_nul(&name)
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        capability: (
            attribute(ATTRIBUTE_CAPABILITY_MAJOR)? as u32,
            attribute(ATTRIBUTE_CAPABILITY_MINOR)? as u32,
        ),
        multiprocessors: attribute(ATTRIBUTE_MULTIPROCESSORS)?,
        memory_bytes,
        shared_bytes_per_block: attribute(ATTRIBUTE_SHARED_BYTES_OPT_IN)?,
        l2_bytes: attribute(ATTRIBUTE_L2_BYTES)?,
        driver: format!("{}.{}", version / 1000, version % 1000 / 10),
    };
    Ok((device, found))
}

/// A stream of the device's primary context, which other libraries of the process share. The context is retained
/// until the process ends, so that no handle of it can dangle.
pub(super) struct Stream {
    driver: &'static DriverFunctions,
    context: Handle,
    pub(super) handle: Handle,
    pub(super) device: CudaDevice,
    failure: Mutex<Option<(String, String)>>,
    capturing: AtomicBool,
}

impl Stream {
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        let driver = driver()?;
        let (number, device) = describe(driver, ordinal)?;
        let (mut context, mut handle) = (Handle::NULL, Handle::NULL);
        // SAFETY: the device exists; the call writes one handle.
        let status = unsafe { (driver.calls.cuDevicePrimaryCtxRetain)(&raw mut context, number) };
        check(driver, "cuDevicePrimaryCtxRetain", status)?;
        // SAFETY: the context was retained above and stays so.
        check(driver, "cuCtxSetCurrent", unsafe { (driver.calls.cuCtxSetCurrent)(context) })?;
        // SAFETY: a context is current; the call writes one handle.
        let status = unsafe { (driver.calls.cuStreamCreate)(&raw mut handle, STREAM_NON_BLOCKING) };
        check(driver, "cuStreamCreate", status)?;
        let (failure, capturing) = (Mutex::new(None), AtomicBool::new(false));
        Ok(Self { driver, context, handle, device, failure, capturing })
    }

    /// The driver, with this device's context current: another library of the process may have changed it.
    pub(super) fn driver(&self) -> &'static Driver {
        // SAFETY: the context is retained for as long as the process lives. A failure shows in the next call.
        unsafe { (self.driver.calls.cuCtxSetCurrent)(self.context) };
        &self.driver.calls
    }

    /// The function that tells a kernel's parameters, where the driver has it.
    pub(super) fn parameters(&self) -> Option<&'static ParameterInfo> {
        self.driver.parameters.as_ref()
    }

    pub(super) fn check(&self, call: &str, status: i32) -> Result<()> {
        check(self.driver, call, status)
    }

    /// Keeps the first failure.
    pub(super) fn keep(&self, result: Result<()>) {
        if let Err(error) = result {
            let parts = match error {
                Error::Driver { call, reason, .. } => (call, reason),
                other => ("an operation".to_owned(), other.to_string()),
            };
            lock(&self.failure).get_or_insert(parts);
        }
    }

    pub(super) fn keep_status(&self, call: &str, status: i32) {
        if status != SUCCESS {
            self.keep(self.check(call, status));
        }
    }

    /// The first failure so far.
    pub(super) fn failure(&self) -> Result<()> {
        lock(&self.failure).as_ref().map_or(Ok(()), |(call, reason)| Err(failed(call, reason.clone())))
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        self.failure()?;
        if self.capturing() {
            return Err(failed("waiting in a capture", "nothing has run yet"));
        }
        // SAFETY: the stream is alive as long as this value.
        let status = unsafe { (self.driver().cuStreamSynchronize)(self.handle) };
        self.keep(self.check("work on the device", status));
        self.failure()
    }

    pub(super) fn capturing(&self) -> bool {
        self.capturing.load(Ordering::Acquire)
    }

    pub(super) fn set_capturing(&self, capturing: bool) {
        self.capturing.store(capturing, Ordering::Release);
    }

    /// Runs a call that a capture of this thread would otherwise forbid, such as allocating or loading a module.
    pub(super) fn relaxed<T>(&self, call: impl FnOnce(&'static Driver) -> T) -> T {
        let driver = self.driver();
        let mut mode = CAPTURE_RELAXED;
        // SAFETY: the call swaps one integer with this thread's mode.
        unsafe { (driver.cuThreadExchangeStreamCaptureMode)(&raw mut mode) };
        let result = call(driver);
        // SAFETY: as above; this puts the thread's mode back.
        unsafe { (driver.cuThreadExchangeStreamCaptureMode)(&raw mut mode) };
        result
    }

    /// Free and total bytes of the device, over all processes.
    pub(super) fn memory(&self) -> Result<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the call writes two sizes to valid memory.
        let status = unsafe { (self.driver().cuMemGetInfo_v2)(&raw mut free, &raw mut total) };
        self.check("cuMemGetInfo", status)?;
        Ok((free, total))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: nothing else holds the stream any more; the driver finishes its work before it goes.
        unsafe { (self.driver().cuStreamDestroy_v2)(self.handle) };
    }
}

/// Device memory straight from the driver.
pub(super) struct DriverMemory(pub(super) std::sync::Arc<Stream>);

impl SegmentSource for DriverMemory {
    fn take(&mut self, bytes: usize) -> Option<u64> {
        let mut address = 0;
        // SAFETY: the call writes one address.
        let status = self.0.relaxed(|driver| unsafe { (driver.cuMemAlloc_v2)(&raw mut address, bytes) });
        if status != OUT_OF_MEMORY {
            self.0.keep_status("cuMemAlloc", status);
        }
        (status == SUCCESS).then_some(address)
    }

    fn give(&mut self, address: u64, _: usize) {
        // SAFETY: the address came from `take`, and the pool's books say that no block of it is in use; the driver
        // waits for work that was enqueued.
        let status = unsafe { (self.0.driver().cuMemFree_v2)(address) };
        self.0.keep_status("cuMemFree", status);
    }

    fn can_give(&self) -> bool {
        !self.0.capturing()
    }
}
