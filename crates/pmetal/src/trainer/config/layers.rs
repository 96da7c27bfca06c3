//! From what files and flags say to one configuration: precedence, origins, and everything that is wrong at once.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::path::Path;

use pmetal_formats::Error as FormatError;
use pmetal_formats::fs::Fs;

use super::table::{Field, Group, Said};
use super::value::{Entry, json_entries, toml_entries};
use super::{FIELDS, TrainConfig};
use crate::error::{Error, Result};
use crate::spelling;

/// A configuration is a page or two.
const LIMIT_BYTES: u64 = 1 << 20;
/// More problems than this are counted, not listed.
const MOST_PROBLEMS: usize = 20;

/// Where the value of a setting came from, from the weakest to the strongest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The table of settings.
    Default,
    /// The program's own choice for what is being trained.
    Suggested,
    /// A file, with the line where the format tells.
    File(String, Option<usize>),
    /// `--set key=value`.
    Set,
    /// A flag of its own.
    Flag,
    /// Worked out by the program from the data, the model and the machine.
    Automatic,
}

impl Origin {
    fn rank(&self) -> u8 {
        match self {
            Self::Default | Self::Suggested => 0,
            Self::File(..) => 1,
            Self::Set => 2,
            Self::Flag => 3,
            Self::Automatic => 4,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => write!(formatter, "default"),
            Self::Suggested => write!(formatter, "suggested"),
            Self::File(name, Some(line)) => write!(formatter, "{name} line {line}"),
            Self::File(name, None) => write!(formatter, "{name}"),
            Self::Set => write!(formatter, "--set"),
            Self::Flag => write!(formatter, "flag"),
            Self::Automatic => write!(formatter, "automatic"),
        }
    }
}

/// One statement about one setting.
#[derive(Debug)]
struct Statement {
    origin: Origin,
    /// Which of several files it is from.
    file: usize,
    spelling: String,
    field: &'static Field,
    said: Said,
}

/// Collects what files, `--set` and flags say. Statements may come in any order; the strongest origin wins.
#[derive(Debug, Default)]
pub struct ConfigLayers {
    statements: Vec<Statement>,
    problems: Vec<String>,
    files: usize,
}

impl ConfigLayers {
    /// Nothing said yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a TOML or JSON file, told apart by their extension.
    ///
    /// # Errors
    /// [`Error::Format`] when the file cannot be read, is longer than 1 MiB, or is of another kind. Everything that
    /// is wrong inside is reported by [`ConfigLayers::resolve`].
    pub fn file(&mut self, fs: &dyn Fs, path: &Path) -> Result<()> {
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let parse = match extension.to_ascii_lowercase().as_str() {
            "toml" => toml_entries,
            "json" => json_entries,
            "yaml" | "yml" => {
                let message = "YAML configurations are not read, write the same keys as TOML or JSON";
                return Err(FormatError::unsupported(path, message).into());
            }
            _ => {
                let message = "a configuration's name ends in `.toml` or `.json`";
                return Err(FormatError::unsupported(path, message).into());
            }
        };
        let bytes = fs.read(path, LIMIT_BYTES).map_err(FormatError::io("read", path))?;
        let text = String::from_utf8(bytes)
            .map_err(|error| FormatError::malformed(path, "", format!("the text is not UTF-8: {error}")))?;
        self.files += 1;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match parse(text.trim_start_matches('\u{feff}')) {
            Ok(entries) => entries.into_iter().for_each(|entry| self.file_entry(&name, entry)),
            Err((line, message)) => self.problems.push(format!("{}: {message}", Origin::File(name, line))),
        }
        Ok(())
    }

    fn file_entry(&mut self, name: &str, entry: Entry) {
        let origin = Origin::File(name.to_owned(), entry.line);
        match entry.value {
            Ok(value) => self.say(origin, &entry.key, Said::Value(value)),
            Err(message) => self.problems.push(format!("{origin}: `{}` {message}", entry.key)),
        }
    }

