// Products of the rows of each expert with its matrices, by wgmma: compute capability 9.0, TILE_ROWS 64 or 128. Needs tiles.cuh,
// attention_hopper.cuh and expert_tiles.cuh in front, which says what multiply_expert_tiles_hopper takes.
//
// With 128 rows each of the two warpgroups has 64 of them and all columns, with 64 rows it has all rows and 64 columns. A block
// waits for its products before the next step, because others on the same multiprocessor go on meanwhile.

constexpr int OWN_COLUMNS = TILE_ROWS == 128 ? 128 : 64;
// Steps whose copies were begun before their products are.
constexpr int AHEAD = STAGES - 1;

// Tiles in pieces of 64 columns, as wgmma reads them.
template <bool IS_TURNED>
INLINE void copy_pieces(const Operands& from, u32 tile, int k, int first, int columns) {
    constexpr int CHUNKS = IS_TURNED ? STEP / 8 : COLUMN_TILE / 8;
    constexpr int ROWS = IS_TURNED ? COLUMN_TILE : STEP;
    int chunk = threadIdx.x % CHUNKS;
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / BLOCK; ++i) {
        int row = threadIdx.x / CHUNKS + i * (BLOCK / CHUNKS);
        int column = IS_TURNED ? first + row : first + chunk * 8, at = IS_TURNED ? k + chunk * 8 : k + row;
        // What is in these columns reaches no result.
        if (column >= columns) continue;
        // Sizes are multiples of 8, so that a chunk is there or it is not.
        bool present = at < (int)from.inner;
        u64 place = IS_TURNED ? (u64)column * from.inner + at : (u64)at * columns + column;
        u32 target = IS_TURNED ? tile_offset<64>(row, chunk) : chunk / 8 * (STEP * 128) + tile_offset<64>(row, chunk % 8);
        copy_bytes_async(tile + target, present ? from.right + place : from.right, present ? 16 : 0);
    }
}

// Begins to add up to STEP of the summed index.
template <bool IS_TURNED>
INLINE void begin_step(float (&sums)[OWN_COLUMNS / 2], u32 left, u32 right, int depth, bool is_first) {
#pragma unroll
    for (int k = 0; k < STEP / 16; ++k) {
        if (k * 16 >= depth) break;
        u64 a = operand(left + k * 32, 0);
        u64 b = operand(right + k * (IS_TURNED ? 32 : 2048), STEP * 128);
        wgmma_shared<0, IS_TURNED ? 0 : 1>(sums, a, b, !is_first || k > 0);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) multiply_expert_tiles_hopper(
    const half_bits* left, const half_bits* right, const half_bits* second_left, const half_bits* second_right,
    const float* bias, const u32* tiles, half_bits* out, u32 columns, u32 inner, u32 second_inner, u32 pitch, u32 second_pitch,
    u32 out_pitch, float scale, u32 biased, u32 accumulate) {
    u32 expert = tiles[3 * blockIdx.y], first_row = tiles[3 * blockIdx.y + 1];
    int rows = tiles[3 * blockIdx.y + 2];
    if (rows == 0) return;
    int first = blockIdx.x * COLUMN_TILE, group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    int own_row = TILE_ROWS == 128 ? group * 64 : 0, own_column = TILE_ROWS == 128 ? 0 : group * 64;
    Operands main = {left + (u64)first_row * pitch, right + (u64)expert * inner * columns, pitch, inner};
    Operands second = {
        second_left + (u64)first_row * second_pitch, second_right + (u64)expert * second_inner * columns, second_pitch,
        second_inner};
    int main_steps = (inner + STEP - 1) / STEP, steps = main_steps + (second_inner + STEP - 1) / STEP;
    u32 shared = shared_address(dynamic_shared);
    auto copy = [&](int step) {
        u32 stage = shared + step % STAGES * STAGE_BYTES;
        if (step < main_steps) {
            copy_left(main, stage, step * STEP, rows);
            copy_pieces<TURNED>(main, stage + LEFT_BYTES, step * STEP, first, columns);
        } else {
            int k = (step - main_steps) * STEP;
            copy_left(second, stage, k, rows);
            copy_pieces<SECOND_TURNED>(second, stage + LEFT_BYTES, k, first, columns);
        }
    };
#pragma unroll
    for (int step = 0; step < AHEAD; ++step) {
        if (step < steps) copy(step);
        commit_copies();
    }
    float sums[OWN_COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < OWN_COLUMNS / 2; ++i) sums[i] = 0.0f;
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<AHEAD - 1>();
        fence_shared_for_engines();
        // Every warpgroup has finished the products of the slot that is copied to next.
        __syncthreads();
        u32 stage = shared + step % STAGES * STAGE_BYTES, left_tile = stage + own_row * 128;
        // A piece of 64 columns and 64 rows of 64 take as many bytes.
        u32 right_tile = stage + LEFT_BYTES + own_column * 128;
        wgmma_fence();
        if (step < main_steps)
            begin_step<TURNED>(sums, left_tile, right_tile, (int)inner - step * STEP, step == 0);
        else
            begin_step<SECOND_TURNED>(
                sums, left_tile, right_tile, (int)second_inner - (step - main_steps) * STEP, step == 0);
        wgmma_commit();
        if (step + AHEAD < steps) copy(step + AHEAD);
        commit_copies();
        wgmma_wait<0>();
    }
    pin(sums);
    Finish finish = {bias, scale, biased, accumulate};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = own_row + warp * 16 + half * 8 + (lane >> 2);
        if (row >= rows) continue;
        half_bits* out_row = out + (u64)(first_row + row) * out_pitch;
#pragma unroll
        for (int n = 0; n < OWN_COLUMNS / 8; ++n) {
            int column = first + own_column + n * 8 + (lane & 3) * 2;
            if (column >= (int)columns) continue;
            store_two(finish, out_row, (u64)expert * columns, column, sums[n * 4 + half * 2], sums[n * 4 + half * 2 + 1]);
        }
    }
}
