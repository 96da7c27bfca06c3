//! Opening a file takes no more memory than the file and 64 MB, whatever it says.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods)] // tests prepare files as they like

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use pmetal_formats::checkpoint::Checkpoint;
use support::{GGUF_ARRAY, GGUF_STRING, GGUF_U32, GgufBuilder, Scratch, safetensors_bytes};

const VARIABLE: &str = "PMETAL_TEST_OPENS";
const STATUS: &str = "/proc/self/status";
const MEGABYTE: u64 = 1 << 20;

/// The most memory that this process has had at once; its own program began with none.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string(STATUS).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// The other half of the test below: a process of its own for each file.
#[test]
#[ignore = "started by the other test"]
fn opens_what_the_other_test_names() {
    let Some(path) = std::env::var_os(VARIABLE) else { return println!("skipped: {VARIABLE} is not set") };
    let opened = Checkpoint::open(Path::new(&path)).and_then(|checkpoint| {
        // A GGUF file has its configuration in the header; that of a folder is a file of its own.
        if Path::new(&path).is_dir() { checkpoint.config().map(|_| ()) } else { Ok(()) }
    });
    let message = opened.err().map(|error| error.to_string()).unwrap_or_default();
    println!("answer: {} {message}", peak_bytes());
}

/// The peak of a process that opens the file, and the error it ends with.
fn opened_elsewhere(path: &Path) -> (u64, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "opens_what_the_other_test_names", "--ignored", "--nocapture"]);
    let output = command.env(VARIABLE, path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let answer =
        text.lines().find_map(|line| line.split_once("answer: ")).unwrap_or_else(|| panic!("{text}")).1;
    let (peak, message) = answer.split_once(' ').unwrap();
    (peak.parse().unwrap(), message.to_owned())
}

/// Opens a file of which `read_bytes` are header, and returns the error.
#[track_caller]
fn bounded(name: &str, path: PathBuf, read_bytes: usize) -> String {
    let (peak, message) = opened_elsewhere(&path);
    println!("{name}: {} MB for {} MB", peak / MEGABYTE, read_bytes as u64 / MEGABYTE);
    let most = read_bytes as u64 + 64 * MEGABYTE;
    assert!(peak < most, "{name}: {peak} bytes, more than {most}: {message}");
    message
}

#[test]
fn opening_a_file_takes_at_most_its_size_and_64_megabytes() {
    if !Path::new(STATUS).exists() {
        return println!("skipped: opening_a_file_takes_at_most_its_size_and_64_megabytes");
    }
    let scratch = Scratch::new();
    let headers = |name: &str, header: String, words: &str| {
        let path = scratch.file("model.safetensors", safetensors_bytes(&header, &[]));
        let message = bounded(name, path, header.len());
        assert!(message.contains(words), "{name}: expected `{words}`: {message}");
    };
    let empty = |index: usize| format!(r#""{index}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    let list = |count: usize| (0..count).map(empty).collect::<Vec<_>>().join(",");
    let long = |unit: &str, bytes: usize| unit.repeat(bytes / unit.len());
    let most = 90 << 20;
    headers("the most tensors", format!("{{{}}}", list(1 << 16)), "");
    headers("a million tensors", format!("{{{}}}", list(1_000_000)), "more than 65536 tensors");
    headers("a long name", format!(r#"{{"{}":1}}"#, long("x", most)), "a string is longer");
    headers("an escaped name", format!(r#"{{"{}":1}}"#, long("\\n", most)), "a string is longer");
    let value = format!(r#"{{"__metadata__":{{"a":"{}"}}}}"#, long("x", most));
    headers("a long value", value, "a string is longer");
    let escaped = format!(r#"{{"__metadata__":{{"a":"{}"}}}}"#, long("\\n", 8_000_000));
    headers("the longest escaped value", escaped, "");
    let entries: Vec<String> = (0..4_000_000).map(|index| format!(r#""{index}":"""#)).collect();
    headers(
        "metadata",
        format!(r#"{{"__metadata__":{{{}}}}}"#, entries.join(",")),
        "`__metadata__` has more",
    );
    headers("a deep list", format!(r#"{{"a":{{"shape":{}"#, long("[", most)), "invalid type");
    gguf_files(&scratch);
    folders(&scratch);
}

fn gguf_files(scratch: &Scratch) {
    let files = |name: &str, bytes: &[u8], words: &str| {
        let message = bounded(name, scratch.file("model.gguf", bytes), bytes.len());
        assert!(message.contains(words), "{name}: expected `{words}`: {message}");
    };
    let array = |kind: u32, count: u64, elements: &[u8]| {
        [&kind.to_le_bytes()[..], &count.to_le_bytes(), elements].concat()
    };
    let of_array = |value: &[u8]| GgufBuilder::new().raw("list", GGUF_ARRAY, value).build();
    files("announced numbers", &of_array(&array(GGUF_U32, 1 << 60, &[])), "announced");
    files("announced strings", &of_array(&array(GGUF_STRING, 1 << 40, &[])), "announced");
    let mut announced = GgufBuilder::new();
    announced.tensor_count = Some(u64::MAX);
    files("announced tensors", &announced.build(), "exceed the limit of 65536");
    let (count, zeros) = (10_000_000, vec![0; 80_000_000]);
    files("empty strings", &of_array(&array(GGUF_STRING, count, &zeros)), "general.architecture");
    files("numbers", &of_array(&array(GGUF_U32, 2 * count, &zeros)), "general.architecture");
    let mut tensors = GgufBuilder::new();
    for index in 0..1 << 16 {
        tensors = tensors.raw_tensor(&format!("{index}"), &[0], 0, 0);
    }
    files("the most tensors", &tensors.build(), "end at byte");
}

/// Weights are not read when a model is opened, and the files beside them are bounded.
fn folders(scratch: &Scratch) {
    let length = 4_u64 << 30;
    let header = format!(r#"{{"a":{{"dtype":"U8","shape":[{length}],"data_offsets":[0,{length}]}}}}"#);
    let folder = scratch.path().join("large");
    std::fs::create_dir(&folder).unwrap();
    let bytes = safetensors_bytes(&header, &[]);
    std::fs::write(folder.join("model.safetensors"), &bytes).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(folder.join("model.safetensors")).unwrap();
    file.set_len(bytes.len() as u64 + length).unwrap();
    for (name, config) in [
        ("plain", "{}".to_owned()),
        ("numbers", format!("[{}0]", "0,".repeat(200_000))),
        ("objects", format!(r#"[{}0]"#, r#"{"":0},"#.repeat(70_000))),
        ("a long file", " ".repeat(100_000_000)),
    ] {
        std::fs::write(folder.join("config.json"), &config).unwrap();
        bounded(name, folder.clone(), config.len());
    }
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    let index = folder.join("model.safetensors.index.json");
    let entry = |index: usize| format!(r#""model.layers.{index:0>60}":"model-{index:0>20}.safetensors""#);
    let entries: Vec<String> = (0..200_000).map(entry).collect();
    let text = format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(","));
    std::fs::write(&index, &text).unwrap();
    assert!(bounded("an index", folder.clone(), text.len()).contains("is missing"));
    std::fs::write(&index, r#"{"weight_map":{"a":"b"#.to_owned() + &"x".repeat(200_000_000)).unwrap();
    assert!(bounded("a long index", folder, 0).contains("longer than"));
}
