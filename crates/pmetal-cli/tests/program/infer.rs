//! Generating text: the published text of the embedded model, and what every flag does to it.

use crate::support::Sandbox;

/// What stories260K says when it begins, as its author published it.
const PUBLISHED: &str = "Once upon a time, there was a little girl named Lily. She loved to play outside in \
                         the park. One day, she saw a big, red ball.";

/// The text of a generation from the prompt "Lily", with more arguments.
fn text(sandbox: &Sandbox, more: &[&str]) -> String {
    let usual =
        ["infer", "--prompt", "Lily", "--max-tokens", "24", "--json", "--dtype", "f32", "--threads", "1"];
    let mut arguments = vec![usual[0]];
    for pair in [&usual[1..3], &usual[3..5], &usual[6..8], &usual[8..10]] {
        if !more.contains(&pair[0]) {
            arguments.extend(pair);
        }
    }
    arguments.push("--json");
    arguments.extend(more);
    sandbox.run(&arguments).ok().json()["text"].as_str().unwrap().to_owned()
}

#[test]
fn the_embedded_model_tells_its_published_story() {
    let sandbox = Sandbox::new();
    let whole = ["infer", "--prompt", "", "--temperature", "0", "--max-tokens", "60"];
    assert!(sandbox.run(&whole).ok().stdout.trim_start().starts_with(PUBLISHED));
    let marked = ["infer", "--prompt", "<s>", "--temperature", "0", "--max-tokens", "60"];
    assert!(sandbox.run(&marked).ok().stdout.contains(PUBLISHED));
    // A prompt is printed before its continuation, so that the text reads on.
    let begun = ["infer", "--prompt", "Once upon a time", "--temperature", "0", "--max-tokens", "60"];
    assert!(sandbox.run(&begun).ok().stdout.starts_with(PUBLISHED));
}

#[test]
fn equal_seeds_give_equal_texts() {
    let sandbox = Sandbox::new();
    let draw = |seed: &str| text(&sandbox, &["--temperature", "1", "--seed", seed]);
    assert_eq!(draw("7"), draw("7"));
    assert_ne!(draw("7"), draw("8"));
}

#[test]
fn every_way_to_sample_changes_the_text() {
    let sandbox = Sandbox::new();
    let greedy = text(&sandbox, &["--temperature", "0"]);
    let warm = text(&sandbox, &["--temperature", "1"]);
    assert_ne!(warm, greedy);
    assert_ne!(text(&sandbox, &["--temperature", "2"]), warm);
    // Each of these leaves the most likely token alone.
    for more in [["--top-k", "1"], ["--top-p", "0.0001"], ["--min-p", "1"]] {
        assert_eq!(text(&sandbox, &[&more[..], &["--temperature", "1"]].concat()), greedy, "{more:?}");
    }
    let penalties =
        [["--repetition-penalty", "3"], ["--presence-penalty", "9"], ["--frequency-penalty", "9"]];
    for more in penalties {
        assert_ne!(text(&sandbox, &[&more[..], &["--temperature", "0"]].concat()), greedy, "{more:?}");
    }
}

#[test]
fn lengths_stops_and_prompts_are_honoured() {
    let sandbox = Sandbox::new();
    let greedy = text(&sandbox, &["--temperature", "0"]);
    let short = text(&sandbox, &["--temperature", "0", "--max-tokens", "5"]);
    assert!(greedy.starts_with(&short) && short.len() < greedy.len(), "{short}");
    let word = greedy.split_whitespace().nth(3).unwrap();
    let stopped = text(&sandbox, &["--temperature", "0", "--stop", word]);
    assert_eq!(stopped, greedy[..greedy.find(word).unwrap()]);
    let other = text(&sandbox, &["--temperature", "0", "--prompt", "The dog"]);
    assert_ne!(other, greedy);
    assert_eq!(text(&sandbox, &["--temperature", "0", "--device", "cpu"]), greedy);
    let narrow = ["--temperature", "1.3", "--max-tokens", "150"];
    let wide = text(&sandbox, &narrow);
    assert_ne!(
        text(&sandbox, &[&narrow[..], &["--dtype", "bf16"]].concat()),
        wide,
        "--dtype changes nothing"
    );
}

