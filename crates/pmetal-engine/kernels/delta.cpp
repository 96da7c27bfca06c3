// Around the gated delta rule (Yang, Kautz and Hatamizadeh, arXiv 2412.06464), which is in delta_chunks.cpp, and for few tokens
// in delta_steps.cpp, and the norm behind it. Letters: T tokens, G key heads, H value heads, D key width <= 256, E value width.
//
// Arrays of ELEMENT are [T, heads, width] with tokens a pitch apart; those in f32 are contiguous. marks i32 [2 T + 1]: of
// each token the first token f of its document, or -1 - f for padding behind it; of each token the end of its document
// with that padding; the end of the last document.
//
// delta_prepare     normed f32 [2, T, G, D]: k / |k|, then q / |q| / sqrt(D); gates f32 [T, H, 2]: decay e^g and rate beta,
//                   which are 1 and 0 for padding, as keys and queries are 0. Grid T, group 256
// delta_inputs_back d_q, d_k, d_v and d_beta from answers S' do, past -S' c and future F w, f32 [T, H, D], and from errors u
//                   and recalled R^T k, f32 [T, H, E]; slopes f32 [T, H] = q (S' do) - k (S' c) - k (F w), of which
//                   device/cpu/delta/sweeps.rs says what they mean. Grid T, group 256
// delta_gates_back  d_a, and adds to d_a_log and d_dt_bias where they are not null: sums of slopes from each token to the end
//                   of its document, in a fixed order. Grid H, group 256
// gated_norm        out = w * n * silu(gate), n being x / rms(x) rounded to ELEMENT; rows as those of rms_norm in norm.cpp.
//                   LANES, 16 or 32, take a row, of which each holds VECTORS times eight columns. Grid ceil(LANES rows / 128),
//                   group 128; bytes: three rows. ALIGNED: width, pitches and addresses are multiples of 8 elements and 16
//                   bytes
// gated_norm_back   d_x and d_gate, and 1 / rms to f32 scales [rows]. The same grid; bytes: five rows
// gated_norm_sums   partial sums of the weight's gradient, f32 [parts, width]. Grid (ceil(width / 128), parts), group 128

// Elements of a key that a lane holds at most.
#define PAIRS 8
// Added to sums of squares of queries and keys.
#define SQUARES_EPSILON 1e-6f

DEVICE float query_scale(uint depth) { return 1.0f / square_root((float)depth); }

DEVICE float logistic(float x) { return reciprocal(1.0f + exponential(-x)); }

// log(1 + e^x), which does not lose what is small.
DEVICE float softplus(float x) {
    float small = exponential(-magnitude(x));
    float rest = small < 0.0078125f ? small * (1.0f - small * (0.5f - small * 0.33333333f)) : logarithm(1.0f + small);
    return maximum(x, 0.0f) + rest;
}

KERNEL(delta_prepare)(GIVEN_POSITION
    const GLOBAL ELEMENT* q, const GLOBAL ELEMENT* k, const GLOBAL ELEMENT* beta, const GLOBAL ELEMENT* a,
    const GLOBAL float* a_log, const GLOBAL float* dt_bias, const GLOBAL int* marks, GLOBAL float* normed,
    GLOBAL float* gates, SCALAR(uint, tokens), SCALAR(uint, key_heads), SCALAR(uint, heads), SCALAR(uint, depth),
    SCALAR(uint, q_pitch), SCALAR(uint, k_pitch), SCALAR(uint, beta_pitch), SCALAR(uint, a_pitch)) {
    ulong64 token = GROUP_X;
    bool is_padding = marks[token] < 0;
    uint lane = THREAD % 32;
    for (uint row = THREAD / 32; row < 2 * key_heads; row += THREADS / 32) {
        bool is_query = row >= key_heads;
        uint head = is_query ? row - key_heads : row;
        const GLOBAL ELEMENT* x = (is_query ? q + token * q_pitch : k + token * k_pitch) + head * depth;
        GLOBAL float* out = normed + (((is_query ? tokens : 0) + token) * key_heads + head) * depth;
        float squares = 0.0f;
        for (uint i = lane; i < depth; i += 32) squares += widen(x[i]) * widen(x[i]);
        float factor = (is_query ? query_scale(depth) : 1.0f) / square_root(simd_sum(squares) + SQUARES_EPSILON);
        for (uint i = lane; i < depth; i += 32) out[i] = is_padding ? 0.0f : widen(x[i]) * factor;
    }
    for (uint head = THREAD; head < heads; head += THREADS) {
        float delay = softplus(widen(a[token * a_pitch + head]) + dt_bias[head]);
        GLOBAL float* out = gates + (token * heads + head) * 2;
        out[0] = is_padding ? 1.0f : exponential(-exponential(a_log[head]) * delay);
        out[1] = is_padding ? 0.0f : logistic(widen(beta[token * beta_pitch + head]));
    }
}

