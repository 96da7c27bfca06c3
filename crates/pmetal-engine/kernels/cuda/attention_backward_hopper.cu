// Attention backward for compute capability 9.0 (architecture sm_90a): wgmma, tensor copies, one warpgroup that fetches and two that
// compute, each 64 keys of a block of 128, or one of a block of 64. Needs attention_common.cuh, attention_hopper.cuh and
// attention_prepare.cu in front.
//
// Option (-D) BACKWARD_CLUSTER (default 1), a divisor of H / K up to 8, 1 where E or Ev is above 128: so many blocks share the query heads
// of a group and add up dk and dv through each other's shared memory. It pays where K * ceil(Tk / 128) blocks leave half of the card idle.
// Option BACKWARD_CONSUMERS (default 2): 1, for Ne == 1 && Nv == 1 alone, makes blocks of 64 keys, of which a multiprocessor holds two. It
// pays where the longest block takes longer than its share of the whole.
// Tp = ceil(Tq / 128) * 128; pieces Ne = ceil(E / 64), Nv = ceil(Ev / 64); BACKWARD_QUERIES = Ne == 1 && Nv == 1 && BACKWARD_CONSUMERS == 2 ?
// 128 : 64; KEYS = 64 * BACKWARD_CONSUMERS;
// STAGES = Ne + Nv <= 6 ? 2 : 1; SWEEPS = Ne <= 2 && Nv <= 2 ? 1 : 2.
// Workspace: row_log f32 [H, Tp], row_delta f32 [H, Tp], row_bounds i32 [2, Tp], each aligned to 16 bytes; for the atomic form
// dq_sums f32 [H * Tp * Ne * 64], aligned to 16 bytes.
//
// Launch in this order on one stream (atomic form: 1 2 3; deterministic form: 1 4 and entry 5 of attention_backward.cu; where
// there are sinks also attention_backward_sinks):
// 1 attention_backward_prepare (attention_prepare.cu), compiled with this text: it sizes dq_sums by Ne * 64.
// 2 attention_backward_hopper(q_map, k_map, v_map, d_out_map: tensor maps by value (see attention_hopper.cuh) over
//     [rows, heads, width]; box rows BACKWARD_QUERIES for q and d_out, KEYS for k and v; then dk u16*, dk_pitch i32, dv u16*,
//     dv_pitch i32, row_log f32*, row_delta f32*, row_bounds i32*, dq_sums f32*, query_begin i32*, query_end i32* [Tk],
//     query_rows i32, key_rows i32, query_heads i32, key_heads i32, scale f32, softcap f32)
//   grid (K * BACKWARD_CLUSTER, ceil(Tk / KEYS), SWEEPS), block 128 + 2 * KEYS, dynamic shared memory
//   (Ne + Nv) * (128 * KEYS + STAGES * 128 * BACKWARD_QUERIES) + (4 * KEYS + 16 * STAGES) * BACKWARD_QUERIES + 1024 bytes.
// 3 attention_backward_hopper_convert(dq_sums f32*, dq u16*, dq_pitch i32, query_rows i32, query_heads i32, scale f32)
//   grid (H, Tp / 64, Ne), block 128, no dynamic shared memory.
// 4 attention_backward_hopper_keys: parameters, grid, block and shared memory of 2; dq_sums is not touched and may be null.
// Rows of k and v up to key_rows must hold finite numbers. Otherwise as attention_backward.
//
// Measured on an H200 as in attention_forward_hopper.cu, all launches of the atomic form together;
// after the semicolon the deterministic form, in brackets cuDNN:
//   2 documents of 2048, H 32, K 8, E 128: 401 us, 428 TFLOP/s; 695 us (598 us)
//   1 document of 8192, same heads: 2921 us, 470 TFLOP/s; 4867 us (2843 us)
//   9 documents of 60 to 1500, same heads, T 8209: 702 us, 297 TFLOP/s; 974 us
//   4 documents of 2048, H 32, K 8, E 64: 453 us, 379 TFLOP/s; 669 us (565 us)
//   4 documents of 512, H 9, K 3, E 64: 31 us with BACKWARD_CLUSTER 3, 43 us without, 3 us less with BACKWARD_CONSUMERS 1; 42 us (36 us)
//   16 documents of 512, H 32, K 8, E 128: 416 us; 462 us (434 us); clusters of 2 or 4 are slower from here on
//   2 documents of 2048, H 16, E 192 and Ev 128: 350 us, 319 TFLOP/s; 623 us (356 us)
//   2 documents of 2048, H 8, K 4, E 256: 360 us, 239 TFLOP/s; 497 us (337 us)

