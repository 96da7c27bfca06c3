//! A run that is killed at any time goes on to the same bytes.

use std::process::Stdio;
use std::time::Duration;

use crate::support::{Sandbox, text_rows, tree, without_clock};

/// Rounds of kills; `PMETAL_KILL_ROUNDS` asks for more.
fn rounds() -> u64 {
    std::env::var("PMETAL_KILL_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3)
}

/// A fixed sequence of delays (a linear congruential generator, the constants of Knuth's MMIX).
struct Delays(u64);

impl Delays {
    fn next(&mut self, most: Duration) -> Duration {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        most.mul_f64((self.0 >> 40) as f64 / (1_u64 << 24) as f64)
    }
}

/// Everything at once that could be lost: dropout, packing, accumulation, evaluations, samples, reports that
/// span steps.
const SETTINGS: [&str; 20] = [
    "--max-steps",
    "40",
    "--save-every",
    "5",
    "--lora-dropout",
    "0.2",
    "--gradient-accumulation-steps",
    "2",
    "--eval-fraction",
    "0.2",
    "--eval-every",
    "10",
    "--sample-prompt",
    "Once",
    "--sample-every",
    "10",
    "--sample-max-tokens",
    "4",
    "--log-every",
    "3",
];

/// Starts the run and kills it after a delay; says whether it was still running then.
fn killed(sandbox: &Sandbox, arguments: &[&str], delay: Duration) -> bool {
    let mut child = sandbox.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(delay);
    let was_running = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    was_running
}

#[test]
fn resume_after_kills_is_bit_identical() {
    let sandbox = Sandbox::new();
    let start = std::time::Instant::now();
    sandbox.train("whole", &SETTINGS).ok();
    let duration = start.elapsed();
    let (adapter, metrics) = (sandbox.adapter("whole"), without_clock(sandbox.metrics("whole")));
    let newest = tree(&sandbox.path("whole/checkpoints/step-000040"));
    let (samples, evaluations) = (sandbox.read("whole/samples.jsonl"), metrics.len());
    assert!(samples.lines().count() >= 5 && evaluations > 15, "{samples}");

    let mut kills = 0;
    for round in 0..rounds() {
        let (output, mut delays) = (format!("round-{round}"), Delays(round));
        let mut more = SETTINGS.to_vec();
        more.push("--resume");
        let arguments = sandbox.training(&output, &more);
        for _ in 0..4 {
            // Half, as a busy machine may have been slower when the whole run was timed.
            kills += u64::from(killed(&sandbox, &arguments, delays.next(duration / 2)));
        }
        sandbox.run(&arguments).ok();
        assert!(sandbox.adapter(&output) == adapter, "round {round}: another adapter");
        // The manifest names the base, the data and the settings; the tensors and moments lie beside it.
        let state = |files: Vec<(String, String)>| -> Vec<_> {
            files.into_iter().filter(|(name, _)| name.ends_with(".safetensors")).collect()
        };
        let found = tree(&sandbox.path(&format!("{output}/checkpoints/step-000040")));
        assert_eq!(state(found), state(newest.clone()), "round {round}");
        let ours = without_clock(sandbox.metrics(&output));
        // The first record holds the configuration, which names the output folder.
        assert_eq!(ours[1..], metrics[1..], "round {round}");
        assert_eq!(sandbox.read(&format!("{output}/samples.jsonl")), samples, "round {round}");
        let left: Vec<String> = tree(&sandbox.path(&output)).into_iter().map(|(name, _)| name).collect();
        let scratch = |name: &&String| name.contains(".tmp-") || name.contains(".trash-");
        assert_eq!(left.iter().find(scratch), None, "round {round}");
        assert_eq!(sandbox.checkpoints(&output), [30, 35, 40], "round {round}");
    }
    assert!(kills >= rounds(), "only {kills} processes were killed while they ran");
}

#[test]
fn kills_while_checkpoints_are_written_leave_a_usable_one() {
    let sandbox = Sandbox::new();
    // A checkpoint after every step: most of the time goes into writing them.
    let settings = ["--max-steps", "25", "--save-every", "1", "--lora-r", "16"];
    let start = std::time::Instant::now();
    sandbox.train("whole", &settings).ok();
    let duration = start.elapsed();
    let mut more = settings.to_vec();
    more.push("--resume");
    let arguments = sandbox.training("killed", &more);
    let mut delays = Delays(77);
    let mut before = 0;
    for _ in 0..6 {
        killed(&sandbox, &arguments, duration.mul_f64(0.3) + delays.next(duration.mul_f64(0.5)));
        let newest = sandbox.checkpoints("killed").last().copied().unwrap_or(0);
        assert!(newest >= before, "the newest checkpoint went from step {before} to {newest}");
        before = newest;
    }
    let done = sandbox.run(&arguments).ok();
    assert!(!done.stderr.contains("passed over"), "a checkpoint was damaged:\n{}", done.stderr);
    assert!(sandbox.adapter("killed") == sandbox.adapter("whole"));
}

#[test]
fn resume_where_nothing_is_begins_from_the_start() {
    let sandbox = Sandbox::new();
    sandbox.train("plain", &[]).ok();
    let done = sandbox.train("resumed", &["--resume"]).ok();
    assert!(!done.stderr.contains("resumed from"), "{}", done.stderr);
    assert!(sandbox.adapter("plain") == sandbox.adapter("resumed"));
    // A run that is finished is left as it is.
    let before = sandbox.adapter("resumed");
    sandbox.train("resumed", &["--resume"]).ok();
    assert!(sandbox.adapter("resumed") == before);
    assert_eq!(sandbox.steps("resumed").len(), 6);
}

/// Leaves a run in `run` that was killed after its checkpoint of step 4 of 8.
fn stopped_run(sandbox: &Sandbox) {
    sandbox.train("run", &["--max-steps", "8", "--save-every", "4"]).ok();
    std::fs::remove_dir_all(sandbox.path("run/checkpoints/step-000008")).unwrap();
    std::fs::remove_dir_all(sandbox.path("run/adapter")).unwrap();
}

#[test]
fn resume_with_another_learning_rate_is_refused_with_the_difference() {
    let sandbox = Sandbox::new();
    stopped_run(&sandbox);
    let more = ["--max-steps", "8", "--save-every", "4", "--learning-rate", "1e-3", "--resume"];
    let words = ["another configuration", "- learning_rate = 0.0002", "+ learning_rate = 0.001"];
    let before = sandbox.read("run/run.toml");
    let done = sandbox.train("run", &more).fails(2, &words);
    assert!(!done.stderr.contains("save_every"), "{}", done.stderr);
    assert_eq!(sandbox.read("run/run.toml"), before);
}

#[test]
fn resume_may_change_when_checkpoints_are_written() {
    let sandbox = Sandbox::new();
    sandbox.train("whole", &["--max-steps", "8"]).ok();
    stopped_run(&sandbox);
    let done = sandbox.train("run", &["--max-steps", "8", "--save-every", "2", "--resume"]).ok();
    assert!(done.stderr.contains("resumed from step 4"), "{}", done.stderr);
    assert_eq!(sandbox.checkpoints("run"), [4, 6, 8]);
    assert!(sandbox.adapter("run") == sandbox.adapter("whole"));
}

#[test]
fn resume_ignores_a_change_of_what_has_no_effect() {
    let sandbox = Sandbox::new();
    let settings = ["--max-steps", "8", "--save-every", "4", "--warmup-steps", "2", "--warmup-ratio", "0.5"];
    sandbox.train("run", &settings).ok();
    std::fs::remove_dir_all(sandbox.path("run/checkpoints/step-000008")).unwrap();
    let mut more = settings.to_vec();
    more.push("--resume");
    sandbox.train("run", &more).ok();
}

#[test]
fn resume_with_an_edited_dataset_is_refused() {
    let sandbox = Sandbox::new();
    stopped_run(&sandbox);
    let rows = text_rows(24).replace("Lily went to the park 5", "Lily went to the park 6");
    sandbox.write("rows.jsonl", &rows);
    let before = sandbox.read("run/run.toml");
    let more = ["--max-steps", "8", "--save-every", "4", "--resume"];
    sandbox.train("run", &more).fails(2, &["another dataset"]);
    assert_eq!(sandbox.read("run/run.toml"), before);
    // The same rows in a file of another name are the same dataset.
    sandbox.write("moved.jsonl", &text_rows(24));
    let more = ["--max-steps", "8", "--save-every", "4", "--resume", "--dataset", "moved.jsonl"];
    sandbox.train("run", &more).ok();
}

#[test]
fn a_damaged_checkpoint_is_passed_over_with_a_reason() {
    let sandbox = Sandbox::new();
    sandbox.train("run", &["--max-steps", "8", "--save-every", "2"]).ok();
    let adapter = sandbox.adapter("run");
    let file = sandbox.path("run/checkpoints/step-000008/training.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    std::fs::remove_file(sandbox.path("run/checkpoints/step-000006/manifest.json")).unwrap();
    let done = sandbox.train("run", &["--max-steps", "8", "--save-every", "2", "--resume"]).ok();
    for words in ["step-000008` is passed over", "step-000006` is passed over", "resumed from step 4"] {
        assert!(done.stderr.contains(words), "`{words}` is not in\n{}", done.stderr);
    }
    assert!(sandbox.adapter("run") == adapter);
}
