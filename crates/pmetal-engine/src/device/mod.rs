//! A device is a set of kernels and the memory they work on.

pub mod cpu;
mod delta;
pub(crate) mod experts;
mod fp8;
pub(crate) mod gpu;
mod heads;
mod mask;
mod training;

use std::sync::Arc;

use crate::DType;
use crate::error::{Error, Result};
use crate::memory::MemoryTracker;
use crate::ops::{Cursor, SampleOptions};
use crate::random::RandomKey;
use crate::tensor::{Memory, Tensor};

pub use cpu::attention::{AttentionParameters, Segment};
pub use cpu::gemm::{Arithmetic, SimdLevel};
pub use delta::{DeltaGradients, DeltaInputs, DeltaKernels, Documents};
pub(crate) use delta::{DeltaSizes, SQUARES_EPSILON};
pub use experts::{
    BalanceSlope, ExpertFinish, ExpertKernels, Gate, Groups, MOST_CHOICES, MOST_EXPERTS, PairedGate, Router,
    RoutingPlan, RowTiles,
};
pub use fp8::{Fp8Kernels, ScaledRows};
pub(crate) use fp8::{GradientCodes, e4m3_value};
pub use gpu::cuda::{CudaDevice, CudaLibrary, cuda_devices, cuda_libraries};
pub use heads::{HeadCopy, HeadRows};
pub use mask::{AttentionMask, KeyChoice, MaskKind};
pub use training::{AdamWControl, AdamWEntry, AdamWParameters, CrossEntropyParameters, Sum};

impl Arithmetic {
    /// What goes with activations of a type.
    pub(crate) fn of(dtype: DType) -> Self {
        match dtype {
            DType::Bf16 => Self::Bf16,
            _ => Self::F32,
        }
    }
}

/// A handle to a device; clones share its memory counters.
#[derive(Clone)]
pub struct Device(Arc<DeviceState>);

struct DeviceState {
    kernels: Box<dyn Kernels>,
    memory: MemoryTracker,
    store: Store,
}

/// Where a device's tensors are.
enum Store {
    Host(cpu::pool::Pool),
    Remote(Arc<dyn gpu::Runtime>),
}

impl Device {
    /// The processor that the program runs on, with counters of its own.
    pub fn cpu() -> Self {
        Self(Arc::new(DeviceState {
            kernels: Box::new(cpu::Cpu),
            memory: MemoryTracker::default(),
            store: Store::Host(cpu::pool::Pool::default()),
        }))
    }

    /// An NVIDIA GPU, by its number from 0.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] that names each library missing and how to get it; [`crate::Error::Driver`] where
    /// the driver fails.
    pub fn cuda(ordinal: usize, deterministic: bool) -> Result<Self> {
        let environment = gpu::cuda::CudaOptions::from_environment();
        let options = gpu::cuda::CudaOptions { ordinal, deterministic, ..environment };
        Ok(Self::gpu(Arc::new(gpu::cuda::Cuda::open(&options)?)))
    }

    /// A device that runs the portable GPU kernels on the host, in an order of threads that the seed decides, for tests;
    /// `None` where there is no C++ compiler to build them with.
    #[cfg(any(test, feature = "emulator"))]
    pub fn emulator(seed: u64) -> Option<Self> {
        use gpu::emulator::{Emulator, has_compiler};
        has_compiler().then(|| Self::gpu(Arc::new(Emulator::new(seed))))
    }

    /// A GPU behind its driver.
    pub(crate) fn gpu(runtime: Arc<dyn gpu::Runtime>) -> Self {
        Self(Arc::new(DeviceState {
            kernels: Box::new(gpu::Gpu::new(Arc::clone(&runtime))),
            memory: MemoryTracker::default(),
            store: Store::Remote(runtime),
        }))
    }

    /// The kernel set.
    pub fn kernels(&self) -> &dyn Kernels {
        self.0.kernels.as_ref()
    }

    /// The memory counters.
    pub fn memory(&self) -> &MemoryTracker {
        &self.0.memory
    }