    /// Whether anything was said about a setting.
    pub fn mentions(&self, name: &str) -> bool {
        self.statements.iter().any(|statement| statement.field.name == name)
    }

    /// Adds a value that stands where nobody says another.
    pub fn suggest(&mut self, key: &str, text: &str) {
        self.say(Origin::Suggested, key, Said::Text(text.to_owned()));
    }

    /// Adds `key=value`, as `--set` takes it.
    pub fn set(&mut self, assignment: &str) {
        match assignment.split_once('=') {
            Some((key, value)) => self.say(Origin::Set, key.trim(), Said::Text(value.trim().to_owned())),
            None => self.problems.push(format!("--set: `{assignment}` is not of the form key=value")),
        }
    }

    /// Adds the text that followed the flag of a setting.
    pub fn flag(&mut self, key: &str, text: &str) {
        self.say(Origin::Flag, key, Said::Text(text.to_owned()));
    }

    fn say(&mut self, origin: Origin, spelling: &str, said: Said) {
        match find(spelling) {
            Some(field) => {
                let file = if matches!(origin, Origin::File(..)) { self.files } else { 0 };
                self.statements.push(Statement { origin, file, spelling: spelling.to_owned(), field, said });
            }
            None => {
                let suggestion = nearest(&normalized(spelling));
                let hint = suggestion.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
                self.problems.push(format!("{origin}: unknown key `{spelling}`{hint}"));
            }
        }
    }

    /// The configuration that all statements together make, over the defaults.
    ///
    /// # Errors
    /// [`Error::Usage`] listing the first 20 problems: what could not be parsed, unknown keys, settings said twice,
    /// values of a wrong type or out of range, and a missing model or dataset.
    pub fn resolve(self) -> Result<ResolvedConfig> {
        let Self { mut statements, mut problems, .. } = self;
        // A later file overrides an earlier one.
        statements.sort_by_key(|statement| (statement.origin.rank(), statement.file));
        let mut resolved = ResolvedConfig { config: TrainConfig::default(), origins: BTreeMap::new() };
        let mut earlier: BTreeMap<&str, (u8, usize, String)> = BTreeMap::new();
        for Statement { origin, file, spelling, field, said } in statements {
            let place = (origin.rank(), file);
            if let Some((rank, file, first)) = earlier.get(field.name)
                && (*rank, *file) == place
            {
                problems.push(format!(
                    "{origin}: `{first}` and `{spelling}` set the same thing, `{}`",
                    field.name
                ));
            }
            earlier.insert(field.name, (place.0, place.1, spelling.clone()));
            match resolved.config.set(field.name, &said) {
                Ok(()) => {
                    resolved.origins.insert(field.name, origin);
                }
                Err(message) => problems.push(format!("{origin}: `{spelling}` {message}")),
            }
        }
        problems.extend(resolved.problems());
        if problems.is_empty() { Ok(resolved) } else { Err(Error::Usage(listed(&problems))) }
    }
}

/// A configuration and where each of its values came from.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedConfig {
    config: TrainConfig,
    /// By name of the setting; those that nobody mentioned are absent.
    origins: BTreeMap<&'static str, Origin>,
}

impl ResolvedConfig {
    /// The values.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// Where the value of a setting came from.
    pub fn origin(&self, name: &str) -> &Origin {
        self.origins.get(name).unwrap_or(&Origin::Default)
    }

    /// Replaces an "automatic" value by what the program made of it, for `run.toml` to repeat.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such setting or the value does not fit it.
    pub fn set_automatic(&mut self, name: &str, value: &impl fmt::Display) -> Result<()> {
        let field = find(name).ok_or_else(|| Error::Usage(format!("`{name}` is no setting")))?;
        let said = Said::Text(value.to_string());
        self.config.set(field.name, &said).map_err(|message| Error::Usage(format!("`{name}` {message}")))?;
        self.origins.insert(field.name, Origin::Automatic);
        Ok(())
    }

