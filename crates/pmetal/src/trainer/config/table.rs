//! The macro that turns the table of settings into a struct, its defaults, its checks and its documentation.

use super::value::Value;

/// Where a setting belongs in help texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Group {
    ModelAndData,
    Lora,
    Optimizer,
    Batches,
    Reports,
    Machine,
}

impl Group {
    /// The heading in words.
    pub fn heading(self) -> &'static str {
        match self {
            Self::ModelAndData => "Model and data",
            Self::Lora => "LoRA",
            Self::Optimizer => "Optimizer and schedule",
            Self::Batches => "Batches",
            Self::Reports => "Evaluation, checkpoints, samples",
            Self::Machine => "Machine",
        }
    }
}

/// What a setting does to the numbers of a run, which decides whether a resumed run may change it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Other values give another adapter: part of the configuration's hash, fixed for a run.
    Numbers,
    /// Names something whose content has a hash of its own in each checkpoint; the name may change.
    Content,
    /// Cadence, paths and speed: free to change.
    Nothing,
}

/// One setting: the single source of its flag, its key and its documentation.
#[derive(Debug)]
pub struct Field {
    /// The key in files; a flag is the same with `-` for `_`.
    pub name: &'static str,
    /// Other spellings of the key, as other programs have them.
    pub aliases: &'static [&'static str],
    /// One or two sentences.
    pub help: &'static str,
    /// Where it belongs in help texts.
    pub group: Group,
    /// What it does to the numbers.
    pub effect: Effect,
    pub(super) kind: fn() -> String,
}

impl Field {
    /// The type in words: "a whole number", "one of lora, full".
    pub fn kind(&self) -> String {
        (self.kind)()
    }

    /// The default as TOML.
    pub fn default_text(&self) -> String {
        super::TrainConfig::default().value(self.name).map(|value| value.to_string()).unwrap_or_default()
    }
}

/// What was said about a setting: by a file, or as the text of a flag.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Said {
    Value(Value),
    Text(String),
}

/// A row is: documentation, `name: type = default, group, effect, [other spellings]`, and where not every value of the
/// type is fine, the words and the function of a check.
macro_rules! settings {
    ($($(#[doc = $help:literal])+ $name:ident: $kind:ty = $default:expr, $group:ident, $effect:ident,
       [$($alias:literal),*] $(, $requirement:literal => $check:expr)?;)+) => {
        /// Everything that a training run needs to know. Build one with [`ConfigLayers`].
        #[derive(Debug, Clone, PartialEq)]
        pub struct TrainConfig {
            $($(#[doc = $help])+ pub $name: $kind,)+
        }

        /// All settings, in the order of files and help texts.
        pub static FIELDS: &[Field] = &[$(Field {
            name: stringify!($name),
            aliases: &[$($alias),*],
            help: concat!($($help),+).trim_ascii(),
            group: Group::$group,
            effect: Effect::$effect,
            kind: <$kind as Setting>::kind,
        },)+];

        impl Default for TrainConfig {
            fn default() -> Self {
                Self { $($name: $default,)+ }
            }
        }

        impl TrainConfig {
            /// The value of the setting with that name.
            pub fn value(&self, name: &str) -> Option<Value> {
                match name {
                    $(stringify!($name) => Some(self.$name.to_value()),)+
                    _ => None,
                }
            }

            fn set(&mut self, name: &str, said: &Said) -> Result<(), String> {
                match name {
                    $(stringify!($name) => self.$name = match said {
                        Said::Value(value) => Setting::from_value(value)?,
                        Said::Text(text) => Setting::from_text(text)?,
                    },)+
                    _ => return Err("is no setting".to_owned()),
                }
                Ok(())
            }

            /// Names of settings outside their range, and what each must be.
            fn violations(&self) -> Vec<(&'static str, &'static str)> {
                let mut found = Vec::new();
                $($(
                    let check: fn(&$kind) -> bool = $check;
                    if !check(&self.$name) {
                        found.push((stringify!($name), $requirement));
                    }
                )?)+
                found
            }
        }
    };
}
pub(super) use settings;
