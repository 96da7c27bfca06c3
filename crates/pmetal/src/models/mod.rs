//! Model families as values, and the one decoder that computes them.

pub mod activations;
pub mod balance;
pub mod cache;
pub mod config;
pub mod decoder;
pub mod families;
mod flops;
pub mod inputs;
pub(crate) mod layer;
pub mod loader;
pub mod rope;
pub mod spec;

pub use activations::StepShape;
pub use balance::BalanceInputs;
pub use cache::KeyValueCache;
pub use config::Config;
pub use decoder::{Decoder, Document, Forward, TokenRun};
pub use inputs::Inputs;
pub use loader::{BaseStorage, LoadOptions, LoadedModel};
pub use spec::Spec;
