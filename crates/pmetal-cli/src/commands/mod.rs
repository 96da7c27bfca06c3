//! One file per command.

pub(crate) mod bench;
pub(crate) mod data;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod fuse;
pub(crate) mod infer;
pub(crate) mod train;
pub(crate) mod verify;

use anyhow::Context;
use pmetal::engine::device::SimdLevel;
use pmetal::engine::{DType, Device};

/// More threads than this are a slip of the keyboard.
const MOST_THREADS: usize = 4096;

/// Sizes the thread pool that all kernels share; 0 = one thread for each core.
pub(crate) fn set_up_threads(threads: usize) -> anyhow::Result<()> {
    SimdLevel::requested().map_err(pmetal::Error::Usage)?;
    if threads > MOST_THREADS {
        let message = format!("--threads is {threads}, it must be at most {MOST_THREADS}");
        return Err(pmetal::Error::Usage(message).into());
    }
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
    builder.build_global().context("cannot start the thread pool")
}

/// Element types of activations that flags name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Precision {
    /// bf16 where the processor multiplies it natively, else f32
    Auto,
    /// 32-bit floats
    F32,
    /// bf16 activations, sums in f32
    Bf16,
}

impl Precision {
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::Bf16,
            Self::Auto if SimdLevel::current().prefers_bf16() => DType::Bf16,
            Self::Auto => DType::F32,
        }
    }
}

/// Devices that flags name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum DeviceChoice {
    /// The best device of this machine
    Auto,
    /// The processor
    Cpu,
}

impl DeviceChoice {
    pub(crate) fn open(self) -> Device {
        match self {
            Self::Auto | Self::Cpu => Device::cpu(),
        }
    }
}
