// Attention forward for few queries over many keys (generation with a cache), compute capability 8.0 and above: the keys of a query are
// split over blocks, and a second kernel combines the parts. Needs attention_common.cuh in front.
//
// 1 attention_decode(q u16*, q_pitch i32, k u16*, k_pitch i32, v u16*, v_pitch i32, parts f32*, key_begin i32*, key_end i32* [Tq],
//     query_rows i32, key_rows i32, query_heads i32, key_heads i32, scale f32, softcap f32)
//   grid (splits, K * ceil(H / K / 16), Tq), block 128, dynamic shared memory 32 * P + 256 * (P + Pv) + 512 bytes, P and Pv the padded
//   E and Ev. splits is free up to 64; 2 * multiprocessors / (grid y * grid z)
//   but at least 1 fills the card.
// 2 attention_decode_combine(parts f32*, splits i32, out u16*, out_pitch i32, lse f32* [Tq, H], sinks f32* [H] or null,
//     query_heads i32)
//   grid (H, Tq), block ceil(Ev / 64) * 32, no dynamic shared memory.
// Workspace `parts`: splits * Tq * H * (Ev + 1) f32; the first splits * Tq * H of them are the logarithms of the parts' sums.
// Bytes: each visible k and v once for each query; results do not change from run to run.
// Measured on an H200, bf16, H 32, K 8, E 128: 1 query over 65536 keys 74 us (3.6 TB/s of k and v), over 4096 keys 14 us;
// 4 queries over 65536 keys 142 us.

constexpr int DECODE_WARPS = 4;
constexpr int DECODE_KEYS = 16;
constexpr int DECODE_STAGE_BYTES = DECODE_KEYS * (KEY_PAD + VALUE_PAD) * 2;

struct DecodeState {
    float output[VALUE_PAD / 8][4];
    float maximum[2], sum[2];
};

// One tile of 16 keys against up to 16 heads of a group.
INLINE void decode_tile(DecodeState& state, u32 query_tile, u32 key_tile, int keys, float scale, float softcap, int lane) {
    float scores[2][4] = {};
#pragma unroll
    for (int step = 0; step < KEY_PAD / 16; ++step) {
        u32 left[4], right[4];
        load_matrices(left, left_address<KEY_PAD>(query_tile, 0, step * 2, lane));
        load_matrices(right, right_address<KEY_PAD>(key_tile, 0, step * 2, lane));
        multiply_add(scores[0], left, right[0], right[1]);
        multiply_add(scores[1], left, right[2], right[3]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float maximum = state.maximum[half];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                float logit = scores[n][i] * scale;
#if ATTENTION_SOFTCAP
                logit = softcap * tanh_accurate(logit / softcap);
#endif
                bool present = n * 8 + (lane & 3) * 2 + (i & 1) < keys;
                scores[n][i] = present ? logit * LOG2_E : negative_infinity();
                maximum = fmaxf(maximum, scores[n][i]);
            }
        // Every tile holds at least one key, so the maximum is finite.
        maximum = quad_maximum(maximum);
        float rescale = exp2_fast(state.maximum[half] - maximum);
        state.maximum[half] = maximum;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                scores[n][i] = exp2_fast(scores[n][i] - maximum);
                sum += scores[n][i];
            }
        state.sum[half] = state.sum[half] * rescale + sum;
#pragma unroll
        for (int n = 0; n < VALUE_PAD / 8; ++n) {
            state.output[n][2 * half] *= rescale;
            state.output[n][2 * half + 1] *= rescale;
        }
    }
    u32 left[4] = {pack_halves(scores[0][0], scores[0][1]), pack_halves(scores[0][2], scores[0][3]),
                   pack_halves(scores[1][0], scores[1][1]), pack_halves(scores[1][2], scores[1][3])};
    u32 value_tile = key_tile + DECODE_KEYS * KEY_PAD * 2;
