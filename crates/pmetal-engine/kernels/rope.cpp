// Rotary embedding in place (Su et al., arXiv 2104.09864) on heads of ELEMENT.
//
// x [T, heads, width] with `pitch` elements between tokens; cosines and sines f32 [P, half], token t uses row rows[t].
// `direction` is 1, or -1 to turn back. PAIRS_HALVES: element i with i + half; else 2i with 2i + 1.
// Grid (T, ceil(heads * half / 256)), group 256; bytes: the rotated part read and written.

KERNEL(rope)(
    GLOBAL ELEMENT* x, const GLOBAL float* cosines, const GLOBAL float* sines, const GLOBAL uint* rows,
    SCALAR(uint, heads), SCALAR(uint, width), SCALAR(uint, pitch), SCALAR(uint, half_width), SCALAR(float, direction)) {
    uint index = GROUP_Y * THREADS + THREAD;
    if (index >= heads * half_width) return;
    uint head = index / half_width, pair = index % half_width, row = rows[GROUP_X];
    x += (ulong64)GROUP_X * pitch + head * width;
#if PAIRS_HALVES
    uint first = pair, second = pair + half_width;
#else
    uint first = 2 * pair, second = 2 * pair + 1;
#endif
    float cosine = cosines[(ulong64)row * half_width + pair];
    float sine = sines[(ulong64)row * half_width + pair] * direction;
    float a = widen(x[first]), b = widen(x[second]);
    narrow(a * cosine - b * sine, x + first);
    narrow(b * cosine + a * sine, x + second);
}
