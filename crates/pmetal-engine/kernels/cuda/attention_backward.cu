// Attention backward for compute capability 8.0 and above, by mma.sync and cp.async. Needs attention_common.cuh and
// attention_prepare.cu in front.
//
// Options (-D), besides those of attention_common.cuh; the defaults suit 163 kB of shared memory a block or more:
//   BACKWARD_KEYS      keys of a block: 128 (default up to E = 128), 64 (default above) or 32
//   BACKWARD_QUERIES   queries of a tile: 64 (default) or 32
//   BACKWARD_STAGES    2 (default: the next tile is fetched while one is worked on) or 1
//   For 99 kB a block: up to E = 128 give 64, 64, 1; above 32, 32, 1.
// P and Pv are the padded E and Ev; Tp = ceil(Tq / 128) * 128.
// Workspace, f32: row_log [H, Tp], row_delta [H, Tp], and for the atomic form dq_sums [H * Tp * P].
//
// Launch in this order on one stream (atomic form: 1 2 3; deterministic form: 1 4 5; 6 only where there are sinks):
// 1 attention_backward_prepare (attention_prepare.cu), row_bounds null.
// 2 attention_backward(q u16*, q_pitch i32, k u16*, k_pitch i32, v u16*, v_pitch i32, d_out u16*, d_out_pitch i32,
//     dk u16*, dk_pitch i32, dv u16*, dv_pitch i32, row_log f32*, row_delta f32*, dq_sums f32*,
//     key_begin i32*, key_end i32* [Tq], query_begin i32*, query_end i32* [Tk],
//     query_rows i32, key_rows i32, query_heads i32, key_heads i32, scale f32, softcap f32,
//     chosen u32 [Tq, chosen_words] or null, chosen_words i32: read with ATTENTION_CHOICE alone)
//   grid (K, ceil(Tk / BACKWARD_KEYS)), block BACKWARD_KEYS * 2 threads, dynamic shared memory
//   2 * (BACKWARD_KEYS * (P + Pv + BACKWARD_QUERIES) + BACKWARD_STAGES * BACKWARD_QUERIES * (P + Pv + 8)) bytes.
// 3 attention_backward_convert(dq_sums f32*, dq u16*, dq_pitch i32, query_rows i32, query_heads i32, scale f32)
//   grid (H, Tp / BACKWARD_QUERIES), block BACKWARD_KEYS * 2, no dynamic shared memory.
// 4 attention_backward_keys: parameters, grid, block and shared memory of 2; dq_sums is not touched and may be null.
// 5 attention_backward_queries(q, q_pitch, k, k_pitch, v, v_pitch, d_out, d_out_pitch, dq u16*, dq_pitch i32,
//     row_log, row_delta, key_begin, key_end, query_rows, key_rows, query_heads, key_heads, scale, softcap, chosen, chosen_words)
//   grid (H, ceil(Tq / 64)), block 128, dynamic shared memory
//   2 * (64 * (P + Pv) + BACKWARD_STAGES * BACKWARD_QUERIES * (P + Pv)) bytes.
// 6 attention_backward_sinks (attention_prepare.cu).
// dq, dk and dv are overwritten in every element. dk and dv are summed over the query heads of a group inside a block.
// Forms 1 4 5 6 give the same bits every time; form 2 adds dq by float atomics.
// Operations for each visible pair: 4 E + 2 (E + Ev) + 2 Ev with atomics, 2 (E + Ev) more without.
//
// Measured on an H200 as in attention_forward.cu, all launches of a form together; flash-attention 2 in brackets, run from PyTorch:
//   2 documents of 2048, H 32, K 8, E 128: atomic 806 us, 213 TFLOP/s; deterministic 928 us (936 to 1197 us)
//   1 document of 8192, same heads: 5393 us, 255 TFLOP/s; 6600 us (4968 us)
//   4 documents of 2048, H 32, K 8, E 64: 878 us, 196 TFLOP/s; 968 us (936 us)
//   4 documents of 512, H 9, K 3, E 64: 79 us; 72 us (58 us)
//   2 documents of 2048, H 16, E 192 and Ev 128: 923 us; 1034 us. H 8, K 4, E 256: 655 us; 735 us (581 us)

