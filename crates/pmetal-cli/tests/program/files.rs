//! What a run leaves in its folder.

use crate::support::{Sandbox, tree};

#[test]
fn a_run_leaves_metrics_a_picture_a_card_and_an_adapter() {
    let sandbox = Sandbox::new();
    sandbox.train("run", &["--eval-fraction", "0.2", "--save-every", "3", "--seed", "5"]).ok();
    let records = sandbox.metrics("run");
    assert_eq!(records[0]["kind"], "header");
    assert_eq!(records[0]["config"]["seed"], 5);
    let steps = sandbox.steps("run");
    assert_eq!(
        steps.iter().map(|step| step["step"].as_u64().unwrap()).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5, 6]
    );
    for step in &steps {
        for name in ["loss", "lr", "grad_norm", "tokens_per_second"] {
            let value = step[name].as_f64().unwrap();
            assert!(value.is_finite() && value >= 0.0, "{name} is {value}");
        }
    }
    assert!(steps.iter().any(|step| step["lr"].as_f64().unwrap() > 0.0));
    let evaluations = records.iter().filter(|record| record["kind"] == "eval");
    assert!(evaluations.count() >= 2);
    let picture = sandbox.read("run/loss.svg");
    assert!(picture.starts_with("<svg") || picture.starts_with("<?xml"), "{picture:.60}");
    is_xml(&picture);
    let names: Vec<String> = tree(&sandbox.path("run")).into_iter().map(|(name, _)| name).collect();
    let expected = [
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "checkpoints/step-000003/manifest.json",
        "env.json",
        "loss.svg",
        "metrics.jsonl",
        "run.toml",
    ];
    for name in expected {
        assert!(names.iter().any(|found| found == name), "{name} is not in {names:?}");
    }
    let card = sandbox.read("run/adapter/README.md");
    assert!(card.contains("base_model: stories260k") && card.contains("seed = 5"), "{card}");
}

/// Tags are closed in the order in which they were opened, and text holds no bare `<` or `&`.
fn is_xml(text: &str) {
    let mut open = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find('<') {
        let before = &rest[..start];
        for (place, _) in before.match_indices('&') {
            let entity = &before[place..];
            assert!(
                entity.starts_with("&amp;")
                    || entity.starts_with("&lt;")
                    || entity.starts_with("&gt;")
                    || entity.starts_with("&quot;")
                    || entity.starts_with("&apos;")
                    || entity.starts_with("&#"),
                "{entity}"
            );
        }
        let end = rest[start..].find('>').expect("a tag without its end") + start;
        let tag = &rest[start + 1..end];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name.to_owned()));
        } else if !tag.ends_with('/') && !tag.starts_with(['?', '!']) {
            open.push(tag.split_whitespace().next().unwrap().to_owned());
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty(), "{open:?} are not closed");
}

#[test]
fn names_in_the_picture_are_escaped() {
    let sandbox = Sandbox::new();
    sandbox.write("a<b>&c.jsonl", &crate::support::text_rows(8));
    sandbox.train("run", &["--max-steps", "1", "--dataset", "a<b>&c.jsonl"]).ok();
    is_xml(&sandbox.read("run/loss.svg"));
}

#[test]
fn run_toml_repeats_the_run() {
    let sandbox = Sandbox::new();
    let settings = [
        "--learning-rate",
        "3e-3",
        "--lora-dropout",
        "0.1",
        "--warmup-steps",
        "2",
        "--sample-prompt",
        "A \"b\"",
    ];
    sandbox.train("first", &settings).ok();
    let done = sandbox.run(&["train", "first/run.toml", "--output", "second"]).ok();
    assert!(!done.stderr.contains("no effect"), "{}", done.stderr);
    assert!(sandbox.adapter("first") == sandbox.adapter("second"));
    let config = |output| {
        let mut config = sandbox.metrics(output)[0]["config"].clone();
        config.as_object_mut().unwrap().remove("output");
        config
    };
    assert_eq!(config("first"), config("second"));
}

#[test]
fn automatic_values_are_written_down() {
    let sandbox = Sandbox::new();
    let arguments =
        ["train", "--model", "stories260k", "--dataset", "rows.jsonl", "--output", "run", "--max-steps", "1"];
    let done = sandbox.run(&arguments).ok();
    assert!(done.stderr.contains("(automatic)"), "{}", done.stderr);
    let text = sandbox.read("run/run.toml");
    for name in ["batch_size", "max_seq_len"] {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(line.contains("# automatic") && !line.contains("= 0 "), "{line}");
    }
}

#[test]
fn full_training_leaves_a_model_that_runs() {
    let sandbox = Sandbox::new();
    sandbox.train("run", &["--tuning", "full", "--max-steps", "3", "--learning-rate", "1e-3"]).ok();
    let loss = |model: &str| {
        let arguments = ["eval", "--model", model, "--dataset", "rows.jsonl", "--dtype", "f32", "--json"];
        sandbox.run(&arguments).ok().json()["loss"].as_f64().unwrap()
    };
    assert!(loss("run/model") < loss("stories260k"));
}
