// RMSNorm (Zhang and Sennrich, arXiv 1910.07467) of rows of ELEMENT with a weight of WEIGHT, in f32 inside.
//
// Row r of x starts at (r / inner) * pitch + (r % inner) * width, so that heads inside a wider array can be normed; rows
// of the result lie out_pitch apart, or, for inner > 1, as those of x with out_pitch for pitch.
// `shift` is added to the weight: 1 for the Gemma families. `weighted` = 0: no weight is read.
// Bytes: forward 2 rows, backward 3 (4 when it accumulates). ALIGNED: width, pitches and addresses are multiples of 8
// elements and 16 bytes; a thread then holds VECTORS times 8 elements of its row, so that each is read once.
//
// rms_norm           grid rows, group 32..1024 threads, or with SIMD_ROWS a row for each SIMD group of 128 threads, grid
//                    ceil(rows / 4); with CODES (and ALIGNED, inner = 1, no SIMD_ROWS) the result is also rounded, as
//                    quantise_rows of fp8.cpp does: codes [rows, width] and scales [rows]; one more byte an element
// rms_norm_backward  the same; d_x is overwritten, or added to when `accumulate`
// rms_scales         grid rows: 1 / rms of each row to f32 scales [rows]
// norm_weight_sums   grid (ceil(width / 128), parts), group 128: partial sums of d_out * x * scale to f32 [parts, width]

#if SIMD_ROWS
#define ROW (GROUP_X * (THREADS / 32) + THREAD / 32)
#define LANE (THREAD % 32)
#define ROW_THREADS 32
#define ROW_BARRIER()
#define row_sum(x, scratch) simd_sum(x)
#else
#define ROW GROUP_X
#define LANE THREAD
#define ROW_THREADS THREADS
#define ROW_BARRIER() BARRIER()
#define row_sum(x, scratch) group_sum(HERE x, scratch)
#endif

KERNEL(rms_norm)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL WEIGHT* weight, GLOBAL ELEMENT* out, SCALAR(uint, rows), SCALAR(uint, width),
    SCALAR(uint, inner), SCALAR(uint, pitch), SCALAR(uint, out_pitch), SCALAR(float, epsilon), SCALAR(float, shift),
    SCALAR(uint, weighted)
#if CODES
    , GLOBAL uchar* codes, GLOBAL float* scales
#endif
    ) {
    SHARED float scratch[32];
    if (ROW >= rows) return;
    x += row_start(ROW, inner, pitch, width);
    out += row_start(ROW, inner, out_pitch, width);
    float squares = 0.0f;
#if ALIGNED
    Eight a[VECTORS];
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * ROW_THREADS + LANE) * 8;
        if (i < width) a[n] = load_eight(x + i);
    }
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        if ((n * ROW_THREADS + LANE) * 8 >= width) continue;
        for (int j = 0; j < 8; ++j) squares += a[n].v[j] * a[n].v[j];
    }
#else
    for (uint i = LANE; i < width; i += ROW_THREADS) squares += widen(x[i]) * widen(x[i]);
#endif
    float scale = 1.0f / square_root(row_sum(squares, scratch) / (float)width + epsilon);
#if ALIGNED
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * ROW_THREADS + LANE) * 8;
        if (i >= width) continue;
        if (weighted) {
            Eight w = load_eight(weight + i);
            for (int j = 0; j < 8; ++j) a[n].v[j] = a[n].v[j] * scale * (w.v[j] + shift);
        } else {
            for (int j = 0; j < 8; ++j) a[n].v[j] *= scale;
        }
        store_eight(a[n], out + i);
    }
#if CODES
    float greatest = 0.0f;
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        if ((n * ROW_THREADS + LANE) * 8 >= width) continue;
        a[n] = unpacked(packed<ELEMENT>(a[n]));
        greatest = greatest_of(greatest, a[n]);
    }
    BARRIER();
    float factor = row_factor(group_max(HERE greatest, scratch));
    if (LANE == 0) scales[ROW] = 1.0f / factor;
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * ROW_THREADS + LANE) * 8;
        if (i < width) store_codes(a[n], factor, codes + (ulong64)ROW * width + i);
    }
#endif
#else
    for (uint i = LANE; i < width; i += ROW_THREADS) {
        float factor = weighted ? widen(weight[i]) + shift : 1.0f;
        narrow(widen(x[i]) * scale * factor, out + i);
    }