#ifndef BACKWARD_KEYS
#define BACKWARD_KEYS (WIDEST_PAD <= 128 ? 128 : 64)
#endif
#ifndef BACKWARD_QUERIES
#define BACKWARD_QUERIES 64
#endif
#ifndef BACKWARD_STAGES
#define BACKWARD_STAGES 2
#endif

constexpr int BLOCK_KEYS = BACKWARD_KEYS;
constexpr int TILE_QUERIES = BACKWARD_QUERIES;
constexpr int STAGES = BACKWARD_STAGES;
constexpr int BACKWARD_WARPS = BLOCK_KEYS / 16;
constexpr int BACKWARD_THREADS = BACKWARD_WARPS * 32;
// Sums of dk and dv for 16 keys a warp fit in registers together up to this width; wider heads sweep the queries twice.
constexpr bool ONE_SWEEP = KEY_PAD + VALUE_PAD <= 256;

// How the warps of a block share one tile of dq.
constexpr int DQ_COLUMN_WARPS = BACKWARD_WARPS == 8 ? (KEY_PAD % 64 == 0 && TILE_QUERIES == 64 ? 4 : TILE_QUERIES == 64 ? 2 : 4)
                                                    : BACKWARD_WARPS / 2;
constexpr int DQ_ROW_WARPS = BACKWARD_WARPS / DQ_COLUMN_WARPS;
constexpr int DQ_ROW_TILES = TILE_QUERIES / 16 / DQ_ROW_WARPS;
constexpr int DQ_COLUMNS = KEY_PAD / DQ_COLUMN_WARPS;
constexpr int DQ_CHUNK = DQ_COLUMNS % 32 == 0 ? 32 : 16;
static_assert(DQ_ROW_TILES * DQ_ROW_WARPS * 16 == TILE_QUERIES && DQ_COLUMNS % 16 == 0, "the warps cover a tile of dq");
constexpr int DQ_TILE = TILE_QUERIES * KEY_PAD;

constexpr int STAGE_QUERY_BYTES = TILE_QUERIES * KEY_PAD * 2;
constexpr int STAGE_BYTES = TILE_QUERIES * (KEY_PAD + VALUE_PAD + 8) * 2;

struct BackwardInputs {
    const half_bits *q, *k, *v, *d_out;
    int q_pitch, k_pitch, v_pitch, d_out_pitch;
    const float *row_log, *row_delta;
    const int *key_begin, *key_end;
    int query_rows, key_rows, padded_rows;
    float scale, softcap;
    const u32* chosen;
    int chosen_words;
};

INLINE void copy_word_async(u32 destination, const void* source, bool present) {
    int bytes = present ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(bytes) : "memory");
}

// One tile of queries with all that belongs to its rows: q, d_out, row_log, row_delta, key_begin, key_end.
template <bool NEED_D_OUT>
INLINE void fetch_queries(u32 stage, const BackwardInputs& in, int head, int first_query, int thread) {
    copy_tile_async<TILE_QUERIES, KEY_PAD, HEAD_WIDTH, BACKWARD_THREADS>(stage, in.q + head * HEAD_WIDTH, in.q_pitch, first_query,
                                                                        in.query_rows, thread);
    if (NEED_D_OUT)
        copy_tile_async<TILE_QUERIES, VALUE_PAD, VALUE_WIDTH, BACKWARD_THREADS>(
            stage + STAGE_QUERY_BYTES, in.d_out + head * VALUE_WIDTH, in.d_out_pitch, first_query, in.query_rows, thread);
    if (thread < TILE_QUERIES) {
        u32 rows = stage + TILE_QUERIES * (KEY_PAD + VALUE_PAD) * 2 + thread * 4;
        int query = first_query + thread;
        bool present = query < in.query_rows;
        long long offset = (long long)head * in.padded_rows + query;
        copy_word_async(rows, in.row_log + offset, true);
        copy_word_async(rows + TILE_QUERIES * 4, in.row_delta + offset, true);
        copy_word_async(rows + TILE_QUERIES * 8, in.key_begin + (present ? query : 0), present);
        copy_word_async(rows + TILE_QUERIES * 12, in.key_end + (present ? query : 0), present);
    }
    commit_copies();
}

