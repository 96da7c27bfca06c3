//! Datasets as users have them, and as nobody should.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "helpers of tests are tests"
)]

use std::io::Write;
use std::path::{Path, PathBuf};

use pmetal_formats::rows::{DatasetFiles, LONGEST_ROW_BYTES, OnBadRow, Row, Rows};
use serde_json::json;

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn read(name: &str, bytes: impl AsRef<[u8]>) -> Result<Vec<Row>, String> {
    let files = Files::new();
    let path = files.write(name, bytes);
    Rows::open(&path)
        .map_err(|error| error.to_string())?
        .map(|row| row.map_err(|error| error.to_string()))
        .collect()
}

fn refusal(name: &str, bytes: impl AsRef<[u8]>) -> String {
    match read(name, bytes) {
        Ok(rows) => panic!("{} rows were read", rows.len()),
        Err(message) => message,
    }
}

#[track_caller]
fn assert_holds(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn lines_are_read_with_their_numbers() {
    let rows =
        read("a.jsonl", "{\"text\": \"one\"}\n\n  \n{\"text\": \"two\", \"n\": [1, 2.5, null, true]}\n")
            .unwrap();
    assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 4]);
    assert_eq!(rows[1].value["n"], json!([1, 2.5, null, true]));
}

#[test]
fn byte_order_mark_carriage_returns_and_missing_final_newline_are_accepted() {
    let rows = read("a.ndjson", b"\xEF\xBB\xBF{\"text\": \"one\"}\r\n{\"text\": \"two\"}").unwrap();
    assert_eq!(
        rows.iter().map(|row| row.value["text"].as_str().unwrap()).collect::<Vec<_>>(),
        ["one", "two"]
    );
    let rows = read("a.json", b"\xEF\xBB\xBF[{\"text\": \"one\"}]").unwrap();
    assert_eq!(rows.len(), 1);
}

#[test]
fn columns_keep_the_order_of_the_file() {
    let rows = read("a.jsonl", r#"{"z": 1, "a": 2, "m": {"y": 1, "b": 2}}"#).unwrap();
    assert_eq!(rows[0].value.keys().collect::<Vec<_>>(), ["z", "a", "m"]);
    assert_eq!(rows[0].value["m"].as_object().unwrap().keys().collect::<Vec<_>>(), ["y", "b"]);
}

#[test]
fn broken_lines_are_refused_with_line_column_and_beginning() {
    let good = b"{\"text\": \"fine\"}\n".to_vec();
    let cases: Vec<(&[u8], &[&str])> = vec![
        (b"{\"text\": \"a\0b\"}", &["line 2, column 12", "control character", "`{\"text\": \"a\\u{0}b\"}`"]),
        (b"{\"text\": \"caf\xe9\"}", &["line 2, column 14", "0xe9", "Latin-1"]),
        (b"{\"text\": \"\\ud800\"}", &["line 2, column 1", "surrogate"]),
        (b"{\"text\": \"\\ud800\\u0041\"}", &["line 2, column 2", "surrogate"]),
        (b"{\"loss\": NaN}", &["line 2, column 10", "expected value"]),
        (b"{\"loss\": Infinity}", &["line 2", "expected value"]),
        (b"{\"loss\": 1e999}", &["line 2", "number out of range"]),
        (b"{\"a\": 1, \"a\": 2}", &["line 2", "`a` is given twice"]),
        (b"{\"a\": {\"b\": 1, \"b\": 1}}", &["line 2", "`b` is given twice"]),
        (b"{\"text\": \"cut", &["line 2", "truncated"]),
        (b"{\"text\":\n", &["line 2", "must be on one line"]),
        (b"{\"a\": 1} {\"a\": 2}", &["line 2, column 10", "trailing characters"]),
        (b"[1, 2]", &["line 2, column 1", "an array"]),
        (b"\"text\"", &["line 2, column 1", "a string"]),
        (b"{'text': 'a'}", &["line 2, column 2"]),
    ];
    for (bad, parts) in cases {
        assert_holds(&refusal("a.jsonl", [good.as_slice(), bad].concat()), parts);
    }
}

#[test]
fn columns_count_characters_not_bytes() {
    let message = refusal("a.jsonl", "{\"\u{e4}\u{f6}\u{fc}\": nope}");
    assert_holds(&message, &["line 1, column 10"]);
}

#[test]
fn error_shows_only_the_first_eighty_characters() {
    let message = refusal("a.jsonl", format!("{{\"text\": \"{}\" oops}}", "\u{e4}".repeat(5000)));
    let shown = message.split_once("begins `").unwrap().1.strip_suffix('`').unwrap();
    assert_eq!(shown.chars().count(), 83, "{message}");
    assert!(shown.ends_with("..."));
}

#[test]
fn deep_nesting_is_refused() {
    let deep = format!("{{\"a\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert_holds(&refusal("a.jsonl", &deep), &["line 1", "recursion limit"]);
    assert_holds(&refusal("a.json", format!("[{deep}]")), &["line 1", "recursion limit"]);
}

#[test]
fn utf_16_is_named() {
    assert_holds(&refusal("a.jsonl", b"\xFF\xFE{\0\"\0"), &["UTF-16"]);
}

#[test]
fn empty_files_are_refused() {
    for (name, bytes) in [
        ("a.jsonl", ""),
        ("a.jsonl", "\n\n"),
        ("a.json", " "),
        ("a.json", "[]"),
        ("a.json", "{\"data\": []}"),
    ] {
        assert_holds(&refusal(name, bytes), &["holds no rows"]);
    }
}

#[test]
fn line_over_the_cap_is_refused_in_bounded_memory_and_the_next_one_is_read() {
    let files = Files::new();
    let path = files.0.path().join("long.jsonl");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&path).unwrap());
    file.write_all(b"{\"text\": \"").unwrap();
    let block = vec![b'x'; 1 << 20];
    for _ in 0..=(LONGEST_ROW_BYTES >> 20) {
        file.write_all(&block).unwrap();
    }
    file.write_all(b"\"}\n{\"text\": \"short\"}\n").unwrap();
    drop(file);
    let message = Rows::open(&path).unwrap().next().unwrap().unwrap_err().to_string();
    assert_holds(&message, &["line 1, column 1", "67108864", "`{\"text\": \"xxx"]);
    let mut rows = Rows::open_with(&path, OnBadRow::Skip).unwrap();
    let row = rows.next().unwrap().unwrap();
    assert_eq!((row.line, row.value["text"].as_str()), (2, Some("short")));
    assert_eq!(rows.skipped().count, 1);
}

