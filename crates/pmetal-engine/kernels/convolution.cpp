// Causal depthwise convolution over time with TAPS taps, followed by SiLU: arrays [T, C] whose tokens lie a pitch apart,
// weight f32 [C, TAPS], of which the last tap is the token itself. `marks` say where documents begin (see delta.cpp).
//
// short_convolution           what is before the first token is in `state` [TAPS - 1, C] where `has_state`. Grid
//                             (ceil(C / 128 / WIDTH), ceil(T / span)), group 128: a thread takes `span` tokens of WIDTH channels;
//                             bytes: both arrays
// short_convolution_back      d_x; where `weighted`, also sums over each span of the gradients of the weight, f32
//                             [ceil(T / span), C, TAPS]. The same grid; bytes: three arrays
// move_convolution_state      state = the last TAPS - 1 inputs of the document, or of what was before. Grid ceil(C / 128 / WIDTH)

// Tokens whose numbers a thread asks for at one time.
#define AHEAD 8

// Neighbouring channels of a thread: IN_PAIRS says that rows begin where two elements can be read at once.
#if IN_PAIRS
#define WIDTH 2
#else
#define WIDTH 1
#endif
struct Channels { float v[WIDTH]; };

DEVICE Channels channels_at(const GLOBAL ELEMENT* from) {
    Channels out;
#if IN_PAIRS
    Two two = load_two(from);
    for (int c = 0; c < 2; ++c) out.v[c] = two.v[c];
#else
    out.v[0] = widen(*from);
#endif
    return out;
}

DEVICE void store_channels(Channels x, GLOBAL ELEMENT* to) {
#if IN_PAIRS
    Two two = {{x.v[0], x.v[1]}};
    store_two(two, to);
#else
    narrow(x.v[0], to);
#endif
}

DEVICE uint document_of(int mark) { return (uint)(mark < 0 ? -1 - mark : mark); }

DEVICE float logistic(float x) { return reciprocal(1.0f + exponential(-x)); }

// How many of the TAPS tokens before and at one are its document's, or are there from before the first.
DEVICE int readable(int token, uint first, uint has_state) {
    return token - (int)first + 1 >= TAPS || (has_state && first == 0) ? TAPS : token - (int)first + 1;
}

DEVICE Channels input_at(
    const GLOBAL ELEMENT* x, const GLOBAL ELEMENT* state, int row, uint channel, uint channels, uint pitch, uint has_state) {
    Channels zeros = {};
    if (row >= 0) return channels_at(x + (ulong64)row * pitch + channel);
    return has_state ? channels_at(state + (uint)(row + TAPS - 1) * channels + channel) : zeros;
}

// A thread's taps, and what its last tokens were.
struct Taps { Channels factors[TAPS], window[TAPS]; };

DEVICE Taps taps_before(
    const GLOBAL ELEMENT* x, const GLOBAL ELEMENT* state, const GLOBAL float* weight, int begin, uint channel, uint channels,
    uint pitch, uint has_state) {
    Taps taps;
    UNROLL for (int c = 0; c < WIDTH; ++c) {
        UNROLL for (int tap = 0; tap < TAPS; ++tap) taps.factors[tap].v[c] = weight[(channel + c) * TAPS + tap];
    }
    UNROLL for (int tap = 1; tap < TAPS; ++tap)
        taps.window[tap] = input_at(x, state, begin + tap - TAPS, channel, channels, pitch, has_state);
    return taps;
}

DEVICE void push(LOCAL Taps& taps, Channels fresh) {
    UNROLL for (int tap = 1; tap < TAPS; ++tap) taps.window[tap - 1] = taps.window[tap];
    taps.window[TAPS - 1] = fresh;
}

// The sum of a token's taps, of which so many are readable.
DEVICE float tapped(LOCAL const Taps& taps, int count, int c) {
    float sum = 0.0f;
    if (count == TAPS) {
        UNROLL for (int tap = 0; tap < TAPS; ++tap) sum += taps.factors[tap].v[c] * taps.window[tap].v[c];
    } else {
        UNROLL for (int tap = 0; tap < TAPS; ++tap)
            if (tap >= TAPS - count) sum += taps.factors[tap].v[c] * taps.window[tap].v[c];
    }
    return sum;
}