template <int COLUMNS>
INLINE void clear(float (&sums)[COLUMNS][4]) {
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
}

// sums (16 x 8 COLUMNS) = rows of `left` times rows of `right`, summed over WIDTH columns of both.
template <int WIDTH, int COLUMNS>
INLINE void multiply_rows(float (&sums)[COLUMNS][4], u32 left_tile, int left_row, u32 right_tile, int lane) {
    clear(sums);
#pragma unroll
    for (int step = 0; step < WIDTH / 16; ++step) {
        u32 left[4];
        load_matrices(left, left_address<WIDTH>(left_tile, left_row, step * 2, lane));
#pragma unroll
        for (int n = 0; n < COLUMNS / 2; ++n) {
            u32 right[4];
            load_matrices(right, right_address<WIDTH>(right_tile, n * 16, step * 2, lane));
            multiply_add(sums[2 * n], left, right[0], right[1]);
            multiply_add(sums[2 * n + 1], left, right[2], right[3]);
        }
    }
}

// sums (16 x WIDTH) += left (16 x 8 COLUMNS, as a product left it) times the rows of `right`.
template <int WIDTH, int COLUMNS>
INLINE void accumulate(float (&sums)[WIDTH / 8][4], const float (&left)[COLUMNS][4], u32 right_tile, int lane) {
#pragma unroll
    for (int step = 0; step < COLUMNS / 2; ++step) {
        u32 packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            packed[i] = pack_halves(left[2 * step + i / 2][2 * (i & 1)], left[2 * step + i / 2][2 * (i & 1) + 1]);
#pragma unroll
        for (int n = 0; n < WIDTH / 16; ++n) {
            u32 right[4];
            load_matrices_transposed(right, left_address<WIDTH>(right_tile, step * 16, n * 2, lane));
            multiply_add(sums[2 * n], packed, right[0], right[1]);
            multiply_add(sums[2 * n + 1], packed, right[2], right[3]);
        }
    }
}

// A logit's exponent for exp2 and the derivative of the cap at it.
INLINE float capped_exponent(float score, const BackwardInputs& in, float& slope) {
#if ATTENTION_SOFTCAP
    float bent = tanh_accurate(score * (in.scale / in.softcap));
    slope = 1.0f - bent * bent;
    return bent * in.softcap * LOG2_E;
#else
    slope = 1.0f;
    return score * (in.scale * LOG2_E);
#endif
}