#pragma unroll
    for (int n = 0; n < VALUE_PAD / 16; ++n) {
        u32 right[4];
        load_matrices_transposed(right, left_address<VALUE_PAD>(value_tile, 0, n * 2, lane));
        multiply_add(state.output[2 * n], left, right[0], right[1]);
        multiply_add(state.output[2 * n + 1], left, right[2], right[3]);
    }
}

// Adds up the warps' parts, which meet in the place of the tiles, and stores them from row `first` of `rows` on.
INLINE void store_part(DecodeState& state, float* parts, long long rows, long long first, int heads, int warp, int lane) {
    __syncthreads();
    float* outputs = (float*)(dynamic_shared + 16 * KEY_PAD * 2);
    float2* totals = (float2*)(dynamic_shared + 16 * KEY_PAD * 2 + DECODE_WARPS * 2 * DECODE_STAGE_BYTES);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = half * 8 + (lane >> 2);
        float sum = quad_sum(state.sum[half]);
        if ((lane & 3) == 0) totals[warp * 16 + row] = make_float2(state.maximum[half], sum);
#pragma unroll
        for (int n = 0; n < VALUE_PAD / 8; ++n)
            *(float2*)(outputs + (warp * 16 + row) * VALUE_PAD + n * 8 + (lane & 3) * 2) =
                make_float2(state.output[n][2 * half], state.output[n][2 * half + 1]);
    }
    __syncthreads();
    for (int index = threadIdx.x; index < heads * VALUE_WIDTH; index += DECODE_WARPS * 32) {
        int head = index / VALUE_WIDTH, column = index % VALUE_WIDTH;
        float maximum = negative_infinity();
#pragma unroll
        for (int part = 0; part < DECODE_WARPS; ++part) maximum = fmaxf(maximum, totals[part * 16 + head].x);
        float shift = maximum == negative_infinity() ? 0.0f : maximum;
        float sum = 0.0f, value = 0.0f;
#pragma unroll
        for (int part = 0; part < DECODE_WARPS; ++part) {
            float weight = exp2_fast(totals[part * 16 + head].x - shift);
            sum += weight * totals[part * 16 + head].y;
            value += weight * outputs[(part * 16 + head) * VALUE_PAD + column];
        }
        long long row = first + head;
        parts[rows + row * VALUE_WIDTH + column] = sum > 0.0f ? value / sum : 0.0f;
        if (column == 0) parts[row] = sum > 0.0f ? maximum + log2_fast(sum) : negative_infinity();
    }
}

