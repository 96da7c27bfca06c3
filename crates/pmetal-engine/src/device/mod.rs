//! A device is a set of kernels and the memory they work on.

pub mod cpu;
pub(crate) mod gpu;

use std::sync::Arc;

use crate::error::Result;
use crate::memory::MemoryTracker;
use crate::random::RandomKey;
use crate::tensor::{AlignedBytes, Tensor};

pub use cpu::attention::{AttentionParameters, Segment};
pub use cpu::gemm::{Arithmetic, SimdLevel};
pub use gpu::cuda::{CudaDevice, CudaLibrary, cuda_devices, cuda_libraries};

/// A handle to a device; clones share its memory counters.
#[derive(Clone)]
pub struct Device(Arc<DeviceState>);

struct DeviceState {
    kernels: Box<dyn Kernels>,
    memory: MemoryTracker,
    pool: cpu::pool::Pool,
}

impl Device {
    /// The processor that the program runs on, with counters of its own.
    pub fn cpu() -> Self {
        Self(Arc::new(DeviceState {
            kernels: Box::new(cpu::Cpu),
            memory: MemoryTracker::default(),
            pool: cpu::pool::Pool::default(),
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

    pub(crate) fn allocate(&self, bytes: usize) -> Option<AlignedBytes> {
        self.0.pool.take(bytes)
    }

    pub(crate) fn recycle(&self, bytes: AlignedBytes) {
        self.0.pool.give(bytes);
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
}

impl Finish<'_> {
    /// Store the product itself.
    pub const STORE: Self = Self { scale: 1.0, bias: None, accumulate: false };
    /// Add the product to what the output holds.
    pub const ACCUMULATE: Self = Self { scale: 1.0, bias: None, accumulate: true };

    /// Store `scale` times the product.
    pub fn scaled(scale: f32) -> Self {
        Self { scale, bias: None, accumulate: false }
    }
}

/// How RMSNorm uses its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormWeight {
    /// Multiply by w.
    Plain,
    /// Multiply by 1 + w (the Gemma families).
    PlusOne,
}

/// What is applied to the gate of a gated feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateActivation {
    /// x * sigmoid(x).
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

/// Which elements a rotary embedding pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// Element i with element i + width/2.
    Halves,
    /// Element 2i with element 2i + 1.
    Neighbours,
}

/// Constants of a cross-entropy over logits.
#[derive(Debug, Clone, Copy)]
pub struct CrossEntropyParameters {
    /// Factor on the logits before anything else.
    pub logit_scale: f32,
    /// `cap * tanh(logit / cap)` after the scale.
    pub softcap: Option<f32>,
    /// Factor on the gradient, usually 1 / trained tokens of the optimizer step.
    pub gradient_scale: f32,
}

/// Constants of one AdamW step (Loshchilov and Hutter, arXiv 1711.05101).
#[derive(Debug, Clone, Copy)]
pub struct AdamWParameters {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u32,
    /// Factor on every gradient: clipping.
    pub gradient_scale: f32,
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

    /// Gradient of [`Self::rms_norm`]: `d_x` is added to what it holds when `accumulate`; `d_weight` (f32) always.
    #[allow(clippy::too_many_arguments)]
    fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        kind: NormWeight,
        epsilon: f32,
        d_out: &Tensor,
        d_x: Option<(&mut Tensor, bool)>,
        d_weight: Option<&mut Tensor>,
    );

    /// Rotates the first `2 * cosines.columns()` elements of every head in place; `inverse` turns back.
    fn rope(&self, x: &mut Tensor, cosines: &Tensor, sines: &Tensor, pairing: RopePairing, inverse: bool);

    /// Attention with a softmax that is never stored; see [`AttentionParameters`].
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        parameters: &AttentionParameters,
        segments: &[Segment],
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        sinks: Option<&Tensor>,
        out: &mut Tensor,
        log_sum_exp: &mut Tensor,
    );

    /// Gradients of [`Self::attention`]; overwrites `d_q`, `d_k`, `d_v`, adds to `d_sinks`.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        parameters: &AttentionParameters,
        segments: &[Segment],
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

    /// Adds the sum over rows of `x` to `out`, f32 \[columns\].
    fn sum_rows(&self, x: &Tensor, out: &mut Tensor);

    /// `x *= factor`, f32.
    fn scale(&self, x: &mut Tensor, factor: f32);

    /// `target += source`, element types may differ.
    fn add_assign(&self, target: &mut Tensor, source: &Tensor);

    /// `target = source`, converting the element type.
    fn convert(&self, source: &Tensor, target: &mut Tensor);

    /// Inverted dropout: `out = keep ? x / (1 - probability) : 0`, plus what it holds when `accumulate`.
    /// The mask is a pure function of the key and the element's index.
    fn dropout(&self, x: &Tensor, probability: f32, key: RandomKey, out: &mut Tensor, accumulate: bool);

    /// Copies rows `indices` of `x` to `out`.
    fn gather_rows(&self, x: &Tensor, indices: &[u32], out: &mut Tensor);

    /// Writes row i of `x` to row `indices[i]` of `out`; other rows stay.
    fn scatter_rows(&self, x: &Tensor, indices: &[u32], out: &mut Tensor);

    /// Replaces f32 logits \[t, V\] by their gradient and returns the sum of the losses, in nats.
    fn cross_entropy(&self, logits: &mut Tensor, labels: &[u32], parameters: &CrossEntropyParameters) -> f64;

    /// Sum of squares of an f32 tensor, accumulated in f64.
    fn sum_of_squares(&self, x: &Tensor) -> f64;

    /// One AdamW step on f32 tensors of the same shape.
    fn adamw(
        &self,
        parameters: &AdamWParameters,
        value: &mut Tensor,
        gradient: &Tensor,
        first_moment: &mut Tensor,
        second_moment: &mut Tensor,
    );
}
