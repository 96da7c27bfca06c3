// Attention forward for compute capability 9.0 (architecture sm_90a): wgmma, tensor copies, one warpgroup that fetches and two or
// three that compute, a persistent grid. Needs attention_common.cuh and attention_hopper.cuh in front.
//
// extern "C" attention_forward_hopper(
//   q_map, k_map, v_map: tensor maps by value (see attention_hopper.cuh) over [rows, heads, width] of q, k and v; box rows 64 for q
//   and FORWARD_KEYS for k and v; then out u16*, out_pitch i32, lse f32* [Tq, H], key_begin i32*, key_end i32* [Tq],
//   sinks f32* [H] or null, counters u32* [2], query_rows i32, key_rows i32, query_heads i32, key_heads i32, scale f32, softcap f32)
//   With pieces Ne = ceil(E / 64), Nv = ceil(Ev / 64):
//   CONSUMERS = Ne == 1 && Nv == 1 ? 3 : 2, or what -D FORWARD_CONSUMERS says where Ne == Nv == 1: 2 is faster where
//   H * ceil(Tq / 192) does not exceed the multiprocessors; FORWARD_KEYS = Ne <= 2 && Nv <= 2 ? 128 : 64;
//   work items = H * ceil(Tq / (64 * CONSUMERS))
//   grid (min(multiprocessors, work items), 1, 1); block 128 * (CONSUMERS + 1);
//   dynamic shared memory CONSUMERS * 8192 * (Ne + (Ne <= 2 && Nv <= 2 ? Nv : 0)) + 2 * FORWARD_KEYS * 128 * (Ne + Nv) + 1024 bytes.
//   Above 128 Nv must not exceed Ne.
// counters is zero before the first launch and zero again after each; launches that may overlap need counters of their own.
// Rows of k and v up to key_rows must hold finite numbers, also where no query sees them. Otherwise as attention_forward.
//
// Measured on an H200, bf16, causal, operations of visible pairs alone, in a replayed graph; cuDNN in PyTorch 2.11 in brackets:
//   2 documents of 2048, H 32, K 8, E 128: 136 us, 504 TFLOP/s (160 us)
//   1 document of 8192, same heads: 956 us, 575 TFLOP/s (952 us)
//   9 documents of 60 to 1500, same heads, T 8209: 216 us, 385 TFLOP/s
//   4 documents of 2048, H 32, K 8, E 64: 191 us, 360 TFLOP/s (181 us)
//   4 documents of 512, H 9, K 3, E 64: 10 us with FORWARD_CONSUMERS 2, 13 us with 3 (12 us)
//   16 documents of 512, H 32, K 8, E 128: 114 us (96 us)
//   2 documents of 2048, H 16, E 192 and Ev 128: 90 us, 476 TFLOP/s (103 us); H 8, K 4, E 256: 65 us, 527 TFLOP/s (91 us)
// One run to the next differs by up to 5 in 100.

constexpr bool NARROW = KEY_PIECES <= 2 && VALUE_PIECES <= 2;

#ifndef FORWARD_CONSUMERS
#define FORWARD_CONSUMERS (KEY_PIECES == 1 && VALUE_PIECES == 1 ? 3 : 2)
#endif
constexpr int CONSUMERS = FORWARD_CONSUMERS;
constexpr int FORWARD_QUERIES = CONSUMERS * 64;
constexpr int FORWARD_KEYS = NARROW ? 128 : 64;
constexpr int FORWARD_STAGES = 2;
constexpr int FORWARD_THREADS = 128 * (CONSUMERS + 1);
// 64 * 1024 registers a multiprocessor, 128 threads a warpgroup.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;

constexpr int QUERY_PIECE_BYTES = 64 * 128;
constexpr int KEY_PIECE_BYTES = FORWARD_KEYS * 128;
constexpr int QUERY_TILE_BYTES = CONSUMERS * KEY_PIECES * QUERY_PIECE_BYTES;
constexpr int KEY_TILE_BYTES = KEY_PIECES * KEY_PIECE_BYTES;
constexpr int VALUE_TILE_BYTES = VALUE_PIECES * KEY_PIECE_BYTES;
constexpr int KEYS_AT = QUERY_TILE_BYTES;
constexpr int VALUES_AT = KEYS_AT + FORWARD_STAGES * KEY_TILE_BYTES;
constexpr int OUTPUT_AT = NARROW ? VALUES_AT + FORWARD_STAGES * VALUE_TILE_BYTES : 0;
constexpr int CONTROL_AT =
    VALUES_AT + FORWARD_STAGES * VALUE_TILE_BYTES + (NARROW ? CONSUMERS * VALUE_PIECES * QUERY_PIECE_BYTES : 0);
