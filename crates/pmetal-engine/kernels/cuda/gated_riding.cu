// gated and gated_backward of gated.cpp with products that ride on them; needs gated.cpp and riding.cuh in front, in this order.
//
// gated_riding           out = activation(gate) * up, and s out A^T of the rounded result in the S columns behind it.
//                        Grid ceil(T / 16), block 512, dynamic shared memory max(16 * ROW_BYTES, 1024 * S).
// gated_backward_riding  d_gate and d_up, which may be gate and up, for d_out + s d A, d [T, S].
//                        Grid (ceil(T / 16), ceil(D / 512)), block 256.
// Bytes: those of the gated product, A once for each block (a part of it backward), out A^T or d once.

extern "C" __global__ void __launch_bounds__(512) gated_riding(
    const ELEMENT* __restrict__ gate, const ELEMENT* __restrict__ up, ELEMENT* __restrict__ out, const half_bits* __restrict__ a,
    u32 rows, u32 gate_pitch, u32 up_pitch, u32 out_pitch, u32 a_pitch, float scale) {
    constexpr int CHUNKS = ROW_WIDTH / 8, EACH = (BLOCK_ROWS * CHUNKS + 511) / 512;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * BLOCK_ROWS;
    Reduction<16> product;
    Packed<ELEMENT> gates[EACH], ups[EACH];
    UNROLL for (int n = 0; n < EACH; ++n) {
        int index = n * 512 + threadIdx.x, row = index / CHUNKS, i = index % CHUNKS * 8;
        bool present = row < BLOCK_ROWS && first + row < rows;
        gates[n].raw = chunk_or_zeros(gate + (u64)(first + row) * gate_pitch + i, present);
        ups[n].raw = chunk_or_zeros(up + (u64)(first + row) * up_pitch + i, present);
    }
    product.load(a, a_pitch, warp, lane);
    UNROLL for (int n = 0; n < EACH; ++n) {
        int index = n * 512 + threadIdx.x, row = index / CHUNKS, i = index % CHUNKS * 8;
        if (row >= BLOCK_ROWS) break;
        Eight g = unpacked(gates[n]), u = unpacked(ups[n]);
        float value, slope;
        for (int j = 0; j < 8; ++j) {
            activate(g.v[j], value, slope);
            g.v[j] = value * u.v[j];
        }
        uint4 raw = packed<ELEMENT>(g).raw;
        *(uint4*)(dynamic_shared + row * ROW_BYTES + i * 2) = raw;
        if (first + row < rows) *(uint4*)(out + (u64)(first + row) * out_pitch + i) = raw;
    }
    half_bits* target = (half_bits*)(out + (u64)first * out_pitch + ROW_WIDTH);
    product.finish(target, out_pitch, (int)rows - first, scale, warp, lane);
}

extern "C" __global__ void __launch_bounds__(256, 3) gated_backward_riding(
    const ELEMENT* gate, const ELEMENT* up, const ELEMENT* __restrict__ d_out, const half_bits* __restrict__ d,
    const half_bits* __restrict__ a, ELEMENT* d_gate, ELEMENT* d_up, u32 rows, u32 gate_pitch, u32 up_pitch, u32 d_out_pitch,
    u32 d_pitch, u32 a_pitch, u32 d_gate_pitch, u32 d_up_pitch, float scale) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * BLOCK_ROWS;
    int begin = (blockIdx.y * 8 + warp) * 64, column = begin + (lane & 3) * 8;
    if (begin >= ROW_WIDTH) return;
    Eight back[2][2];
    expand(back, d + (u64)first * d_pitch, d_pitch, a, a_pitch, begin, (int)rows - first, lane);
    UNROLL for (int half = 0; half < 2; ++half) {
        u64 row = first + (lane >> 2) + half * 8;
        Packed<ELEMENT> gates[2], ups[2], slopes[2];
        UNROLL for (int v = 0; v < 2; ++v) {
            int i = column + v * 32;
            bool present = row < rows && i < ROW_WIDTH;
            slopes[v].raw = chunk_or_zeros(d_out + row * d_out_pitch + i, present);
            gates[v].raw = chunk_or_zeros(gate + row * gate_pitch + i, present);
            ups[v].raw = chunk_or_zeros(up + row * up_pitch + i, present);
        }
        UNROLL for (int v = 0; v < 2; ++v) {
            int i = column + v * 32;
            if (row >= rows || i >= ROW_WIDTH) continue;
            Eight g = unpacked(gates[v]), u = unpacked(ups[v]), s = unpacked(slopes[v]);
            float value, slope;
            for (int j = 0; j < 8; ++j) {
                float own = s.v[j] + scale * back[half][v].v[j];
                activate(g.v[j], value, slope);
                g.v[j] = own * u.v[j] * slope;
                u.v[j] = own * value;
            }
            store_eight(g, d_gate + row * d_gate_pitch + i);
            store_eight(u, d_up + row * d_up_pitch + i);
        }
    }
}
