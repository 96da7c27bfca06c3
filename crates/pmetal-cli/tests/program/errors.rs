//! What goes wrong is named, has the right exit code, and harms nothing.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{Done, Sandbox, chat_rows, text_rows, wait_for};

#[test]
fn without_arguments_the_program_prints_help() {
    let done = Sandbox::new().run(&[]);
    assert_eq!(done.code, Some(2));
    for words in ["Usage: pmetal", "train", "infer", "fuse", "eval", "verify", "data", "doctor", "bench"] {
        assert!(done.stderr.contains(words), "`{words}` is not in\n{}", done.stderr);
    }
    let help = Sandbox::new().run(&["--help"]).ok();
    assert!(help.stdout.contains("Usage: pmetal") && help.stderr.is_empty());
    assert!(Sandbox::new().run(&["--version"]).ok().stdout.starts_with("pmetal 0."));
}

#[test]
fn a_model_without_room_ends_with_4_and_what_was_asked_for() {
    let sandbox = Sandbox::new();
    // An embedding of 9 PB: more than a process can address, so that no system pretends to have it.
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 1 << 20, "intermediate_size": 1, "num_hidden_layers": 1,
        "num_attention_heads": 1, "head_dim": 2, "vocab_size": 2_147_483_647_u64, "tie_word_embeddings": true,
    });
    sandbox.write("config.json", &config.to_string());
    let bench = ["bench", "train", "--random-weights", "--config", "config.json"];
    let requested = 2_147_483_647_u64 * (1 << 20) * 4;
    let kinds = [
        (&[][..], "weights", "hint: the weights alone"),
        (&["--full"], "parameters", "hint: what is trained"),
    ];
    for (more, what, hint) in kinds {
        let done = sandbox.run(&[&bench[..], more].concat());
        let words = format!("out of memory: {requested} bytes for {what} on top of ");
        done.fails(4, &[&words, "the device has no more", hint]);
    }
}

#[test]
fn datasets_that_are_missing_empty_or_broken_are_named() {
    let sandbox = Sandbox::new();
    sandbox.write("empty.jsonl", "");
    sandbox.write("broken.jsonl", &format!("{}{{\"text\": oops}}\n", text_rows(2)));
    sandbox.write("latin.jsonl", "{\"texts\": 3}\n");
    let tries: [(&str, i32, &[&str]); 4] = [
        ("nowhere.jsonl", 2, &["there is no dataset at `nowhere.jsonl`"]),
        ("empty.jsonl", 5, &["no rows"]),
        ("broken.jsonl", 5, &["broken.jsonl`, line 3, column 10"]),
        ("latin.jsonl", 5, &["latin.jsonl", "texts"]),
    ];
    for (dataset, code, words) in tries {
        sandbox.train("out", &["--dataset", dataset]).fails(code, words);
    }
    assert!(!sandbox.path("out").exists(), "a refused run left a folder");
    sandbox.train("out", &["--eval-dataset", "nowhere.jsonl"]).fails(2, &["nowhere.jsonl"]);
    sandbox.train("out", &["--eval-dataset", "broken.jsonl"]).fails(5, &["broken.jsonl`, line 3"]);
    sandbox.run(&["eval", "--dataset", "nowhere.jsonl"]).fails(2, &["nowhere.jsonl"]);
    sandbox.run(&["data", "show", "--dataset", "broken.jsonl"]).fails(5, &["line 3, column 10", "hint: "]);
}

#[test]
fn a_dataset_in_which_nothing_is_trained_is_rejected() {
    let sandbox = Sandbox::new();
    // What is answered lies behind the cut of every row.
    let filler = "word ".repeat(80);
    sandbox.write("chat.jsonl", &chat_rows(4).replace("Hi ", &filler));
    let done = sandbox.train("out", &["--dataset", "chat.jsonl"]).fails(5, &["trained", "hint: "]);
    assert!(done.stderr.contains("data show"), "{}", done.stderr);
}

#[test]
fn models_that_are_missing_or_incomplete_are_named() {
    let sandbox = Sandbox::new();
    sandbox.train("out", &["--model", "nowhere"]).fails(2, &["there is no model at `nowhere`"]);
    std::fs::create_dir(sandbox.path("hollow")).unwrap();
    sandbox.train("out", &["--model", "hollow"]).fails(1, &["hollow"]);
    // A fixture has no tokenizer.
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/llama2");
    let fixture = fixture.display().to_string();
    sandbox.train("out", &["--model", &fixture]).fails(1, &["tokenizer"]);
    sandbox.run(&["infer", "--model", &fixture]).fails(1, &["tokenizer", "hint: "]);
    sandbox.run(&["infer", "--model", "nowhere"]).fails(2, &["nowhere", "hint: --model takes"]);
    assert!(!sandbox.path("out").exists());
}

