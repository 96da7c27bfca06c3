//! A device that runs the texts of the portable kernels on the host, so that every test machine runs them.
//!
//! A C++ compiler builds each module behind `kernels/prelude/host.h`; `kernels/host/runner.cpp` runs threads in an order
//! that a seed decides and reports those that miss a barrier.

mod products;
mod recording;
#[cfg(test)]
mod tests;

use std::alloc::Layout;
use std::collections::HashMap;
use std::ffi::{CStr, c_char};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use libloading::Library;
use sha2::Digest;

use super::runtime::{
    Argument, DeviceFacts, Fp8Scaling, Gemm, HostCopy, Launch, ModuleText, Replay, Runtime, ScaledGemm,
};
use crate::device::KernelTime;
use crate::error::{Error, Result};
use recording::{Operation, OwnedLaunch, Recorded};

const PRELUDE: &str = include_str!("../../../kernels/prelude/host.h");
const RUNNER: &str = include_str!("../../../kernels/host/runner.cpp");

/// Bytes behind every allocation that must stay as they are.
const GUARD: usize = 64;
const GUARD_BYTE: u8 = 0xA5;

/// Modules that this process has loaded. A module's state is one for all emulators, so it is locked while it runs.
static MODULES: LazyLock<Mutex<HashMap<String, Arc<Mutex<Library>>>>> = LazyLock::new(Mutex::default);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(call: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Driver { device: "emulator", call: call.into(), reason: reason.into() }
}

/// Whether there is a compiler to build kernels with, and fibres to run them.
pub(crate) fn has_compiler() -> bool {
    cfg!(unix) && Command::new("c++").arg("--version").output().is_ok_and(|output| output.status.success())
}

/// As `HostLaunch` of `kernels/host/runner.cpp`.
#[repr(C)]
struct HostLaunch {
    groups: [u32; 3],
    threads: u32,
    seed: u64,
    count: u64,
    kinds: *const u8,
    arguments: *const u64,
}

type Entry = unsafe extern "C" fn(*const HostLaunch) -> *const c_char;

/// The host as a device. Work is done when it is asked for.
pub(crate) struct Emulator {
    core: Arc<Core>,
    fp8: Fp8Scaling,
}

/// What recordings and copies share with their emulator.
struct Core {
    seed: u64,
    launches: AtomicU64,
    /// Sizes of what is allocated.
    memory: Mutex<HashMap<u64, usize>>,
    /// What was freed since a recording began, whose replays go on to use it.
    kept: Mutex<Option<Vec<u64>>>,
    failure: Mutex<Option<(String, String)>>,
    /// What is recorded instead of being done.
    recording: Mutex<Option<Vec<Operation>>>,
}

/// What is copied to and from at the last moment that the contract allows: when it is joined.
struct LateCopy {
    state: Arc<Mutex<CopyState>>,
    core: Arc<Core>,
}

struct CopyState {
    bytes: Vec<u8>,
    pending: Option<(Way, u64)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Store,
    Fetch,
}

impl CopyState {
    fn begin(&mut self, core: &Core, way: Way, address: u64) {
        self.join(core);
        if way == Way::Fetch {
            // SAFETY: the caller owns the target. What is used before the join shows.
            unsafe { (address as *mut u8).write_bytes(0xFF, self.bytes.len()) };
        }
        self.pending = Some((way, address));
    }

    fn join(&mut self, core: &Core) {
        let Some((way, address)) = self.pending.take() else { return };
        if lock(&core.memory).get(&address).is_none_or(|&bytes| bytes < self.bytes.len()) {
            let reason = "its memory was given back before the copy was joined".to_owned();
            lock(&core.failure).get_or_insert(("copying beside other work".to_owned(), reason));
            return;
        }
        // SAFETY: the range is allocated, as was just seen.
        unsafe {
            match way {
                Way::Store => self.bytes.as_mut_ptr().copy_from(address as *const u8, self.bytes.len()),
                Way::Fetch => (address as *mut u8).copy_from(self.bytes.as_ptr(), self.bytes.len()),
            }
        }
    }
}

impl LateCopy {
    fn enqueue(&self, operation: impl Fn(&mut CopyState, &Core) + Send + 'static) {
        let state = Arc::clone(&self.state);
        self.core.enqueue(move |core| operation(&mut lock(&state), core));
    }
}

impl HostCopy for LateCopy {
    fn store(&mut self, address: u64) {
        self.enqueue(move |state, core| state.begin(core, Way::Store, address));
    }

