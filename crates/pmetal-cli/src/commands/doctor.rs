//! `pmetal doctor`.

use std::process::ExitCode;

use clap::Args;
use pmetal::engine::device::{SimdLevel, cuda_libraries};

use super::{DeviceChoice, Precision};
use crate::output;

/// Arguments of `pmetal doctor`.
#[derive(Args)]
pub(crate) struct DoctorArguments {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints what the program found and would use.
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
    if arguments.json {
        let object: serde_json::Map<String, serde_json::Value> = facts
            .iter()
            .map(|(name, value)| (name.replace(' ', "_"), serde_json::Value::from(value.clone())))
            .collect();
        println!("{}", serde_json::Value::Object(object));
    } else {
        let rows: Vec<Vec<String>> =
            facts.iter().map(|(name, value)| vec![(*name).to_owned(), value.clone()]).collect();
        print!("{}", output::table(&rows));
    }
    Ok(ExitCode::SUCCESS)
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
