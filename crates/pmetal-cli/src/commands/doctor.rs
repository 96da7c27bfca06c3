//! `pmetal doctor`.

use std::process::ExitCode;

use clap::Args;
use pmetal::engine::device::{SimdLevel, cuda_devices, cuda_libraries};
use pmetal::engine::{Device, SelfTest, self_test};
use serde_json::{Value, json};

use super::{DeviceChoice, Precision};
use crate::{output, style};

/// Arguments of `pmetal doctor`.
#[derive(Args)]
pub(crate) struct DoctorArguments {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints what the program found and would use, and whether every device computes what it should.
pub(crate) fn run(arguments: DoctorArguments) -> anyhow::Result<ExitCode> {
    let memory = memory_bytes();
    let device = DeviceChoice::Auto.open()?;
    let mut facts = vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("processor", processor()),
        ("architecture", std::env::consts::ARCH.to_owned()),
        ("threads", rayon::current_num_threads().to_string()),
        ("instructions", SimdLevel::current().name().to_owned()),
        ("default precision", Precision::Auto.dtype(&device)?.to_string()),
        ("memory total", memory.map_or_else(|| "unknown".to_owned(), |m| output::bytes(m.0))),
        ("memory available", memory.map_or_else(|| "unknown".to_owned(), |m| output::bytes(m.1))),
        ("device", format!("{} ({})", device.name(), device.description())),
    ];
    if let Some((free, total)) = device.free_and_total_bytes()? {
        facts.push(("device memory total", output::bytes(total)));
        facts.push(("device memory free", output::bytes(free)));
    }
    for library in cuda_libraries() {
        let path = library.path.as_ref().map(|path| path.display().to_string());
        let version = library.version.map_or_else(String::new, |version| format!(" {version}"));
        facts.push((
            library.name,
            match (path, library.problem) {
                (_, Some(problem)) => problem,
                (Some(path), None) => format!("{path}{version}"),
                (None, None) => "found".to_owned(),
            },
        ));
    }
    let tested: Vec<Tested> = found_devices().into_iter().map(Tested::new).collect();
    if arguments.json {
        let mut object: serde_json::Map<String, Value> =
            facts.iter().map(|(name, value)| (name.replace(' ', "_"), Value::from(value.clone()))).collect();
        object.insert("self_test".to_owned(), tested.iter().flat_map(Tested::json).collect());
        println!("{}", Value::Object(object));
    } else {
        let rows: Vec<Vec<String>> =
            facts.iter().map(|(name, value)| vec![(*name).to_owned(), value.clone()]).collect();
        print!("{}", output::table(&rows));
        println!("\nkernels, with the largest error relative to what plain loops compute");
        print!("{}", output::table(&tested.iter().flat_map(Tested::rows).collect::<Vec<_>>()));
    }
    Ok(if tested.iter().all(Tested::passed) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The processor and every GPU, or why one cannot be used.
fn found_devices() -> Vec<(String, pmetal::engine::Result<Device>)> {
    let mut devices = vec![("cpu".to_owned(), Ok(Device::cpu()))];
    // What keeps CUDA from being found is among the facts.
    let count = if cuda_libraries().iter().any(|library| library.problem.is_some()) {
        0
    } else {
        cuda_devices().map_or(0, |found| found.len())
    };
    devices.extend((0..count).map(|ordinal| (format!("cuda:{ordinal}"), Device::cuda(ordinal, false))));
    devices
}

/// How one device did.
struct Tested {
    device: String,
    outcome: Result<Vec<SelfTest>, String>,
}

impl Tested {
    fn new((device, opened): (String, pmetal::engine::Result<Device>)) -> Self {
        let outcome = opened.map(|device| self_test(&device)).map_err(|error| error.to_string());
        Self { device, outcome }
    }

    fn passed(&self) -> bool {
        self.outcome.as_ref().is_ok_and(|tests| tests.iter().all(SelfTest::passed))
    }

    /// One line for each group of kernels, with all types.
    fn rows(&self) -> Vec<Vec<String>> {
        let line = |name: &str, passed: bool, rest: String| {
            let verdict = if passed { style::green_out("ok") } else { style::red_out("FAILED") };
            vec![self.device.clone(), name.to_owned(), verdict, rest]
        };
        let tests = match &self.outcome {
            Ok(tests) => tests,
            Err(reason) => return vec![line("all", false, reason.clone())],
        };
        let mut groups: Vec<&str> = tests.iter().map(|test| test.kernels).collect();
        groups.sort_unstable();
        groups.dedup();
        let row = |group: &&str| {
            let own: Vec<&SelfTest> = tests.iter().filter(|test| test.kernels == *group).collect();
            let errors: Vec<String> = own.iter().map(|test| error_of(test)).collect();
            line(group, own.iter().all(|test| test.passed()), errors.join(", "))
        };
        groups.iter().map(row).collect()
    }

    fn json(&self) -> Vec<Value> {
        let of = |test: &SelfTest| {
            json!({
                "device": self.device, "kernels": test.kernels, "dtype": test.dtype.name(), "passed": test.passed(),
                "largest_error": test.largest_error, "tolerance": test.tolerance, "failure": test.failure,
            })
        };
        match &self.outcome {
            Ok(tests) => tests.iter().map(of).collect(),
            Err(reason) => {
                vec![json!({ "device": self.device, "kernels": "all", "passed": false, "failure": reason })]
            }
        }
    }
}

fn error_of(test: &SelfTest) -> String {
    let name = test.dtype.name();
    match &test.failure {
        Some(failure) => format!("{name}: {failure}"),
        None if test.passed() => format!("{name} {:.1e}", test.largest_error),
        None => format!("{name} {:.1e} instead of at most {:.0e}", test.largest_error, test.tolerance),
    }
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name"));
    model
        .and_then(|line| line.split(':').nth(1))
        .map_or_else(|| "unknown".to_owned(), |name| name.trim().to_owned())
}

/// Total and available memory of the machine.
fn memory_bytes() -> Option<(usize, usize)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kilobytes| kilobytes * 1024)
    };
    Some((field("MemTotal:")?, field("MemAvailable:")?))
}

