//! What a session keeps of a text: its memory, and the same logits as a full forward pass over texts far longer than what
//! is kept.
#![allow(clippy::disallowed_methods)] // tests prepare files as they like
#![allow(clippy::unwrap_used, clippy::panic)] // a test that fails may panic, also in its helpers

mod support;

use pmetal::engine::{Category, DType, Device, Tape};
use pmetal::generate::Session;
use pmetal::lora;
use pmetal::models::loader::{self, LoadOptions};
use pmetal::models::spec::{LatentSpec, Projection};
use pmetal::models::{Decoder, Forward, TokenRun};
use support::fixture;

/// A fixture's decoder on a device of its own, so that its memory is counted alone.
fn decoder_of(name: &str) -> Decoder {
    let (checkpoint, config) = loader::open(&fixture(name)).unwrap();
    let options = LoadOptions { dtype: DType::F32, train_all: false };
    loader::load(&checkpoint, &config, &Device::cpu(), options).unwrap().decoder
}

fn text(decoder: &Decoder, length: usize) -> Vec<u32> {
    let limit = decoder.spec.vocabulary as u64;
    (0..length as u64).map(|index| (((index * index * 2_654_435_761) >> 7) % limit) as u32).collect()
}

fn full_forward(decoder: &Decoder, ids: &[u32]) -> Vec<f32> {
    let states = decoder.hidden(&Tape::off(), &TokenRun::single(ids), Forward::default()).unwrap();
    let states = states.into_tensor().slice_rows(ids.len() - 1, 1).unwrap();
    decoder.logits(&states).unwrap().to_f32_vec().unwrap()
}

fn assert_same(decoder: &Decoder, logits: &[f32], ids: &[u32], what: &str) {
    let expected = full_forward(decoder, ids);
    let top = expected.iter().fold(0.0f32, |top, x| top.max(x.abs()));
    for (index, (logit, expected)) in logits.iter().zip(&expected).enumerate() {
        let error = (logit - expected).abs();
        assert!(error <= 1e-4 * top, "{what}, {} tokens, logit {index}: {logit} for {expected}", ids.len());
    }
}

fn cache_bytes(decoder: &Decoder) -> usize {
    decoder.device().memory().report().live(Category::Cache)
}

/// Bytes of rows for so many tokens of the layers that see all, and for as many as those with a window or chunk keep.
fn expected_bytes(decoder: &Decoder, all: usize, within: impl Fn(usize) -> usize) -> usize {
    let layers = decoder.spec.layers.iter().map(|layer| {
        let (attention, mask) = (&layer.attention, layer.attention.mask);
        let rows = mask.chunk.or(mask.window).map_or(all, &within);
        4 * rows * attention.key_value_heads * (attention.head_width + attention.value_width)
    });
    layers.sum()
}

#[test]
fn layers_with_a_window_or_a_chunk_keep_no_more_than_that() {
    for name in ["mistral-window", "gemma3-text", "gpt-oss", "llama4-text", "qwen2-window", "cohere2"] {
        let decoder = decoder_of(name);
        let ids = text(&decoder, 2000);
        let mut session = Session::new(&decoder).unwrap();
        let logits = session.extend(&ids[..1100]).unwrap();
        assert_same(&decoder, &logits, &ids[..1100], name);
        // Runs have up to 512 tokens, and room is made in steps of 256.
        let within = |keys: usize| (keys - 1 + 512).next_multiple_of(256);
        let room = |bytes: usize, tokens: usize| {
            (tokens..3 * tokens / 2 + 256).any(|all| expected_bytes(&decoder, all, within) == bytes)
        };
        assert!(room(cache_bytes(&decoder), 1100), "{name}: {} bytes", cache_bytes(&decoder));
        // One at a time over a border of the rows, with a look at all that may go wrong about it.
        for end in 1101..1700 {
            let logits = session.extend(&ids[end - 1..end]).unwrap();
            if end % 67 == 0 || (1270..1285).contains(&end) {
                assert_same(&decoder, &logits, &ids[..end], name);
            }
        }
        let logits = session.extend(&ids[1699..]).unwrap();
        assert_same(&decoder, &logits, &[&ids[..1699], &ids[1699..]].concat(), name);
        assert!(room(cache_bytes(&decoder), 2000), "{name}: {} bytes", cache_bytes(&decoder));
    }
}

