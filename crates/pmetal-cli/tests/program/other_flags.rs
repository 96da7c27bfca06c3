//! Every flag of the other commands changes something.

use std::path::Path;

use crate::support::{Sandbox, chat_rows, tree};

#[test]
fn every_flag_of_eval_changes_the_result() {
    let sandbox = Sandbox::new();
    sandbox.train("run", &["--learning-rate", "2e-3", "--max-steps", "12"]).ok();
    sandbox
        .write("other.jsonl", "{\"text\": \"The dog sat on the mat and then it ran away from the cat.\"}\n");
    let score = |more: &[&str]| {
        let usual: &[&str] = &["eval", "--json", "--threads", "1"];
        let mut arguments = [usual, more].concat();
        for pair in [["--dataset", "rows.jsonl"], ["--dtype", "f32"]] {
            if !more.contains(&pair[0]) {
                arguments.extend(pair);
            }
        }
        sandbox.run(&arguments).ok().json()
    };
    let plain = score(&[]);
    assert_eq!(plain["examples"], 24);
    let (loss, perplexity) = (plain["loss"].as_f64().unwrap(), plain["perplexity"].as_f64().unwrap());
    assert!((loss.exp() / perplexity - 1.0).abs() < 1e-9);
    // Were the adapter not applied, the loss would be the base model's.
    assert!(score(&["--lora", "run"])["loss"].as_f64().unwrap() < loss - 0.01);
    assert_ne!(score(&["--dataset", "other.jsonl"])["loss"], plain["loss"]);
    assert_eq!(score(&["--max-examples", "5"])["examples"], 5);
    assert!(score(&["--max-seq-len", "8"])["tokens"].as_u64() < plain["tokens"].as_u64());
    assert_ne!(score(&["--dtype", "bf16"])["loss"], plain["loss"]);
    assert_eq!(score(&["--device", "cpu"])["loss"], plain["loss"]);
    assert_eq!(score(&["--model", "stories260k"])["loss"], plain["loss"]);
    sandbox.run(&["eval", "--model", "nowhere"]).fails(2, &["no model at `nowhere`"]);
    let words = sandbox.run(&["eval", "--dataset", "rows.jsonl", "--max-examples", "2"]).ok().stdout;
    assert!(words.starts_with("loss ") && words.contains("2 examples"), "{words}");
}

#[test]
fn every_flag_of_data_show_changes_what_is_shown() {
    let sandbox = Sandbox::new();
    sandbox.write("chat.jsonl", &chat_rows(6));
    let show = |more: &[&str]| {
        let usual: &[&str] = &["data", "show", "--json"];
        let mut arguments = [usual, more].concat();
        if !more.contains(&"--dataset") {
            arguments.extend(["--dataset", "chat.jsonl"]);
        }
        sandbox.run(&arguments).ok().json_lines()
    };
    let plain = show(&[]);
    assert_eq!((plain.len(), &plain[0]["row"]), (3, &1.into()));
    let trained = |rows: &[serde_json::Value]| rows[0]["trained_tokens"].as_u64().unwrap();
    assert_eq!(show(&["--count", "5"]).len(), 5);
    assert_eq!(show(&["--row", "3"])[0]["row"], 3);
    let (all, last) = (show(&["--train-on", "all"]), show(&["--train-on", "last"]));
    assert!(trained(&last) < trained(&plain) && trained(&plain) < trained(&all));
    let tokens = plain[0]["tokens"].as_u64().unwrap();
    assert_eq!(show(&["--max-seq-len", "30"])[0]["tokens"], 30);
    assert!(tokens > 30);
    let text = show(&["--dataset", "rows.jsonl"]);
    assert!(text[0]["text"].as_str().unwrap().contains("Lily went to the park 0 times."));
    // Labels are ids or -100, and both are there.
    let labels = plain[0]["labels"].as_array().unwrap();
    assert_eq!(labels.len() as u64, tokens);
    let (ids, context) = (plain[0]["ids"].as_array().unwrap(), serde_json::json!(-100));
    assert!(labels.iter().zip(ids).all(|(label, id)| label == id || *label == context));
    assert!(labels.contains(&context) && labels.iter().any(|label| *label != context));
    let arguments = ["data", "show", "--dataset", "chat.jsonl", "--max-seq-len", "30", "--on-long", "error"];
    sandbox.run(&arguments).fails(5, &["30"]);
    sandbox.run(&["data", "show", "--model", "nowhere"]).fails(2, &["no model at `nowhere`"]);
    let words = sandbox.run(&["data", "show", "--dataset", "chat.jsonl", "--count", "1"]).ok();
    assert!(words.stdout.contains("trained |") && words.stdout.contains("context |"), "{}", words.stdout);
}

/// A model's configuration of two small layers.
const CONFIG: &str = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": true}"#;

