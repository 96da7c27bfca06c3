//! Element types of tensors in files, block formats included.

/// How the elements of a stored tensor are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum DType {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
    F8E4m3,
    F8E5m2,
    /// GGUF blocks of 32 elements: f16 scale, 16 bytes of nibbles.
    Q4_0,
    /// GGUF blocks of 32 elements: f16 scale, f16 minimum, 16 bytes of nibbles.
    Q4_1,
    /// GGUF blocks of 32 elements: f16 scale, four bytes of fifth bits, 16 bytes of nibbles.
    Q5_0,
    /// GGUF blocks of 32 elements: f16 scale, f16 minimum, four bytes of fifth bits, 16 bytes of nibbles.
    Q5_1,
    /// GGUF blocks of 32 elements: f16 scale, 32 signed bytes.
    Q8_0,
    /// GGUF super-blocks of 256 elements: f16 scale and minimum, twelve bytes of 6-bit scales, 128 bytes of nibbles.
    Q4K,
    /// GGUF super-blocks of 256 elements: as Q4K with 32 bytes of fifth bits before the nibbles.
    Q5K,
    /// GGUF super-blocks of 256 elements: 6-bit values, sixteen 8-bit scales, f16 scale.
    Q6K,
    /// E4M3 codes and, in a tensor of their own, a scale for each block of rows and columns, as DeepSeek releases them.
    /// Sizes count the codes alone: how many scales there are is the configuration's to say.
    Fp8Blocks,
    /// E2M1 codes, two a byte, and, in a tensor of their own, an exponent for each 32 of them, as gpt-oss is released.
    Mxfp4,
}

/// Every dtype, for tables and tests.
pub const ALL_DTYPES: [DType; 25] = [
    DType::F64,
    DType::F32,
    DType::F16,
    DType::Bf16,
    DType::I64,
    DType::I32,
    DType::I16,
    DType::I8,
    DType::U64,
    DType::U32,
    DType::U16,
    DType::U8,
    DType::Bool,
    DType::F8E4m3,
    DType::F8E5m2,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q4K,
    DType::Q5K,
    DType::Q6K,
    DType::Fp8Blocks,
    DType::Mxfp4,
];

/// The layout facts of one dtype; `gguf` is the number in GGUF files.
struct Layout {
    name: &'static str,
    block_elements: u64,
    block_bytes: u64,
    safetensors: Option<&'static str>,
    gguf: Option<u32>,
}

const fn plain(bytes: u64, safetensors: &'static str, gguf: Option<u32>) -> Layout {
    Layout { name: safetensors, block_elements: 1, block_bytes: bytes, safetensors: Some(safetensors), gguf }
}

const fn blocks(name: &'static str, elements: u64, bytes: u64, gguf: u32) -> Layout {
    Layout { name, block_elements: elements, block_bytes: bytes, safetensors: None, gguf: Some(gguf) }
}

/// A format of which codes and scales are two tensors.
const fn paired(name: &'static str, elements: u64, bytes: u64) -> Layout {
    Layout { name, block_elements: elements, block_bytes: bytes, safetensors: None, gguf: None }
}

impl DType {
    const fn layout(self) -> Layout {
        match self {
            Self::F64 => plain(8, "F64", Some(28)),
            Self::F32 => plain(4, "F32", Some(0)),
            Self::F16 => plain(2, "F16", Some(1)),
            Self::Bf16 => plain(2, "BF16", Some(30)),
            Self::I64 => plain(8, "I64", Some(27)),
            Self::I32 => plain(4, "I32", Some(26)),
            Self::I16 => plain(2, "I16", Some(25)),
            Self::I8 => plain(1, "I8", Some(24)),
            Self::U64 => plain(8, "U64", None),
            Self::U32 => plain(4, "U32", None),
            Self::U16 => plain(2, "U16", None),
            Self::U8 => plain(1, "U8", None),
            Self::Bool => plain(1, "BOOL", None),
            Self::F8E4m3 => plain(1, "F8_E4M3", None),
            Self::F8E5m2 => plain(1, "F8_E5M2", None),
            Self::Q4_0 => blocks("Q4_0", 32, 18, 2),
            Self::Q4_1 => blocks("Q4_1", 32, 20, 3),
            Self::Q5_0 => blocks("Q5_0", 32, 22, 6),
            Self::Q5_1 => blocks("Q5_1", 32, 24, 7),
            Self::Q8_0 => blocks("Q8_0", 32, 34, 8),
            Self::Q4K => blocks("Q4_K", 256, 144, 12),
            Self::Q5K => blocks("Q5_K", 256, 176, 13),
            Self::Q6K => blocks("Q6_K", 256, 210, 14),
            Self::Fp8Blocks => paired("FP8_BLOCKS", 1, 1),
            Self::Mxfp4 => paired("MXFP4", 32, 17),
        }
    }