// dq of one tile of queries against the block's keys, added to the sums in the order in which lanes hold them.
INLINE void add_queries(float* dq_tile, u32 gradient_tile, u32 key_tile, int warp, int lane) {
    int row_warp = warp / DQ_COLUMN_WARPS, column_warp = warp % DQ_COLUMN_WARPS;
    float* target = dq_tile + warp * (DQ_TILE / BACKWARD_WARPS) + lane;
#pragma unroll 1
    for (int column = 0; column < DQ_COLUMNS; column += DQ_CHUNK) {
        float sums[DQ_ROW_TILES][DQ_CHUNK / 8][4];
#pragma unroll
        for (int m = 0; m < DQ_ROW_TILES; ++m) clear(sums[m]);
#pragma unroll
        for (int step = 0; step < BLOCK_KEYS / 16; ++step) {
            u32 left[DQ_ROW_TILES][4];
#pragma unroll
            for (int m = 0; m < DQ_ROW_TILES; ++m)
                load_matrices_transposed(left[m], right_address<TILE_QUERIES>(gradient_tile, step * 16,
                                                                             (row_warp * DQ_ROW_TILES + m) * 2, lane));
#pragma unroll
            for (int n = 0; n < DQ_CHUNK / 16; ++n) {
                u32 right[4];
                load_matrices_transposed(
                    right, left_address<KEY_PAD>(key_tile, step * 16, (column_warp * DQ_COLUMNS + column) / 8 + n * 2, lane));
#pragma unroll
                for (int m = 0; m < DQ_ROW_TILES; ++m) {
                    multiply_add(sums[m][2 * n], left[m], right[0], right[1]);
                    multiply_add(sums[m][2 * n + 1], left[m], right[2], right[3]);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < DQ_ROW_TILES; ++m)
#pragma unroll
            for (int n = 0; n < DQ_CHUNK / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) atomicAdd(target + ((m * (DQ_CHUNK / 8) + n) * 4 + i) * 32, sums[m][n][i]);
        target += DQ_ROW_TILES * DQ_CHUNK * 16;
    }
}

template <int WIDTH, int REAL_WIDTH>
INLINE void store_rows(half_bits* target, int pitch, const float (&sums)[WIDTH / 8][4], int first_row, int row_limit,
                                 float factor, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = first_row + half * 8 + (lane >> 2);
        if (row >= row_limit) continue;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n)
            if (n * 8 < REAL_WIDTH)
                *(u32*)(target + (long long)row * pitch + n * 8 + (lane & 3) * 2) =
                    pack_halves(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
    }
}

struct BackwardPlace {
    u32 key_tile, value_tile, gradient_tile, stages;
    const unsigned char* stage_rows;  // the f32 and i32 rows of stage 0
    unsigned char* gradients;
    int first_key, first_head, group, first_query, tiles, thread, warp, lane;
};

#if ATTENTION_SOFTCAP
typedef float Slopes[TILE_QUERIES / 8][4];
#else
struct Slopes {};
#endif

// Scores become probabilities; row_log begins the tile's rows: logarithm, delta, begin and end.
INLINE void tile_probabilities(float (&scores)[TILE_QUERIES / 8][4], Slopes& slopes, const float* row_log,
                                         const BackwardInputs& in, int first_query, int key, bool masked, int lane) {
    const int* begin = (const int*)(row_log + 2 * TILE_QUERIES);
    const int* end = begin + TILE_QUERIES;
#pragma unroll
    for (int n = 0; n < TILE_QUERIES / 8; ++n) {
        int column = n * 8 + (lane & 3) * 2;
        float2 log = *(const float2*)(row_log + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float slope;
            float exponent = capped_exponent(scores[n][i], in, slope);
#if ATTENTION_SOFTCAP
            slopes[n][i] = slope;
#endif
            scores[n][i] = exp2_fast(exponent - (i & 1 ? log.y : log.x));
        }
#if ATTENTION_CHOICE
        // The thread's two keys are of one run of 16, hence of one word.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int query = first_query + column + (i & 1);
            bool present = query < in.query_rows && key / 32 < in.chosen_words;
            u32 word = present ? in.chosen[(long long)query * in.chosen_words + key / 32] : 0;
            if (!(word >> (key % 32 + (i >> 1) * 8) & 1)) scores[n][i] = 0.0f;
        }
#endif
        if (!masked) continue;
        int2 from = *(const int2*)(begin + column);
        int2 until = *(const int2*)(end + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int row = key + (i >> 1) * 8;
            if (row < (i & 1 ? from.y : from.x) || row >= (i & 1 ? until.y : until.x)) scores[n][i] = 0.0f;
        }
    }
}