#[test]
fn recordings_of_steps_can_be_turned_off() {
    let sandbox = Sandbox::new();
    // What a GPU computes is the same without them, and other devices have none.
    assert_eq!(
        text(&sandbox, &["--temperature", "1", "--no-cuda-graph"]),
        text(&sandbox, &["--temperature", "1"])
    );
}

#[test]
fn a_prompt_may_come_from_standard_input() {
    use std::io::Write;
    let sandbox = Sandbox::new();
    let mut command = sandbox.command(&["infer", "--prompt", "-", "--max-tokens", "4", "--temperature", "0"]);
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"Tom and Sue").unwrap();
    let done = crate::support::Done::of(child.wait_with_output().unwrap()).ok();
    assert!(done.stdout.starts_with("Tom and Sue "), "{}", done.stdout);
}

#[test]
fn thinking_is_hidden_unless_it_is_asked_for() {
    let sandbox = Sandbox::new();
    let arguments = ["infer", "--prompt", "Lily <think>", "--max-tokens", "8", "--temperature", "0"];
    let hidden = sandbox.run(&arguments).ok().stdout;
    let shown = sandbox.run(&[&arguments[..], &["--show-thinking"]].concat()).ok().stdout;
    assert_eq!(hidden.trim_end(), "Lily <think>");
    assert!(shown.len() > hidden.len(), "{shown}");
    let facts = sandbox.run(&[&arguments[..], &["--json"]].concat()).ok().json();
    assert_eq!(facts["text"], "");
    assert!(!facts["thinking"].as_str().unwrap().is_empty());
}

#[test]
fn a_chat_has_turns_and_a_system_message() {
    let sandbox = Sandbox::new();
    let tokens = |more: &[&str]| {
        let arguments = [&["infer", "--prompt", "Hello", "--max-tokens", "2", "--json"], more].concat();
        sandbox.run(&arguments).ok().json()["prompt_tokens"].as_u64().unwrap()
    };
    let (plain, chat) = (tokens(&[]), tokens(&["--chat"]));
    let system = tokens(&["--chat", "--system", "You are a kind owl."]);
    assert!(plain < chat && chat < system, "{plain}, {chat}, {system}");
}

#[test]
fn an_adapter_changes_the_text_and_finds_its_base() {
    let sandbox = Sandbox::new();
    sandbox.train("run", &["--learning-rate", "2e-2", "--max-steps", "8"]).ok();
    let base = text(&sandbox, &["--temperature", "0"]);
    let adapted = text(&sandbox, &["--temperature", "0", "--lora", "run"]);
    assert_ne!(adapted, base);
    assert_eq!(text(&sandbox, &["--temperature", "0", "--lora", "run/adapter"]), adapted);
    assert_eq!(text(&sandbox, &["--temperature", "0", "--lora", "run", "--model", "stories260k"]), adapted);
    sandbox.run(&["infer", "--lora", "rows.jsonl"]).fails(2, &["no adapter in `rows.jsonl`"]);
}

#[test]
fn the_command_that_training_suggests_works() {
    let sandbox = Sandbox::new();
    let events = sandbox.train("run", &["--json", "--max-steps", "2"]).ok().json_lines();
    let command = events.last().unwrap()["command"].as_str().unwrap().to_owned();
    let (_, arguments) = command.split_once(" infer ").unwrap();
    let words: Vec<&str> = arguments.split(' ').filter(|word| !word.contains("...")).collect();
    let mut whole = vec!["infer"];
    whole.extend(words.iter().filter(|word| **word != "--prompt"));
    whole.extend(["--prompt", "Tom", "--max-tokens", "3"]);
    assert!(sandbox.run(&whole).ok().stdout.starts_with("Tom"));
}

#[test]
fn numbers_out_of_range_are_refused() {
    let sandbox = Sandbox::new();
    let tries = [
        ("--temperature", "-1", "temperature is -1"),
        ("--temperature", "nan", "temperature is NaN"),
        ("--top-p", "1.5", "top-p is 1.5"),
        ("--min-p", "2", "min-p is 2"),
        ("--repetition-penalty", "0", "repetition penalty is 0"),
        ("--presence-penalty", "1000", "presence penalty is 1000"),
    ];
    for (flag, value, words) in tries {
        sandbox.run(&["infer", &format!("{flag}={value}"), "--max-tokens", "1"]).fails(2, &[words]);
    }
}
