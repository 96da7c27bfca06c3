// Attention forward for compute capability 8.0 and above: online softmax over key tiles, one block a tile of queries of
// one head, matrix products by mma.sync, tiles brought in by cp.async. Needs attention_common.cuh in front.
//
// extern "C" attention_forward(
//   q u16*, q_pitch i32, k u16*, k_pitch i32, v u16*, v_pitch i32, out u16*, out_pitch i32, lse f32* [Tq, H],
//   key_begin i32* [Tq], key_end i32* [Tq], sinks f32* [H] or null,
//   query_rows i32, key_rows i32, query_heads i32, key_heads i32, scale f32, softcap f32,
//   chosen u32 [Tq, chosen_words] or null, chosen_words i32: read with ATTENTION_CHOICE alone)
//   grid (H, ceil(Tq / B), 1); block (max(P, Pv) <= 128 ? B : 2 * B, 1, 1);
//   dynamic shared memory max(B * P + 64 * P + 64 * Pv, B * Pv) * 2 + 8 * B bytes, P and Pv the padded E and Ev, B = 128.
// Option (-D) FORWARD_BLOCK_QUERIES=64 makes B = 64 and thereby lets E = 256 run in 99 kB of shared memory.
// Writes every element of out and lse. A query that sees no key gets out = 0 and lse = -inf (the sink, where there is one).
// Bytes: q, k, v, out once each from device memory while k and v of the running heads stay in L2.
// Operations: 2 (E + Ev) for each visible pair of query and key.
//
// Measured on an H200 (mma.sync on a card made for wgmma), bf16, causal, operations of visible pairs alone, in a replayed graph:
//   2 documents of 2048, H 32, K 8, E 128: 258 us, 266 TFLOP/s (flash-attention 2 in PyTorch 2.11: 271 us)
//   1 document of 8192, same heads: 1762 us, 312 TFLOP/s (1720 us)
//   4 documents of 2048, H 32, K 8, E 64: 262 us, 263 TFLOP/s (281 us)
//   4 documents of 512, H 9, K 3, E 64: 16 us (18 us)
//   2 documents of 2048, H 16, E 192 and Ev 128: 179 us, 240 TFLOP/s; H 8, K 4, E 256: 139 us, 247 TFLOP/s (177 us)

#ifndef FORWARD_BLOCK_QUERIES
#define FORWARD_BLOCK_QUERIES 128
#endif
constexpr int FORWARD_QUERIES = FORWARD_BLOCK_QUERIES;
constexpr int FORWARD_KEYS = 64;
// Two row tiles a warp halve the shared-memory reads of k and v; wide heads have no registers for that.
constexpr int FORWARD_ROW_TILES = WIDEST_PAD <= 128 ? 2 : 1;
constexpr int FORWARD_WARPS = FORWARD_QUERIES / (16 * FORWARD_ROW_TILES);
constexpr int FORWARD_THREADS = FORWARD_WARPS * 32;

struct ForwardState {
    float output[FORWARD_ROW_TILES][VALUE_PAD / 8][4];
    float maximum[FORWARD_ROW_TILES][2];
    float sum[FORWARD_ROW_TILES][2];
};

typedef float ForwardScores[FORWARD_ROW_TILES][FORWARD_KEYS / 8][4];