// One pass over all queries that see the block's keys, for every head of the group.
template <bool WITH_VALUES, bool WITH_KEYS, bool WITH_QUERIES>
INLINE void sweep(float (&dk)[KEY_PAD / 8][4], float (&dv)[VALUE_PAD / 8][4], float* dq_sums, const BackwardInputs& in,
                            const BackwardPlace& at) {
    int lane = at.lane;
    int iterations = at.tiles * at.group;
    if (iterations > 0) fetch_queries<true>(at.stages, in, at.first_head, at.first_query, at.thread);
    int head = at.first_head, tile = 0;
    for (int iteration = 0; iteration < iterations; ++iteration) {
        int slot = STAGES == 2 ? iteration & 1 : 0;
        u32 query_tile = at.stages + slot * STAGE_BYTES;
        u32 d_out_tile = query_tile + STAGE_QUERY_BYTES;
        int first_query = at.first_query + tile * TILE_QUERIES;
        int this_head = head;
        if (++tile == at.tiles) tile = 0, ++head;
        wait_for_copies<0>();
        __syncthreads();
        if (STAGES == 2 && iteration + 1 < iterations)
            fetch_queries<true>(at.stages + (slot ^ 1) * STAGE_BYTES, in, head, at.first_query + tile * TILE_QUERIES, at.thread);

        const float* row_log = (const float*)(at.stage_rows + slot * STAGE_BYTES);
        const float* row_delta = row_log + TILE_QUERIES;
        const int* begin = (const int*)(row_log + 2 * TILE_QUERIES);
        const int* end = begin + TILE_QUERIES;
        bool masked = begin[TILE_QUERIES - 1] > at.first_key || end[0] < at.first_key + BLOCK_KEYS ||
                      first_query + TILE_QUERIES > in.query_rows;

        float scores[TILE_QUERIES / 8][4];
        Slopes slopes;
        multiply_rows<KEY_PAD>(scores, at.key_tile, at.warp * 16, query_tile, lane);
        tile_probabilities(scores, slopes, row_log, in, first_query, at.first_key + at.warp * 16 + (lane >> 2), masked, lane);
        if (WITH_VALUES) accumulate<VALUE_PAD>(dv, scores, d_out_tile, lane);
        if (WITH_KEYS) {
            float gradients[TILE_QUERIES / 8][4];
            multiply_rows<VALUE_PAD>(gradients, at.value_tile, at.warp * 16, d_out_tile, lane);
#pragma unroll
            for (int n = 0; n < TILE_QUERIES / 8; ++n) {
                float2 delta = *(const float2*)(row_delta + n * 8 + (lane & 3) * 2);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    gradients[n][i] = scores[n][i] * (gradients[n][i] - (i & 1 ? delta.y : delta.x));
#if ATTENTION_SOFTCAP
                    gradients[n][i] *= slopes[n][i];
#endif
                }
            }
            if (WITH_QUERIES) {
#pragma unroll
                for (int n = 0; n < TILE_QUERIES / 8; ++n)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        *(u32*)(at.gradients + tile_offset<TILE_QUERIES>(at.warp * 16 + half * 8 + (lane >> 2), n) + (lane & 3) * 4) =
                            pack_halves(gradients[n][2 * half], gradients[n][2 * half + 1]);
            }
            accumulate<KEY_PAD>(dk, gradients, query_tile, lane);
            if (WITH_QUERIES) {
                __syncthreads();
                long long tile_index = (long long)this_head * (in.padded_rows / TILE_QUERIES) + first_query / TILE_QUERIES;
                add_queries(dq_sums + tile_index * DQ_TILE, at.gradient_tile, at.key_tile, at.warp, lane);
            }
        }
        if (STAGES == 1) {
            __syncthreads();
            if (iteration + 1 < iterations)
                fetch_queries<true>(at.stages, in, head, at.first_query + tile * TILE_QUERIES, at.thread);
        }
    }
    __syncthreads();
}