#[cfg(test)]
mod tests {
    use pmetal::engine::DType;

    use super::*;

    fn tested(errors: [f64; 2], failure: Option<&str>) -> Tested {
        let test = |kernels, largest_error, failure: Option<&str>| SelfTest {
            kernels,
            dtype: DType::F32,
            largest_error,
            tolerance: 1e-5,
            failure: failure.map(str::to_owned),
        };
        let outcome = Ok(vec![test("norms", errors[0], None), test("losses", errors[1], failure)]);
        Tested { device: "cuda:0".to_owned(), outcome }
    }

    #[test]
    fn a_group_that_is_wrong_or_fails_is_named_and_fails_the_device() {
        let good = tested([1e-7, 0.0], None);
        assert!(good.passed());
        assert!(good.rows().iter().all(|row| row[2].contains("ok")), "{:?}", good.rows());
        for (bad, reason) in [
            (tested([1e-7, 0.5], None), "5.0e-1 instead of at most 1e-5"),
            (tested([1e-7, f64::NAN], None), "NaN"),
            (tested([1e-7, 0.0], Some("the driver failed")), "the driver failed"),
        ] {
            assert!(!bad.passed());
            let rows = bad.rows();
            assert_eq!((rows[0][1].as_str(), rows[1][1].as_str()), ("losses", "norms"));
            assert!(rows[0][2].contains("FAILED") && rows[0][3].contains(reason), "{rows:?}");
            assert!(rows[1][2].contains("ok"), "{rows:?}");
            assert_eq!(bad.json()[1]["passed"], false);
        }
    }

    #[test]
    fn a_device_that_does_not_open_fails() {
        let refused = pmetal::engine::Error::Other("it is lost".to_owned());
        let lost = Tested::new(("cuda:1".to_owned(), Err(refused)));
        assert!(!lost.passed());
        assert!(lost.rows()[0][2].contains("FAILED") && lost.rows()[0][3].contains("it is lost"));
        assert_eq!(lost.json()[0]["failure"], "it is lost");
    }
}
