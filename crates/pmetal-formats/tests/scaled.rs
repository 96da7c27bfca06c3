//! Checkpoints of codes and scales in two tensors, against transformers (see `tools/make_scaled_goldens.py`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

mod support;

use std::path::Path;

use pmetal_formats::DType;
use pmetal_formats::blocks::{Fp8Rows, dequantize_fp8, dequantize_mxfp4};
use pmetal_formats::checkpoint::Checkpoint;
use pmetal_formats::safetensors::SafetensorsFile;
use serde_json::{Value, json};
use support::{Scratch, refusal, safetensors_bytes, shorten};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/scaled");

fn fp8(block: &Value) -> Value {
    let method = json!({
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block,
    });
    json!({ "model_type": "deepseek_v3", "quantization_config": method })
}

fn mxfp4() -> Value {
    json!({ "quantization_config": { "quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"] } })
}

/// A folder of one file with that configuration.
fn folder(weights: &[u8], config: &Value) -> Scratch {
    let scratch = Scratch::new();
    scratch.file("model.safetensors", weights);
    scratch.file("config.json", config.to_string());
    scratch
}

/// A file of tensors, each of a name, a dtype, a shape and bytes.
fn tensors(list: &[(&str, &str, &[usize], Vec<u8>)]) -> Vec<u8> {
    let (mut entries, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in list {
        let begin = data.len();
        data.extend(bytes);
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()] });
        entries.insert((*name).to_owned(), entry);
    }
    safetensors_bytes(Value::Object(entries).to_string(), &data)
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[track_caller]
fn assert_same(name: &str, values: &[f32], expected: &[f32]) {
    assert_eq!(values.len(), expected.len(), "{name}");
    for (index, (value, wanted)) in values.iter().zip(expected).enumerate() {
        // Which NaN it is is up to the processor.
        let same = value.to_bits() == wanted.to_bits() || value.is_nan() && wanted.is_nan();
        assert!(same, "{name} element {index}: {value:?} ({:x}), not {wanted:?}", value.to_bits());
    }
}

/// A checkpoint of the goldens with the names, shapes, whole values and every range of rows that transformers gives.
fn assert_golden(case: &str, config: &Value, kind: DType) -> Scratch {
    let scratch = folder(&std::fs::read(format!("{DATA}/{case}.safetensors")).unwrap(), config);
    let checkpoint = Checkpoint::open(scratch.path()).unwrap();
    let expected = SafetensorsFile::open(Path::new(&format!("{DATA}/{case}.expected.safetensors"))).unwrap();
    let names: Vec<&str> = expected.tensors().iter().map(|info| info.name.as_str()).collect();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), names);
    for info in expected.tensors() {
        let (name, found) = (&info.name, checkpoint.info(&info.name).unwrap());
        assert_eq!((&found.name, &found.shape), (name, &info.shape));
        let wanted = expected.read_f32(name).unwrap();
        assert_same(name, &checkpoint.read_f32(name).unwrap(), &wanted);
        let row = info.elements() / info.shape[0];
        for start in 0..info.shape[0] {
            for end in start..=info.shape[0].min(start + 5) {
                let rows = checkpoint.read_f32_rows(name, start..end).unwrap();
                assert_same(&format!("{name} {start}..{end}"), &rows, &wanted[start * row..end * row]);
            }
        }
        if found.dtype == DType::Bf16 {
            continue;
        }
        assert_eq!(found.dtype, kind, "{name}");
        let message = checkpoint.read_bytes(name).unwrap_err().to_string();
        assert!(message.contains(name.as_str()) && message.contains(kind.name()), "{message}");
        assert!(checkpoint.read_into(name, &mut vec![0; found.bytes as usize]).is_err());
        assert_eq!(checkpoint.read_start(name, found.bytes as usize).unwrap().len() as u64, found.bytes);
        assert!(checkpoint.read_start(name, found.bytes as usize + 1).is_err());
    }
    scratch
}

