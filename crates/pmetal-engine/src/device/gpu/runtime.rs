//! What the GPU kernels need of a driver.

use crate::DType;
use crate::device::KernelTime;
use crate::error::Result;

/// The driver of one device. Everything is ordered on one stream. The first failure of asynchronous work is kept,
/// with the name of the call or kernel, and returned by [`Self::synchronize`] and [`Self::download`] ever after,
/// because nothing computed behind it can be trusted.
pub(crate) trait Runtime: Send + Sync {
    /// A short name such as `cuda`.
    fn name(&self) -> &'static str;

    /// What the device is called, such as `NVIDIA H200`.
    fn description(&self) -> &str;

    /// Whether its matrix units multiply bf16.
    fn has_bf16(&self) -> bool;

    /// What decides which kernels it runs.
    fn facts(&self) -> DeviceFacts;

    /// Free and total bytes of the device, over all processes.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] where the driver does not tell.
    fn memory(&self) -> Result<(usize, usize)>;

    /// Memory at an address that 256 divides, contents undefined; `None` when the device has no more.
    fn allocate(&self, bytes: usize) -> Option<u64>;

    /// Takes memory of [`Self::allocate`] back; work that was enqueued before may still use it.
    fn free(&self, address: u64, bytes: usize);

    /// Copies to the device; the source may be reused on return. Refused (and kept as a failure) while a capture
    /// is recording, because a replay would read the source again.
    fn upload(&self, bytes: &[u8], address: u64);

    /// Copies from the device after all work before it, and waits.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] with the first failure so far.
    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()>;

    /// Copies within the device; the ranges do not overlap.
    fn copy(&self, source: u64, target: u64, bytes: usize);

    /// Copies `rows` rows; source and target are an address and a pitch in bytes.
    fn copy_rows(&self, source: (u64, usize), target: (u64, usize), row_bytes: usize, rows: usize);

    /// Whether [`Self::host_copy`] gives memory.
    fn can_put_aside(&self) -> bool {
        false
    }

    /// Host memory of so many bytes that the device copies to and from beside its other work.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] where there is none.
    fn host_copy(&self, bytes: usize) -> Result<Box<dyn HostCopy>>;

    /// Sets every byte.
    fn fill(&self, address: u64, byte: u8, bytes: usize);

    /// Enqueues a kernel; the module is compiled at its first use. A grid without blocks is no work.
    fn launch(&self, launch: &Launch<'_>);

    /// Enqueues a matrix product.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for a combination of types that the library does not multiply.
    fn gemm(&self, gemm: &Gemm) -> Result<()>;

    /// How products of e4m3 are done, or why there are none.
    fn fp8(&self) -> std::result::Result<Fp8Scaling, String>;

    /// Enqueues a product of e4m3.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] where the library has no kernel for it.
    fn scaled_gemm(&self, gemm: &ScaledGemm) -> Result<()>;

    /// Starts to record instead of running; false where the device cannot.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] while another recording goes on, or where the driver refuses.
    fn begin_recording(&self) -> Result<bool>;

    /// Stops to record.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] with the first failure so far.
    fn end_recording(&self) -> Result<Box<dyn Replay>>;

    /// Starts to time every kernel.
    fn start_profile(&self);

    /// Stops to time kernels, waits, and returns sums by name, the longest first.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] with the first failure so far.
    fn end_profile(&self) -> Result<Vec<KernelTime>>;

    /// Keeps a failure that happened on the way to a launch, as one of the device's own.
    fn fail(&self, call: &'static str, reason: &str);

    /// Waits for all work.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] with the first failure so far.
    fn synchronize(&self) -> Result<()>;
}

/// Host memory that a device copies to and from on a stream of its own. Dropping it is a [`Self::join`]. Allowed while work
/// is recorded; a replay copies to and from the same memory.
pub(crate) trait HostCopy {
    /// Starts to copy from the device, behind all work so far. The source must stay as it is until [`Self::join`].
    fn store(&mut self, address: u64);

    /// Starts to copy to the device, behind all work so far. Nobody may use the target until [`Self::join`].
    fn fetch(&mut self, address: u64);

    /// Lets the device's work from here on wait for the copy that was started.
    fn join(&mut self);
}

/// Recorded work.
pub(crate) trait Replay {
    /// Enqueues it once more.
    fn replay(&self);

    /// How many operations it repeats.
    fn operations(&self) -> usize;
}

/// What the choice of kernels depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeviceFacts {
    /// NVIDIA's compute capability, major and minor; zeros for devices of others.
    pub(crate) capability: (u32, u32),
    /// Whether it has units for products of 16 bits that kernels in the portable words can use.
    pub(crate) has_paired_products: bool,
    /// How many blocks run at one time where each needs a multiprocessor to itself.
    pub(crate) multiprocessors: usize,
    /// Shared memory that one block can have.
    pub(crate) shared_bytes_per_block: usize,
    /// Whether a second run must compute the same bits.
    pub(crate) deterministic: bool,
}

/// Kernel text, compiled once per set of macros.
#[derive(Debug)]
pub(crate) struct ModuleText {
    /// Unique among modules; errors and caches name it.
    pub(crate) name: &'static str,
    /// Concatenated before compiling.
    pub(crate) texts: &'static [&'static str],
}

