//! Ctrl-C and SIGTERM: a checkpoint, an exit code, a way to go on.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Done, Sandbox, signal, text_rows, wait_for, without_clock};

/// Far more steps than a test waits for, and no checkpoint of its own for long.
const LONG: [&str; 4] = ["--max-steps", "20000", "--save-every", "20000"];

/// A run that has made some steps.
fn running(sandbox: &Sandbox, output: &str, more: &[&str]) -> Child {
    let mut command = sandbox.command(&sandbox.training(output, more));
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let metrics = sandbox.path(output).join("metrics.jsonl");
    wait_for("the third step", || {
        std::fs::read_to_string(&metrics).is_ok_and(|text| text.matches("\"step\":").count() >= 3)
    });
    child
}

fn stopped_by(name: &str, code: i32) {
    let sandbox = Sandbox::new();
    let child = running(&sandbox, "run", &LONG);
    signal(&child, name);
    let start = Instant::now();
    let done = Done::of(child.wait_with_output().unwrap());
    assert_eq!(done.code, Some(code), "{}", done.stderr);
    assert!(start.elapsed() < Duration::from_secs(10));
    let steps = sandbox.checkpoints("run");
    let [step] = steps[..] else { panic!("checkpoints of the steps {steps:?}") };
    for words in [format!("stopped after {step} of 20000"), "go on with:".to_owned(), "--resume".to_owned()] {
        assert!(done.stderr.contains(&words), "`{words}` is not in\n{}", done.stderr);
    }
    assert!(!sandbox.path("run/adapter").exists(), "an adapter that is not done");
    let manifest = sandbox.read(&format!("run/checkpoints/step-{step:06}/manifest.json"));
    assert!(manifest.contains(&format!("\"step\": {step}")), "{manifest}");
}

#[test]
fn ctrl_c_ends_a_run_with_130_and_a_checkpoint() {
    stopped_by("INT", 130);
}

#[test]
fn sigterm_ends_a_run_with_143_and_a_checkpoint() {
    stopped_by("TERM", 143);
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_bytes() {
    let sandbox = Sandbox::new();
    // Slow enough to be caught in the middle: a checkpoint after every step.
    let settings = ["--max-steps", "120", "--save-every", "1", "--lora-dropout", "0.1"];
    sandbox.train("whole", &settings).ok();
    let more = [&settings[..], &["--resume"]].concat();
    for (name, code) in [("INT", 130), ("TERM", 143)] {
        let child = running(&sandbox, name, &settings);
        signal(&child, name);
        assert_eq!(Done::of(child.wait_with_output().unwrap()).code, Some(code));
        sandbox.train(name, &more).ok();
        assert!(sandbox.adapter(name) == sandbox.adapter("whole"), "{name}");
        assert_eq!(sandbox.steps(name).len(), 120);
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    let sandbox = Sandbox::new();
    // One step for some 80 thousand tokens, which takes this build far longer than any machine is busy: a step is an
    // epoch at most, so that accumulation alone does not make it long.
    sandbox.write("rows.jsonl", &text_rows(4000));
    let slow = [
        "--max-steps",
        "2000",
        "--save-every",
        "1",
        "--batch-size",
        "64",
        "--gradient-accumulation-steps",
        "1024",
    ];
    // A signal that arrives before the step has begun stops the run there: then it was sent too early, and once more later.
    let in_the_step = |attempt: u32| {
        let output = format!("run-{attempt}");
        let mut command = sandbox.command(&sandbox.training(&output, &slow));
        let start = Instant::now();
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_for("the run", || sandbox.path(&output).join("run.toml").exists());
        // A machine that took long to come here takes long to begin the step.
        std::thread::sleep(start.elapsed() * attempt / 2);
        signal(&child, "INT");
        std::thread::sleep(Duration::from_millis(50) * attempt);
        child.try_wait().unwrap().is_none().then_some((child, output))
    };
    let (child, output) = (1..=5).find_map(in_the_step).expect("the first signal ended every run");
    let start = Instant::now();
    signal(&child, "INT");
    let status = child.wait_with_output().unwrap().status;
    assert_eq!(status.code(), Some(130));
    assert!(start.elapsed() < Duration::from_secs(2), "it took {:?}", start.elapsed());
    assert_eq!(sandbox.checkpoints(&output), Vec::<u64>::new(), "the step was finished after all");
}

/// Evaluations of seconds, at the steps 0, 2 and 4, of which the last two are the run's own checkpoints.
const SLOWLY_EVALUATED: [&str; 14] = [
    "--max-steps",
    "4",
    "--eval-dataset",
    "held_out.jsonl",
    "--eval-every",
    "2",
    "--save-every",
    "2",
    "--sample-prompt",
    "Once",
    "--sample-every",
    "2",
    "--sample-max-tokens",
    "3",
];

/// Interrupts a run in the middle of the evaluation that follows `step`.
fn interrupted_in_evaluation(sandbox: &Sandbox, output: &str, step: u64, more: &[&str]) {
    let mut command = sandbox.command(&sandbox.training(output, more));
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let metrics = sandbox.path(output).join("metrics.jsonl");
    let report = format!("{{\"kind\":\"step\",\"step\":{step},");
    wait_for("the step", || {
        std::fs::read_to_string(&metrics).is_ok_and(|text| step == 0 || text.contains(&report))
    });
    std::thread::sleep(Duration::from_millis(100));
    signal(&child, "INT");
    let start = Instant::now();
    let done = Done::of(child.wait_with_output().unwrap());
    assert_eq!(done.code, Some(130), "{}", done.stderr);
    assert!(start.elapsed() < Duration::from_secs(2), "it took {:?}", start.elapsed());
    let evaluated = |record: &Value| record["kind"] == "eval" && record["step"] == step;
    assert!(!sandbox.metrics(output).iter().any(evaluated), "the evaluation was finished after all");
    assert_eq!(sandbox.checkpoints(output).last().copied(), (step > 0).then_some(step));
}

#[test]
fn an_evaluation_that_was_interrupted_is_made_again() {
    let sandbox = Sandbox::new();
    sandbox.write("held_out.jsonl", &text_rows(1200));
    let start = Instant::now();
    sandbox.train("whole", &SLOWLY_EVALUATED).ok();
    assert!(start.elapsed() > Duration::from_millis(900), "the evaluations are too fast to be caught");
    let resumed = [&SLOWLY_EVALUATED[..], &["--resume"]].concat();
    interrupted_in_evaluation(&sandbox, "run", 0, &SLOWLY_EVALUATED);
    // The last one too, after which no step follows.
    for step in [2, 4] {
        interrupted_in_evaluation(&sandbox, "run", step, &resumed);
    }
    sandbox.train("run", &resumed).ok();
    assert!(sandbox.adapter("run") == sandbox.adapter("whole"));
    let (ours, whole) = (without_clock(sandbox.metrics("run")), without_clock(sandbox.metrics("whole")));
    // The first record holds the configuration, which names the output folder.
    assert_eq!(ours[1..], whole[1..]);
    assert_eq!(sandbox.read("run/samples.jsonl"), sandbox.read("whole/samples.jsonl"));
    assert_eq!(sandbox.checkpoints("run"), sandbox.checkpoints("whole"));
    // What is done is not done again.
    let before = sandbox.metrics("run");
    sandbox.train("run", &resumed).ok();
    assert_eq!(sandbox.metrics("run"), before);
}
