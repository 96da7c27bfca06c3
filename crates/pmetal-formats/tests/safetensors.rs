//! Safetensors: round trips, and every way in which a header can lie.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Instant;

use pmetal_formats::safetensors::{
    MAX_METADATA_BYTES, MAX_METADATA_ENTRIES, MAX_TENSORS, SafetensorsFile, SafetensorsWriter, TensorSpec,
    TensorView, write_safetensors,
};
use pmetal_formats::{DType, Result};
use proptest::prelude::*;
use support::{Scratch, refusal, safetensors_bytes, scalars, shorten};

const FILE: &str = "weights.safetensors";

fn open(bytes: impl AsRef<[u8]>) -> Result<SafetensorsFile> {
    SafetensorsFile::open(&Scratch::new().file(FILE, bytes))
}

/// Asserts that a header over `data` is refused with all of `words`.
#[track_caller]
fn refused(header: impl AsRef<[u8]>, data: &[u8], words: &[&str]) {
    let message = refusal(open(safetensors_bytes(header, data)), FILE);
    for word in words {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
}

fn entry(name: &str, dtype: &str, shape: &str, range: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{range}}}"#)
}

fn header(entries: &[String]) -> String {
    format!("{{{}}}", entries.join(","))
}

#[test]
fn a_small_file_is_read() {
    let head = header(&[
        r#""__metadata__":{"format":"pt"}"#.to_owned(),
        entry("b", "F32", "[2]", "[2,10]"),
        entry("a", "BF16", "[]", "[0,2]"),
        entry("empty", "I64", "[0,7]", "[10,10]"),
    ]);
    let file = open(safetensors_bytes(head, &[0x80, 0x3f, 0, 0, 0, 64, 0, 0, 64, 64])).unwrap();
    assert_eq!(file.metadata(), &BTreeMap::from([("format".to_owned(), "pt".to_owned())]));
    let names: Vec<&str> = file.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "empty"]);
    assert_eq!(file.info("a").unwrap().shape, [0_usize; 0]);
    assert_eq!(file.read_f32("a").unwrap(), [1.0]);
    assert_eq!(file.read_f32("b").unwrap(), [2.0, 3.0]);
    assert_eq!(file.read("empty").unwrap(), [0_u8; 0]);
    assert!(file.info("c").is_none());
    let mut short = [0; 7];
    let message = file.read_into("b", &mut short).unwrap_err().to_string();
    assert!(message.contains("tensor `b` has 8 bytes, the buffer 7"), "{message}");
    assert!(file.read_range_into("b", 2, &mut short).is_err());
    assert!(file.read_range_into("b", u64::MAX, &mut short).is_err());
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let whole = scalars(&[("one", 1.0), ("two", 2.0)]);
    assert!(open(&whole).is_ok());
    for length in 0..whole.len() {
        let message = refusal(open(&whole[..length]), FILE);
        assert!(message.contains("byte"), "cut at {length}: `{message}` names no place");
    }
    let longer = [&whole[..], &[0]].concat();
    assert!(refusal(open(longer), FILE).contains("data section"));
}

#[test]
fn a_lying_header_length_is_refused_at_once() {
    let lengths = [0, 1, 7, 23, 1000, 100_000_000, 100_000_001, 1 << 60, 1 << 63, u64::MAX];
    for length in lengths {
        let mut bytes = scalars(&[("one", 1.0)]);
        bytes[..8].copy_from_slice(&u64::to_le_bytes(length));
        let start = Instant::now();
        let message = refusal(open(bytes), FILE);
        assert!(start.elapsed().as_millis() < 1000, "{length} took {:?}", start.elapsed());
        if (1000..=100_000_000).contains(&length) {
            assert!(
                message.contains("bytes follow it"),
                "`{message}` was found by reading, not by comparing"
            );
        }
        let place = ["byte 0", "header"].iter().any(|place| message.contains(place));
        assert!(place, "{length}: `{message}` names no place");
        if length > 1000 {
            assert!(message.contains(&length.to_string()), "`{message}` lacks {length}");
        }
    }
}