static_assert(NARROW || VALUE_PIECES <= KEY_PIECES, "the output is brought through the place of the queries");

// Barriers, by their place after CONTROL_AT in units of 8 bytes; each ring has two slots.
constexpr int QUERY_FULL = 0, QUERY_EMPTY = 1, KEY_FULL = 2, KEY_EMPTY = 4, VALUE_FULL = 6, VALUE_EMPTY = 8, WORK_FULL = 10,
              WORK_EMPTY = 12;
constexpr int WORK_AT = CONTROL_AT + 128;

// One tile of queries of one head, as the fetching warpgroup hands it to the others.
struct ForwardWork {
    int first_query, head, first_key, tiles;  // tiles < 0: there is no more work
    int all_first, all_last;                  // see VisibleRange
    // The tiles that the rows of each computing warpgroup need, first + (last << 16): at the diagonal, and where a document ends,
    // these are fewer than the block's.
    int spans[3];
};

constexpr int SCORES = FORWARD_KEYS / 2;
constexpr int OUTPUTS = VALUE_PIECES * 32;

INLINE void issue_scores(float (&scores)[SCORES], u32 query_tile, u32 key_tile) {
#pragma unroll
    for (int step = 0; step < KEY_PIECES * 4; ++step) {
        u64 a = operand(query_tile + step / 4 * QUERY_PIECE_BYTES + step % 4 * 32, 16);
        u64 b = operand(key_tile + step / 4 * KEY_PIECE_BYTES + step % 4 * 32, 16);
        wgmma_shared<0, 0>(scores, a, b, step > 0);
    }
    wgmma_commit();
}

INLINE void issue_values(float (&output)[OUTPUTS], const u32 (&weights)[FORWARD_KEYS / 16][4], u32 value_tile) {
#pragma unroll
    for (int step = 0; step < FORWARD_KEYS / 16; ++step)
        wgmma_registers<1>(output, weights[step], operand(value_tile + step * 2048, KEY_PIECE_BYTES), 1);
    wgmma_commit();
}

struct ForwardRows {
    float maximum[2], sum[2], rescale[2];
    int begin[2], end[2];
};

INLINE void mask_scores(float (&scores)[SCORES], const ForwardRows& rows, int first_key, bool masked, float scale,
                                  float softcap, int lane) {
#if ATTENTION_SOFTCAP
    float inside = scale / softcap;
#pragma unroll
    for (int i = 0; i < SCORES; ++i) scores[i] = softcap * tanh_accurate(scores[i] * inside);
#endif
    if (!masked) return;
    int lane_key = first_key + (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
        int key = lane_key + i / 4 * 8 + (i & 1);
        int half = (i >> 1) & 1;
        if (key < rows.begin[half] || key >= rows.end[half]) scores[i] = negative_infinity();
    }
}

// Scores become unnormalised probabilities; rows.rescale is what sums and outputs so far must be multiplied by.
INLINE void softmax_scores(float (&scores)[SCORES], ForwardRows& rows, float exponent_scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float maximum = rows.maximum[half];
#pragma unroll
        for (int n = 0; n < SCORES / 4; ++n) maximum = fmaxf(maximum, fmaxf(scores[4 * n + 2 * half], scores[4 * n + 2 * half + 1]));
        maximum = quad_maximum(maximum);
        float shift = maximum == negative_infinity() ? 0.0f : maximum * exponent_scale;
        rows.rescale[half] = exp2_fast(rows.maximum[half] * exponent_scale - shift);
        rows.maximum[half] = maximum;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < SCORES / 4; ++n)
#pragma unroll
            for (int i = 4 * n + 2 * half; i < 4 * n + 2 * half + 2; ++i) {
                scores[i] = exp2_fast(scores[i] * exponent_scale - shift);
                sum += scores[i];
            }
        rows.sum[half] = rows.sum[half] * rows.rescale[half] + sum;
    }
}

INLINE void pack_scores(u32 (&weights)[FORWARD_KEYS / 16][4], const float (&scores)[SCORES]) {
#pragma unroll
    for (int i = 0; i < SCORES / 2; ++i) weights[i / 4][i % 4] = pack_halves(scores[2 * i], scores[2 * i + 1]);
}