    /// A short name such as `cpu`.
    pub fn name(&self) -> &'static str {
        self.0.kernels.name()
    }

    /// What the device is called, such as `NVIDIA H200`.
    pub fn description(&self) -> &str {
        match &self.0.store {
            Store::Host(_) => "the processor",
            Store::Remote(runtime) => runtime.description(),
        }
    }

    /// Times every kernel that `work` launches one by one, and returns sums by name, the longest first; nothing for a CPU.
    /// Events around kernels add some microseconds to each.
    ///
    /// # Errors
    /// What `work` returns; [`crate::Error::Driver`] when the device failed.
    pub fn profile<T, E: From<crate::Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<(T, Vec<KernelTime>), E> {
        let Store::Remote(runtime) = &self.0.store else { return Ok((work()?, Vec::new())) };
        runtime.start_profile();
        let outcome = work();
        let times = runtime.end_profile();
        Ok((outcome?, times?))
    }

    /// Free and total bytes of a device's own memory, over all processes; `None` for a CPU.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] where the driver does not tell.
    pub fn free_and_total_bytes(&self) -> Result<Option<(usize, usize)>> {
        match &self.0.store {
            Store::Host(_) => Ok(None),
            Store::Remote(runtime) => runtime.memory().map(Some),
        }
    }

    /// Whether it multiplies bf16 at its full rate.
    pub fn has_bf16(&self) -> bool {
        match &self.0.store {
            Store::Host(_) => SimdLevel::current().prefers_bf16(),
            Store::Remote(runtime) => runtime.has_bf16(),
        }
    }

    /// Records what `work` asks of the device instead of doing it; `None` where the device cannot. Everything that it
    /// reads must have been computed before, and must keep its memory while the recording is replayed: run the work once
    /// without recording first. What it allocates belongs to the recording.
    ///
    /// # Errors
    /// What `work` returns; [`crate::Error::Driver`] when it asked for something that cannot be recorded, such as a copy
    /// from or to the host.
    pub fn record<T, E: From<crate::Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<Option<(Recording, T)>, E> {
        let Store::Remote(runtime) = &self.0.store else { return Ok(None) };
        if !runtime.begin_recording()? {
            return Ok(None);
        }
        let outcome = work();
        let replay = runtime.end_recording();
        let outcome = outcome?;
        Ok(Some((Recording(replay?), outcome)))
    }

    /// Whether tensors can wait in the host's memory, copied there and back beside other work.
    pub fn can_put_aside(&self) -> bool {
        match &self.0.store {
            Store::Host(_) => false,
            Store::Remote(runtime) => runtime.can_put_aside(),
        }
    }

    /// Why the device cannot multiply weights of eight bits (e4m3); `None` where it can.
    pub fn fp8_refusal(&self) -> Option<String> {
        match self.kernels().fp8() {
            Some(fp8) => fp8.refusal(),
            None => Some(format!("{} has no products of 8-bit floats", self.description())),
        }
    }

    /// Whether tensors are in the program's own memory.
    pub fn is_host(&self) -> bool {
        matches!(self.0.store, Store::Host(_))
    }

    /// Waits until everything that was asked of the device is done.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] when any of it failed.
    pub fn synchronize(&self) -> Result<()> {
        match &self.0.store {
            Store::Host(_) => Ok(()),
            Store::Remote(runtime) => runtime.synchronize(),
        }
    }

    pub(crate) fn remote(&self) -> &dyn gpu::Runtime {
        match &self.0.store {
            Store::Remote(runtime) => runtime.as_ref(),
            Store::Host(_) => unreachable!("invariant: host tensors are read and written in place"),
        }
    }

    pub(crate) fn allocate(&self, bytes: usize) -> Option<Memory> {
        match &self.0.store {
            Store::Host(pool) => pool.take(bytes).map(Memory::Host),
            Store::Remote(runtime) => {
                runtime.allocate(bytes).map(|address| Memory::Remote { address, bytes })
            }
        }
    }

    pub(crate) fn recycle(&self, memory: Memory) {
        match (&self.0.store, memory) {
            (Store::Host(pool), Memory::Host(bytes)) => pool.give(bytes),
            (Store::Remote(runtime), Memory::Remote { address, bytes }) => runtime.free(address, bytes),
            // What `Buffer::drop` leaves in the place of what it gives back.
            (_, Memory::Host(_)) | (Store::Host(_), Memory::Remote { .. }) => {}
        }
    }
}

/// The time of all launches of one kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelTime {
    /// The kernel, or a product with its sizes.
    pub name: String,
    /// How often it was launched.
    pub launches: usize,
    /// Their time together.
    pub seconds: f64,
}

/// Work of a device that can be repeated at once; see [`Device::record`].
pub struct Recording(Box<dyn gpu::runtime::Replay>);

