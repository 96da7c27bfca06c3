//! The arguments of `pmetal train`: one flag per setting of the configuration's table, and a few of its own.

use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use pmetal::trainer::config::{FIELDS, Field};

/// What the command line says.
#[derive(Debug, Clone, Default)]
pub(crate) struct TrainArguments {
    /// A file of settings.
    pub(crate) config: Option<PathBuf>,
    /// `key=value` pairs.
    pub(crate) set: Vec<String>,
    /// Settings given as flags, by name.
    pub(crate) settings: Vec<(&'static str, String)>,
    /// Go on with the run in the output folder.
    pub(crate) resume: bool,
    /// Replace the run in the output folder.
    pub(crate) overwrite: bool,
    /// Print what would happen.
    pub(crate) dry_run: bool,
    /// Facts as JSON on standard output.
    pub(crate) json: bool,
    /// No progress.
    pub(crate) quiet: bool,
}

/// `lora_r` as a flag.
fn flag_of(name: &str) -> String {
    name.replace('_', "-")
}

fn setting(field: &'static Field) -> Arg {
    let kind = field.kind();
    let is_switch = kind.contains("true");
    let help = format!("{} [default: {}]", field.help.trim_end_matches('.'), shown_default(field));
    let aliases: Vec<String> = field.aliases.iter().map(|alias| flag_of(alias)).collect();
    let mut arg = Arg::new(field.name)
        .long(flag_of(field.name))
        .aliases(aliases)
        .help(help)
        .help_heading(field.group.heading())
        .value_name(value_name(field, &kind))
        .allow_hyphen_values(true)
        .action(ArgAction::Set);
    if is_switch {
        arg = arg.num_args(0..=1).require_equals(true).default_missing_value("true");
    }
    // Underscores are what files and other programs use.
    if field.name.contains('_') {
        arg = arg.alias(field.name);
    }
    arg
}

fn shown_default(field: &Field) -> String {
    let text = field.default_text();
    match text.as_str() {
        "\"\"" => "none".to_owned(),
        _ => text.trim_matches('"').to_owned(),
    }
}

fn value_name(field: &Field, kind: &str) -> &'static str {
    match field.name {
        "model" | "dataset" | "eval_dataset" => "PATH",
        "output" => "DIR",
        "lora_target_modules" => "NAMES",
        "sample_prompt" => "TEXT",
        "gradient_checkpointing" => "LEVEL",
        _ if kind.contains("true") => "BOOL",
        _ if kind.contains("whole") => "N",
        _ if kind.contains("number") => "X",
        _ => "NAME",
    }
}

impl Args for TrainArguments {
    fn augment_args(command: Command) -> Command {
        let own = [
            Arg::new("config")
                .value_name("FILE")
                .help("File with settings (.toml or .json), such as a run's run.toml"),
            Arg::new("set")
                .long("set")
                .value_name("KEY=VALUE")
                .action(ArgAction::Append)
                .help("Any setting by its key in files; may be given several times"),
            switch(
                "resume",
                "Go on with the run in --output from its newest checkpoint, or start where there is none",
            ),
            switch("overwrite", "Replace the run in --output").conflicts_with("resume"),
            switch("dry-run", "Load everything, print what would be trained, and stop"),
            switch("json", "Print facts as JSON lines on standard output"),
            switch("quiet", "Print neither header nor progress"),
        ];
        command.args(own_flags().map(setting)).args(own)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// The settings that are flags of this command; all commands share `--threads`.
fn own_flags() -> impl Iterator<Item = &'static Field> {
    FIELDS.iter().filter(|field| field.name != "threads")
}

impl TrainArguments {
    /// Adds what the program's own `--threads` said.
    pub(crate) fn with_threads(mut self, threads: Option<usize>) -> Self {
        self.settings.extend(threads.map(|threads| ("threads", threads.to_string())));
        self
    }
}

fn switch(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

impl FromArgMatches for TrainArguments {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |name: &str| matches.value_source(name) == Some(ValueSource::CommandLine);
        let settings = own_flags()
            .filter(|field| given(field.name))
            .filter_map(|field| Some((field.name, matches.get_one::<String>(field.name)?.clone())))
            .collect();
        Ok(Self {
            config: matches.get_one::<String>("config").map(PathBuf::from),
            set: matches
                .get_many::<String>("set")
                .map(|values| values.cloned().collect())
                .unwrap_or_default(),
            settings,
            resume: matches.get_flag("resume"),
            overwrite: matches.get_flag("overwrite"),
            dry_run: matches.get_flag("dry-run"),
            json: matches.get_flag("json"),
            quiet: matches.get_flag("quiet"),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
