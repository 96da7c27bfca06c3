//! Dequantised blocks against the Python package `gguf` (see `tools/make_block_goldens.py`).
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use pmetal_formats::DType;
use pmetal_formats::blocks::dequantize;

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (head, tail) = bytes.split_at(count);
    *bytes = tail;
    head
}

fn take_u32(bytes: &mut &[u8]) -> u32 {
    u32::from_le_bytes(take(bytes, 4).try_into().unwrap())
}

#[test]
fn every_block_format_equals_the_python_package_bit_for_bit() {
    let mut golden: &[u8] = include_bytes!("data/blocks.bin");
    let mut seen = Vec::new();
    while !golden.is_empty() {
        let dtype = DType::from_gguf_id(take_u32(&mut golden)).unwrap();
        let (count, block_bytes, elements) =
            (take_u32(&mut golden) as usize, take_u32(&mut golden) as usize, take_u32(&mut golden) as usize);
        assert_eq!((dtype.block_bytes(), dtype.block_elements()), (block_bytes as u64, elements as u64));
        let blocks = take(&mut golden, count * block_bytes);
        let expected = take(&mut golden, count * elements * 4);
        let mut values = vec![0.0; count * elements];
        dequantize(dtype, blocks, &mut values).unwrap();
        for (index, (value, raw)) in values.iter().zip(expected.chunks_exact(4)).enumerate() {
            let wanted = f32::from_le_bytes(raw.try_into().unwrap());
            // Infinite scales make NaN; which NaN is up to the processor.
            let same = value.to_bits() == wanted.to_bits() || value.is_nan() && wanted.is_nan();
            assert!(same, "{dtype} element {index}: {value:?} ({:x}), not {wanted:?}", value.to_bits());
        }
        seen.push(dtype.name());
    }
    assert_eq!(seen, ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16"]);
}

#[test]
fn lengths_that_disagree_are_refused() {
    let mut out = [0.0; 32];
    let message = dequantize(DType::Q4_0, &[0; 17], &mut out).unwrap_err().to_string();
    assert!(message.contains("17 bytes of Q4_0 are not 32 elements"), "{message}");
    assert!(dequantize(DType::Q4_0, &[0; 18], &mut out[..31]).is_err());
    assert!(dequantize(DType::F64, &[0; 16], &mut out[..2]).is_ok());
}

#[test]
fn integers_have_no_float_conversion() {
    let message = dequantize(DType::I32, &[0; 4], &mut [0.0]).unwrap_err().to_string();
    assert!(message.contains("I32 has no conversion to f32"), "{message}");
}
