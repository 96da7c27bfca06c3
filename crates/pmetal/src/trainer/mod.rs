//! Training runs; `train_loop` is the file to read first.

pub mod artefacts;
pub mod checkpoint;
pub mod config;
pub mod learner;
pub mod memory;
pub mod metrics;
pub mod plot;
pub mod prepare;
pub mod schedule;
pub mod train_loop;

/// The most memory that this process has had resident, where the system tells.
pub fn resident_peak_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kilobytes| kilobytes * 1024)
}
