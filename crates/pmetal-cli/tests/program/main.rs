//! The program as a user runs it: a process with arguments, files, two streams and an exit code.
//!
//! One test binary, so that it is linked once.
#![cfg(unix)]
#![allow(clippy::disallowed_methods)] // tests prepare files as they like
#![allow(clippy::unwrap_used, clippy::panic)] // a test that fails may panic, also in its helpers

mod errors;
mod files;
mod flags;
mod infer;
mod interrupt;
mod kill_and_resume;
mod memory;
mod other_flags;
mod support;
mod threads;
