// Gradients of the matrices of experts, on matrix units: out f32 of each expert += scale * sum over its rows of wide[row, .]
// thin[row, .]. Compute capability 8.0 and above. Needs tiles.cuh in front.
//
// expert_gradient_tiles(wide, thin, offsets u32 [X + 1], out, W, S, pitches of wide and thin, strides of a wide and of a thin
//                       column in out, elements of an expert in out, scale)
//   grid (ceil(W / 128), ceil(S / THIN_TILE), X), block 256, dynamic shared memory STAGES * 128 * (128 + THIN_TILE) bytes.
// THIN_TILE is 32, 64 or 128. Pitches are multiples of 8 elements, addresses of 16 bytes. Rows are summed in their order.
// Bytes: wide once for every THIN_TILE columns of thin, thin once for every 128 of wide, the outputs of experts that have rows
// read and written.

constexpr int WIDE_TILE = 128;
constexpr int STEP = 64;
constexpr int BLOCK = 256;
constexpr int WIDE_BYTES = STEP * WIDE_TILE * 2;
constexpr int STAGE_BYTES = WIDE_BYTES + STEP * THIN_TILE * 2;
constexpr int WARPS_ACROSS = THIN_TILE / 32;
constexpr int WARP_ROWS = WIDE_TILE / (8 / WARPS_ACROSS);
constexpr int M_TILES = WARP_ROWS / 16;

// STEP rows from `row` on, and WIDTH columns from `first` on; zeros behind the end of either.
template <int WIDTH>
INLINE void copy_rows(const half_bits* from, u32 pitch, u32 tile, u32 row, u32 end, int first, int columns) {
    constexpr int CHUNKS = WIDTH / 8;
    int chunk = threadIdx.x % CHUNKS, bytes = min(max((columns - first - chunk * 8) * 2, 0), 16);
#pragma unroll
    for (int i = 0; i < STEP * CHUNKS / BLOCK; ++i) {
        u32 own = threadIdx.x / CHUNKS + i * (BLOCK / CHUNKS);
        bool present = row + own < end && bytes > 0;
        const half_bits* source = present ? from + (u64)(row + own) * pitch + first + chunk * 8 : from;
        copy_bytes_async(tile + tile_offset<WIDTH>(own, chunk), source, present ? bytes : 0);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2) expert_gradient_tiles(
    const half_bits* wide, const half_bits* thin, const u32* offsets, float* out, u32 wide_columns, u32 thin_columns,
    u32 wide_pitch, u32 thin_pitch, u32 wide_stride, u32 thin_stride, u64 expert_stride, float scale) {
    u32 begin = offsets[blockIdx.z], end = offsets[blockIdx.z + 1];
    if (begin == end) return;
    int wide_first = blockIdx.x * WIDE_TILE, thin_first = blockIdx.y * THIN_TILE;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int warp_row = warp / WARPS_ACROSS * WARP_ROWS, warp_column = warp % WARPS_ACROSS * 32;
    int steps = (end - begin + STEP - 1) / STEP;
    u32 shared = shared_address(dynamic_shared);
    auto copy = [&](int step) {
        u32 stage = shared + step % STAGES * STAGE_BYTES, row = begin + step * STEP;
        copy_rows<WIDE_TILE>(wide, wide_pitch, stage, row, end, wide_first, wide_columns);
        copy_rows<THIN_TILE>(thin, thin_pitch, stage + WIDE_BYTES, row, end, thin_first, thin_columns);
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) copy(step);
        commit_copies();
    }
    float sums[M_TILES][4][4] = {};
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) copy(step + STAGES - 1);
        commit_copies();
        u32 stage = shared + step % STAGES * STAGE_BYTES;
        int depth = (int)(end - begin) - step * STEP;
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            if (k >= depth) break;
            u32 left[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
                load_matrices_transposed(left[m], right_address<WIDE_TILE>(stage, k, warp_row / 8 + m * 2, lane));
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                u32 right[4];
                load_matrices_transposed(
                    right, left_address<THIN_TILE>(stage + WIDE_BYTES, k, warp_column / 8 + n, lane));
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    multiply_add(sums[m][n], left[m], right[0], right[1]);
                    multiply_add(sums[m][n + 1], left[m], right[2], right[3]);
                }
            }
        }
    }
    out += blockIdx.z * expert_stride;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                u32 row = wide_first + warp_row + m * 16 + (lane >> 2) + (i >> 1) * 8;
                u32 column = thin_first + warp_column + n * 8 + (lane & 3) * 2 + (i & 1);
                if (row >= wide_columns || column >= thin_columns) continue;
                float* place = out + (u64)row * wide_stride + (u64)column * thin_stride;
                *place += scale * sums[m][n][i];
            }
}
