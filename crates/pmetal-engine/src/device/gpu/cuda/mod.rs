//! NVIDIA's GPUs through the driver's own interface. Nothing of CUDA is needed to build; the driver, NVRTC and
//! cuBLASLt are opened when a device is, and their absence is an error that says how to get them.

mod bindings;
mod compile;
mod discovery;
mod disk;
mod gemm;
mod graph;
mod pool;
mod problem;
mod profile;
mod side;
mod staging;
mod stream;
mod tensor_map;
#[cfg(test)]
mod tests;

use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

pub use discovery::{CudaLibrary, cuda_libraries};
pub use stream::{CudaDevice, cuda_devices};

pub(crate) use graph::Graph;
#[cfg(test)]
pub(crate) use pool::PoolReport;
#[cfg(test)]
pub(crate) use staging::{Event, PinnedBuffer};

use super::runtime::{
    Argument, DeviceFacts, Fp8Scaling, Gemm, HostCopy, Launch, ModuleText, Replay, Runtime, ScaledGemm,
};
use crate::DType;
use crate::device::KernelTime;
use crate::error::{Error, Result};
use bindings::{CopyRows, EncodedMap, Handle, MEMORY_DEVICE, SUCCESS};
use compile::Modules;
use disk::DiskCache;
use gemm::Products;
use graph::PrivateMemory;
use pool::Pool;
use profile::Profile;
use side::Side;
use staging::Staging;
use stream::{DriverMemory, Stream, failed, lock};

/// How to open a device.
#[derive(Debug, Clone, Default)]
pub(crate) struct CudaOptions {
    /// Which device.
    pub(crate) ordinal: usize,
    /// Folder for compiled kernels and chosen algorithms; nothing is kept without one.
    pub(crate) cache: Option<PathBuf>,
    /// Choose algorithms without timing, so that a second run computes the same bits.
    pub(crate) deterministic: bool,
}

impl CudaOptions {
    /// The first device, with the user's cache folder.
    pub(crate) fn from_environment() -> Self {
        let cache = disk::locate(|name| std::env::var_os(name)).map(|folder| folder.join("cuda"));
        Self { ordinal: 0, cache, deterministic: false }
    }
}

/// What was done so far, for reports and tests.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counts {
    /// Modules that the compiler translated.
    pub(crate) compiled_modules: usize,
    /// Modules that came from the cache on disk.
    pub(crate) cached_modules: usize,
    /// Products whose algorithm was chosen by timing.
    pub(crate) timed_products: usize,
}

/// One NVIDIA GPU.
pub(crate) struct Cuda {
    // Fields are dropped in this order; the memory goes last but for the stream.
    modules: Mutex<Modules>,
    products: Mutex<Option<Products>>,
    fp8: OnceLock<std::result::Result<Fp8Scaling, String>>,
    staging: Mutex<Staging>,
    side: Mutex<Option<Arc<Side>>>,
    capture: Mutex<Option<PrivateMemory>>,
    profile: Mutex<Option<Profile>>,
    pool: Arc<Mutex<Pool<DriverMemory>>>,
    cache: DiskCache,
    deterministic: bool,
    stream: Arc<Stream>,
}

/// Adds a bias whose type is not the output's, which the library does not do.
static BIAS: ModuleText = ModuleText { name: "bias", texts: &[include_str!("bias.cu")] };

impl Cuda {
    /// Opens a device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] that names each library missing, [`Error::Driver`] where the driver fails.
    pub(crate) fn open(options: &CudaOptions) -> Result<Self> {
        discovery::require()?;
        let stream = Arc::new(Stream::open(options.ordinal)?);
        let cache = DiskCache::new(options.cache.clone());
        Ok(Self {
            modules: Mutex::new(Modules::new(&stream, cache.clone())?),
            products: Mutex::new(None),
            fp8: OnceLock::new(),
            staging: Mutex::new(Staging::new(&stream)),
            side: Mutex::new(None),
            capture: Mutex::new(None),
            profile: Mutex::new(None),
            pool: Arc::new(Mutex::new(Pool::new(DriverMemory(stream.clone())))),
            cache,
            deterministic: options.deterministic,
            stream,
        })
    }