#[test]
fn a_folder_that_holds_a_run_is_left_alone() {
    let sandbox = Sandbox::new();
    sandbox.train("run", &["--max-steps", "2"]).ok();
    let before = sandbox.adapter("run");
    let words = ["`run` holds a run already", "hint: ", "--resume", "--overwrite"];
    sandbox.train("run", &["--max-steps", "2", "--seed", "9"]).fails(2, &words);
    assert!(sandbox.adapter("run") == before);
}

#[test]
fn an_output_folder_that_cannot_be_made_is_named() {
    let sandbox = Sandbox::new();
    sandbox.train("rows.jsonl/out", &[]).fails(1, &["cannot create `rows.jsonl/out`"]);
    std::fs::create_dir(sandbox.path("sealed")).unwrap();
    Command::new("chmod").args(["555", "sealed"]).current_dir(sandbox.path("")).status().unwrap();
    if std::fs::write(sandbox.path("sealed/probe"), "").is_ok() {
        println!("skipped: a folder that is read-only, since this user may write everywhere");
        return;
    }
    sandbox.train("sealed/out", &[]).fails(1, &["cannot create `sealed/out`", "denied"]);
}

#[test]
fn a_run_that_diverges_stops_before_the_update() {
    let sandbox = Sandbox::new();
    let wild = [
        "--tuning",
        "full",
        "--learning-rate",
        "1000",
        "--warmup-ratio",
        "0",
        "--max-grad-norm",
        "0",
        "--max-steps",
        "60",
        "--save-every",
        "1",
        "--beta2",
        "0",
        "--weight-decay",
        "1000",
    ];
    let done = sandbox.train("run", &wild).fails(3, &["error: step ", "row", "hint: lower --learning-rate"]);
    let words = done.stderr.lines().find(|line| line.starts_with("error: step ")).unwrap();
    let step: u64 = words["error: step ".len()..].split(':').next().unwrap().parse().unwrap();
    // The checkpoint of the step before is whole: resuming starts there, and fails at the same step.
    assert_eq!(sandbox.checkpoints("run").last(), Some(&(step - 1)));
    let more = [&wild[..], &["--resume"]].concat();
    let again = sandbox.train("run", &more).fails(3, &[words]);
    assert!(again.stderr.contains(&format!("resumed from step {}", step - 1)), "{}", again.stderr);
    assert_eq!(sandbox.steps("run").len() as u64, step - 1);
}

#[test]
fn a_second_process_on_the_same_folder_is_refused() {
    let sandbox = Sandbox::new();
    let long = ["--max-steps", "100000", "--save-every", "100000"];
    let mut command = sandbox.command(&sandbox.training("run", &long));
    let mut first = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("the first run", || sandbox.path("run/run.toml").exists());
    let more = [&long[..], &["--resume"]].concat();
    let pid = format!("process {}", first.id());
    let second = sandbox.train("run", &more);
    first.kill().unwrap();
    first.wait().unwrap();
    second.fails(1, &["run/lock", &pid, "already working in this folder"]);
    // The lock of a process that died is free.
    sandbox.train("run", &["--max-steps", "2", "--overwrite"]).ok();
}

/// Runs the program under a shell that first limits the size of files.
fn limited(sandbox: &Sandbox, blocks: u32, arguments: &[&str]) -> Done {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let mut command = Command::new("sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_pmetal")]).args(arguments);
    Done::of(command.current_dir(sandbox.path("")).stdin(Stdio::null()).output().unwrap())
}

#[test]
fn a_checkpoint_that_cannot_be_written_leaves_the_one_before() {
    let sandbox = Sandbox::new();
    let settings = ["--max-steps", "8", "--save-every", "4", "--lora-r", "32"];
    sandbox.train("whole", &settings).ok();
    sandbox.train("run", &settings).ok();
    std::fs::remove_dir_all(sandbox.path("run/checkpoints/step-000008")).unwrap();
    let more = [&settings[..], &["--resume"]].concat();
    let arguments = sandbox.training("run", &more);
    // 1.25 MB: enough for every file but the tensors of a checkpoint.
    let done = limited(&sandbox, 2560, &arguments)
        .fails(1, &["cannot write `run/checkpoints/step-000008/training.safetensors`", "caused by:"]);
    assert!(done.stderr.contains("resumed from step 4"), "{}", done.stderr);
    assert_eq!(sandbox.checkpoints("run"), [4]);
    sandbox.run(&arguments).ok();
    assert!(sandbox.adapter("run") == sandbox.adapter("whole"));
}

