//! `pmetal verify`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use pmetal::eval::verify::{Report, verify_model};

use super::{DeviceChoice, Precision};
use crate::failure::FAILURE;
use crate::{output, style};

/// Arguments of `pmetal verify`.
#[derive(Args)]
pub(crate) struct VerifyArguments {
    /// Folders that hold a model and an expected.safetensors
    #[arg(required = true, value_name = "DIR")]
    fixtures: Vec<PathBuf>,
    /// Model folder or GGUF file to compare instead of the folders' own: another form of the same weights
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Type of activations
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Precision,
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,
    /// Print one JSON object per fixture
    #[arg(long)]
    json: bool,
    /// Print every quantity, not only the worst of each kind
    #[arg(long)]
    all: bool,
}

/// Compares every fixture and fails when anything is missed.
pub(crate) fn run(arguments: VerifyArguments) -> anyhow::Result<ExitCode> {
    let mut missed = 0;
    for folder in &arguments.fixtures {
        let device = arguments.device.open()?;
        let model = arguments.model.as_deref().unwrap_or(folder);
        let outcome = verify_model(model, folder, &device, arguments.dtype.dtype(&device)?);
        match (&outcome, arguments.json) {
            (Ok(report), true) => println!("{}", json(report)),
            (Ok(report), false) => print(report, arguments.all),
            (Err(error), true) => {
                let fixture = folder.display().to_string();
                println!(
                    "{}",
                    serde_json::json!({ "fixture": fixture, "passed": false, "error": error.to_string() })
                );
            }
            (Err(error), false) => println!("{}  FAILED\n  {error}\n", folder.display()),
        }
        missed += usize::from(!outcome.is_ok_and(|report| report.passed()));
    }
    let total = arguments.fixtures.len();
    eprintln!("{} of {total} fixtures agree", total - missed);
    Ok(if missed == 0 { ExitCode::SUCCESS } else { ExitCode::from(FAILURE) })
}

fn json(report: &Report) -> serde_json::Value {
    serde_json::json!({
        "fixture": report.fixture,
        "passed": report.passed(),
        "comparisons": report.comparisons,
    })
}

/// "hidden.3" and "grad.model.norm.weight" are of the kinds "hidden" and "grad".
fn kind(quantity: &str) -> String {
    let (prefix, rest) = match quantity.strip_prefix("adapter.") {
        Some(rest) => ("adapter.", rest),
        None => ("", quantity),
    };
    format!("{prefix}{}", rest.split('.').next().unwrap_or(rest))
}

fn print(report: &Report, all: bool) {
    let verdict = if report.passed() { style::green_out("ok") } else { style::red_out("MISSED") };
    println!("{}  {verdict}", report.fixture);
    let mut rows = vec![
        ["quantity", "max abs error", "relative error", "tolerance", "verdict"].map(str::to_owned).to_vec(),
    ];
    let mut kinds: Vec<(String, usize)> = Vec::new();
    for comparison in &report.comparisons {
        let name = kind(&comparison.quantity);
        match kinds.iter_mut().find(|entry| entry.0 == name) {
            Some(entry) => entry.1 += 1,
            None => kinds.push((name, 1)),
        }
    }
    for (name, count) in &kinds {
        let members: Vec<_> = report.comparisons.iter().filter(|c| kind(&c.quantity) == *name).collect();
        let worst = members.iter().max_by(|a, b| {
            let excess = |c: &pmetal::eval::verify::Comparison| {
                if c.passed { c.relative_error } else { f64::INFINITY }
            };
            excess(a).total_cmp(&excess(b))
        });
        let shown =
            members.iter().filter(|c| all || !c.passed || worst.is_some_and(|w| w.quantity == c.quantity));
        for comparison in shown {
            let more = if !all && *count > 1 && comparison.passed {
                format!(" (worst of {count})")
            } else {
                String::new()
            };
            rows.push(vec![
                format!("  {}{more}", comparison.quantity),
                format!("{:.3e}", comparison.max_abs_error),
                format!("{:.3e}", comparison.relative_error),
                format!("{:.0e}", comparison.tolerance),
                if comparison.passed { "ok".to_owned() } else { "MISSED".to_owned() },
            ]);
        }
    }
    print!("{}", output::table(&rows));
    println!();
}