    /// What the device is.
    #[cfg(test)]
    pub(crate) fn device(&self) -> &CudaDevice {
        &self.stream.device
    }

    /// Sizes of the allocator.
    #[cfg(test)]
    pub(crate) fn pool_report(&self) -> PoolReport {
        lock(&self.pool).report()
    }

    /// Gives unused memory back to the driver and returns its bytes.
    #[cfg(test)]
    pub(crate) fn trim(&self) -> usize {
        lock(&self.pool).trim()
    }

    /// What was done so far.
    #[cfg(test)]
    pub(crate) fn counts(&self) -> Counts {
        let modules = lock(&self.modules);
        Counts {
            compiled_modules: modules.compiled,
            cached_modules: modules.from_cache,
            timed_products: lock(&self.products).as_ref().map_or(0, |products| products.timed),
        }
    }

    /// An event behind all work so far.
    ///
    /// # Errors
    /// [`Error::Driver`] where none can be made.
    #[cfg(test)]
    pub(crate) fn event(&self) -> Result<Event> {
        let event = Event::new(&self.stream, true)?;
        event.record();
        Ok(event)
    }

    /// Zeroed host memory that the device can read and write by itself.
    ///
    /// # Errors
    /// [`Error::Driver`] where there is none.
    #[cfg(test)]
    pub(crate) fn pinned(&self, bytes: usize) -> Result<PinnedBuffer> {
        PinnedBuffer::new(&self.stream, bytes)
    }

    /// Copies to the device without waiting; allowed in a capture, whose replays read the buffer again.
    #[cfg(test)]
    pub(crate) fn upload_pinned(&self, source: &PinnedBuffer, address: u64) {
        let bytes = source.as_slice();
        // SAFETY: dropping the buffer waits for the stream; the caller owns as many bytes at the address.
        let status = unsafe {
            (self.stream.driver().cuMemcpyHtoDAsync_v2)(
                address,
                bytes.as_ptr().cast(),
                bytes.len(),
                self.stream.handle,
            )
        };
        self.stream.keep_status("copying to the device", status);
    }

    /// Copies from the device without waiting: read it after an event. Allowed in a capture.
    #[cfg(test)]
    pub(crate) fn download_pinned(&self, address: u64, target: &mut PinnedBuffer) {
        let bytes = target.as_mut_slice();
        // SAFETY: dropping the buffer waits for the stream; the caller owns as many bytes at the address.
        let status = unsafe {
            (self.stream.driver().cuMemcpyDtoHAsync_v2)(
                bytes.as_mut_ptr().cast(),
                address,
                bytes.len(),
                self.stream.handle,
            )
        };
        self.stream.keep_status("copying from the device", status);
    }

    /// Starts to record instead of running. What is recorded must come from this thread until [`Self::end_capture`];
    /// run it once before, so that modules are loaded and algorithms chosen.
    ///
    /// # Errors
    /// [`Error::Driver`] while another capture records, or where the driver refuses.
    pub(crate) fn begin_capture(&self) -> Result<()> {
        self.stream.failure()?;
        let call = "beginning a capture";
        let mut capture = lock(&self.capture);
        let memory =
            PrivateMemory::begin(&self.pool).ok_or_else(|| failed(call, "another one is recording"))?;
        graph::begin_recording(&self.stream)?;
        *capture = Some(memory);
        Ok(())
    }

    /// Stops to record and returns the work, none of which has run.
    ///
    /// # Errors
    /// [`Error::Driver`] with the first failure so far, or where nothing was being recorded.
    pub(crate) fn end_capture(&self) -> Result<Graph> {
        let memory = lock(&self.capture).take();
        let memory = memory.ok_or_else(|| failed("ending a capture", "none was begun"))?;
        let graph = Graph::end(&self.stream, memory);
        self.stream.failure()?;
        graph
    }

    /// Runs `work` between two events while a profile is taken.
    fn profiled(&self, name: impl Fn() -> String, work: impl Fn() -> Result<()>) -> Result<()> {
        let mut profile = lock(&self.profile);
        match profile.as_mut().filter(|_| !self.stream.capturing()) {
            None => {
                drop(profile);
                work()
            }
            Some(profile) => {
                let begin = Profile::begin(&self.stream)?;
                work()?;
                profile.end(name(), begin, &self.stream)
            }
        }
    }

