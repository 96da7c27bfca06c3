//! A released model in GGUF form: SmolLM2-135M-Instruct, Q4_1, 272 tensors (see `tools/make_smollm2_goldens.py`).
//!
//! The file is looked for at `PMETAL_SMOLLM2` and at `models/smollm2-135m-instruct.gguf` of the workspace; without it
//! nothing is tested. `PMETAL_SMOLLM2_REFERENCE` may name a safetensors file with what another program dequantised.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

use std::path::{Path, PathBuf};

use pmetal_formats::chat_template::{ChatTemplate, RenderRequest};
use pmetal_formats::checkpoint::Checkpoint;
use pmetal_formats::safetensors::SafetensorsFile;
use pmetal_formats::tokenizer::{GgufTokenizer, SpecialText, Tokenizer};
use serde_json::{Map, Value, json};

fn model(test: &str) -> Option<Checkpoint> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/smollm2-135m-instruct.gguf");
    let path = std::env::var_os("PMETAL_SMOLLM2").map_or(beside, PathBuf::from);
    if path.is_file() {
        return Some(Checkpoint::open(&path).unwrap());
    }
    println!("skipped: {test}");
    None
}

fn tokenizer(checkpoint: &Checkpoint) -> Tokenizer {
    let fields = GgufTokenizer::from_metadata(checkpoint.gguf().unwrap().metadata()).unwrap();
    Tokenizer::from_gguf_fields(checkpoint.path(), &fields).unwrap()
}

fn golden() -> Value {
    serde_json::from_str(include_str!("data/smollm2.json")).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn smollm2_has_the_tensors_of_its_config() {
    let Some(checkpoint) = model("smollm2_has_the_tensors_of_its_config") else { return };
    let mut expected: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".to_owned(), vec![49152, 576]),
        ("model.norm.weight".to_owned(), vec![576]),
    ];
    for layer in 0..30 {
        for (name, shape) in [
            ("self_attn.q_proj", vec![576, 576]),
            ("self_attn.k_proj", vec![192, 576]),
            ("self_attn.v_proj", vec![192, 576]),
            ("self_attn.o_proj", vec![576, 576]),
            ("mlp.gate_proj", vec![1536, 576]),
            ("mlp.up_proj", vec![1536, 576]),
            ("mlp.down_proj", vec![576, 1536]),
            ("input_layernorm", vec![576]),
            ("post_attention_layernorm", vec![576]),
        ] {
            expected.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    expected.sort();
    let found: Vec<_> = checkpoint
        .names()
        .map(|name| (name.to_owned(), checkpoint.info(name).unwrap().shape.clone()))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn smollm2_has_the_config_of_its_release() {
    let Some(checkpoint) = model("smollm2_has_the_config_of_its_release") else { return };
    // The fields of the released config.json that the metadata can tell; `head_dim` follows from them.
    let released = json!({
        "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
        "intermediate_size": 1536, "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "tie_word_embeddings": true, "vocab_size": 49152,
        "head_dim": 64,
    });
    assert_eq!(checkpoint.config().unwrap(), released);
}

#[test]
fn smollm2_encodes_as_its_own_tokenizer() {
    let Some(checkpoint) = model("smollm2_encodes_as_its_own_tokenizer") else { return };
    let tokenizer = tokenizer(&checkpoint);
    assert_eq!(tokenizer.vocabulary_size(), 49152);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (Some(1), Some(2), Some(2)));
    for case in golden()["encoded"].as_array().unwrap() {
        let (text, expected) = (case["text"].as_str().unwrap(), ids(&case["ids"]));
        assert_eq!(tokenizer.encode(text, SpecialText::Parse).unwrap(), expected, "{text:?}");
        assert_eq!(tokenizer.decode(&expected, false).unwrap(), text);
        assert_eq!(tokenizer.encode_document(text).unwrap(), tokenizer.encode_prompt(text).unwrap());
    }
    // The files that a fused model gets say the same.
    let files = tokenizer.to_files().unwrap();
    let file = |name: &str| files.iter().find(|(file, _)| file == name).map(|(_, bytes)| bytes.as_slice());
    let again = Tokenizer::from_parts(
        file("tokenizer.json").unwrap(),
        file("tokenizer_config.json"),
        Path::new("files"),
    )
    .unwrap();
    for case in golden()["encoded"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(again.encode(text, SpecialText::Parse).unwrap(), ids(&case["ids"]), "{text:?}");
    }
}

#[test]
fn smollm2_renders_chats_as_transformers() {
    let Some(checkpoint) = model("smollm2_renders_chats_as_transformers") else { return };
    let tokenizer = tokenizer(&checkpoint);
    let template = ChatTemplate::compile(tokenizer.chat_templates().default.as_deref().unwrap()).unwrap();
    let golden = golden();
    assert!(golden["chats"][0]["text"].as_str().unwrap().contains("named SmolLM, trained by Hugging Face"));
    for chat in golden["chats"].as_array().unwrap() {
        let request = RenderRequest {
            messages: &chat["messages"],
            tools: None,
            documents: None,
            add_generation_prompt: chat["add_generation_prompt"].as_bool().unwrap(),
            continue_final_message: false,
            variables: &Map::new(),
            now_unix_s: 0,
        };
        let text = template.render(&request).unwrap().text;
        assert_eq!(text, chat["text"].as_str().unwrap());
        assert_eq!(tokenizer.encode(&text, SpecialText::Parse).unwrap(), ids(&chat["ids"]));
    }
}

#[test]
fn smollm2_dequantises_as_the_reference() {
    let test = "smollm2_dequantises_as_the_reference";
    let Some(reference) = std::env::var_os("PMETAL_SMOLLM2_REFERENCE") else {
        println!("skipped: {test}");
        return;
    };
    let Some(checkpoint) = model(test) else { return };
    let reference = SafetensorsFile::open(Path::new(&reference)).unwrap();
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let names: Vec<_> = reference.tensors().iter().map(|info| info.name.as_str()).collect();
    assert_eq!(names, checkpoint.names().collect::<Vec<_>>());
    for name in names {
        let (own, expected) = (checkpoint.read_f32(name).unwrap(), reference.read_f32(name).unwrap());
        assert!(bits(own) == bits(expected), "{name}");
    }
}
