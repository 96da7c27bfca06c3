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

// Four words of Philox4x32-10 (Salmon et al., SC 2011): a number is a function of seed, step, stream and its index alone.
DEVICE void philox(ulong64 block, uint seed_low, uint seed_high, uint step, uint stream, LOCAL uint* c) {
    uint k[2] = {seed_low, seed_high};
    c[0] = (uint)block;
    c[1] = (uint)(block >> 32);
    c[2] = step;
    c[3] = stream;
    for (int round = 0; round < 10; ++round) {
        uint high0 = multiply_high(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
        uint high1 = multiply_high(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
        c[0] = high1 ^ c[1] ^ k[0];
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ k[1];
        c[3] = low0;
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
}