#[test]
fn fp8_with_block_scales_equals_transformers_bit_for_bit() {
    let scratch = assert_golden("fp8", &fp8(&json!([4, 8])), DType::Fp8Blocks);
    let checkpoint = Checkpoint::open(scratch.path()).unwrap();
    let of_scales = std::fs::read(format!("{DATA}/fp8.safetensors")).unwrap();
    let file = scratch.file("other.safetensors", of_scales);
    let file = SafetensorsFile::open(&file).unwrap();
    let stored = [file.read("whole.weight").unwrap(), file.read("whole.weight_scale_inv").unwrap()].concat();
    assert_eq!(checkpoint.read_start("whole.weight", stored.len()).unwrap(), stored);
    assert_eq!(checkpoint.read_start("whole.weight", 5).unwrap(), stored[..5]);
}

#[test]
fn fp8_with_one_scale_a_matrix_equals_transformers_bit_for_bit() {
    assert_golden("fp8-whole", &fp8(&Value::Null), DType::Fp8Blocks);
}

#[test]
fn mxfp4_equals_transformers_bit_for_bit() {
    assert_golden("mxfp4", &mxfp4(), DType::Mxfp4);
}

#[test]
fn codes_and_scales_may_lie_in_different_shards() {
    let scratch = Scratch::new();
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    scratch.file(first, tensors(&[("a.weight", "F8_E4M3", &[2, 3], vec![0x38; 6])]));
    scratch.file(second, tensors(&[("a.weight_scale_inv", "F32", &[1, 2], floats(&[2.0, 3.0]))]));
    let map = json!({ "a.weight": first, "a.weight_scale_inv": second });
    scratch.file("model.safetensors.index.json", json!({ "weight_map": map }).to_string());
    scratch.file("config.json", fp8(&json!([2, 2])).to_string());
    let checkpoint = Checkpoint::open(scratch.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a.weight"]);
    assert_eq!(checkpoint.read_f32("a.weight").unwrap(), [2.0, 2.0, 3.0, 2.0, 2.0, 3.0]);
    assert_eq!(checkpoint.read_start("a.weight", 14).unwrap()[..7], [0x38, 0x38, 0x38, 0x38, 0x38, 0x38, 0]);
}

#[test]
fn blocks_are_128_by_128_where_the_configuration_is_silent() {
    let (rows, columns) = (130, 260);
    let scales: Vec<f32> = (0..6).map(|index| index as f32 + 1.0).collect();
    let weights = tensors(&[
        ("a.weight", "F8_E4M3", &[rows, columns], vec![0x38; rows * columns]),
        ("a.weight_scale_inv", "F32", &[2, 3], floats(&scales)),
    ]);
    let config = json!({ "quantization_config": { "quant_method": "fp8" } });
    let scratch = folder(&weights, &config);
    let values = Checkpoint::open(scratch.path()).unwrap().read_f32("a.weight").unwrap();
    for (index, value) in values.iter().enumerate() {
        let (row, column) = (index / columns, index % columns);
        assert_eq!(*value, (row / 128 * 3 + column / 128) as f32 + 1.0, "{row} {column}");
    }
}

#[test]
fn large_tensors_are_the_same_from_several_threads() {
    // Odd sizes, so that no thread's part is a whole number of anything.
    let (experts, rows, groups) = (3, 1001, 7);
    let codes: Vec<u8> = (0..experts * rows * groups * 16).map(|index| (index * 31 % 251) as u8).collect();
    let scales: Vec<u8> = (0..experts * rows * groups).map(|index| 100 + (index % 50) as u8).collect();
    let mut all = vec![0.0; codes.len() * 2];
    dequantize_mxfp4(&codes, &scales, [experts, rows, groups], &mut all).unwrap();
    for expert in 0..experts {
        let mut one = vec![0.0; all.len() / experts];
        let count = rows * groups;
        let (codes, scales) = (&codes[expert * count * 16..], &scales[expert * count..]);
        for group in 0..groups {
            // One group of each row alone is far below what threads are started for.
            let codes: Vec<u8> =
                (0..rows).flat_map(|row| codes[(row * groups + group) * 16..][..16].to_vec()).collect();
            let scales: Vec<u8> = (0..rows).map(|row| scales[row * groups + group]).collect();
            dequantize_mxfp4(&codes, &scales, [1, rows, 1], &mut one[group * 32 * rows..][..32 * rows])
                .unwrap();
        }
        assert_same("mxfp4", &one, &all[expert * one.len()..][..one.len()]);
    }
    let (rows, width) = (1003_usize, 517_usize);
    let codes: Vec<u8> = (0..rows * width).map(|index| (index * 7 % 127) as u8).collect();
    let scales: Vec<f32> =
        (0..rows.div_ceil(128) * width.div_ceil(64)).map(|index| index as f32 * 0.37).collect();
    let whole = Fp8Rows { first: 0, width, block: [128, 64] };
    let mut all = vec![0.0; codes.len()];
    dequantize_fp8(&codes, &scales, whole, &mut all).unwrap();
    for row in 0..rows {
        let mut one = vec![0.0; width];
        let part = Fp8Rows { first: row, ..whole };
        let scales = &scales[row / 128 * width.div_ceil(64)..][..width.div_ceil(64)];
        dequantize_fp8(&codes[row * width..][..width], scales, part, &mut one).unwrap();
        assert_same("fp8", &one, &all[row * width..][..width]);
    }
}

#[test]
fn rows_of_any_tensor_are_read_alone() {
    let weights = tensors(&[
        ("a", "F32", &[3, 2], floats(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])),
        ("scalar", "F32", &[], floats(&[7.0])),
        ("empty", "F32", &[0, 4], Vec::new()),
    ]);
    let scratch = folder(&weights, &json!({}));
    let checkpoint = Checkpoint::open(scratch.path()).unwrap();
    assert_eq!(checkpoint.read_f32_rows("a", 1..3).unwrap(), [2.0, 3.0, 4.0, 5.0]);
    assert_eq!(checkpoint.read_f32("scalar").unwrap(), [7.0]);
    assert_eq!(checkpoint.read_f32("empty").unwrap(), [0.0; 0]);
    assert_eq!(checkpoint.read_f32_rows("empty", 0..0).unwrap(), [0.0; 0]);
    #[allow(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    for (name, range) in [("a", 2..4), ("a", 3..2), ("scalar", 0..1), ("a", 0..usize::MAX)] {
        let message = checkpoint.read_f32_rows(name, range).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("no rows"), "{message}");
    }
}

