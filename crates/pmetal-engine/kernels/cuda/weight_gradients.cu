// Gradients of thin matrices, several in one launch: out += scale * sum over t of wide[t, .] thin[t, .], in f32, for up to 16
// products of a matrix [T, W] with one [T, S] of at most 64 columns. Compute capability 8.0 and above. Needs tiles.cuh in front.
//
// weight_gradients(first blocks of all products u32 [16], 16 x Product, count u32, T u32, partials f32*, counters u32*)
//   grid (blocks, splits), blocks = sum over products of ceil(W / 128); block 128, dynamic shared memory STAGES * TOKEN_TILE * 384
//   bytes, which are 48 KiB or more. AT_ONCE: blocks that a multiprocessor has registers for.
// Pointers are aligned to 16 bytes, pitches are multiples of 8 elements. Element (w, s) of an output is at
// w * wide_stride + s * thin_stride. With splits > 1, each split sums a part of the tokens, and the parts are added in their
// order, so that results do not change from run to run: with CLUSTER=splits (-D, compute capability 9.0) by the blocks of a
// cluster, which read each other's shared memory; else by the last block of a tile to finish, which needs `partials` f32
// [blocks, splits, 8192] and `counters` u32 [blocks], which are zero before and after.
// Bytes: wide and thin once, the outputs read and written.

#ifndef CLUSTER
#define CLUSTER 1
#endif

struct Product {
    const half_bits* wide;
    const half_bits* thin;
    float* out;
    u32 wide_pitch, thin_pitch;
    u32 wide_columns, thin_columns;
    u32 wide_stride, thin_stride;
    float scale;
    u32 unused[3];
};

struct FirstBlocks {
    u32 of[16];
};

constexpr int WIDE_TILE = 128;
constexpr int THIN_TILE = 64;
constexpr int BLOCK = 128;
constexpr int WIDE_BYTES = TOKEN_TILE * WIDE_TILE * 2;
constexpr int STAGE_BYTES = WIDE_BYTES + TOKEN_TILE * THIN_TILE * 2;
constexpr int TILE_SUMS = WIDE_TILE * THIN_TILE;

// One thread's share of a tile of WIDTH columns of a matrix: a chunk of eight columns in every ROW_STEP-th row.
template <int WIDTH>
struct Share {
    static constexpr int CHUNKS = WIDTH / 8;
    static constexpr int ROW_STEP = BLOCK / CHUNKS;
    const half_bits* source;
    u64 step;
    u32 target;
    int row, bytes;

    INLINE Share(const half_bits* base, u32 pitch, int first, int columns) {
        int chunk = threadIdx.x % CHUNKS;
        row = threadIdx.x / CHUNKS;
        bytes = min(max((columns - first - chunk * 8) * 2, 0), 16);
        source = base + (bytes > 0 ? first + chunk * 8 : 0) + (u64)row * pitch;
        step = (u64)ROW_STEP * pitch;
        // The swizzle depends on the row modulo 8, which a step leaves as it is.
        static_assert(ROW_STEP % 8 == 0, "rows of a share are swizzled alike");
        target = tile_offset<WIDTH>(row, chunk);
    }

    // Brings in the rows from `token`, zeros for those at or past `tokens`.
    INLINE void copy(u32 tile, int token, int tokens) const {
        const half_bits* from = source + (u64)(token / ROW_STEP) * step;
#pragma unroll
        for (int i = 0; i < TOKEN_TILE / ROW_STEP; ++i) {
            bool present = token + row + i * ROW_STEP < tokens;
            copy_bytes_async(tile + target + i * ROW_STEP * WIDTH * 2, present ? from + i * step : source, present ? bytes : 0);
        }
    }
};

// A warp's 32 wide columns against all thin ones.
INLINE void multiply_stage(float (&sums)[2][8][4], u32 stage, int thin_columns, int warp, int lane) {
#pragma unroll
    for (int k = 0; k < TOKEN_TILE; k += 16) {
        u32 left[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
            load_matrices_transposed(left[m], right_address<WIDE_TILE>(stage, k, warp * 4 + m * 2, lane));
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            if (n * 8 >= thin_columns) break;
            u32 right[4];
            load_matrices_transposed(right, left_address<THIN_TILE>(stage + WIDE_BYTES, k, n, lane));
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                multiply_add(sums[m][n], left[m], right[0], right[1]);
                multiply_add(sums[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// Replaces a block's sums by those of all splits; false for all blocks of a tile but the last.
INLINE bool add_splits(float (&sums)[2][8][4], float* partials, u32* counters, int thin_columns) {
    float* own = partials + ((u64)blockIdx.x * gridDim.y + blockIdx.y) * TILE_SUMS + threadIdx.x;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (n * 8 < thin_columns) own[((m * 8 + n) * 4 + i) * BLOCK] = sums[m][n][i];
    __threadfence();
    __syncthreads();
    // Nobody reads tiles any more.
    u32* finished = (u32*)dynamic_shared;
    if (threadIdx.x == 0) *finished = atomicAdd(counters + blockIdx.x, 1);
    __syncthreads();
    if (*finished + 1 != gridDim.y) return false;
    __threadfence();
    if (threadIdx.x == 0) counters[blockIdx.x] = 0;
    const float* all = partials + (u64)blockIdx.x * gridDim.y * TILE_SUMS + threadIdx.x;
    for (u32 split = 0; split < gridDim.y; ++split, all += TILE_SUMS) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (n * 8 >= thin_columns) continue;
                    float part = __ldcg(all + ((m * 8 + n) * 4 + i) * BLOCK);
                    sums[m][n][i] = split == 0 ? part : sums[m][n][i] + part;
                }
    }
    return true;
}

#if CLUSTER > 1
INLINE float load_from_block(u32 address, u32 rank) {
    float value;
    asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}\n"
                 : "=f"(value)
                 : "r"(address), "r"(rank)
                 : "memory");
    return value;
}
#endif

// Whether this block stores the i-th of sixteen sums.
INLINE bool stores(int i) { return CLUSTER == 1 || i % CLUSTER == blockIdx.y; }

// Replaces the sums that this block stores by those of all splits of its tile.
INLINE void add_cluster(float (&sums)[2][8][4], int thin_columns) {
#if CLUSTER > 1
    float* own = (float*)dynamic_shared + threadIdx.x;
    // Nobody reads tiles any more.
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (n * 8 < thin_columns) own[((m * 8 + n) * 4 + i) * BLOCK] = sums[m][n][i];
    synchronise_cluster();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        if (n * 8 >= thin_columns) break;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int m = i >> 2, index = m * 8 + (n & 1) * 4 + (i & 3);
            if (!stores(index)) continue;
            u32 address = shared_address(own + ((m * 8 + n) * 4 + (i & 3)) * BLOCK);
            float parts[CLUSTER];
#pragma unroll
            for (int split = 0; split < CLUSTER; ++split) parts[split] = load_from_block(address, split);
            float sum = parts[0];
#pragma unroll
            for (int split = 1; split < CLUSTER; ++split) sum += parts[split];
            sums[m][n][i & 3] = sum;
        }
    }
