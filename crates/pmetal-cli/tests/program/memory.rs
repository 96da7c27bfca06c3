//! The estimate of a dry run against what a run takes.

use crate::support::Sandbox;

fn estimate_and_peak(sandbox: &Sandbox, output: &str, more: &[&str]) -> (f64, f64) {
    let dry = [more, &["--dry-run", "--json"]].concat();
    let estimate = sandbox.train(output, &dry).ok().json()["memory_total_bytes"].as_f64().unwrap();
    sandbox.train(output, more).ok();
    let peaks = sandbox.steps(output).into_iter().map(|step| step["peak_bytes"].as_f64().unwrap());
    (estimate, peaks.fold(0.0, f64::max))
}

#[test]
fn the_estimate_is_near_the_measured_peak() {
    let sandbox = Sandbox::new();
    sandbox.write("rows.jsonl", &crate::support::text_rows(120));
    let configurations: [(&str, &[&str]); 4] = [
        ("small", &["--max-steps", "2"]),
        ("large", &["--max-steps", "2", "--batch-size", "8", "--max-seq-len", "128", "--lora-r", "16"]),
        ("bf16", &["--max-steps", "2", "--batch-size", "8", "--max-seq-len", "128", "--dtype", "bf16"]),
        (
            "recomputed",
            &["--max-steps", "2", "--batch-size", "8", "--max-seq-len", "128", "--gradient-checkpointing"],
        ),
    ];
    for (name, more) in configurations {
        let (estimate, peak) = estimate_and_peak(&sandbox, name, more);
        let error = estimate / peak - 1.0;
        println!("{name}: estimate {estimate}, peak {peak}, {:.1} %", 100.0 * error);
        assert!(error.abs() <= 0.25, "{name}: the estimate is {estimate}, the peak {peak}");
    }
}

#[test]
fn gradient_checkpointing_takes_less_memory_and_leaves_the_bytes_alone() {
    let sandbox = Sandbox::new();
    let settings = ["--max-steps", "3", "--lora-dropout", "0.2", "--max-seq-len", "64", "--batch-size", "4"];
    sandbox.train("kept", &settings).ok();
    let more = [&settings[..], &["--gradient-checkpointing"]].concat();
    sandbox.train("recomputed", &more).ok();
    assert!(sandbox.adapter("kept") == sandbox.adapter("recomputed"));
    let peak = |output| sandbox.steps(output).last().unwrap()["peak_bytes"].as_u64().unwrap();
    assert!(peak("recomputed") < peak("kept") * 9 / 10, "{} and {}", peak("recomputed"), peak("kept"));
}