#ifndef BACKWARD_CLUSTER
#define BACKWARD_CLUSTER 1
#endif

#ifndef BACKWARD_CONSUMERS
#define BACKWARD_CONSUMERS 2
#endif
constexpr int CONSUMERS = BACKWARD_CONSUMERS;

// Sums of dk and dv for 64 keys a warpgroup fit in registers together up to 128 columns each; for wider heads one block takes dk and
// dq, another dv.
constexpr bool ONE_SWEEP = KEY_PIECES <= 2 && VALUE_PIECES <= 2;
constexpr int STAGES = KEY_PIECES + VALUE_PIECES <= 6 ? 2 : 1;
static_assert(ONE_SWEEP || BACKWARD_CLUSTER == 1, "only blocks that hold both sums share a group");

constexpr int BLOCK_KEYS = 64 * CONSUMERS;
constexpr int TILE_QUERIES = KEY_PIECES == 1 && VALUE_PIECES == 1 && CONSUMERS == 2 ? 128 : 64;
constexpr int BACKWARD_THREADS = 128 * (CONSUMERS + 1);
static_assert(CONSUMERS == 2 || (KEY_PIECES == 1 && VALUE_PIECES == 1), "one warpgroup has the narrowest heads alone");
constexpr int KEY_PIECE_BYTES = BLOCK_KEYS * 128;
constexpr int QUERY_PIECE_BYTES = TILE_QUERIES * 128;
constexpr int STAGE_BYTES = (KEY_PIECES + VALUE_PIECES) * QUERY_PIECE_BYTES;
constexpr int ROW_BYTES = TILE_QUERIES * 4;
constexpr int GRADIENT_BYTES = TILE_QUERIES / 64 * KEY_PIECE_BYTES;

constexpr int VALUES_AT = KEY_PIECES * KEY_PIECE_BYTES;
constexpr int STAGES_AT = VALUES_AT + VALUE_PIECES * KEY_PIECE_BYTES;
constexpr int GRADIENTS_AT = STAGES_AT + STAGES * STAGE_BYTES;
constexpr int ROWS_AT = GRADIENTS_AT + 2 * GRADIENT_BYTES;
constexpr int CONTROL_AT = ROWS_AT + STAGES * 4 * ROW_BYTES;
// Barriers, by their place after CONTROL_AT in units of 8 bytes; rings have two slots. The rows' numbers come with the queries.
constexpr int KEYS_FULL = 0, QUERY_FULL = 1, QUERY_EMPTY = 3, OUT_FULL = 5, OUT_EMPTY = 7;

// dq of a tile of queries falls into units of 64 x 64, shared by the warpgroups.
constexpr int DQ_UNITS = TILE_QUERIES / 64 * KEY_PIECES;
constexpr int UNITS_EACH = (DQ_UNITS + CONSUMERS - 1) / CONSUMERS;
constexpr int SCORES = TILE_QUERIES / 2;
constexpr int STEPS = TILE_QUERIES / 16;
// A tile of 128 queries leaves no registers for starting dv before the gradients of the scores are known.
constexpr bool EARLY_VALUES = TILE_QUERIES == 64;

struct BackwardRange {
    int first_key, key_head, first_head, first_query, tiles, iterations;
};

INLINE BackwardRange backward_range(const int* query_begin, const int* query_end, int query_rows, int key_rows, int query_heads,
                                              int key_heads) {
    BackwardRange range;
    int heads = query_heads / key_heads / BACKWARD_CLUSTER;
    range.key_head = blockIdx.x / BACKWARD_CLUSTER;
    range.first_head = blockIdx.x * heads;
    // Under a causal mask the first keys are seen by the most queries, so the longest blocks start first.
    range.first_key = blockIdx.y * BLOCK_KEYS;
    int last_query = min(query_end[min(range.first_key + BLOCK_KEYS, key_rows) - 1], query_rows);
    range.first_query = query_begin[range.first_key] / TILE_QUERIES * TILE_QUERIES;
    range.tiles = last_query > range.first_query ? (last_query - range.first_query + TILE_QUERIES - 1) / TILE_QUERIES : 0;
    range.iterations = range.tiles * heads;
    return range;
}

