// What several kernels share: reductions in a fixed order, so that results do not change from run to run.

// Sum over the 32 lanes of a SIMD group; every lane gets it.
DEVICE float simd_sum(float x) {
    for (uint mask = 16; mask > 0; mask >>= 1) x += simd_shuffle_xor(x, mask);
    return x;
}

DEVICE float simd_max(float x) {
    for (uint mask = 16; mask > 0; mask >>= 1) x = maximum(x, simd_shuffle_xor(x, mask));
    return x;
}

// Sum over a group of a multiple of 32 threads; every thread gets it. `scratch` holds 32 floats, free for the next use
// after the caller's next barrier.
DEVICE float group_sum(POSITION float x, SHARED_POINTER(float) scratch) {
    x = simd_sum(x);
    if (THREADS <= 32) return x;
    BARRIER();
    if (THREAD % 32 == 0) scratch[THREAD / 32] = x;
    BARRIER();
    x = THREAD % 32 < THREADS / 32 ? scratch[THREAD % 32] : 0.0f;
    return simd_sum(x);
}

DEVICE float group_max(POSITION float x, SHARED_POINTER(float) scratch) {
    x = simd_max(x);
    if (THREADS <= 32) return x;
    BARRIER();
    if (THREAD % 32 == 0) scratch[THREAD / 32] = x;
    BARRIER();
    x = THREAD % 32 < THREADS / 32 ? scratch[THREAD % 32] : -INFINITE;
    return simd_max(x);
}

#ifdef NATIVE_PAIRED_PRODUCT
#define paired_product NATIVE_PAIRED_PRODUCT
#else
template <typename T> DEVICE float product_of_pairs(uint left, uint right) {
    T a[2], b[2];
    for (uint i = 0; i < 2; ++i) {
        a[i].bits = (ushort)(left >> 16 * i);
        b[i].bits = (ushort)(right >> 16 * i);
    }
    return widen(a[0]) * widen(b[0]) + widen(a[1]) * widen(b[1]);
}

// Adds a product of 16 x 16 and 16 x 8 of 16 bits, two in a word, to a SIMD group's sums, in the order that mma.m16n8k16 says:
// lane 4 i + j has of the left the columns 2 j, 2 j + 1 of the rows i and i + 8, then 2 j + 8, 2 j + 9 of them; of the right
// the same rows of column i; of the sums the columns 2 j, 2 j + 1 of the row i, then of i + 8.
template <typename T> DEVICE void paired_product(POSITION LOCAL const uint* left, LOCAL const uint* right, LOCAL float* sums) {
    uint lane = THREAD % 32, rows[4][4], columns[8][2];
    for (uint mask = 0; mask < 32; ++mask) {
        uint other = lane ^ mask;
        for (uint n = 0; n < 4 && mask < 4; ++n) rows[other % 4][n] = as_bits(simd_shuffle_xor(as_float(left[n]), mask));
        for (uint n = 0; n < 2; ++n) {
            uint word = as_bits(simd_shuffle_xor(as_float(right[n]), mask));
            if (other / 8 == lane % 4) columns[other % 8][n] = word;
        }
    }
    for (uint i = 0; i < 4; ++i) {
        for (uint j = 0; j < 4; ++j) {
            sums[i] += product_of_pairs<T>(rows[j][i / 2], columns[i % 2 * 4 + j][0]);
            sums[i] += product_of_pairs<T>(rows[j][2 + i / 2], columns[i % 2 * 4 + j][1]);
        }
    }
}
#endif

// Where a row of `width` elements starts if `inner` of them follow each other and then the next begin a pitch apart.
DEVICE uint row_start(uint row, uint inner, uint pitch, uint width) {
    return (row / inner) * pitch + (row % inner) * width;
}

// Eight elements of a row from a column on, zeros beyond its end; with ALIGNED its width is a multiple of 8.
template <typename T> DEVICE Eight eight_columns(const GLOBAL T* row, uint column, uint width) {
#if ALIGNED
    return load_eight(row + column);
#else
    Eight out;
    for (uint j = 0; j < 8; ++j) out.v[j] = column + j < width ? widen(row[column + j]) : 0.0f;
    return out;
#endif
}

// Codes of e4m3, eight bits: sign, four bits of exponent, three of mantissa; see fp8.cpp.
DEVICE uint portable_e4m3(float x) {
    uint bits = as_bits(x), sign = bits >> 24 & 0x80, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return sign | 0x7f;
    if (size >= 0x43e00000u) return sign | 0x7e;
    // Below 2^-6 codes are multiples of 2^-9, which is the unit of numbers from 2^14 on.
    if (size < 0x3c800000u) return sign | (as_bits(as_float(size) + 16384.0f) & 0xff);
    return sign | (size + 0x7ffffu + (size >> 20 & 1) - 0x3c000000u) >> 20;
}