// From the gradient of n = scale x / |x|, of which each lane holds some elements, to that of x.
DEVICE void store_unnormed(
    const GLOBAL ELEMENT* x, const GLOBAL float* normed, const LOCAL float* gradient, uint lane, uint depth, float scale,
    GLOBAL ELEMENT* out) {
    float squares = 0.0f, product = 0.0f;
    UNROLL for (uint n = 0; n < PAIRS; ++n) {
        uint i = n * 32 + lane;
        if (i >= depth) continue;
        squares += widen(x[i]) * widen(x[i]);
        product += normed[i] * gradient[n];
    }
    float factor = scale / square_root(simd_sum(squares) + SQUARES_EPSILON);
    product = simd_sum(product) / (scale * scale);
    UNROLL for (uint n = 0; n < PAIRS; ++n) {
        uint i = n * 32 + lane;
        if (i < depth) narrow(factor * (gradient[n] - normed[i] * product), out + i);
    }
}

KERNEL(delta_inputs_back)(GIVEN_POSITION
    const GLOBAL ELEMENT* q, const GLOBAL ELEMENT* k, const GLOBAL ELEMENT* d_out, const GLOBAL int* marks,
    const GLOBAL float* normed, const GLOBAL float* gates, const GLOBAL float* errors, const GLOBAL float* recalled,
    const GLOBAL float* answers, const GLOBAL float* past, const GLOBAL float* future,
    GLOBAL ELEMENT* d_q, GLOBAL ELEMENT* d_k, GLOBAL ELEMENT* d_v, GLOBAL ELEMENT* d_beta, GLOBAL float* slopes,
    SCALAR(uint, tokens), SCALAR(uint, key_heads), SCALAR(uint, heads), SCALAR(uint, depth), SCALAR(uint, width),
    SCALAR(uint, q_pitch), SCALAR(uint, k_pitch), SCALAR(uint, d_pitch), SCALAR(uint, d_q_pitch), SCALAR(uint, d_k_pitch),
    SCALAR(uint, d_v_pitch), SCALAR(uint, d_beta_pitch)) {
    ulong64 token = GROUP_X;
    bool is_padding = marks[token] < 0;
    uint lane = THREAD % 32, shared = heads / key_heads;
    for (uint key_head = THREAD / 32; key_head < key_heads; key_head += THREADS / 32) {
        const GLOBAL float* keys = normed + (token * key_heads + key_head) * depth;
        const GLOBAL float* queries = keys + (ulong64)tokens * key_heads * depth;
        float d_queries[PAIRS], d_keys[PAIRS];
        UNROLL for (uint n = 0; n < PAIRS; ++n) d_queries[n] = d_keys[n] = 0.0f;
        for (uint head = key_head * shared; head < (key_head + 1) * shared; ++head) {
            ulong64 row = token * heads + head;
            float slope = 0.0f, learned = 0.0f, direct = 0.0f, rate = gates[row * 2 + 1];
            for (uint j = lane; j < width; j += 32) {
                float back = is_padding ? 0.0f : recalled[row * width + j];
                float error = is_padding ? 0.0f : errors[row * width + j];
                learned += error * back;
                direct += error * widen(d_out[token * d_pitch + head * width + j]);
                narrow(rate * back, d_v + token * d_v_pitch + head * width + j);
            }
            learned = simd_sum(learned);
            direct = rate * simd_sum(direct);
            UNROLL for (uint n = 0; n < PAIRS; ++n) {
                uint i = n * 32 + lane;
                if (i >= depth || is_padding) continue;
                float answer = answers[row * depth + i], before = past[row * depth + i], behind = future[row * depth + i];
                slope += queries[i] * answer + keys[i] * (before - behind);
                d_queries[n] += answer + keys[i] * direct;
                d_keys[n] += before + behind + queries[i] * direct;
            }
            slope = simd_sum(slope);
            if (lane == 0) {
                slopes[row] = is_padding ? 0.0f : slope;
                narrow(learned * rate * (1.0f - rate), d_beta + token * d_beta_pitch + head);
            }
        }
        uint start = key_head * depth;
        store_unnormed(
            q + token * q_pitch + start, queries, d_queries, lane, depth, query_scale(depth),
            d_q + token * d_q_pitch + start);
        store_unnormed(k + token * k_pitch + start, keys, d_keys, lane, depth, 1.0f, d_k + token * d_k_pitch + start);
    }
}