#[track_caller]
fn refused(config: &Value, list: &[(&str, &str, &[usize], Vec<u8>)], words: &[&str]) {
    let scratch = folder(&tensors(list), config);
    let name = scratch.path().file_name().unwrap().to_str().unwrap().to_owned();
    let message = refusal(Checkpoint::open(scratch.path()), &name);
    for word in words {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
}

#[test]
fn fp8_pairs_that_do_not_match_are_refused_with_both_shapes() {
    let config = fp8(&json!([4, 8]));
    let weight = |shape: &'static [usize]| ("a.weight", "F8_E4M3", shape, vec![0; shape.iter().product()]);
    let scales = |shape: &'static [usize]| {
        ("a.weight_scale_inv", "F32", shape, vec![0; 4 * shape.iter().product::<usize>()])
    };
    let pair = |codes, factors, words: &[&str]| refused(&config, &[weight(codes), scales(factors)], words);
    refused(
        &config,
        &[weight(&[8, 16])],
        &["`a.weight`", "[8, 16]", "F8_E4M3", "no scales `a.weight_scale_inv`"],
    );
    refused(&config, &[scales(&[2, 2])], &["`a.weight_scale_inv`", "[2, 2]", "no tensor `a.weight`"]);
    pair(
        &[8, 16],
        &[2, 1],
        &["`a.weight`", "[8, 16]", "[4, 8]", "`a.weight_scale_inv`", "[2, 1]", "not [2, 2]"],
    );
    pair(&[9, 16], &[2, 2], &["[9, 16]", "not [3, 2]"]);
    pair(&[8, 16], &[2, 2, 1], &["[2, 2, 1]"]);
    pair(&[8, 16], &[], &["[8, 16]", "[]"]);
    pair(&[2, 8, 16], &[3, 2, 2], &["[2, 8, 16]", "[3, 2, 2]", "not [2, 2, 2]"]);
    pair(&[2, 5, 8], &[2, 1, 1], &["not [2, 2, 1]"]);
    pair(&[2, 3, 8], &[2, 2, 1], &["[2, 3, 8]", "not [2, 1, 1]"]);
    pair(&[4, 8], &[2, 1], &["not [1, 1]"]);
    pair(&[16], &[2], &["[16]", "two or three dimensions"]);
    pair(&[1, 1, 4, 8], &[1, 1, 1, 1], &["two or three dimensions"]);
    pair(&[0, 8], &[0, 1], &["[0, 8]"]);
    pair(&[2, 0, 1 << 40], &[2, 0, 1 << 37], &["[2, 0, 1099511627776]"]);
    let wide = ("a.weight", "BF16", &[4_usize, 8][..], vec![0; 64]);
    refused(&config, &[wide, scales(&[1, 1])], &["`a.weight`", "BF16", "[4, 8]", "[1, 1]", "F8_E4M3"]);
    let five = ("a.weight", "F8_E5M2", &[4_usize, 8][..], vec![0; 32]);
    refused(&config, &[five.clone(), scales(&[1, 1])], &["F8_E5M2"]);
    refused(&config, &[five], &["F8_E5M2", "no scales"]);
    let whole = ("a.weight_scale_inv", "I64", &[1_usize, 1][..], vec![0; 8]);
    refused(&config, &[weight(&[4, 8]), whole], &["`a.weight_scale_inv` are I64"]);
    refused(&fp8(&Value::Null), &[weight(&[8, 16]), scales(&[2, 2])], &["[8, 16]", "one scale", "[2, 2]"]);
}

