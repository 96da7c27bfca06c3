//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", SC 2011). A number is a pure function of (seed, step, stream, index), so that nothing but
//! the step number has to be saved to resume.

/// What a sequence of random numbers is keyed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RandomKey {
    /// The run's seed.
    pub seed: u64,
    /// The training step or the position in a generated text.
    pub step: u32,
    /// Which consumer: a number unique to a dropout layer, an initialisation, a sampler.
    pub stream: u32,
}

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Words of [`RandomKey::wide_block`].
///
/// Enough for loops that compilers vectorise instead of unrolling them.
pub const WIDE: usize = 256;

/// Ten rounds of Philox4x32 over a counter.
#[inline(always)]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for _ in 0..10 {
        let first = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
        c = [
            (second >> 32) as u32 ^ c[1] ^ k[0],
            second as u32,
            (first >> 32) as u32 ^ c[3] ^ k[1],
            first as u32,
        ];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    c
}

impl RandomKey {
    /// Four independent 32-bit words; `block` counts groups of four.
    #[inline(always)]
    pub fn block(self, block: u64) -> [u32; 4] {
        philox(
            [block as u32, (block >> 32) as u32, self.step, self.stream],
            [self.seed as u32, (self.seed >> 32) as u32],
        )
    }

    /// The words of [`WIDE`] / 4 consecutive blocks, in order; side by side, so that vectors compute them.
    #[inline(always)]
    pub fn wide_block(self, first_block: u64) -> [u32; WIDE] {
        const LOW: u64 = 0xffff_ffff;
        // 32-bit numbers in 64-bit lanes, so that no product has to be widened and narrowed again.
        let mut a: [u64; WIDE / 4] = std::array::from_fn(|lane| first_block.wrapping_add(lane as u64));
        let mut b = a.map(|block| block >> 32);
        let mut c = [u64::from(self.step); WIDE / 4];
        let mut d = [u64::from(self.stream); WIDE / 4];
        let mut key = [self.seed as u32, (self.seed >> 32) as u32];
        for _ in 0..10 {
            let [left, right] = key.map(u64::from);
            for (((a, b), c), d) in a.iter_mut().zip(&mut b).zip(&mut c).zip(&mut d) {
                let first = u64::from(MULTIPLIERS[0]).wrapping_mul(*a & LOW);
                let second = u64::from(MULTIPLIERS[1]).wrapping_mul(*c & LOW);
                *a = (second >> 32) ^ *b ^ left;
                *b = second & LOW;
                *c = (first >> 32) ^ *d ^ right;
                *d = first & LOW;
            }
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let mut words = [0; WIDE];
        for lane in 0..WIDE / 4 {
            for (part, counters) in [&a, &b, &c, &d].into_iter().enumerate() {
                words[4 * lane + part] = counters[lane] as u32;
            }
        }
        words
    }

    /// The `index`-th 32-bit word.
    #[inline(always)]
    pub fn word(self, index: u64) -> u32 {
        self.block(index / 4)[(index % 4) as usize]
    }

    /// The `index`-th number in [0, 1), a multiple of 2^-24.
    #[inline(always)]
    pub fn uniform(self, index: u64) -> f32 {
        (self.word(index) >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
    }

    /// The `index`-th number in [0, 1), a multiple of 2^-53.
    pub fn uniform_f64(self, index: u64) -> f64 {
        let words = self.block(index);
        let bits = (u64::from(words[0]) << 21) ^ (u64::from(words[1]) >> 11);
        (bits & ((1 << 53) - 1)) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

/// A 64-bit hash of a name, for streams that are keyed by text (FNV-1a).
pub fn stream_of(name: &str) -> u32 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash ^ (hash >> 32)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_gives_the_published_numbers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn wide_blocks_are_blocks_side_by_side() {
        let key = RandomKey { seed: 0x1234_5678_9abc_def0, step: 7, stream: 9 };
        for first in [0, 5, (1 << 32) - 3, u64::MAX - 20] {
            let narrow: Vec<u32> =
                (0..WIDE as u64 / 4).flat_map(|lane| key.block(first.wrapping_add(lane))).collect();
            assert_eq!(key.wide_block(first)[..], narrow, "{first}");
        }
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_evenly() {
        let key = RandomKey { seed: 3, step: 1, stream: 2 };
        let mut counts = [0usize; 10];
        for index in 0..100_000 {
            counts[(key.uniform(index) * 10.0) as usize] += 1;
        }
        assert!(counts.iter().all(|&count| count.abs_diff(10_000) < 500), "{counts:?}");
    }
}
