//! A folder of its own for each test, and runs of the program in it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use sha2::{Digest, Sha256};

/// What a finished process left.
#[derive(Debug)]
pub(crate) struct Done {
    /// The exit code; absent when a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    pub(crate) fn of(output: Output) -> Self {
        let text =
            |bytes: Vec<u8>| String::from_utf8(bytes).expect("the program printed bytes that are no text");
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Checks that it succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "stderr:\n{}", self.stderr);
        self
    }

    /// Checks the exit code of a failure, the form that every failure has, and that stderr holds the words.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "stderr:\n{}", self.stderr);
        let error = self.stderr.lines().position(|line| line.starts_with("error: "));
        assert!(error.is_some(), "there is no `error:` in\n{}", self.stderr);
        if let Some(hint) = self.stderr.lines().position(|line| line.starts_with("hint: ")) {
            let before = self.stderr.lines().nth(hint - 1);
            assert_eq!(before, Some(""), "an empty line stands before the hint:\n{}", self.stderr);
        }
        for word in words {
            assert!(self.stderr.contains(word), "`{word}` is not in\n{}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    /// stdout as one JSON value.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}:\n{}", self.stdout))
    }

    /// stdout as JSON lines.
    #[track_caller]
    pub(crate) fn json_lines(&self) -> Vec<Value> {
        lines_of(&self.stdout)
    }
}

#[track_caller]
pub(crate) fn lines_of(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

/// A temporary folder that the program runs in.
pub(crate) struct Sandbox {
    folder: tempfile::TempDir,
}

impl Sandbox {
    pub(crate) fn new() -> Self {
        let sandbox = Self { folder: tempfile::tempdir().unwrap() };
        sandbox.write("rows.jsonl", &text_rows(24));
        sandbox
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        let path = self.path(name);
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pmetal"));
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env_remove("NO_COLOR").env_remove("PMETAL_SIMD");
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Done {
        Done::of(self.command(arguments).output().unwrap())
    }

    /// A run of the smallest training that is one, with more arguments.
    pub(crate) fn train(&self, output: &str, more: &[&str]) -> Done {
        self.run(&self.training(output, more))
    }

    /// The arguments of [`Sandbox::train`]: an argument that is given again replaces the one here.
    pub(crate) fn training<'a>(&self, output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let own = [
            ["--model", "stories260k"],
            ["--dataset", "rows.jsonl"],
            ["--output", output],
            ["--max-steps", "6"],
            ["--max-seq-len", "32"],
            ["--batch-size", "2"],
            ["--eval-fraction", "0"],
            ["--dtype", "f32"],
            ["--lora-r", "2"],
            ["--threads", "1"],
        ];
        let mut arguments = vec!["train"];
        for [flag, value] in own {
            let is_given = |argument: &&str| **argument == *flag || argument.starts_with(&format!("{flag}="));
            if !more.iter().any(is_given) {
                arguments.extend([flag, value]);
            }
        }
        // `--epochs` is for runs that take as many steps as the epochs do.
        if more.contains(&"--epochs") {
            let place = arguments.iter().position(|argument| *argument == "--max-steps").unwrap();
            arguments.drain(place..place + 2);
        }
        arguments.extend(more);
        arguments
    }

    /// The trained adapter of a run.
    pub(crate) fn adapter(&self, output: &str) -> Vec<u8> {
        std::fs::read(self.path(output).join("adapter/adapter_model.safetensors")).unwrap()
    }

    /// The records of `metrics.jsonl`.
    pub(crate) fn metrics(&self, output: &str) -> Vec<Value> {
        lines_of(&self.read(&format!("{output}/metrics.jsonl")))
    }

    /// The `step` records of `metrics.jsonl`.
    pub(crate) fn steps(&self, output: &str) -> Vec<Value> {
        let mut records = self.metrics(output);
        records.retain(|record| record["kind"] == "step");
        records
    }

    /// The steps of which there are checkpoints, in order.
    pub(crate) fn checkpoints(&self, output: &str) -> Vec<u64> {
        let Ok(entries) = std::fs::read_dir(self.path(output).join("checkpoints")) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut steps: Vec<u64> = names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect();
        steps.sort_unstable();
        steps
    }
}

/// Rows of text of unequal lengths, the same ones whenever they are asked for.
pub(crate) fn text_rows(count: usize) -> String {
    let names = ["Lily", "Tom", "Sue", "Ben", "the big red ball"];
    let row = |index: usize| {
        let tail = " She was happy.".repeat(index % 3);
        format!("{{\"text\": \"{} went to the park {index} times.{tail}\"}}\n", names[index % names.len()])
    };
    (0..count).map(row).collect()
}

/// Rows of conversations with two answers each.
pub(crate) fn chat_rows(count: usize) -> String {
    let row = |index: usize| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"Hi {index}\"}}, \
             {{\"role\": \"assistant\", \"content\": \"Hello.\"}}, {{\"role\": \"user\", \"content\": \"Who?\"}}, \
             {{\"role\": \"assistant\", \"content\": \"Tom {index}.\"}}]}}\n"
        )
    };
    (0..count).map(row).collect()
}

/// Every file below a folder with its hash, the lock and what depends on the clock left out.
pub(crate) fn tree(folder: &Path) -> Vec<(String, String)> {
    fn walk(root: &Path, folder: &Path, found: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, found);
                continue;
            }
            let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            let digest = Sha256::digest(std::fs::read(&path).unwrap());
            found.push((name, digest.iter().map(|byte| format!("{byte:02x}")).collect()));
        }
    }
    let mut found = Vec::new();
    walk(folder, folder, &mut found);
    found.sort();
    found
}

/// Removes what the documentation of `metrics.jsonl` says to depend on the clock and the process.
pub(crate) fn without_clock(mut records: Vec<Value>) -> Vec<Value> {
    for record in &mut records {
        if let Some(fields) = record.as_object_mut() {
            for name in ["tokens_per_second", "elapsed_s", "peak_bytes"] {
                fields.remove(name);
            }
        }
    }
    records
}

/// Waits for something, at most half a minute.
#[track_caller]
pub(crate) fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Sends a signal by name, such as `INT`.
pub(crate) fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}
