//! Steps that a device takes by itself against the host's: on the emulator of GPU kernels, whose recordings are replayed
//! as graphs are. Without a C++ compiler every test says so and passes.
#![allow(clippy::disallowed_methods)] // tests prepare files as they like
#![allow(clippy::unwrap_used, clippy::panic)] // a test that fails may panic, also in its helpers

mod support;

use std::path::Path;

use pmetal::engine::{DType, Device};
use pmetal::formats::safetensors::SafetensorsFile;
use pmetal::generate::{Finish, Sampling, Session, StopRules};
use pmetal::models::Decoder;
use pmetal::models::loader::{self, LoadOptions};
use support::fixture;

fn emulator() -> Option<Device> {
    let device = Device::emulator(1);
    if device.is_none() {
        println!("skipped: no C++ compiler");
    }
    device
}

fn decoder_on(folder: &Path, device: &Device, dtype: DType) -> Decoder {
    let (checkpoint, config) = loader::open(folder).unwrap();
    let options = LoadOptions { dtype, train_all: false };
    loader::load(&checkpoint, &config, device, options).unwrap().decoder
}

fn greedy_of(folder: &Path) -> (Vec<u32>, Vec<u32>) {
    let expected = SafetensorsFile::open(&folder.join("expected.safetensors")).unwrap();
    let read = |name: &str, count: usize| -> Vec<u32> {
        expected.read_i64(name).unwrap()[..count].iter().map(|&id| id as u32).collect()
    };
    (read("input_ids", 8), read("greedy", 24))
}

/// What a session continues a text with.
fn continued(
    session: &mut Session<'_>,
    ids: &[u32],
    sampling: &Sampling,
    rules: &StopRules,
) -> (Vec<u32>, Finish) {
    let logits = session.extend(ids).unwrap();
    let mut tokens = Vec::new();
    let finish = session.generate(logits, sampling, rules, |token| {
        tokens.push(token);
        Ok(true)
    });
    (tokens, finish.unwrap())
}

fn rules(max_tokens: usize) -> StopRules {
    StopRules { tokens: Vec::new(), max_tokens }
}

#[test]
fn replayed_steps_continue_texts_as_transformers_does() {
    let Some(device) = emulator() else { return };
    // One of each kind of angles, masks and norms, and a choice of keys; a GPU is given all by `pmetal verify`.
    let names = [
        "llama31-rope",
        "llama-rope-dynamic",
        "llama-rope-longrope",
        "mistral-window",
        "qwen2-tied",
        "qwen3",
        "deepseek-v3",
        "deepseek-v32",
        "qwen3-next",
        "qwen3-5-text",
    ];
    for folder in names.map(fixture) {
        let decoder = decoder_on(&folder, &device, DType::F32);
        let (ids, wanted) = greedy_of(&folder);
        let mut session = Session::new(&decoder).unwrap();
        let (tokens, finish) = continued(&mut session, &ids, &Sampling::default(), &rules(24));
        assert_eq!((&tokens, finish), (&wanted, Finish::Length), "{}", folder.display());
        assert!(session.replays_steps(), "{}", folder.display());
        assert_eq!(session.ids(), [ids, wanted].concat(), "{}", folder.display());
    }
}

#[test]
fn adapters_take_part_in_replayed_steps_of_latent_vectors() {
    let Some(device) = emulator() else { return };
    for folder in ["deepseek-v3", "deepseek-v32"].map(fixture) {
        let ids = greedy_of(&folder).0;
        let texts = [&Device::cpu(), &device].map(|device| {
            let mut decoder = decoder_on(&folder, device, DType::F32);
            pmetal::lora::load(&mut decoder, &folder.join("adapter"), false).unwrap();
            let mut session = Session::new(&decoder).unwrap();
            continued(&mut session, &ids, &Sampling::default(), &rules(20)).0
        });
        assert_eq!(texts[0], texts[1], "{}", folder.display());
        assert_ne!(texts[0], greedy_of(&folder).1[..20], "{}: the adapter changes nothing", folder.display());
    }
}

#[test]
fn replayed_steps_draw_what_plain_steps_and_the_processor_draw() {
    let Some(device) = emulator() else { return };
    let folder = fixture("qwen3-window");
    let ids = greedy_of(&folder).0;
    let (here, there) =
        (decoder_on(&folder, &Device::cpu(), DType::F32), decoder_on(&folder, &device, DType::F32));
    let mut texts = Vec::new();
    for seed in 0..2 {
        let sampling = Sampling {
            temperature: 0.9,
            top_k: 30,
            top_p: 0.9,
            repetition_penalty: 1.2,
            frequency_penalty: 0.1,
            seed,
            ..Sampling::default()
        };
        let draw = |decoder: &Decoder, records| {
            let mut session = Session::new(decoder).unwrap();
            session.record_steps(records);
            continued(&mut session, &ids, &sampling, &rules(12)).0
        };
        let expected = draw(&here, true);
        assert_eq!(draw(&there, true), expected, "seed {seed}");
        assert_eq!(draw(&there, false), expected, "seed {seed}, plain");
        texts.push(expected);
    }
    assert_ne!(texts[0], texts[1], "seeds change nothing");
}

#[test]
fn a_text_goes_on_after_steps_that_ran_ahead_of_its_end() {
    let Some(device) = emulator() else { return };
    // What a token leaves in the states of the second cannot be taken back.
    for folder in ["llama2", "qwen3-next"].map(fixture) {
        goes_on(&folder, &device);
    }
}