INLINE void forward_scores(ForwardScores& scores, u32 query_tile, u32 key_tile, int warp, int lane) {
#pragma unroll
    for (int m = 0; m < FORWARD_ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < FORWARD_KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < KEY_PAD / 16; ++step) {
        u32 left[FORWARD_ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < FORWARD_ROW_TILES; ++m)
            load_matrices(left[m], left_address<KEY_PAD>(query_tile, (warp * FORWARD_ROW_TILES + m) * 16, step * 2, lane));
#pragma unroll
        for (int n = 0; n < FORWARD_KEYS / 16; ++n) {
            u32 right[4];
            load_matrices(right, right_address<KEY_PAD>(key_tile, n * 16, step * 2, lane));
#pragma unroll
            for (int m = 0; m < FORWARD_ROW_TILES; ++m) {
                multiply_add(scores[m][2 * n], left[m], right[0], right[1]);
                multiply_add(scores[m][2 * n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// Scores become unnormalised probabilities; what was summed before is rescaled to the new maximum.
INLINE void forward_softmax(ForwardState& state, ForwardScores& scores, float exponent_scale) {
#pragma unroll
    for (int m = 0; m < FORWARD_ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float maximum = state.maximum[m][half];
#pragma unroll
            for (int n = 0; n < FORWARD_KEYS / 8; ++n)
                maximum = fmaxf(maximum, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
            maximum = quad_maximum(maximum);
            // A row without any visible key so far keeps -inf; zero in its place avoids inf - inf.
            float shift = maximum == negative_infinity() ? 0.0f : maximum * exponent_scale;
            float rescale = exp2_fast(state.maximum[m][half] * exponent_scale - shift);
            state.maximum[m][half] = maximum;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < FORWARD_KEYS / 8; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    scores[m][n][i] = exp2_fast(scores[m][n][i] * exponent_scale - shift);
                    sum += scores[m][n][i];
                }
            state.sum[m][half] = state.sum[m][half] * rescale + sum;
#pragma unroll
            for (int n = 0; n < VALUE_PAD / 8; ++n) {
                state.output[m][n][2 * half] *= rescale;
                state.output[m][n][2 * half + 1] *= rescale;
            }
        }
}

INLINE void forward_values(ForwardState& state, ForwardScores& scores, u32 value_tile, int lane) {
#pragma unroll
    for (int step = 0; step < FORWARD_KEYS / 16; ++step) {
        u32 left[FORWARD_ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < FORWARD_ROW_TILES; ++m) {
            left[m][0] = pack_halves(scores[m][2 * step][0], scores[m][2 * step][1]);
            left[m][1] = pack_halves(scores[m][2 * step][2], scores[m][2 * step][3]);
            left[m][2] = pack_halves(scores[m][2 * step + 1][0], scores[m][2 * step + 1][1]);
            left[m][3] = pack_halves(scores[m][2 * step + 1][2], scores[m][2 * step + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < VALUE_PAD / 16; ++n) {
            u32 right[4];
            load_matrices_transposed(right, left_address<VALUE_PAD>(value_tile, step * 16, n * 2, lane));
#pragma unroll
            for (int m = 0; m < FORWARD_ROW_TILES; ++m) {
                multiply_add(state.output[m][2 * n], left[m], right[0], right[1]);
                multiply_add(state.output[m][2 * n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// Applies the cap and, where the tile is not wholly visible, the mask. `bounds` holds (begin, end) of the block's rows.
INLINE void forward_mask(ForwardScores& scores, const int2* bounds, int warp, int lane, int first_key, bool masked,
                                   float scale, float softcap, const u32* chosen, int chosen_words, int first_query, int query_rows) {
#if ATTENTION_SOFTCAP
    float inside = scale / softcap;
#pragma unroll
    for (int m = 0; m < FORWARD_ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < FORWARD_KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[m][n][i] = softcap * tanh_accurate(scores[m][n][i] * inside);
#endif
#if ATTENTION_CHOICE
#pragma unroll
    for (int m = 0; m < FORWARD_ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = (warp * FORWARD_ROW_TILES + m) * 16 + half * 8 + (lane >> 2);
            u64 bits = chosen_keys(chosen, chosen_words, first_query + row, query_rows, first_key) >> (lane & 3) * 2;
#pragma unroll
            for (int n = 0; n < FORWARD_KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (!(bits >> (n * 8 + i) & 1)) scores[m][n][2 * half + i] = negative_infinity();
        }
#endif
    if (!masked) return;
#pragma unroll
    for (int m = 0; m < FORWARD_ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int2 bound = bounds[(warp * FORWARD_ROW_TILES + m) * 16 + half * 8 + (lane >> 2)];
#pragma unroll
            for (int n = 0; n < FORWARD_KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    int key = first_key + n * 8 + (lane & 3) * 2 + i;
                    if (key < bound.x || key >= bound.y) scores[m][n][2 * half + i] = negative_infinity();
                }
        }
}

// Normalises, writes lse, and brings the rows through shared memory so that stores are 16 bytes wide.
INLINE void forward_store(ForwardState& state, unsigned char* tile, half_bits* out, int out_pitch, float* lse,
                                    const float* sinks, int head, int query_heads, int first_query, int query_rows,
                                    float logit_scale, int warp, int lane) {
#pragma unroll
    for (int m = 0; m < FORWARD_ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = (warp * FORWARD_ROW_TILES + m) * 16 + half * 8 + (lane >> 2);
            float sum = quad_sum(state.sum[m][half]);
            float maximum = state.maximum[m][half] * logit_scale;
            float rescale = 1.0f;
            if (sinks) {
                float sink = sinks[head];
                float with_sink = fmaxf(maximum, sink);
                rescale = exp2_fast((maximum - with_sink) * LOG2_E);
                sum = sum * rescale + exp2_fast((sink - with_sink) * LOG2_E);
                maximum = with_sink;
            }
            float inverse = sum > 0.0f ? rescale / sum : 0.0f;
            if ((lane & 3) == 0 && first_query + row < query_rows)
                lse[(long long)(first_query + row) * query_heads + head] =
                    sum > 0.0f ? maximum + log2_fast(sum) * NATURAL_LOG_OF_2 : negative_infinity();
#pragma unroll
            for (int n = 0; n < VALUE_PAD / 8; ++n)
                *(u32*)(tile + tile_offset<VALUE_PAD>(row, n) + (lane & 3) * 4) =
                    pack_halves(state.output[m][n][2 * half] * inverse, state.output[m][n][2 * half + 1] * inverse);
        }
    __syncwarp();
    constexpr int CHUNKS = VALUE_PAD / 8;
    constexpr int ROWS = 16 * FORWARD_ROW_TILES;
#pragma unroll
    for (int start = 0; start < ROWS * CHUNKS; start += 32) {
        int row = warp * ROWS + (start + lane) / CHUNKS;
        int chunk = (start + lane) % CHUNKS;
        if (chunk * 8 < VALUE_WIDTH && first_query + row < query_rows)
            *(uint4*)(out + (long long)(first_query + row) * out_pitch + head * VALUE_WIDTH + chunk * 8) =
                *(const uint4*)(tile + tile_offset<VALUE_PAD>(row, chunk));
    }
}

extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, FORWARD_ROW_TILES) attention_forward(
    const half_bits* __restrict__ q, int q_pitch, const half_bits* __restrict__ k, int k_pitch,
    const half_bits* __restrict__ v, int v_pitch, half_bits* __restrict__ out, int out_pitch, float* __restrict__ lse,
    const int* __restrict__ key_begin, const int* __restrict__ key_end, const float* __restrict__ sinks, int query_rows,
    int key_rows, int query_heads, int key_heads, float scale, float softcap, const u32* __restrict__ chosen, int chosen_words) {
    constexpr int QUERY_BYTES = FORWARD_QUERIES * KEY_PAD * 2;
    constexpr int KEY_BYTES = FORWARD_KEYS * KEY_PAD * 2;
    constexpr int TILE_BYTES_NEEDED = QUERY_BYTES + KEY_BYTES + FORWARD_KEYS * VALUE_PAD * 2;
    constexpr int OUTPUT_BYTES = FORWARD_QUERIES * VALUE_PAD * 2;
    int2* bounds = (int2*)(dynamic_shared + (TILE_BYTES_NEEDED > OUTPUT_BYTES ? TILE_BYTES_NEEDED : OUTPUT_BYTES));
    u32 query_tile = shared_address(dynamic_shared);
    u32 key_tile = query_tile + QUERY_BYTES;
    u32 value_tile = key_tile + KEY_BYTES;

    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    int head = blockIdx.x;
    int key_head = head / (query_heads / key_heads);
    // Under a causal mask later queries see more keys: start the longest blocks first.
    int first_query = (int)(gridDim.y - 1 - blockIdx.y) * FORWARD_QUERIES;
    q += head * HEAD_WIDTH;
    k += key_head * HEAD_WIDTH;
    v += key_head * VALUE_WIDTH;

    VisibleRange range = visible_range(key_begin, key_end, first_query, FORWARD_QUERIES, query_rows);
    int key_limit = min(range.last, key_rows);
    copy_tile_async<FORWARD_QUERIES, KEY_PAD, HEAD_WIDTH, FORWARD_THREADS>(query_tile, q, q_pitch, first_query, query_rows, thread);
    if (range.first < key_limit)
        copy_tile_async<FORWARD_KEYS, KEY_PAD, HEAD_WIDTH, FORWARD_THREADS>(key_tile, k, k_pitch, range.first, key_limit, thread);
    commit_copies();
    if (thread < FORWARD_QUERIES) {
        int query = first_query + thread;
        bounds[thread] = query < query_rows ? make_int2(key_begin[query], key_end[query]) : make_int2(0, 0);
    }

    ForwardState state;
#pragma unroll
    for (int m = 0; m < FORWARD_ROW_TILES; ++m) {
        state.maximum[m][0] = state.maximum[m][1] = negative_infinity();
        state.sum[m][0] = state.sum[m][1] = 0.0f;
#pragma unroll
        for (int n = 0; n < VALUE_PAD / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) state.output[m][n][i] = 0.0f;
    }
    float logit_scale = ATTENTION_SOFTCAP ? 1.0f : scale;

    for (int first_key = range.first; first_key < key_limit; first_key += FORWARD_KEYS) {
        wait_for_copies<0>();
        __syncthreads();
        copy_tile_async<FORWARD_KEYS, VALUE_PAD, VALUE_WIDTH, FORWARD_THREADS>(value_tile, v, v_pitch, first_key, key_limit, thread);
        commit_copies();
        ForwardScores scores;
        forward_scores(scores, query_tile, key_tile, warp, lane);
        wait_for_copies<0>();
        __syncthreads();
        if (first_key + FORWARD_KEYS < key_limit) {
            copy_tile_async<FORWARD_KEYS, KEY_PAD, HEAD_WIDTH, FORWARD_THREADS>(key_tile, k, k_pitch, first_key + FORWARD_KEYS,
                                                                              key_limit, thread);
            commit_copies();
        }
        bool masked = first_key < range.all_first || first_key + FORWARD_KEYS > range.all_last;
        forward_mask(
            scores, bounds, warp, lane, first_key, masked, scale, softcap, chosen, chosen_words, first_query, query_rows);
        forward_softmax(state, scores, logit_scale * LOG2_E);
        forward_values(state, scores, value_tile, lane);
    }
    wait_for_copies<0>();
    __syncthreads();
    forward_store(state, dynamic_shared, out, out_pitch, lse, sinks, head, query_heads, first_query, query_rows, logit_scale, warp, lane);
}
