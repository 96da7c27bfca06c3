//! The numbers depend on neither the number of threads nor the processor's instructions.

use crate::support::{Done, Sandbox};

const MORE: [&str; 4] = ["--max-steps", "4", "--lora-dropout", "0.1"];

#[test]
fn adapters_do_not_depend_on_the_number_of_threads() {
    let sandbox = Sandbox::new();
    for threads in ["1", "2", "5"] {
        let more = [&MORE[..], &["--threads", threads]].concat();
        sandbox.train(threads, &more).ok();
    }
    assert!(sandbox.adapter("1") == sandbox.adapter("2"));
    assert!(sandbox.adapter("1") == sandbox.adapter("5"));
}

#[test]
fn adapters_do_not_depend_on_the_instructions_in_f32() {
    let sandbox = Sandbox::new();
    sandbox.train("native", &MORE).ok();
    for level in ["portable", "avx2"] {
        let mut command = sandbox.command(&sandbox.training(level, &MORE));
        let done = Done::of(command.env("PMETAL_SIMD", level).output().unwrap());
        if done.code != Some(0) {
            // This processor may not have the instructions; it always has the portable ones.
            assert!(level != "portable" && done.stderr.contains(level), "{}", done.stderr);
            println!("skipped: {level}");
            continue;
        }
        assert!(sandbox.adapter(level) == sandbox.adapter("native"), "{level}");
    }
}

#[test]
fn unknown_instructions_are_refused() {
    let sandbox = Sandbox::new();
    let mut command = sandbox.command(&["doctor"]);
    Done::of(command.env("PMETAL_SIMD", "abacus").output().unwrap()).fails(2, &["abacus", "portable"]);
}

#[test]
fn a_number_of_threads_may_stand_in_a_file() {
    let sandbox = Sandbox::new();
    sandbox.write("settings.toml", "threads = 2\n");
    let mut arguments = sandbox.training("out", &["--max-steps", "1"]);
    let place = arguments.iter().position(|argument| *argument == "--threads").unwrap();
    arguments.drain(place..place + 2);
    arguments.insert(1, "settings.toml");
    sandbox.run(&arguments).ok();
    assert!(sandbox.read("out/env.json").contains("\"threads\": 2"), "{}", sandbox.read("out/env.json"));
}
