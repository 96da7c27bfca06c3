//! Element types of tensors in memory.

use half::{bf16, f16};

/// How the elements of a [`crate::Tensor`] are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// The upper half of a single: 8 bits of exponent, 7 of mantissa.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Eight bits with four of exponent and three of mantissa, 448 at most; means something with a scale alone.
    E4m3,
    /// Unsigned 32-bit, for token ids.
    U32,
    /// Signed 32-bit, for labels (-100 = not trained).
    I32,
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 | Self::I32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::E4m3 => 1,
        }
    }

    /// Whether the type can carry activations and weights.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::Bf16 | Self::F16)
    }

    /// The name that flags and messages use.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::E4m3 => "e4m3",
            Self::U32 => "u32",
            Self::I32 => "i32",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}

/// A Rust type that a tensor's memory can be viewed as.
pub trait Scalar: bytemuck::Pod + Send + Sync {
    /// The tensor element type of `Self`.
    const DTYPE: DType;
}

macro_rules! scalar {
    ($($rust:ty => $dtype:ident),*) => {
        $(impl Scalar for $rust { const DTYPE: DType = DType::$dtype; })*
    };
}
scalar!(f32 => F32, bf16 => Bf16, f16 => F16, u8 => E4m3, u32 => U32, i32 => I32);
