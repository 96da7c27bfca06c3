// Products of the rows of each expert with its matrices for compute capability 9.0 (architecture sm_90a): wgmma, tensor copies, one
// warpgroup that fetches and two that multiply, a persistent grid. TILE_ROWS 64 or 128, COLUMN_TILE 64, 128 or 256. Needs tiles.cuh,
// attention_hopper.cuh and expert_tiles.cuh in front, which says what is computed and what a tile is.
//
// extern "C" multiply_expert_tiles_hopper(
//   left_map, right_map, second_left_map, second_right_map: tensor maps by value (see attention_hopper.cuh): rows [P, 1, K] with
//   TILE_ROWS box rows, stacks [K, X, N] with 64, or [N, X, K] with COLUMN_TILE box rows where they are TURNED or SECOND_TURNED; then
//   bias f32 [X, N] or null, tiles u32 [tiles, 3], out u16*, tiles, N, K, K of the second (0 = none), out_pitch, scale, accumulate)
//   grid min(multiprocessors, tiles * ceil(N / COLUMN_TILE)), block 384,
//   dynamic shared memory STAGES * (TILE_ROWS + COLUMN_TILE) * 128 + 16 * 1024 + 256 bytes.
// With 128 rows each multiplying warpgroup has 64 of them and all columns, with 64 rows it has all rows and half of the columns, so
// that COLUMN_TILE is 128 at least.

constexpr int OWN_COLUMNS = TILE_ROWS == 128 ? COLUMN_TILE : COLUMN_TILE / 2;
static_assert(OWN_COLUMNS >= 64, "a warpgroup stores pieces of 64 columns");
constexpr int PIECE_BYTES = STEP * 128;
constexpr int STAGED_AT = STAGES * STAGE_BYTES;
constexpr int STAGED_BYTES = 16 * 128;
constexpr int FULL_AT = STAGED_AT + 8 * STAGED_BYTES;
constexpr int EMPTY_AT = FULL_AT + STAGES * 8;

struct StagePlace {
    int slot, parity;
    INLINE void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

// A tile of the result; no rows = no work.
struct Item {
    int expert, first_row, rows, first;
    INLINE Item(const u32* tiles, int item, int across) {
        const u32* tile = tiles + 3 * (item / across);
        expert = tile[0], first_row = tile[1], rows = tile[2];
        first = item % across * COLUMN_TILE;
    }
};

struct Steps {
    int main, all;
    INLINE Steps(int inner, int second_inner) {
        main = (inner + STEP - 1) / STEP;
        all = main + (second_inner + STEP - 1) / STEP;
    }
};

template <bool IS_TURNED>
INLINE void fetch_stack(const TensorMap& map, u32 tile, u32 barrier, const Item& item, int k) {
    if (IS_TURNED) {
        copy_box(tile, map, barrier, k, item.expert, item.first);
        return;
    }
#pragma unroll
    for (int piece = 0; piece < COLUMN_TILE / 64; ++piece)
        copy_box(tile + piece * PIECE_BYTES, map, barrier, item.first + piece * 64, item.expert, k);
}

// Begins to add up to STEP of the summed index.
template <bool IS_TURNED>
INLINE void begin_step(float (&sums)[OWN_COLUMNS / 2], u32 left, u32 right, int depth, bool is_first) {
#pragma unroll
    for (int k = 0; k < STEP / 16; ++k) {
        if (k * 16 >= depth) break;
        u64 a = operand(left + k * 32, 0);
        u64 b = operand(right + k * (IS_TURNED ? 32 : 2048), PIECE_BYTES);
        wgmma_shared<0, IS_TURNED ? 0 : 1>(sums, a, b, !is_first || k > 0);
    }
}

// Stores a warp's 16 rows: with what they are added to, or by 16 bytes a thread through shared memory.
INLINE void store_rows(
    float (&sums)[OWN_COLUMNS / 2], const Finish& finish, const Item& item, unsigned char* staged, half_bits* out, int columns,
    int pitch, int own_row, int first, int lane) {
    u64 bias_row = (u64)item.expert * columns;
    if (finish.accumulate) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = own_row + half * 8 + (lane >> 2);
            if (row >= item.rows) continue;
#pragma unroll
            for (int n = 0; n < OWN_COLUMNS / 8; ++n) {
                int column = first + n * 8 + (lane & 3) * 2;
                if (column < columns)
                    store_two(
                        finish, out + (u64)(item.first_row + row) * pitch, bias_row, column, sums[n * 4 + half * 2],
                        sums[n * 4 + half * 2 + 1]);
            }
        }
        return;
    }