#[test]
fn mxfp4_pairs_that_do_not_match_are_refused_with_both_shapes() {
    let blocks = |shape: &'static [usize]| ("e.up_blocks", "U8", shape, vec![0; shape.iter().product()]);
    let scales = |shape: &'static [usize]| ("e.up_scales", "U8", shape, vec![0; shape.iter().product()]);
    let config = mxfp4();
    let pair = |codes, factors, words: &[&str]| refused(&config, &[blocks(codes), scales(factors)], words);
    refused(&config, &[blocks(&[1, 2, 1, 16])], &["`e.up_blocks`", "[1, 2, 1, 16]", "no `e.up_scales`"]);
    refused(&config, &[scales(&[1, 2, 1])], &["`e.up_scales`", "[1, 2, 1]", "no `e.up_blocks`"]);
    pair(&[1, 2, 1, 16], &[1, 2, 2], &["`e.up_blocks`", "[1, 2, 1, 16]", "`e.up_scales`", "[1, 2, 2]"]);
    pair(&[1, 2, 1, 8], &[1, 2, 1], &["[1, 2, 1, 8]"]);
    pair(&[2, 1, 16], &[2, 1], &["[2, 1, 16]"]);
    pair(&[0, 1, 1 << 59, 16], &[0, 1, 1 << 59], &["[0, 1, "]);
    let wide = ("e.up_scales", "F32", &[1_usize, 2, 1][..], vec![0; 8]);
    refused(&config, &[blocks(&[1, 2, 1, 16]), wide], &["F32"]);
    let twice = ("e.up", "BF16", &[1_usize][..], vec![0; 2]);
    refused(&config, &[blocks(&[1, 2, 1, 16]), scales(&[1, 2, 1]), twice], &["`e.up`", "twice"]);
}

#[test]
fn methods_and_fields_that_are_not_read_are_refused_by_name() {
    let packed = || ("a.qweight", "I32", &[1_usize, 2][..], vec![0; 8]);
    let method = |fields: Value| json!({ "quantization_config": fields });
    for (fields, word) in [
        (json!({ "quant_method": "gptq", "bits": 4 }), "`gptq`"),
        (json!({ "quant_method": ["fp8"] }), "[\\\"fp8\\\"]"),
        (json!({ "bits": 4 }), "is null"),
        (json!("fp8"), "is null"),
        (json!({ "quant_method": "x".repeat(100_000) }), "..."),
    ] {
        refused(
            &method(fields),
            &[packed()],
            &["config.json", "quant_method", word, "`a.qweight`", "[1, 2]", "I32"],
        );
    }
    for block in
        [json!([128]), json!([0, 128]), json!([128, -1]), json!("128"), json!([1, 2, 3]), json!([1.5, 2])]
    {
        let shown = block.to_string().replace('"', "`");
        refused(&fp8(&block), &[packed()], &["config.json", "weight_block_size", &shown]);
    }
    let four = method(json!({ "quant_method": "fp8", "expert_dtype": "fp4" }));
    refused(&four, &[packed()], &["expert_dtype", "`fp4`"]);
}

