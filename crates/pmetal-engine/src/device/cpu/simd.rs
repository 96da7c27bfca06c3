//! Compiling one loop for several instruction sets and choosing when the program runs.
//!
//! The bodies are written over fixed groups of [`LANES`] elements with explicit fused multiply-adds, so that
//! every instruction set gives the same bits.

use std::cell::Cell;

use crate::device::cpu::gemm::SimdLevel;

/// Elements that a reduction keeps apart, whatever the width of the registers.
pub(crate) const LANES: usize = 16;

thread_local! {
    /// Whether this thread computes what others are compared with.
    static IS_REFERENCE: Cell<bool> = const { Cell::new(false) };
}

/// Threads on which every kernel is the loop that no instruction set was chosen for.
pub(crate) fn reference_pool(threads: usize) -> Option<rayon::ThreadPool> {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
    builder.start_handler(|_| IS_REFERENCE.set(true)).build().ok()
}

/// The instruction set that products and attention run on.
pub(crate) fn level_of_products() -> SimdLevel {
    if IS_REFERENCE.get() { SimdLevel::Portable } else { SimdLevel::current() }
}

/// The instruction set that [`multiversion`] functions run on.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) fn level() -> SimdLevel {
    #[cfg(test)]
    if let Some(level) = forced::level() {
        return level;
    }
    level_of_products()
}

/// Lets a test run kernels on an instruction set of its choice.
#[cfg(test)]
pub(crate) mod forced {
    use std::cell::Cell;

    use super::SimdLevel;

    thread_local! {
        static LEVEL: Cell<Option<SimdLevel>> = const { Cell::new(None) };
    }

    pub(crate) fn level() -> Option<SimdLevel> {
        LEVEL.get()
    }

    /// A thread pool all of whose threads run kernels at `level`.
    pub(crate) fn pool(level: SimdLevel, threads: usize) -> rayon::ThreadPool {
        assert!(level.is_available());
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .start_handler(move |_| LEVEL.set(Some(level)))
            .build()
            .unwrap()
    }
}