template <bool WITH_QUERIES>
INLINE void backward_block(BackwardInputs in, half_bits* dk, int dk_pitch, half_bits* dv, int dv_pitch, float* dq_sums,
                                     const int* query_begin, const int* query_end, int query_heads, int key_heads) {
    BackwardPlace at;
    at.key_tile = shared_address(dynamic_shared);
    at.value_tile = at.key_tile + BLOCK_KEYS * KEY_PAD * 2;
    at.stages = at.value_tile + BLOCK_KEYS * VALUE_PAD * 2;
    at.gradient_tile = at.stages + STAGES * STAGE_BYTES;
    at.gradients = dynamic_shared + (at.gradient_tile - at.key_tile);
    at.stage_rows = dynamic_shared + (at.stages - at.key_tile) + TILE_QUERIES * (KEY_PAD + VALUE_PAD) * 2;
    at.thread = threadIdx.x, at.warp = at.thread / 32, at.lane = at.thread % 32;
    int key_head = blockIdx.x;
    at.group = query_heads / key_heads;
    at.first_head = key_head * at.group;
    // Under a causal mask the first keys are seen by the most queries, so the longest blocks start first.
    at.first_key = blockIdx.y * BLOCK_KEYS;
    int last_key = min(at.first_key + BLOCK_KEYS, in.key_rows) - 1;
    int last_query = min(query_end[last_key], in.query_rows);
    at.first_query = query_begin[at.first_key] / TILE_QUERIES * TILE_QUERIES;
    at.tiles = last_query > at.first_query ? (last_query - at.first_query + TILE_QUERIES - 1) / TILE_QUERIES : 0;

    copy_tile_async<BLOCK_KEYS, KEY_PAD, HEAD_WIDTH, BACKWARD_THREADS>(at.key_tile, in.k + key_head * HEAD_WIDTH, in.k_pitch,
                                                                      at.first_key, in.key_rows, at.thread);
    copy_tile_async<BLOCK_KEYS, VALUE_PAD, VALUE_WIDTH, BACKWARD_THREADS>(at.value_tile, in.v + key_head * VALUE_WIDTH, in.v_pitch,
                                                                         at.first_key, in.key_rows, at.thread);
    commit_copies();
    int first_row = at.first_key + at.warp * 16;
    dk += key_head * HEAD_WIDTH;
    dv += key_head * VALUE_WIDTH;
    float key_sums[KEY_PAD / 8][4], value_sums[VALUE_PAD / 8][4];
    clear(key_sums);
    clear(value_sums);
    if (ONE_SWEEP) {
        sweep<true, true, WITH_QUERIES>(key_sums, value_sums, dq_sums, in, at);
    } else {
        sweep<true, false, false>(key_sums, value_sums, dq_sums, in, at);
    }
    store_rows<VALUE_PAD, VALUE_WIDTH>(dv, dv_pitch, value_sums, first_row, in.key_rows, 1.0f, at.lane);
    if (!ONE_SWEEP) sweep<false, true, WITH_QUERIES>(key_sums, value_sums, dq_sums, in, at);
    store_rows<KEY_PAD, HEAD_WIDTH>(dk, dk_pitch, key_sums, first_row, in.key_rows, in.scale, at.lane);
    wait_for_copies<0>();
}

#define BACKWARD_PARAMETERS                                                                                               \
    const half_bits *__restrict__ q, int q_pitch, const half_bits *__restrict__ k, int k_pitch,                           \
        const half_bits *__restrict__ v, int v_pitch, const half_bits *__restrict__ d_out, int d_out_pitch,               \
        half_bits *__restrict__ dk, int dk_pitch, half_bits *__restrict__ dv, int dv_pitch,                               \
        const float *__restrict__ row_log, const float *__restrict__ row_delta, float *__restrict__ dq_sums,              \
        const int *__restrict__ key_begin, const int *__restrict__ key_end, const int *__restrict__ query_begin,          \
        const int *__restrict__ query_end, int query_rows, int key_rows, int query_heads, int key_heads, float scale,     \
        float softcap, const u32 *__restrict__ chosen, int chosen_words