#[test]
fn headers_of_another_form_are_refused() {
    let scalar = |name| entry(name, "F32", "[1]", "[0,4]");
    let data = [0; 4];
    refused("[]", &data, &["byte 8", "does not start with `{`"]);
    refused(" {}", &[], &["byte 8"]);
    refused(format!("{}x", header(&[scalar("a")])), &data, &["header", "trailing"]);
    refused(b"{\"\xff\":1}", &[], &["byte 10", "not UTF-8"]);
    refused(header(&[scalar("a"), scalar("a")]), &data, &["tensor `a` is present twice"]);
    refused(header(&[scalar("a"), scalar("b"), scalar("\\u0061")]), &data, &["tensor `a` is present twice"]);
    refused(r#"{"a":7}"#, &[], &["tensor `a` to be a map"]);
    refused(r#"{"a":null}"#, &[], &["tensor `a` to be a map"]);
    let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    refused(deep, &[], &["tensor `a` to be a map"]);
    let deep = header(&[entry("a", "F32", &format!("[{}1{}]", "[".repeat(9999), "]".repeat(9999)), "[0,4]")]);
    refused(deep, &data, &["header", "sequence", "column"]);
    refused(r#"{"a":{"dtype":"F32","shape":[1]}}"#, &data, &["tensor `a` has no field `data_offsets`"]);
    refused(r#"{"a":{"shape":[1],"data_offsets":[0,4]}}"#, &data, &["tensor `a` has no field `dtype`"]);
    refused(r#"{"a":{"dtype":"F32","data_offsets":[0,4]}}"#, &data, &["tensor `a` has no field `shape`"]);
    refused(r#"{"a":{"dtype":"F32","dtype":"F32"}}"#, &data, &["tensor `a` has field `dtype` twice"]);
    refused(r#"{"a":{"dtype":"F32","more":1}}"#, &data, &["tensor `a` has the unknown field `more`"]);
}

#[test]
fn metadata_that_is_no_map_of_strings_is_refused() {
    refused(r#"{"__metadata__":{"n":1}}"#, &[], &["header", "expected a string"]);
    refused(r#"{"__metadata__":[]}"#, &[], &["`__metadata__`"]);
    refused(r#"{"__metadata__":{"a":"1","a":"2"}}"#, &[], &["key `a` of `__metadata__` is present twice"]);
    refused(r#"{"__metadata__":{},"__metadata__":{}}"#, &[], &["`__metadata__` is present twice"]);
}

#[test]
fn wrong_dtypes_and_shapes_are_refused() {
    let one = |dtype: &str, shape: &str, range: &str| header(&[entry("a", dtype, shape, range)]);
    refused(one("F128", "[1]", "[0,4]"), &[0; 4], &["tensor `a` has the unknown dtype `F128`"]);
    refused(one("Q4_0", "[32]", "[0,18]"), &[0; 18], &["unknown dtype `Q4_0`"]);
    refused(one("F32", "[2]", "[0,4]"), &[0; 4], &["that is 8 bytes", "hold 4"]);
    refused(one("F32", "[-1]", "[0,4]"), &[0; 4], &["header", "-1"]);
    refused(one("F32", "[1.0]", "[0,4]"), &[0; 4], &["header", "1.0"]);
    refused(one("F32", "[18446744073709551616]", "[0,4]"), &[0; 4], &["header"]);
    refused(one("F32", "[4294967296,4294967296]", "[0,0]"), &[], &["tensor `a`", "exceeds 64 bits"]);
    refused(one("F32", "[4611686018427387904]", "[0,0]"), &[], &["tensor `a`", "exceeds 64 bits"]);
    let many = format!("[{}1]", "1,".repeat(1_000_000));
    refused(one("F32", &many, "[0,4]"), &[0; 4], &["`shape` of tensor `a` has more than"]);
}

#[test]
fn ranges_that_do_not_tile_the_data_are_refused() {
    let pair = |first: &str, second: &str| {
        header(&[entry("a", "U8", "[4]", first), entry("b", "U8", "[4]", second)])
    };
    assert!(open(safetensors_bytes(pair("[4,8]", "[0,4]"), &[0; 8])).is_ok());
    refused(pair("[0,4]", "[3,7]"), &[0; 7], &["tensor `b`", "byte 3", "inside the preceding tensor"]);
    refused(pair("[0,4]", "[0,4]"), &[0; 4], &["inside the preceding tensor"]);
    refused(pair("[0,4]", "[5,9]"), &[0; 9], &["tensor `b`", "gap after byte 4"]);
    refused(pair("[1,5]", "[5,9]"), &[0; 9], &["tensor `a`", "gap after byte 0"]);
    refused(pair("[0,4]", "[8,4]"), &[0; 8], &["tensor `b`", "reversed data_offsets [8, 4]"]);
    refused(pair("[0,4]", "[4,8]"), &[0; 7], &["tensor `b`", "ends at byte 8", "7 bytes of data"]);
    refused(pair("[0,4]", "[4,8]"), &[0; 9], &["data section", "byte 8", "9 bytes"]);
    refused(pair("[0,4]", "[4]"), &[0; 8], &["tensor `b` has 1 data_offsets, not 2"]);
    let far = header(&[entry("a", "U8", "[1152921504606846976]", "[0,1152921504606846976]")]);
    refused(far, &[0; 8], &["tensor `a`", "1152921504606846976", "8 bytes of data"]);
    let top = header(&[entry("a", "U8", "[1]", "[18446744073709551614,18446744073709551615]")]);
    refused(top, &[0; 1], &["tensor `a`", "gap after byte 0"]);
    refused("{}", &[0; 1], &["data section", "byte 0", "1 bytes"]);
}

#[test]
fn too_many_tensors_are_refused_in_bounded_time() {
    let entries: Vec<String> =
        (0..=MAX_TENSORS).map(|n| entry(&n.to_string(), "U8", "[0]", "[0,0]")).collect();
    let bytes = safetensors_bytes(header(&entries), &[]);
    let megabytes = bytes.len() as u128 / 1_000_000;
    let start = Instant::now();
    let message = refusal(open(bytes), FILE);
    assert!(message.contains("more than 65536 tensors"), "{message}");
    assert!(start.elapsed().as_millis() < 1000 * megabytes, "took {:?}", start.elapsed());
    assert_eq!(open(safetensors_bytes(header(&entries[1..]), &[])).unwrap().tensors().len(), MAX_TENSORS);
}

#[test]
fn too_much_metadata_is_refused_when_reading_and_writing() {
    let metadata = |count: usize, length: usize| -> BTreeMap<String, String> {
        (0..count).map(|index| (format!("{index:05}"), "x".repeat(length))).collect()
    };
    for (count, length, is_fine) in [
        (MAX_METADATA_ENTRIES, 100, true),
        (MAX_METADATA_ENTRIES + 1, 100, false),
        (1, MAX_METADATA_BYTES - 5, true),
        (1, MAX_METADATA_BYTES - 4, false),
        (2, MAX_METADATA_BYTES / 2, false),
    ] {
        let metadata = metadata(count, length);
        let head = serde_json::json!({ "__metadata__": metadata }).to_string();
        let opened = open(safetensors_bytes(&head, &[]));
        let written = write_safetensors(&mut Vec::new(), &[], &metadata);
        assert_eq!((opened.is_ok(), written.is_ok()), (is_fine, is_fine), "{count} of {length}");
        if !is_fine {
            assert!(refusal(opened, FILE).contains("more than 4096 entries or 8388608 bytes"));
            assert!(written.unwrap_err().to_string().contains("metadata entries of"));
        }
    }
    let long = "x".repeat(MAX_METADATA_BYTES + 1);
    let message = "a string is longer than 8388608 bytes";
    refused(format!(r#"{{"__metadata__":{{"a":"{long}"}}}}"#), &[], &["byte 29", message]);
    refused(format!(r#"{{"{long}":1}}"#), &[], &["byte 9", message]);
    refused(format!(r#"{{"a":"b","\"{long}":1}}"#), &[], &["byte 17", message]);
}

#[test]
fn a_file_shortened_after_it_was_opened_is_an_error() {
    let scratch = Scratch::new();
    let path = scratch.file(FILE, scalars(&[("one", 1.0), ("two", 2.0)]));
    let file = SafetensorsFile::open(&path).unwrap();
    shorten(&path);
    assert_eq!(file.read_f32("one").unwrap(), [1.0]);
    let message = refusal(file.read("two"), FILE);
    assert!(message.contains("tensor `two`") && message.contains("when it was opened"), "{message}");
}

#[test]
fn control_characters_and_endless_names_stay_out_of_messages() {
    refused(r#"{"\u001b[31m":7}"#, &[], &["\\u{1b}[31m"]);
    let endless = "n".repeat(1_000_000);
    refused(header(&[entry(&endless, "F128", "[1]", "[0,4]")]), &[0; 4], &["nnn...", "F128"]);
    refused(
        header(&[entry("a", "F32", &format!(r#"["{endless}"]"#), "[0,4]")]),
        &[0; 4],
        &["nnn...", "column"],
    );
}

#[test]
fn the_writer_gives_the_bytes_of_the_python_package() {
    // `safetensors.numpy.save({"b": f32 [1, 2], "a": f16 [3], "c": i64 [[1]]}, {"format": "pt"})`, version 0.8.
    let expected = include_bytes!("data/python.safetensors");
    let b: Vec<u8> = [1.0_f32, 2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    let a = [0x00, 0x3c, 0x00, 0x40, 0x00, 0x42];
    let tensors = [
        TensorView { name: "b", dtype: DType::F32, shape: &[2], data: &b },
        TensorView { name: "a", dtype: DType::F16, shape: &[3], data: &a },
        TensorView { name: "c", dtype: DType::I64, shape: &[1, 1], data: &1_i64.to_le_bytes() },
    ];
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut bytes = Vec::new();
    write_safetensors(&mut bytes, &tensors, &metadata).unwrap();
    assert_eq!(bytes.escape_ascii().to_string(), expected.escape_ascii().to_string());
    let mut turned = Vec::new();
    let reversed: Vec<_> = tensors.into_iter().rev().collect();
    write_safetensors(&mut turned, &reversed, &metadata).unwrap();
    assert_eq!(bytes, turned);
}

#[test]
fn the_writer_refuses_what_the_format_cannot_hold() {
    let none = BTreeMap::new();
    let mut sink = Vec::new();
    let mut refuse = |tensors: &[TensorView<'_>], words: &str| {
        let message = write_safetensors(&mut sink, tensors, &none).unwrap_err().to_string();
        assert!(message.contains(words), "`{message}` lacks `{words}`");
    };
    let view = |name, dtype, data| TensorView { name, dtype, shape: &[4], data };
    refuse(&[view("a", DType::U8, &[0; 4]), view("a", DType::U8, &[0; 4])], "tensor `a` is given twice");
    refuse(&[view("a", DType::U8, &[0; 3])], "tensor `a` needs 4 bytes, but was given 3");
    refuse(&[view("__metadata__", DType::U8, &[0; 4])], "reserves");
    let block = TensorView { name: "a", dtype: DType::Q8_0, shape: &[32], data: &[0; 34] };
    refuse(&[block], "tensor `a` has dtype Q8_0");
    let huge = TensorView { name: "a", dtype: DType::F64, shape: &[usize::MAX], data: &[] };
    refuse(&[huge], "exceeds 64 bits");
}

#[test]
fn a_stream_that_ends_early_is_an_error() {
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let taken = bytes.len().min(self.0);
            self.0 -= taken;
            if taken == 0 { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(taken) }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let view = TensorView { name: "a", dtype: DType::U8, shape: &[4], data: &[1; 4] };
    let mut whole = Vec::new();
    write_safetensors(&mut whole, &[view], &BTreeMap::new()).unwrap();
    for room in 0..whole.len() {
        assert!(write_safetensors(&mut Full(room), &[view], &BTreeMap::new()).is_err(), "room for {room}");
    }
    assert!(write_safetensors(&mut Full(whole.len()), &[view], &BTreeMap::new()).is_ok());
    let spec = TensorSpec { name: "a".to_owned(), dtype: DType::U8, shape: vec![4] };
    let mut sink = Vec::new();
    let stream = SafetensorsWriter::begin(&mut sink, vec![spec], &BTreeMap::new()).unwrap();
    let message = stream.finish().unwrap_err().to_string();
    assert!(message.contains("the data of tensor `a` is missing"), "{message}");
}

/// Owned parts of a tensor for the round trip.
type Parts = (DType, Vec<usize>, Vec<u8>);

fn parts() -> impl Strategy<Value = Parts> {
    let plain =
        [DType::F64, DType::F32, DType::F16, DType::Bf16, DType::I64, DType::U8, DType::Bool, DType::F8E4m3];
    (proptest::sample::select(plain.to_vec()), proptest::collection::vec(0_usize..5, 0..4), any::<u64>())
        .prop_map(|(dtype, shape, seed)| {
            let bytes = dtype.bytes_for(shape.iter().product::<usize>() as u64).unwrap();
            let data = (0..bytes).map(|index| (seed.wrapping_mul(index + 1) >> 56) as u8).collect();
            (dtype, shape, data)
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read_back(
        tensors in proptest::collection::btree_map("\\PC{0,12}", parts(), 0..6),
        metadata in proptest::collection::btree_map(".{0,8}", ".{0,8}", 0..3),
    ) {
        let views: Vec<TensorView<'_>> = tensors
            .iter()
            .map(|(name, (dtype, shape, data))| TensorView { name, dtype: *dtype, shape, data })
            .collect();
        let mut bytes = Vec::new();
        write_safetensors(&mut bytes, &views, &metadata).unwrap();
        prop_assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0);
        let scratch = Scratch::new();
        let file = SafetensorsFile::open(&scratch.file(FILE, &bytes)).unwrap();
        prop_assert_eq!(file.metadata(), &metadata);
        prop_assert_eq!(file.tensors().len(), tensors.len());
        for (name, (dtype, shape, data)) in &tensors {
            let info = file.info(name).unwrap();
            prop_assert_eq!((info.dtype, &info.shape), (*dtype, shape));
            prop_assert_eq!(info.offset % dtype.block_bytes(), 0);
            prop_assert_eq!(&file.read(name).unwrap(), data);
        }
    }

    #[test]
    fn a_damaged_byte_never_panics(position in 0_usize..200, byte in any::<u8>()) {
        let mut bytes = scalars(&[("one", 1.0), ("two", 2.0)]);
        let position = position % bytes.len();
        bytes[position] = byte;
        if let Ok(file) = open(&bytes) {
            for tensor in file.tensors() {
                let _ = file.read(&tensor.name);
            }
        }
    }
}