// Normalises, writes lse, and brings each warp's rows through shared memory so that stores are 16 bytes wide.
INLINE void store_output(float (&output)[OUTPUTS], const ForwardRows& rows, unsigned char* tile, half_bits* out, int out_pitch,
                                   float* lse, const float* sinks, const ForwardWork& work, int first_row, int query_rows,
                                   int query_heads, float logit_scale, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = half * 8 + (lane >> 2);
        float sum = quad_sum(rows.sum[half]);
        float maximum = rows.maximum[half] * logit_scale;
        float rescale = 1.0f;
        if (sinks) {
            float sink = sinks[work.head];
            float with_sink = fmaxf(maximum, sink);
            rescale = exp2_fast((maximum - with_sink) * LOG2_E);
            sum = sum * rescale + exp2_fast((sink - with_sink) * LOG2_E);
            maximum = with_sink;
        }
        float inverse = sum > 0.0f ? rescale / sum : 0.0f;
        if ((lane & 3) == 0 && first_row + row < query_rows)
            lse[(long long)(first_row + row) * query_heads + work.head] =
                sum > 0.0f ? maximum + log2_fast(sum) * NATURAL_LOG_OF_2 : negative_infinity();
#pragma unroll
        for (int n = 0; n < OUTPUTS / 4; ++n)
            *(u32*)(tile + n / 8 * QUERY_PIECE_BYTES + row * 128 + (((n % 8) ^ (row & 7)) << 4) + (lane & 3) * 4) =
                pack_halves(output[4 * n + 2 * half] * inverse, output[4 * n + 2 * half + 1] * inverse);
    }
    __syncwarp();
    constexpr int CHUNKS = VALUE_PIECES * 8;
    out += (long long)first_row * out_pitch + work.head * VALUE_WIDTH;
#pragma unroll
    for (int start = 0; start < 16 * CHUNKS; start += 32) {
        int row = (start + lane) / CHUNKS;
        int chunk = (start + lane) % CHUNKS;
        if (chunk * 8 < VALUE_WIDTH && first_row + row < query_rows)
            *(uint4*)(out + (long long)row * out_pitch + chunk * 8) =
                *(const uint4*)(tile + chunk / 8 * QUERY_PIECE_BYTES + row * 128 + (((chunk % 8) ^ (row & 7)) << 4));
    }
    __syncwarp();
}

INLINE int forward_span(const int* key_begin, const int* key_end, const ForwardWork& work, int consumer, int query_rows) {
    int row = work.first_query + consumer * 64;
    if (row >= query_rows) return 0;
    int first = key_begin[row], last = key_end[min(row + 64, query_rows) - 1];
    if (first >= last) return 0;
    int first_tile = min((first - work.first_key) / FORWARD_KEYS, work.tiles);
    return first_tile | min((last - work.first_key + FORWARD_KEYS - 1) / FORWARD_KEYS, work.tiles) << 16;
}

// One thread: brings in the queries and, as places become free, the tiles of keys and values of one item.
INLINE void fetch_item(const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map, u32 base, const ForwardWork& work,
                                 int key_head, RingPlace& place, int& query_parity) {
    u32 barriers = base + CONTROL_AT;
    barrier_wait(barriers + QUERY_EMPTY * 8, query_parity ^ 1);
    query_parity ^= 1;
    barrier_expect_bytes(barriers + QUERY_FULL * 8, QUERY_TILE_BYTES);
#pragma unroll 1
    for (int piece = 0; piece < CONSUMERS * KEY_PIECES; ++piece)
        copy_box(base + piece * QUERY_PIECE_BYTES, q_map, barriers + QUERY_FULL * 8, piece % KEY_PIECES * 64, work.head,
                 work.first_query + piece / KEY_PIECES * 64);
#pragma unroll 1
    for (int tile = 0; tile < work.tiles; ++tile) {
        int key = work.first_key + tile * FORWARD_KEYS;
        u32 key_full = barriers + (KEY_FULL + place.slot) * 8;
        barrier_wait(barriers + (KEY_EMPTY + place.slot) * 8, place.parity ^ 1);
        barrier_expect_bytes(key_full, KEY_TILE_BYTES);
#pragma unroll 1
        for (int piece = 0; piece < KEY_PIECES; ++piece)
            copy_box(base + KEYS_AT + place.slot * KEY_TILE_BYTES + piece * KEY_PIECE_BYTES, k_map, key_full, piece * 64, key_head, key);
        u32 value_full = barriers + (VALUE_FULL + place.slot) * 8;
        barrier_wait(barriers + (VALUE_EMPTY + place.slot) * 8, place.parity ^ 1);
        barrier_expect_bytes(value_full, VALUE_TILE_BYTES);
#pragma unroll 1
        for (int piece = 0; piece < VALUE_PIECES; ++piece)
            copy_box(base + VALUES_AT + place.slot * VALUE_TILE_BYTES + piece * KEY_PIECE_BYTES, v_map, value_full, piece * 64, key_head,
                     key);
        place.advance();
    }
}

