//! Which device a command runs on, and in which type.

use pmetal_engine::device::cuda_devices;
use pmetal_engine::{DType, Device};

use crate::error::{Error, Result};
use crate::models::BaseStorage;
use crate::trainer::config::{BasePrecision, DeviceChoice, Precision, TrainConfig, Tuning};

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

/// How frozen weights are kept by a configuration on a device.
///
/// # Errors
/// [`Error::Usage`] where 8-bit weights have no use or no kernels, naming what works instead.
pub fn base_storage(config: &TrainConfig, device: &Device, dtype: DType) -> Result<BaseStorage> {
    if config.base_precision == BasePrecision::Auto {
        return Ok(BaseStorage::Typed);
    }
    let reason = if config.tuning == Tuning::Full {
        "keeps frozen weights in 8 bits, and with tuning full no weight is frozen; use tuning lora".to_owned()
    } else if config.lora_dropout > 0.0 {
        format!("does not work with lora_dropout {}; use lora_dropout 0", config.lora_dropout)
    } else if let Some(refusal) = device.fp8_refusal() {
        format!("cannot be used: {refusal}; use base_precision auto")
    } else if dtype != DType::Bf16 {
        format!("needs activations in bf16, they are {dtype}; use dtype bf16")
    } else {
        return Ok(BaseStorage::Fp8);
    };
    Err(Error::Usage(format!("base_precision fp8 {reason}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bit_weights_are_refused_where_they_have_no_use_or_no_kernels() {
        let refused = |change: fn(&mut TrainConfig)| {
            let mut config = TrainConfig { base_precision: BasePrecision::Fp8, ..TrainConfig::default() };
            change(&mut config);
            base_storage(&config, &Device::cpu(), DType::Bf16).unwrap_err().to_string()
        };
        assert_eq!(
            refused(|_| {}),
            "base_precision fp8 cannot be used: the processor has no products of 8-bit floats; use base_precision auto"
        );
        assert_eq!(
            refused(|config| config.tuning = Tuning::Full),
            "base_precision fp8 keeps frozen weights in 8 bits, and with tuning full no weight is frozen; use tuning lora"
        );
        assert_eq!(
            refused(|config| config.lora_dropout = 0.1),
            "base_precision fp8 does not work with lora_dropout 0.1; use lora_dropout 0"
        );
        let auto = base_storage(&TrainConfig::default(), &Device::cpu(), DType::F32);
        assert_eq!(auto.unwrap(), BaseStorage::Typed);
    }
}