    /// The text of `run.toml`: every setting that has an effect, its origin in a comment. Reading it back gives an
    /// equal configuration.
    pub fn to_run_toml(&self) -> String {
        let mut text =
            "# All settings of this run; the comments tell where each value came from.\n".to_owned();
        let shadowed = self.config.shadowed();
        let mut group = None;
        for field in FIELDS.iter().filter(|field| shadowed.iter().all(|other| other.name != field.name)) {
            if group != Some(field.group) {
                group = Some(field.group);
                writeln!(text, "\n# {}", field.group.heading()).ok();
            }
            if let Some(value) = self.config.value(field.name) {
                // A line end in a comment would end it; names of files may hold one.
                let origin = self.origin(field.name).to_string().replace(char::is_control, " ");
                writeln!(text, "{} = {value} # {origin}", field.name).ok();
            }
        }
        text
    }

    /// Sentences on settings that were given and have no effect, for the user to see.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for super::Shadowed { name, by, because } in self.config.shadowed() {
            let (origin, stronger) = (self.origin(name), self.origin(by));
            // What a stronger origin overrides is how one run differs from a shared file; else somebody is mistaken.
            if origin.rank() > Origin::Default.rank() && origin.rank() >= stronger.rank() {
                notes.push(format!("{origin}: `{name}` has no effect because `{by}` {because}"));
            }
        }
        notes
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for name in ["model", "dataset"] {
            let is_empty = self.config.value(name) == Some(super::Value::Text(String::new()));
            if is_empty {
                problems.push(format!("`{name}` is not set: use --{name} or the key `{name}` of a file"));
            }
        }
        for (name, requirement) in self.config.violations() {
            let value = self.config.value(name).map(|value| value.to_string()).unwrap_or_default();
            problems.push(format!("{}: `{name}` {requirement}, found {value}", self.origin(name)));
        }
        problems
    }
}

fn listed(problems: &[String]) -> String {
    if let [only] = problems {
        return only.clone();
    }
    let mut text = format!("the configuration has {} problems:", problems.len());
    for problem in problems.iter().take(MOST_PROBLEMS) {
        write!(text, "\n  {problem}").ok();
    }
    if problems.len() > MOST_PROBLEMS {
        write!(text, "\n  and {} more", problems.len() - MOST_PROBLEMS).ok();
    }
    text
}

/// `--lora-r`, `lora.r` and `lora_r` are one key.
fn normalized(spelling: &str) -> String {
    spelling.trim_start_matches("--").replace(['-', '.'], "_")
}

fn find(spelling: &str) -> Option<&'static Field> {
    let key = normalized(spelling);
    let named = |field: &&Field| field.name == key || field.aliases.contains(&key.as_str());
    // `[lora] use_rslora = true` names its group twice.
    let inner = spelling.strip_prefix("lora.").map(normalized);
    let nested = |field: &&Field| {
        let is_inner = |name: &str| inner.as_deref() == Some(name);
        field.group == Group::Lora
            && (is_inner(field.name) || field.aliases.iter().any(|alias| is_inner(alias)))
    };
    FIELDS.iter().find(named).or_else(|| FIELDS.iter().find(nested))
}

/// The known key that was probably meant.
fn nearest(key: &str) -> Option<&'static str> {
    spelling::nearest(key, FIELDS.iter().flat_map(|field| field.aliases.iter().copied().chain([field.name])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_names_one_setting() {
        let mut seen = std::collections::BTreeMap::new();
        for field in FIELDS {
            for spelling in field.aliases.iter().chain([&field.name]) {
                let other = seen.insert(*spelling, field.name);
                assert_eq!(other, None, "`{spelling}` of `{}`", field.name);
                assert_eq!(find(spelling).unwrap().name, field.name);
            }
            assert!(!field.help.is_empty() && field.help.ends_with('.'), "{}", field.name);
        }
    }
}