// One warp: hands out work and fetches what it needs.
INLINE void forward_fetch(const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map, u32 base, const int* key_begin,
                                    const int* key_end, u32* counters, int query_rows, int key_rows, int query_heads, int group) {
    u32 barriers = base + CONTROL_AT;
    int lane = threadIdx.x;
    int blocks = (query_rows + FORWARD_QUERIES - 1) / FORWARD_QUERIES;
    RingPlace place = {0, 0}, work_place = {0, 0};
    int query_parity = 0;
    int item = blockIdx.x;
    while (true) {
        ForwardWork work;
        work.tiles = -1;
        int span = 0;
        if (item < blocks * query_heads) {
            // Under a causal mask later queries see more keys: hand out the longest items first.
            work.first_query = (blocks - 1 - item / query_heads) * FORWARD_QUERIES;
            work.head = item % query_heads;
            VisibleRange range = visible_range(key_begin, key_end, work.first_query, FORWARD_QUERIES, query_rows);
            work.tiles = (max(min(range.last, key_rows) - range.first, 0) + FORWARD_KEYS - 1) / FORWARD_KEYS;
            work.first_key = range.first;
            work.all_first = range.all_first;
            work.all_last = range.all_last;
            if (lane < CONSUMERS) span = forward_span(key_begin, key_end, work, lane, query_rows);
        }
        barrier_wait(barriers + (WORK_EMPTY + work_place.slot) * 8, work_place.parity ^ 1);
        ForwardWork* posted = (ForwardWork*)(dynamic_shared + WORK_AT) + work_place.slot;
        if (lane == 0) {
            posted->first_query = work.first_query;
            posted->head = work.head;
            posted->first_key = work.first_key;
            posted->tiles = work.tiles;
            posted->all_first = work.all_first;
            posted->all_last = work.all_last;
        }
        if (lane < CONSUMERS) posted->spans[lane] = span;
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(barriers + (WORK_FULL + work_place.slot) * 8);
            if (work.tiles > 0) fetch_item(q_map, k_map, v_map, base, work, work.head / group, place, query_parity);
            if (work.tiles >= 0) item = gridDim.x + atomicAdd(counters, 1u);
        }
        work_place.advance();
        if (work.tiles < 0) break;
        item = __shfl_sync(0xffffffffu, item, 0);
    }
    // The last block to run out of work leaves the counters as it found them.
    if (lane == 0 && atomicAdd(counters + 1, 1u) == gridDim.x - 1) {
        counters[0] = 0;
        counters[1] = 0;
    }
}

// What a computing warpgroup knows about itself and where it stands in the rings.
struct ForwardPlace {
    u32 base, barriers;
    int consumer, warp, lane, my_turn, next_turn;
    float scale, softcap;
    RingPlace keys, values;
};

INLINE void wait_for_keys(const ForwardPlace& at) { barrier_wait(at.barriers + (KEY_FULL + at.keys.slot) * 8, at.keys.parity); }
INLINE void wait_for_values(const ForwardPlace& at) {
    barrier_wait(at.barriers + (VALUE_FULL + at.values.slot) * 8, at.values.parity);
}
INLINE void release_keys(ForwardPlace& at) {
    if (at.lane == 0) barrier_arrive(at.barriers + (KEY_EMPTY + at.keys.slot) * 8);
    at.keys.advance();
}
INLINE void release_values(ForwardPlace& at) {
    if (at.lane == 0) barrier_arrive(at.barriers + (VALUE_EMPTY + at.values.slot) * 8);
    at.values.advance();
}
INLINE u32 key_tile_at(const ForwardPlace& at) { return at.base + KEYS_AT + at.keys.slot * KEY_TILE_BYTES; }
INLINE u32 value_tile_at(const ForwardPlace& at) { return at.base + VALUES_AT + at.values.slot * VALUE_TILE_BYTES; }

