//! PEFT's rules for which module a configuration means.
//!
//! Python's `re` and Rust's `regex` agree on what is used in practice; look-around and back-references do not exist
//! here, so such a pattern is refused. In exchange a pattern takes time linear in the name, whatever it says.

use std::path::Path;

use regex::{Regex, RegexBuilder};

use super::{AdapterConfig, LONGEST_PATTERN_BYTES, MOST_PATTERNS, ModuleNames};
use crate::{Error, Result};

/// The most memory that one compiled pattern may take.
const PATTERN_MEMORY_BYTES: usize = 1 << 20;
/// The most keys of one field that need a compiled pattern; plain names are compared without one.
const MOST_COMPILED: usize = 256;

/// A key of `rank_pattern` or `alpha_pattern`, which stands for the end of a name.
enum End {
    /// Letters, digits, underscores, and dots, which match any character.
    Plain(String),
    Pattern(Regex),
}

impl End {
    /// Thousands of plain names are common where ranks were searched for; compiling them would take seconds.
    fn is_plain(key: &str) -> bool {
        key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.')
    }

    fn is_match(&self, module: &str) -> bool {
        let key = match self {
            Self::Plain(key) => key,
            Self::Pattern(pattern) => return pattern.is_match(module),
        };
        let mut rest = module.chars().rev();
        let ends =
            key.chars().rev().all(|wanted| rest.next().is_some_and(|found| wanted == '.' || found == wanted));
        ends && matches!(rest.next(), None | Some('.'))
    }
}

pub(super) struct Matcher {
    target: Option<Regex>,
    exclude: Option<Regex>,
    layers: Vec<Regex>,
    ranks: Vec<End>,
    alphas: Vec<End>,
}

impl Matcher {
    pub(super) fn new(config: &AdapterConfig, path: &Path) -> Result<Self> {
        let whole = |pattern: &str| format!("^(?:{pattern})$");
        let compile = |field: &str, pattern: &str, frame: &dyn Fn(&str) -> String| {
            compile(field, pattern, frame).map_err(|message| Error::unsupported(path, message))
        };
        for (field, count) in
            [("rank_pattern", config.rank_pattern.len()), ("alpha_pattern", config.alpha_pattern.len())]
        {
            if count > MOST_PATTERNS {
                let message = format!("`{field}` has {count} entries, the most is {MOST_PATTERNS}");
                return Err(Error::unsupported(path, message));
            }
        }
        let of_names = |field: &str, names: Option<&ModuleNames>| match names {
            Some(ModuleNames::Pattern(pattern)) => compile(field, pattern, &whole).map(Some),
            _ => Ok(None),
        };
        // A key stands for the end of a name, behind a dot or from the beginning.
        let end = |key: &str| format!(r"^(?:.*\.)?(?:{key})$");
        let ends = |field: &str, keys: Vec<&str>| -> Result<Vec<End>> {
            let compiled = keys.iter().filter(|key| !End::is_plain(key)).count();
            if compiled > MOST_COMPILED {
                let message = format!(
                    "`{field}` has {compiled} entries that are patterns, the most is {MOST_COMPILED}"
                );
                return Err(Error::unsupported(path, message));
            }
            let each = keys.into_iter().map(|key| match End::is_plain(key) {
                true => Ok(End::Plain(key.to_owned())),
                false => compile(field, key, &end).map(End::Pattern),
            });
            each.collect()
        };
        let layer = |pattern: &str| format!(r"^(?:|.*?\.)(?:{pattern})\.(?P<layer_index>\d+)\.");
        let anything = [r"[^.]*".to_owned()];
        let layer_patterns = if config.layers_to_transform.is_none() {
            &[][..]
        } else if config.layers_pattern.is_empty() {
            &anything[..]
        } else {
            &config.layers_pattern
        };
        // With no pattern given PEFT wants something before the numbered module, so `layers.0.x` alone has no layer.
        let any_layer = |pattern: &str| format!(r"^.*?\.{pattern}\.(?P<layer_index>\d+)\.");
        let layer_frame: &dyn Fn(&str) -> String =
            if config.layers_pattern.is_empty() { &any_layer } else { &layer };
        Ok(Self {
            target: of_names("target_modules", Some(&config.target_modules))?,
            exclude: of_names("exclude_modules", config.exclude_modules.as_ref())?,
            layers: layer_patterns
                .iter()
                .map(|pattern| compile("layers_pattern", pattern, layer_frame))
                .collect::<Result<_>>()?,
            ranks: ends("rank_pattern", config.rank_pattern.iter().map(|(key, _)| key.as_str()).collect())?,
            alphas: ends(
                "alpha_pattern",
                config.alpha_pattern.iter().map(|(key, _)| key.as_str()).collect(),
            )?,
        })
    }

