//! Descriptions of matrices for the copy engine.

use super::bindings::*;
use super::stream::{Stream, failed};
use crate::DType;
use crate::device::gpu::runtime::{Argument, TensorMap};
use crate::error::Result;

/// The maps among the arguments, in order.
pub(super) fn encode(stream: &Stream, arguments: &[Argument]) -> Result<Vec<EncodedMap>> {
    let maps = arguments.iter().filter_map(|argument| match argument {
        Argument::TensorMap(map) => Some(encode_one(stream, map)),
        _ => None,
    });
    maps.collect()
}

fn encode_one(stream: &Stream, map: &TensorMap) -> Result<EncodedMap> {
    const CALL: &str = "encoding a tensor map";
    let dtype = match map.dtype {
        DType::Bf16 => MAP_BF16,
        DType::F16 => MAP_F16,
        other => return Err(failed(CALL, format!("elements of {other} have none"))),
    };
    let element = map.dtype.bytes() as u64;
    let sizes = [map.width as u64, map.heads as u64, map.rows as u64];
    let strides = [map.head_pitch as u64 * element, map.pitch as u64 * element];
    let (boxes, steps) = ([64, 1, map.box_rows as u32], [1; 3]);
    let mut encoded = EncodedMap::default();
    // SAFETY: the call writes 128 bytes, aligned to 64, and reads three sizes, two strides, three box sizes and three
    // steps; it does not follow the address.
    let status = unsafe {
        (stream.driver().cuTensorMapEncodeTiled)(
            &raw mut encoded,
            dtype,
            3,
            map.address,
            sizes.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            steps.as_ptr(),
            MAP_INTERLEAVE_NONE,
            MAP_SWIZZLE_128,
            MAP_L2_PROMOTION_128,
            MAP_OUTSIDE_IS_ZERO,
        )
    };
    stream.check(CALL, status)?;
    Ok(encoded)
}
