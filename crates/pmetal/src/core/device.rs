//! Which device a command runs on, and in which type.

use pmetal_engine::device::cuda_devices;
use pmetal_engine::{DType, Device};

use crate::error::{Error, Result};
use crate::trainer::config::{DeviceChoice, Precision};

/// A device that was opened, and what the user should know of how it was chosen.
pub struct OpenedDevice {
    /// The device.
    pub device: Device,
    /// Why a better one was not taken.
    pub note: Option<String>,
}

/// Opens the device of a choice; `Auto` takes an NVIDIA GPU where there is one with all libraries, else the CPU.
/// `deterministic` makes a GPU choose algorithms without timing them, so that a second run computes the same bits.
///
/// # Errors
/// [`Error::Usage`] for a device that this machine or build does not have, naming what is missing.
pub fn open_device(choice: DeviceChoice, deterministic: bool) -> Result<OpenedDevice> {
    let plain = |device| Ok(OpenedDevice { device, note: None });
    match choice {
        DeviceChoice::Cpu => plain(Device::cpu()),
        DeviceChoice::Cuda => match Device::cuda(0, deterministic) {
            Ok(device) => plain(device),
            Err(error) => Err(Error::Usage(format!("device `cuda` cannot be used: {error}"))),
        },
        DeviceChoice::Metal => {
            Err(Error::Usage("device `metal` is not available in this build, only cpu and cuda".to_owned()))
        }
        DeviceChoice::Auto => {
            // Without a driver there is no GPU to speak of.
            if !cuda_devices().is_ok_and(|devices| !devices.is_empty()) {
                return plain(Device::cpu());
            }
            match Device::cuda(0, deterministic) {
                Ok(device) => plain(device),
                Err(error) => {
                    let note = Some(format!("running on the CPU, as the GPU cannot be used: {error}"));
                    Ok(OpenedDevice { device: Device::cpu(), note })
                }
            }
        }
    }
}

/// The type of activations that a precision means on a device.
///
/// # Errors
/// [`Error::Usage`] for bf16 on a GPU without it.
pub fn activation_type(precision: Precision, device: &Device) -> Result<DType> {
    let narrow = device.has_bf16();
    match precision {
        Precision::F32 => Ok(DType::F32),
        Precision::Bf16 if !device.is_host() && !narrow => Err(Error::Usage(format!(
            "dtype bf16 needs a GPU of compute capability 8.0 or higher, {} has less; use --dtype f32",
            device.description()
        ))),
        Precision::Bf16 => Ok(DType::Bf16),
        Precision::Auto if narrow => Ok(DType::Bf16),
        Precision::Auto => Ok(DType::F32),
    }
}
