//! Fine-tune language models on the machine you own.
//!
//! [`models`] turns a `config.json` into a [`models::Spec`] and runs the one decoder that all families share.
//! [`trainer`] runs the training.
#![cfg_attr(test, allow(clippy::disallowed_methods))] // tests prepare files as they like

pub mod core;
pub mod data;
pub mod error;
pub mod eval;
pub mod generate;
pub mod lora;
pub mod models;
mod spelling;
pub mod trainer;

pub use error::{Error, Result};
pub use pmetal_engine as engine;
pub use pmetal_formats as formats;
