//! What a resumed run may change of its configuration.

use std::fmt;

use sha2::{Digest, Sha256};

use super::table::{Effect, Field};
use super::{FIELDS, Shadowed, TrainConfig};

/// A setting with two values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its name.
    pub name: &'static str,
    /// The value that the run has had, as TOML.
    pub old: String,
    /// The value that is asked for, as TOML.
    pub new: String,
}

/// The changes from the configuration of a run to the one that it is to be resumed with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResumeDiff {
    /// Changes that leave the numbers alone.
    pub allowed: Vec<Change>,
    /// Changes after which the run would be neither the old nor a new one.
    pub refused: Vec<Change>,
}

/// One line for each change, `-` the old and `+` the new value.
impl fmt::Display for ResumeDiff {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (changes, verdict) in [(&self.refused, "changes the numbers"), (&self.allowed, "allowed")] {
            for Change { name, old, new } in changes {
                writeln!(formatter, "- {name} = {old}\n+ {name} = {new} # {verdict}")?;
            }
        }
        Ok(())
    }
}

impl TrainConfig {
    /// SHA-256, in hexadecimal digits, over the settings that affect the numbers of a run, without those that have no
    /// effect beside the others.
    ///
    /// Take it after automatic values were filled in, so that it stands for what was computed.
    pub fn config_hash(&self) -> String {
        let mut digest = Sha256::new();
        let idle = self.shadowed();
        let counts = |field: &&Field| {
            field.effect == Effect::Numbers && idle.iter().all(|other| other.name != field.name)
        };
        for field in FIELDS.iter().filter(counts) {
            if let Some(value) = self.value(field.name) {
                digest.update(format!("{} = {value}\n", field.name));
            }
        }
        digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What changes from `self`, the configuration of a run, to `new`, the one to resume it with.
    ///
    /// The model and the dataset may have other paths: their content is compared by the hashes in the checkpoint.
    pub fn diff_for_resume(&self, new: &Self) -> ResumeDiff {
        let mut diff = ResumeDiff::default();
        // What has no effect in either is not in `run.toml` either.
        let (idle, idle_in_new) = (self.shadowed(), new.shadowed());
        let is_idle = |field: &&Field| {
            let is_named = |names: &[Shadowed]| names.iter().any(|other| other.name == field.name);
            field.effect == Effect::Numbers && is_named(&idle) && is_named(&idle_in_new)
        };
        for field in FIELDS.iter().filter(|field| !is_idle(field)) {
            let text =
                |config: &Self| config.value(field.name).map(|value| value.to_string()).unwrap_or_default();
            let change = Change { name: field.name, old: text(self), new: text(new) };
            if change.old != change.new {
                match field.effect {
                    Effect::Numbers => diff.refused.push(change),
                    Effect::Content | Effect::Nothing => diff.allowed.push(change),
                }
            }
        }
        diff
    }
}
