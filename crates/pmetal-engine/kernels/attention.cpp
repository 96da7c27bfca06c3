// Attention for any head width up to 256 and any element type, in f32 inside: the plain twin of the matrix-unit kernels. Of
// wider heads products of matrices make the scores and read the weights, and only what is between them is done here.
//
// q [Tq, H, E], k [Tk, K, E], v [Tk, K, Ev], out [Tq, H, Ev] of ELEMENT, each with a pitch between tokens; H / K query heads
// share a key head. Query t sees keys key_begin[t] <= j < key_end[t]; key j is seen by no query outside query_begin[j] ..
// query_end[j]. cap = 0: no softcap. Sinks f32 [H] or null take part in the denominator alone. log_sums f32 [Tq, H]; a query
// that sees nothing gets zeros and minus infinity (its sink where there is one). No Tq x Tk buffer; two flops per visible
// pair and element of key and value forward. chosen u32 [Tq, chosen_words] or null: of the keys that it sees, query t looks
// at those alone whose bit is set: bit j % 32 of word j / 32 for key j.
//
// attention_forward  grid (Tq, H), one SIMD group       attention_delta  grid (Tq, H), one SIMD group: deltas f32 [Tq, H]
// attention_d_query  grid (Tq, H), one SIMD group       attention_d_key  grid (Tk, K), one SIMD group
// attention_d_sinks  grid H, group 256: d_sinks f32 [H] += -sum of p(sink) * delta, in a fixed order
// attention_weights  grid (queries, H), group 256: from products f32 [queries, H, Tk] of queries from `first` on with all keys their
//                    weights ELEMENT [queries, H, Tk], zero for keys that they do not look at

#define LANE_WIDTH 8

struct Lane { float v[LANE_WIDTH]; };

DEVICE Lane load_lane(POSITION const GLOBAL ELEMENT* p, uint width) {
    Lane out;
    for (uint j = 0; j < LANE_WIDTH; ++j) {
        uint i = j * 32 + THREAD;
        out.v[j] = i < width ? widen(p[i]) : 0.0f;
    }
    return out;
}

DEVICE void store_lane(POSITION Lane x, GLOBAL ELEMENT* p, uint width) {
    for (uint j = 0; j < LANE_WIDTH; ++j) {
        uint i = j * 32 + THREAD;
        if (i < width) narrow(x.v[j], p + i);
    }
}

DEVICE float dot(Lane a, Lane b) {
    float sum = 0.0f;
    for (uint j = 0; j < LANE_WIDTH; ++j) sum += a.v[j] * b.v[j];
    return simd_sum(sum);
}

DEVICE Lane zero_lane() {
    Lane out;
    for (uint j = 0; j < LANE_WIDTH; ++j) out.v[j] = 0.0f;
    return out;
}

// The score of a pair, and its derivative by the plain product.
DEVICE float score(float product, float scale, float cap, LOCAL float& slope) {
    float x = product * scale;
    slope = scale;
    if (cap <= 0.0f) return x;
    float t = hyperbolic_tangent(x / cap);
    slope = scale * (1.0f - t * t);
    return cap * t;
}

// The first key from j on that a row of bits has, or one that is not below `end`; j itself where there are no bits.
DEVICE int next_key(const GLOBAL uint* row, int j, int end) {
    if (!row) return j;
    while (j < end) {
        uint rest = row[j / 32] >> j % 32;
        if (rest == 0) {
            j = (j / 32 + 1) * 32;
            continue;
        }
        for (; !(rest & 1); rest >>= 1) ++j;
        return j;
    }
    return j;
}

