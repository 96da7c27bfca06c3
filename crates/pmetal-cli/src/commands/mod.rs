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
use pmetal::core::device::{activation_type, base_storage};
use pmetal::engine::device::SimdLevel;
use pmetal::engine::{DType, Device};
use pmetal::models::BaseStorage;
use pmetal::trainer::config;

use crate::style;

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
    /// bf16 where the device multiplies it natively, else f32
    Auto,
    /// 32-bit floats
    F32,
    /// bf16 activations, sums in f32
    Bf16,
}

impl Precision {
    /// The type of activations on a device.
    pub(crate) fn dtype(self, device: &Device) -> pmetal::Result<DType> {
        let precision = match self {
            Self::Auto => config::Precision::Auto,
            Self::F32 => config::Precision::F32,
            Self::Bf16 => config::Precision::Bf16,
        };
        activation_type(precision, device)
    }
}

/// Storages of frozen weights that flags name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BasePrecision {
    /// The type of activations on a GPU, as stored on a CPU
    Auto,
    /// 8-bit floats with a scale for each output (NVIDIA GPUs of compute capability 8.9 and higher)
    Fp8,
}

impl BasePrecision {
    pub(crate) fn storage(self, full: bool, device: &Device, dtype: DType) -> anyhow::Result<BaseStorage> {
        let config = config::TrainConfig {
            tuning: if full { config::Tuning::Full } else { config::Tuning::Lora },
            base_precision: match self {
                Self::Auto => config::BasePrecision::Auto,
                Self::Fp8 => config::BasePrecision::Fp8,
            },
            ..config::TrainConfig::default()
        };
        Ok(base_storage(&config, device, dtype)?)
    }
}

/// Devices that flags name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum DeviceChoice {
    /// The best device of this machine
    Auto,
    /// The processor
    Cpu,
    /// An NVIDIA GPU
    #[value(alias = "gpu")]
    Cuda,
}

impl DeviceChoice {
    pub(crate) fn open(self) -> anyhow::Result<Device> {
        let choice = match self {
            Self::Auto => config::DeviceChoice::Auto,
            Self::Cpu => config::DeviceChoice::Cpu,
            Self::Cuda => config::DeviceChoice::Cuda,
        };
        open_device(choice, false)
    }
}

/// Opens a device and says on stderr when a better one was passed over.
pub(crate) fn open_device(choice: config::DeviceChoice, deterministic: bool) -> anyhow::Result<Device> {
    let opened = pmetal::core::device::open_device(choice, deterministic)?;
    if let Some(note) = &opened.note {
        eprintln!("{} {note}", style::yellow("note:"));
    }
    Ok(opened.device)
}