INLINE void advance_stage(RingPlace& place) {
    if (STAGES == 2)
        place.advance();
    else
        place.parity ^= 1;
}

// One thread: brings in the block's keys and values and, as places become free, the tiles of queries with what belongs to their rows.
INLINE void backward_fetch(const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map, const TensorMap& d_out_map,
                                     u32 base, const float* row_log, const float* row_delta, const int* row_bounds, int padded_rows,
                                     const BackwardRange& range) {
    u32 barriers = base + CONTROL_AT;
    barrier_expect_bytes(barriers + KEYS_FULL * 8, STAGES_AT);
#pragma unroll 1
    for (int piece = 0; piece < KEY_PIECES; ++piece)
        copy_box(base + piece * KEY_PIECE_BYTES, k_map, barriers + KEYS_FULL * 8, piece * 64, range.key_head, range.first_key);
#pragma unroll 1
    for (int piece = 0; piece < VALUE_PIECES; ++piece)
        copy_box(base + VALUES_AT + piece * KEY_PIECE_BYTES, v_map, barriers + KEYS_FULL * 8, piece * 64, range.key_head, range.first_key);
    RingPlace place = {0, 0};
    int head = range.first_head, tile = 0;
#pragma unroll 1
    for (int iteration = 0; iteration < range.iterations; ++iteration) {
        int query = range.first_query + tile * TILE_QUERIES;
        u32 stage = base + STAGES_AT + place.slot * STAGE_BYTES;
        u32 rows = base + ROWS_AT + place.slot * 4 * ROW_BYTES;
        u32 full = barriers + (QUERY_FULL + place.slot) * 8;
        barrier_wait(barriers + (QUERY_EMPTY + place.slot) * 8, place.parity ^ 1);
        barrier_expect_bytes(full, KEY_PIECES * QUERY_PIECE_BYTES + 4 * ROW_BYTES);
#pragma unroll 1
        for (int piece = 0; piece < KEY_PIECES; ++piece) copy_box(stage + piece * QUERY_PIECE_BYTES, q_map, full, piece * 64, head, query);
        long long row = (long long)head * padded_rows + query;
        copy_bytes(rows, row_log + row, ROW_BYTES, full);
        copy_bytes(rows + ROW_BYTES, row_delta + row, ROW_BYTES, full);
        copy_bytes(rows + 2 * ROW_BYTES, row_bounds + query, ROW_BYTES, full);
        copy_bytes(rows + 3 * ROW_BYTES, row_bounds + padded_rows + query, ROW_BYTES, full);
        stage += KEY_PIECES * QUERY_PIECE_BYTES;
        full = barriers + (OUT_FULL + place.slot) * 8;
        barrier_wait(barriers + (OUT_EMPTY + place.slot) * 8, place.parity ^ 1);
        barrier_expect_bytes(full, VALUE_PIECES * QUERY_PIECE_BYTES);
#pragma unroll 1
        for (int piece = 0; piece < VALUE_PIECES; ++piece)
            copy_box(stage + piece * QUERY_PIECE_BYTES, d_out_map, full, piece * 64, head, query);
        advance_stage(place);
        if (++tile == range.tiles) tile = 0, ++head;
    }
}

// sums (64 keys x queries) = rows of `left` times rows of `right`.
template <int PIECES>
INLINE void issue_rows(float (&sums)[SCORES], u32 left, u32 right) {
#pragma unroll
    for (int step = 0; step < PIECES * 4; ++step)
        wgmma_shared<0, 0>(sums, operand(left + step / 4 * KEY_PIECE_BYTES + step % 4 * 32, 16),
                           operand(right + step / 4 * QUERY_PIECE_BYTES + step % 4 * 32, 16), step > 0);
    wgmma_commit();
}

// sums (64 keys x width) += weights (64 keys x queries) times `right`.
template <int WIDTH>
INLINE void issue_sums(float (&sums)[WIDTH / 2], const u32 (&weights)[STEPS][4], u32 right) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        wgmma_registers<1>(sums, weights[step], operand(right + step * 2048, QUERY_PIECE_BYTES), 1);
    wgmma_commit();
}

INLINE void issue_queries(float (&sums)[32], u32 gradients, u32 keys) {
#pragma unroll
    for (int step = 0; step < BLOCK_KEYS / 16; ++step)
        wgmma_shared<1, 1>(sums, operand(gradients + step * 2048, 16), operand(keys + step * 2048, 16), step > 0);
    wgmma_commit();
}