KERNEL(attention_forward)(GIVEN_POSITION
    const GLOBAL ELEMENT* q, const GLOBAL ELEMENT* k, const GLOBAL ELEMENT* v, GLOBAL ELEMENT* out,
    GLOBAL float* log_sums, const GLOBAL int* key_begin, const GLOBAL int* key_end, const GLOBAL float* sinks,
    const GLOBAL uint* chosen,
    SCALAR(uint, group), SCALAR(uint, width), SCALAR(uint, value_width), SCALAR(uint, q_pitch), SCALAR(uint, k_pitch),
    SCALAR(uint, v_pitch), SCALAR(uint, out_pitch), SCALAR(float, scale), SCALAR(float, cap),
    SCALAR(uint, chosen_words)) {
    uint t = GROUP_X, head = GROUP_Y, heads = GROUPS_Y;
    if (chosen) chosen += (ulong64)t * chosen_words;
    int end = key_end[t];
    Lane query = load_lane(HERE q + (ulong64)t * q_pitch + head * width, width), sum = zero_lane();
    k += (head / group) * width;
    v += (head / group) * value_width;
    float top = -INFINITE, total = 0.0f, slope;
    if (sinks) {
        top = sinks[head];
        total = 1.0f;
    }
    for (int j = next_key(chosen, key_begin[t], end); j < end; j = next_key(chosen, j + 1, end)) {
        float s = score(dot(query, load_lane(HERE k + (ulong64)j * k_pitch, width)), scale, cap, slope);
        float higher = maximum(top, s), keep = exponential(top - higher), p = exponential(s - higher);
        Lane value = load_lane(HERE v + (ulong64)j * v_pitch, value_width);
        for (uint i = 0; i < LANE_WIDTH; ++i) sum.v[i] = sum.v[i] * keep + p * value.v[i];
        total = total * keep + p;
        top = higher;
    }
    float share = total > 0.0f || total != total ? 1.0f / total : 0.0f;
    for (uint i = 0; i < LANE_WIDTH; ++i) sum.v[i] *= share;
    store_lane(HERE sum, out + (ulong64)t * out_pitch + head * value_width, value_width);
    if (THREAD == 0) log_sums[t * heads + head] = total == 0.0f ? -INFINITE : top + logarithm(total);
}

KERNEL(attention_delta)(GIVEN_POSITION
    const GLOBAL ELEMENT* out, const GLOBAL ELEMENT* d_out, GLOBAL float* deltas, SCALAR(uint, value_width),
    SCALAR(uint, out_pitch), SCALAR(uint, d_out_pitch)) {
    uint t = GROUP_X, head = GROUP_Y;
    Lane a = load_lane(HERE out + (ulong64)t * out_pitch + head * value_width, value_width);
    Lane b = load_lane(HERE d_out + (ulong64)t * d_out_pitch + head * value_width, value_width);
    float delta = dot(a, b);
    if (THREAD == 0) deltas[t * GROUPS_Y + head] = delta;
}

KERNEL(attention_d_query)(GIVEN_POSITION
    const GLOBAL ELEMENT* q, const GLOBAL ELEMENT* k, const GLOBAL ELEMENT* v, const GLOBAL ELEMENT* d_out,
    const GLOBAL float* log_sums, const GLOBAL float* deltas, const GLOBAL int* key_begin, const GLOBAL int* key_end,
    const GLOBAL uint* chosen, GLOBAL ELEMENT* d_q, SCALAR(uint, group), SCALAR(uint, width), SCALAR(uint, value_width), SCALAR(uint, q_pitch),
    SCALAR(uint, k_pitch), SCALAR(uint, v_pitch), SCALAR(uint, d_out_pitch), SCALAR(uint, d_q_pitch),
    SCALAR(float, scale), SCALAR(float, cap), SCALAR(uint, chosen_words)) {
    uint t = GROUP_X, head = GROUP_Y, row = t * GROUPS_Y + head;
    Lane query = load_lane(HERE q + (ulong64)t * q_pitch + head * width, width), sum = zero_lane();
    Lane slope_out = load_lane(HERE d_out + (ulong64)t * d_out_pitch + head * value_width, value_width);
    k += (head / group) * width;
    v += (head / group) * value_width;
    if (chosen) chosen += (ulong64)t * chosen_words;
    int end = key_end[t];
    float slope;
    for (int j = next_key(chosen, key_begin[t], end); j < end; j = next_key(chosen, j + 1, end)) {
        Lane key = load_lane(HERE k + (ulong64)j * k_pitch, width);
        float p = exponential(score(dot(query, key), scale, cap, slope) - log_sums[row]);
        float d_p = dot(slope_out, load_lane(HERE v + (ulong64)j * v_pitch, value_width));
        float d_s = p * (d_p - deltas[row]) * slope;
        for (uint i = 0; i < LANE_WIDTH; ++i) sum.v[i] += d_s * key.v[i];
    }
    store_lane(HERE sum, d_q + (ulong64)t * d_q_pitch + head * width, width);
}

