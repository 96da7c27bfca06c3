//! GGUF: what is read, and every way in which a file can lie.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod support;

use std::time::Instant;

use pmetal_formats::gguf::{GgufArray, GgufFile, GgufValue};
use pmetal_formats::{DType, Result};
use proptest::prelude::*;
use support::{GGUF_ARRAY, GGUF_BOOL, GGUF_STRING, GGUF_U32, GgufBuilder, Scratch, refusal, shorten, string};

const FILE: &str = "model.gguf";

fn open(bytes: impl AsRef<[u8]>) -> Result<GgufFile> {
    GgufFile::open(&Scratch::new().file(FILE, bytes))
}

#[track_caller]
fn refused(builder: &GgufBuilder, words: &[&str]) {
    refused_bytes(&builder.build(), words);
}

#[track_caller]
fn refused_bytes(bytes: &[u8], words: &[&str]) {
    let start = Instant::now();
    let message = refusal(open(bytes), FILE);
    assert!(start.elapsed().as_millis() < 1000, "took {:?}", start.elapsed());
    for word in words {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
}

/// An array value: element type, count, elements.
fn array(kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), elements].concat()
}

fn small() -> GgufBuilder {
    GgufBuilder::new()
        .text("general.architecture", "llama")
        .number("llama.block_count", 2)
        .raw("flag", GGUF_BOOL, &[1])
        .raw("list", GGUF_ARRAY, &array(GGUF_STRING, 2, &[string(b"ab"), string(b"")].concat()))
        .raw("nested", GGUF_ARRAY, &array(GGUF_ARRAY, 1, &array(GGUF_U32, 2, &[1, 0, 0, 0, 2, 0, 0, 0])))
        .floats("b", &[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        .floats("a", &[1], &[7.0])
}

#[test]
fn a_small_file_is_read() {
    let scratch = Scratch::new();
    for version in [2_u32, 3] {
        let mut builder = small();
        builder.version = version.to_le_bytes();
        let file = GgufFile::open(&scratch.file(FILE, builder.build())).unwrap();
        assert_eq!(file.version(), version);
        let metadata = file.metadata();
        assert_eq!(metadata.string("general.architecture").unwrap(), "llama");
        assert_eq!(metadata.u64("llama.block_count").unwrap(), 2);
        assert!(metadata.bool("flag").unwrap());
        assert_eq!(metadata.strings("list").unwrap().iter().collect::<Vec<_>>(), ["ab", ""]);
        let nested = GgufValue::Array(GgufArray::Arrays(vec![GgufArray::U32(vec![1, 2])]));
        assert_eq!(metadata.get("nested"), Some(&nested));
        let names: Vec<&str> = file.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        let info = file.info("b").unwrap();
        assert_eq!((info.dtype, &info.shape[..]), (DType::F32, &[2, 3][..]));
        let bytes: Vec<u8> =
            [1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(file.read("b").unwrap(), bytes);
        assert!(file.read_into("b", &mut [0; 4]).is_err());
        assert!(file.read("c").is_err());
    }
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let whole = small().build();
    assert!(open(&whole).is_ok());
    for length in 0..whole.len() {
        let message = refusal(open(&whole[..length]), FILE);
        assert!(message.contains("byte"), "cut at {length}: `{message}` names no place");
    }
}

#[test]
fn other_magic_and_versions_are_refused_by_name() {
    let with = |magic: &[u8; 4], version: [u8; 4]| {
        let mut builder = small();
        builder.magic = *magic;
        builder.version = version;
        builder
    };
    refused(&with(b"GGML", 3_u32.to_le_bytes()), &["byte 0", "`GGUF`", "GGML"]);
    refused(&with(b"PK\x03\x04", 3_u32.to_le_bytes()), &["zip archive"]);
    refused(&with(b"GGUF", 1_u32.to_le_bytes()), &["version 1"]);
    refused(&with(b"GGUF", 4_u32.to_le_bytes()), &["version 4"]);
    refused(&with(b"GGUF", 0_u32.to_le_bytes()), &["version 0"]);
    refused(&with(b"GGUF", 3_u32.to_be_bytes()), &["big-endian", "version 3"]);
}

#[test]
fn counts_beyond_the_file_are_refused() {
    for count in [6, 1000, 1 << 60, u64::MAX] {
        let mut builder = GgufBuilder::new().number("a", 1);
        builder.key_count = Some(count);
        refused(&builder, &["metadata key"]);
        let mut builder = GgufBuilder::new();
        builder.tensor_count = Some(count);
        refused(&builder, &["tensors", &count.to_string()]);
    }
}

#[test]
fn strings_and_arrays_longer_than_the_file_are_refused() {
    for length in [9_u64, 1 << 20, 1 << 62, u64::MAX] {
        let mut lying = length.to_le_bytes().to_vec();
        lying.extend(b"12345678");
        refused(
            &GgufBuilder::new().raw("text", GGUF_STRING, &lying),
            &["metadata key `text`", "8 bytes are left"],
        );
        for kind in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] {
            let lying = array(kind, length, b"12345678");
            refused(
                &GgufBuilder::new().raw("list", GGUF_ARRAY, &lying),
                &["metadata key `list`", "8 bytes are left"],
            );
        }
    }
    let mut bytes = GgufBuilder::new().number("a", 1).build();
    bytes[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
    refused_bytes(&bytes, &["metadata key 0", "limit of 65535"]);
}

#[test]
fn unknown_types_and_bad_values_are_refused() {
    refused(&GgufBuilder::new().raw("key", 13, &[0; 8]), &["metadata key `key`", "value type 13"]);
    refused(&GgufBuilder::new().raw("key", GGUF_ARRAY, &array(77, 1, &[0; 8])), &["array element type 77"]);
    refused(&GgufBuilder::new().raw("key", GGUF_BOOL, &[2]), &["metadata key `key`", "truth value is 2"]);
    refused(&GgufBuilder::new().raw("key", GGUF_ARRAY, &array(GGUF_BOOL, 2, &[1, 9])), &["truth value is 9"]);
    refused(
        &GgufBuilder::new().raw("key", GGUF_STRING, &string(b"\xff")),
        &["metadata key `key`", "not UTF-8"],
    );
    refused(&small().number("flag", 1), &["metadata key `flag`", "present twice"]);
}

#[test]
fn arrays_that_nest_too_deep_or_too_often_are_refused() {
    let nest =
        |depth: usize| (1..depth).fold(array(GGUF_U32, 0, &[]), |inner, _| array(GGUF_ARRAY, 1, &inner));
    assert!(open(GgufBuilder::new().raw("deep", GGUF_ARRAY, &nest(4)).build()).is_ok());
    refused(&GgufBuilder::new().raw("deep", GGUF_ARRAY, &nest(5)), &["metadata key `deep`", "deeper than 4"]);
    refused(
        &GgufBuilder::new().raw("deep", GGUF_ARRAY, &nest(20_000)),
        &["metadata key `deep`", "deeper than 4"],
    );
    let many = array(GGUF_U32, 0, &[]).repeat(65_537);
    refused(
        &GgufBuilder::new().raw("wide", GGUF_ARRAY, &array(GGUF_ARRAY, 65_537, &many)),
        &["`wide`", "65536"],
    );
}

#[test]
fn alignment_must_be_a_small_power_of_two() {
    for alignment in [0, 1, 3, 4, 48, 1 << 17, 1 << 31] {
        let number = alignment.to_string();
        refused(&small().number("general.alignment", alignment), &["`general.alignment`", &number]);
    }
    refused(&small().text("general.alignment", "32"), &["`general.alignment` has type string"]);
    for alignment in [8, 64, 65_536] {
        let file =
            GgufBuilder::new().alignment(alignment).floats("a", &[1], &[1.0]).floats("b", &[1], &[2.0]);
        let file = open(file.build()).unwrap();
        assert_eq!(file.info("b").unwrap().offset % u64::from(alignment), 0);
    }
}

#[test]
fn tensors_that_lie_about_their_place_are_refused() {
    let with = |lengths: &[u64], kind, offset| {
        GgufBuilder::new()
            .raw_tensor("first", &[8], 0, 0)
            .raw_tensor("x", lengths, kind, offset)
            .data(&[0; 64])
    };
    assert!(open(with(&[8], 0, 32).build()).is_ok());
    refused(&with(&[8], 0, 33), &["tensor `x`", "offset 33", "alignment 32"]);
    refused(&with(&[8], 0, 0), &["inside the preceding tensor"]);
    refused(&with(&[9], 0, 32), &["tensor `x`", "36 bytes end at byte", "has only"]);
    refused(&with(&[8], 0, 64), &["tensor `x`", "has only"]);
    refused(&with(&[8], 0, 1 << 40), &["tensor `x`", "has only"]);
    refused(&with(&[8], 0, u64::MAX - 31), &["tensor `x`", "exceeds 64 bits"]);
    refused(&with(&[1 << 32, 1 << 32], 0, 32), &["tensor `x`", "exceeds 64 bits"]);
    refused(&with(&[1 << 62, 2, 2, 2], 0, 32), &["tensor `x`", "exceeds 64 bits"]);
    refused(&with(&[1 << 40], 0, 32), &["tensor `x`", "has only"]);
    refused(&with(&[1, 1, 1, 1, 1], 0, 32), &["tensor `x`", "5 dimensions"]);
    let twice = GgufBuilder::new().floats("x", &[1], &[1.0]).floats("x", &[1], &[1.0]);
    refused(&twice, &["tensor `x`", "present twice"]);
}

#[test]
fn tensor_types_are_checked() {
    let with = |lengths: &[u64], kind| GgufBuilder::new().raw_tensor("x", lengths, kind, 0).data(&[0; 1024]);
    refused(&with(&[256], 10), &["tensor `x`", "Q2_K"]);
    refused(&with(&[32], 4), &["tensor `x`", "number 4"]);
    refused(&with(&[32], 999), &["tensor `x`", "number 999"]);
    refused(&with(&[33], 8), &["tensor `x`", "33 elements", "Q8_0 blocks of 32"]);
    refused(&with(&[128, 2], 12), &["tensor `x`", "128 elements", "Q4_K blocks of 256"]);
    refused(&with(&[16, 2], 2), &["tensor `x`", "16 elements"]);
    assert_eq!(open(with(&[256, 2], 12).build()).unwrap().info("x").unwrap().bytes, 288);
}

#[test]
fn a_file_shortened_after_it_was_opened_is_an_error() {
    let scratch = Scratch::new();
    let path = scratch.file(FILE, small().build());
    let file = GgufFile::open(&path).unwrap();
    shorten(&path);
    assert!(file.read("b").is_ok());
    let message = refusal(file.read("a"), FILE);
    assert!(message.contains("tensor `a`"), "{message}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn damaged_bytes_never_panic(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut bytes = small().build();
        for (position, byte) in changes {
            let position = position.index(bytes.len());
            bytes[position] = byte;
        }
        if let Ok(file) = open(&bytes) {
            for tensor in file.tensors() {
                prop_assert_eq!(file.read(&tensor.name).unwrap().len() as u64, tensor.bytes);
            }
        }
    }
}
