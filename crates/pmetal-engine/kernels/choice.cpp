// The choice of the keys that queries look at: the best by sum_h weight_h max(q_h . k, 0), in f32.
//
// q ELEMENT [T, H, E], k ELEMENT [Tk, E], weights f32 [T, H], each with a pitch between tokens; WIDTH is E. Query t sees keys
// key_begin[t] <= j < key_end[t]. Queries are taken from `first` on, as many as the grid has rows. Of equal scores the first
// is chosen; both zeros are equal, what is no number counts as minus infinity. Bit j % 32 of word j / 32 is that of key j.
//
// score_keys   grid (ceil(Tk / 32), queries), group 256: scores f32 [queries, Tk] of keys that are seen, for queries that see
//              more than `count`; choice_tiles.cpp has them of matrix units
// choose_keys  grid queries, group 256: bits u32 [T, words] of the best `count` keys, or of all that are seen; words =
//              ceil(Tk / 32)
// Flops: 2 H E for a pair. Bytes: q once for four keys of a SIMD group, k once for a query; scores up to six times.

#ifndef WIDTH
#define WIDTH 32
#endif

// Keys of a SIMD group, and elements of a row that one of its lanes has.
#define KEYS 4
#define SHARE ((WIDTH + 31) / 32)

KERNEL(score_keys)(GIVEN_POSITION
    const GLOBAL ELEMENT* q, const GLOBAL ELEMENT* k, const GLOBAL float* weights, const GLOBAL int* key_begin,
    const GLOBAL int* key_end, GLOBAL float* scores, SCALAR(uint, first), SCALAR(uint, keys), SCALAR(uint, heads),
    SCALAR(uint, q_pitch), SCALAR(uint, k_pitch), SCALAR(uint, weights_pitch), SCALAR(uint, count)) {
    uint t = first + GROUP_Y, lane = THREAD % 32;
    int start = (int)(GROUP_X * 32 + THREAD / 32 * KEYS), end = key_end[t];
    if (start >= end || start + KEYS <= key_begin[t] || end - key_begin[t] <= (int)count) return;
    float own[KEYS][SHARE], sums[KEYS];
    for (int n = 0; n < KEYS; ++n) {
        sums[n] = 0.0f;
        for (uint j = 0; j < SHARE; ++j) {
            uint i = j * 32 + lane;
            own[n][j] = i < WIDTH && start + n < end ? widen(k[(ulong64)(start + n) * k_pitch + i]) : 0.0f;
        }
    }
    q += (ulong64)t * q_pitch;
    weights += (ulong64)t * weights_pitch;
    for (uint head = 0; head != heads; ++head) {
        float products[KEYS];
        for (int n = 0; n < KEYS; ++n) products[n] = 0.0f;
        for (uint j = 0; j < SHARE; ++j) {
            uint i = j * 32 + lane;
            float query = i < WIDTH ? widen(q[head * WIDTH + i]) : 0.0f;
            for (int n = 0; n < KEYS; ++n) products[n] += query * own[n][j];
        }
        for (int n = 0; n < KEYS; ++n) sums[n] += weights[head] * maximum(simd_sum(products[n]), 0.0f);
    }
    for (int n = 0; n < KEYS; ++n) {
        if (lane == (uint)n && start + n < end) scores[(ulong64)GROUP_Y * keys + (uint)(start + n)] = sums[n];
    }
}

// A number whose order is that of scores.
DEVICE uint ordered(float score) {
    if (score == 0.0f) return 0x80000000u;
    if (score != score) score = -INFINITE;
    uint bits = as_bits(score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

KERNEL(choose_keys)(GIVEN_POSITION
    const GLOBAL float* scores, const GLOBAL int* key_begin, const GLOBAL int* key_end, GLOBAL uint* bits,
    SCALAR(uint, first), SCALAR(uint, keys), SCALAR(uint, words), SCALAR(uint, count)) {
    SHARED uint counts[256];
    SHARED uint digit[2];
    uint t = first + GROUP_X;
    uint begin = (uint)key_begin[t], end = (uint)key_end[t];
    scores += (ulong64)GROUP_X * keys;
    bits += (ulong64)t * words;
    if (end <= begin || end - begin <= count) {
        for (uint word = THREAD; word < words; word += THREADS) {
            uint own = 0;
            for (uint i = 0; i < 32; ++i) own |= (uint)(word * 32 + i >= begin && word * 32 + i < end) << i;
            bits[word] = own;
        }
        return;
    }
    // The number of the last key that is chosen, by digits of eight bits, and how many keys of this number are.
    uint last = 0, known = 0, left = count;
    for (uint shift = 32; shift > 0;) {
        shift -= 8;
        counts[THREAD] = 0;
        BARRIER();
        for (uint i = begin + THREAD; i < end; i += THREADS) {
            uint number = ordered(scores[i]);
            if ((number & known) == last) atomic_add(&counts[number >> shift & 255], 1u);
        }
        BARRIER();
        uint above = 0;
        for (uint i = THREAD + 1; i < 256; ++i) above += counts[i];
        if (above < left && above + counts[THREAD] >= left) {
            digit[0] = THREAD;
            digit[1] = left - above;
        }
        BARRIER();
        last |= digit[0] << shift;
        left = digit[1];
        known |= 255u << shift;
    }
    // Each thread has consecutive words, so that it knows how many equal keys come before its own.
    uint span = (words + THREADS - 1) / THREADS, from = THREAD * span;
    uint to = from + span < words ? from + span : words, equal = 0, before = 0;
    uint low = from * 32 > begin ? from * 32 : begin, high = to * 32 < end ? to * 32 : end;
    for (uint i = low; i < high; ++i) equal += (uint)(ordered(scores[i]) == last);
    counts[THREAD] = equal;
    BARRIER();
    for (uint i = 0; i < THREAD; ++i) before += counts[i];
    for (uint word = from; word < to; ++word) {
        uint own = 0;
        for (uint i = 0; i < 32; ++i) {
            uint key = word * 32 + i;
            if (key < begin || key >= end) continue;
            uint number = ordered(scores[key]);
            if (number < last || (number == last && before++ >= left)) continue;
            own |= 1u << i;
        }
        bits[word] = own;
    }
}