impl Recording {
    /// Asks the device to do it once more, on the same memory.
    pub fn replay(&self) {
        self.0.replay();
    }

    /// How many operations it repeats.
    pub fn operations(&self) -> usize {
        self.0.operations()
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Device({})", self.name())
    }
}

/// One matrix of a product, optionally read transposed. Two-dimensional; leading dimensions are rows.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    /// The matrix as stored.
    pub tensor: &'a Tensor,
    /// Whether the product reads its transpose.
    pub transposed: bool,
}

impl<'a> Operand<'a> {
    /// The matrix as stored.
    pub fn plain(tensor: &'a Tensor) -> Self {
        Self { tensor, transposed: false }
    }

    /// The transpose of what is stored.
    pub fn transposed(tensor: &'a Tensor) -> Self {
        Self { tensor, transposed: true }
    }
}

/// What happens to a product before it is stored.
#[derive(Clone, Copy)]
pub struct Finish<'a> {
    /// Factor on the product, bias not included.
    pub scale: f32,
    /// Added to every row: f32 \[N\].
    pub bias: Option<&'a Tensor>,
    /// Whether to add to what the output holds instead of replacing it.
    pub accumulate: bool,
    /// Added to the result, in the output's shape and type; not together with `accumulate`.
    pub residual: Option<&'a Tensor>,
}

impl Finish<'_> {
    /// Store the product itself.
    pub const STORE: Self = Self { scale: 1.0, bias: None, accumulate: false, residual: None };
    /// Add the product to what the output holds.
    pub const ACCUMULATE: Self = Self { accumulate: true, ..Self::STORE };

    /// Store `scale` times the product.
    pub fn scaled(scale: f32) -> Self {
        Self { scale, ..Self::STORE }
    }
}

/// One gradient of a weight: `out [M, N] += scale * left^T right` with left \[T, M\] and right \[T, N\].
pub struct WeightGradient<'a> {
    /// The gradient of what the weight gave.
    pub left: &'a Tensor,
    /// What the weight was multiplied with.
    pub right: &'a Tensor,
    /// The sum, f32.
    pub out: &'a mut Tensor,
    /// Factor on the product.
    pub scale: f32,
}

/// The A \[S, D\] of adapters whose product with rows rides on the kernel that makes them.
#[derive(Debug, Clone)]
pub struct Riding {
    pub(crate) a: Tensor,
    /// Factor on the product.
    pub(crate) scale: f32,
}

impl Riding {
    /// The product by itself.
    ///
    /// # Errors
    /// As [`Kernels::matmul`].
    pub(crate) fn put_beside(&self, rows: &Tensor) -> Result<()> {
        let (mut spare, _) = rows.spare_columns().expect("invariant: these rows have columns to spare");
        let product = (Operand::plain(rows), Operand::transposed(&self.a));
        let arithmetic = Arithmetic::of(rows.dtype());
        rows.device().kernels().matmul(&[product], &mut spare, &Finish::scaled(self.scale), arithmetic)
    }
}

/// A part of a gradient \[T, D\] that is not in it yet: `scale * d a`.
#[derive(Debug, Clone)]
pub struct Share {
    /// \[T, S\].
    pub(crate) d: Tensor,
    pub(crate) riding: Riding,
}

impl Share {
    /// Adds it to the gradient.
    ///
    /// # Errors
    /// As [`Kernels::matmul`].
    pub(crate) fn add_to(&self, gradient: &mut Tensor) -> Result<()> {
        let (device, arithmetic) = (gradient.device().clone(), Arithmetic::of(self.d.dtype()));
        let finish = Finish { scale: self.riding.scale, ..Finish::ACCUMULATE };
        let product = (Operand::plain(&self.d), Operand::plain(&self.riding.a));
        device.kernels().matmul(&[product], gradient, &finish, arithmetic)
    }
}

/// Kernels over rows on which products of adapters ride.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowKernel {
    /// RMSNorm.
    Norm,
    /// Gated products.
    Gated,
}

/// What a result is added to.
#[derive(Debug, Clone, Copy)]
pub enum Held<'a> {
    /// Nothing: it replaces what was there.
    Nothing,
    /// What is there already.
    Itself,
    /// Another tensor of its size, which stays as it is.
    Other(&'a Tensor),
}

/// How RMSNorm uses its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormWeight {
    /// Multiply by w.
    Plain,
    /// Multiply by 1 + w (the Gemma families).
    PlusOne,
}

