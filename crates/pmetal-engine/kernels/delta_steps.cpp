// The gated delta rule token by token, for a few tokens: a state [D, E] of each value head is in registers. Arrays are those of
// delta.cpp: normed f32 [2, T, G, D], gates f32 [T, H, 2].
//
// A thread holds HELD rows of one column of the state, PARTS threads beside each other a whole one, of STATE_ROWS = D <= 256.
//
// delta_answer  o; reads the state before the first token and writes that behind the last where `has_state`. Grid
//               (ceil(E / 32), H), group 128. Bytes are few; each token waits for the one before it

#define PARTS 4
#define LANES 32
#define HELD ((STATE_ROWS + PARTS - 1) / PARTS)
#define PADDED (HELD * PARTS)
// Tokens that are brought into shared memory at a time.
#define STAGE 8

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
    GLOBAL ELEMENT* out, GLOBAL float* state, SCALAR(uint, tokens), SCALAR(uint, key_heads), SCALAR(uint, heads),
    SCALAR(uint, width), SCALAR(uint, v_pitch), SCALAR(uint, out_pitch), SCALAR(uint, has_state)) {
    SHARED float keys[STAGE * PADDED];
    SHARED float queries[STAGE * PADDED];
    SHARED float values[STAGE * LANES];
    SHARED float controls[STAGE * 3];
    uint lane = THREAD / PARTS, part = THREAD % PARTS, head = GROUP_Y, column = GROUP_X * LANES + lane;
    ulong64 key_pitch = (ulong64)key_heads * STATE_ROWS;
    normed += head * key_heads / heads * STATE_ROWS;
    state += (ulong64)head * STATE_ROWS * width + column;
    float held[HELD];
    UNROLL for (uint n = 0; n < HELD; ++n) {
        uint row = n * PARTS + part;
        held[n] = has_state && row < STATE_ROWS && column < width ? state[row * width] : 0.0f;
    }
    for (uint first = 0; first < tokens; first += STAGE) {
        uint count = tokens - first < STAGE ? tokens - first : STAGE;
        BARRIER();
        stage_rows(HERE normed + first * key_pitch, key_pitch, count, keys);
        stage_rows(HERE normed + (tokens + (ulong64)first) * key_pitch, key_pitch, count, queries);
        stage_columns(HERE v + (ulong64)first * v_pitch + head * width, v_pitch, count, width, values);
        stage_gates(HERE gates, marks, first, count, heads, controls);
        BARRIER();
        for (uint s = 0; s < count; ++s) {
            // A document that goes on from a state begins with it.
            float decay = controls[s * 3 + 2] != 0.0f && first + s != 0 ? 0.0f : controls[s * 3];
            Sums sum = {}, answer = {};
            UNROLL for (uint n = 0; n < HELD; ++n) {
                held[n] *= decay;
                sum.v[n % 4] += held[n] * keys[s * PADDED + n * PARTS + part];
            }
            float error = values[s * LANES + lane] - column_sum(sum), update = error * controls[s * 3 + 1];
            UNROLL for (uint n = 0; n < HELD; ++n) {
                held[n] += keys[s * PADDED + n * PARTS + part] * update;
                answer.v[n % 4] += held[n] * queries[s * PADDED + n * PARTS + part];
            }
            float total = column_sum(answer);
            if (part != 0 || column >= width) continue;
            narrow(total, out + (ulong64)(first + s) * out_pitch + head * width + column);
        }
    }
    if (!has_state || column >= width) return;
    UNROLL for (uint n = 0; n < HELD; ++n) {
        uint row = n * PARTS + part;
        if (row < STATE_ROWS) state[row * width] = held[n];
    }
}