DEVICE uint e4m3_pair(float low, float high) {
#ifdef NATIVE_E4M3_PAIR
    return NATIVE_E4M3_PAIR(low, high);
#else
    return portable_e4m3(low) | portable_e4m3(high) << 8;
#endif
}

// The factor of a row, whose scale is its inverse; sizes that f32 could not divide by count as zero.
DEVICE float row_factor(float greatest) { return 448.0f / maximum(greatest, 1e-30f); }

DEVICE float greatest_of(float greatest, Eight x) {
    for (int j = 0; j < 8; ++j) greatest = maximum(greatest, magnitude(x.v[j]));
    return greatest;
}

DEVICE Eight times_eight(Eight x, const GLOBAL float* factors) {
    Eight f = load_eight(factors);
    for (int j = 0; j < 8; ++j) x.v[j] *= f.v[j];
    return x;
}

DEVICE void store_codes(Eight x, float factor, GLOBAL uchar* codes) {
    ulong64 eight = 0;
    for (int j = 0; j < 4; ++j) eight |= (ulong64)e4m3_pair(x.v[2 * j] * factor, x.v[2 * j + 1] * factor) << 16 * j;
    *(GLOBAL ulong64*)codes = eight;
}

// Four words of Philox4x32-10 (Salmon et al., SC 2011): a number is a function of seed, step, stream and its index alone.
DEVICE void philox(ulong64 block, uint seed_low, uint seed_high, uint step, uint stream, LOCAL uint* c) {
    uint k[2] = {seed_low, seed_high};
    c[0] = (uint)block;
    c[1] = (uint)(block >> 32);
    c[2] = step;
    c[3] = stream;
    for (int round = 0; round < 10; ++round) {
        uint high0 = multiply_high(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
        uint high1 = multiply_high(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
        c[0] = high1 ^ c[1] ^ k[0];
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ k[1];
        c[3] = low0;
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
}

// What is applied to gates, with its derivative.
struct Activated { float value, slope; };

DEVICE Activated silu(float x) {
    float share = reciprocal(1.0f + exponential(-x));
    return {x * share, share * (1.0f + x * (1.0f - share))};
}

DEVICE Activated logistic_gate(float x) {
    float share = 1.0f / (1.0f + exponential(-x));
    return {share, share * (1.0f - share)};
}

// x times the share of the normal distribution that is below x (Hendrycks and Gimpel, arXiv 1606.08415), to 8 units of 2^-24. The
// share below -s, divided by exp(-s s / 2), is 2.5 / (2.5 + s) times a polynomial in the place of s between 0 and infinity, folded
// to [-1, 1]: our own minimax fit by Remez's exchange, whose largest relative error on [0, 15] is 1.6e-8. In a sum with erf
// instead, small shares would cancel.
DEVICE Activated gelu(float x) {
    float size = magnitude(x) > 15.0f ? 15.0f : magnitude(x);
    // The exponential of a square needs the square to more digits than f32 has.
    float square = size * size, rest = multiply_add(size, size, -square);
    float bell = exponential(-0.5f * square);
    bell = multiply_add(-0.5f * rest, bell, bell);
    float place = 2.5f / (size + 2.5f), folded = multiply_add(place, -2.0f, 1.0f);
    float series = -6.30808e-5f;
    series = multiply_add(series, folded, -1.2464914e-4f);
    series = multiply_add(series, folded, 2.7376474e-4f);
    series = multiply_add(series, folded, 1.0095731e-3f);
    series = multiply_add(series, folded, -6.4033177e-4f);
    series = multiply_add(series, folded, -6.554474e-3f);
    series = multiply_add(series, folded, 3.6943501e-3f);
    series = multiply_add(series, folded, 5.279479e-2f);
    series = multiply_add(series, folded, -1.734768e-1f);
    series = multiply_add(series, folded, 2.8266266e-1f);
    float tail = place * series * bell, share = x < 0.0f ? tail : 1.0f - tail;
    return {x * share, share + x * bell * 0.3989422804f};
}

// The tanh form of GELU (the same paper), with (1 + tanh u) / 2 as sigmoid(2u), which does not cancel for negative u.
DEVICE Activated gelu_tanh(float x) {
    float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    float share = reciprocal(1.0f + exponential(-2.0f * u));
    float slope = share + x * share * (1.0f - share) * 2.0f * 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
    return {x * share, slope};
}