    pub(super) fn matches(
        &self,
        config: &AdapterConfig,
        module: &str,
        is_linear: bool,
        is_output_head: bool,
    ) -> bool {
        let excluded = match (&self.exclude, &config.exclude_modules) {
            (Some(pattern), _) => pattern.is_match(module),
            (None, Some(ModuleNames::List(names))) => names.iter().any(|name| is_name_or_end(name, module)),
            _ => false,
        };
        if excluded {
            return false;
        }
        match (&self.target, &config.target_modules) {
            (Some(pattern), _) => pattern.is_match(module),
            (None, ModuleNames::List(names)) => {
                // A module that is named in full is targeted whatever its layer.
                names.iter().any(|name| name == module)
                    || (names.iter().any(|name| is_name_or_end(name, module))
                        && self.layer_is_meant(config, module))
            }
            (None, ModuleNames::AllLinear) => is_linear && !is_output_head,
            // A pattern is always compiled.
            (None, ModuleNames::Pattern(_)) => false,
        }
    }

    fn layer_is_meant(&self, config: &AdapterConfig, module: &str) -> bool {
        let Some(layers) = &config.layers_to_transform else { return true };
        let captures = self.layers.iter().find_map(|pattern| pattern.captures(module));
        let index = captures.and_then(|found| found.name("layer_index")?.as_str().parse::<u64>().ok());
        index.is_some_and(|index| layers.contains(&index))
    }

    pub(super) fn rank_and_alpha(&self, config: &AdapterConfig, module: &str) -> (usize, f64) {
        let first = |patterns: &[End]| patterns.iter().position(|pattern| pattern.is_match(module));
        let rank = first(&self.ranks).map_or(config.r, |at| config.rank_pattern[at].1);
        let alpha = first(&self.alphas).map_or(config.lora_alpha, |at| config.alpha_pattern[at].1);
        (rank, alpha)
    }
}

/// Whether `target_parameters` names that parameter.
pub(super) fn is_parameter_of(config: &AdapterConfig, name: &str) -> bool {
    config.target_parameters.iter().any(|target| is_name_or_end(target, name))
}

fn is_name_or_end(name: &str, module: &str) -> bool {
    module.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn compile(field: &str, pattern: &str, frame: &dyn Fn(&str) -> String) -> std::result::Result<Regex, String> {
    if pattern.len() > LONGEST_PATTERN_BYTES {
        return Err(format!(
            "a pattern of `{field}` has {} bytes, the most is {LONGEST_PATTERN_BYTES}",
            pattern.len()
        ));
    }
    let build = |text: &str| {
        RegexBuilder::new(text)
            .size_limit(PATTERN_MEMORY_BYTES)
            .dfa_size_limit(PATTERN_MEMORY_BYTES)
            .nest_limit(100)
            .build()
    };
    // The pattern must be one by itself: framed, `a)|(b` would be another.
    build(pattern).and_then(|_| build(&frame(pattern))).map_err(|error| {
        let shown: String = pattern.chars().take(80).collect();
        let text = error.to_string();
        let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
        format!("the pattern `{shown}` of `{field}` is not a regular expression that is understood: {reason}")
    })
}
