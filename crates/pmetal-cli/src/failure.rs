//! How errors are shown and which exit code they give.

use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use pmetal::Error;

use crate::style;

/// Exit codes, as the README lists them.
pub(crate) const FAILURE: u8 = 1;
pub(crate) const USAGE: u8 = 2;
pub(crate) const DIVERGED: u8 = 3;
pub(crate) const OUT_OF_MEMORY: u8 = 4;
pub(crate) const DATA_REJECTED: u8 = 5;

/// An error with advice on what to do.
#[derive(Debug)]
pub(crate) struct Hinted {
    /// Lines that are printed before the advice.
    details: String,
    /// `None` for what is usually said.
    hint: Option<String>,
}

impl std::fmt::Display for Hinted {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.hint.as_deref().unwrap_or(&self.details))
    }
}

/// Adds advice that is printed after the error's chain.
pub(crate) trait WithHint<T> {
    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> WithHint<T> for Result<T, E> {
    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T> {
        let hint = Some(hint.into());
        self.map_err(|error| error.into().context(Hinted { details: String::new(), hint }))
    }
}

/// Adds lines that are printed after the error's chain, and advice in the place of the usual.
pub(crate) fn detailed(error: Error, details: String, hint: Option<String>) -> anyhow::Error {
    anyhow::Error::from(error).context(Hinted { details, hint })
}

/// Prints help, or what is wrong with the command line, and gives the exit code.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
    }
    let text = error.render().to_string();
    let message = text.split("\n\n").next().unwrap_or_default();
    let message = message.strip_prefix("error: ").unwrap_or(message).trim_end();
    eprintln!("{} {message}", style::red("error:"));
    eprintln!("\n{} {}", style::cyan("hint:"), usage_hint(error));
    ExitCode::from(USAGE)
}

fn usage_hint(error: &clap::Error) -> String {
    let suggested =
        [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand, ContextKind::SuggestedValue];
    let suggestion = suggested.into_iter().find_map(|kind| match error.get(kind)? {
        ContextValue::String(name) => Some(name.clone()),
        ContextValue::Strings(names) => names.first().cloned(),
        _ => None,
    });
    match suggestion {
        Some(name) => format!("did you mean `{name}`?"),
        None => "`pmetal --help` lists the commands, `pmetal COMMAND --help` its flags".to_owned(),
    }
}

fn code_of(error: &anyhow::Error) -> u8 {
    let library = error.chain().find_map(|cause| cause.downcast_ref::<Error>());
    match library {
        Some(Error::Config(_) | Error::Usage(_)) => USAGE,
        Some(Error::Diverged(_)) => DIVERGED,
        Some(Error::Data(_)) => DATA_REJECTED,
        Some(Error::Engine(pmetal::engine::Error::OutOfMemory { .. })) => OUT_OF_MEMORY,
        _ => FAILURE,
    }
}

fn default_hint(error: &anyhow::Error) -> Option<&'static str> {
    let library = error.chain().find_map(|cause| cause.downcast_ref::<Error>())?;
    match library {
        Error::Diverged(_) => Some("lower --learning-rate; the last checkpoint is intact"),
        Error::Engine(pmetal::engine::Error::OutOfMemory { .. }) => Some(
            "halve --batch-size and double --gradient-accumulation-steps, lower --max-seq-len, \
             or add --gradient-checkpointing=full",
        ),
        Error::Data(_) => Some("`pmetal data show` prints rows as the model will see them"),
        _ => None,
    }
}

/// Prints an error as `error:`, its causes, an empty line and a hint, and gives its exit code.
pub(crate) fn exit_code(outcome: anyhow::Result<ExitCode>) -> ExitCode {
    let error = match outcome {
        Ok(code) => return code,
        Err(error) => error,
    };
    let hinted = error.downcast_ref::<Hinted>();
    let mut causes: Vec<String> = error.chain().map(ToString::to_string).collect();
    if hinted.is_some() {
        causes.remove(0);
    }
    // A transparent wrapper repeats its cause.
    causes.dedup();
    let mut causes = causes.into_iter();
    eprintln!("{} {}", style::red("error:"), causes.next().unwrap_or_default());
    for cause in causes {
        eprintln!("  {} {cause}", style::faint("caused by:"));
    }
    if let Some(details) = hinted.map(|hinted| &hinted.details).filter(|details| !details.is_empty()) {
        eprintln!("\n{}", details.trim_end());
    }
    let hint = hinted.and_then(|hinted| hinted.hint.clone());
    if let Some(hint) = hint.or_else(|| default_hint(&error).map(str::to_owned)) {
        eprintln!("\n{} {hint}", style::cyan("hint:"));
    }
    ExitCode::from(code_of(&error))
}
