// Products of the rows of each expert with its matrices, in f32, for any types; matrix units have kernels of their own.
// Rows are divided into tiles u32 [tiles, 3]: expert, first row, rows (at most TILE_ROWS, a multiple of 16; 0 = no tile).
//
// multiply_experts  grid (ceil(N / 64), tiles), group 256: out ELEMENT [P, N] = scale * (left right_e + second left second
//                   right_e) (+ bias f32 [X, N]) (+ out when `accumulate`). Left operands are SOURCE [P, K], right ones stacks
//                   of WEIGHT and SECOND [X, K, N], or [X, N, K] with TURNED and SECOND_TURNED. `second_inner` = 0: none.
// expert_gradients  grid (ceil(M / 64), ceil(N / 64), X), group 256: out f32 [X, M, N] += scale * left^T right over an expert's
//                   rows offsets[e] .. offsets[e + 1]; left and right SOURCE [P, M] and [P, N]
// expert_sums       grid (ceil(N / 128), X), group 128: out f32 [X, N] += the sums over an expert's rows of left
// Bytes: left once for every 64 columns, right once for every tile.

#ifndef TILE_ROWS
#define TILE_ROWS 16
#endif
#ifndef SECOND
#define SECOND f32
#endif
#ifndef TURNED
#define TURNED 0
#endif
#ifndef SECOND_TURNED
#define SECOND_TURNED 0
#endif

#define STEP 16
#define COLUMNS 64
#define ROWS_A_THREAD (TILE_ROWS / 16)

// Adds a tile's product with one expert's matrix to the sums of a thread: every 16th row and column.
template <typename R, bool IS_TURNED>
DEVICE void add_product(
    POSITION const GLOBAL SOURCE* left, const GLOBAL R* right, uint rows, uint columns, uint inner, uint pitch,
    SHARED_POINTER(float) left_tile, SHARED_POINTER(float) right_tile, LOCAL float* sums) {
    uint own_row = THREAD / 16, own_column = THREAD % 16, first_column = GROUP_X * COLUMNS;
    for (uint start = 0; start < inner; start += STEP) {
        BARRIER();
        for (uint i = THREAD; i < TILE_ROWS * STEP; i += 256) {
            uint row = i / STEP, k = start + i % STEP;
            left_tile[row * (STEP + 1) + i % STEP] =
                row < rows && k < inner ? widen(left[(ulong64)row * pitch + k]) : 0.0f;
        }
        for (uint i = THREAD; i < STEP * COLUMNS; i += 256) {
            // Neighbouring threads read neighbouring elements.
            uint k = IS_TURNED ? i % STEP : i / COLUMNS, column = IS_TURNED ? i / STEP : i % COLUMNS;
            bool present = start + k < inner && first_column + column < columns;
            ulong64 place = IS_TURNED ? (ulong64)(first_column + column) * inner + start + k
                                      : (ulong64)(start + k) * columns + first_column + column;
            right_tile[k * (COLUMNS + 1) + column] = present ? widen(right[place]) : 0.0f;
        }
        BARRIER();
        for (uint k = 0; k < STEP; ++k) {
            float values[4];
            UNROLL for (uint j = 0; j < 4; ++j) values[j] = right_tile[k * (COLUMNS + 1) + own_column + 16 * j];
            UNROLL for (uint i = 0; i < ROWS_A_THREAD; ++i) {
                float value = left_tile[(own_row + 16 * i) * (STEP + 1) + k];
                UNROLL for (uint j = 0; j < 4; ++j) sums[i * 4 + j] += value * values[j];
            }
        }
    }
}