#[test]
fn a_full_disk_is_named_with_bytes_and_keeps_the_last_checkpoint() {
    let sandbox = Sandbox::new();
    std::fs::create_dir(sandbox.path("disk")).unwrap();
    // A file system of its own, in a mount namespace of its own, copied out before it goes.
    let script = "mount -t tmpfs -o size=1500k tmpfs disk 2>/dev/null || exit 99; \"$0\" \"$@\"; code=$?; \
                  cp -r disk kept; exit $code";
    let settings = ["--max-steps", "40", "--save-every", "1", "--save-keep", "40"];
    let arguments = sandbox.training("disk/run", &settings);
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", script, env!("CARGO_BIN_EXE_pmetal")]).args(&arguments);
    let output = command.current_dir(sandbox.path("")).stdin(Stdio::null()).output();
    let Ok(output) = output.map(Done::of) else {
        println!("skipped: a full disk, since there is no `unshare`");
        return;
    };
    if output.code == Some(99) || !output.stderr.contains("error: ") {
        println!("skipped: a full disk, since nothing may be mounted here");
        return;
    }
    output.fails(1, &["disk/run/checkpoints/step-", " needs ", " bytes, its disk has ", " bytes free"]);
    let last = sandbox.checkpoints("kept/run").last().copied().unwrap();
    assert!(last >= 1);
    // What was kept is whole: on a larger disk the run goes on to the same bytes.
    sandbox.train("whole", &settings).ok();
    let more = [&settings[..], &["--resume"]].concat();
    let done = sandbox.train("kept/run", &more).ok();
    assert!(done.stderr.contains(&format!("resumed from step {last}")), "{}", done.stderr);
    assert!(sandbox.adapter("kept/run") == sandbox.adapter("whole"));
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let sandbox = Sandbox::new();
    let training = sandbox.training("run", &["--json", "--max-steps", "3"]);
    let commands: [&[&str]; 4] = [
        &["data", "show", "--count", "100000", "--json"],
        &["infer", "--prompt", "Tom", "--max-tokens", "5"],
        &["--help"],
        &training,
    ];
    for arguments in commands {
        let mut child =
            sandbox.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let status = child.wait().unwrap();
        assert!(!stderr.contains("panicked"), "{arguments:?}: {stderr}");
        assert!([Some(0), Some(141)].contains(&status.code()), "{arguments:?}: {status}");
    }
}

/// Runs the program on a terminal of its own, with more variables; nothing where that cannot be done.
fn on_a_terminal(sandbox: &Sandbox, line: &str) -> Option<String> {
    let mut command = Command::new("script");
    command.args(["-qec", &format!("{line} {}", env!("CARGO_BIN_EXE_pmetal")), "/dev/null"]);
    command.current_dir(sandbox.path("")).stdin(Stdio::null()).env("TERM", "xterm").env_remove("NO_COLOR");
    Some(String::from_utf8_lossy(&command.output().ok()?.stdout).into_owned())
}

#[test]
fn no_color_is_honoured() {
    let sandbox = Sandbox::new();
    let run = |variables: &str, arguments: &str| {
        let program = format!("{variables} run() {{ \"$1\" {arguments}; }}; run");
        on_a_terminal(&sandbox, &program)
    };
    let Some(coloured) = run("", "eval --model nowhere") else {
        println!("skipped: colours, since there is no `script`");
        return;
    };
    assert!(coloured.contains("\u{1b}[1;31merror:"), "{coloured:?}");
    for arguments in ["eval --model nowhere", "trian", "data show --dataset rows.jsonl", "--help"] {
        let plain = run("export NO_COLOR=1;", arguments).unwrap();
        assert!(!plain.contains('\u{1b}'), "{arguments}: {plain:?}");
    }
    // Without a terminal there is no colour either.
    let done = sandbox.run(&["eval", "--model", "nowhere"]);
    assert!(!done.stderr.contains('\u{1b}'));
}
