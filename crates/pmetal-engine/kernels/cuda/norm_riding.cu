// rms_norm and rms_norm_backward of norm.cpp with products that ride on them; needs riding.cuh in front. WEIGHT is the type of
// the norm's weight, which is read where `weighted`.
//
// rms_norm_riding           out = norm(x), and s x A^T of the rounded result in the S columns behind it. Grid ceil(T / 16), block
//                           256, dynamic shared memory max(16 * ROW_BYTES, 512 * S). The norm has the bits of norm.cpp up to D = 1024.
// rms_norm_backward_riding  d_x = the gradient for d_out + s d A, d [T, S], plus what `held` holds where `accumulate`.
//                           Grid ceil(T / 16), block 32 ceil(D / 64), at most 512.
// Bytes: those of the norm, A once for each block, x A^T or d once.

extern "C" __global__ void __launch_bounds__(256) rms_norm_riding(
    const ELEMENT* __restrict__ x, const WEIGHT* __restrict__ weight, ELEMENT* __restrict__ out, const half_bits* __restrict__ a,
    u32 rows, u32 x_pitch, u32 out_pitch, u32 a_pitch, float epsilon, float shift, u32 weighted, float scale) {
    constexpr int VECTORS = (ROW_WIDTH + 255) / 256;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * BLOCK_ROWS;
    Reduction<8> product;
    Packed<ELEMENT> values[2][VECTORS];
    UNROLL for (int r = 0; r < 2; ++r)
        UNROLL for (int n = 0; n < VECTORS; ++n) {
            int i = (n * 32 + lane) * 8, row = first + warp * 2 + r;
            values[r][n].raw = chunk_or_zeros(x + (u64)row * x_pitch + i, i < ROW_WIDTH && row < rows);
        }
    product.load(a, a_pitch, warp, lane);
    UNROLL for (int r = 0; r < 2; ++r) {
        int own = warp * 2 + r;
        float squares = 0.0f;
        UNROLL for (int n = 0; n < VECTORS; ++n) {
            Eight v = unpacked(values[r][n]);
            for (int j = 0; j < 8; ++j) squares += v.v[j] * v.v[j];
        }
        float factor = 1.0f / square_root(simd_sum(squares) / (float)ROW_WIDTH + epsilon);
        UNROLL for (int n = 0; n < VECTORS; ++n) {
            int i = (n * 32 + lane) * 8;
            if (i >= ROW_WIDTH) continue;
            Eight v = unpacked(values[r][n]);
            if (weighted) {
                Eight w = load_eight(weight + i);
                for (int j = 0; j < 8; ++j) v.v[j] = v.v[j] * factor * (w.v[j] + shift);
            } else {
                for (int j = 0; j < 8; ++j) v.v[j] *= factor;
            }
            uint4 raw = packed<ELEMENT>(v).raw;
            *(uint4*)(dynamic_shared + own * ROW_BYTES + i * 2) = raw;
            if (first + own < rows) *(uint4*)(out + (u64)(first + own) * out_pitch + i) = raw;
        }
    }
    half_bits* target = (half_bits*)(out + (u64)first * out_pitch + ROW_WIDTH);
    product.finish(target, out_pitch, (int)rows - first, scale, warp, lane);
}

constexpr int BACK_WARPS = (ROW_WIDTH + 63) / 64 < 16 ? (ROW_WIDTH + 63) / 64 : 16;

extern "C" __global__ void __launch_bounds__(BACK_WARPS * 32) rms_norm_backward_riding(
    const ELEMENT* __restrict__ x, const WEIGHT* __restrict__ weight, const ELEMENT* __restrict__ d_out,
    const half_bits* __restrict__ d, const half_bits* __restrict__ a, ELEMENT* d_x, const ELEMENT* held, u32 rows, u32 x_pitch,
    u32 d_out_pitch, u32 d_pitch, u32 a_pitch, u32 d_x_pitch, u32 held_pitch, float epsilon, float shift, u32 weighted,
    u32 accumulate, float scale) {
    __shared__ float2 parts[BACK_WARPS][BLOCK_ROWS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * BLOCK_ROWS;
    int column = warp * 64 + (lane & 3) * 8;
    Packed<ELEMENT> inputs[2][2], slopes[2][2], sums[2][2];
    bool present[2][2];
    UNROLL for (int half = 0; half < 2; ++half)
        UNROLL for (int v = 0; v < 2; ++v) {
            u64 row = first + (lane >> 2) + half * 8;
            int i = column + v * 32;
            present[half][v] = row < rows && i < ROW_WIDTH;
            inputs[half][v].raw = chunk_or_zeros(x + row * x_pitch + i, present[half][v]);
            slopes[half][v].raw = chunk_or_zeros(d_out + row * d_out_pitch + i, present[half][v]);
            sums[half][v].raw = chunk_or_zeros(held + row * held_pitch + i, accumulate && present[half][v]);
        }
    Eight back[2][2];
    expand(back, d + (u64)first * d_pitch, d_pitch, a, a_pitch, warp * 64, (int)rows - first, lane);
    float2 own[2] = {};
    UNROLL for (int v = 0; v < 2; ++v) {
        Eight w;
        for (int j = 0; j < 8; ++j) w.v[j] = 1.0f;
        if (weighted && column + v * 32 < ROW_WIDTH) {
            w = load_eight(weight + column + v * 32);
            for (int j = 0; j < 8; ++j) w.v[j] += shift;
        }
        UNROLL for (int half = 0; half < 2; ++half) {
            Eight b = unpacked(inputs[half][v]), slope = unpacked(slopes[half][v]);
            for (int j = 0; j < 8; ++j) {
                back[half][v].v[j] = (slope.v[j] + scale * back[half][v].v[j]) * w.v[j];
                own[half].x += b.v[j] * b.v[j];
                own[half].y += b.v[j] * back[half][v].v[j];
            }
        }
    }
    UNROLL for (int half = 0; half < 2; ++half) {
        UNROLL for (int mask = 1; mask < 4; mask *= 2) {
            own[half].x += simd_shuffle_xor(own[half].x, mask);
            own[half].y += simd_shuffle_xor(own[half].y, mask);
        }
        if ((lane & 3) == 0) parts[warp][(lane >> 2) + half * 8] = own[half];
    }
    __syncthreads();
    UNROLL for (int half = 0; half < 2; ++half) {
        float squares = 0.0f, product = 0.0f;
        UNROLL for (int part = 0; part < BACK_WARPS; ++part) {
            float2 other = parts[part][(lane >> 2) + half * 8];
            squares += other.x;
            product += other.y;
        }
        float factor = 1.0f / square_root(squares / (float)ROW_WIDTH + epsilon);
        float share = product * factor * factor * factor / (float)ROW_WIDTH;
        UNROLL for (int v = 0; v < 2; ++v) {
            if (!present[half][v]) continue;
            Eight b = unpacked(inputs[half][v]), sum = unpacked(sums[half][v]);
            for (int j = 0; j < 8; ++j) b.v[j] = back[half][v].v[j] * factor - b.v[j] * share + sum.v[j];
            store_eight(b, d_x + (u64)(first + (lane >> 2) + half * 8) * d_x_pitch + column + v * 32);
        }
    }
}
