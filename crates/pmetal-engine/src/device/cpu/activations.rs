//! What is applied to gates, with its derivative.

use super::simd::{exp, sigmoid};

/// An activation, as a type so that loops over elements are compiled for each.
pub(super) trait Activation {
    /// Its value and its derivative.
    fn at(x: f32) -> (f32, f32);
}

/// x sigmoid(x).
pub(super) struct Silu;
/// x times the share of the normal distribution that is below x.
pub(super) struct Gelu;
/// The tanh approximation of that.
pub(super) struct GeluTanh;
/// sigmoid(x).
pub(super) struct Sigmoid;

impl Activation for Silu {
    #[inline(always)]
    fn at(x: f32) -> (f32, f32) {
        let share = sigmoid(x);
        (x * share, share * (1.0 - share).mul_add(x, 1.0))
    }
}

impl Activation for Gelu {
    #[inline(always)]
    fn at(x: f32) -> (f32, f32) {
        let (share, density) = normal(x);
        (x * share, x.mul_add(density, share))
    }
}

/// sqrt(2 / pi), of the tanh approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415).
const GELU_FACTOR: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

impl Activation for GeluTanh {
    /// With (1 + tanh u) / 2 as sigmoid(2u), which does not cancel for negative u.
    #[inline(always)]
    fn at(x: f32) -> (f32, f32) {
        let share = sigmoid(2.0 * GELU_FACTOR * x * (GELU_CUBIC * x).mul_add(x, 1.0));
        let slope = 2.0 * GELU_FACTOR * (3.0 * GELU_CUBIC * x).mul_add(x, 1.0);
        (x * share, (x * share * (1.0 - share)).mul_add(slope, share))
    }
}

impl Activation for Sigmoid {
    #[inline(always)]
    fn at(x: f32) -> (f32, f32) {
        let share = sigmoid(x);
        (share, share * (1.0 - share))
    }
}

/// Beyond, both the share below -x and the density are zero in f32.
const FARTHEST: f32 = 15.0;
const NEAREST: f32 = 2.5;
/// Of the polynomial in `kernels/common.cpp`, which says what it approximates; from the highest power on.
const SHARES: [f32; 10] = [
    -6.308_08e-5,
    -1.246_491_4e-4,
    2.737_647_4e-4,
    1.009_573_1e-3,
    -6.403_317_7e-4,
    -6.554_474e-3,
    3.694_350_1e-3,
    5.279_479e-2,
    -1.734_768e-1,
    2.826_626_6e-1,
];

/// Share of the normal distribution that is below x, and its density there: to 8 units of 2^-24 of either, on both sides.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    let size = x.abs().min(FARTHEST);
    // The exponential of a square needs the square to more digits than f32 has.
    let square = size * size;
    let rest = size.mul_add(size, -square);
    let bell = exp(-0.5 * square);
    let bell = (-0.5 * rest).mul_add(bell, bell);
    let place = NEAREST / (size + NEAREST);
    let folded = place.mul_add(-2.0, 1.0);
    let series = SHARES.iter().fold(0.0_f32, |sum, &factor| sum.mul_add(folded, factor));
    let tail = place * series * bell;
    const ROOT: f32 = 0.398_942_3;
    (if x < 0.0 { tail } else { 1.0 - tail }, bell * ROOT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    #[test]
    fn shares_of_the_normal_distribution_are_right_to_the_last_digits() {
        let mut worst = [0.0_f64; 2];
        for index in -125_000..=125_000 {
            let x = index as f32 * 1e-4;
            let wide = f64::from(x);
            let expected = [reference::normal_share(wide), reference::normal_density(wide)];
            let (share, density) = normal(x);
            for ((worst, ours), expected) in worst.iter_mut().zip([share, density]).zip(expected) {
                *worst = worst.max((f64::from(ours) / expected - 1.0).abs() * 2.0_f64.powi(24));
            }
        }
        assert!(worst.iter().all(|&worst| worst <= 8.0), "{worst:?}");
        println!("largest errors in units of 2^-24: {worst:?}");
        assert_eq!((normal(-20.0), normal(20.0)), ((0.0, 0.0), (1.0, 0.0)));
        assert_eq!((normal(f32::NEG_INFINITY), normal(f32::INFINITY)), ((0.0, 0.0), (1.0, 0.0)));
        assert!(Gelu::at(f32::NAN).0.is_nan() && Gelu::at(f32::NAN).1.is_nan());
    }
}
