// Cross-entropy of rows of f32 logits, replaced by their gradient.
//
// logits f32 [rows, columns], pitch elements from row to row; labels i32 [rows], -100 = no loss and no gradient. The gradient is of ELEMENT, in
// the same memory: row r starts where its logits start. Every element is read before a narrower one is written over it.
// losses f32 [rows], in nats. cap = 0: no softcap. Grid rows, group 1024; bytes: the logits twice, the gradient once.
//
// ALIGNED: columns are a multiple of 8; logits are then read by 32 bytes a thread.
//
// add_rows: total [1] += the sum of values [count] in a fixed order: one group of 1024.

DEVICE float capped(float logit, float scale, float cap) {
    float x = logit * scale;
    return cap > 0.0f ? cap * hyperbolic_tangent(x / cap) : x;
}

// The derivative of the loss by a logit that scale and cap were applied to, through the cap.
DEVICE float slope_of(float x, float top, float share, bool is_label, float cap) {
    float slope = exponential(x - top) * share - (is_label ? 1.0f : 0.0f);
    return cap > 0.0f ? slope * (1.0f - (x / cap) * (x / cap)) : slope;
}

KERNEL(cross_entropy)(GIVEN_POSITION
    GLOBAL float* logits, const GLOBAL int* labels, GLOBAL float* losses, SCALAR(uint, columns),
    SCALAR(uint, pitch), SCALAR(float, scale), SCALAR(float, cap), SCALAR(float, gradient_scale)) {
    SHARED float scratch[32];
    logits += (ulong64)GROUP_X * pitch;
    GLOBAL ELEMENT* gradient = (GLOBAL ELEMENT*)logits;
    int label = labels[GROUP_X];
    if (label < 0) {
        for (uint i = THREAD; i < columns; i += THREADS) narrow(0.0f, gradient + i);
        if (THREAD == 0) losses[GROUP_X] = 0.0f;
        return;
    }
    float largest = -INFINITE, sum = 0.0f;
#if ALIGNED
    for (uint i = THREAD * 8; i < columns; i += THREADS * 8) {
        Eight x = load_eight(logits + i);
        float top = -INFINITE, part = 0.0f;
        for (int j = 0; j < 8; ++j) {
            x.v[j] = capped(x.v[j], scale, cap);
            top = maximum(top, x.v[j]);
        }
        float higher = maximum(largest, top);
        for (int j = 0; j < 8; ++j) part += exponential(x.v[j] - higher);
        sum = sum * exponential(largest - higher) + part;
        largest = higher;
    }
#else
    for (uint i = THREAD; i < columns; i += THREADS) {
        float x = capped(logits[i], scale, cap);
        if (x > largest) {
            sum = sum * exponential(largest - x) + 1.0f;
            largest = x;
        } else {
            sum += exponential(x - largest);
        }
    }
#endif
    // A NaN compares with nothing and stays in the sum; threads without elements hold minus infinity.
    float top = group_max(HERE largest, scratch);
    BARRIER();
    sum = group_sum(HERE largest == -INFINITE && sum == 0.0f ? 0.0f : sum * exponential(largest - top), scratch);
    float target = capped(logits[label], scale, cap);
    BARRIER();
    if (THREAD == 0) losses[GROUP_X] = logarithm(sum) + top - target;
    float share = 1.0f / sum;
#if ALIGNED
    for (uint start = 0; start < columns; start += THREADS * 8) {
        uint i = start + THREAD * 8;
        Eight x;
        if (i < columns) {
            x = load_eight(logits + i);
            for (int j = 0; j < 8; ++j) {
                x.v[j] = slope_of(capped(x.v[j], scale, cap), top, share, i + j == (uint)label, cap) * scale * gradient_scale;
            }
        }
        BARRIER();
        if (i < columns) store_eight(x, gradient + i);
    }
#else
    for (uint start = 0; start < columns; start += THREADS) {
        uint i = start + THREAD;
        float slope = 0.0f;
        if (i < columns) slope = slope_of(capped(logits[i], scale, cap), top, share, i == (uint)label, cap);
        BARRIER();
        if (i < columns) narrow(slope * scale * gradient_scale, gradient + i);
    }
#endif
}

KERNEL(add_rows)(GIVEN_POSITION const GLOBAL float* values, GLOBAL float* total, SCALAR(uint, count)) {
    SHARED float scratch[32];
    float sum = 0.0f;
    for (uint i = THREAD; i < count; i += THREADS) sum += values[i];
    sum = group_sum(HERE sum, scratch);
    if (THREAD == 0) total[0] += sum;
}
