// Products of the rows of each expert with its matrices, by mma.sync: compute capability 8.0 and above, TILE_ROWS 16, 64 or 128.
// Needs tiles.cuh and expert_tiles.cuh in front, which says what is computed; COLUMN_TILE is 128.
//
// multiply_expert_tiles(left, right, second_left, second_right, bias f32 [X, N], tiles u32 [tiles, 3], out, N, K, K of the second
//     (0 = none), pitches of left, second left and out, scale, biased, accumulate)
//   grid (ceil(N / 128), tiles), block 256, dynamic shared memory STAGES * (TILE_ROWS + 128) * 128 bytes.

constexpr int BLOCK = 256;
// Warps side by side, and what each computes.
constexpr int WARPS_ACROSS = TILE_ROWS == 16 ? 8 : 4;
constexpr int WARP_ROWS = TILE_ROWS / (8 / WARPS_ACROSS);
constexpr int WARP_COLUMNS = COLUMN_TILE / WARPS_ACROSS;
constexpr int M_TILES = WARP_ROWS / 16;
constexpr int N_TILES = WARP_COLUMNS / 8;

// One of the two products, from the first row of a tile on and for its expert.
struct Operands {
    const half_bits* left;
    const half_bits* right;
    u32 pitch, inner;
};

// Rows of the tile, STEP of the summed index from k on.
INLINE void copy_left(const Operands& from, u32 tile, int k, int rows) {
    int chunk = threadIdx.x % 8, bytes = min(max(((int)from.inner - k - chunk * 8) * 2, 0), 16);
#pragma unroll
    for (int row = threadIdx.x / 8; row < TILE_ROWS; row += BLOCK / 8) {
        bool present = row < rows && bytes > 0;
        const half_bits* source = present ? from.left + (u64)row * from.pitch + k + chunk * 8 : from.left;
        copy_bytes_async(tile + tile_offset<STEP>(row, chunk), source, present ? bytes : 0);
    }
}

template <bool IS_TURNED>
INLINE void copy_right(const Operands& from, u32 tile, int k, int first, int columns) {
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
        u32 target = IS_TURNED ? tile_offset<STEP>(row, chunk) : tile_offset<COLUMN_TILE>(row, chunk);
        copy_bytes_async(tile + target, present ? from.right + place : from.right, present ? 16 : 0);
    }
}

// Adds up to STEP of the summed index to a warp's sums, of which so many columns are in the result.
template <bool IS_TURNED>
INLINE void multiply_step(
    float (&sums)[M_TILES][N_TILES][4], u32 stage, int depth, int columns, int warp_row, int warp_column, int lane) {
    u32 right_tile = stage + LEFT_BYTES;
#pragma unroll
    for (int k = 0; k < STEP; k += 16) {
        if (k >= depth || columns <= 0) break;
        u32 left[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
            load_matrices(left[m], left_address<STEP>(stage, warp_row + m * 16, k / 8, lane));
#pragma unroll
        for (int n = 0; n < N_TILES; n += 2) {
            if (n * 8 >= columns) break;
            u32 right[4];
            if (IS_TURNED)
                load_matrices(right, right_address<STEP>(right_tile, warp_column + n * 8, k / 8, lane));
            else
                load_matrices_transposed(right, left_address<COLUMN_TILE>(right_tile, k, warp_column / 8 + n, lane));
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                multiply_add(sums[m][n], left[m], right[0], right[1]);
                multiply_add(sums[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2) multiply_expert_tiles(
    const half_bits* left, const half_bits* right, const half_bits* second_left, const half_bits* second_right,
    const float* bias, const u32* tiles, half_bits* out, u32 columns, u32 inner, u32 second_inner, u32 pitch, u32 second_pitch,
    u32 out_pitch, float scale, u32 biased, u32 accumulate) {
    u32 expert = tiles[3 * blockIdx.y], first_row = tiles[3 * blockIdx.y + 1];
    int rows = tiles[3 * blockIdx.y + 2];
    if (rows == 0) return;
    int first = blockIdx.x * COLUMN_TILE, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int warp_row = warp / WARPS_ACROSS * WARP_ROWS, warp_column = warp % WARPS_ACROSS * WARP_COLUMNS;
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
            copy_right<TURNED>(main, stage + LEFT_BYTES, step * STEP, first, columns);
        } else {
            int k = (step - main_steps) * STEP;
            copy_left(second, stage, k, rows);
            copy_right<SECOND_TURNED>(second, stage + LEFT_BYTES, k, first, columns);
        }
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) copy(step);
        commit_copies();
    }
    float sums[M_TILES][N_TILES][4] = {};
    int own_columns = (int)columns - first - warp_column;
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) copy(step + STAGES - 1);
        commit_copies();
        u32 stage = shared + step % STAGES * STAGE_BYTES;
        if (step < main_steps)
            multiply_step<TURNED>(sums, stage, (int)inner - step * STEP, own_columns, warp_row, warp_column, lane);
        else
            multiply_step<SECOND_TURNED>(
                sums, stage, (int)second_inner - (step - main_steps) * STEP, own_columns, warp_row, warp_column, lane);
    }
    Finish finish = {bias, scale, biased, accumulate};
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = warp_row + m * 16 + half * 8 + (lane >> 2);
            if (row >= rows) continue;
            half_bits* out_row = out + (u64)(first_row + row) * out_pitch;
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                int column = first + warp_column + n * 8 + (lane & 3) * 2;
                if (column >= (int)columns) continue;
                store_two(finish, out_row, (u64)expert * columns, column, sums[m][n][half * 2], sums[m][n][half * 2 + 1]);
            }
        }
}