    fn try_launch(&self, launch: &Launch<'_>) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let call = || format!("kernel `{}` of `{}`", launch.kernel, launch.module.name);
        let mut modules = lock(&self.modules);
        let function = modules.function(launch.module, launch.defines, launch.kernel, launch.shared_bytes)?;
        if let Some(expected) = &function.parameters {
            let given = launch.arguments.iter().map(Argument::bytes);
            if !given.clone().eq(expected.iter().copied()) {
                let given: Vec<usize> = given.collect();
                return Err(failed(&call(), format!("parameters of {given:?} bytes, it takes {expected:?}")));
            }
        }
        let mut pointers = [std::ptr::null_mut::<c_void>(); 64];
        if launch.arguments.len() > pointers.len() {
            return Err(failed(
                &call(),
                format!("{} parameters, at most 64 can be passed", launch.arguments.len()),
            ));
        }
        let maps = tensor_map::encode(&self.stream, launch.arguments)?;
        let mut next_map = maps.iter();
        for (pointer, argument) in pointers.iter_mut().zip(launch.arguments) {
            let map = if matches!(argument, Argument::TensorMap(_)) { next_map.next() } else { None };
            *pointer = map.map_or(argument.pointer(), |map| std::ptr::from_ref(map).cast()).cast_mut();
        }
        let ([x, y, z], [width, height, depth], shared) = (launch.grid, launch.block, launch.shared_bytes);
        let none = std::ptr::null_mut();
        // SAFETY: the function is loaded; number and sizes of its parameters were compared where the driver tells
        // them; the call copies them; the caller vouches for the addresses among them.
        let status = unsafe {
            (self.stream.driver().cuLaunchKernel)(
                function.handle,
                x,
                y,
                z,
                width,
                height,
                depth,
                shared,
                self.stream.handle,
                pointers.as_mut_ptr(),
                none,
            )
        };
        if status == SUCCESS { Ok(()) } else { self.stream.check(&call(), status) }
    }

    fn try_gemm(&self, gemm: &Gemm) -> Result<()> {
        if gemm.rows == 0 || gemm.columns == 0 {
            return Ok(());
        }
        if let Some((_, dtype)) = gemm.bias.filter(|bias| bias.1 != DType::F32 && bias.1 != gemm.out_dtype) {
            let reason = format!("a {dtype} bias of a {} output", gemm.out_dtype);
            return Err(Error::Unsupported { operation: "matrix product", device: "cuda", reason });
        }
        let fused = gemm.inner > 0 && gemm.bias.is_some_and(|bias| bias.1 == gemm.out_dtype);
        if gemm.inner == 0 {
            if !gemm.accumulate {
                self.clear_rows(gemm);
            }
        } else {
            self.with_products(|products| {
                products.multiply(gemm, &|bytes| self.allocate(bytes), &|address, bytes| {
                    self.free(address, bytes)
                })
            })?;
        }
        match gemm.bias.filter(|_| !fused) {
            Some((address, dtype)) => self.add_bias(gemm, address, dtype),
            None => Ok(()),
        }
    }

    /// The library, opened at its first use.
    fn with_products<T>(&self, work: impl FnOnce(&mut Products) -> Result<T>) -> Result<T> {
        let mut products = lock(&self.products);
        let opened = match products.take() {
            Some(opened) => opened,
            None => Products::new(&self.stream, self.cache.clone(), self.deterministic)?,
        };
        work(products.insert(opened))
    }

    fn probe_fp8(&self) -> std::result::Result<Fp8Scaling, String> {
        let (major, minor) = self.stream.device.capability;
        if (major, minor) < (8, 9) {
            let name = &self.stream.device.name;
            return Err(format!("8-bit floats need compute capability 8.9, {name} has {major}.{minor}"));
        }
        let probed = self.with_products(|products| Ok(products.fp8_scaling()));
        probed.map_err(|error| error.to_string())?
    }

