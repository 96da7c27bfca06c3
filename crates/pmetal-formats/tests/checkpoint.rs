//! Checkpoints: folders, shards and GGUF files, honest and hostile.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

mod support;

use std::path::Path;

use pmetal_formats::checkpoint::Checkpoint;
use pmetal_formats::safetensors::SafetensorsFile;
use serde_json::{Value, json};
use support::{GgufBuilder, Scratch, refusal, scalars};

const INDEX: &str = "model.safetensors.index.json";
const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";

/// A folder with two shards of one tensor each, and an index that says `weight_map`.
fn sharded(weight_map: &Value) -> Scratch {
    let scratch = Scratch::new();
    scratch.file(FIRST, scalars(&[("a", 1.0)]));
    scratch.file(SECOND, scalars(&[("b", 2.0)]));
    scratch.file(INDEX, json!({ "metadata": { "total_size": 8 }, "weight_map": weight_map }).to_string());
    scratch
}

#[track_caller]
fn refused(path: &Path, file_name: &str, words: &[&str]) {
    let message = refusal(Checkpoint::open(path), file_name);
    for word in words {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
}

#[test]
fn shards_appear_as_one_checkpoint() {
    let scratch = sharded(&json!({ "a": FIRST, "b": SECOND }));
    scratch.file("config.json", r#"{"model_type": "llama"}"#);
    let checkpoint = Checkpoint::open(scratch.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(checkpoint.read_f32("b").unwrap(), [2.0]);
    assert_eq!(checkpoint.read_bytes("a").unwrap(), 1.0_f32.to_le_bytes());
    assert_eq!(checkpoint.config().unwrap(), json!({ "model_type": "llama" }));
    assert_eq!(checkpoint.read_text_file("absent.json", 10).unwrap(), None);
    let message = refusal(checkpoint.read_text_file("config.json", 10), "config.json");
    assert!(message.contains("longer than 10 bytes"), "{message}");
    let message = checkpoint.read_f32("c").unwrap_err().to_string();
    assert!(message.contains("there is no tensor `c`"), "{message}");
}

#[test]
fn a_folder_and_its_file_open_alike() {
    let scratch = Scratch::new();
    let path = scratch.file("model.safetensors", scalars(&[("a", 1.0)]));
    scratch.file("config.json", "{}");
    for path in [scratch.path(), &path] {
        let checkpoint = Checkpoint::open(path).unwrap();
        assert_eq!(checkpoint.read_f32("a").unwrap(), [1.0]);
        assert_eq!(checkpoint.config().unwrap(), json!({}));
    }
}

#[test]
fn shard_names_that_are_no_plain_names_are_refused() {
    // A file that such a name would reach, so that only the rule stands in its way.
    let outside = Scratch::new();
    outside.file(SECOND, scalars(&[("b", 2.0)]));
    let absolute = outside.path().join(SECOND);
    let names = [
        "../model-00002-of-00002.safetensors",
        "..",
        ".",
        "",
        "/",
        "a/../../model.safetensors",
        "sub/model-00002-of-00002.safetensors",
        "./model-00002-of-00002.safetensors",
        "sub\\model.safetensors",
        "..\\model.safetensors",
        "C:\\model.safetensors",
        "C:model.safetensors",
        "model.safetensors\0",
        "model\0.safetensors",
        "https://example.com/model.safetensors",
        "model-00002-of-00002.txt",
        "config.json",
        absolute.to_str().unwrap(),
    ];
    for name in names {
        let scratch = sharded(&json!({ "a": FIRST, "b": name }));
        std::fs::create_dir(scratch.path().join("sub")).unwrap();
        scratch.file("sub/model-00002-of-00002.safetensors", scalars(&[("b", 2.0)]));
        refused(scratch.path(), INDEX, &["weight_map", "not a plain file name"]);
    }
}

#[test]
fn shards_that_disagree_with_the_index_are_refused() {
    let missing = sharded(&json!({ "a": FIRST, "b": "model-00003-of-00003.safetensors" }));
    refused(missing.path(), INDEX, &["the shard `model-00003-of-00003.safetensors` is missing"]);
    let gone = sharded(&json!({ "a": FIRST, "b": SECOND, "c": SECOND }));
    refused(gone.path(), INDEX, &["tensor `c` is not in its shard", SECOND]);
    let unlisted = sharded(&json!({ "a": FIRST, "b": SECOND }));
    unlisted.file(SECOND, scalars(&[("b", 2.0), ("extra", 3.0)]));
    refused(unlisted.path(), INDEX, &["tensor `extra`", SECOND, "is not listed"]);
    let twice = sharded(&json!({ "a": FIRST, "b": SECOND }));
    twice.file(SECOND, scalars(&[("a", 9.0), ("b", 2.0)]));
    refused(twice.path(), INDEX, &["tensor `a` is in", SECOND, "listed in", FIRST]);
    let swapped = sharded(&json!({ "a": SECOND, "b": FIRST }));
    refused(swapped.path(), INDEX, &["tensor `a`", "tensor `b`"]);
    let broken = sharded(&json!({ "a": FIRST, "b": SECOND }));
    broken.file(SECOND, b"short");
    refused(broken.path(), SECOND, &["5 bytes"]);
}

#[test]
fn an_index_of_another_form_is_refused() {
    let with = |text: &str| {
        let scratch = sharded(&json!({}));
        scratch.file(INDEX, text);
        scratch
    };
    let listed = format!(r#"{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}", "b": "{SECOND}"}}}}"#);
    refused(with(&listed).path(), INDEX, &["line 1", "tensor `a` is listed twice"]);
    refused(with("{}").path(), INDEX, &["line 1", "weight_map"]);
    refused(with("[]").path(), INDEX, &["line 1"]);
    refused(with(r#"{"weight_map": {"a": 1}}"#).path(), INDEX, &["line 1", "string"]);
    refused(with(&"[".repeat(100_000)).path(), INDEX, &["line 1"]);
    refused(with("{\"weight_map\": {\"a\": \"\u{1b}\"}}").path(), INDEX, &["line 1"]);
    let scratch = sharded(&json!({}));
    scratch.file(INDEX, b"\xff\xfe");
    refused(scratch.path(), INDEX, &["byte 0", "UTF-8"]);
    let endless: serde_json::Map<String, Value> =
        (0..3000).map(|n| (format!("t{n}"), json!(FIRST))).collect();
    refused(sharded(&json!(endless)).path(), INDEX, &["is not in its shard", "and 2991 more"]);
}

#[cfg(unix)]
#[test]
fn links_as_the_hub_cache_makes_them_are_followed() {
    const INDEX_IN_SNAPSHOT: &str = "snapshots/main/model.safetensors.index.json";
    let scratch = Scratch::new();
    let (blobs, snapshot) = (scratch.path().join("blobs"), scratch.path().join("snapshots/main"));
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir(&blobs).unwrap();
    scratch.file("blobs/0123abcd", scalars(&[("a", 1.0)]));
    scratch.file("blobs/4567ef01", scalars(&[("b", 2.0)]));
    std::os::unix::fs::symlink("../../blobs/0123abcd", snapshot.join(FIRST)).unwrap();
    std::os::unix::fs::symlink("../../blobs/4567ef01", snapshot.join(SECOND)).unwrap();
    let index = json!({ "weight_map": { "a": FIRST, "b": SECOND } }).to_string();
    scratch.file(INDEX_IN_SNAPSHOT, index);
    assert_eq!(Checkpoint::open(&snapshot).unwrap().read_f32("b").unwrap(), [2.0]);
    // A linked folder is a separator in a name, whatever it links to.
    std::os::unix::fs::symlink("../../blobs", snapshot.join("out")).unwrap();
    let index = json!({ "weight_map": { "a": FIRST, "b": "out/4567ef01" } }).to_string();
    scratch.file(INDEX_IN_SNAPSHOT, index);
    refused(&snapshot, INDEX, &["`out/4567ef01`"]);
    std::fs::remove_file(scratch.path().join("blobs/0123abcd")).unwrap();
    scratch.file(INDEX_IN_SNAPSHOT, json!({ "weight_map": { "a": FIRST } }).to_string());
    refused(&snapshot, INDEX, &["missing"]);
}

#[test]
fn formats_that_run_code_are_refused_by_extension() {
    let cases = [
        ("pytorch_model.bin", "pickle"),
        ("model.pt", "pickle"),
        ("model.PTH", "pickle"),
        ("model.ckpt", "pickle"),
        ("weights.npz", "NumPy"),
        ("model.h5", "HDF5"),
        ("model.zip", "zip archive"),
    ];
    for (name, word) in cases {
        let scratch = Scratch::new();
        // Even when the bytes are harmless.
        let path = scratch.file(name, scalars(&[("a", 1.0)]));
        refused(&path, name, &[word, "convert", "safetensors"]);
    }
    for name in ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"] {
        let scratch = Scratch::new();
        scratch.file(name, b"\x80\x02");
        scratch.file("config.json", "{}");
        refused(scratch.path(), name, &["pickle", "can run any code", "convert"]);
    }
    let scratch = sharded(&json!({ "a": "pytorch_model-00001-of-00002.bin" }));
    refused(scratch.path(), INDEX, &["pytorch_model-00001-of-00002.bin", "pickle"]);
}

#[test]
fn formats_that_run_code_are_refused_by_their_first_bytes() {
    let cases: [(&[u8], &str); 6] = [
        (b"PK\x03\x04\x14\x00\x00\x00archive/data.pkl", "zip archive"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.", "pickle"),
        (b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00", "pickle"),
        (b"\x89HDF\r\n\x1a\n\x00\x00\x00", "HDF5"),
        (b"\x93NUMPY\x01\x00v\x00", "NumPy"),
        (b"PK\x03\x04", "zip archive"),
    ];
    let scratch = Scratch::new();
    for (bytes, word) in cases {
        for name in ["model.safetensors", "model.gguf"] {
            // Four bytes are too few for the length of a safetensors header, and say so.
            if bytes.len() < 8 && name == "model.safetensors" {
                continue;
            }
            let path = scratch.file(name, bytes);
            refused(&path, name, &[word, "convert"]);
        }
    }
    // A header of 640 bytes starts like a pickle of protocol 2, and is none.
    let mut bytes = scalars(&[("a", 1.0)]);
    let header = bytes.split_off(8);
    let (json, data) = header.split_at(header.len() - 4);
    let mut padded = json.to_vec();
    padded.resize(640, b' ');
    let bytes = [&640_u64.to_le_bytes()[..], &padded, data].concat();
    assert_eq!(bytes[..2], [0x80, 2]);
    assert!(SafetensorsFile::open(&scratch.file("good.safetensors", bytes)).is_ok());
}

#[test]
fn folders_without_weights_and_other_files_are_refused() {
    let scratch = Scratch::new();
    let folder_name = scratch.path().file_name().unwrap().to_str().unwrap().to_owned();
    refused(scratch.path(), &folder_name, &["neither model.safetensors nor model.safetensors.index.json"]);
    let path = scratch.file("notes.txt", "hello");
    refused(&path, "notes.txt", &["neither a folder nor"]);
    refused(&scratch.path().join("absent"), "absent", &["cannot open"]);
    std::fs::create_dir(scratch.path().join("model.gguf")).unwrap();
    refused(&scratch.path().join("model.gguf"), "model.gguf", &["neither"]);
}

/// The metadata of a Llama with one layer, two query heads, one key head of width 4, embedding width 8.
fn llama() -> GgufBuilder {
    let ramp = |count: usize| (0..count).map(|index| index as f32).collect::<Vec<_>>();
    GgufBuilder::new()
        .text("general.architecture", "llama")
        .number("llama.block_count", 1)
        .number("llama.embedding_length", 8)
        .number("llama.feed_forward_length", 16)
        .number("llama.context_length", 64)
        .number("llama.attention.head_count", 2)
        .number("llama.attention.head_count_kv", 1)
        .float("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .floats("token_embd.weight", &[8, 3], &ramp(24))
        .floats("blk.0.attn_q.weight", &[1, 8], &ramp(8))
        .floats("blk.0.attn_k.bias", &[4], &ramp(4))
}

fn open_gguf(builder: &GgufBuilder) -> (Scratch, pmetal_formats::Result<Checkpoint>) {
    let scratch = Scratch::new();
    let opened = Checkpoint::open(&scratch.file("model.gguf", builder.build()));
    (scratch, opened)
}

#[test]
fn llama_rows_are_put_back_into_half_split_order() {
    let (_scratch, checkpoint) = open_gguf(&llama());
    let checkpoint = checkpoint.unwrap();
    let query = checkpoint.read_f32("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert_eq!(query, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    assert_eq!(checkpoint.read_f32("model.layers.0.self_attn.k_proj.bias").unwrap(), [0.0, 2.0, 1.0, 3.0]);
    assert_eq!(checkpoint.info("model.embed_tokens.weight").unwrap().shape, [3, 8]);
}

#[test]
fn rows_of_a_gguf_tensor_are_those_of_the_whole() {
    // Four rows of two blocks of Q8_0 each, and rows that share a block.
    let block = |scale: u8| [0x00, scale].into_iter().chain(0..32).collect::<Vec<u8>>();
    let blocks: Vec<u8> = (0..8).flat_map(|index| block(0x30 + index)).collect();
    let file = llama()
        .data(&[0; 16])
        .raw_tensor("blk.0.ffn_up.weight", &[64, 4], 8, 160)
        .raw_tensor("blk.0.attn_q.bias", &[32], 8, 448)
        .data(&[&blocks[..], &[0; 16], &block(0x38)].concat());
    let (_scratch, checkpoint) = open_gguf(&file);
    let checkpoint = checkpoint.unwrap();
    for name in ["embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.up_proj.weight"] {
        let name = format!("model.{name}");
        let (whole, rows) = (checkpoint.read_f32(&name).unwrap(), checkpoint.info(&name).unwrap().shape[0]);
        let row = whole.len() / rows;
        for (start, end) in (0..rows).flat_map(|start| (start..=rows).map(move |end| (start, end))) {
            let part = checkpoint.read_f32_rows(&name, start..end).unwrap();
            assert_eq!(part, whole[start * row..end * row], "{name} {start}..{end}");
        }
        assert!(checkpoint.read_f32_rows(&name, 0..rows + 1).is_err());
    }
    let name = "model.layers.0.self_attn.q_proj.bias";
    let whole = checkpoint.read_f32(name).unwrap();
    assert_eq!(checkpoint.read_f32_rows(name, 3..7).unwrap(), whole[3..7]);
}

#[test]
fn a_block_quantised_bias_is_put_back_into_order_value_by_value() {
    // Two heads of 16 rows in one block of Q8_0: a scale of 1/2 and the numbers from 0.
    let block: Vec<u8> = [0x00, 0x38].into_iter().chain(0..32).collect();
    let quantised = GgufBuilder::new()
        .text("general.architecture", "llama")
        .number("llama.attention.head_count", 2)
        .raw_tensor("blk.0.attn_q.bias", &[32], 8, 0)
        .raw_tensor("blk.0.attn_v.bias", &[32], 8, 64)
        .data(&[&block[..], &[0; 30], &block[..]].concat());
    let (_scratch, opened) = open_gguf(&quantised);
    let opened = opened.unwrap();
    let (query, value) = ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.v_proj.bias");
    let stored: Vec<f32> = (0..32).map(|index| index as f32 / 2.0).collect();
    assert_eq!(opened.read_f32(value).unwrap(), stored);
    // Of each head first the even, then the odd rows.
    let expected: Vec<f32> =
        (0..32).map(|row| (row / 16 * 16 + row % 8 * 2 + row % 16 / 8) as f32 / 2.0).collect();
    assert_eq!(opened.read_f32(query).unwrap(), expected);
    assert_eq!(opened.read_bytes(value).unwrap(), block);
    let message = opened.read_bytes(query).unwrap_err().to_string();
    assert!(message.contains(query) && message.contains("no whole number of Q8_0 blocks"), "{message}");
    assert!(opened.read_into(query, &mut [0; 34]).is_err());
}

#[test]
fn an_index_of_too_many_tensors_is_refused() {
    let listed: Vec<String> = (0..=200_000).map(|index| format!(r#""{index}":"{FIRST}""#)).collect();
    let scratch = Scratch::new();
    scratch.file(INDEX, format!(r#"{{"weight_map":{{{}}}}}"#, listed.join(",")));
    refused(scratch.path(), INDEX, &["more than 200000 tensors are listed"]);
}

#[test]
fn a_gguf_configuration_has_the_fields_of_config_json() {
    let config = |builder: GgufBuilder| open_gguf(&builder).1.unwrap().config().unwrap();
    let plain = config(llama());
    let expected = [
        ("model_type", json!("llama")),
        ("vocab_size", json!(3)),
        ("hidden_size", json!(8)),
        ("intermediate_size", json!(16)),
        ("num_hidden_layers", json!(1)),
        ("num_attention_heads", json!(2)),
        ("num_key_value_heads", json!(1)),
        ("head_dim", json!(4)),
        ("max_position_embeddings", json!(64)),
        ("rms_norm_eps", json!(1e-5)),
        ("rope_theta", json!(10_000.0)),
        ("tie_word_embeddings", json!(true)),
    ];
    for (name, value) in expected {
        assert_eq!(plain[name], value, "{name}");
    }
    let untied = config(
        llama()
            .float("llama.rope.freq_base", 1e5)
            .number("llama.attention.key_length", 6)
            .number("tokenizer.ggml.eos_token_id", 2)
            .text("llama.rope.scaling.type", "linear")
            .float("llama.rope.scaling.factor", 4.0)
            .floats("output.weight", &[8, 3], &[0.0; 24]),
    );
    assert_eq!(untied["tie_word_embeddings"], json!(false));
    assert_eq!(untied["rope_theta"], json!(1e5));
    assert_eq!(untied["head_dim"], json!(6));
    assert_eq!(untied["eos_token_id"], json!(2));
    assert_eq!(untied["rope_scaling"], json!({ "rope_type": "linear", "factor": 4.0 }));
    let divided = config(llama().floats("rope_freqs.weight", &[2], &[1.0, 8.0]));
    assert_eq!(divided["rope_frequency_factors"], json!([1.0, 8.0]));
    let window = config(llama().number("llama.attention.sliding_window", 32));
    assert_eq!((&window["model_type"], &window["sliding_window"]), (&json!("mistral"), &json!(32)));
}

#[test]
fn gguf_files_that_are_no_whole_known_model_are_refused() {
    let refuse = |builder: &GgufBuilder, words: &[&str]| {
        let (_scratch, opened) = open_gguf(builder);
        let message = opened.map(|checkpoint| checkpoint.config()).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "`{message}` lacks `{word}`");
        }
    };
    refuse(&GgufBuilder::new().text("general.architecture", "mamba"), &["model.gguf", "`mamba`", "llama"]);
    refuse(&GgufBuilder::new(), &["`general.architecture` is missing"]);
    refuse(&llama().text("general.type", "adapter"), &["model.gguf", "`general.type` is `adapter`"]);
    refuse(&llama().number("split.count", 3), &["model.gguf", "one of 3 parts"]);
    refuse(
        &llama().floats("model.embed_tokens.weight", &[1], &[0.0]),
        &["token_embd.weight", "are the same one"],
    );
    let no_heads =
        GgufBuilder::new().text("general.architecture", "llama").number("llama.attention.head_count", 0);
    refuse(&no_heads, &["`llama.attention.head_count`", "0 is not a number of heads"]);
    let odd = llama().floats("blk.0.attn_k.weight", &[1, 7], &[0.0; 7]);
    let (_scratch, opened) = open_gguf(&odd);
    let message = opened.unwrap().read_f32("model.layers.0.self_attn.k_proj.weight").unwrap_err().to_string();
    assert!(message.contains("k_proj.weight") && message.contains("7 rows"), "{message}");
}
