//! Every setting of a training run changes something, and every mistake names itself.

use pmetal::trainer::config::FIELDS;
use serde_json::Value;

use crate::support::{Done, Sandbox, chat_rows, text_rows};

/// What a flag does to a run, compared with the same run without it.
enum Effect {
    /// The adapter has other bytes.
    Adapter,
    /// The adapter has the same bytes, and the folders of both runs differ as the function says.
    Folder(fn(&Sandbox, plain: &str, changed: &str) -> bool),
    /// The adapter is not comparable, and the folder of the changed run is as the function says.
    Result(fn(&Sandbox, changed: &str) -> bool),
    /// The run is refused with an exit code and words.
    Refused(i32, &'static [&'static str]),
}

/// One setting: what both runs get beside the usual, what only the second gets, and what that does.
type Case = (&'static str, &'static [&'static str], &'static [&'static str], Effect);

const CHAT: &[&str] = &["--dataset", "chat.jsonl"];
const HELD_OUT: &[&str] = &["--eval-fraction", "0.2"];
const SAMPLED: &[&str] = &["--sample-prompt", "Once", "--sample-max-tokens", "3"];

fn evaluations(sandbox: &Sandbox, output: &str) -> usize {
    sandbox.metrics(output).iter().filter(|record| record["kind"] == "eval").count()
}

fn first_evaluation(sandbox: &Sandbox, output: &str) -> f64 {
    let records = sandbox.metrics(output);
    records.iter().find(|record| record["kind"] == "eval").unwrap()["eval_loss"].as_f64().unwrap()
}

fn samples(sandbox: &Sandbox, output: &str) -> Vec<Value> {
    if !sandbox.path(output).join("samples.jsonl").exists() {
        return Vec::new();
    }
    crate::support::lines_of(&sandbox.read(&format!("{output}/samples.jsonl")))
}

fn peak_bytes(sandbox: &Sandbox, output: &str) -> u64 {
    sandbox.steps(output).iter().map(|step| step["peak_bytes"].as_u64().unwrap()).max().unwrap()
}

fn reports(sandbox: &Sandbox, output: &str) -> usize {
    sandbox.steps(output).len()
}

fn cases() -> Vec<Case> {
    use Effect::{Adapter, Folder, Refused, Result};
    vec![
        ("model", &[], &["--model", "nowhere"], Refused(2, &["no model at `nowhere`"])),
        ("dataset", &[], &["--dataset", "other.jsonl"], Adapter),
        ("output", &[], &["--output", "elsewhere"], Result(|s, _| s.path("elsewhere/adapter").is_dir())),
        ("method", &[], &["--method", "guess"], Refused(2, &["method", "guess", "sft"])),
        (
            "tuning",
            &[],
            &["--tuning", "full"],
            Result(|s, o| s.path(o).join("model/model.safetensors").exists()),
        ),
        ("train_on", CHAT, &["--train-on", "all"], Adapter),
        ("max_seq_len", &[], &["--max-seq-len", "16"], Adapter),
        ("on_long", &["--max-seq-len", "20"], &["--on-long", "drop"], Adapter),
        ("lora_r", &[], &["--lora-r", "3"], Adapter),
        ("lora_alpha", &[], &["--lora-alpha", "7"], Adapter),
        ("lora_dropout", &[], &["--lora-dropout", "0.3"], Adapter),
        ("lora_rslora", &[], &["--lora-rslora"], Adapter),
        ("lora_target_modules", &[], &["--lora-target-modules", "q_proj,v_proj"], Adapter),
        ("learning_rate", &[], &["--learning-rate", "1e-3"], Adapter),
        ("schedule", &[], &["--schedule", "linear"], Adapter),
        ("min_lr_ratio", &[], &["--min-lr-ratio", "0.5"], Adapter),
        ("warmup_ratio", &[], &["--warmup-ratio", "0.5"], Adapter),
        ("warmup_steps", &[], &["--warmup-steps", "3"], Adapter),
        ("weight_decay", &[], &["--weight-decay", "0.5"], Adapter),
        ("beta1", &[], &["--beta1", "0.5"], Adapter),
        ("beta2", &[], &["--beta2", "0.9"], Adapter),
        ("eps", &[], &["--eps", "1e-3"], Adapter),
        ("max_grad_norm", &[], &["--max-grad-norm", "0.001"], Adapter),
        ("batch_size", &[], &["--batch-size", "3"], Adapter),
        ("gradient_accumulation_steps", &[], &["--gradient-accumulation-steps", "2"], Adapter),
        (
            "epochs",
            &["--epochs", "1"],
            &["--epochs", "2"],
            Result(|s, o| reports(s, o) > reports(s, "plain")),
        ),
        ("max_steps", &[], &["--max-steps", "3"], Result(|s, o| reports(s, o) == 3)),
        ("packing", &[], &["--packing=false"], Adapter),
        (
            "gradient_checkpointing",
            &[],
            &["--gradient-checkpointing"],
            Folder(|s, plain, changed| peak_bytes(s, changed) < peak_bytes(s, plain)),
        ),
        (
            "offload_activations",
            &["--gradient-checkpointing"],
            &["--offload-activations"],
            Folder(|s, _, o| runs_with(s, o, "offload_activations = true")),
        ),
        (
            "eval_dataset",
            &[],
            &["--eval-dataset", "other.jsonl"],
            Folder(|s, plain, changed| evaluations(s, plain) == 0 && evaluations(s, changed) > 0),
        ),
        ("eval_fraction", &[], &["--eval-fraction", "0.5"], Adapter),
        (
            "eval_max_examples",
            HELD_OUT,
            &["--eval-max-examples", "1"],
            Folder(|s, plain, changed| {
                let losses = [first_evaluation(s, plain), first_evaluation(s, changed)];
                evaluations(s, plain) == evaluations(s, changed) && losses[0] != losses[1]
            }),
        ),
        (
            "eval_every",
            HELD_OUT,
            &["--eval-every", "3"],
            Folder(|s, plain, changed| evaluations(s, plain) == 7 && evaluations(s, changed) == 3),
        ),
        ("save_every", &[], &["--save-every", "4"], Folder(|s, _, changed| s.checkpoints(changed) == [4, 6])),
        ("save_keep", &[], &["--save-keep", "2"], Folder(|s, _, changed| s.checkpoints(changed) == [5, 6])),
        ("log_every", &[], &["--log-every", "3"], Folder(|s, _, changed| reports(s, changed) == 2)),
        (
            "sample_prompt",
            &[],
            &["--sample-prompt", "Once", "--sample-max-tokens", "3"],
            Folder(|s, plain, changed| {
                let texts = samples(s, changed);
                samples(s, plain).is_empty() && texts.len() == 7 && texts[0]["prompt"] == "Once"
            }),
        ),
        (
            "sample_every",
            SAMPLED,
            &["--sample-every", "3"],
            Folder(|s, _, changed| samples(s, changed).len() == 3),
        ),
        (
            "sample_max_tokens",
            &["--sample-prompt", "Once"],
            &["--sample-max-tokens", "2"],
            Folder(|s, plain, changed| {
                let length = |output| samples(s, output)[0]["text"].as_str().unwrap().len();
                length(changed) > 0 && length(changed) < length(plain)
            }),
        ),
        ("seed", &[], &["--seed", "1"], Adapter),
        ("dtype", &[], &["--dtype", "bf16"], Adapter),
        (
            "base_precision",
            &[],
            &["--base-precision", "fp8", "--device", "cpu"],
            Refused(2, &["base_precision fp8 cannot be used", "the processor", "use base_precision auto"]),
        ),
        ("device", &[], &["--device", "metal"], Refused(2, &["device `metal`", "only cpu and cuda"])),
        (
            "deterministic",
            &[],
            &["--deterministic"],
            Folder(|s, _, o| runs_with(s, o, "deterministic = true")),
        ),
        (
            "no_cuda_graph",
            &[],
            &["--no-cuda-graph"],
            Folder(|s, _, o| runs_with(s, o, "no_cuda_graph = true")),
        ),
        (
            "memory_limit_gib",
            &[],
            &["--memory-limit-gib", "0.0002"],
            Refused(4, &["out of memory", "hint: "]),
        ),
        (
            "threads",
            &[],
            &["--threads", "2"],
            Folder(|s, _, changed| s.read(&format!("{changed}/env.json")).contains("\"threads\": 2")),
        ),
    ]
}

/// What only a GPU can show the effect of: that the run was configured with it.
fn runs_with(sandbox: &Sandbox, output: &str, line: &str) -> bool {
    sandbox.read(&format!("{output}/run.toml")).contains(line)
}

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.write("other.jsonl", &text_rows(30).replace("park", "shop"));
    sandbox.write("chat.jsonl", &chat_rows(12));
    sandbox
}

/// The part of the settings that one of the tests below tries; they run at the same time.
fn check_part(part: usize) {
    const PARTS: usize = 3;
    let cases = cases();
    for (name, common, changed, effect) in cases.iter().skip(part).step_by(PARTS) {
        let sandbox = sandbox();
        let mut more = common.to_vec();
        if changed[0] == "--epochs" {
            more.clear();
        }
        more.extend(*changed);
        let done = sandbox.train("changed", &more);
        if let Effect::Refused(code, words) = effect {
            done.fails(*code, words);
            continue;
        }
        assert_eq!(done.code, Some(0), "{name}: {}", done.stderr);
        sandbox.train("plain", common).ok();
        let same = |changed: &str| sandbox.adapter("plain") == sandbox.adapter(changed);
        match effect {
            Effect::Adapter => assert!(!same("changed"), "{name} changes nothing"),
            Effect::Folder(differs) => {
                assert!(same("changed"), "{name} changes the adapter");
                assert!(differs(&sandbox, "plain", "changed"), "{name}");
            }
            Effect::Result(is_so) => assert!(is_so(&sandbox, "changed"), "{name}"),
            Effect::Refused(..) => {}
        }
    }
}

#[test]
fn every_setting_changes_something_part_1() {
    check_part(0);
}

#[test]
fn every_setting_changes_something_part_2() {
    check_part(1);
}

#[test]
fn every_setting_changes_something_part_3() {
    check_part(2);
}

#[test]
fn no_setting_is_without_a_test() {
    let tested: Vec<&str> = cases().iter().map(|case| case.0).collect();
    let all: Vec<&str> = FIELDS.iter().map(|field| field.name).collect();
    assert_eq!(tested, all);
}

#[test]
fn every_setting_is_a_flag_with_a_line_of_help() {
    let help = Sandbox::new().run(&["train", "--help"]).ok().stdout;
    for field in FIELDS {
        let flag = format!("--{}", field.name.replace('_', "-"));
        assert!(help.contains(&flag), "{flag}");
        let words: String = field.help.split_whitespace().take(3).collect::<Vec<_>>().join(" ");
        let squeezed = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(squeezed.contains(words.trim_end_matches('.')), "{flag}: {words}");
    }
}

#[test]
fn flags_may_be_spelled_as_other_programs_do() {
    let sandbox = Sandbox::new();
    sandbox.train("plain", &["--learning-rate", "1e-3"]).ok();
    sandbox.train("alias", &["--lr", "1e-3"]).ok();
    sandbox.train("underscore", &["--learning_rate", "1e-3"]).ok();
    sandbox.train("set", &["--set", "lr=1e-3"]).ok();
    for output in ["alias", "underscore", "set"] {
        assert!(sandbox.adapter(output) == sandbox.adapter("plain"), "{output}");
    }
}

#[test]
fn a_mistyped_flag_is_refused_with_a_suggestion() {
    let sandbox = Sandbox::new();
    let tries: [(&[&str], &str); 6] = [
        (&["train", "--lerning-rate", "1"], "--learning-rate"),
        (&["train", "--dry-rum"], "--dry-run"),
        (&["infer", "--temprature", "1"], "--temperature"),
        (&["eval", "--modle", "x"], "--model"),
        (&["data", "show", "--rows", "3"], "--row"),
        (&["verify", "--dtype", "bf1", "x"], "bf16"),
    ];
    for (arguments, suggestion) in tries {
        let hint = format!("hint: did you mean `{suggestion}`?");
        sandbox.run(arguments).fails(2, &[arguments.iter().find(|a| a.starts_with("--")).unwrap(), &hint]);
    }
    sandbox.run(&["trian"]).fails(2, &["trian", "hint: did you mean `train`?"]);
}

#[test]
fn a_mistyped_key_is_refused_with_a_suggestion() {
    let sandbox = Sandbox::new();
    sandbox.write("run.toml", "model = \"stories260k\"\ndataset = \"rows.jsonl\"\nlerning_rate = 1e-3\n");
    let words = ["run.toml line 3", "`lerning_rate`", "did you mean `learning_rate`?"];
    sandbox.run(&["train", "run.toml"]).fails(2, &words);
    let words = ["--set", "`lora_rr`", "did you mean `lora_r`?"];
    sandbox.train("out", &["--set", "lora_rr=3"]).fails(2, &words);
    assert!(!sandbox.path("out").exists());
}

#[test]
fn a_bad_value_is_refused_by_name_and_value() {
    let sandbox = Sandbox::new();
    let tries: [(&str, &str, &str); 9] = [
        ("--lora-r", "0", "lora_r"),
        ("--lora-r", "many", "lora_r"),
        ("--learning-rate", "-1", "learning_rate"),
        ("--learning-rate", "nan", "learning_rate"),
        ("--lora-dropout", "1", "lora_dropout"),
        ("--schedule", "zigzag", "schedule"),
        ("--max-steps", "1.5", "max_steps"),
        ("--packing=perhaps", "perhaps", "packing"),
        ("--max-seq-len", "999999", "max_seq_len"),
    ];
    for (flag, value, name) in tries {
        let more = if flag.contains('=') { vec![flag] } else { vec![flag, value] };
        let words = [name, value.trim_start_matches('-')];
        // NaN is spelled by the program.
        let done = sandbox.train("out", &more);
        let done = Done { stderr: done.stderr.replace("NaN", "nan"), ..done };
        done.fails(2, &words);
    }
    assert!(!sandbox.path("out").exists());
}

#[test]
fn all_problems_are_reported_at_once() {
    let sandbox = Sandbox::new();
    let more = ["--lora-r", "0", "--learning-rate", "-1", "--set", "nonsense=1"];
    sandbox.train("out", &more).fails(2, &["3 problems", "lora_r", "learning_rate", "nonsense"]);
}

#[test]
fn overwrite_replaces_a_run_and_nothing_else() {
    let sandbox = Sandbox::new();
    sandbox.train("out", &["--max-steps", "3", "--sample-prompt", "Once", "--sample-max-tokens", "2"]).ok();
    sandbox.write("out/notes.txt", "mine");
    sandbox.train("out", &["--max-steps", "2", "--overwrite"]).ok();
    assert_eq!(sandbox.steps("out").len(), 2);
    assert_eq!(sandbox.checkpoints("out"), [1, 2]);
    assert!(samples(&sandbox, "out").is_empty());
    assert_eq!(sandbox.read("out/notes.txt"), "mine");
    sandbox.train("out", &["--overwrite", "--resume"]).fails(2, &["--overwrite", "--resume"]);
}

#[test]
fn quiet_and_json_say_what_they_should() {
    let sandbox = Sandbox::new();
    let done = sandbox.train("quiet", &["--quiet"]).ok();
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("", ""));
    let done = sandbox.train("plain", &[]).ok();
    assert_eq!(done.stdout, "", "stdout is for data");
    assert!(done.stderr.contains("LoRA r 2") && done.stderr.contains("talk to it"), "{}", done.stderr);
    let done = sandbox.train("json", &["--json"]).ok();
    let events = done.json_lines();
    let count = |kind: &str| events.iter().filter(|event| event["event"] == kind).count();
    assert_eq!((count("step"), count("checkpoint"), count("finished")), (6, 6, 1));
    for field in ["loss", "lr", "grad_norm", "tokens_per_second"] {
        assert!(events.iter().find(|event| event["event"] == "step").unwrap()[field].is_f64(), "{field}");
    }
}

#[test]
fn a_dry_run_writes_nothing() {
    let sandbox = Sandbox::new();
    let done = sandbox.train("out", &["--dry-run"]).ok();
    assert!(done.stdout.contains("memory (estimate)") && done.stdout.contains("in all"), "{}", done.stdout);
    let facts = sandbox.train("out", &["--dry-run", "--json"]).ok().json();
    assert_eq!(facts["total_steps"], 6);
    assert_eq!(facts["config"]["lora_r"], 2);
    assert!(!sandbox.path("out").exists());
}

#[test]
fn a_setting_without_effect_is_remarked() {
    let sandbox = Sandbox::new();
    let done = sandbox.train("out", &["--schedule", "constant", "--min-lr-ratio", "0.3"]).ok();
    assert!(done.stderr.contains("`min_lr_ratio` has no effect because `schedule`"), "{}", done.stderr);
}