#pragma unroll
    for (int piece = 0; piece < OWN_COLUMNS / 64; ++piece) {
        if (first + piece * 64 >= columns) break;
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = half * 8 + (lane >> 2);
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                int column = first + piece * 64 + n * 8 + (lane & 3) * 2, i = (piece * 8 + n) * 4 + half * 2;
                float low = sums[i] * finish.scale, high = sums[i + 1] * finish.scale;
                if (finish.biased && column < columns) {
                    float2 added = *(const float2*)(finish.bias + bias_row + column);
                    low += added.x, high += added.y;
                }
                *(u32*)(staged + row * 128 + ((n ^ (row & 7)) << 4) + (lane & 3) * 4) = two_halves(low, high);
            }
        }
        __syncwarp();
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            int row = part * 4 + lane / 8, chunk = lane % 8, column = first + piece * 64 + chunk * 8;
            // Columns are a multiple of 8, so that a chunk is there or it is not.
            if (own_row + row < item.rows && column < columns)
                *(uint4*)(out + (u64)(item.first_row + own_row + row) * pitch + column) =
                    *(const uint4*)(staged + row * 128 + ((chunk ^ (row & 7)) << 4));
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) multiply_expert_tiles_hopper(
    const __grid_constant__ TensorMap left_map, const __grid_constant__ TensorMap right_map,
    const __grid_constant__ TensorMap second_left_map, const __grid_constant__ TensorMap second_right_map, const float* bias,
    const u32* tiles, half_bits* out, u32 tile_count, u32 columns, u32 inner, u32 second_inner, u32 pitch, float scale,
    u32 accumulate) {
    u32 base = shared_address(dynamic_shared);
    int across = (columns + COLUMN_TILE - 1) / COLUMN_TILE, items = tile_count * across;
    Steps steps(inner, second_inner);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_initialise(base + FULL_AT + stage * 8, 1);
            barrier_initialise(base + EMPTY_AT + stage * 8, 8);
        }
        fence_barrier_initialisation();
    }
    __syncthreads();
    StagePlace place = {0, 0};
    if (threadIdx.x < 128) {
        give_up_registers<40>();
        if (threadIdx.x > 0) return;
        for (int number = blockIdx.x; number < items; number += gridDim.x) {
            Item item(tiles, number, across);
            if (item.rows == 0) continue;
            for (int step = 0; step < steps.all; ++step) {
                u32 stage = base + place.slot * STAGE_BYTES, full = base + FULL_AT + place.slot * 8;
                barrier_wait(base + EMPTY_AT + place.slot * 8, place.parity ^ 1);
                barrier_expect_bytes(full, STAGE_BYTES);
                if (step < steps.main) {
                    copy_box(stage, left_map, full, step * STEP, 0, item.first_row);
                    fetch_stack<TURNED>(right_map, stage + LEFT_BYTES, full, item, step * STEP);
                } else {
                    int k = (step - steps.main) * STEP;
                    copy_box(stage, second_left_map, full, k, 0, item.first_row);
                    fetch_stack<SECOND_TURNED>(second_right_map, stage + LEFT_BYTES, full, item, k);
                }
                place.advance();
            }
        }
        return;
    }
    take_registers<232>();
    int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    int own_row = TILE_ROWS == 128 ? group * 64 : 0, own_column = TILE_ROWS == 128 ? 0 : group * OWN_COLUMNS;
    unsigned char* staged = dynamic_shared + STAGED_AT + (group * 4 + warp) * STAGED_BYTES;
    Finish finish = {bias, scale, bias != nullptr, accumulate};
    for (int number = blockIdx.x; number < items; number += gridDim.x) {
        Item item(tiles, number, across);
        // The shuffle tells the compiler that a warp agrees: products must not start in code that might diverge.
        item.rows = __shfl_sync(0xffffffffu, item.rows, 0);
        if (item.rows == 0) continue;
        float sums[OWN_COLUMNS / 2];
        int before = 0;
        for (int step = 0; step < steps.all; ++step) {
            barrier_wait(base + FULL_AT + place.slot * 8, place.parity);
            u32 stage = base + place.slot * STAGE_BYTES, left_tile = stage + own_row * 128;
            wgmma_fence();
            // 64 columns and 64 turned rows take as many bytes.
            u32 right_tile = stage + LEFT_BYTES + own_column * 128;
            if (step < steps.main)
                begin_step<TURNED>(sums, left_tile, right_tile, (int)inner - step * STEP, step == 0);
            else
                begin_step<SECOND_TURNED>(
                    sums, left_tile, right_tile, (int)second_inner - (step - steps.main) * STEP, step == 0);
            wgmma_commit();
            if (step > 0) {
                wgmma_wait<1>();
                if (lane == 0) barrier_arrive(base + EMPTY_AT + before * 8);
            }
            before = place.slot;
            place.advance();
        }
        wgmma_wait<0>();
        pin(sums);
        if (lane == 0) barrier_arrive(base + EMPTY_AT + before * 8);
        store_rows(
            sums, finish, item, staged, out, columns, pitch, own_row + warp * 16, item.first + own_column, lane);
    }
}