INLINE void pack_weights(u32 (&weights)[STEPS][4], const float (&values)[SCORES]) {
#pragma unroll
    for (int i = 0; i < SCORES / 2; ++i) weights[i / 4][i % 4] = pack_halves(values[2 * i], values[2 * i + 1]);
}

#if ATTENTION_SOFTCAP
typedef float Slopes[SCORES];
#else
struct Slopes {};
#endif

// Scores become probabilities; `rows` holds log, delta, begin and end of the tile's queries.
INLINE void probabilities(float (&scores)[SCORES], Slopes& slopes, const unsigned char* rows, int first_key, int lane_key,
                                    bool ragged, float scale, float softcap, int lane) {
    const float* log = (const float*)rows;
    const int* begin = (const int*)(rows + 2 * ROW_BYTES);
    const int* end = (const int*)(rows + 3 * ROW_BYTES);
    bool masked = ragged || begin[TILE_QUERIES - 1] > first_key || end[0] < first_key + BLOCK_KEYS;
#if ATTENTION_SOFTCAP
    float inside = scale / softcap;
#endif
#pragma unroll
    for (int n = 0; n < TILE_QUERIES / 8; ++n) {
        int column = n * 8 + (lane & 3) * 2;
        float2 pair = *(const float2*)(log + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#if ATTENTION_SOFTCAP
            float bent = tanh_accurate(scores[4 * n + i] * inside);
            slopes[4 * n + i] = 1.0f - bent * bent;
            float exponent = bent * (softcap * LOG2_E);
#else
            float exponent = scores[4 * n + i] * (scale * LOG2_E);
#endif
            scores[4 * n + i] = exp2_fast(exponent - (i & 1 ? pair.y : pair.x));
        }
    }
    if (!masked) return;
#pragma unroll
    for (int n = 0; n < TILE_QUERIES / 8; ++n) {
        int column = n * 8 + (lane & 3) * 2;
        int2 from = *(const int2*)(begin + column);
        int2 until = *(const int2*)(end + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int key = lane_key + (i >> 1) * 8;
            if (key < (i & 1 ? from.y : from.x) || key >= (i & 1 ? until.y : until.x)) scores[4 * n + i] = 0.0f;
        }
    }
}

INLINE void add_to_sums(float* target, const float (&sums)[32]) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target + i * 512), "f"(sums[4 * i]), "f"(sums[4 * i + 1]),
                     "f"(sums[4 * i + 2]), "f"(sums[4 * i + 3])
                     : "memory");
}

// Brings one warp's 16 rows of dk or dv through shared memory so that stores are 16 bytes wide.
template <int PIECES, int REAL_WIDTH>
INLINE void store_keys(const float (&sums)[PIECES * 32], unsigned char* tile, half_bits* target, int pitch, int first_row,
                                 int row_limit, float factor, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = half * 8 + (lane >> 2);
#pragma unroll
        for (int n = 0; n < PIECES * 8; ++n)
            *(u32*)(tile + n / 8 * KEY_PIECE_BYTES + row * 128 + (((n % 8) ^ (row & 7)) << 4) + (lane & 3) * 4) =
                pack_halves(sums[4 * n + 2 * half] * factor, sums[4 * n + 2 * half + 1] * factor);
    }
    __syncwarp();
    constexpr int CHUNKS = PIECES * 8;
#pragma unroll
    for (int start = 0; start < 16 * CHUNKS; start += 32) {
        int row = (start + lane) / CHUNKS;
        int chunk = (start + lane) % CHUNKS;
        if (chunk * 8 < REAL_WIDTH && first_row + row < row_limit)
            *(uint4*)(target + (long long)(first_row + row) * pitch + chunk * 8) =
                *(const uint4*)(tile + chunk / 8 * KEY_PIECE_BYTES + row * 128 + (((chunk % 8) ^ (row & 7)) << 4));
    }
}

constexpr int SUM_WIDTH = (KEY_PIECES + VALUE_PIECES) * 64;
constexpr int SUM_PITCH = SUM_WIDTH + 8;
static_assert(BACKWARD_CLUSTER == 1 || BLOCK_KEYS * SUM_PITCH * 4 <= ROWS_AT, "the sums of a block fit where its tiles were");