#define BACKWARD_INPUTS                                                                                                   \
    { q, k, v, d_out, q_pitch, k_pitch, v_pitch, d_out_pitch, row_log, row_delta, key_begin, key_end, query_rows,         \
      key_rows, (query_rows + 127) / 128 * 128, scale, softcap, chosen, chosen_words }

extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, 1) attention_backward(BACKWARD_PARAMETERS) {
    backward_block<true>(BACKWARD_INPUTS, dk, dk_pitch, dv, dv_pitch, dq_sums, query_begin, query_end, query_heads, key_heads);
}

extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, 1) attention_backward_keys(BACKWARD_PARAMETERS) {
    backward_block<false>(BACKWARD_INPUTS, dk, dk_pitch, dv, dv_pitch, dq_sums, query_begin, query_end, query_heads, key_heads);
}

extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS) attention_backward_convert(
    const float* __restrict__ dq_sums, half_bits* __restrict__ dq, int dq_pitch, int query_rows, int query_heads, float scale) {
    int head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* source = dq_sums + ((long long)head * gridDim.y + blockIdx.y) * DQ_TILE + warp * (DQ_TILE / BACKWARD_WARPS) + lane;
    int row_warp = warp / DQ_COLUMN_WARPS, column_warp = warp % DQ_COLUMN_WARPS;
    dq += head * HEAD_WIDTH;
#pragma unroll 1
    for (int column = 0; column < DQ_COLUMNS; column += DQ_CHUNK) {
#pragma unroll
        for (int m = 0; m < DQ_ROW_TILES; ++m)
#pragma unroll
            for (int n = 0; n < DQ_CHUNK / 8; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float* pair = source + ((m * (DQ_CHUNK / 8) + n) * 4 + half * 2) * 32;
                    int row = blockIdx.y * TILE_QUERIES + (row_warp * DQ_ROW_TILES + m) * 16 + half * 8 + (lane >> 2);
                    int target = column_warp * DQ_COLUMNS + column + n * 8 + (lane & 3) * 2;
                    if (row < query_rows && target < HEAD_WIDTH)
                        *(u32*)(dq + (long long)row * dq_pitch + target) = pack_halves(pair[0] * scale, pair[32] * scale);
                }
        source += DQ_ROW_TILES * DQ_CHUNK * 16;
    }
}

constexpr int QUERY_PASS_ROWS = 64;
constexpr int QUERY_PASS_THREADS = 128;