KERNEL(attention_d_key)(GIVEN_POSITION
    const GLOBAL ELEMENT* q, const GLOBAL ELEMENT* k, const GLOBAL ELEMENT* v, const GLOBAL ELEMENT* d_out,
    const GLOBAL float* log_sums, const GLOBAL float* deltas, const GLOBAL int* key_begin, const GLOBAL int* key_end,
    const GLOBAL uint* chosen, const GLOBAL int* query_begin, const GLOBAL int* query_end, GLOBAL ELEMENT* d_k, GLOBAL ELEMENT* d_v,
    SCALAR(uint, group), SCALAR(uint, width), SCALAR(uint, value_width), SCALAR(uint, q_pitch), SCALAR(uint, k_pitch),
    SCALAR(uint, v_pitch), SCALAR(uint, d_out_pitch), SCALAR(uint, d_k_pitch), SCALAR(uint, d_v_pitch),
    SCALAR(float, scale), SCALAR(float, cap), SCALAR(uint, chosen_words)) {
    int j = (int)GROUP_X;
    uint key_head = GROUP_Y, heads = GROUPS_Y * group;
    Lane key = load_lane(HERE k + (ulong64)j * k_pitch + key_head * width, width), key_sum = zero_lane();
    Lane value = load_lane(HERE v + (ulong64)j * v_pitch + key_head * value_width, value_width), value_sum = zero_lane();
    float slope;
    for (int t = query_begin[j]; t < query_end[j]; ++t) {
        if (j < key_begin[t] || j >= key_end[t]) continue;
        if (chosen && !(chosen[(ulong64)t * chosen_words + j / 32] >> j % 32 & 1)) continue;
        for (uint head = key_head * group; head < (key_head + 1) * group; ++head) {
            Lane query = load_lane(HERE q + (ulong64)t * q_pitch + head * width, width);
            Lane slope_out = load_lane(HERE d_out + (ulong64)t * d_out_pitch + head * value_width, value_width);
            float p = exponential(score(dot(query, key), scale, cap, slope) - log_sums[t * heads + head]);
            float d_s = p * (dot(slope_out, value) - deltas[t * heads + head]) * slope;
            for (uint i = 0; i < LANE_WIDTH; ++i) {
                value_sum.v[i] += p * slope_out.v[i];
                key_sum.v[i] += d_s * query.v[i];
            }
        }
    }
    store_lane(HERE key_sum, d_k + (ulong64)j * d_k_pitch + key_head * width, width);
    store_lane(HERE value_sum, d_v + (ulong64)j * d_v_pitch + key_head * value_width, value_width);
}

KERNEL(attention_d_sinks)(GIVEN_POSITION
    const GLOBAL float* sinks, const GLOBAL float* log_sums, const GLOBAL float* deltas, GLOBAL float* d_sinks,
    SCALAR(uint, tokens)) {
    SHARED float scratch[32];
    uint head = GROUP_X, heads = GROUPS_X;
    float sum = 0.0f;
    for (uint t = THREAD; t < tokens; t += THREADS) {
        sum -= exponential(sinks[head] - log_sums[t * heads + head]) * deltas[t * heads + head];
    }
    sum = group_sum(HERE sum, scratch);
    if (THREAD == 0) d_sinks[head] += sum;
}

KERNEL(attention_weights)(GIVEN_POSITION
    const GLOBAL float* products, GLOBAL ELEMENT* weights, GLOBAL float* log_sums, const GLOBAL int* key_begin,
    const GLOBAL int* key_end, const GLOBAL float* sinks, const GLOBAL uint* chosen, SCALAR(uint, first), SCALAR(uint, keys),
    SCALAR(float, scale), SCALAR(float, cap), SCALAR(uint, chosen_words)) {
    SHARED float scratch[32];
    uint t = first + GROUP_X, head = GROUP_Y, heads = GROUPS_Y;
    ulong64 row = (ulong64)(GROUP_X * heads + head) * keys;
    products += row;
    weights += row;
    if (chosen) chosen += (ulong64)t * chosen_words;
    uint begin = (uint)key_begin[t], end = (uint)key_end[t];
    float top = sinks ? sinks[head] : -INFINITE, slope;
    for (uint j = begin + THREAD; j < end; j += THREADS) {
        if (chosen && !(chosen[j / 32] >> j % 32 & 1)) continue;
        top = maximum(top, score(products[j], scale, cap, slope));
    }
    top = group_max(HERE top, scratch);
    float total = 0.0f;
    for (uint j = begin + THREAD; j < end; j += THREADS) {
        if (chosen && !(chosen[j / 32] >> j % 32 & 1)) continue;
        total += exponential(score(products[j], scale, cap, slope) - top);
    }
    total = group_sum(HERE total, scratch) + (sinks ? exponential(sinks[head] - top) : 0.0f);
    float share = total > 0.0f || total != total ? 1.0f / total : 0.0f;
    for (uint j = THREAD; j < keys; j += THREADS) {
        bool is_seen = j >= begin && j < end && (!chosen || (chosen[j / 32] >> j % 32 & 1));
        narrow(is_seen ? exponential(score(products[j], scale, cap, slope) - top) * share : 0.0f, weights + j);
    }
    if (THREAD == 0) log_sums[t * heads + head] = total == 0.0f ? -INFINITE : top + logarithm(total);
}
