// Rows between tokens and experts, and what experts do to each row on its own. Rows P of pairs of a token and an expert are
// in the order of a plan: order u32 [P] has the pair of each row, places u32 [P] the row of each pair; a pair is token times
// k plus choice. Matrices are of ELEMENT, each with a pitch; logits of SOURCE. Sums are in f32, in the order of choices.
// ALIGNED: columns, pitches and addresses are multiples of 8 elements and 16 bytes.
//
// spread_tokens        grid (ceil(P / 4), ceil(D / 2048)), group 256: out[row] = scale * weight * x[token]
// collect_tokens       grid (T, ceil(D / 2048)), group 256: out[token] = held + scale * sum of weight * y[row]
// pair_products        grid P, group 128: out f32 [T, k] = scale * tokens[token] . rows[row]
// gate_rows            grid (T, ceil(D / 2048)), group 256: out = held + scale * sigmoid(logit) * y
// gate_rows_backward   grid T, group 128: d_y and d_logits SOURCE [T]
// gated_pair           grid (P, ceil(F / 2048)), group 256: out [P, F] of gate_up [P, 2 F]. PAIR = 0: gate in the first half, up
//                      in the second, silu(gate) up; 1: the tanh form of GELU; 4: GELU; 3: sigmoid(gate) up; 2: gate in even columns, up in
//                      odd ones, both bounded by `limit`: (up + 1) gate sigmoid(slope gate)
// gated_pair_backward  the same grid: d_gate_up [P, 2 F]
// Bytes: each matrix once, y and x once for each choice.

#ifndef PAIR
#define PAIR 0
#endif

// Rows that a group spreads.
#define SPREAD_ROWS 4

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

KERNEL(spread_tokens)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL uint* order, const GLOBAL float* weights, GLOBAL ELEMENT* out,
    SCALAR(uint, rows), SCALAR(uint, columns), SCALAR(uint, pitch), SCALAR(uint, out_pitch), SCALAR(uint, choices),
    SCALAR(float, scale), SCALAR(uint, weighted)) {
    uint start = (GROUP_Y * THREADS + THREAD) * 8, first = GROUP_X * SPREAD_ROWS;
    uint count = rows - first < SPREAD_ROWS ? rows - first : SPREAD_ROWS;
    if (start >= columns) return;
#if ALIGNED
    // All are asked for before the first is needed.
    Eight values[SPREAD_ROWS];
    UNROLL for (uint n = 0; n < SPREAD_ROWS; ++n) {
        uint pair = order[first + (n < count ? n : 0)];
        float factor = weighted ? scale * weights[pair] : scale;
        values[n] = load_eight(x + (ulong64)(pair / choices) * pitch + start);
        for (int j = 0; j < 8; ++j) values[n].v[j] *= factor;
    }
    UNROLL for (uint n = 0; n < SPREAD_ROWS; ++n) {
        if (n < count) store_eight(values[n], out + (ulong64)(first + n) * out_pitch + start);
    }
#else
    for (uint n = 0; n < count; ++n) {
        uint pair = order[first + n];
        float factor = weighted ? scale * weights[pair] : scale;
        for (uint i = start; i < start + 8 && i < columns; ++i)
            narrow(widen(x[(ulong64)(pair / choices) * pitch + i]) * factor, out + (ulong64)(first + n) * out_pitch + i);
    }
#endif
}

KERNEL(collect_tokens)(GIVEN_POSITION
    const GLOBAL ELEMENT* y, const GLOBAL uint* places, const GLOBAL float* weights, const GLOBAL ELEMENT* held,
    GLOBAL ELEMENT* out, SCALAR(uint, columns), SCALAR(uint, pitch), SCALAR(uint, held_pitch), SCALAR(uint, out_pitch),
    SCALAR(uint, choices), SCALAR(float, scale), SCALAR(uint, weighted), SCALAR(uint, holds)) {
    ulong64 token = GROUP_X;
    places += token * choices;
    weights += weighted ? token * choices : 0;
    held += token * held_pitch;
    out += token * out_pitch;
    uint start = (GROUP_Y * THREADS + THREAD) * 8;
#if ALIGNED
    if (start >= columns) return;
    Eight sum;
    for (int j = 0; j < 8; ++j) sum.v[j] = 0.0f;
    for (uint choice = 0; choice < choices; ++choice) {
        float factor = weighted ? scale * weights[choice] : scale;
        Eight a = load_eight(y + (ulong64)places[choice] * pitch + start);
        for (int j = 0; j < 8; ++j) sum.v[j] += a.v[j] * factor;
    }
    if (holds) {
        Eight a = load_eight(held + start);
        for (int j = 0; j < 8; ++j) sum.v[j] += a.v[j];
    }
    store_eight(sum, out + start);
#else
    for (uint i = start; i < start + 8 && i < columns; ++i) {
        float sum = 0.0f;
        for (uint choice = 0; choice < choices; ++choice) {
            float factor = weighted ? scale * weights[choice] : scale;
            sum += widen(y[(ulong64)places[choice] * pitch + i]) * factor;
        }
        narrow(holds ? sum + widen(held[i]) : sum, out + i);
    }
#endif
}