extern "C" __global__ void __launch_bounds__(QUERY_PASS_THREADS) attention_backward_queries(
    const half_bits* __restrict__ q, int q_pitch, const half_bits* __restrict__ k, int k_pitch, const half_bits* __restrict__ v,
    int v_pitch, const half_bits* __restrict__ d_out, int d_out_pitch, half_bits* __restrict__ dq, int dq_pitch,
    const float* __restrict__ row_log, const float* __restrict__ row_delta, const int* __restrict__ key_begin,
    const int* __restrict__ key_end, int query_rows, int key_rows, int query_heads, int key_heads, float scale, float softcap,
    const u32* __restrict__ chosen, int chosen_words) {
    constexpr int TILE_KEYS = BACKWARD_QUERIES;
    constexpr int KEY_STAGE_BYTES = TILE_KEYS * (KEY_PAD + VALUE_PAD) * 2;
    BackwardInputs in = BACKWARD_INPUTS;
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    int head = blockIdx.x, key_head = head / (query_heads / key_heads);
    int first_query = (int)(gridDim.y - 1 - blockIdx.y) * QUERY_PASS_ROWS;
    u32 query_tile = shared_address(dynamic_shared);
    u32 d_out_tile = query_tile + QUERY_PASS_ROWS * KEY_PAD * 2;
    u32 stages = d_out_tile + QUERY_PASS_ROWS * VALUE_PAD * 2;
    k += key_head * HEAD_WIDTH;
    v += key_head * VALUE_WIDTH;
    VisibleRange range = visible_range(key_begin, key_end, first_query, QUERY_PASS_ROWS, query_rows);
    int key_limit = min(range.last, key_rows);
    copy_tile_async<QUERY_PASS_ROWS, KEY_PAD, HEAD_WIDTH, QUERY_PASS_THREADS>(query_tile, q + head * HEAD_WIDTH, q_pitch,
                                                                             first_query, query_rows, thread);
    copy_tile_async<QUERY_PASS_ROWS, VALUE_PAD, VALUE_WIDTH, QUERY_PASS_THREADS>(d_out_tile, d_out + head * VALUE_WIDTH,
                                                                                d_out_pitch, first_query, query_rows, thread);
    auto fetch = [&](int slot, int first_key) {
        u32 stage = stages + slot * KEY_STAGE_BYTES;
        copy_tile_async<TILE_KEYS, KEY_PAD, HEAD_WIDTH, QUERY_PASS_THREADS>(stage, k, k_pitch, first_key, key_limit, thread);
        copy_tile_async<TILE_KEYS, VALUE_PAD, VALUE_WIDTH, QUERY_PASS_THREADS>(stage + TILE_KEYS * KEY_PAD * 2, v, v_pitch,
                                                                              first_key, key_limit, thread);
        commit_copies();
    };
    if (range.first < key_limit) fetch(0, range.first);

    float log[2], delta[2];
    int begin[2], end[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int query = first_query + warp * 16 + half * 8 + (lane >> 2);
        log[half] = row_log[(long long)head * in.padded_rows + query];
        delta[half] = row_delta[(long long)head * in.padded_rows + query];
        begin[half] = query < query_rows ? key_begin[query] : 0;
        end[half] = query < query_rows ? key_end[query] : 0;
    }
    float sums[KEY_PAD / 8][4];
    clear(sums);
    int slot = 0;
    for (int first_key = range.first; first_key < key_limit; first_key += TILE_KEYS) {
        u32 key_tile = stages + slot * KEY_STAGE_BYTES;
        u32 value_tile = key_tile + TILE_KEYS * KEY_PAD * 2;
        wait_for_copies<0>();
        __syncthreads();
        if (STAGES == 2 && first_key + TILE_KEYS < key_limit) fetch(slot ^ 1, first_key + TILE_KEYS);
        bool masked = first_key < range.all_first || first_key + TILE_KEYS > range.all_last;
        float scores[TILE_KEYS / 8][4], gradients[TILE_KEYS / 8][4];
        multiply_rows<KEY_PAD>(scores, query_tile, warp * 16, key_tile, lane);
        multiply_rows<VALUE_PAD>(gradients, d_out_tile, warp * 16, value_tile, lane);
#if ATTENTION_CHOICE
        u64 bits[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
            bits[half] = chosen_keys(
                chosen, chosen_words, first_query + warp * 16 + half * 8 + (lane >> 2), query_rows, first_key);
#endif
#pragma unroll
        for (int n = 0; n < TILE_KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int key = first_key + n * 8 + (lane & 3) * 2 + (i & 1);
                float slope;
                float exponent = capped_exponent(scores[n][i], in, slope);
                float probability = exp2_fast(exponent - log[i >> 1]);
                if (masked && (key < begin[i >> 1] || key >= end[i >> 1])) probability = 0.0f;
#if ATTENTION_CHOICE
                if (!(bits[i >> 1] >> (key - first_key) & 1)) probability = 0.0f;
#endif
                gradients[n][i] = probability * (gradients[n][i] - delta[i >> 1]) * slope;
            }
        accumulate<KEY_PAD>(sums, gradients, key_tile, lane);
        if (STAGES == 1) {
            __syncthreads();
            if (first_key + TILE_KEYS < key_limit) fetch(0, first_key + TILE_KEYS);
        } else {
            slot ^= 1;
        }
    }
    wait_for_copies<0>();
    store_rows<KEY_PAD, HEAD_WIDTH>(dq + head * HEAD_WIDTH, dq_pitch, sums, first_query + warp * 16, query_rows, scale, lane);
}
