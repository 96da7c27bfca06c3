//! Model files, tokenizers, chat templates, datasets and adapters: bytes in, checked values out.
//!
//! Nothing here trusts what a file claims: every length is compared with the bytes that are present
//! before anything is allocated, and every error names the file and the place in it.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::disallowed_methods))] // tests prepare files as they like

pub mod adapter;
pub mod atomic;
pub mod blocks;
pub mod chat_template;
pub mod checkpoint;
pub mod dtype;
pub mod error;
pub mod fs;
pub mod gguf;
pub mod rows;
pub mod safetensors;
mod source;
pub mod tokenizer;

pub use dtype::{DType, TensorInfo};
pub use error::{Error, Result};
