//! Measuring models: against another program's numbers, and on held-out data.

pub mod perplexity;
pub mod verify;