#endif
}

KERNEL(rms_norm_backward)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL WEIGHT* weight, const GLOBAL ELEMENT* d_out, GLOBAL ELEMENT* d_x,
    const GLOBAL ELEMENT* held, SCALAR(uint, rows), SCALAR(uint, width), SCALAR(uint, inner), SCALAR(uint, pitch),
    SCALAR(uint, out_pitch), SCALAR(uint, d_pitch), SCALAR(uint, held_pitch), SCALAR(float, epsilon), SCALAR(float, shift),
    SCALAR(uint, weighted), SCALAR(uint, accumulate)) {
    SHARED float scratch[32];
    if (ROW >= rows) return;
    x += row_start(ROW, inner, pitch, width);
    d_out += row_start(ROW, inner, out_pitch, width);
    d_x += row_start(ROW, inner, d_pitch, width);
    held += row_start(ROW, inner, held_pitch, width);
    float squares = 0.0f, product = 0.0f;
#if ALIGNED
    Eight a[VECTORS], d[VECTORS];
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * ROW_THREADS + LANE) * 8;
        if (i < width) a[n] = load_eight(x + i);
        if (i < width) d[n] = load_eight(d_out + i);
    }
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * ROW_THREADS + LANE) * 8;
        if (i >= width) continue;
        if (weighted) {
            Eight w = load_eight(weight + i);
            for (int j = 0; j < 8; ++j) d[n].v[j] *= w.v[j] + shift;
        }
        for (int j = 0; j < 8; ++j) {
            squares += a[n].v[j] * a[n].v[j];
            product += a[n].v[j] * d[n].v[j];
        }
    }
#else
    for (uint i = LANE; i < width; i += ROW_THREADS) {
        float a = widen(x[i]), factor = weighted ? widen(weight[i]) + shift : 1.0f;
        squares += a * a;
        product += a * widen(d_out[i]) * factor;
    }
#endif
    squares = row_sum(squares, scratch);
    ROW_BARRIER();
    product = row_sum(product, scratch);
    float scale = 1.0f / square_root(squares / (float)width + epsilon);
    float back = product * scale * scale * scale / (float)width;
#if ALIGNED
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * ROW_THREADS + LANE) * 8;
        if (i >= width) continue;
        for (int j = 0; j < 8; ++j) a[n].v[j] = d[n].v[j] * scale - a[n].v[j] * back;
        if (accumulate) {
            Eight sum = load_eight(held + i);
            for (int j = 0; j < 8; ++j) a[n].v[j] += sum.v[j];
        }
        store_eight(a[n], d_x + i);
    }
#else
    for (uint i = LANE; i < width; i += ROW_THREADS) {
        float factor = weighted ? widen(weight[i]) + shift : 1.0f;
        float value = widen(d_out[i]) * factor * scale - widen(x[i]) * back;
        narrow(accumulate ? value + widen(held[i]) : value, d_x + i);
    }
#endif
}

KERNEL(rms_scales)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, GLOBAL float* scales, SCALAR(uint, width), SCALAR(uint, inner), SCALAR(uint, pitch),
    SCALAR(float, epsilon)) {
    SHARED float scratch[32];
    x += row_start(GROUP_X, inner, pitch, width);
    float squares = 0.0f;
    for (uint i = THREAD; i < width; i += THREADS) squares += widen(x[i]) * widen(x[i]);
    squares = group_sum(HERE squares, scratch);
    if (THREAD == 0) scales[GROUP_X] = 1.0f / square_root(squares / (float)width + epsilon);
}

KERNEL(norm_weight_sums)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL ELEMENT* d_out, const GLOBAL float* scales, GLOBAL float* sums,
    SCALAR(uint, rows), SCALAR(uint, width), SCALAR(uint, inner), SCALAR(uint, pitch), SCALAR(uint, out_pitch)) {
    uint column = GROUP_X * THREADS + THREAD;
    if (column >= width) return;
    float sum = 0.0f;
    for (uint row = GROUP_Y; row < rows; row += GROUPS_Y) {
        float slope = widen(d_out[row_start(row, inner, out_pitch, width) + column]);
        sum += slope * widen(x[row_start(row, inner, pitch, width) + column]) * scales[row];
    }
    sums[GROUP_Y * width + column] = sum;
}
