// Products of a few rows with the rows of a matrix: out [M, N] = scale * (x [M, K] w^T [K, N] + x2 [M, K2] w2^T [K2, N])
// + bias + residual, for M <= ROWS, summed in f32 in an order that the defines and K alone decide.
//
// x, x2 SOURCE; w [N, K], w2 [N, K2] WEIGHT; bias f32 [N] or null; out and residual (null, or `out` to add to it) ELEMENT; each
// with a pitch in elements. K2 = 0: one product. ROWS 1, 2, 4 or 8; a SIMD group computes FEATURES columns of out, SPLITS SIMD
// groups (a divisor of GEMV_GROUPS) divide the inner dimension among them, and a lane has DEPTH * FEATURES loads of 16 bytes
// under way. ALIGNED: K, K2, pitches and addresses of x and w are multiples of 8 elements and 16 bytes.
// Grid ceil(N / (FEATURES * GEMV_GROUPS / SPLITS)), group 32 * GEMV_GROUPS. Bytes: w once; 2 M flops an element of w.

#define GEMV_GROUPS 8

#ifndef load_eight_once
#define load_eight_once load_eight
#endif

struct GemvSums { float v[ROWS][FEATURES]; };

// Adds the products of one pair of matrices over this SIMD group's part of the inner dimension. Loads are made without a
// branch, by lanes that have nothing to load as well, so that all are under way together; the code is kept short because
// between two tokens everything else went through the caches.
DEVICE void add_products(
    LOCAL GemvSums& sums, const GLOBAL SOURCE* x, const GLOBAL WEIGHT* w, uint inner, uint x_pitch, uint w_pitch, uint rows,
    uint first, uint features, uint split, uint lane) {
    const uint stride = SPLITS * 256;
    ulong64 offsets[FEATURES];
    UNROLL for (uint f = 0; f < FEATURES; ++f) {
        offsets[f] = (ulong64)(first + f < features ? first + f : features - 1) * w_pitch;
    }
#if ALIGNED
    ROLLED for (uint start = split * 256 + lane * 8; start < inner; start += DEPTH * stride) {
        Eight weights[DEPTH][FEATURES];
        UNROLL for (uint d = 0; d < DEPTH; ++d) {
            uint k = start + d * stride < inner ? start + d * stride : start;
            UNROLL for (uint f = 0; f < FEATURES; ++f) weights[d][f] = load_eight_once(w + offsets[f] + k);
        }
        UNROLL for (uint d = 0; d < DEPTH; ++d) {
            uint k = start + d * stride;
            if (k >= inner) break;
            UNROLL for (uint m = 0; m < ROWS; ++m) {
                Eight a = load_eight(x + (m < rows ? m : rows - 1) * x_pitch + k);
                UNROLL for (uint f = 0; f < FEATURES; ++f) {
                    UNROLL for (uint j = 0; j < 8; ++j) sums.v[m][f] += a.v[j] * weights[d][f].v[j];
                }
            }
        }
    }
#else
    for (uint start = split * 256; start < inner; start += stride) {
        for (uint k = start + lane; k < start + 256 && k < inner; k += 32) {
            for (uint f = 0; f < FEATURES; ++f) {
                float weight = widen(w[offsets[f] + k]);
                for (uint m = 0; m < ROWS; ++m) sums.v[m][f] += widen(x[(m < rows ? m : rows - 1) * x_pitch + k]) * weight;
            }
        }
    }
#endif
}

KERNEL(gemv)(GIVEN_POSITION
    const GLOBAL SOURCE* x, const GLOBAL WEIGHT* w, const GLOBAL SOURCE* x2, const GLOBAL WEIGHT* w2,
    const GLOBAL float* bias, const GLOBAL ELEMENT* residual, GLOBAL ELEMENT* out, SCALAR(uint, rows),
    SCALAR(uint, features), SCALAR(uint, inner), SCALAR(uint, x_pitch), SCALAR(uint, w_pitch), SCALAR(uint, inner2),
    SCALAR(uint, x2_pitch), SCALAR(uint, w2_pitch), SCALAR(uint, residual_pitch), SCALAR(uint, out_pitch),
    SCALAR(float, scale)) {
    SHARED float parts[GEMV_GROUPS][ROWS * FEATURES];
    const uint per_group = GEMV_GROUPS / SPLITS * FEATURES;
    uint simd = THREAD / 32, lane = THREAD % 32;
    uint first = GROUP_X * per_group + simd / SPLITS * FEATURES, split = simd % SPLITS;
    GemvSums sums;
    for (uint m = 0; m < ROWS; ++m) {
        for (uint f = 0; f < FEATURES; ++f) sums.v[m][f] = 0.0f;
    }
    if (first < features) {
        add_products(sums, x, w, inner, x_pitch, w_pitch, rows, first, features, split, lane);
        if (inner2 > 0) add_products(sums, x2, w2, inner2, x2_pitch, w2_pitch, rows, first, features, split, lane);
    }
    UNROLL for (uint m = 0; m < ROWS; ++m) {
        UNROLL for (uint f = 0; f < FEATURES; ++f) {
            float sum = simd_sum(sums.v[m][f]);
            if (lane == 0) parts[simd][m * FEATURES + f] = sum;
        }
    }
    BARRIER();
    for (uint index = THREAD; index < ROWS * per_group; index += THREADS) {
        uint m = index / per_group, column = index % per_group, n = GROUP_X * per_group + column;
        if (m >= rows || n >= features) continue;
        float sum = 0.0f;
        for (uint s = 0; s < SPLITS; ++s) sum += parts[column / FEATURES * SPLITS + s][m * FEATURES + column % FEATURES];
        sum *= scale;
        if (bias) sum += bias[n];
        if (residual) sum += widen(residual[(ulong64)m * residual_pitch + n]);
        narrow(sum, out + (ulong64)m * out_pitch + n);
    }
}