// The sum over columns of a product of two rows; every thread gets it.
DEVICE float row_product(
    POSITION const GLOBAL ELEMENT* left, const GLOBAL ELEMENT* right, uint columns, SHARED_POINTER(float) scratch) {
    float sum = 0.0f;
#if ALIGNED
    for (uint i = THREAD * 8; i < columns; i += THREADS * 8) {
        Eight a = load_eight(left + i), b = load_eight(right + i);
        for (int j = 0; j < 8; ++j) sum += a.v[j] * b.v[j];
    }
#else
    for (uint i = THREAD; i < columns; i += THREADS) sum += widen(left[i]) * widen(right[i]);
#endif
    return group_sum(HERE sum, scratch);
}

KERNEL(pair_products)(GIVEN_POSITION
    const GLOBAL ELEMENT* tokens, const GLOBAL ELEMENT* rows, const GLOBAL uint* places, GLOBAL float* out,
    SCALAR(uint, columns), SCALAR(uint, token_pitch), SCALAR(uint, row_pitch), SCALAR(uint, choices), SCALAR(float, scale)) {
    SHARED float scratch[32];
    tokens += (ulong64)(GROUP_X / choices) * token_pitch;
    rows += (ulong64)places[GROUP_X] * row_pitch;
    float sum = row_product(HERE tokens, rows, columns, scratch);
    if (THREAD == 0) out[GROUP_X] = scale * sum;
}

KERNEL(gate_rows)(GIVEN_POSITION
    const GLOBAL ELEMENT* y, const GLOBAL SOURCE* logits, const GLOBAL ELEMENT* held, GLOBAL ELEMENT* out,
    SCALAR(uint, columns), SCALAR(uint, pitch), SCALAR(uint, logit_pitch), SCALAR(uint, held_pitch), SCALAR(uint, out_pitch),
    SCALAR(float, scale), SCALAR(uint, holds)) {
    ulong64 token = GROUP_X;
    float factor = scale * sigmoid(widen(logits[token * logit_pitch]));
    y += token * pitch;
    held += token * held_pitch;
    out += token * out_pitch;
    uint start = (GROUP_Y * THREADS + THREAD) * 8;
#if ALIGNED
    if (start >= columns) return;
    Eight sum = load_eight(y + start);
    for (int j = 0; j < 8; ++j) sum.v[j] *= factor;
    if (holds) {
        Eight a = load_eight(held + start);
        for (int j = 0; j < 8; ++j) sum.v[j] += a.v[j];
    }
    store_eight(sum, out + start);
#else
    for (uint i = start; i < start + 8 && i < columns; ++i) {
        float value = factor * widen(y[i]);
        narrow(holds ? value + widen(held[i]) : value, out + i);
    }
#endif
}

KERNEL(gate_rows_backward)(GIVEN_POSITION
    const GLOBAL ELEMENT* y, const GLOBAL SOURCE* logits, const GLOBAL ELEMENT* d_out, GLOBAL ELEMENT* d_y,
    GLOBAL SOURCE* d_logits, SCALAR(uint, columns), SCALAR(uint, pitch), SCALAR(uint, logit_pitch),
    SCALAR(uint, d_out_pitch), SCALAR(uint, d_y_pitch), SCALAR(uint, d_logit_pitch), SCALAR(float, scale)) {
    SHARED float scratch[32];
    ulong64 token = GROUP_X;
    float share = sigmoid(widen(logits[token * logit_pitch]));
    y += token * pitch;
    d_out += token * d_out_pitch;
    d_y += token * d_y_pitch;
    float product = row_product(HERE y, d_out, columns, scratch);
    if (THREAD == 0) narrow(scale * share * (1.0f - share) * product, d_logits + token * d_logit_pitch);
    for (uint i = THREAD; i < columns; i += THREADS) narrow(scale * share * widen(d_out[i]), d_y + i);
}

// The value of a gated activation and its slopes to gate and up.
struct PairValues { float value, d_gate, d_up; };