#endif
}

// Reads eight columns of both halves before it writes any, because the compiler cannot know that they are apart.
INLINE void add_to_output(const float (&sums)[2][8][4], const Product& product, int first, int warp, int lane) {
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
        if (n * 8 >= product.thin_columns) break;
        float* targets[16];
        float values[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            u32 wide = first + warp * 32 + (i >> 3) * 16 + (lane >> 2) + (i >> 1 & 1) * 8;
            u32 thin = (n + (i >> 2 & 1)) * 8 + (lane & 3) * 2 + (i & 1);
            bool present = stores(i) && wide < product.wide_columns && thin < product.thin_columns;
            targets[i] = present ? product.out + (u64)wide * product.wide_stride + (u64)thin * product.thin_stride : nullptr;
            values[i] = present ? *targets[i] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 16; ++i)
            if (targets[i]) *targets[i] = values[i] + product.scale * sums[i >> 3][n + (i >> 2 & 1)][i & 3];
    }
}

#if CLUSTER > 1
#define CLUSTER_SHAPE __cluster_dims__(1, CLUSTER, 1)
#else
#define CLUSTER_SHAPE
#endif
#define TAKE(index) \
    case index: \
        product = p##index; \
        break;

extern "C" __global__ void CLUSTER_SHAPE __launch_bounds__(BLOCK, AT_ONCE) weight_gradients(
    FirstBlocks first_blocks, Product p0, Product p1, Product p2, Product p3, Product p4, Product p5, Product p6, Product p7,
    Product p8, Product p9, Product p10, Product p11, Product p12, Product p13, Product p14, Product p15, u32 count, u32 tokens,
    float* partials, u32* counters) {
    // Parameters come from memory line by line: a block reads those of its product alone.
    u32 which = 0;
#pragma unroll
    for (u32 i = 1; i < 16; ++i) which += i < count && blockIdx.x >= first_blocks.of[i];
    u32 first_block = 0;
#pragma unroll
    for (u32 i = 1; i < 16; ++i) first_block = which == i ? first_blocks.of[i] : first_block;
    Product product;
    switch (which) {
        TAKE(0) TAKE(1) TAKE(2) TAKE(3) TAKE(4) TAKE(5) TAKE(6) TAKE(7) TAKE(8) TAKE(9) TAKE(10) TAKE(11) TAKE(12) TAKE(13) TAKE(14)
        default: product = p15;
    }
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first = (blockIdx.x - first_block) * WIDE_TILE;
    // Shares end at multiples of 64 tokens, whatever a tile is, so that sums are the same.
    int groups = (tokens + 63) / 64, tiles = groups * (64 / TOKEN_TILE);
    int share = (groups + gridDim.y - 1) / gridDim.y * (64 / TOKEN_TILE);
    int begin = blockIdx.y * share, steps = max(min(begin + share, tiles) - begin, 0);
    int end = min((begin + steps) * TOKEN_TILE, (int)tokens);
    u32 shared = shared_address(dynamic_shared);
    Share<WIDE_TILE> wide(product.wide, product.wide_pitch, first, product.wide_columns);
    Share<THIN_TILE> thin(product.thin, product.thin_pitch, 0, product.thin_columns);
    auto copy = [&](int step) {
        u32 stage = shared + step % STAGES * STAGE_BYTES;
        int token = (begin + step) * TOKEN_TILE;
        wide.copy(stage, token, end);
        // Chunks without a column are never read.
        if (thin.bytes > 0) thin.copy(stage + WIDE_BYTES, token, end);
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) copy(step);
        commit_copies();
    }
    float sums[2][8][4] = {};
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) copy(step + STAGES - 1);
        commit_copies();
        multiply_stage(sums, shared + step % STAGES * STAGE_BYTES, product.thin_columns, warp, lane);
    }
    if (CLUSTER > 1)
        add_cluster(sums, product.thin_columns);
    else if (gridDim.y > 1 && !add_splits(sums, partials, counters, product.thin_columns))
        return;
    add_to_output(sums, product, first, warp, lane);
#if CLUSTER > 1
    // Nobody leaves while a neighbour still reads its shared memory.
    synchronise_cluster();
#endif
}