// Takes part in a tile that holds nothing for this warpgroup's rows.
INLINE void pass_tile(ForwardPlace& at, bool take_turn) {
    wait_for_keys(at);
    release_keys(at);
    if (take_turn) {
        named_sync(at.my_turn, 256);
        named_arrive(at.next_turn, 256);
    }
    wait_for_values(at);
    release_values(at);
}

// The tiles [first_tile, last_tile) of an item, at least one: while the products of a tile's values run, the next tile's scores
// become probabilities.
INLINE void compute_tiles(float (&output)[OUTPUTS], ForwardRows& rows, ForwardPlace& at, const ForwardWork& work, int first_tile,
                                    int last_tile) {
    float exponent_scale = (ATTENTION_SOFTCAP ? 1.0f : at.scale) * LOG2_E;
    u32 query_tile = at.base + at.consumer * KEY_PIECES * QUERY_PIECE_BYTES;
    float scores[SCORES];
    u32 weights[FORWARD_KEYS / 16][4];
    int key = work.first_key + first_tile * FORWARD_KEYS;
    wait_for_keys(at);
    wgmma_fence();
    issue_scores(scores, query_tile, key_tile_at(at));
    wgmma_wait<0>();
    pin(scores);
    release_keys(at);
    mask_scores(scores, rows, key, key < work.all_first || key + FORWARD_KEYS > work.all_last, at.scale, at.softcap, at.lane);
    softmax_scores(scores, rows, exponent_scale);
    pack_scores(weights, scores);
    for (int tile = first_tile + 1; tile < last_tile; ++tile) {
        key += FORWARD_KEYS;
        wait_for_keys(at);
        named_sync(at.my_turn, 256);
        wgmma_fence();
        issue_scores(scores, query_tile, key_tile_at(at));
        wait_for_values(at);
        wgmma_fence();
        issue_values(output, weights, value_tile_at(at));
        named_arrive(at.next_turn, 256);
        wgmma_wait<1>();
        pin(scores);
        release_keys(at);
        mask_scores(scores, rows, key, key < work.all_first || key + FORWARD_KEYS > work.all_last, at.scale, at.softcap, at.lane);
        softmax_scores(scores, rows, exponent_scale);
        wgmma_wait<0>();
        pin(output);
        release_values(at);
        pack_scores(weights, scores);
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) output[i] *= rows.rescale[(i >> 1) & 1];
    }
    if (NARROW && at.lane == 0) barrier_arrive(at.barriers + QUERY_EMPTY * 8);
    wait_for_values(at);
    wgmma_fence();
    issue_values(output, weights, value_tile_at(at));
    wgmma_wait<0>();
    pin(output);
    release_values(at);
}

// The computing warpgroups' part of one item.
INLINE void compute_item(ForwardPlace& at, const ForwardWork& work, int& query_parity, half_bits* out, int out_pitch, float* lse,
                                   const int* key_begin, const int* key_end, const float* sinks, int query_rows, int query_heads) {
    int first_row = work.first_query + at.consumer * 64 + at.warp * 16;
    ForwardRows rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int query = first_row + half * 8 + (at.lane >> 2);
        rows.begin[half] = query < query_rows ? key_begin[query] : 0;
        rows.end[half] = query < query_rows ? key_end[query] : 0;
        rows.maximum[half] = negative_infinity();
        rows.sum[half] = 0.0f;
    }
    float output[OUTPUTS];
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) output[i] = 0.0f;
    if (work.tiles > 0) {
        // The shuffle tells the compiler that a warp agrees: products must not start in code that might diverge.
        int span = __shfl_sync(0xffffffffu, work.spans[at.consumer], 0);
        int first_tile = span & 0xffff, last_tile = span >> 16;
        barrier_wait(at.barriers + QUERY_FULL * 8, query_parity);
        query_parity ^= 1;
        for (int tile = 0; tile < first_tile; ++tile) pass_tile(at, true);
        if (first_tile < last_tile)
            compute_tiles(output, rows, at, work, first_tile, last_tile);
        else if (NARROW && at.lane == 0)
            barrier_arrive(at.barriers + QUERY_EMPTY * 8);
        // A warpgroup takes one turn fewer than there are tiles, also where it computed none.
        for (int tile = last_tile; tile < work.tiles; ++tile) pass_tile(at, first_tile < last_tile || tile > 0);
    }
    // Where the output takes the place of the queries, the other warps' products must be done with them.
    if (!NARROW) named_sync(4 + at.consumer, 128);
    unsigned char* output_tile = dynamic_shared + OUTPUT_AT +
                                 at.consumer * (NARROW ? VALUE_PIECES : KEY_PIECES) * QUERY_PIECE_BYTES + at.warp * 16 * 128;
    store_output(output, rows, output_tile, out, out_pitch, lse, sinks, work, first_row, query_rows, query_heads,
                 ATTENTION_SOFTCAP ? 1.0f : at.scale, at.lane);
    if (!NARROW && work.tiles > 0) {
        fence_shared_for_engines();
        __syncwarp();
        if (at.lane == 0) barrier_arrive(at.barriers + QUERY_EMPTY * 8);
    }
}