#[test]
fn folders_without_a_method_are_as_they_were() {
    let list = [("a.weight", "F8_E4M3", &[1_usize, 2][..], vec![0; 2]), ("b_blocks", "U8", &[1], vec![0])];
    for config in [json!({}), json!({ "quantization_config": null }), json!([])] {
        let scratch = folder(&tensors(&list), &config);
        let checkpoint = Checkpoint::open(scratch.path()).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a.weight", "b_blocks"]);
        let message = checkpoint.read_f32("a.weight").unwrap_err().to_string();
        assert!(message.contains("`a.weight`") && message.contains("F8_E4M3"), "{message}");
    }
    // A model that was dequantised may keep its configuration's words.
    let plain = [("a.weight", "F32", &[1_usize][..], floats(&[1.0]))];
    let scratch = folder(&tensors(&plain), &json!({ "quantization_config": { "quant_method": "gptq" } }));
    assert_eq!(Checkpoint::open(scratch.path()).unwrap().read_f32("a.weight").unwrap(), [1.0]);
    scratch.file("config.json", "{");
    assert!(Checkpoint::open(scratch.path()).is_ok());
}

#[test]
fn lengths_that_disagree_are_refused() {
    let mut out = [0.0; 64];
    let part = Fp8Rows { first: 0, width: 4, block: [2, 2] };
    for (codes, scales, part, wanted) in [
        (8, 2, part, 8),
        (8, 2, part, 7),
        (7, 2, part, 7),
        (8, 1, part, 8),
        (8, 2, Fp8Rows { width: 0, ..part }, 8),
        (8, 2, Fp8Rows { block: [0, 2], ..part }, 8),
        (8, 2, Fp8Rows { block: [2, 0], ..part }, 8),
        (8, 2, Fp8Rows { first: 1, ..part }, 8),
        (8, 4, Fp8Rows { first: 1, ..part }, 8),
        (8, 2, Fp8Rows { first: usize::MAX - 1, block: [usize::MAX, 2], ..part }, 8),
    ] {
        let answer = dequantize_fp8(&vec![0; codes], &vec![0.0; scales], part, &mut out[..wanted]);
        let fits = (codes, wanted) == (8, 8)
            && (part.first, scales) == (0, 2)
            && part.width * part.block[0] * part.block[1] == 16
            || (part.first, scales) == (1, 4);
        assert_eq!(answer.is_ok(), fits, "{codes} {scales} {part:?} {wanted}");
    }
    assert!(dequantize_mxfp4(&[0; 32], &[0; 2], [1, 2, 1], &mut out).is_ok());
    for (codes, scales, shape, wanted) in [
        (32, 2, [1, 2, 1], 63),
        (31, 2, [1, 2, 1], 64),
        (32, 1, [1, 2, 1], 64),
        (32, 2, [1, 1, 1], 64),
        (32, 2, [usize::MAX, 2, 1], 64),
        (0, 0, [usize::MAX, usize::MAX, 0], 0),
    ] {
        assert!(dequantize_mxfp4(&vec![0; codes], &vec![0; scales], shape, &mut out[..wanted]).is_err());
    }
    assert!(dequantize_mxfp4(&[], &[], [0, 3, 2], &mut []).is_ok());
    assert!(dequantize_mxfp4(&[], &[], [3, 0, 2], &mut []).is_ok());
    assert!(dequantize_mxfp4(&[], &[], [3, 2, 0], &mut []).is_ok());
}

#[test]
fn a_file_that_is_cut_afterwards_is_an_error() {
    let scratch = folder(&std::fs::read(format!("{DATA}/mxfp4.safetensors")).unwrap(), &mxfp4());
    let checkpoint = Checkpoint::open(scratch.path()).unwrap();
    shorten(&scratch.path().join("model.safetensors"));
    let answers: Vec<_> = checkpoint.names().map(|name| checkpoint.read_f32(name)).collect();
    assert!(answers.iter().any(Result::is_err));
    for message in answers.into_iter().filter_map(|answer| Some(answer.err()?.to_string())) {
        assert!(message.contains("model.safetensors"), "{message}");
    }
}

