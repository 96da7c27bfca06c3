// Columns of heads: arrays [T, H, E] divided and put together. A token's heads follow each other; tokens lie a pitch apart.
//
// copy_heads  `width` columns of each of `heads` heads, `stride` elements apart in x and `out_stride` in the result; a stride
//             of 0 repeats one head. Grid (T, ceil(heads * width / 2048)), group 256; bytes: what is written, twice
// sum_heads   out [T, width] = the sum over heads of their `width` columns, in the order of heads, in f32.
//             Grid (T, ceil(width / 256)), group 256
//
// For few tokens, each head with N rows of its own of a matrix w [H * S, K], a pitch apart, from its row `first` on; sums in f32
// in a fixed order, added to what the result holds if `adds`. Arrays of heads have no gaps. Bytes: the rows of w once for 4 tokens.
//
// head_rows     out [T, H, N] = x [T, H, K] times the rows. Grid (ceil(N / 8), H, ceil(T / 4)), group 256
// head_columns  out [T, H, K] = x [T, H, N] times their columns. Grid (ceil(K / 512), H, ceil(T / 4)), group 256
//
// ALIGNED: width, strides and pitches are multiples of 8 elements, addresses of 16 bytes; K is the width of head_rows and of
// head_columns. sum_heads does not ask.

KERNEL(copy_heads)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, GLOBAL ELEMENT* out, SCALAR(uint, heads), SCALAR(uint, width), SCALAR(uint, pitch),
    SCALAR(uint, stride), SCALAR(uint, out_pitch), SCALAR(uint, out_stride)) {
    x += (ulong64)GROUP_X * pitch;
    out += (ulong64)GROUP_X * out_pitch;
    uint start = (GROUP_Y * THREADS + THREAD) * 8, count = heads * width;
#if ALIGNED
    if (start < count) {
        uint head = start / width, column = start % width;
        store_eight(load_eight(x + head * stride + column), out + head * out_stride + column);
    }
#else
    for (uint i = start; i < start + 8 && i < count; ++i) {
        uint head = i / width, column = i % width;
        narrow(widen(x[head * stride + column]), out + head * out_stride + column);
    }
#endif
}

KERNEL(sum_heads)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, GLOBAL ELEMENT* out, SCALAR(uint, heads), SCALAR(uint, width), SCALAR(uint, pitch),
    SCALAR(uint, stride), SCALAR(uint, out_pitch)) {
    uint column = GROUP_Y * THREADS + THREAD;
    if (column >= width) return;
    x += (ulong64)GROUP_X * pitch;
    float sum = 0.0f;
    for (uint head = 0; head < heads; ++head) sum += widen(x[head * stride + column]);
    narrow(sum, out + (ulong64)GROUP_X * out_pitch + column);
}

#define HEAD_TOKENS 4

DEVICE void put_sum(float sum, GLOBAL ELEMENT* out, uint adds) { narrow(adds ? sum + widen(*out) : sum, out); }

KERNEL(head_rows)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL ELEMENT* w, GLOBAL ELEMENT* out, SCALAR(uint, tokens), SCALAR(uint, features),
    SCALAR(uint, inner), SCALAR(uint, rows), SCALAR(uint, first), SCALAR(uint, pitch), SCALAR(uint, adds)) {
    uint n = GROUP_X * 8 + THREAD / 32, lane = THREAD % 32, head = GROUP_Y, heads = GROUPS_Y, start = GROUP_Z * HEAD_TOKENS;
    if (n >= features) return;
    w += (ulong64)(head * rows + first + n) * pitch;
    float sums[HEAD_TOKENS];
    for (uint m = 0; m < HEAD_TOKENS; ++m) sums[m] = 0.0f;
    for (uint k = lane * 8; k < inner; k += 256) {
        Eight own = eight_columns(w, k, inner);
        for (uint m = 0; m < HEAD_TOKENS && start + m < tokens; ++m) {
            Eight a = eight_columns(x + ((ulong64)(start + m) * heads + head) * inner, k, inner);
            for (uint j = 0; j < 8; ++j) sums[m] += own.v[j] * a.v[j];
        }
    }
    for (uint m = 0; m < HEAD_TOKENS && start + m < tokens; ++m) {
        float sum = simd_sum(sums[m]);
        if (lane == 0) put_sum(sum, out + ((ulong64)(start + m) * heads + head) * features + n, adds);
    }
}

KERNEL(head_columns)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL ELEMENT* w, GLOBAL ELEMENT* out, SCALAR(uint, tokens), SCALAR(uint, features),
    SCALAR(uint, inner), SCALAR(uint, rows), SCALAR(uint, first), SCALAR(uint, pitch), SCALAR(uint, adds)) {
    SHARED float parts[4][512];
    uint own_column = THREAD % 64 * 8, column = GROUP_X * 512 + own_column, part = THREAD / 64;
    uint head = GROUP_Y, heads = GROUPS_Y, start = GROUP_Z * HEAD_TOKENS;
    w += (ulong64)(head * rows + first) * pitch;
    float sums[HEAD_TOKENS][8];
    for (uint m = 0; m < HEAD_TOKENS; ++m) {
        for (uint j = 0; j < 8; ++j) sums[m][j] = 0.0f;
    }
    for (uint n = part; n < features && column < inner; n += 4) {
        Eight own = eight_columns(w + (ulong64)n * pitch, column, inner);
        for (uint m = 0; m < HEAD_TOKENS && start + m < tokens; ++m) {
            float a = widen(x[((ulong64)(start + m) * heads + head) * features + n]);
            for (uint j = 0; j < 8; ++j) sums[m][j] += a * own.v[j];
        }
    }
    for (uint m = 0; m < HEAD_TOKENS && start + m < tokens; ++m) {
        BARRIER();
        for (uint j = 0; j < 8; ++j) parts[part][own_column + j] = sums[m][j];
        BARRIER();
        for (uint i = THREAD; i < 512 && GROUP_X * 512 + i < inner; i += THREADS) {
            float sum = parts[0][i] + parts[1][i] + parts[2][i] + parts[3][i];
            put_sum(sum, out + ((ulong64)(start + m) * heads + head) * inner + GROUP_X * 512 + i, adds);
        }
    }
}