/// Constants of a layer norm; weight and bias are \[D\], or \[H, E\] for rows \[T, H, E\].
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// Multiplied with the normed row.
    pub weight: Option<&'a Tensor>,
    /// Added to that.
    pub bias: Option<&'a Tensor>,
    /// Added to the variance.
    pub epsilon: f32,
}

/// What is applied to the gate of a gated feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateActivation {
    /// x * sigmoid(x).
    Silu,
    /// x times the share of the normal distribution that is below x (Hendrycks and Gimpel, arXiv 1606.08415).
    Gelu,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// sigmoid(x).
    Sigmoid,
}

/// Which elements a rotary embedding pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// Element i with element i + width/2.
    Halves,
    /// Element 2i with element 2i + 1.
    Neighbours,
}

/// Which elements dropout keeps.
#[derive(Debug, Clone, Copy)]
pub struct DropoutMask<'a> {
    /// Share of the elements that is dropped.
    pub probability: f32,
    /// Decides, together with an element's index.
    pub key: RandomKey,
    /// Added to the key's step when the kernel runs, so that a recording can be replayed for other steps: u32 \[1\] on a
    /// device. CPUs record nothing and take the key as it is.
    pub steps_before: Option<&'a Tensor>,
}

impl DropoutMask<'_> {
    /// A mask of a step that is known.
    pub fn new(probability: f32, key: RandomKey) -> Self {
        Self { probability, key, steps_before: None }
    }
}

/// Rotary angles: cosines and sines f32 \[P, half\], and for each token, u32 \[T\], its row of these.
#[derive(Clone, Copy)]
pub struct RopeRows<'a> {
    /// Cosines.
    pub cosines: &'a Tensor,
    /// Sines.
    pub sines: &'a Tensor,
    /// Row of each token.
    pub rows: &'a Tensor,
    /// Which elements are rotated together.
    pub pairing: RopePairing,
}

/// The kernels of one device. Outputs are allocated by the caller; every element of an output is written
/// unless the method says that it accumulates. Shapes were checked by [`crate::ops`].
pub trait Kernels: Send + Sync {
    /// A short name such as `cpu`.
    fn name(&self) -> &'static str;

    /// `out = finish(sum of left_i right_i)`: products are concatenated along the inner dimension and done in one pass.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for an element type that the device cannot multiply.
    fn matmul(
        &self,
        products: &[(Operand<'_>, Operand<'_>)],
        out: &mut Tensor,
        finish: &Finish<'_>,
        arithmetic: Arithmetic,
    ) -> Result<()>;

