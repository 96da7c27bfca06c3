use std::sync::OnceLock;

/// The instruction sets that the kernels are written for, in the order of preference on their architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimdLevel {
    /// No assumption; slow where the processor has no fused multiply-add.
    Portable,
    /// Arm Advanced SIMD.
    Neon,
    /// x86 AVX2 with FMA and F16C.
    Avx2,
    /// x86 AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The former with the bf16 dot products.
    Avx512Bf16,
    /// AVX-512 as above, with or without the dot products, and the tiles of AMX for bf16.
    Avx512Amx,
}

impl SimdLevel {
    /// All levels, from the least to the most preferred.
    pub const ALL: [SimdLevel; 6] = [
        SimdLevel::Portable,
        SimdLevel::Neon,
        SimdLevel::Avx2,
        SimdLevel::Avx512,
        SimdLevel::Avx512Bf16,
        SimdLevel::Avx512Amx,
    ];

    /// The level in use: the best of this processor, or the one that the environment variable `PMETAL_SIMD` names
    /// if it is available. Read once.
    pub fn current() -> SimdLevel {
        static CURRENT: OnceLock<SimdLevel> = OnceLock::new();
        *CURRENT.get_or_init(|| match Self::requested() {
            Ok(Some(level)) => level,
            _ => Self::best(),
        })
    }

    /// What `PMETAL_SIMD` asks for, so that a program can refuse a value that [`SimdLevel::current`] ignores.
    ///
    /// # Errors
    /// A sentence when the value is no level's name or its level is not available here.
    pub fn requested() -> Result<Option<SimdLevel>, String> {
        let Some(value) = std::env::var_os("PMETAL_SIMD") else { return Ok(None) };
        let named = Self::ALL.into_iter().find(|level| value.to_str() == Some(level.name()));
        match named {
            Some(level) if level.is_available() => Ok(Some(level)),
            Some(level) => Err(format!(
                "PMETAL_SIMD asks for {}, the best that this processor has is {}",
                level.name(),
                Self::best().name()
            )),
            None => Err(format!(
                "PMETAL_SIMD is `{}`, it must be one of portable, neon, avx2, avx512, avx512bf16, avx512amx",
                value.to_string_lossy()
            )),
        }
    }

    /// The name that `PMETAL_SIMD` takes.
    pub fn name(self) -> &'static str {
        match self {
            SimdLevel::Portable => "portable",
            SimdLevel::Neon => "neon",
            SimdLevel::Avx2 => "avx2",
            SimdLevel::Avx512 => "avx512",
            SimdLevel::Avx512Bf16 => "avx512bf16",
            SimdLevel::Avx512Amx => "avx512amx",
        }
    }

    /// Whether it multiplies bf16 faster than f32, so that bf16 is the better choice for activations.
    pub fn prefers_bf16(self) -> bool {
        matches!(self, SimdLevel::Avx512Bf16 | SimdLevel::Avx512Amx)
    }

    /// Whether it includes AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    pub(in crate::device::cpu) fn has_avx2(self) -> bool {
        !matches!(self, SimdLevel::Portable | SimdLevel::Neon)
    }

    /// Whether x86 AVX-512 F, BW, DQ and VL are part of it.
    pub(in crate::device::cpu) fn has_avx512(self) -> bool {
        matches!(self, SimdLevel::Avx512 | SimdLevel::Avx512Bf16 | SimdLevel::Avx512Amx)
    }

    /// Whether this processor can run it and the operating system lets it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c");
            let avx512 = avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
            match self {
                SimdLevel::Portable => true,
                SimdLevel::Neon => false,
                SimdLevel::Avx2 => avx2,
                SimdLevel::Avx512 => avx512,
                SimdLevel::Avx512Bf16 => avx512 && has!("avx512bf16"),
                SimdLevel::Avx512Amx => avx512 && super::amx::is_permitted(),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            match self {
                SimdLevel::Portable => true,
                SimdLevel::Neon => cfg!(target_arch = "aarch64"),
                _ => false,
            }
        }
    }

    fn best() -> SimdLevel {
        let pays = |level| level != SimdLevel::Avx512Bf16 || has_fast_dot_products();
        let best = Self::ALL.into_iter().rev().find(|&level| level.is_available() && pays(level));
        best.unwrap_or(SimdLevel::Portable)
    }
}

/// Whether dot products of bf16 are faster than multiply-adds of f32. On Intel's processors up to Sapphire Rapids a dot
/// product, which does the work of two multiply-adds, takes as long as four (measured: 110 against 189 GFLOP/s a core).
fn has_fast_dot_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let vendor = std::arch::x86_64::__cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}