    fn fetch(&mut self, address: u64) {
        self.enqueue(move |state, core| state.begin(core, Way::Fetch, address));
    }

    fn join(&mut self) {
        self.enqueue(CopyState::join);
    }
}

impl Drop for LateCopy {
    fn drop(&mut self) {
        self.join();
    }
}

impl Emulator {
    /// A device whose threads and groups run in an order that the seed decides.
    pub(crate) fn new(seed: u64) -> Self {
        let (launches, memory) = (AtomicU64::new(0), Mutex::default());
        let (kept, failure, recording) = (Mutex::default(), Mutex::default(), Mutex::default());
        let core = Arc::new(Core { seed, launches, memory, kept, failure, recording });
        Self { core, fp8: Fp8Scaling::Rows }
    }

    /// As [`Self::new`], with products of e4m3 that do so with scales.
    #[cfg(test)]
    pub(super) fn with_fp8(seed: u64, fp8: Fp8Scaling) -> Self {
        Self { fp8, ..Self::new(seed) }
    }

    fn enqueue(&self, operation: impl Fn(&Core) + Send + 'static) {
        self.core.enqueue(operation);
    }
}

impl Core {
    /// Does it, or records it.
    fn enqueue(&self, operation: impl Fn(&Core) + Send + 'static) {
        let mut recording = lock(&self.recording);
        match recording.as_mut() {
            Some(operations) => operations.push(Box::new(operation)),
            None => {
                drop(recording);
                operation(self);
            }
        }
    }

    fn keep(&self, result: Result<()>) {
        if let Err(Error::Driver { call, reason, .. }) = result {
            lock(&self.failure).get_or_insert((call, reason));
        }
    }

    fn failure(&self) -> Result<()> {
        lock(&self.failure).as_ref().map_or(Ok(()), |(call, reason)| Err(failed(call, reason)))
    }

    fn try_launch(&self, launch: &Launch<'_>) -> Result<()> {
        let call = format!("kernel `{}` of `{}`", launch.kernel, launch.module.name);
        let fail = |reason: String| failed(call.as_str(), reason);
        if launch.shared_bytes > 0 || launch.block[1..] != [1, 1] {
            return Err(fail(
                "the emulator has no dynamic shared memory and blocks along x alone".to_owned(),
            ));
        }
        let unpacked: Vec<(u8, u64)> = launch.arguments.iter().map(unpacked).collect();
        let kinds: Vec<u8> = unpacked.iter().map(|argument| argument.0).collect();
        let arguments: Vec<u64> = unpacked.iter().map(|argument| argument.1).collect();
        let host = HostLaunch {
            groups: launch.grid,
            threads: launch.block[0],
            seed: self.seed ^ self.launches.fetch_add(1, Ordering::Relaxed) << 32,
            count: arguments.len() as u64,
            kinds: kinds.as_ptr(),
            arguments: arguments.as_ptr(),
        };
        let module = loaded(launch.module, launch.defines).map_err(fail)?;
        let library = lock(&module);
        // SAFETY: the entries of a module all have this type.
        let entry = unsafe { library.get::<Entry>(format!("launch_{}", launch.kernel).as_bytes()) };
        let entry = entry.map_err(|error| fail(error.to_string()))?;
        // SAFETY: the runner compares kinds with the kernel's parameters; the caller vouches for the addresses.
        let message = unsafe { entry(&raw const host) };
        if message.is_null() {
            return Ok(());
        }
        // SAFETY: a message is a string in the module, which is locked.
        Err(fail(unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()))
    }

    fn launch(&self, launch: &Launch<'_>) {
        // What follows a failure would work on what it left.
        if !launch.grid.contains(&0) && self.failure().is_ok() {
            self.keep(self.try_launch(launch));
        }
    }

    /// Gives memory back, whose guard must be as it was.
    fn release(&self, address: u64) {
        let Some(bytes) = lock(&self.memory).remove(&address) else {
            return self.keep(Err(failed("freeing memory", "it is not allocated")));
        };
        let layout = Layout::from_size_align(bytes + GUARD, 256).expect("invariant: it was allocated so");
        let start = address as *mut u8;
        // SAFETY: the range was allocated with this layout and its guard was initialised.
        let intact = unsafe {
            let guard = std::slice::from_raw_parts(start.add(bytes), GUARD);
            let intact = guard.iter().all(|&byte| byte == GUARD_BYTE);
            std::alloc::dealloc(start, layout);
            intact
        };
        if !intact {
            // Nobody may ask for the failure after the last tensor is gone.
            assert!(std::thread::panicking(), "a kernel wrote behind an allocation of {bytes} bytes");
        }
    }
}

