// What several kernels share: reductions in a fixed order, so that results do not change from run to run.

// Sum over the 32 lanes of a SIMD group; every lane gets it.
DEVICE float simd_sum(float x) {
    for (uint mask = 16; mask > 0; mask >>= 1) x += simd_shuffle_xor(x, mask);
    return x;
}

DEVICE float simd_max(float x) {
    for (uint mask = 16; mask > 0; mask >>= 1) x = maximum(x, simd_shuffle_xor(x, mask));
    return x;
}

// Sum over a group of a multiple of 32 threads; every thread gets it. `scratch` holds 32 floats, free for the next use
// after the caller's next barrier.
DEVICE float group_sum(POSITION float x, SHARED_POINTER(float) scratch) {
    x = simd_sum(x);
    if (THREADS <= 32) return x;
    BARRIER();
    if (THREAD % 32 == 0) scratch[THREAD / 32] = x;
    BARRIER();
    x = THREAD % 32 < THREADS / 32 ? scratch[THREAD % 32] : 0.0f;
    return simd_sum(x);
}

DEVICE float group_max(POSITION float x, SHARED_POINTER(float) scratch) {
    x = simd_max(x);
    if (THREADS <= 32) return x;
    BARRIER();
    if (THREAD % 32 == 0) scratch[THREAD / 32] = x;
    BARRIER();
    x = THREAD % 32 < THREADS / 32 ? scratch[THREAD % 32] : -INFINITE;
    return simd_max(x);
}