KERNEL(delta_gates_back)(GIVEN_POSITION
    const GLOBAL float* slopes, const GLOBAL ELEMENT* a, const GLOBAL float* a_log, const GLOBAL float* dt_bias,
    const GLOBAL int* marks, GLOBAL ELEMENT* d_a, GLOBAL float* d_a_log, GLOBAL float* d_dt_bias, SCALAR(uint, tokens),
    SCALAR(uint, heads), SCALAR(uint, pitch), SCALAR(uint, d_pitch), SCALAR(uint, trains_a_log),
    SCALAR(uint, trains_dt_bias)) {
    SHARED float totals[256];
    SHARED uint begins[256];
    SHARED float scratch[32];
    uint head = GROUP_X, stretch = (tokens + THREADS - 1) / THREADS;
    uint first = THREAD * stretch < tokens ? THREAD * stretch : tokens;
    uint end = first + stretch < tokens ? first + stretch : tokens;
    // What a thread's tokens hand to those before them, and whether a document begins among them.
    float sum = 0.0f;
    uint is_begin = 0;
    for (uint token = end; token-- > first;) {
        sum += slopes[(ulong64)token * heads + head];
        if (marks[token] == (int)token) {
            sum = 0.0f;
            is_begin = 1;
        }
    }
    totals[THREAD] = sum;
    begins[THREAD] = is_begin;
    BARRIER();
    sum = 0.0f;
    for (uint other = THREAD + 1; other < THREADS; ++other) {
        sum += totals[other];
        if (begins[other]) break;
    }
    float strength = -exponential(a_log[head]), bias = dt_bias[head], all_a_log = 0.0f, all_dt_bias = 0.0f;
    for (uint token = end; token-- > first;) {
        sum += slopes[(ulong64)token * heads + head];
        float delay = widen(a[(ulong64)token * pitch + head]) + bias, back = 0.0f;
        if (marks[token] >= 0) {
            back = sum * strength * logistic(delay);
            all_a_log += sum * strength * softplus(delay);
            all_dt_bias += back;
        }
        narrow(back, d_a + (ulong64)token * d_pitch + head);
        if (marks[token] == (int)token) sum = 0.0f;
    }
    all_a_log = group_sum(HERE all_a_log, scratch);
    BARRIER();
    all_dt_bias = group_sum(HERE all_dt_bias, scratch);
    if (THREAD == 0 && trains_a_log) d_a_log[head] += all_a_log;
    if (THREAD == 0 && trains_dt_bias) d_dt_bias[head] += all_dt_bias;
}

DEVICE float inverse_rms(float squares, uint width, float epsilon) {
    float mean = squares / (float)width;
    return 1.0f / square_root(mean + epsilon);
}

DEVICE Eight rounded(Eight x) { return unpacked(packed<ELEMENT>(x)); }

#ifndef VECTORS
#define VECTORS 1
#endif
#ifndef LANES
#define LANES 32
#endif

DEVICE float row_sum(float x) {
    for (uint mask = LANES / 2; mask > 0; mask >>= 1) x += simd_shuffle_xor(x, mask);
    return x;
}

DEVICE void store_columns(Eight x, GLOBAL ELEMENT* row, uint column, uint width) {
#if ALIGNED
    store_eight(x, row + column);
#else
    for (uint j = 0; j < 8 && column + j < width; ++j) narrow(x.v[j], row + column + j);
#endif
}