extern "C" __global__ void __launch_bounds__(DECODE_WARPS * 32) attention_decode(
    const half_bits* __restrict__ q, int q_pitch, const half_bits* __restrict__ k, int k_pitch, const half_bits* __restrict__ v,
    int v_pitch, float* __restrict__ parts, const int* __restrict__ key_begin, const int* __restrict__ key_end, int query_rows,
    int key_rows, int query_heads, int key_heads, float scale, float softcap) {
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    int split = blockIdx.x, splits = gridDim.x, query = blockIdx.z;
    int group = query_heads / key_heads;
    int chunks = (group + 15) / 16;
    int key_head = blockIdx.y / chunks;
    int first_head = key_head * group + blockIdx.y % chunks * 16;
    int heads = min(16, key_head * group + group - first_head);

    int begin = key_begin[query], end = min(key_end[query], key_rows);
    int share = (max(end - begin, 0) + splits - 1) / splits;
    share = (share + DECODE_WARPS * DECODE_KEYS - 1) / (DECODE_WARPS * DECODE_KEYS) * (DECODE_WARPS * DECODE_KEYS);
    begin += split * share;
    end = min(end, begin + share);

    u32 query_tile = shared_address(dynamic_shared);
    u32 stages = query_tile + 16 * KEY_PAD * 2 + warp * 2 * DECODE_STAGE_BYTES;
    copy_tile_async<16, KEY_PAD, HEAD_WIDTH, DECODE_WARPS * 32>(query_tile, q + (long long)query * q_pitch + first_head * HEAD_WIDTH,
                                                              HEAD_WIDTH, 0, heads, thread);
    commit_copies();
    auto fetch = [&](int slot, int first_key) {
        u32 stage = stages + slot * DECODE_STAGE_BYTES;
        copy_tile_async<DECODE_KEYS, KEY_PAD, HEAD_WIDTH, 32>(stage, k + key_head * HEAD_WIDTH, k_pitch, first_key, end, lane);
        copy_tile_async<DECODE_KEYS, VALUE_PAD, VALUE_WIDTH, 32>(stage + DECODE_KEYS * KEY_PAD * 2, v + key_head * VALUE_WIDTH, v_pitch,
                                                                first_key, end, lane);
        commit_copies();
    };
    int key = begin + warp * DECODE_KEYS;
    if (key < end) fetch(0, key);
    wait_for_copies<0>();
    __syncthreads();

    DecodeState state;
#pragma unroll
    for (int n = 0; n < VALUE_PAD / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) state.output[n][i] = 0.0f;
    state.maximum[0] = state.maximum[1] = negative_infinity();
    state.sum[0] = state.sum[1] = 0.0f;
    for (int slot = 0; key < end; slot ^= 1) {
        int next = key + DECODE_WARPS * DECODE_KEYS;
        if (next < end) {
            fetch(slot ^ 1, next);
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncwarp();
        decode_tile(state, query_tile, stages + slot * DECODE_STAGE_BYTES, end - key, scale, softcap, lane);
        __syncwarp();
        key = next;
    }

    long long first = ((long long)split * query_rows + query) * query_heads + first_head;
    store_part(state, parts, (long long)splits * query_rows * query_heads, first, heads, warp, lane);
}

constexpr int MOST_SPLITS = 64;

extern "C" __global__ void attention_decode_combine(const float* __restrict__ parts, int splits, half_bits* __restrict__ out, int out_pitch,
                                                    float* __restrict__ lse, const float* __restrict__ sinks, int query_heads) {
    __shared__ float weights[MOST_SPLITS];
    int head = blockIdx.x, query = blockIdx.y, query_rows = gridDim.y, lane = threadIdx.x % 32;
    long long first = (long long)query * query_heads + head;
    long long stride = (long long)query_rows * query_heads;
    float sink = sinks ? sinks[head] * LOG2_E : negative_infinity();
    float logs[MOST_SPLITS / 32];
    float maximum = sink;
#pragma unroll
    for (int i = 0; i < MOST_SPLITS / 32; ++i) {
        int split = i * 32 + lane;
        logs[i] = split < splits ? parts[split * stride + first] : negative_infinity();
        maximum = fmaxf(maximum, logs[i]);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, distance));
    float shift = maximum == negative_infinity() ? 0.0f : maximum;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MOST_SPLITS / 32; ++i) {
        float weight = exp2_fast(logs[i] - shift);
        sum += weight;
        if (threadIdx.x < 32) weights[i * 32 + lane] = weight;
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    sum += exp2_fast(sink - shift);
    __syncthreads();
    int column = threadIdx.x * 2;
    if (column < VALUE_WIDTH) {
        const float* source = parts + splits * stride + first * VALUE_WIDTH + column;
        float low = 0.0f, high = 0.0f;
#pragma unroll 8
        for (int split = 0; split < splits; ++split) {
            low += weights[split] * source[split * stride * VALUE_WIDTH];
            high += weights[split] * source[split * stride * VALUE_WIDTH + 1];
        }
        float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        *(u32*)(out + (long long)query * out_pitch + head * VALUE_WIDTH + column) = pack_halves(low * inverse, high * inverse);
    }
    if (threadIdx.x == 0) lse[first] = sum > 0.0f ? (maximum + log2_fast(sum)) * NATURAL_LOG_OF_2 : negative_infinity();
}