    fn clear_rows(&self, gemm: &Gemm) {
        let element = gemm.out_dtype.bytes();
        // SAFETY: the caller owns the output's rows.
        let status = unsafe {
            (self.stream.driver().cuMemsetD2D8Async)(
                gemm.out.address,
                gemm.out.pitch * element,
                0,
                gemm.columns * element,
                gemm.rows,
                self.stream.handle,
            )
        };
        self.stream.keep_status("clearing rows", status);
    }

    fn add_bias(&self, gemm: &Gemm, address: u64, bias: DType) -> Result<()> {
        let kind = |dtype: DType| match dtype {
            DType::Bf16 => "1",
            DType::F16 => "2",
            _ => "0",
        };
        self.try_launch(&Launch {
            module: &BIAS,
            defines: &[("OUT_TYPE", kind(gemm.out_dtype)), ("BIAS_TYPE", kind(bias))],
            kernel: "add_bias",
            grid: [(gemm.columns.div_ceil(256)) as u32, gemm.rows.min(65_535) as u32, 1],
            block: [256, 1, 1],
            shared_bytes: 0,
            arguments: &[
                Argument::Address(gemm.out.address),
                Argument::Address(address),
                Argument::U64(gemm.rows as u64),
                Argument::U64(gemm.columns as u64),
                Argument::U64(gemm.out.pitch as u64),
            ],
        })
    }
}

/// A product by sizes, for profiles.
fn product_name(gemm: &Gemm) -> String {
    let side = |matrix: &super::runtime::Matrix| if matrix.transposed { 'T' } else { 'N' };
    let more = if gemm.accumulate { " +=" } else { "" };
    format!(
        "product {} x {} x {} {}{} {} -> {}{more}",
        gemm.rows,
        gemm.columns,
        gemm.inner,
        side(&gemm.left),
        side(&gemm.right),
        gemm.operands,
        gemm.out_dtype
    )
}

impl Argument {
    fn bytes(&self) -> usize {
        match self {
            Self::Address(_) | Self::U64(_) => 8,
            Self::U32(_) | Self::F32(_) => 4,
            Self::TensorMap(_) => size_of::<EncodedMap>(),
            Self::Words(words) => size_of_val(words),
        }
    }

    fn pointer(&self) -> *const c_void {
        match self {
            Self::Address(value) | Self::U64(value) => std::ptr::from_ref(value).cast(),
            Self::U32(value) => std::ptr::from_ref(value).cast(),
            Self::F32(value) => std::ptr::from_ref(value).cast(),
            Self::Words(words) => words.as_ptr().cast(),
            // Only the driver knows its value.
            Self::TensorMap(_) => std::ptr::null(),
        }
    }
}

