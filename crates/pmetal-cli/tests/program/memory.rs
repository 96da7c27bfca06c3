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
    let configurations: [(&str, &[&str]); 5] = [
        ("small", &["--max-steps", "2"]),
        ("large", &["--max-steps", "2", "--batch-size", "8", "--max-seq-len", "128", "--lora-r", "16"]),
        ("bf16", &["--max-steps", "2", "--batch-size", "8", "--max-seq-len", "128", "--dtype", "bf16"]),
        (
            "all kept",
            &[
                "--max-steps",
                "2",
                "--batch-size",
                "8",
                "--max-seq-len",
                "128",
                "--gradient-checkpointing=none",
            ],
        ),
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
fn every_level_of_checkpointing_takes_less_memory_and_leaves_the_bytes_alone() {
    let sandbox = Sandbox::new();
    let settings = ["--max-steps", "3", "--lora-dropout", "0.2", "--max-seq-len", "64", "--batch-size", "4"];
    let peak = |level: &str| {
        let flag = format!("--gradient-checkpointing={level}");
        let flag = if level == "on" { "--gradient-checkpointing" } else { &flag };
        let more = [&settings[..], &[flag]].concat();
        sandbox.train(level, &more).ok();
        assert!(sandbox.adapter(level) == sandbox.adapter("none"), "{level}");
        sandbox.steps(level).last().unwrap()["peak_bytes"].as_u64().unwrap()
    };
    let [none, cheap, full] = ["none", "cheap", "full"].map(peak);
    assert!(cheap < none * 95 / 100 && full < cheap * 9 / 10, "{none}, {cheap} and {full}");
    // Without a level it is the last; files of earlier versions say true or false.
    assert_eq!([peak("on"), peak("true"), peak("false")], [full, full, none]);
    sandbox.write("old.toml", "gradient_checkpointing = true\n");
    sandbox.train("old", &[&settings[..], &["old.toml"]].concat()).ok();
    assert!(sandbox.read("old/run.toml").contains("gradient_checkpointing = \"full\""));
    let words = "needs one of none, cheap, full (true = full, false = none), found \"some\"";
    sandbox.train("out", &["--gradient-checkpointing=some"]).fails(2, &[words]);
}

#[test]
fn offloading_without_effect_says_so() {
    let sandbox = Sandbox::new();
    let settings = ["--max-steps", "1", "--offload-activations"];
    let words = "`offload_activations` has no effect because `gradient_checkpointing` is not \"full\"";
    let done = sandbox.train("plain", &settings).ok();
    assert!(done.stderr.contains(words), "{}", done.stderr);
    let more = [&settings[..], &["--gradient-checkpointing", "--device", "cpu"]].concat();
    let done = sandbox.train("cpu", &more).ok();
    assert!(done.stderr.contains("`offload_activations` has no effect because `device` is \"cpu\""));
}

/// What advice says that a change saves.
fn saved(line: &str) -> f64 {
    let (_, rest) = line.split_once("about ").unwrap();
    let mut words = rest.split(' ');
    let number: f64 = words.next().unwrap().parse().unwrap();
    let unit = words.next().unwrap();
    number * [("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)].iter().find(|pair| pair.0 == unit).unwrap().1
}

#[test]
fn a_run_without_room_tells_what_it_holds_and_what_would_help() {
    let sandbox = Sandbox::new();
    sandbox.write("rows.jsonl", &crate::support::text_rows(120));
    let common = ["--max-steps", "4", "--save-every", "2", "--max-seq-len", "128"];
    let settings = [&common[..], &["--batch-size", "8"]].concat();
    sandbox.train("whole", &settings).ok();
    sandbox.train("run", &settings).ok();
    std::fs::remove_dir_all(sandbox.path("run/checkpoints/step-000004")).unwrap();
    let peak = |output: &str| {
        let steps = sandbox.steps(output);
        steps.iter().map(|step| step["peak_bytes"].as_f64().unwrap()).fold(0.0, f64::max)
    };
    let limit = |part: f64| format!("--memory-limit-gib={}", part * peak("whole") / (1_u64 << 30) as f64);
    let more = [&settings[..], &["--resume"]].concat();

    // Whatever part is missing, the checkpoint stays, and without the limit the run ends as if nothing had been.
    for part in [0.9, 0.7, 0.4] {
        let done = sandbox.train("run", &[&more[..], &[&limit(part)]].concat());
        let done = done.fails(4, &["error: out of memory: ", "at the peak", "`memory_limit_gib` allows "]);
        assert!(done.stderr.contains("resumed from step 2"), "{}", done.stderr);
        assert_eq!(sandbox.checkpoints("run"), [2]);
    }
    let stderr = sandbox.train("run", &[&more[..], &[&limit(0.7)]].concat()).stderr;
    let in_table = |name: &str| stderr.lines().any(|line| line.starts_with(name));
    assert!(
        ["weights", "parameters", "optimizer", "activations", "in all", "asked for: "]
            .into_iter()
            .all(in_table),
        "{stderr}"
    );
    let advice: Vec<&str> = stderr.lines().filter(|line| line.contains(": about ")).collect();
    assert_eq!(advice.len(), 3, "{stderr}");
    let find = |word: &str| *advice.iter().find(|line| line.contains(word)).unwrap();
    assert!(find("`gradient_checkpointing = \"full\"`").ends_with("; --resume goes on with it"));
    assert!(!find("`batch_size = 4` with `gradient_accumulation_steps = 2`").contains("--resume"));
    find("`max_seq_len = 64`");

    // What is promised is what is saved, and what is in force is not promised again.
    sandbox.train("full", &[&settings[..], &["--gradient-checkpointing"]].concat()).ok();
    let half = ["--batch-size", "4", "--gradient-accumulation-steps", "2"];
    sandbox.train("half", &[&common[..], &half].concat()).ok();
    for (line, output) in [(find("checkpointing"), "full"), (find("batch_size"), "half")] {
        let (promised, measured) = (saved(line), peak("whole") - peak(output));
        println!("{output}: {promised} promised, {measured} measured");
        assert!(
            (promised / measured - 1.0).abs() < 0.25,
            "{output}: {promised} promised, {measured} measured"
        );
    }
    let less = format!("--memory-limit-gib={}", 0.5 * peak("full") / (1_u64 << 30) as f64);
    let done = sandbox.train("tight", &[&settings[..], &["--gradient-checkpointing", &less]].concat());
    let done = done.fails(4, &["`batch_size = 4`", "`max_seq_len = 64`"]);
    assert!(!done.stderr.contains("`gradient_checkpointing"), "{}", done.stderr);

    let fits = sandbox.train("run", &[&more[..], &["--gradient-checkpointing", &limit(0.9)]].concat()).ok();
    assert!(fits.stderr.contains("resumed from step 2"));
    assert!(sandbox.adapter("run") == sandbox.adapter("whole"));
}
