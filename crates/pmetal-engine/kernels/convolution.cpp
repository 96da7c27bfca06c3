// Causal depthwise convolution over time with TAPS taps, followed by SiLU: arrays [T, C] whose tokens lie a pitch apart,
// weight f32 [C, TAPS], of which the last tap is the token itself. `marks` say where documents begin (see delta.cpp).
//
// short_convolution           what is before the first token is in `state` [TAPS - 1, C] where `has_state`. Grid
//                             (ceil(C / 128), ceil(T / span)), group 128: a thread takes `span` tokens of a channel;
//                             bytes: both arrays
// short_convolution_back      d_x; where `weighted`, also sums over each span of the gradients of the weight, f32
//                             [ceil(T / span), C, TAPS]. The same grid; bytes: three arrays
// move_convolution_state      state = the last TAPS - 1 inputs of the document, or of what was before. Grid ceil(C / 128)

DEVICE uint document_of(int mark) { return (uint)(mark < 0 ? -1 - mark : mark); }

DEVICE float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Whether a token of the document that begins at `first` reads a row, which may be before the first one.
DEVICE bool is_read(int row, uint first, uint has_state) { return row >= (int)first || (has_state && first == 0); }

DEVICE float input_at(
    const GLOBAL ELEMENT* x, const GLOBAL ELEMENT* state, int row, uint channel, uint channels, uint pitch, uint has_state) {
    if (row >= 0) return widen(x[(ulong64)row * pitch + channel]);
    return has_state ? widen(state[(uint)(row + TAPS - 1) * channels + channel]) : 0.0f;
}

KERNEL(short_convolution)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL float* weight, const GLOBAL int* marks, const GLOBAL ELEMENT* state,
    GLOBAL ELEMENT* out, SCALAR(uint, tokens), SCALAR(uint, channels), SCALAR(uint, pitch), SCALAR(uint, out_pitch),
    SCALAR(uint, span), SCALAR(uint, has_state)) {
    uint channel = GROUP_X * THREADS + THREAD;
    if (channel >= channels) return;
    int begin = (int)(GROUP_Y * span), end = (int)(tokens < (GROUP_Y + 1) * span ? tokens : (GROUP_Y + 1) * span);
    float window[TAPS], factors[TAPS];
    UNROLL for (int tap = 0; tap < TAPS; ++tap) factors[tap] = weight[channel * TAPS + tap];
    UNROLL for (int tap = 1; tap < TAPS; ++tap)
        window[tap] = input_at(x, state, begin + tap - TAPS, channel, channels, pitch, has_state);
    for (int token = begin; token < end; ++token) {
        UNROLL for (int tap = 1; tap < TAPS; ++tap) window[tap - 1] = window[tap];
        window[TAPS - 1] = widen(x[(ulong64)token * pitch + channel]);
        int mark = marks[token];
        float sum = 0.0f;
        UNROLL for (int tap = 0; tap < TAPS; ++tap)
            if (is_read(token + tap + 1 - TAPS, document_of(mark), has_state)) sum += factors[tap] * window[tap];
        narrow(mark < 0 ? 0.0f : sum * logistic(sum), out + (ulong64)token * out_pitch + channel);
    }
}

KERNEL(short_convolution_back)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL float* weight, const GLOBAL int* marks, const GLOBAL ELEMENT* d_out,
    GLOBAL ELEMENT* d_x, GLOBAL float* sums, SCALAR(uint, tokens), SCALAR(uint, channels), SCALAR(uint, pitch),
    SCALAR(uint, d_pitch), SCALAR(uint, x_pitch), SCALAR(uint, span), SCALAR(uint, weighted)) {
    uint channel = GROUP_X * THREADS + THREAD;
    if (channel >= channels) return;
    int begin = (int)(GROUP_Y * span), end = (int)(tokens < (GROUP_Y + 1) * span ? tokens : (GROUP_Y + 1) * span);
    // waiting[j] is the gradient of the token j before, as far as its readers were seen.
    float window[TAPS], factors[TAPS], waiting[TAPS], d_factors[TAPS];
    UNROLL for (int tap = 0; tap < TAPS; ++tap) {
        factors[tap] = weight[channel * TAPS + tap];
        waiting[tap] = d_factors[tap] = 0.0f;
    }
    UNROLL for (int tap = 1; tap < TAPS; ++tap)
        window[tap] = input_at(x, x, begin + tap - TAPS, channel, channels, pitch, 0);
    // A token's numbers are asked for while those of the one before it are used.
    float next_x = widen(x[(ulong64)begin * pitch + channel]), next_d = widen(d_out[(ulong64)begin * d_pitch + channel]);
    for (int token = begin; token < end + TAPS - 1; ++token) {
        UNROLL for (int tap = 1; tap < TAPS; ++tap) window[tap - 1] = window[tap];
        int mark = token < (int)tokens ? marks[token] : -1, next = token + 1 < (int)tokens ? token + 1 : begin;
        float own = next_x, own_d = next_d;
        next_x = widen(x[(ulong64)next * pitch + channel]);
        next_d = widen(d_out[(ulong64)next * d_pitch + channel]);
        window[TAPS - 1] = own;
        if (mark >= 0) {
            float sum = 0.0f;
            UNROLL for (int tap = 0; tap < TAPS; ++tap)
                if (is_read(token + tap + 1 - TAPS, (uint)mark, 0)) sum += factors[tap] * window[tap];
            float share = logistic(sum);
            float slope = own_d * share * (1.0f + sum * (1.0f - share));
            UNROLL for (int tap = 0; tap < TAPS; ++tap) {
                if (!is_read(token + tap + 1 - TAPS, (uint)mark, 0)) continue;
                waiting[TAPS - 1 - tap] += factors[tap] * slope;
                if (token < end) d_factors[tap] += window[tap] * slope;
            }
        }
        int done = token + 1 - TAPS;
        if (done >= begin) narrow(waiting[TAPS - 1], d_x + (ulong64)done * x_pitch + channel);
        UNROLL for (int tap = TAPS - 1; tap > 0; --tap) waiting[tap] = waiting[tap - 1];
        waiting[0] = 0.0f;
    }
    if (!weighted) return;
    sums += ((ulong64)GROUP_Y * channels + channel) * TAPS;
    UNROLL for (int tap = 0; tap < TAPS; ++tap) sums[tap] = d_factors[tap];
}

KERNEL(move_convolution_state)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL int* marks, GLOBAL ELEMENT* state, SCALAR(uint, tokens), SCALAR(uint, channels),
    SCALAR(uint, pitch)) {
    uint channel = GROUP_X * THREADS + THREAD;
    if (channel >= channels) return;
    int count = marks[2 * tokens];
    float held[TAPS];
    UNROLL for (int row = 0; row < TAPS - 1; ++row)
        held[row] = input_at(x, state, count + row + 1 - TAPS, channel, channels, pitch, 1);
    UNROLL for (int row = 0; row < TAPS - 1; ++row) narrow(held[row], state + (uint)row * channels + channel);
}