impl Runtime for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn description(&self) -> &str {
        &self.stream.device.name
    }

    fn has_bf16(&self) -> bool {
        self.stream.device.capability >= (8, 0)
    }

    fn facts(&self) -> DeviceFacts {
        let device = &self.stream.device;
        DeviceFacts {
            capability: device.capability,
            has_paired_products: device.capability >= (8, 0),
            multiprocessors: device.multiprocessors,
            shared_bytes_per_block: device.shared_bytes_per_block,
            deterministic: self.deterministic,
        }
    }

    fn memory(&self) -> Result<(usize, usize)> {
        self.stream.memory()
    }

    fn allocate(&self, bytes: usize) -> Option<u64> {
        lock(&self.pool).allocate(bytes)
    }

    fn free(&self, address: u64, bytes: usize) {
        if !lock(&self.pool).free(address) {
            let reason = format!("{bytes} bytes at {address:#x} are not allocated");
            self.stream.keep(Err(failed("freeing memory", reason)));
        }
    }

    fn upload(&self, bytes: &[u8], address: u64) {
        if self.stream.capturing() {
            let reason = "a replay would read the source again: use a pinned buffer";
            self.stream.keep(Err(failed("copying to the device in a capture", reason)));
            return;
        }
        let result = lock(&self.staging).upload(bytes, address);
        self.stream.keep(result);
    }

    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        if self.stream.capturing() {
            return Err(failed("copying from the device in a capture", "nothing has run yet"));
        }
        let result = lock(&self.staging).download(address, bytes);
        self.stream.keep(result);
        self.stream.failure()
    }

    fn fp8(&self) -> std::result::Result<Fp8Scaling, String> {
        self.fp8.get_or_init(|| self.probe_fp8()).clone()
    }

    fn scaled_gemm(&self, gemm: &ScaledGemm) -> Result<()> {
        if gemm.rows == 0 || gemm.columns == 0 {
            return Ok(());
        }
        let name = || {
            format!("product {} x {} x {} e4m3 -> {}", gemm.rows, gemm.columns, gemm.inner, gemm.out_dtype)
        };
        self.profiled(name, || {
            self.with_products(|products| {
                products.multiply_fp8(gemm, &|bytes| self.allocate(bytes), &|address, bytes| {
                    self.free(address, bytes)
                })
            })
        })
    }

    fn begin_recording(&self) -> Result<bool> {
        self.begin_capture().map(|()| true)
    }

    fn end_recording(&self) -> Result<Box<dyn Replay>> {
        Ok(Box::new(self.end_capture()?))
    }

    fn fail(&self, call: &'static str, reason: &str) {
        self.stream.keep(Err(failed(call, reason)));
    }

    fn copy(&self, source: u64, target: u64, bytes: usize) {
        if bytes == 0 {
            return;
        }
        // SAFETY: the caller owns both ranges.
        let status =
            unsafe { (self.stream.driver().cuMemcpyDtoDAsync_v2)(target, source, bytes, self.stream.handle) };
        self.stream.keep_status("copying on the device", status);
    }

    fn copy_rows(&self, source: (u64, usize), target: (u64, usize), row_bytes: usize, rows: usize) {
        if row_bytes == 0 || rows == 0 {
            return;
        }
        if (source.1 == row_bytes && target.1 == row_bytes) || rows == 1 {
            return self.copy(source.0, target.0, row_bytes * rows);
        }
        let copy = CopyRows {
            source_x_bytes: 0,
            source_y: 0,
            source_kind: MEMORY_DEVICE,
            source_host: std::ptr::null(),
            source_device: source.0,
            source_array: Handle::NULL,
            source_pitch: source.1,
            target_x_bytes: 0,
            target_y: 0,
            target_kind: MEMORY_DEVICE,
            target_host: std::ptr::null_mut(),
            target_device: target.0,
            target_array: Handle::NULL,
            target_pitch: target.1,
            row_bytes,
            rows,
        };
        // SAFETY: the call reads the description; the caller owns both sets of rows.
        let status =
            unsafe { (self.stream.driver().cuMemcpy2DAsync_v2)(&raw const copy, self.stream.handle) };
        self.stream.keep_status("copying rows on the device", status);
    }

    fn can_put_aside(&self) -> bool {
        true
    }

    fn host_copy(&self, bytes: usize) -> Result<Box<dyn HostCopy>> {
        let mut side = lock(&self.side);
        let side = match &mut *side {
            Some(side) => side,
            none => none.insert(Arc::new(Side::open(&self.stream)?)),
        };
        Ok(Box::new(side.copy(bytes)?))
    }

    fn fill(&self, address: u64, byte: u8, bytes: usize) {
        if bytes == 0 {
            return;
        }
        // SAFETY: the caller owns the range.
        let status =
            unsafe { (self.stream.driver().cuMemsetD8Async)(address, byte, bytes, self.stream.handle) };
        self.stream.keep_status("filling memory", status);
    }

    fn launch(&self, launch: &Launch<'_>) {
        let result = self.profiled(|| launch.kernel.to_owned(), || self.try_launch(launch));
        self.stream.keep(result);
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        self.profiled(|| product_name(gemm), || self.try_gemm(gemm))
    }

    fn start_profile(&self) {
        *lock(&self.profile) = Some(Profile::new());
    }

    fn end_profile(&self) -> Result<Vec<KernelTime>> {
        lock(&self.profile).take().map_or(Ok(Vec::new()), Profile::finish)
    }

    fn synchronize(&self) -> Result<()> {
        self.stream.synchronize()
    }
}

impl Replay for Graph {
    fn replay(&self) {
        self.launch();
    }

    fn operations(&self) -> usize {
        self.nodes()
    }
}