DEVICE PairValues activate_pair(float gate, float up, float slope, float limit) {
    PairValues out;
#if PAIR == 2
    float bounded = gate > limit ? limit : gate, shifted = (up > limit ? limit : up < -limit ? -limit : up) + 1.0f;
    float share = sigmoid(slope * bounded);
    out.value = bounded * share * shifted;
    out.d_gate = gate <= limit ? shifted * share * (1.0f + slope * bounded * (1.0f - share)) : 0.0f;
    out.d_up = magnitude(up) <= limit ? bounded * share : 0.0f;
#else
#if PAIR == 1
    Activated gated = gelu_tanh(gate);
#elif PAIR == 3
    Activated gated = logistic_gate(gate);
#elif PAIR == 4
    Activated gated = gelu(gate);
#else
    Activated gated = silu(gate);
#endif
    out.value = gated.value * up;
    out.d_gate = up * gated.slope;
    out.d_up = gated.value;
#endif
    return out;
}

// Where the gate of a column is, and from there its up.
DEVICE uint gate_of(uint column) { return PAIR == 2 ? 2 * column : column; }
DEVICE uint up_from(uint columns) { return PAIR == 2 ? 1 : columns; }

KERNEL(gated_pair)(GIVEN_POSITION
    const GLOBAL ELEMENT* gate_up, GLOBAL ELEMENT* out, SCALAR(uint, columns), SCALAR(uint, pitch), SCALAR(uint, out_pitch),
    SCALAR(float, slope), SCALAR(float, limit)) {
    gate_up += (ulong64)GROUP_X * pitch;
    out += (ulong64)GROUP_X * out_pitch;
    uint start = (GROUP_Y * THREADS + THREAD) * 8;
#if ALIGNED
    if (start >= columns) return;
    Eight first = load_eight(gate_up + gate_of(start));
    Eight second = load_eight(gate_up + (PAIR == 2 ? 2 * start + 8 : start + columns));
    Eight result;
    for (int j = 0; j < 8; ++j) {
        float gate = PAIR == 2 ? (j < 4 ? first.v[(2 * j) & 7] : second.v[(2 * j) & 7]) : first.v[j];
        float up = PAIR == 2 ? (j < 4 ? first.v[(2 * j + 1) & 7] : second.v[(2 * j + 1) & 7]) : second.v[j];
        result.v[j] = activate_pair(gate, up, slope, limit).value;
    }
    store_eight(result, out + start);
#else
    for (uint i = start; i < start + 8 && i < columns; ++i) {
        const GLOBAL ELEMENT* gate = gate_up + gate_of(i);
        narrow(activate_pair(widen(gate[0]), widen(gate[up_from(columns)]), slope, limit).value, out + i);
    }
#endif
}

KERNEL(gated_pair_backward)(GIVEN_POSITION
    const GLOBAL ELEMENT* gate_up, const GLOBAL ELEMENT* d_out, GLOBAL ELEMENT* d_gate_up, SCALAR(uint, columns),
    SCALAR(uint, pitch), SCALAR(uint, d_out_pitch), SCALAR(uint, d_pitch), SCALAR(float, slope), SCALAR(float, limit)) {
    gate_up += (ulong64)GROUP_X * pitch;
    d_out += (ulong64)GROUP_X * d_out_pitch;
    d_gate_up += (ulong64)GROUP_X * d_pitch;
    uint start = (GROUP_Y * THREADS + THREAD) * 8;
#if ALIGNED
    if (start >= columns) return;
    uint other = PAIR == 2 ? 2 * start + 8 : start + columns;
    Eight first = load_eight(gate_up + gate_of(start)), second = load_eight(gate_up + other), d = load_eight(d_out + start);
    Eight d_first, d_second;
    for (int j = 0; j < 8; ++j) {
        int place = (2 * j) & 7;
        float gate = PAIR == 2 ? (j < 4 ? first.v[place] : second.v[place]) : first.v[j];
        float up = PAIR == 2 ? (j < 4 ? first.v[place + 1] : second.v[place + 1]) : second.v[j];
        PairValues values = activate_pair(gate, up, slope, limit);
        float d_gate = d.v[j] * values.d_gate, d_up = d.v[j] * values.d_up;
        if (PAIR != 2) {
            d_first.v[j] = d_gate;
            d_second.v[j] = d_up;
        } else if (j < 4) {
            d_first.v[place] = d_gate;
            d_first.v[place + 1] = d_up;
        } else {
            d_second.v[place] = d_gate;
            d_second.v[place + 1] = d_up;
        }
    }
    store_eight(d_first, d_gate_up + gate_of(start));
    store_eight(d_second, d_gate_up + other);
#else
    for (uint i = start; i < start + 8 && i < columns; ++i) {
        uint gate = gate_of(i), up = gate + up_from(columns);
        PairValues values = activate_pair(widen(gate_up[gate]), widen(gate_up[up]), slope, limit);
        narrow(widen(d_out[i]) * values.d_gate, d_gate_up + gate);
        narrow(widen(d_out[i]) * values.d_up, d_gate_up + up);
    }
#endif
}
