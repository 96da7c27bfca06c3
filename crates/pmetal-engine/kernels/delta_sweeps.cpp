// Passes of the gated delta rule over the tokens of documents, with a state [D, E] of each value head in registers. What they
// compute, and why four passes give every gradient without a stored state, is said in device/cpu/delta/sweeps.rs; arrays
// are those of delta.cpp: normed f32 [2, T, G, D], gates f32 [T, H, 2], errors u and recalled R^T k f32 [T, H, E]; answers,
// past and future f32 [T, H, D].
//
// A thread holds HELD rows of one column of the state, PARTS threads beside each other a whole one, of STATE_ROWS <= 256.
// In the two passes over columns rows are D and columns E, in the two over rows the state is transposed. Grid
// (ceil(columns / 32), H, parts), group 128; group z takes the documents that begin in the z-th part of the tokens, so
// that the shape of the launch does not depend on them. Bytes are few; each token waits for the one before it.
//
// delta_answer       o, or where `keeps_errors` u; reads the state before the first token and writes that behind the last
//                    where `has_state`, then with one part
// delta_answer_back  R^T k
// delta_rows         answers S' do and past -S' c
// delta_rows_back    future F w

#define PARTS 4
#define LANES 32
#define HELD ((STATE_ROWS + PARTS - 1) / PARTS)
#define PADDED (HELD * PARTS)
// Tokens that are brought into shared memory at a time.
#define STAGE 8

// The first token of the documents that begin in a part or behind it.
DEVICE uint document_bound(const GLOBAL int* marks, uint tokens, uint part, uint parts) {
    uint token = (uint)((ulong64)tokens * part / parts);
    if (token >= tokens) return tokens;
    uint first = (uint)(marks[token] < 0 ? -1 - marks[token] : marks[token]);
    return first == token ? token : (uint)marks[tokens + token];
}

// Rows of up to STAGE tokens, filled up with zeros.
template <typename T>
DEVICE void stage_rows(POSITION const GLOBAL T* rows, ulong64 pitch, uint count, SHARED_POINTER(float) staged) {
    for (uint i = THREAD; i < STAGE * PADDED; i += THREADS) {
        uint token = i / PADDED, row = i % PADDED;
        staged[i] = token < count && row < STATE_ROWS ? widen(rows[token * pitch + row]) : 0.0f;
    }
}

// The group's columns of them.
template <typename T>
DEVICE void stage_columns(
    POSITION const GLOBAL T* rows, ulong64 pitch, uint count, uint columns, SHARED_POINTER(float) staged) {
    for (uint i = THREAD; i < STAGE * LANES; i += THREADS) {
        uint token = i / LANES, column = GROUP_X * LANES + i % LANES;
        staged[i] = token < count && column < columns ? widen(rows[token * pitch + column]) : 0.0f;
    }
}

// Decay, rate, and whether a document begins.
DEVICE void stage_gates(
    POSITION const GLOBAL float* gates, const GLOBAL int* marks, uint first, uint count, uint heads,
    SHARED_POINTER(float) staged) {
    if (THREAD >= count) return;
    uint token = first + THREAD;
    const GLOBAL float* own = gates + ((ulong64)token * heads + GROUP_Y) * 2;
    staged[THREAD * 3] = own[0];
    staged[THREAD * 3 + 1] = own[1];
    staged[THREAD * 3 + 2] = marks[token] == (int)token ? 1.0f : 0.0f;
}

// Sums that do not wait for each other.
struct Sums { float v[4]; };

// Over the threads that hold a column.
DEVICE float column_sum(Sums sums) {
    float x = (sums.v[0] + sums.v[1]) + (sums.v[2] + sums.v[3]);
    for (uint mask = PARTS / 2; mask > 0; mask >>= 1) x += simd_shuffle_xor(x, mask);
    return x;
}

