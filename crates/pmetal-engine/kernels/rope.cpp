// Rotary embedding in place (Su et al., arXiv 2104.09864) on heads of ELEMENT.
//
// x [T, heads, width] with `pitch` elements between tokens; cosines and sines f32 [P, half], token t uses row rows[t].
// `direction` is 1, or -1 to turn back. PAIRS_HALVES: element i with i + half; else 2i with 2i + 1.
// Grid (T, ceil(heads * half / 256)), group 256, or with ALIGNED (halves; half, width, pitch and address multiples of 8
// elements and 16 bytes) (T, ceil(heads * half / 1024)), group 128: eight pairs a thread. Bytes: the rotated part read and
// written.

KERNEL(rope)(GIVEN_POSITION
    GLOBAL ELEMENT* x, const GLOBAL float* cosines, const GLOBAL float* sines, const GLOBAL uint* rows,
    SCALAR(uint, heads), SCALAR(uint, width), SCALAR(uint, pitch), SCALAR(uint, half_width), SCALAR(float, direction)) {
    uint index = GROUP_Y * THREADS + THREAD, row = rows[GROUP_X];
#if ALIGNED
    index *= 8;
#endif
    if (index >= heads * half_width) return;
    uint head = index / half_width, pair = index % half_width;
    x += (ulong64)GROUP_X * pitch + head * width;
    cosines += (ulong64)row * half_width + pair;
    sines += (ulong64)row * half_width + pair;
#if ALIGNED
    Eight a = load_eight(x + pair), b = load_eight(x + pair + half_width), c = load_eight(cosines), s = load_eight(sines);
    for (int j = 0; j < 8; ++j) {
        float first = a.v[j], second = b.v[j], sine = s.v[j] * direction;
        a.v[j] = first * c.v[j] - second * sine;
        b.v[j] = second * c.v[j] + first * sine;
    }
    store_eight(a, x + pair);
    store_eight(b, x + pair + half_width);
#else
#if PAIRS_HALVES
    uint first = pair, second = pair + half_width;
#else
    uint first = 2 * pair, second = 2 * pair + 1;
#endif
    float cosine = cosines[0], sine = sines[0] * direction;
    float a = widen(x[first]), b = widen(x[second]);
    narrow(a * cosine - b * sine, x + first);
    narrow(b * cosine + a * sine, x + second);
#endif
}