template <int COUNT>
INLINE void leave_sums(const float (&sums)[COUNT], int column, int lane_row, int lane) {
#pragma unroll
    for (int n = 0; n < COUNT / 4; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            *(float2*)(dynamic_shared + ((lane_row + half * 8) * SUM_PITCH + column + n * 8 + (lane & 3) * 2) * 4) =
                make_float2(sums[4 * n + 2 * half], sums[4 * n + 2 * half + 1]);
}

INLINE float4 load_from_block(u32 address, int rank) {
    float4 value;
    asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}\n"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(address), "r"(rank)
                 : "memory");
    return value;
}

// The blocks of a cluster have left their sums in shared memory; each adds up and stores its share, in the order of the heads.
INLINE void store_cluster_sums(u32 base, half_bits* dk, int dk_pitch, half_bits* dv, int dv_pitch, int first_key, int key_rows,
                                         float scale) {
    int rank = blockIdx.x % BACKWARD_CLUSTER;
    constexpr int THREADS = 128 * CONSUMERS;
    for (int index = rank * THREADS + threadIdx.x - 128; index < BLOCK_KEYS * SUM_WIDTH / 8; index += BACKWARD_CLUSTER * THREADS) {
        int row = index / (SUM_WIDTH / 8), column = index % (SUM_WIDTH / 8) * 8;
        u32 address = base + (row * SUM_PITCH + column) * 4;
        float4 low = make_float4(0.0f, 0.0f, 0.0f, 0.0f), high = low;
#pragma unroll
        for (int block = 0; block < BACKWARD_CLUSTER; ++block) {
            float4 a = load_from_block(address, block), b = load_from_block(address + 16, block);
            low.x += a.x, low.y += a.y, low.z += a.z, low.w += a.w;
            high.x += b.x, high.y += b.y, high.z += b.z, high.w += b.w;
        }
        bool is_key = column < KEY_PIECES * 64;
        if (!is_key) column -= KEY_PIECES * 64;
        if (first_key + row >= key_rows || column >= (is_key ? HEAD_WIDTH : VALUE_WIDTH)) continue;
        float factor = is_key ? scale : 1.0f;
        half_bits* target = (is_key ? dk + (long long)(first_key + row) * dk_pitch : dv + (long long)(first_key + row) * dv_pitch) + column;
        *(uint4*)target = make_uint4(pack_halves(low.x * factor, low.y * factor), pack_halves(low.z * factor, low.w * factor),
                                     pack_halves(high.x * factor, high.y * factor), pack_halves(high.z * factor, high.w * factor));
    }
}

// What a computing warpgroup knows about itself and where it stands.
struct BackwardPlace {
    u32 base, barriers;
    int consumer, lane, lane_row, first_key;
    float scale, softcap;
    RingPlace stage;
    int buffer;  // of the two for gradients of scores

    INLINE void wait(int barrier) const { barrier_wait(barriers + (barrier + stage.slot) * 8, stage.parity); }
    INLINE void release(int barrier) const {
        if (lane == 0) barrier_arrive(barriers + (barrier + stage.slot) * 8);
    }
};

// Gradients of scores = probabilities * (their gradients - the row's delta).
INLINE void score_gradients(float (&gradients)[SCORES], const float (&scores)[SCORES], const Slopes& slopes,
                                      const unsigned char* rows, int lane) {
#pragma unroll
    for (int n = 0; n < TILE_QUERIES / 8; ++n) {
        float2 delta = *(const float2*)(rows + ROW_BYTES + (n * 8 + (lane & 3) * 2) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            gradients[4 * n + i] = scores[4 * n + i] * (gradients[4 * n + i] - (i & 1 ? delta.y : delta.x));
#if ATTENTION_SOFTCAP
            gradients[4 * n + i] *= slopes[4 * n + i];
#endif
        }
    }
}

