//! Devices that run kernel text: what the kernels need of a driver, and the drivers.

// The tensor kernels on top use this layer piece by piece.
#![allow(dead_code)]

pub(crate) mod cuda;
pub(crate) mod runtime;
