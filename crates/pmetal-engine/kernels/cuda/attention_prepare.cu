// What both backward forms (attention_backward.cu and attention_backward_hopper.cu) start and end with.
// Needs attention_common.cuh in front, and attention_hopper.cuh where the form does; compile it with the text of the form.
//
// extern "C" attention_backward_prepare(out u16*, out_pitch i32, d_out u16*, d_out_pitch i32, lse f32* [Tq, H],
//   key_begin i32*, key_end i32* [Tq], row_log f32* [H, Tp], row_delta f32* [H, Tp], row_bounds i32* [2, Tp] or null,
//   dq_sums f32* or null, query_rows i32, query_heads i32)
//   grid (H, Tp / 64), block 256, no dynamic shared memory; Tp = ceil(Tq / 128) * 128. Sets dq_sums to zero.
// extern "C" attention_backward_sinks(sinks f32* [H], row_log f32*, row_delta f32*, d_sinks f32* [H], query_rows i32)
//   grid (H), block 256. Adds to d_sinks; its order of summation is fixed.

#ifndef DQ_SUM_WIDTH
#define DQ_SUM_WIDTH KEY_PAD
#endif

constexpr int PREPARE_ROWS = 64;
constexpr int PREPARE_THREADS = 256;

// row_log = lse in base 2, +inf for rows that see nothing or do not exist, which makes every probability of theirs zero;
// row_delta = the sum of out * d_out over a row.
extern "C" __global__ void __launch_bounds__(PREPARE_THREADS) attention_backward_prepare(
    const half_bits* __restrict__ out, int out_pitch, const half_bits* __restrict__ d_out, int d_out_pitch,
    const float* __restrict__ lse, const int* __restrict__ key_begin, const int* __restrict__ key_end, float* __restrict__ row_log,
    float* __restrict__ row_delta, int* __restrict__ row_bounds, float* __restrict__ dq_sums, int query_rows, int query_heads) {
    constexpr int LANES = VALUE_WIDTH <= 64 ? 8 : VALUE_WIDTH <= 128 ? 16 : 32;
    int head = blockIdx.x;
    int first_row = blockIdx.y * PREPARE_ROWS;
    int padded_rows = gridDim.y * PREPARE_ROWS;
    int part = threadIdx.x % LANES;
#pragma unroll
    for (int start = 0; start < PREPARE_ROWS; start += PREPARE_THREADS / LANES) {
        int row = first_row + start + threadIdx.x / LANES;
        float sum = 0.0f;
        if (row < query_rows && part * 8 < VALUE_WIDTH) {
            uint4 a = *(const uint4*)(out + (long long)row * out_pitch + head * VALUE_WIDTH + part * 8);
            uint4 b = *(const uint4*)(d_out + (long long)row * d_out_pitch + head * VALUE_WIDTH + part * 8);
            sum = low_half(a.x) * low_half(b.x) + high_half(a.x) * high_half(b.x) + low_half(a.y) * low_half(b.y) +
                  high_half(a.y) * high_half(b.y) + low_half(a.z) * low_half(b.z) + high_half(a.z) * high_half(b.z) +
                  low_half(a.w) * low_half(b.w) + high_half(a.w) * high_half(b.w);
        }
#pragma unroll
        for (int distance = LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (part == 0) {
            float log = row < query_rows ? lse[(long long)row * query_heads + head] : negative_infinity();
            long long target = (long long)head * padded_rows + row;
            row_log[target] = log == negative_infinity() ? positive_infinity() : log * LOG2_E;
            row_delta[target] = sum;
        }
    }
    if (row_bounds && head == 0 && threadIdx.x < PREPARE_ROWS) {
        int row = first_row + threadIdx.x;
        row_bounds[row] = row < query_rows ? key_begin[row] : 0;
        row_bounds[padded_rows + row] = row < query_rows ? key_end[row] : 0;
    }
    if (dq_sums) {
        float4* sums = (float4*)(dq_sums + ((long long)head * padded_rows + first_row) * DQ_SUM_WIDTH);
        for (int index = threadIdx.x; index < PREPARE_ROWS * DQ_SUM_WIDTH / 4; index += PREPARE_THREADS)
            sums[index] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
}

// A sink's probability in a row is exp(sink - lse), and what it takes from the others is that times row_delta.
extern "C" __global__ void __launch_bounds__(PREPARE_THREADS) attention_backward_sinks(
    const float* __restrict__ sinks, const float* __restrict__ row_log, const float* __restrict__ row_delta,
    float* __restrict__ d_sinks, int query_rows) {
    __shared__ float partial[PREPARE_THREADS];
    int head = blockIdx.x;
    long long base = (long long)head * ((query_rows + 127) / 128 * 128);
    float sink = sinks[head] * LOG2_E;
    float sum = 0.0f;
    for (int row = threadIdx.x; row < query_rows; row += PREPARE_THREADS)
        sum -= exp2_fast(sink - row_log[base + row]) * row_delta[base + row];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int distance = PREPARE_THREADS / 2; distance > 0; distance /= 2) {
        if (threadIdx.x < distance) partial[threadIdx.x] += partial[threadIdx.x + distance];
        __syncthreads();
    }
    if (threadIdx.x == 0) d_sinks[head] += partial[0];
}