#[test]
fn experts_of_the_gpt_oss_fixture_have_the_values_of_transformers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/gpt-oss-mxfp4");
    let path = Path::new(path);
    if !path.exists() {
        return println!("skipped: experts_of_the_gpt_oss_fixture_have_the_values_of_transformers");
    }
    assert!(assert_dequant(path) > 0);
}

#[test]
fn weights_of_the_fp8_fixture_have_the_values_of_transformers() {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/deepseek-v3-fp8"));
    if !path.exists() {
        return println!("skipped: weights_of_the_fp8_fixture_have_the_values_of_transformers");
    }
    assert!(assert_dequant(path) > 0);
}

/// Compares every `dequant.*` of a fixture; a reference in bf16 has rounded the product.
fn assert_dequant(path: &Path) -> usize {
    let checkpoint = Checkpoint::open(path).unwrap();
    let expected = SafetensorsFile::open(&path.join("expected.safetensors")).unwrap();
    let mut count = 0;
    for info in expected.tensors() {
        let Some(name) = info.name.strip_prefix("dequant.") else { continue };
        let mut values = checkpoint.read_f32(name).unwrap();
        assert_eq!(checkpoint.info(name).unwrap().shape, info.shape);
        if info.dtype == DType::Bf16 {
            values.iter_mut().for_each(|value| *value = half::bf16::from_f32(*value).to_f32());
        }
        assert_same(name, &values, &expected.read_f32(&info.name).unwrap());
        count += 1;
    }
    count
}

fn dimension() -> impl proptest::strategy::Strategy<Value = usize> {
    use proptest::prelude::*;
    prop_oneof![0_usize..20, Just(16), Just(1 << 40), any::<usize>()]
}

proptest::proptest! {
    #[test]
    fn arbitrary_shapes_never_panic(
        codes in proptest::collection::vec(dimension(), 0..5),
        scales in proptest::collection::vec(dimension(), 0..4),
        kinds in (0_usize..8, 0_usize..8),
        block in (dimension(), dimension()),
        suffixes in (0_usize..5, 0_usize..5),
        method in 0_usize..3,
    ) {
        const DTYPES: [(&str, usize); 8] = [
            ("F8_E4M3", 1), ("F32", 4), ("U8", 1), ("F8_E4M3", 1), ("F32", 4), ("U8", 1), ("BF16", 2), ("I32", 4),
        ];
        const SUFFIXES: [&str; 5] = ["", "_scale_inv", "_blocks", "_scales", ".weight"];
        // As many bytes as the shape says, where that is few, so that the header is taken.
        let bytes = |shape: &[usize], kind: usize| {
            let count = shape.iter().try_fold(DTYPES[kind].1, |product, &length| product.checked_mul(length));
            vec![0x35; count.filter(|&count| count < 100_000).unwrap_or(0)]
        };
        let names = [format!("a{}", SUFFIXES[suffixes.0]), format!("a{}", SUFFIXES[suffixes.1])];
        let list = [
            (names[0].as_str(), DTYPES[kinds.0].0, &codes[..], bytes(&codes, kinds.0)),
            (names[1].as_str(), DTYPES[kinds.1].0, &scales[..], bytes(&scales, kinds.1)),
        ];
        let config = [fp8(&json!([block.0, block.1])), fp8(&Value::Null), mxfp4()][method].clone();
        let scratch = folder(&tensors(&list), &config);
        if let Ok(checkpoint) = Checkpoint::open(scratch.path()) {
            for name in checkpoint.names() {
                let info = checkpoint.info(name).unwrap();
                if let Ok(values) = checkpoint.read_f32(name) {
                    proptest::prop_assert_eq!(values.len(), info.elements());
                }
                let _ = checkpoint.read_f32_rows(name, 0..1);
                let _ = checkpoint.read_start(name, 3);
            }
        }
    }
}