KERNEL(delta_answer)(GIVEN_POSITION
    const GLOBAL float* normed, const GLOBAL float* gates, const GLOBAL int* marks, const GLOBAL ELEMENT* v,
    GLOBAL ELEMENT* out, GLOBAL float* errors, GLOBAL float* state, SCALAR(uint, tokens), SCALAR(uint, key_heads),
    SCALAR(uint, heads), SCALAR(uint, width), SCALAR(uint, v_pitch), SCALAR(uint, out_pitch), SCALAR(uint, parts),
    SCALAR(uint, keeps_errors), SCALAR(uint, has_state)) {
    SHARED float keys[STAGE * PADDED];
    SHARED float queries[STAGE * PADDED];
    SHARED float values[STAGE * LANES];
    SHARED float controls[STAGE * 3];
    uint lane = THREAD / PARTS, part = THREAD % PARTS, head = GROUP_Y, column = GROUP_X * LANES + lane;
    uint begin = document_bound(marks, tokens, GROUP_Z, parts), end = document_bound(marks, tokens, GROUP_Z + 1, parts);
    ulong64 key_pitch = (ulong64)key_heads * STATE_ROWS;
    normed += head * key_heads / heads * STATE_ROWS;
    state += (ulong64)head * STATE_ROWS * width + column;
    float held[HELD];
    UNROLL for (uint n = 0; n < HELD; ++n) {
        uint row = n * PARTS + part;
        held[n] = has_state && row < STATE_ROWS && column < width ? state[row * width] : 0.0f;
    }
    for (uint first = begin; first < end; first += STAGE) {
        uint count = end - first < STAGE ? end - first : STAGE;
        BARRIER();
        stage_rows(HERE normed + first * key_pitch, key_pitch, count, keys);
        if (!keeps_errors) stage_rows(HERE normed + (tokens + (ulong64)first) * key_pitch, key_pitch, count, queries);
        stage_columns(HERE v + (ulong64)first * v_pitch + head * width, v_pitch, count, width, values);
        stage_gates(HERE gates, marks, first, count, heads, controls);
        BARRIER();
        for (uint s = 0; s < count; ++s) {
            // A document that goes on from a state begins with it.
            float decay = controls[s * 3 + 2] != 0.0f && first + s != begin ? 0.0f : controls[s * 3];
            Sums sum = {}, answer = {};
            UNROLL for (uint n = 0; n < HELD; ++n) {
                held[n] *= decay;
                sum.v[n % 4] += held[n] * keys[s * PADDED + n * PARTS + part];
            }
            float error = values[s * LANES + lane] - column_sum(sum), update = error * controls[s * 3 + 1];
            UNROLL for (uint n = 0; n < HELD; ++n) {
                held[n] += keys[s * PADDED + n * PARTS + part] * update;
                if (!keeps_errors) answer.v[n % 4] += held[n] * queries[s * PADDED + n * PARTS + part];
            }
            float total = column_sum(answer);
            if (part != 0 || column >= width) continue;
            ulong64 token = first + s;
            if (keeps_errors) errors[(token * heads + head) * width + column] = error;
            else narrow(total, out + token * out_pitch + head * width + column);
        }
    }
    if (!has_state || column >= width) return;
    UNROLL for (uint n = 0; n < HELD; ++n) {
        uint row = n * PARTS + part;
        if (row < STATE_ROWS) state[row * width] = held[n];
    }
}