fn unpacked(argument: &Argument) -> (u8, u64) {
    match argument {
        Argument::Address(address) => (b'a', *address),
        Argument::U32(value) => (b'u', u64::from(*value)),
        Argument::U64(value) => (b'w', *value),
        Argument::F32(value) => (b'f', u64::from(value.to_bits())),
        // No parameter is of these kinds, so that the runner refuses them.
        Argument::TensorMap(_) | Argument::Words(_) => (b'm', 0),
    }
}

/// What is compiled: the host's prelude instead of the module's own, and an entry for each of its kernels.
fn full_text(module: &ModuleText) -> String {
    let texts = module.texts.get(1..).unwrap_or_default();
    let starts = texts.iter().flat_map(|text| text.split("\nKERNEL(").skip(1));
    let entries = starts.filter_map(|text| Some(format!("HOST_ENTRY({})", text.split_once(')')?.0)));
    let parts = [PRELUDE].into_iter().chain(texts.iter().copied()).chain([RUNNER]);
    let text = parts.map(str::to_owned).chain(entries).collect::<Vec<_>>().join("\n");
    #[cfg(test)]
    let text = PLANTED.get().map_or(text.clone(), |(right, wrong)| text.replace(right, wrong));
    text
}

#[cfg(test)]
thread_local! {
    /// What a test has put into the texts of kernels in the place of what, for the launches of its thread.
    pub(crate) static PLANTED: std::cell::Cell<Option<(&'static str, &'static str)>> =
        const { std::cell::Cell::new(None) };
}

/// Compiles a module at its first use; the reason where that fails.
fn loaded(module: &ModuleText, defines: &[(&str, &str)]) -> std::result::Result<Arc<Mutex<Library>>, String> {
    let text = full_text(module);
    let defines: Vec<String> = defines.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
    let target = std::env::consts::ARCH;
    let digest = sha2::Sha256::digest(format!("{target}\0{}\0{text}", defines.join("\0")));
    let digest: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let key = format!("{}-{digest}", module.name);
    let mut modules = lock(&MODULES);
    if let Some(library) = modules.get(&key) {
        return Ok(Arc::clone(library));
    }
    let folder = std::env::temp_dir().join("pmetal-emulator");
    let path = folder.join(format!("{key}.so"));
    if !path.exists() {
        compile(&text, &defines, &folder, &path)?;
    }
    // SAFETY: loading the library runs no code but the C++ runtime's own.
    let library = unsafe { Library::new(&path) }.map_err(|error| error.to_string())?;
    let library = Arc::new(Mutex::new(library));
    modules.insert(key, Arc::clone(&library));
    Ok(library)
}

fn compile(text: &str, defines: &[String], folder: &Path, path: &PathBuf) -> std::result::Result<(), String> {
    let describe = |error: std::io::Error| error.to_string();
    std::fs::create_dir_all(folder).map_err(describe)?;
    let mut source = tempfile::Builder::new().suffix(".cpp").tempfile_in(folder).map_err(describe)?;
    source.write_all(text.as_bytes()).map_err(describe)?;
    // Other processes may compile the same module: it appears whole or not at all.
    let built = tempfile::NamedTempFile::new_in(folder).map_err(describe)?.into_temp_path();
    let output = Command::new("c++")
        .args(["-O1", "-std=c++17", "-shared", "-fPIC"])
        .args(defines)
        .args([source.path(), Path::new("-o"), &built])
        .output()
        .map_err(describe)?;
    if !output.status.success() {
        return Err(format!("c++ refuses it: {}", String::from_utf8_lossy(&output.stderr)));
    }
    built.persist(path).map_err(|error| error.to_string())
}