#[test]
fn bad_lines_can_be_skipped_and_are_counted() {
    let files = Files::new();
    let text = "{\"a\": 1}\nnope\n[]\n{\"a\": 2}\n".to_owned() + &"x\n".repeat(50);
    let path = files.write("a.jsonl", text);
    let mut rows = Rows::open_with(&path, OnBadRow::Skip).unwrap();
    let lines: Vec<usize> = rows.by_ref().map(|row| row.unwrap().line).collect();
    assert_eq!(lines, [1, 4]);
    assert_eq!((rows.skipped().count, rows.skipped().messages.len()), (52, 20));
    assert_holds(&rows.skipped().messages[1], &["line 3", "an array"]);
}

#[test]
fn iteration_ends_after_an_error() {
    let files = Files::new();
    let path = files.write("a.jsonl", "nope\n{\"a\": 1}\n");
    let mut rows = Rows::open(&path).unwrap();
    assert!(rows.next().unwrap().is_err());
    assert!(rows.next().is_none());
}

#[test]
fn arrays_are_read_with_the_line_of_each_row() {
    let text = "\n[\n  {\"a\": 1},\n  {\n    \"a\": 2\n  }, {\"a\": 3}\n]\n";
    let rows = read("a.json", text).unwrap();
    assert_eq!(
        rows.iter().map(|row| (row.line, row.value["a"].clone())).collect::<Vec<_>>(),
        [(3, json!(1)), (4, json!(2)), (6, json!(3))]
    );
}

#[test]
fn object_with_one_array_is_read() {
    let rows =
        read("a.json", "{\"version\": \"1\",\n\"data\": [{\"a\": 1},\n{\"a\": 2}], \"rest\": {\"x\": 1}}")
            .unwrap();
    assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [2, 3]);
}