INLINE void forward_compute(u32 base, half_bits* out, int out_pitch, float* lse, const int* key_begin, const int* key_end,
                                      const float* sinks, int query_rows, int query_heads, float scale, float softcap) {
    ForwardPlace at;
    at.base = base, at.barriers = base + CONTROL_AT;
    at.consumer = threadIdx.x / 128 - 1;
    at.warp = threadIdx.x / 32 % 4, at.lane = threadIdx.x % 32;
    at.scale = scale, at.softcap = softcap;
    at.keys = at.values = {0, 0};
    // The warpgroups take turns at starting products, so that one computes exponentials while another multiplies.
    at.my_turn = 1 + at.consumer, at.next_turn = 1 + (at.consumer + 1) % CONSUMERS;
    if (at.consumer == CONSUMERS - 1) named_arrive(at.next_turn, 256);
    RingPlace work_place = {0, 0};
    int query_parity = 0;
    while (true) {
        barrier_wait(at.barriers + (WORK_FULL + work_place.slot) * 8, work_place.parity);
        // Read in place until the item is done: registers are short.
        const ForwardWork& work = ((const ForwardWork*)(dynamic_shared + WORK_AT))[work_place.slot];
        if (work.tiles < 0) break;
        compute_item(at, work, query_parity, out, out_pitch, lse, key_begin, key_end, sinks, query_rows, query_heads);
        __syncwarp();
        if (at.lane == 0) barrier_arrive(at.barriers + (WORK_EMPTY + work_place.slot) * 8);
        work_place.advance();
    }
}

extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, 1) attention_forward_hopper(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
    half_bits* __restrict__ out, int out_pitch, float* __restrict__ lse, const int* __restrict__ key_begin,
    const int* __restrict__ key_end, const float* __restrict__ sinks, u32* __restrict__ counters, int query_rows, int key_rows,
    int query_heads, int key_heads, float scale, float softcap) {
    u32 base = shared_address(dynamic_shared);
    u32 barriers = base + CONTROL_AT;
    if (threadIdx.x == 0) {
        prefetch_map(q_map);
        prefetch_map(k_map);
        prefetch_map(v_map);
        constexpr int WARPS = CONSUMERS * 4;
        barrier_initialise(barriers + QUERY_FULL * 8, 1);
        barrier_initialise(barriers + QUERY_EMPTY * 8, WARPS);
        for (int slot = 0; slot < 2; ++slot) {
            barrier_initialise(barriers + (KEY_FULL + slot) * 8, 1);
            barrier_initialise(barriers + (KEY_EMPTY + slot) * 8, WARPS);
            barrier_initialise(barriers + (VALUE_FULL + slot) * 8, 1);
            barrier_initialise(barriers + (VALUE_EMPTY + slot) * 8, WARPS);
            barrier_initialise(barriers + (WORK_FULL + slot) * 8, 1);
            barrier_initialise(barriers + (WORK_EMPTY + slot) * 8, WARPS);
        }
        fence_barrier_initialisation();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_up_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32)
            forward_fetch(q_map, k_map, v_map, base, key_begin, key_end, counters, query_rows, key_rows, query_heads,
                          query_heads / key_heads);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        forward_compute(base, out, out_pitch, lse, key_begin, key_end, sinks, query_rows, query_heads, scale, softcap);
    }
}