// Puts the gradients of scores, key by key, where both warpgroups' products for dq read them. Two buffers make one barrier a tile
// enough: whoever writes here again has passed the barrier of the tile between.
INLINE void share_gradients(const u32 (&packed)[STEPS][4], const BackwardPlace& at) {
    int offset = GRADIENTS_AT + at.buffer * GRADIENT_BYTES;
#pragma unroll
    for (int n = 0; n < TILE_QUERIES / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            *(u32*)(dynamic_shared + offset + n / 8 * KEY_PIECE_BYTES + (at.lane_row + half * 8) * 128 +
                    (((n % 8) ^ (at.lane_row & 7)) << 4) + (at.lane & 3) * 4) = packed[n / 2][n % 2 * 2 + half];
    fence_shared_for_engines();
    named_sync(1, 128 * CONSUMERS);
}

INLINE void issue_unit(float (&sums)[32], const BackwardPlace& at, int unit) {
    u32 gradients = at.base + GRADIENTS_AT + at.buffer * GRADIENT_BYTES;
    issue_queries(sums, gradients + (TILE_QUERIES == 128 ? unit * KEY_PIECE_BYTES : 0),
                  at.base + (TILE_QUERIES == 128 ? 0 : unit * KEY_PIECE_BYTES));
}

// One tile of queries of one head: adds to the sums of dv, of dk, and to dq in memory, whichever of them this block takes.
template <bool VALUES, bool KEYS, bool QUERIES>
INLINE void backward_tile(float (&key_sums)[KEY_PIECES * 32], float (&value_sums)[VALUE_PIECES * 32], float* dq_target,
                                    const BackwardPlace& at, bool ragged) {
    u32 query_tile = at.base + STAGES_AT + at.stage.slot * STAGE_BYTES;
    u32 d_out_tile = query_tile + KEY_PIECES * QUERY_PIECE_BYTES;
    u32 my_keys = at.base + at.consumer * 64 * 128;
    const unsigned char* rows = dynamic_shared + ROWS_AT + at.stage.slot * 4 * ROW_BYTES;
    float scores[SCORES], gradients[SCORES];
    Slopes slopes;
    u32 weights[STEPS][4], packed[STEPS][4];
    at.wait(QUERY_FULL);
    if (KEYS) at.wait(OUT_FULL);
    wgmma_fence();
    issue_rows<KEY_PIECES>(scores, my_keys, query_tile);
    if (KEYS) issue_rows<VALUE_PIECES>(gradients, my_keys + VALUES_AT, d_out_tile);
    wgmma_wait<KEYS ? 1 : 0>();
    pin(scores);
    probabilities(scores, slopes, rows, at.first_key, at.first_key + at.lane_row, ragged, at.scale, at.softcap, at.lane);
    if (!KEYS) {
        at.release(QUERY_EMPTY);
        at.wait(OUT_FULL);
    }
    if (VALUES && EARLY_VALUES) {
        pack_weights(weights, scores);
        wgmma_fence();
        issue_sums<VALUE_PIECES * 64>(value_sums, weights, d_out_tile);
    }
    if (KEYS) {
        wgmma_wait<VALUES && EARLY_VALUES ? 1 : 0>();
        pin(gradients);
        if (!VALUES) at.release(OUT_EMPTY);
        score_gradients(gradients, scores, slopes, rows, at.lane);
        pack_weights(packed, gradients);
        if (VALUES && !EARLY_VALUES) {
            pack_weights(weights, scores);
            wgmma_fence();
            issue_sums<VALUE_PIECES * 64>(value_sums, weights, d_out_tile);
        }
        if (QUERIES) share_gradients(packed, at);
        wgmma_fence();
        float query_sums[32];
        int unit = at.consumer * UNITS_EACH;
        if (QUERIES) issue_unit(query_sums, at, min(unit, DQ_UNITS - 1));
        issue_sums<KEY_PIECES * 64>(key_sums, packed, query_tile);
        if (QUERIES) {
            wgmma_wait<1>();
            pin(query_sums);
            if (unit < DQ_UNITS) add_to_sums(dq_target + unit * 4096, query_sums);
            if (UNITS_EACH == 2) {
                wgmma_fence();
                issue_unit(query_sums, at, min(unit + 1, DQ_UNITS - 1));
                wgmma_wait<0>();
                pin(query_sums);
                if (unit + 1 < DQ_UNITS) add_to_sums(dq_target + (unit + 1) * 4096, query_sums);
            }
        }
    }
    wgmma_wait<0>();
    if (KEYS) pin(key_sums);
    if (VALUES) pin(value_sums);
    if (KEYS) at.release(QUERY_EMPTY);
    if (VALUES) at.release(OUT_EMPTY);
}

struct BackwardTargets {
    half_bits *dk, *dv;
    int dk_pitch, dv_pitch, key_rows;
};

template <bool VALUES, bool KEYS>
INLINE void store_block(const float (&key_sums)[KEY_PIECES * 32], const float (&value_sums)[VALUE_PIECES * 32],
                                  const BackwardPlace& at, const BackwardTargets& to) {
    // Both warpgroups read all keys for dq: only now may the sums take their place.
    named_sync(1, 128 * CONSUMERS);
    if (BACKWARD_CLUSTER > 1) {
        leave_sums(key_sums, 0, at.lane_row, at.lane);
        leave_sums(value_sums, KEY_PIECES * 64, at.lane_row, at.lane);
        synchronise_cluster();
        store_cluster_sums(at.base, to.dk, to.dk_pitch, to.dv, to.dv_pitch, at.first_key, to.key_rows, at.scale);
        // Nobody leaves while a neighbour still reads its shared memory.
        synchronise_cluster();
        return;
    }
    int warp_row = at.lane_row - (at.lane >> 2);
    unsigned char* key_place = dynamic_shared + warp_row * 128;
    int first_row = at.first_key + warp_row;
    if (KEYS) store_keys<KEY_PIECES, HEAD_WIDTH>(key_sums, key_place, to.dk, to.dk_pitch, first_row, to.key_rows, at.scale, at.lane);
    if (VALUES)
        store_keys<VALUE_PIECES, VALUE_WIDTH>(value_sums, key_place + VALUES_AT, to.dv, to.dv_pitch, first_row, to.key_rows, 1.0f, at.lane);
}

template <bool VALUES, bool KEYS, bool QUERIES>
INLINE void backward_compute(u32 base, const BackwardTargets& to, float* dq_sums, const BackwardRange& range, int query_rows,
                                       int padded_rows, float scale, float softcap) {
    BackwardPlace at;
    at.base = base, at.barriers = base + CONTROL_AT;
    at.consumer = threadIdx.x / 128 - 1, at.lane = threadIdx.x % 32;
    at.lane_row = at.consumer * 64 + threadIdx.x / 32 % 4 * 16 + (at.lane >> 2);
    at.first_key = range.first_key, at.scale = scale, at.softcap = softcap;
    at.stage = {0, 0}, at.buffer = 0;
    float key_sums[KEY_PIECES * 32], value_sums[VALUE_PIECES * 32];
#pragma unroll
    for (int i = 0; i < KEY_PIECES * 32; ++i) key_sums[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUE_PIECES * 32; ++i) value_sums[i] = 0.0f;
    long long first_row = (long long)range.first_head * padded_rows + range.first_query;
    float* dq_target = dq_sums + first_row * (KEY_PIECES * 64) + threadIdx.x % 128 * 4;
    int tile = 0;
    barrier_wait(at.barriers + KEYS_FULL * 8, 0);
#pragma unroll 1
    for (int iteration = 0; iteration < range.iterations; ++iteration) {
        bool ragged = range.first_query + (tile + 1) * TILE_QUERIES > query_rows;
        backward_tile<VALUES, KEYS, QUERIES>(key_sums, value_sums, dq_target, at, ragged);
        advance_stage(at.stage);
        at.buffer ^= 1;
        dq_target += TILE_QUERIES * KEY_PIECES * 64;
        if (++tile == range.tiles) {
            tile = 0;
            dq_target += (long long)(padded_rows - range.tiles * TILE_QUERIES) * (KEY_PIECES * 64);
        }
    }
    store_block<VALUES, KEYS>(key_sums, value_sums, at, to);
}

template <bool WITH_QUERIES>
INLINE void backward_block(const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map, const TensorMap& d_out_map,
                                     half_bits* dk, int dk_pitch, half_bits* dv, int dv_pitch, const float* row_log, const float* row_delta,
                                     const int* row_bounds, float* dq_sums, const int* query_begin, const int* query_end, int query_rows,
                                     int key_rows, int query_heads, int key_heads, float scale, float softcap) {
    u32 base = shared_address(dynamic_shared);
    if (threadIdx.x == 0) {
        prefetch_map(q_map);
        prefetch_map(k_map);
        prefetch_map(v_map);
        prefetch_map(d_out_map);
        u32 barriers = base + CONTROL_AT;
        barrier_initialise(barriers + KEYS_FULL * 8, 1);
        for (int slot = 0; slot < 2; ++slot) {
            barrier_initialise(barriers + (QUERY_FULL + slot) * 8, 1);
            barrier_initialise(barriers + (QUERY_EMPTY + slot) * 8, 4 * CONSUMERS);
            barrier_initialise(barriers + (OUT_FULL + slot) * 8, 1);
            barrier_initialise(barriers + (OUT_EMPTY + slot) * 8, 4 * CONSUMERS);
        }
        fence_barrier_initialisation();
    }
    __syncthreads();
    int padded_rows = (query_rows + 127) / 128 * 128;
    BackwardRange range = backward_range(query_begin, query_end, query_rows, key_rows, query_heads, key_heads);
    if (threadIdx.x < 128) {
        give_up_registers<24>();
        if (threadIdx.x == 0)
            backward_fetch(q_map, k_map, v_map, d_out_map, base, row_log, row_delta, row_bounds, padded_rows, range);
    } else {
        take_registers<(CONSUMERS == 2 ? 240 : 232)>();
        BackwardTargets to = {dk + range.key_head * HEAD_WIDTH, dv + range.key_head * VALUE_WIDTH, dk_pitch, dv_pitch, key_rows};
        if (ONE_SWEEP)
            backward_compute<true, true, WITH_QUERIES>(base, to, dq_sums, range, query_rows, padded_rows, scale, softcap);
        else if (blockIdx.z == 0)
            backward_compute<false, true, WITH_QUERIES>(base, to, dq_sums, range, query_rows, padded_rows, scale, softcap);
        else
            backward_compute<true, false, false>(base, to, dq_sums, range, query_rows, padded_rows, scale, softcap);
    }
}

#if BACKWARD_CLUSTER > 1
#define BACKWARD_CLUSTER_SHAPE __cluster_dims__(BACKWARD_CLUSTER, 1, 1)
#else
#define BACKWARD_CLUSTER_SHAPE
#endif
#define BACKWARD_HOPPER(NAME, WITH_QUERIES)                                                                                          \
    extern "C" __global__ void BACKWARD_CLUSTER_SHAPE __launch_bounds__(BACKWARD_THREADS, 3 - CONSUMERS) NAME(                       \
        const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,   \
        const __grid_constant__ TensorMap d_out_map, half_bits* __restrict__ dk, int dk_pitch, half_bits* __restrict__ dv,           \
        int dv_pitch, const float* __restrict__ row_log, const float* __restrict__ row_delta, const int* __restrict__ row_bounds,    \
        float* __restrict__ dq_sums, const int* __restrict__ query_begin, const int* __restrict__ query_end, int query_rows,         \
        int key_rows, int query_heads, int key_heads, float scale, float softcap) {                                                  \
        backward_block<WITH_QUERIES>(q_map, k_map, v_map, d_out_map, dk, dk_pitch, dv, dv_pitch, row_log, row_delta, row_bounds,     \
                                     dq_sums, query_begin, query_end, query_rows, key_rows, query_heads, key_heads, scale, softcap); \
    }
BACKWARD_HOPPER(attention_backward_hopper, true)
BACKWARD_HOPPER(attention_backward_hopper_keys, false)

// One 64 x 64 unit of dq from the order in which lanes hold products to rows of 16-bit numbers.
extern "C" __global__ void __launch_bounds__(128) attention_backward_hopper_convert(const float* __restrict__ dq_sums,
                                                                                    half_bits* __restrict__ dq, int dq_pitch,
                                                                                    int query_rows, int query_heads, float scale) {
    __shared__ uint4 tile[64 * 8];
    int head = blockIdx.x, piece = blockIdx.z, thread = threadIdx.x, lane = thread % 32;
    const float4* source = (const float4*)(dq_sums + (((long long)head * gridDim.y + blockIdx.y) * KEY_PIECES + piece) * 4096) + thread;
    int row = thread / 32 * 16 + (lane >> 2);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        float4 sums = source[n * 128];
        unsigned char* target = (unsigned char*)tile + row * 128 + ((n ^ (row & 7)) << 4) + (lane & 3) * 4;
        *(u32*)target = pack_halves(sums.x * scale, sums.y * scale);
        *(u32*)(target + 8 * 128) = pack_halves(sums.z * scale, sums.w * scale);
    }
    __syncthreads();
    dq += head * HEAD_WIDTH + piece * 64;
#pragma unroll
    for (int start = 0; start < 64 * 8; start += 128) {
        int out_row = (start + thread) / 8, chunk = thread % 8;
        int query = blockIdx.y * 64 + out_row;
        if (query < query_rows && piece * 64 + chunk * 8 < HEAD_WIDTH)
            *(uint4*)(dq + (long long)query * dq_pitch + chunk * 8) = tile[out_row * 8 + (chunk ^ (out_row & 7))];
    }
}