#[test]
fn json_file_of_lines_is_read_as_lines() {
    let rows = read("a.json", "{\"a\": 1}\n{\"a\": 2}\n").unwrap();
    assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn broken_documents_are_refused_with_their_place() {
    let cases: Vec<(&[u8], &[&str])> = vec![
        (b"[{\"a\": 1},\n {\"a\": 2} {\"a\": 3}]", &["line 2, column 11", "`,` was expected"]),
        (b"[{\"a\": 1},\n {\"a\": NaN}]", &["line 2, column 8", "expected value"]),
        (b"[{\"a\": 1},\n {\"a\": 1, \"a\": 2}]", &["line 2", "given twice"]),
        (b"[{\"a\": 1},\n {\"a\":", &["line 2", "truncated"]),
        (b"[{\"a\": 1},\n", &["truncated"]),
        (b"[{\"a\": 1}", &["truncated"]),
        (b"[{\"a\": 1}] x", &["column 12", "behind the end"]),
        (b"[{\"a\": 1},]", &["line 1, column 11"]),
        (b"[{\"a\": 1},\n 7]", &["line 2", "a number"]),
        (b"[{\"a\": \"\xe9\"}]", &["line 1, column 9", "0xe9"]),
        (b"{\"a\": [], \"b\": []}", &["`a`, `b`"]),
        (b"{\"text\": \"x\"}", &["holds none"]),
        (b"7", &["line 1, column 1", "must begin with"]),
        (b"{\"a\" 1}", &["`:` was expected"]),
        (b"{\"a\": [{}] \"b\": 1}", &["`}` was expected"]),
    ];
    for (bad, parts) in cases {
        assert_holds(&refusal("a.json", bad), parts);
    }
}

#[test]
fn every_truncation_of_a_document_is_an_error_and_never_a_panic() {
    let text = "{\"version\": 1, \"data\": [{\"a\": \"\u{e4}\"}, {\"b\": [1, {\"c\": null}]}]}";
    for length in 1..text.len() {
        let bytes = &text.as_bytes()[..length];
        assert!(read("a.json", bytes).is_err(), "{length}");
        assert!(read("a.jsonl", bytes).is_err(), "{length}");
    }
}

#[test]
fn other_kinds_of_files_are_refused_by_name() {
    for (name, part) in [
        ("a.jsonl.gz", "gunzip"),
        ("a.json.zst", "unzstd"),
        ("a.parquet", "Parquet"),
        ("a.csv", "CSV"),
        ("a.pkl", "pickle"),
        ("a.pt", "pickle"),
        ("a.zip", "unpack"),
        ("a.txt", "plain text"),
        ("a.yaml", "`.yaml`"),
        ("noending", "`.`"),
    ] {
        assert_holds(&refusal(name, "{}"), &[part]);
    }
}

#[test]
fn compressed_and_pickled_bytes_are_refused_whatever_the_name() {
    for (bytes, part) in [
        (&b"\x1f\x8b\x08\x00"[..], "gunzip"),
        (b"\x28\xb5\x2f\xfd", "unzstd"),
        (b"PAR1", "Parquet"),
        (b"PK\x03\x04", "zip"),
        (b"\x80\x04\x95\x00", "pickle"),
    ] {
        assert_holds(&refusal("a.jsonl", bytes), &[part]);
    }
}

#[test]
fn folder_is_resolved_to_its_parts() {
    let files = Files::new();
    let folder = files.0.path();
    assert_holds(&DatasetFiles::resolve(folder).unwrap_err().to_string(), &["train.jsonl"]);
    let train = files.write("train.jsonl", "{}");
    let resolved = DatasetFiles::resolve(folder).unwrap();
    assert_eq!(resolved, DatasetFiles { train: train.clone(), valid: None, test: None });
    let valid = files.write("validation.json", "[{}]");
    let test = files.write("test.ndjson", "{}");
    let resolved = DatasetFiles::resolve(folder).unwrap();
    assert_eq!((resolved.valid, resolved.test), (Some(valid), Some(test)));
    files.write("valid.jsonl", "{}");
    assert_holds(
        &DatasetFiles::resolve(folder).unwrap_err().to_string(),
        &["validation.json", "valid.jsonl", "keep one"],
    );
    assert_eq!(DatasetFiles::resolve(&train).unwrap().train, train);
    assert!(DatasetFiles::resolve(Path::new("no/such/place")).is_err());
}

proptest::proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let _ = read("a.jsonl", &bytes);
        let _ = read("a.json", &bytes);
    }

    #[test]
    fn arbitrary_json_like_text_never_panics(text in "[\\[\\]{}\":,a1 \n\\\\u]{0,60}") {
        let _ = read("a.jsonl", &text);
        let _ = read("a.json", &text);
    }
}
