// Columns of heads: arrays [T, H, E] divided and put together. A token's heads follow each other; tokens lie a pitch apart.
//
// copy_heads  `width` columns of each of `heads` heads, `stride` elements apart in x and `out_stride` in the result; a stride
//             of 0 repeats one head. Grid (T, ceil(heads * width / 2048)), group 256; bytes: what is written, twice
// sum_heads   out [T, width] = the sum over heads of their `width` columns, in the order of heads, in f32.
//             Grid (T, ceil(width / 256)), group 256
//
// ALIGNED: width, strides and pitches are multiples of 8 elements, addresses of 16 bytes; copy_heads alone.

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