    /// Adds to several gradients of weights; none of them is another's.
    ///
    /// # Errors
    /// As [`Self::matmul`].
    fn add_weight_gradients(&self, gradients: &mut [WeightGradient<'_>]) -> Result<()> {
        gradients.iter_mut().try_for_each(|gradient| {
            let product = (Operand::transposed(gradient.left), Operand::plain(gradient.right));
            let finish = Finish { scale: gradient.scale, ..Finish::ACCUMULATE };
            let arithmetic = Arithmetic::of(gradient.left.dtype());
            self.matmul(&[product], gradient.out, &finish, arithmetic)
        })
    }

    /// `out[t] = scale * table[ids[t]]`; ids were checked.
    fn embedding(&self, ids: &Tensor, table: &Tensor, scale: f32, out: &mut Tensor);

    /// `d_table[ids[t]] += scale * d_out[t]` in f32, in the order of t, but for tokens whose id is `skipped`.
    fn embedding_backward(
        &self,
        ids: &Tensor,
        d_out: &Tensor,
        scale: f32,
        skipped: Option<u32>,
        d_table: &mut Tensor,
    );

    /// Root mean square normalisation over the last dimension (Zhang and Sennrich, arXiv 1910.07467).
    fn rms_norm(&self, x: &Tensor, weight: Option<&Tensor>, kind: NormWeight, epsilon: f32, out: &mut Tensor);

    /// Gradient of [`Self::rms_norm`]: `d_x` becomes it plus what [`Held`] says; it is added to `d_weight` (f32).
    #[allow(clippy::too_many_arguments)]
    fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        kind: NormWeight,
        epsilon: f32,
        d_out: &Tensor,
        d_x: Option<(&mut Tensor, Held<'_>)>,
        d_weight: Option<&mut Tensor>,
    );

    /// Normalisation to mean 0 and variance 1 over the last dimension (Ba, Kiros and Hinton, arXiv 1607.06450).
    fn layer_norm(&self, x: &Tensor, norm: &LayerNorm<'_>, out: &mut Tensor);

    /// Gradient of [`Self::layer_norm`]: `d_x` becomes it plus what [`Held`] says; those of weight and bias, in this
    /// order, are added to `d_weights` (f32).
    fn layer_norm_backward(
        &self,
        x: &Tensor,
        norm: &LayerNorm<'_>,
        d_out: &Tensor,
        d_x: Option<(&mut Tensor, Held<'_>)>,
        d_weights: [Option<&mut Tensor>; 2],
    );

    /// Whether `x a^T` rides on the kernel that makes x, and its gradient on that kernel's backward pass.
    fn rides(&self, _on: RowKernel, _x: &Tensor, _riding: &Riding) -> bool {
        false
    }

    /// [`Self::rms_norm`] with `scale * out a^T` in the columns that `out` has to spare; false, with nothing done, where
    /// there is no kernel for these.
    fn rms_norm_riding(
        &self,
        _x: &Tensor,
        _weight: Option<&Tensor>,
        _norm: (NormWeight, f32),
        _riding: &Riding,
        _out: &mut Tensor,
    ) -> bool {
        false
    }

    /// [`Self::rms_norm_backward`] for `d_x`, `share` being a part of `d_out`; false, with nothing done, where there is no
    /// kernel for these.
    fn rms_norm_backward_riding(
        &self,
        _x: &Tensor,
        _weight: Option<&Tensor>,
        _norm: (NormWeight, f32),
        _d_out: (&Tensor, &Share),
        _d_x: (&mut Tensor, Held<'_>),
    ) -> bool {
        false
    }

    /// Rotates the first `2 * cosines.columns()` elements of every head in place; `inverse` turns back.
    fn rope(&self, x: &mut Tensor, angles: &RopeRows<'_>, inverse: bool);

    /// Attention with a softmax that is never stored; see [`AttentionParameters`].
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        parameters: &AttentionParameters,
        mask: &AttentionMask,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        sinks: Option<&Tensor>,
        out: &mut Tensor,
        log_sum_exp: &mut Tensor,
    );

    /// Sets the bits in `bits`, u32 \[T, ceil(Tk / 32)\], of the `count` keys that each query scores highest, all others to
    /// zero: q \[T, H, E\], k \[Tk, E\] and weights f32 \[T, H\]; see [`crate::ops::choose_keys`].
    ///
    /// # Errors
    /// Out of memory.
    fn choose_keys(
        &self,
        mask: &AttentionMask,
        inputs: [&Tensor; 3],
        count: usize,
        bits: &mut Tensor,
    ) -> Result<()>;

    /// Gradients of [`Self::attention`]; overwrites `d_q`, `d_k`, `d_v`, adds to `d_sinks`.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        parameters: &AttentionParameters,
        mask: &AttentionMask,
        inputs: [&Tensor; 3],
        sinks: Option<&Tensor>,
        out: &Tensor,
        log_sum_exp: &Tensor,
        d_out: &Tensor,
        d_inputs: [&mut Tensor; 3],
        d_sinks: Option<&mut Tensor>,
    );

    /// `out = activation(gate) * up`.
    fn gated(&self, activation: GateActivation, gate: &Tensor, up: &Tensor, out: &mut Tensor);

    /// Gradients of [`Self::gated`].
    fn gated_backward(
        &self,
        activation: GateActivation,
        gate: &Tensor,
        up: &Tensor,
        d_out: &Tensor,
        d_gate: &mut Tensor,
        d_up: &mut Tensor,
    );

    /// [`Self::gated`] with `scale * out a^T` in the columns that `out` has to spare; false, with nothing done, where there
    /// is no kernel for these.
    fn gated_riding(
        &self,
        _activation: GateActivation,
        _gate_and_up: [&Tensor; 2],
        _riding: &Riding,
        _out: &mut Tensor,
    ) -> bool {
        false
    }

    /// [`Self::gated_backward_in_place`], `share` being a part of `d_out`.
    fn gated_backward_riding(
        &self,
        _activation: GateActivation,
        _gate_and_up: [&mut Tensor; 2],
        _d_out: (&Tensor, &Share),
    ) -> bool {
        false
    }

    /// [`Self::gated_backward`] that leaves the gradients where gate and up are; false, with nothing done, where the
    /// device has no such kernel.
    fn gated_backward_in_place(
        &self,
        _activation: GateActivation,
        _gate: &mut Tensor,
        _up: &mut Tensor,
        _d_out: &Tensor,
    ) -> bool {
        false
    }

    /// Adds the sum over rows of `x` to `out`, f32 \[columns\].
    fn sum_rows(&self, x: &Tensor, out: &mut Tensor);

    /// `x *= factor`, f32.
    fn scale(&self, x: &mut Tensor, factor: f32);

    /// `target += source`, element types may differ.
    fn add_assign(&self, target: &mut Tensor, source: &Tensor);

    /// `y = x + factor * y`, of one shape and type.
    fn add_scaled(&self, x: &Tensor, factor: f32, y: &mut Tensor);

    /// `out = factor * x`, of one shape and type.
    fn scaled(&self, x: &Tensor, factor: f32, out: &mut Tensor);

    /// `x = cap * tanh(x / cap)`.
    fn softcap(&self, x: &mut Tensor, cap: f32);

    /// `target = source`, converting the element type.
    fn convert(&self, source: &Tensor, target: &mut Tensor);

    /// Inverted dropout: `out = keep ? x / (1 - probability) : 0`, plus what it holds when `accumulate`.
    /// The mask is a pure function of the key and the element's index.
    fn dropout(&self, x: &Tensor, mask: &DropoutMask<'_>, out: &mut Tensor, accumulate: bool);

    /// Overwrites element i by `bound * (2 u - 1)` with the key's i-th uniform number u.
    fn uniform(&self, key: RandomKey, bound: f32, out: &mut Tensor);

    /// Copies rows `indices`, u32, of `x` to `out`.
    fn gather_rows(&self, x: &Tensor, indices: &Tensor, out: &mut Tensor);

    /// Writes row i of `x` to row `indices[i]` of `out`; other rows stay.
    fn scatter_rows(&self, x: &Tensor, indices: &Tensor, out: &mut Tensor);

    /// Copies columns of heads of `source`, whose rows are tokens, to those of `target`; other columns stay.
    fn copy_heads(&self, source: &Tensor, target: &mut Tensor, copy: &HeadCopy);

    /// `target` \[T, 1, width\] = the sum over heads, in their order and in f32, of columns `first ..` of `source` \[T, H, E\].
    fn sum_heads(&self, source: &Tensor, first: usize, target: &mut Tensor);

    /// Each head of x \[T, H, K\] times rows of its own, or of x \[T, H, N\] times their columns; written to `out`, or added
    /// to it.
    ///
    /// # Errors
    /// Out of memory.
    fn head_products(&self, x: &Tensor, rows: &HeadRows<'_>, out: &mut Tensor, adds: bool) -> Result<()>;

    /// Turns f32 logits \[t, V\] into their gradient, in their memory, and adds the losses, in nats, to `sum`. Labels are
    /// i32 \[t\]; rows with -100 get no gradient and add nothing. `gradient` is the type that products will read; a
    /// device may ignore it.
    ///
    /// # Errors
    /// Out of memory.
    fn cross_entropy(
        &self,
        logits: Tensor,
        labels: &Tensor,
        parameters: &CrossEntropyParameters,
        sum: &mut Sum,
        gradient: DType,
    ) -> Result<Tensor>;

    /// Kernels of linear-attention layers.
    fn delta(&self) -> &dyn DeltaKernels;

    /// Products of weights of eight bits, where the device has them.
    fn fp8(&self) -> Option<&dyn Fp8Kernels> {
        None
    }

    /// Kernels for mixtures of experts.
    fn experts(&self) -> &dyn ExpertKernels;

    /// Adds the squares of all elements of f32 tensors to `sum`.
    fn sum_of_squares(&self, tensors: &[&Tensor], sum: &mut Sum);

    /// Chooses a token by logits f32 \[1, V\] as [`crate::ops::choose`] does and moves the cursor on.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a device without such kernels; out of memory.
    fn sample(&self, _logits: &Tensor, _options: &SampleOptions, _cursor: &Cursor) -> Result<()> {
        let reason = "tokens are chosen by the host".to_owned();
        Err(Error::Unsupported { operation: "sample", device: self.name(), reason })
    }

    /// One AdamW step. `squares` is the sum of squares of all gradients, before any factor; where it is not finite,
    /// nothing changes. `None` = no clipping.
    fn adamw(&self, entries: &mut [AdamWEntry<'_>], control: &AdamWControl, squares: Option<&Sum>);
}
