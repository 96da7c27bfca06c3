//! The devices that tests run on: the processor, the emulator of kernels, and an NVIDIA GPU where there is one.
//!
//! A test that takes a device is listed in [`on_every_device`], which makes one test for each kind of device, named by
//! it. What is not there is said by name, and counted by `missing_devices_are_named_and_their_tests_are_counted`.

use std::io::Write;

use crate::Device;
use crate::device::gpu::emulator::has_compiler;

/// Makes tests `NAME::cpu`, `NAME::emulator` and `NAME::cuda` of functions that take a device.
macro_rules! on_every_device {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            #[test]
            fn cpu() {
                super::$name(&$crate::Device::cpu());
            }

            #[test]
            fn emulator() {
                if let Some(device) = $crate::testing::emulator(1) {
                    super::$name(&device);
                }
            }

            #[test]
            fn cuda() {
                if let Some(device) = $crate::testing::cuda(module_path!()) {
                    super::$name(&device);
                }
            }
        }
    )+};
}
pub(crate) use on_every_device;

/// A device whose order of threads the seed decides; `None` where there is no compiler.
pub(crate) fn emulator(seed: u64) -> Option<Device> {
    let device = Device::emulator(seed);
    if device.is_none() {
        println!("skipped: no C++ compiler");
    }
    device
}

/// The first NVIDIA GPU; `None`, and a line that names the test, where there is none.
pub(crate) fn cuda(test: &str) -> Option<Device> {
    match Device::cuda(0, false) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("skipped: {test} ({error})");
            None
        }
    }
}

/// Tests of this program that need an NVIDIA GPU, by the names that the test runner has for them.
fn tests_on(device: &str) -> usize {
    let program = std::env::current_exe().unwrap();
    let output = std::process::Command::new(program).arg("--list").output().unwrap();
    let names = String::from_utf8(output.stdout).unwrap();
    // Tests of the driver itself and of the kernels that it alone can run.
    let own = [
        "device::gpu::cuda::tests::",
        "device::gpu::attention::tests::",
        "device::gpu::experts::matrix::tests::",
        "device::gpu::weight_gradients::tests::",
    ];
    let belongs = |name: &str| {
        name.ends_with(&format!("::{device}"))
            || device == "cuda" && own.iter().any(|module| name.starts_with(module))
            || device == "emulator" && name.starts_with("device::gpu::emulator::tests::")
    };
    names.lines().filter_map(|line| line.strip_suffix(": test")).filter(|name| belongs(name)).count()
}

/// Past the test runner, which keeps what tests that pass have printed.
fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

#[test]
fn missing_devices_are_named_and_their_tests_are_counted() {
    let (gpu, emulator) = (tests_on("cuda"), tests_on("emulator"));
    assert!(gpu > 50 && emulator > 50, "{gpu} tests of GPUs and {emulator} of the emulator are in the list");
    match Device::cuda(0, false) {
        Ok(device) => say(&format!("ran {gpu} GPU tests on {}", device.description())),
        Err(error) => {
            let reason = error.to_string();
            say(&format!("skipped: {gpu} GPU tests: {}", reason.lines().next().unwrap_or_default()));
        }
    }
    if !has_compiler() {
        say(&format!("skipped: {emulator} tests of GPU kernels on the host: no C++ compiler"));
    }
}