KERNEL(delta_answer_back)(GIVEN_POSITION
    const GLOBAL float* normed, const GLOBAL float* gates, const GLOBAL int* marks, const GLOBAL ELEMENT* d_out,
    GLOBAL float* recalled, SCALAR(uint, tokens), SCALAR(uint, key_heads), SCALAR(uint, heads), SCALAR(uint, width),
    SCALAR(uint, d_pitch), SCALAR(uint, parts)) {
    SHARED float keys[STAGE * PADDED];
    SHARED float queries[STAGE * PADDED];
    SHARED float slopes[STAGE * LANES];
    SHARED float controls[STAGE * 3];
    uint lane = THREAD / PARTS, part = THREAD % PARTS, head = GROUP_Y, column = GROUP_X * LANES + lane;
    uint begin = document_bound(marks, tokens, GROUP_Z, parts), end = document_bound(marks, tokens, GROUP_Z + 1, parts);
    ulong64 key_pitch = (ulong64)key_heads * STATE_ROWS;
    normed += head * key_heads / heads * STATE_ROWS;
    float held[HELD];
    UNROLL for (uint n = 0; n < HELD; ++n) held[n] = 0.0f;
    while (end > begin) {
        uint count = end - begin < STAGE ? end - begin : STAGE, first = end - count;
        BARRIER();
        stage_rows(HERE normed + first * key_pitch, key_pitch, count, keys);
        stage_rows(HERE normed + (tokens + (ulong64)first) * key_pitch, key_pitch, count, queries);
        stage_columns(HERE d_out + (ulong64)first * d_pitch + head * width, d_pitch, count, width, slopes);
        stage_gates(HERE gates, marks, first, count, heads, controls);
        BARRIER();
        for (uint s = count; s-- > 0;) {
            float slope = slopes[s * LANES + lane];
            Sums sums = {};
            UNROLL for (uint n = 0; n < HELD; ++n) {
                held[n] += queries[s * PADDED + n * PARTS + part] * slope;
                sums.v[n % 4] += held[n] * keys[s * PADDED + n * PARTS + part];
            }
            float sum = column_sum(sums);
            // What is before a document has no part in it.
            float update = sum * controls[s * 3 + 1], decay = controls[s * 3 + 2] != 0.0f ? 0.0f : controls[s * 3];
            UNROLL for (uint n = 0; n < HELD; ++n)
                held[n] = decay * (held[n] - keys[s * PADDED + n * PARTS + part] * update);
            if (part == 0 && column < width) recalled[((ulong64)(first + s) * heads + head) * width + column] = sum;
        }
        end = first;
    }
}

KERNEL(delta_rows)(GIVEN_POSITION
    const GLOBAL float* normed, const GLOBAL float* gates, const GLOBAL int* marks, const GLOBAL ELEMENT* d_out,
    const GLOBAL float* errors, const GLOBAL float* recalled, GLOBAL float* answers, GLOBAL float* past,
    SCALAR(uint, tokens), SCALAR(uint, key_heads), SCALAR(uint, heads), SCALAR(uint, depth), SCALAR(uint, d_pitch),
    SCALAR(uint, parts)) {
    SHARED float slopes[STAGE * PADDED];
    SHARED float learned[STAGE * PADDED];
    SHARED float lost[STAGE * PADDED];
    SHARED float keys[STAGE * LANES];
    SHARED float controls[STAGE * 3];
    uint lane = THREAD / PARTS, part = THREAD % PARTS, head = GROUP_Y, column = GROUP_X * LANES + lane;
    uint begin = document_bound(marks, tokens, GROUP_Z, parts), end = document_bound(marks, tokens, GROUP_Z + 1, parts);
    ulong64 key_pitch = (ulong64)key_heads * depth, value_pitch = (ulong64)heads * STATE_ROWS;
    normed += head * key_heads / heads * depth;
    float held[HELD];
    UNROLL for (uint n = 0; n < HELD; ++n) held[n] = 0.0f;
    for (uint first = begin; first < end; first += STAGE) {
        uint count = end - first < STAGE ? end - first : STAGE;
        BARRIER();
        stage_rows(HERE d_out + (ulong64)first * d_pitch + head * STATE_ROWS, d_pitch, count, slopes);
        stage_rows(HERE errors + first * value_pitch + head * STATE_ROWS, value_pitch, count, learned);
        stage_rows(HERE recalled + first * value_pitch + head * STATE_ROWS, value_pitch, count, lost);
        stage_columns(HERE normed + first * key_pitch, key_pitch, count, depth, keys);
        stage_gates(HERE gates, marks, first, count, heads, controls);
        BARRIER();
        for (uint s = 0; s < count; ++s) {
            float decay = controls[s * 3 + 2] != 0.0f ? 0.0f : controls[s * 3], rate = controls[s * 3 + 1];
            float key = keys[s * LANES + lane] * rate;
            Sums answer = {}, back = {};
            UNROLL for (uint n = 0; n < HELD; ++n) {
                uint i = s * PADDED + n * PARTS + part;
                float before = held[n] * decay;
                answer.v[n % 4] += before * slopes[i];
                back.v[n % 4] += before * lost[i];
                held[n] = before + key * learned[i];
            }
            float answered = column_sum(answer), lost_sum = column_sum(back);
            if (part != 0 || column >= depth) continue;
            ulong64 place = ((ulong64)(first + s) * heads + head) * depth + column;
            answers[place] = answered;
            past[place] = -rate * lost_sum;
        }
    }
}