/// Defines a function whose body is compiled for each instruction set, and that calls the best one.
macro_rules! multiversion {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident $(<$($generic:ident : $bound:path),+>)? ($($argument:ident : $kind:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        $visibility fn $name $(<$($generic: $bound),+>)? ($($argument: $kind),*) $(-> $result)? {
            #[inline(always)]
            fn portable $(<$($generic: $bound),+>)? ($($argument: $kind),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2 $(<$($generic: $bound),+>)? ($($argument: $kind),*) $(-> $result)? {
                portable $(::<$($generic),+>)? ($($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512 $(<$($generic: $bound),+>)? ($($argument: $kind),*) $(-> $result)? {
                portable $(::<$($generic),+>)? ($($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            {
                use $crate::device::cpu::gemm::SimdLevel;
                match $crate::device::cpu::simd::level() {
                    // SAFETY: the level says that the processor has these features.
                    SimdLevel::Avx512 | SimdLevel::Avx512Bf16 | SimdLevel::Avx512Amx => return unsafe { avx512 $(::<$($generic),+>)? ($($argument),*) },
                    // SAFETY: as above.
                    SimdLevel::Avx2 => return unsafe { avx2 $(::<$($generic),+>)? ($($argument),*) },
                    SimdLevel::Portable | SimdLevel::Neon => {}
                }
            }
            portable $(::<$($generic),+>)? ($($argument),*)
        }
    };
}
pub(crate) use multiversion;

/// An activation type of the CPU: stored as itself, computed as f32.
pub(crate) trait Element: crate::dtype::Scalar + Copy {
    fn widen(self) -> f32;
    fn narrow(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Element for half::bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// Rounds to nearest even without branches, so that loops vectorise; NaN stays NaN.
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        Self::from_bits(if value.is_nan() { quiet as u16 } else { rounded as u16 })
    }
}

impl Element for half::f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Runs a block with the Rust type of a float tensor's elements bound to a name.
macro_rules! with_element {
    ($dtype:expr, $name:ident => $body:expr) => {
        match $dtype {
            $crate::DType::Bf16 => {
                type $name = half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $name = half::f16;
                $body
            }
            _ => {
                type $name = f32;
                $body
            }
        }
    };
}
pub(crate) use with_element;

/// Folds equally long slices by `add(x, y, z, sum)` into 16 partial sums, then adds these by a fixed tree.
#[inline(always)]
pub(crate) fn lane_sum<X: Copy, Y: Copy, Z: Copy>(
    (x, y, z): (&[X], &[Y], &[Z]),
    add: impl Fn(X, Y, Z, f32) -> f32,
) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let whole = x.len() / LANES * LANES;
    // Chunks of a known size, so that the inner loop is free of bounds checks and becomes vectors.
    let chunks = x.chunks_exact(LANES).zip(y.chunks_exact(LANES)).zip(z.chunks_exact(LANES));
    for ((x, y), z) in chunks {
        for lane in 0..LANES {
            sums[lane] = add(x[lane], y[lane], z[lane], sums[lane]);
        }
    }
    for (((sum, &x), &y), &z) in sums.iter_mut().zip(&x[whole..]).zip(&y[whole..]).zip(&z[whole..]) {
        *sum = add(x, y, z, *sum);
    }
    tree_sum(sums)
}

/// Adds 16 lanes pairwise.
#[inline(always)]
pub(crate) fn tree_sum(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// e^x with at most 2 units in the last place of error; 0 below -104, infinity above 88.8.
///
/// Cody-Waite reduction by ln 2 and a polynomial of degree 6 on \[-ln2/2, ln2/2\].
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer in every instruction set.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-104.0, 89.0);
    let shifted = clamped.mul_add(LOG2_E, ROUND);
    let power = shifted - ROUND;
    let reduced = power.mul_add(-LN2_LOW, power.mul_add(-LN2_HIGH, clamped));
    let mut series = 1.987_569_1e-4_f32;
    series = series.mul_add(reduced, 1.398_199_9e-3);
    series = series.mul_add(reduced, 8.333_452e-3);
    series = series.mul_add(reduced, 4.166_579_6e-2);
    series = series.mul_add(reduced, 1.666_666_5e-1);
    series = series.mul_add(reduced, 0.5);
    let value = series.mul_add(reduced * reduced, reduced) + 1.0;
    // Two factors, so that results near both ends of the range stay representable.
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = exponent >> 1;
    let first = f32::from_bits((half.wrapping_add(127) as u32) << 23);
    let second = f32::from_bits((exponent.wrapping_sub(half).wrapping_add(127) as u32) << 23);
    let result = value * first * second;
    if x.is_nan() { x } else { result }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh by [`exp`]: 1 - 2 / (e^2x + 1), with an odd polynomial (Cephes, tanhf) near zero where that cancels.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let square = x * x;
    let mut series = -5.704_988_7e-3_f32;
    series = series.mul_add(square, 2.063_909e-2);
    series = series.mul_add(square, -5.373_971_6e-2);
    series = series.mul_add(square, 1.333_144_2e-1);
    series = series.mul_add(square, -3.333_328e-1);
    let near_zero = (series * square).mul_add(x, x);
    let quotient = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    if x.abs() < 0.625 { near_zero } else { quotient }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for index in 0..2_000_000 {
            let x = -87.0 + index as f32 * (175.0 / 2_000_000.0);
            let expected = f64::from(x).exp();
            let unit = f64::from(f32::EPSILON) * 2.0_f64.powi(expected.log2().floor() as i32);
            worst = worst.max((f64::from(exp(x)) - expected).abs() / unit);
        }
        assert!(worst <= 2.0, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_close_everywhere() {
        for index in -20_000..20_000 {
            let x = index as f32 * 1e-3;
            let expected = f64::from(x).tanh();
            assert!((f64::from(tanh(x)) - expected).abs() <= 3e-7 * expected.abs(), "{x}");
        }
    }

    #[test]
    fn narrowing_to_bf16_rounds_to_nearest_even() {
        use half::bf16;
        let mut state = 1_u32;
        for _ in 0..100_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(state);
            let (ours, theirs) = (<bf16 as Element>::narrow(value), bf16::from_f32(value));
            assert!(ours == theirs || (value.is_nan() && ours.is_nan()), "{value}");
        }
    }
}