#[test]
fn a_session_goes_back_to_any_length_of_a_text_that_was_let_go_of() {
    for name in ["mistral-window", "gemma3-text", "llama4-text"] {
        let decoder = decoder_of(name);
        let ids = text(&decoder, 1300);
        for kept in [0, 1, 6, 500, 1023, 1024, 1025, 1030, 1299] {
            let mut session = Session::new(&decoder).unwrap();
            session.extend(&ids).unwrap();
            session.truncate(kept);
            let other: Vec<u32> = ids[..kept].iter().copied().chain([3, 1, 4, 1, 5]).collect();
            let logits = session.extend(&other[kept..]).unwrap();
            assert_eq!(session.ids(), other);
            assert_same(&decoder, &logits, &other, name);
        }
    }
}

const LATENT: [&str; 4] = ["deepseek-v3", "deepseek-v3-no-q-lora", "deepseek-v32", "deepseek-v32-bias"];

fn latent_of(decoder: &Decoder) -> LatentSpec {
    let Projection::Latent(latent) = decoder.spec.layers[0].attention.projection else {
        panic!("{} has no latent vectors", decoder.spec.family)
    };
    latent
}

#[test]
fn latent_attention_keeps_one_vector_and_the_rotated_key_of_a_token() {
    for name in LATENT {
        let decoder = decoder_of(name);
        let (latent, ids) = (latent_of(&decoder), text(&decoder, 300));
        let mut session = Session::new(&decoder).unwrap();
        session.extend(&ids[..200]).unwrap();
        let columns =
            latent.key_value_rank + latent.rotated_width + latent.indexer.map_or(0, |indexer| indexer.width);
        let bytes = |rows: usize| decoder.spec.layers.len() * 4 * rows * columns;
        assert_eq!(cache_bytes(&decoder), bytes(256), "{name}");
        session.extend(&ids[200..]).unwrap();
        assert_eq!(cache_bytes(&decoder), bytes(512), "{name}");
    }
}

#[test]
fn latent_vectors_give_the_logits_of_heads_of_keys_and_values() {
    for name in LATENT {
        let decoder = decoder_of(name);
        let ids = text(&decoder, 700);
        let mut session = Session::new(&decoder).unwrap();
        let mut end = 0;
        // Runs that make keys and values of what is held, and runs that do not.
        for count in [3, 1, 100, 9, 1, 30, 530, 1, 2, 8, 12] {
            let logits = session.extend(&ids[end..end + count]).unwrap();
            end += count;
            assert_same(&decoder, &logits, &ids[..end], name);
        }
    }
}

#[test]
fn adapters_take_part_where_keys_and_values_are_not_made() {
    // The adapter of the last leaves keys and values alone.
    for &name in &LATENT[..3] {
        let mut decoder = decoder_of(name);
        let ids = text(&decoder, 40);
        let plain = full_forward(&decoder, &ids);
        lora::load(&mut decoder, &fixture(name).join("adapter"), false).unwrap();
        let adapted = |module: &str| module.ends_with("kv_b_proj");
        let names = lora::tensors(&decoder).unwrap();
        assert!(names.iter().any(|(name, _)| name.split(".lora_").next().is_some_and(adapted)), "{name}");
        let changed = full_forward(&decoder, &ids);
        assert!(plain.iter().zip(&changed).any(|(plain, changed)| (plain - changed).abs() > 1e-2), "{name}");
        let mut session = Session::new(&decoder).unwrap();
        let mut logits = session.extend(&ids[..2]).unwrap();
        for end in 2..=ids.len() {
            assert_same(&decoder, &logits, &ids[..end], name);
            if end < ids.len() {
                logits = session.extend(&ids[end..=end]).unwrap();
            }
        }
    }
}
