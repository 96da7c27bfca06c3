//! The program `pmetal`.

mod commands;
mod failure;
mod interrupt;
mod memory;
mod output;
mod style;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// Fine-tune language models on the machine you own.
#[derive(Parser)]
#[command(name = "pmetal", version, propagate_version = true, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Threads of the processor; 0 = one for each core. The numbers do not depend on it
    #[arg(long, global = true, value_name = "N", aliases = ["num-threads", "num_threads"])]
    threads: Option<usize>,
}

#[derive(Subcommand)]
enum Command {
    /// Fine-tune a model with LoRA, or all of its weights
    Train(commands::train::TrainArguments),
    /// Continue a prompt, or chat
    Infer(commands::infer::InferArguments),
    /// Merge an adapter into the base model's weights
    Fuse(commands::fuse::FuseArguments),
    /// Loss and perplexity of a model on a dataset
    Eval(commands::eval::EvalArguments),
    /// Compare models with the numbers that another program computed for them
    Verify(commands::verify::VerifyArguments),
    /// Look at datasets as the model will see them
    Data(commands::data::DataArguments),
    /// Describe this machine and what the program will use of it
    Doctor(commands::doctor::DoctorArguments),
    /// Measure speed and memory
    Bench(commands::bench::BenchArguments),
}

fn main() -> ExitCode {
    interrupt::end_on_closed_pipe();
    let parsed =
        Arguments::command().try_get_matches().and_then(|matches| Arguments::from_arg_matches(&matches));
    match parsed {
        Ok(arguments) => failure::exit_code(run(arguments)),
        Err(error) => failure::usage(&error),
    }
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let threads = arguments.threads;
    if !matches!(arguments.command, Command::Train(_)) {
        commands::set_up_threads(threads.unwrap_or(0))?;
    }
    match arguments.command {
        // The number of threads is a setting of a run, which files can have too.
        Command::Train(arguments) => commands::train::run(arguments.with_threads(threads)),
        Command::Infer(arguments) => commands::infer::run(arguments),
        Command::Fuse(arguments) => commands::fuse::run(arguments),
        Command::Eval(arguments) => commands::eval::run(arguments),
        Command::Verify(arguments) => commands::verify::run(arguments),
        Command::Data(arguments) => commands::data::run(arguments),
        Command::Doctor(arguments) => commands::doctor::run(arguments),
        Command::Bench(arguments) => commands::bench::run(arguments),
    }
}