/// One kernel launch.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    /// Where the kernel is.
    pub(crate) module: &'static ModuleText,
    /// Macros to compile the module with, such as its element type or head width.
    pub(crate) defines: &'a [(&'a str, &'a str)],
    /// The kernel's name, declared `extern "C"`.
    pub(crate) kernel: &'a str,
    /// Blocks.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) block: [u32; 3],
    /// Dynamic shared memory.
    pub(crate) shared_bytes: u32,
    /// The kernel's parameters, in order.
    pub(crate) arguments: &'a [Argument],
}

/// One parameter of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Argument {
    /// A pointer to device memory.
    Address(u64),
    /// `unsigned int`.
    U32(u32),
    /// `unsigned long long`.
    U64(u64),
    /// `float`.
    F32(f32),
    /// A description for the copy engine, 128 bytes by value.
    TensorMap(TensorMap),
    /// A struct of 64 bytes by value.
    Words([u64; 8]),
}

/// A matrix of heads \[rows, heads, width\] that the copy engine brings in by boxes of 64 columns of one head, swizzled by
/// 128 bytes; what lies outside comes as zeros.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TensorMap {
    /// Its first element; 16 divides it.
    pub(crate) address: u64,
    /// Element type.
    pub(crate) dtype: DType,
    /// Columns of a head; a multiple of 16 bytes.
    pub(crate) width: usize,
    /// Heads of a row.
    pub(crate) heads: usize,
    /// Elements from one head to the next; a multiple of 16 bytes.
    pub(crate) head_pitch: usize,
    /// Rows.
    pub(crate) rows: usize,
    /// Elements from one row to the next; a multiple of 16 bytes.
    pub(crate) pitch: usize,
    /// Rows of a box, at most 256.
    pub(crate) box_rows: usize,
}

/// A row-major matrix in device memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix {
    /// Its first element.
    pub(crate) address: u64,
    /// Elements from one stored row to the next.
    pub(crate) pitch: usize,
    /// Whether the product reads its transpose.
    pub(crate) transposed: bool,
}

/// `out [M, N] = scale * op(left) [M, K] op(right) [K, N] (+ bias [N]) (+ out)`, sums in f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gemm {
    /// M.
    pub(crate) rows: usize,
    /// N.
    pub(crate) columns: usize,
    /// K.
    pub(crate) inner: usize,
    /// Stored \[M, K\], or \[K, M\] when transposed.
    pub(crate) left: Matrix,
    /// Stored \[K, N\], or \[N, K\] when transposed.
    pub(crate) right: Matrix,
    /// Element type of both operands.
    pub(crate) operands: DType,
    /// Never transposed.
    pub(crate) out: Matrix,
    /// f32, or the type of 16-bit operands.
    pub(crate) out_dtype: DType,
    /// Address and type (f32 or that of the output) of a bias that `scale` does not touch.
    pub(crate) bias: Option<(u64, DType)>,
    /// Factor on the product.
    pub(crate) scale: f32,
    /// Whether to add to what the output holds.
    pub(crate) accumulate: bool,
    /// Address of a matrix with the output's type and pitch that is added instead of what the output holds.
    pub(crate) addend: Option<u64>,
    /// Whether f32 operands may be rounded to 11 bits; 16-bit ones are multiplied exactly either way.
    pub(crate) tf32: bool,
}

/// What a library's products of e4m3 do with scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fp8Scaling {
    /// Each row of both operands has its scale in the product.
    Rows,
    /// As [`Self::Rows`], and the product adds a matrix.
    RowsAndAddend,
    /// None: the result is scaled afterwards.
    Afterwards,
}

/// `out [M, N] = diag(left scales) left [M, K] (right [N, K])^T diag(right scales)`, e4m3, sums in f32. K and N are
/// multiples of 16, rows follow each other without a gap, and 16 divides every address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScaledGemm {
    /// M.
    pub(crate) rows: usize,
    /// N.
    pub(crate) columns: usize,
    /// K.
    pub(crate) inner: usize,
    /// Address of the left operand.
    pub(crate) left: u64,
    /// Address of the right operand.
    pub(crate) right: u64,
    /// Addresses of f32 \[M\] and f32 \[N\]; not with [`Fp8Scaling::Afterwards`].
    pub(crate) scales: Option<[u64; 2]>,
    /// Address of a matrix with the output's type and pitch that is added; with [`Fp8Scaling::RowsAndAddend`] alone.
    pub(crate) addend: Option<u64>,
    /// Where the result goes.
    pub(crate) out: Matrix,
    /// bf16 or f32.
    pub(crate) out_dtype: DType,
}
