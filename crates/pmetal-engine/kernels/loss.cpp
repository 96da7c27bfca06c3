// Cross-entropy of rows of f32 logits, replaced by their gradient.
//
// logits f32 [rows, columns], contiguous; labels i32 [rows], -100 = no loss and no gradient. The gradient is of ELEMENT, in
// the same memory: row r starts where its logits start. Every element is read before a narrower one is written over it.
// losses f32 [rows], in nats. cap = 0: no softcap. Grid rows, group 1024; bytes: the logits twice, the gradient once.
//
// add_rows: total [1] += the sum of values [count] in a fixed order: one group of 1024.

DEVICE float capped(float logit, float scale, float cap) {
    float x = logit * scale;
    return cap > 0.0f ? cap * hyperbolic_tangent(x / cap) : x;
}

KERNEL(cross_entropy)(
    GLOBAL float* logits, const GLOBAL int* labels, GLOBAL float* losses, SCALAR(uint, columns),
    SCALAR(float, scale), SCALAR(float, cap), SCALAR(float, gradient_scale)) {
    SHARED float scratch[32];
    logits += (ulong64)GROUP_X * columns;
    GLOBAL ELEMENT* gradient = (GLOBAL ELEMENT*)logits;
    int label = labels[GROUP_X];
    if (label < 0) {
        for (uint i = THREAD; i < columns; i += THREADS) narrow(0.0f, gradient + i);
        if (THREAD == 0) losses[GROUP_X] = 0.0f;
        return;
    }
    float largest = -INFINITE, sum = 0.0f;
    for (uint i = THREAD; i < columns; i += THREADS) {
        float x = capped(logits[i], scale, cap);
        if (x > largest) {
            sum = sum * exponential(largest - x) + 1.0f;
            largest = x;
        } else {
            sum += exponential(x - largest);
        }
    }
    // A NaN compares with nothing and stays in the sum; threads without elements hold minus infinity.
    float top = group_max(largest, scratch);
    BARRIER();
    sum = group_sum(largest == -INFINITE && sum == 0.0f ? 0.0f : sum * exponential(largest - top), scratch);
    float target = capped(logits[label], scale, cap);
    BARRIER();
    if (THREAD == 0) losses[GROUP_X] = logarithm(sum) + top - target;
    for (uint start = 0; start < columns; start += THREADS) {
        uint i = start + THREAD;
        float slope = 0.0f;
        if (i < columns) {
            float x = capped(logits[i], scale, cap);
            slope = exponential(x - top) / sum - (i == (uint)label ? 1.0f : 0.0f);
            if (cap > 0.0f) slope *= 1.0f - (x / cap) * (x / cap);
        }
        BARRIER();
        if (i < columns) narrow(slope * scale * gradient_scale, gradient + i);
    }
}

KERNEL(add_rows)(const GLOBAL float* values, GLOBAL float* total, SCALAR(uint, count)) {
    SHARED float scratch[32];
    float sum = 0.0f;
    for (uint i = THREAD; i < count; i += THREADS) sum += values[i];
    sum = group_sum(sum, scratch);
    if (THREAD == 0) total[0] += sum;
}