impl Runtime for Emulator {
    fn name(&self) -> &'static str {
        "emulator"
    }

    fn description(&self) -> &str {
        "kernels on the host"
    }

    fn has_bf16(&self) -> bool {
        true
    }

    fn facts(&self) -> DeviceFacts {
        DeviceFacts {
            capability: (0, 0),
            has_paired_products: true,
            multiprocessors: 1,
            shared_bytes_per_block: 32 << 10,
            deterministic: true,
        }
    }

    fn memory(&self) -> Result<(usize, usize)> {
        let taken: usize = lock(&self.core.memory).values().sum();
        Ok(((1_usize << 30).saturating_sub(taken), 1 << 30))
    }

    fn allocate(&self, bytes: usize) -> Option<u64> {
        let layout = Layout::from_size_align(bytes.checked_add(GUARD)?, 256).ok()?;
        // SAFETY: the size is not zero; both ranges are within it.
        let address = unsafe {
            let start = std::alloc::alloc(layout);
            if start.is_null() {
                return None;
            }
            // NaN in every float type: what a kernel forgets to write shows.
            start.write_bytes(0xFF, bytes);
            start.add(bytes).write_bytes(GUARD_BYTE, GUARD);
            start as u64
        };
        lock(&self.core.memory).insert(address, bytes);
        Some(address)
    }

    fn free(&self, address: u64, _bytes: usize) {
        match lock(&self.core.kept).as_mut() {
            Some(kept) => kept.push(address),
            None => self.core.release(address),
        }
    }

    fn upload(&self, bytes: &[u8], address: u64) {
        if lock(&self.core.recording).is_some() {
            return self.fail("copying to the device", "a replay would read the source again");
        }
        // SAFETY: the caller owns the target.
        unsafe { (address as *mut u8).copy_from(bytes.as_ptr(), bytes.len()) };
    }

    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        if lock(&self.core.recording).is_some() {
            return Err(failed("copying from the device", "nothing that is recorded has run yet"));
        }
        // SAFETY: the caller owns the source.
        unsafe { (address as *const u8).copy_to(bytes.as_mut_ptr(), bytes.len()) };
        self.core.failure()
    }

    fn copy(&self, source: u64, target: u64, bytes: usize) {
        // SAFETY: the caller owns both ranges, also when a recording is replayed.
        self.enqueue(move |_| unsafe { (source as *const u8).copy_to(target as *mut u8, bytes) });
    }

    fn copy_rows(&self, source: (u64, usize), target: (u64, usize), row_bytes: usize, rows: usize) {
        for row in 0..rows {
            self.copy(source.0 + (row * source.1) as u64, target.0 + (row * target.1) as u64, row_bytes);
        }
    }

    fn can_put_aside(&self) -> bool {
        true
    }

    fn host_copy(&self, bytes: usize) -> Result<Box<dyn HostCopy>> {
        Ok(Box::new(LateCopy {
            core: Arc::clone(&self.core),
            state: Arc::new(Mutex::new(CopyState { bytes: vec![0; bytes], pending: None })),
        }))
    }

    fn fill(&self, address: u64, byte: u8, bytes: usize) {
        // SAFETY: the caller owns the range, also when a recording is replayed.
        self.enqueue(move |_| unsafe { (address as *mut u8).write_bytes(byte, bytes) });
    }

    fn launch(&self, launch: &Launch<'_>) {
        let launch = OwnedLaunch::new(launch);
        self.enqueue(move |core| launch.run(core));
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        let gemm = *gemm;
        self.enqueue(move |_| products::multiply(&gemm));
        Ok(())
    }

    fn fp8(&self) -> std::result::Result<Fp8Scaling, String> {
        Ok(self.fp8)
    }

    fn scaled_gemm(&self, gemm: &ScaledGemm) -> Result<()> {
        let gemm = *gemm;
        self.enqueue(move |_| products::multiply_scaled(&gemm));
        Ok(())
    }

    fn begin_recording(&self) -> Result<bool> {
        let mut recording = lock(&self.core.recording);
        if recording.is_some() {
            return Err(failed("beginning a recording", "another one goes on"));
        }
        (*recording, *lock(&self.core.kept)) = (Some(Vec::new()), Some(Vec::new()));
        Ok(true)
    }

    fn end_recording(&self) -> Result<Box<dyn Replay>> {
        let operations = lock(&self.core.recording).take();
        let memory = lock(&self.core.kept).take().unwrap_or_default();
        let operations = operations.ok_or_else(|| failed("ending a recording", "none was begun"))?;
        let recorded = Recorded { core: Arc::clone(&self.core), operations, memory };
        self.core.failure()?;
        Ok(Box::new(recorded))
    }

    fn start_profile(&self) {}

    fn end_profile(&self) -> Result<Vec<KernelTime>> {
        self.core.failure().map(|()| Vec::new())
    }

    fn fail(&self, call: &'static str, reason: &str) {
        self.core.keep(Err(failed(call, reason)));
    }

    fn synchronize(&self) -> Result<()> {
        self.core.failure()
    }
}