KERNEL(gated_norm)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL ELEMENT* gate, const GLOBAL float* weight, GLOBAL ELEMENT* out,
    SCALAR(uint, rows), SCALAR(uint, width), SCALAR(uint, inner), SCALAR(uint, pitch), SCALAR(uint, gate_pitch),
    SCALAR(uint, out_pitch), SCALAR(float, epsilon)) {
    uint row = GROUP_X * (THREADS / LANES) + THREAD / LANES, lane = THREAD % LANES;
    // Lanes without a row take part in sums.
    uint columns = row < rows ? width : 0;
    x += row_start(row, inner, pitch, width);
    gate += row_start(row, inner, gate_pitch, width);
    out += row_start(row, inner, out_pitch, width);
    Eight a[VECTORS], value[VECTORS];
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * LANES + lane) * 8;
        if (i < columns) a[n] = eight_columns(x, i, width);
        if (i < columns) value[n] = eight_columns(gate, i, width);
    }
    float squares = 0.0f;
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        if ((n * LANES + lane) * 8 >= columns) continue;
        for (int j = 0; j < 8; ++j) squares += a[n].v[j] * a[n].v[j];
    }
    float scale = inverse_rms(row_sum(squares), width, epsilon);
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * LANES + lane) * 8;
        if (i >= columns) continue;
        Eight w = eight_columns(weight, i, width), gates = value[n];
        for (int j = 0; j < 8; ++j) a[n].v[j] *= scale;
        a[n] = rounded(a[n]);
        for (int j = 0; j < 8; ++j) a[n].v[j] *= w.v[j] * (gates.v[j] * logistic(gates.v[j]));
        store_columns(a[n], out, i, width);
    }
}

KERNEL(gated_norm_back)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL ELEMENT* gate, const GLOBAL float* weight, const GLOBAL ELEMENT* d_out,
    GLOBAL ELEMENT* d_x, GLOBAL ELEMENT* d_gate, GLOBAL float* scales, SCALAR(uint, rows), SCALAR(uint, width),
    SCALAR(uint, inner), SCALAR(uint, pitch), SCALAR(uint, gate_pitch), SCALAR(uint, out_pitch), SCALAR(uint, d_x_pitch),
    SCALAR(uint, d_gate_pitch), SCALAR(float, epsilon)) {
    uint row = GROUP_X * (THREADS / LANES) + THREAD / LANES, lane = THREAD % LANES;
    uint columns = row < rows ? width : 0;
    x += row_start(row, inner, pitch, width);
    gate += row_start(row, inner, gate_pitch, width);
    d_out += row_start(row, inner, out_pitch, width);
    d_x += row_start(row, inner, d_x_pitch, width);
    d_gate += row_start(row, inner, d_gate_pitch, width);
    float squares = 0.0f, product = 0.0f;
    Eight a[VECTORS], value[VECTORS], slope[VECTORS];
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * LANES + lane) * 8;
        if (i < columns) a[n] = eight_columns(x, i, width);
        if (i < columns) value[n] = eight_columns(gate, i, width);
        if (i < columns) slope[n] = eight_columns(d_out, i, width);
    }
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * LANES + lane) * 8;
        if (i >= columns) continue;
        Eight w = eight_columns(weight, i, width), gates = value[n];
        for (int j = 0; j < 8; ++j) {
            slope[n].v[j] *= w.v[j];
            squares += a[n].v[j] * a[n].v[j];
            product += a[n].v[j] * slope[n].v[j] * (gates.v[j] * logistic(gates.v[j]));
        }
    }
    float scale = inverse_rms(row_sum(squares), width, epsilon);
    float back = row_sum(product) * scale * scale * scale / (float)width;
    if (lane == 0 && columns > 0) scales[row] = scale;
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * LANES + lane) * 8;
        if (i >= columns) continue;
        Eight own, gates;
        for (int j = 0; j < 8; ++j) {
            float input = a[n].v[j], gated = value[n].v[j], share = logistic(gated), rise = slope[n].v[j];
            own.v[j] = rise * (gated * share) * scale - input * back;
            gates.v[j] = rise * input * scale * share * (1.0f + gated * (1.0f - share));
        }
        store_columns(own, d_x, i, width);
        store_columns(gates, d_gate, i, width);
    }
}

KERNEL(gated_norm_sums)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL ELEMENT* gate, const GLOBAL ELEMENT* d_out, const GLOBAL float* scales,
    GLOBAL float* sums, SCALAR(uint, rows), SCALAR(uint, parts), SCALAR(uint, width), SCALAR(uint, inner),
    SCALAR(uint, pitch), SCALAR(uint, gate_pitch), SCALAR(uint, out_pitch)) {
    uint column = GROUP_X * THREADS + THREAD;
    if (column >= width) return;
    float sum = 0.0f;
    for (uint row = GROUP_Y; row < rows; row += parts) {
        float value = widen(gate[row_start(row, inner, gate_pitch, width) + column]);
        float slope = widen(d_out[row_start(row, inner, out_pitch, width) + column]) * (value * logistic(value));
        sum += slope * widen(x[row_start(row, inner, pitch, width) + column]) * scales[row];
    }
    sums[GROUP_Y * width + column] = sum;
}