KERNEL(multiply_experts)(GIVEN_POSITION
    const GLOBAL SOURCE* left, const GLOBAL WEIGHT* right, const GLOBAL SOURCE* second_left,
    const GLOBAL SECOND* second_right, const GLOBAL float* bias, const GLOBAL uint* tiles, GLOBAL ELEMENT* out,
    SCALAR(uint, columns), SCALAR(uint, inner), SCALAR(uint, second_inner), SCALAR(uint, pitch), SCALAR(uint, second_pitch),
    SCALAR(uint, out_pitch), SCALAR(float, scale), SCALAR(uint, biased), SCALAR(uint, accumulate)) {
    SHARED float left_tile[TILE_ROWS * (STEP + 1)];
    SHARED float right_tile[STEP * (COLUMNS + 1)];
    uint expert = tiles[3 * GROUP_Y], first = tiles[3 * GROUP_Y + 1], rows = tiles[3 * GROUP_Y + 2];
    if (rows == 0) return;
    float sums[ROWS_A_THREAD * 4];
    UNROLL for (uint i = 0; i < ROWS_A_THREAD * 4; ++i) sums[i] = 0.0f;
    add_product<WEIGHT, TURNED>(
        HERE left + (ulong64)first * pitch, right + (ulong64)expert * inner * columns, rows, columns, inner, pitch, left_tile,
        right_tile, sums);
    if (second_inner > 0) {
        add_product<SECOND, SECOND_TURNED>(
            HERE second_left + (ulong64)first * second_pitch, second_right + (ulong64)expert * second_inner * columns, rows,
            columns, second_inner, second_pitch, left_tile, right_tile, sums);
    }
    UNROLL for (uint i = 0; i < ROWS_A_THREAD; ++i) {
        uint row = THREAD / 16 + 16 * i;
        if (row >= rows) continue;
        UNROLL for (uint j = 0; j < 4; ++j) {
            uint column = GROUP_X * COLUMNS + THREAD % 16 + 16 * j;
            if (column >= columns) continue;
            GLOBAL ELEMENT* place = out + (ulong64)(first + row) * out_pitch + column;
            float value = scale * sums[i * 4 + j];
            if (biased) value += bias[(ulong64)expert * columns + column];
            if (accumulate) value += widen(*place);
            narrow(value, place);
        }
    }
}

KERNEL(expert_gradients)(GIVEN_POSITION
    const GLOBAL SOURCE* left, const GLOBAL SOURCE* right, const GLOBAL uint* offsets, GLOBAL float* out,
    SCALAR(uint, left_columns), SCALAR(uint, right_columns), SCALAR(uint, left_pitch), SCALAR(uint, right_pitch),
    SCALAR(float, scale)) {
    SHARED float left_tile[STEP * (COLUMNS + 1)];
    SHARED float right_tile[STEP * (COLUMNS + 1)];
    uint begin = offsets[GROUP_Z], end = offsets[GROUP_Z + 1];
    if (begin == end) return;
    uint own_row = THREAD / 16, own_column = THREAD % 16;
    float sums[16];
    UNROLL for (uint i = 0; i < 16; ++i) sums[i] = 0.0f;
    for (uint start = begin; start < end; start += STEP) {
        BARRIER();
        for (uint i = THREAD; i < STEP * COLUMNS; i += 256) {
            uint row = start + i / COLUMNS, column = i % COLUMNS, place = i / COLUMNS * (COLUMNS + 1) + column;
            uint left_column = GROUP_X * COLUMNS + column, right_column = GROUP_Y * COLUMNS + column;
            left_tile[place] = row < end && left_column < left_columns
                                   ? widen(left[(ulong64)row * left_pitch + left_column])
                                   : 0.0f;
            right_tile[place] = row < end && right_column < right_columns
                                    ? widen(right[(ulong64)row * right_pitch + right_column])
                                    : 0.0f;
        }
        BARRIER();
        for (uint k = 0; k < STEP; ++k) {
            UNROLL for (uint i = 0; i < 4; ++i) {
                float value = left_tile[k * (COLUMNS + 1) + own_row + 16 * i];
                UNROLL for (uint j = 0; j < 4; ++j)
                    sums[i * 4 + j] += value * right_tile[k * (COLUMNS + 1) + own_column + 16 * j];
            }
        }
    }
    UNROLL for (uint i = 0; i < 16; ++i) {
        uint row = GROUP_X * COLUMNS + own_row + 16 * (i / 4), column = GROUP_Y * COLUMNS + own_column + 16 * (i % 4);
        if (row >= left_columns || column >= right_columns) continue;
        out[((ulong64)GROUP_Z * left_columns + row) * right_columns + column] += scale * sums[i];
    }
}

KERNEL(expert_sums)(GIVEN_POSITION
    const GLOBAL SOURCE* left, const GLOBAL uint* offsets, GLOBAL float* out, SCALAR(uint, columns), SCALAR(uint, pitch)) {
    uint column = GROUP_X * THREADS + THREAD;
    if (column >= columns) return;
    float sum = 0.0f;
    for (uint row = offsets[GROUP_Y]; row < offsets[GROUP_Y + 1]; ++row) sum += widen(left[(ulong64)row * pitch + column]);
    out[(ulong64)GROUP_Y * columns + column] += sum;
}