fn goes_on(folder: &Path, device: &Device) {
    let decoder = decoder_on(folder, device, DType::F32);
    let (ids, wanted) = greedy_of(folder);
    let mut session = Session::new(&decoder).unwrap();
    // The device may be some tokens ahead when it is told that this one ends the text.
    let end = (5..20).find(|&index| !wanted[..index].contains(&wanted[index])).unwrap();
    let stop = StopRules { tokens: vec![wanted[end]], max_tokens: 24 };
    let (tokens, finish) = continued(&mut session, &ids, &Sampling::default(), &stop);
    assert_eq!((&tokens[..], finish), (&wanted[..end], Finish::Stopped));
    assert_eq!(session.ids(), [&ids[..], &wanted[..end]].concat());
    // The rest, by the same recording, from the token that was not taken.
    let (rest, _) = continued(&mut session, &wanted[end..=end], &Sampling::default(), &rules(23 - end));
    assert_eq!(rest, wanted[end + 1..]);
    // Back to the prompt, with another way to choose: the recording is another.
    session.truncate(7);
    let sampling = Sampling { repetition_penalty: 1.5, ..Sampling::default() };
    let (other, _) = continued(&mut session, &ids[7..], &sampling, &rules(12));
    let here = decoder_on(folder, &Device::cpu(), DType::F32);
    let expected = continued(&mut Session::new(&here).unwrap(), &ids, &sampling, &rules(12)).0;
    assert_eq!(other, expected);
}

#[test]
fn a_text_outgrows_its_cache_while_steps_are_replayed() {
    let Some(device) = emulator() else { return };
    let folder = fixture("llama2");
    let prompt: Vec<u32> = (0..244).map(|index| 3 + index % 5).collect();
    let texts = [&Device::cpu(), &device].map(|device| {
        let decoder = decoder_on(&folder, device, DType::F32);
        let mut session = Session::new(&decoder).unwrap();
        // There is room for 256 tokens after these, which is not enough for those that follow.
        let mut tokens = continued(&mut session, &prompt, &Sampling::default(), &rules(3)).0;
        let last = tokens.pop().unwrap();
        session.truncate(prompt.len() + 2);
        tokens.push(last);
        tokens.extend(continued(&mut session, &[last], &Sampling::default(), &rules(20)).0);
        tokens
    });
    assert_eq!(texts[0].len(), 23);
    assert_eq!(texts[0], texts[1]);
}

#[test]
fn steps_are_replayed_while_layers_let_go_of_what_they_see_no_more() {
    let Some(device) = emulator() else { return };
    // Windows alone, whose rows begin with those of the third run so that few of 512 are free in the end, at no border of
    // angles; chunks beside all tokens.
    for (name, runs) in [("mistral-window", &[250, 250, 20, 250, 230][..]), ("llama4-text", &[250, 250])] {
        let length = runs.iter().sum::<u32>();
        let prompt: Vec<u32> = (0..length).map(|index| 3 + index * index % 11).collect();
        let texts = [&Device::cpu(), &device].map(|device| {
            let decoder = decoder_on(&fixture(name), device, DType::F32);
            let (mut session, mut start) = (Session::new(&decoder).unwrap(), 0);
            let (last, first) = runs.split_last().unwrap();
            for &run in first {
                session.extend(&prompt[start..start + run as usize]).unwrap();
                start += run as usize;
            }
            assert_eq!(prompt.len() - start, *last as usize);
            let sampling = Sampling { temperature: 1.0, seed: 5, ..Sampling::default() };
            let mut tokens = continued(&mut session, &prompt[start..], &sampling, &rules(20)).0;
            // Plain steps find what the replayed ones left.
            tokens.extend(continued(&mut session, &[7, 9], &sampling, &rules(3)).0);
            tokens
        });
        assert_eq!(texts[0].len(), 23);
        assert_eq!(texts[0], texts[1], "{name}");
    }
}

#[test]
fn a_text_goes_on_after_it_was_cut_to_what_a_window_needs_no_more() {
    let Some(device) = emulator() else { return };
    let prompt: Vec<u32> = (0..520).map(|index| 3 + index * index % 7).collect();
    let texts = [&Device::cpu(), &device].map(|device| {
        let decoder = decoder_on(&fixture("mistral-window"), device, DType::F32);
        let mut session = Session::new(&decoder).unwrap();
        session.extend(&prompt[..250]).unwrap();
        session.extend(&prompt[250..500]).unwrap();
        let logits = session.extend(&prompt[500..]).unwrap();
        // The cache is empty then, since it begins behind what these tokens see; the logits are those of another text.
        session.truncate(20);
        let mut tokens = Vec::new();
        let accept = |token| {
            tokens.push(token);
            Ok(true)
        };
        session.generate(logits, &Sampling::default(), &rules(12), accept).unwrap();
        tokens
    });
    assert_eq!(texts[0].len(), 12);
    assert_eq!(texts[0], texts[1]);
}

#[test]
fn logits_that_are_not_numbers_end_a_text_with_an_error() {
    let Some(device) = emulator() else { return };
    let decoder = decoder_on(&fixture("llama2"), &device, DType::F32);
    let mut session = Session::new(&decoder).unwrap();
    session.extend(&[1, 2]).unwrap();
    let infinite = vec![f32::INFINITY; decoder.spec.vocabulary];
    let error = session.generate(infinite, &Sampling::default(), &rules(4), |_| Ok(true)).unwrap_err();
    assert!(error.to_string().contains("the logits of token 2 are not finite"), "{error}");
}
