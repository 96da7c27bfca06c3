//! Putting a kernel's launch together.

use super::runtime::{Argument, Launch, ModuleText, Runtime};
use crate::device::GateActivation;
use crate::{DType, Tensor};

macro_rules! module {
    ($name:literal) => {
        ModuleText {
            name: $name,
            texts: &[
                include_str!("../../../kernels/prelude/cuda.h"),
                include_str!("../../../kernels/common.cpp"),
                include_str!(concat!("../../../kernels/", $name, ".cpp")),
            ],
        }
    };
}

/// The portable kernels.
static MODULES: [ModuleText; 21] = [
    module!("attention"),
    module!("choice"),
    module!("choice_tiles"),
    module!("convolution"),
    module!("delta"),
    module!("delta_chunks"),
    module!("delta_steps"),
    module!("elementwise"),
    module!("expert_products"),
    module!("experts"),
    module!("fp8"),
    module!("gated"),
    module!("gemv"),
    module!("heads"),
    module!("layer_norm"),
    module!("loss"),
    module!("norm"),
    module!("optimizer"),
    module!("rope"),
    module!("routing"),
    module!("sampler"),
];

fn portable(name: &str) -> &'static ModuleText {
    MODULES.iter().find(|module| module.name == name).expect("invariant: the module is in the list")
}

/// A launch in the making.
pub(super) struct Kernel {
    module: &'static ModuleText,
    kernel: &'static str,
    defines: Vec<(&'static str, String)>,
    arguments: Vec<Argument>,
    shared_bytes: usize,
}

impl From<&Tensor> for Argument {
    fn from(tensor: &Tensor) -> Self {
        Self::Address(tensor.address())
    }
}

impl From<&mut Tensor> for Argument {
    fn from(tensor: &mut Tensor) -> Self {
        Self::Address(tensor.address_mut())
    }
}

impl From<Option<&Tensor>> for Argument {
    fn from(tensor: Option<&Tensor>) -> Self {
        Self::Address(tensor.map_or(0, Tensor::address))
    }
}

impl Kernel {
    /// A kernel of a portable module.
    pub(super) fn new(module: &str, kernel: &'static str) -> Self {
        Self::of(portable(module), kernel)
    }

    pub(super) fn of(module: &'static ModuleText, kernel: &'static str) -> Self {
        Self { module, kernel, defines: Vec::new(), arguments: Vec::new(), shared_bytes: 0 }
    }

    fn typed(mut self, name: &'static str, dtype: DType) -> Self {
        self.defines.push((name, dtype.name().to_owned()));
        self
    }

    pub(super) fn source(self, dtype: DType) -> Self {
        self.typed("SOURCE", dtype)
    }

    pub(super) fn element(self, dtype: DType) -> Self {
        self.typed("ELEMENT", dtype)
    }

    pub(super) fn weight(self, dtype: DType) -> Self {
        self.typed("WEIGHT", dtype)
    }

    pub(super) fn bias(self, dtype: DType) -> Self {
        self.typed("BIAS", dtype)
    }

    pub(super) fn paired(self, dtype: DType) -> Self {
        self.typed("PAIRED", dtype)
    }

    pub(super) fn activation(self, activation: GateActivation) -> Self {
        self.define("SILU", activation == GateActivation::Silu)
            .define("GELU", activation == GateActivation::Gelu)
            .define("SIGMOID", activation == GateActivation::Sigmoid)
    }

    pub(super) fn second(self, dtype: DType) -> Self {
        self.typed("SECOND", dtype)
    }

    pub(super) fn aligned(self, aligned: bool) -> Self {
        self.define("ALIGNED", aligned)
    }

    /// Rows of a width that so many threads hold in registers when they are aligned.
    pub(super) fn row(self, width: usize, threads: usize, aligned: bool) -> Self {
        let vectors = width.div_ceil(8 * threads).max(1);
        // Longer rows than all threads can hold are read twice.
        let aligned = aligned && holds(width, threads);
        self.aligned(aligned).number("VECTORS", if aligned { vectors } else { 1 })
    }

    pub(super) fn define(self, name: &'static str, value: bool) -> Self {
        self.number(name, value.into())
    }

    pub(super) fn number(mut self, name: &'static str, value: usize) -> Self {
        self.defines.push((name, value.to_string()));
        self
    }

    pub(super) fn arguments(mut self, arguments: &[Argument]) -> Self {
        self.arguments.extend_from_slice(arguments);
        self
    }

    /// Unsigned 32-bit parameters; shapes were checked to be within them when tensors were allocated.
    pub(super) fn sizes(mut self, sizes: &[usize]) -> Self {
        self.arguments.extend(sizes.iter().map(|&size| Argument::U32(size as u32)));
        self
    }

    pub(super) fn shared(mut self, bytes: usize) -> Self {
        self.shared_bytes = bytes;
        self
    }

    pub(super) fn launch(self, runtime: &dyn Runtime, grid: [usize; 3], threads: usize) {
        if grid.contains(&0) {
            return;
        }
        let defines: Vec<(&str, &str)> =
            self.defines.iter().map(|(name, value)| (*name, value.as_str())).collect();
        runtime.launch(&Launch {
            module: self.module,
            defines: &defines,
            kernel: self.kernel,
            grid: grid.map(|blocks| blocks as u32),
            block: [threads as u32, 1, 1],
            shared_bytes: self.shared_bytes as u32,
            arguments: &self.arguments,
        });
    }
}

/// Vectors of eight elements that a thread holds at most.
const MOST_VECTORS: usize = 4;

/// Whether so many threads hold a row in registers.
pub(super) fn holds(width: usize, threads: usize) -> bool {
    width.div_ceil(8 * threads) <= MOST_VECTORS
}

/// Threads for a row: whole SIMD groups that hold it, at most 1024.
pub(super) fn lanes(width: usize) -> usize {
    width.div_ceil(8 * MOST_VECTORS).next_multiple_of(32).clamp(32, 1024)
}

/// [`lanes`] for this many rows: few rows are as fast as their longest thread, and as its code is short.
pub(super) fn lanes_of(rows: usize, width: usize) -> usize {
    if rows > FEW_ROWS { lanes(width) } else { width.div_ceil(8).next_multiple_of(32).clamp(32, 1024) }
}

/// How a kernel of many rows is launched in which a row is held by some lanes.
pub(super) struct RowGroups {
    /// Threads that hold a row.
    pub(super) lanes: usize,
    /// Whether groups have several rows, one for each SIMD group: more of such are on a multiprocessor at a time.
    pub(super) simd: bool,
}

impl RowGroups {
    pub(super) fn new(rows: usize, lanes: usize) -> Self {
        Self { lanes, simd: lanes == 32 && rows > FEW_ROWS }
    }

    /// Groups, and threads of each.
    pub(super) fn grid(&self, rows: usize) -> ([usize; 3], usize) {
        if self.simd { ([rows.div_ceil(4), 1, 1], 128) } else { ([rows, 1, 1], self.lanes) }
    }
}

/// Rows that leave most of a GPU idle.
const FEW_ROWS: usize = 64;

/// Whether rows of `columns` elements of all tensors can be read and written by 16 bytes.
pub(super) fn is_aligned(columns: usize, tensors: &[&Tensor]) -> bool {
    columns.is_multiple_of(8)
        && tensors
            .iter()
            // One row alone has no next one.
            .all(|tensor| {
                (tensor.shape().len() < 2 || tensor.pitch().is_multiple_of(8))
                    && tensor.address().is_multiple_of(16)
            })
}