    /// The number of elements that are stored together: 1 unless this is a block format.
    pub const fn block_elements(self) -> u64 {
        self.layout().block_elements
    }

    /// The bytes of one block, which are the bytes of one element unless this is a block format.
    pub const fn block_bytes(self) -> u64 {
        self.layout().block_bytes
    }

    /// Whether several elements share a scale.
    pub const fn is_block(self) -> bool {
        self.block_elements() > 1 || matches!(self, Self::Fp8Blocks)
    }

    /// The bytes of `elements` elements; `None` when they are no whole number of blocks or the answer overflows.
    pub const fn bytes_for(self, elements: u64) -> Option<u64> {
        let layout = self.layout();
        if !elements.is_multiple_of(layout.block_elements) {
            return None;
        }
        (elements / layout.block_elements).checked_mul(layout.block_bytes)
    }

    /// The name in a safetensors header; `None` for block formats, which that format lacks.
    pub const fn safetensors_name(self) -> Option<&'static str> {
        self.layout().safetensors
    }

    /// The dtype of a safetensors name.
    pub fn from_safetensors_name(name: &str) -> Option<Self> {
        ALL_DTYPES.into_iter().find(|dtype| dtype.safetensors_name() == Some(name))
    }

    /// The type number in a GGUF file; `None` for dtypes that GGUF lacks.
    pub const fn gguf_id(self) -> Option<u32> {
        self.layout().gguf
    }

    /// The dtype of a GGUF type number.
    pub fn from_gguf_id(id: u32) -> Option<Self> {
        ALL_DTYPES.into_iter().find(|dtype| dtype.gguf_id() == Some(id))
    }

    /// The name in messages: that of safetensors, or of GGUF for its block formats.
    pub const fn name(self) -> &'static str {
        self.layout().name
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Where one tensor lies in a file, checked against the file when it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the file, or in Hugging Face's naming when a checkpoint gave it.
    pub name: String,
    /// The encoding of the elements.
    pub dtype: DType,
    /// Row-major: the last dimension is contiguous. Empty for a scalar.
    pub shape: Vec<usize>,
    /// The first byte, counted from the start of the file.
    pub offset: u64,
    /// The length in bytes, equal to what shape and dtype demand; scales that lie elsewhere are counted too.
    pub bytes: u64,
}

impl TensorInfo {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_is_found_by_its_own_names() {
        for dtype in ALL_DTYPES {
            if let Some(name) = dtype.safetensors_name() {
                assert_eq!(DType::from_safetensors_name(name), Some(dtype));
            }
            if let Some(id) = dtype.gguf_id() {
                assert_eq!(DType::from_gguf_id(id), Some(dtype));
            }
        }
        let names: std::collections::BTreeSet<&str> = ALL_DTYPES.iter().map(|dtype| dtype.name()).collect();
        assert_eq!(names.len(), ALL_DTYPES.len());
    }

    #[test]
    fn bytes_for_refuses_part_blocks_and_overflow() {
        assert_eq!(DType::Q4_0.bytes_for(64), Some(36));
        assert_eq!(DType::Q4_0.bytes_for(33), None);
        assert_eq!(DType::Q6K.bytes_for(256), Some(210));
        assert_eq!(DType::F32.bytes_for(u64::MAX / 2), None);
        assert_eq!(DType::Bf16.bytes_for(0), Some(0));
    }
}