#[test]
fn every_flag_of_bench_train_changes_the_result() {
    let sandbox = Sandbox::new();
    sandbox.write("config.json", CONFIG);
    sandbox.write("wide.json", &CONFIG.replace("\"vocab_size\": 64", "\"vocab_size\": 96"));
    let bench = |more: &[&str]| {
        let usual: [&[&str]; 6] = [
            &["--config", "config.json"],
            &["--batch-size", "2"],
            &["--max-seq-len", "16"],
            &["--steps", "1"],
            &["--dtype", "f32"],
            &["--threads", "1"],
        ];
        let mut arguments = vec!["bench", "train", "--random-weights", "--json"];
        usual.iter().filter(|pair| !more.contains(&pair[0])).for_each(|pair| arguments.extend(*pair));
        arguments.extend(more);
        sandbox.run(&arguments).ok().json()
    };
    let plain = bench(&[]);
    let peak = |facts: &serde_json::Value| facts["peak_bytes"].as_u64().unwrap();
    assert!(plain["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(bench(&["--config", "wide.json"])["parameters"].as_u64() > plain["parameters"].as_u64());
    assert_eq!(bench(&["--batch-size", "3"])["batch_size"], 3);
    assert_eq!(bench(&["--max-seq-len", "24"])["sequence_length"], 24);
    assert_ne!(bench(&["--steps", "3"])["loss"], plain["loss"]);
    assert!(peak(&bench(&["--lora-r", "64"])) > peak(&plain));
    let full = bench(&["--full"]);
    assert_ne!(full["loss"], plain["loss"]);
    assert!(full["step_flops"].as_f64() > plain["step_flops"].as_f64());
    let (kept, again) = (
        peak(&bench(&["--max-seq-len", "64"])),
        peak(&bench(&["--max-seq-len", "64", "--gradient-checkpointing"])),
    );
    assert!(again < kept);
    assert_eq!(bench(&["--dtype", "bf16"])["dtype"], "bf16");
    assert_eq!(bench(&["--device", "cpu"])["loss"], plain["loss"]);
    assert_eq!(bench(&["--threads", "2"])["threads"], 2);
    sandbox.run(&["bench", "train", "--config", "config.json"]).fails(2, &["--random-weights"]);
    let fp8 = ["bench", "train", "--random-weights", "--config", "config.json", "--base-precision", "fp8"];
    sandbox
        .run(&[&fp8[..], &["--device", "cpu"]].concat())
        .fails(2, &["base_precision fp8 cannot be used", "use base_precision auto"]);
    sandbox.run(&[&fp8[..], &["--full"]].concat()).fails(2, &["no weight is frozen", "use tuning lora"]);
    for (flag, least) in [("--steps", 1), ("--batch-size", 1), ("--max-seq-len", 2), ("--lora-r", 1)] {
        let arguments = ["bench", "train", "--random-weights", "--config", "config.json", flag, "0"];
        sandbox.run(&arguments).fails(2, &[&format!("{flag} is 0, it must be at least {least}")]);
    }
}

fn fixture(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name).display().to_string()
}

#[test]
fn every_flag_of_verify_changes_the_result() {
    let sandbox = Sandbox::new();
    let (first, second) = (fixture("llama2"), fixture("mistral-window"));
    let plain = sandbox.run(&["verify", &first, &second]).ok();
    assert!(plain.stdout.contains("(worst of ") && plain.stderr.contains("2 of 2 fixtures agree"));
    let all = sandbox.run(&["verify", &first, &second, "--all", "--device", "cpu"]).ok();
    assert!(all.stdout.lines().count() > 2 * plain.stdout.lines().count());
    let facts = sandbox.run(&["verify", &first, "--json"]).ok().json();
    assert_eq!(facts["passed"], true);
    let error = |facts: &serde_json::Value| {
        let comparisons = facts["comparisons"].as_array().unwrap();
        comparisons.iter().find(|c| c["quantity"] == "logits").unwrap()["relative_error"].as_f64().unwrap()
    };
    let narrow = sandbox.run(&["verify", &first, "--json", "--dtype", "bf16"]).ok().json();
    assert!(error(&narrow) > 10.0 * error(&facts));
}

#[test]
fn a_missed_number_is_a_failure() {
    let sandbox = Sandbox::new();
    for (name, _) in tree(Path::new(&fixture("llama2"))) {
        let target = sandbox.path("broken").join(&name);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(Path::new(&fixture("llama2")).join(&name), target).unwrap();
    }
    let file = sandbox.path("broken/expected.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let start = 8 + header + json["logits"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[start..start + 4].copy_from_slice(&77.0_f32.to_le_bytes());
    std::fs::write(&file, bytes).unwrap();
    let done = sandbox.run(&["verify", &fixture("llama2"), "broken"]);
    assert_eq!(done.code, Some(1));
    assert!(
        done.stdout.contains("MISSED") && done.stderr.contains("1 of 2 fixtures agree"),
        "{}",
        done.stderr
    );
    let done = sandbox.run(&["verify", "nowhere", "--json"]);
    assert_eq!((done.code, &done.json()["passed"]), (Some(1), &false.into()));
}

#[test]
fn every_flag_of_fuse_does_something() {
    let sandbox = Sandbox::new();
    sandbox.train("run", &["--learning-rate", "2e-3", "--max-steps", "12"]).ok();
    let report = sandbox.run(&["fuse", "--lora", "run", "--output", "merged", "--json"]).ok().json();
    assert!(report["changed_tensors"].as_u64().unwrap() > 0);
    let loss = |more: &[&str]| {
        let arguments = [&["eval", "--dataset", "rows.jsonl", "--dtype", "f32", "--json"], more].concat();
        sandbox.run(&arguments).ok().json()["loss"].as_f64().unwrap()
    };
    let (merged, adapted, base) = (loss(&["--model", "merged"]), loss(&["--lora", "run"]), loss(&[]));
    assert!((merged - adapted).abs() < 1e-4 && merged < base - 0.01, "{merged}, {adapted}, {base}");
    let again = ["fuse", "--lora", "run", "--output", "merged"];
    sandbox.run(&again).fails(2, &["`merged` exists already"]);
    let named = ["fuse", "--lora", "run", "--model", "stories260k", "--output", "named"];
    assert!(sandbox.run(&named).ok().stdout.contains("into named"));
    assert_eq!(tree(&sandbox.path("merged")), tree(&sandbox.path("named")));
    sandbox.run(&["fuse", "--lora", "run", "--model", "nowhere", "--output", "x"]).fails(2, &["nowhere"]);
}

#[test]
fn doctor_prints_facts() {
    let sandbox = Sandbox::new();
    let facts = sandbox.run(&["doctor", "--json", "--threads", "2"]).ok().json();
    assert_eq!(facts["threads"], "2");
    assert!(!facts["instructions"].as_str().unwrap().is_empty());
    let tests = facts["self_test"].as_array().unwrap();
    assert!(tests.len() >= 20, "{tests:?}");
    assert!(tests.iter().all(|test| test["passed"] == true), "{tests:?}");
    // The processor's own instructions, which round to bf16, are not what they are compared with.
    assert!(tests.iter().any(|test| test["largest_error"].as_f64().unwrap() > 1e-4), "{tests:?}");
    let text = sandbox.run(&["doctor"]).ok().stdout;
    for words in ["instructions", "optimizer", "attention", "ok"] {
        assert!(text.contains(words), "{words} is not in\n{text}");
    }
}

#[test]
fn every_flag_of_bench_infer_changes_the_result() {
    let sandbox = Sandbox::new();
    sandbox.write("config.json", CONFIG);
    sandbox.write("wide.json", &CONFIG.replace("\"vocab_size\": 64", "\"vocab_size\": 96"));
    let bench = |more: &[&str]| {
        let usual: [&[&str]; 5] = [
            &["--config", "config.json"],
            &["--prompt-tokens", "7"],
            &["--new-tokens", "12"],
            &["--rounds", "1"],
            &["--dtype", "f32"],
        ];
        let mut arguments = vec!["bench", "infer", "--random-weights", "--json", "--device", "cpu"];
        usual.iter().filter(|pair| !more.contains(&pair[0])).for_each(|pair| arguments.extend(*pair));
        arguments.extend(more);
        sandbox.run(&arguments).ok().json()
    };
    let plain = bench(&[]);
    assert!(plain["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(plain["share_of_bandwidth"].as_f64().unwrap() > 0.0);
    let bytes = |facts: &serde_json::Value| facts["weight_bytes_per_token"].as_u64().unwrap();
    assert!(bytes(&bench(&["--config", "wide.json"])) > bytes(&plain));
    // Of experts, those that a token goes to.
    let mixtral = include_str!("../../../../fixtures/mixtral/config.json");
    sandbox.write("two.json", mixtral);
    sandbox.write("one.json", &mixtral.replace("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 1"));
    let [one, two] = ["one.json", "two.json"].map(|config| bytes(&bench(&["--config", config])));
    assert!(one < two, "{one} and {two} bytes");
    assert_eq!(bench(&["--prompt-tokens", "9"])["prompt_tokens"], 9);
    assert_eq!(bench(&["--new-tokens", "3"])["new_tokens"], 3);
    assert_eq!(bench(&["--rounds", "3"])["last_token"], plain["last_token"]);
    assert_eq!(bench(&["--dtype", "bf16"])["dtype"], "bf16");
    // What only a GPU can show the effect of.
    assert_eq!(bench(&["--no-cuda-graph"])["last_token"], plain["last_token"]);
    let warm = bench(&["--temperature", "9"]);
    assert_ne!(warm["last_token"], plain["last_token"]);
    for cut in [["--top-k", "1"], ["--top-p", "0"]] {
        let cold = bench(&[&cut[..], &["--temperature", "9"]].concat());
        assert_eq!(cold["last_token"], plain["last_token"], "{cut:?}");
    }
    sandbox.run(&["bench", "infer", "--config", "config.json"]).fails(2, &["--random-weights"]);
    for (flag, least) in [("--prompt-tokens", 1), ("--new-tokens", 2), ("--rounds", 1)] {
        let arguments = ["bench", "infer", "--random-weights", "--config", "config.json", flag, "0"];
        sandbox.run(&arguments).fails(2, &[&format!("{flag} is 0, it must be at least {least}")]);
    }
}
