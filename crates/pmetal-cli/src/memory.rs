//! Tables of memory, and what to do where it runs out.

use pmetal::Error;
use pmetal::engine::memory::{Category, MemoryReport, Shortage};
use pmetal::engine::{Device, Error as EngineError};
use pmetal::trainer::memory::Advice;

use crate::{failure, output};

/// Changes that are proposed at one time.
const PROPOSED: usize = 3;

/// Bytes by category, now and at the peak.
pub(crate) fn table(report: &MemoryReport) -> String {
    let mut rows = vec![vec!["memory".to_owned(), "now".to_owned(), "at the peak".to_owned()]];
    let mut add = |name: &str, live: usize, at_peak: usize| {
        rows.push(vec![name.to_owned(), output::bytes(live), output::bytes(at_peak)]);
    };
    for entry in &report.categories {
        if entry.live_bytes > 0 || entry.at_peak_bytes > 0 {
            add(entry.category.name(), entry.live_bytes, entry.at_peak_bytes);
        }
    }
    add("in all", report.live_bytes, report.peak_bytes);
    output::table(&rows)
}

/// Adds to an error that memory ran out what was held, and how to take less.
pub(crate) fn explained(
    error: Error,
    device: &Device,
    advice: impl FnOnce() -> Vec<Advice>,
) -> anyhow::Error {
    let shortage = device.memory().shortage();
    match (&error, shortage) {
        (Error::Engine(EngineError::OutOfMemory { .. }), Some(shortage)) => {
            failure::detailed(error, details(&shortage), hint(&shortage, &advice()))
        }
        _ => error.into(),
    }
}

fn details(shortage: &Shortage) -> String {
    let limit = match shortage.limit_bytes {
        Some(limit) => format!("`memory_limit_gib` allows {}", output::bytes(limit)),
        None => "the device has no more".to_owned(),
    };
    let (asked, what) = (output::bytes(shortage.requested_bytes), shortage.category.name());
    format!("{}asked for: {asked} for {what}; {limit}", table(&shortage.report))
}

/// What to do; `None` for what is usually said.
fn hint(shortage: &Shortage, advice: &[Advice]) -> Option<String> {
    if advice.is_empty() {
        return match shortage.category {
            Category::Weights => Some("the weights alone do not fit: take a smaller model".to_owned()),
            Category::Parameters | Category::Optimizer => {
                Some("what is trained does not fit: train adapters of a low rank, not all weights".to_owned())
            }
            _ => None,
        };
    }
    let line = |advice: &Advice| {
        let settings: Vec<String> =
            advice.settings.iter().map(|(name, value)| format!("`{name} = {value}`")).collect();
        let resume = if advice.is_resumable { "; --resume goes on with it" } else { "" };
        format!("\n  {}: about {} less{resume}", settings.join(" with "), output::bytes(advice.saved_bytes))
    };
    let lines: Vec<String> = advice.iter().take(PROPOSED).map(line).collect();
    Some(format!("settings with which this run takes less:{}", lines.concat()))
}