KERNEL(delta_rows_back)(GIVEN_POSITION
    const GLOBAL float* normed, const GLOBAL float* gates, const GLOBAL int* marks, const GLOBAL ELEMENT* d_out,
    const GLOBAL float* errors, const GLOBAL float* recalled, GLOBAL float* future, SCALAR(uint, tokens),
    SCALAR(uint, key_heads), SCALAR(uint, heads), SCALAR(uint, depth), SCALAR(uint, d_pitch), SCALAR(uint, parts)) {
    SHARED float slopes[STAGE * PADDED];
    SHARED float learned[STAGE * PADDED];
    SHARED float lost[STAGE * PADDED];
    SHARED float keys[STAGE * LANES];
    SHARED float queries[STAGE * LANES];
    SHARED float controls[STAGE * 3];
    uint lane = THREAD / PARTS, part = THREAD % PARTS, head = GROUP_Y, column = GROUP_X * LANES + lane;
    uint begin = document_bound(marks, tokens, GROUP_Z, parts), end = document_bound(marks, tokens, GROUP_Z + 1, parts);
    ulong64 key_pitch = (ulong64)key_heads * depth, value_pitch = (ulong64)heads * STATE_ROWS;
    normed += head * key_heads / heads * depth;
    float held[HELD];
    UNROLL for (uint n = 0; n < HELD; ++n) held[n] = 0.0f;
    while (end > begin) {
        uint count = end - begin < STAGE ? end - begin : STAGE, first = end - count;
        BARRIER();
        stage_rows(HERE d_out + (ulong64)first * d_pitch + head * STATE_ROWS, d_pitch, count, slopes);
        stage_rows(HERE errors + first * value_pitch + head * STATE_ROWS, value_pitch, count, learned);
        stage_rows(HERE recalled + first * value_pitch + head * STATE_ROWS, value_pitch, count, lost);
        stage_columns(HERE normed + first * key_pitch, key_pitch, count, depth, keys);
        stage_columns(HERE normed + (tokens + (ulong64)first) * key_pitch, key_pitch, count, depth, queries);
        stage_gates(HERE gates, marks, first, count, heads, controls);
        BARRIER();
        for (uint s = count; s-- > 0;) {
            float decay = controls[s * 3 + 2] != 0.0f ? 0.0f : controls[s * 3], rate = controls[s * 3 + 1];
            float key = keys[s * LANES + lane] * rate, query = queries[s * LANES + lane];
            Sums sums = {};
            UNROLL for (uint n = 0; n < HELD; ++n) {
                uint i = s * PADDED + n * PARTS + part;
                sums.v[n % 4] += held[n] * learned[i];
                float now = held[n] + query * slopes[i];
                held[n] = decay * (now - key * lost[i]);
            }
            float sum = column_sum(sums);
            if (part != 0 || column >= depth) continue;
            future[((ulong64)(first + s) * heads + head) * depth + column] = rate * sum;
        }
        end = first;
    }
}