KERNEL(short_convolution)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL float* weight, const GLOBAL int* marks, const GLOBAL ELEMENT* state,
    GLOBAL ELEMENT* out, SCALAR(uint, tokens), SCALAR(uint, channels), SCALAR(uint, pitch), SCALAR(uint, out_pitch),
    SCALAR(uint, span), SCALAR(uint, has_state)) {
    uint channel = (GROUP_X * THREADS + THREAD) * WIDTH;
    if (channel >= channels) return;
    int begin = (int)(GROUP_Y * span), end = (int)(tokens < (GROUP_Y + 1) * span ? tokens : (GROUP_Y + 1) * span);
    Taps taps = taps_before(x, state, weight, begin, channel, channels, pitch, has_state);
    for (int first = begin; first < end; first += AHEAD) {
        Channels fresh[AHEAD];
        int own_marks[AHEAD];
        UNROLL for (int i = 0; i < AHEAD; ++i) {
            int token = first + i < end ? first + i : begin;
            fresh[i] = channels_at(x + (ulong64)token * pitch + channel);
            own_marks[i] = marks[token];
        }
        UNROLL for (int i = 0; i < AHEAD; ++i) {
            int token = first + i, mark = own_marks[i];
            push(taps, fresh[i]);
            int count = readable(token, document_of(mark), has_state);
            Channels result;
            UNROLL for (int c = 0; c < WIDTH; ++c) {
                float sum = tapped(taps, count, c);
                result.v[c] = mark < 0 ? 0.0f : sum * logistic(sum);
            }
            if (token < end) store_channels(result, out + (ulong64)token * out_pitch + channel);
        }
    }
}

KERNEL(short_convolution_back)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL float* weight, const GLOBAL int* marks, const GLOBAL ELEMENT* d_out,
    GLOBAL ELEMENT* d_x, GLOBAL float* sums, SCALAR(uint, tokens), SCALAR(uint, channels), SCALAR(uint, pitch),
    SCALAR(uint, d_pitch), SCALAR(uint, x_pitch), SCALAR(uint, span), SCALAR(uint, weighted)) {
    uint channel = (GROUP_X * THREADS + THREAD) * WIDTH;
    if (channel >= channels) return;
    int begin = (int)(GROUP_Y * span), end = (int)(tokens < (GROUP_Y + 1) * span ? tokens : (GROUP_Y + 1) * span);
    Taps taps = taps_before(x, x, weight, begin, channel, channels, pitch, 0);
    // waiting[j] is the gradient of the token j before, as far as its readers were seen.
    Channels waiting[TAPS] = {}, d_factors[TAPS] = {};
    // The tokens behind the span are read for what they give to its last ones.
    int behind = end + TAPS - 1;
    for (int first = begin; first < behind; first += AHEAD) {
        Channels fresh[AHEAD], slopes[AHEAD];
        int own_marks[AHEAD];
        UNROLL for (int i = 0; i < AHEAD; ++i) {
            bool is_there = first + i < behind && first + i < (int)tokens;
            int token = is_there ? first + i : begin;
            fresh[i] = channels_at(x + (ulong64)token * pitch + channel);
            slopes[i] = channels_at(d_out + (ulong64)token * d_pitch + channel);
            own_marks[i] = is_there ? marks[token] : -1;
        }
        UNROLL for (int i = 0; i < AHEAD; ++i) {
            int token = first + i, mark = own_marks[i], done = token + 1 - TAPS;
            push(taps, fresh[i]);
            int count = mark < 0 ? 0 : readable(token, (uint)mark, 0);
            UNROLL for (int c = 0; c < WIDTH; ++c) {
                if (count == 0) continue;
                float sum = tapped(taps, count, c), share = logistic(sum);
                float slope = slopes[i].v[c] * share * (1.0f + sum * (1.0f - share));
                UNROLL for (int tap = 0; tap < TAPS; ++tap) {
                    if (tap < TAPS - count) continue;
                    waiting[TAPS - 1 - tap].v[c] += taps.factors[tap].v[c] * slope;
                    if (weighted && token < end) d_factors[tap].v[c] += taps.window[tap].v[c] * slope;
                }
            }
            if (done >= begin && done < end) store_channels(waiting[TAPS - 1], d_x + (ulong64)done * x_pitch + channel);
            UNROLL for (int tap = TAPS - 1; tap > 0; --tap) waiting[tap] = waiting[tap - 1];
            waiting[0] = Channels();
        }
    }
    if (!weighted) return;
    sums += ((ulong64)GROUP_Y * channels + channel) * TAPS;
    UNROLL for (int c = 0; c < WIDTH; ++c)
        UNROLL for (int tap = 0; tap < TAPS; ++tap) sums[c * TAPS + tap] = d_factors[tap].v[c];
}

KERNEL(move_convolution_state)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL int* marks, GLOBAL ELEMENT* state, SCALAR(uint, tokens), SCALAR(uint, channels),
    SCALAR(uint, pitch)) {
    uint channel = (GROUP_X * THREADS + THREAD) * WIDTH;
    if (channel >= channels) return;
    int count = marks[2 * tokens];
    Channels held[TAPS];
    UNROLL for (int row = 0; row < TAPS - 1; ++row)
        held[row] = input_at(x, state, count + row + 1 - TAPS, channel, channels, pitch, 1);
    UNROLL for (int row = 0; row < TAPS - 1; ++row) store_channels(held[row], state + (uint)row * channels + channel);
}
