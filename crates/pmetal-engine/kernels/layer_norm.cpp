// LayerNorm (Ba, Kiros and Hinton, arXiv 1607.06450) of rows of ELEMENT, in f32 inside:
// out = (x - mean) / sqrt(variance + epsilon) * weight + bias, the variance from what is left of x without its mean.
//
// Rows lie as norm.cpp says. weight WEIGHT [weight_heads, width] and bias BIAS [bias_heads, width] may be null; row r reads
// row r % heads of them: heads is 1, or `inner` where each head of a token has its own.
// Bytes: forward 2 rows, backward 3 (4 when it accumulates). ALIGNED: width, pitches and addresses are multiples of 8
// elements and 16 bytes; a thread then holds VECTORS times 8 elements of its row, so that each is read once.
//
// layer_norm           grid rows, group 32..1024 threads
// layer_norm_backward  the same; d_x is overwritten, or `held` added to it when `accumulate`
// layer_norm_moments   grid rows: moments f32 [2, rows], the mean of each row and 1 / sqrt(variance + epsilon)
// layer_norm_sums      grid (ceil(heads * width / 128), parts), group 128: partial sums over rows, f32 [parts, heads * width],
//                      of d_out, times the normed row when `normed`

struct Moments {
    float mean, scale;
};

#if ALIGNED
DEVICE Moments moments_of(POSITION LOCAL Eight* a, uint width, float epsilon, SHARED_POINTER(float) scratch) {
    float sum = 0.0f, squares = 0.0f;
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        if ((n * THREADS + THREAD) * 8 >= width) continue;
        for (int j = 0; j < 8; ++j) sum += a[n].v[j];
    }
    float mean = group_sum(HERE sum, scratch) / (float)width;
    BARRIER();
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        if ((n * THREADS + THREAD) * 8 >= width) continue;
        for (int j = 0; j < 8; ++j) squares += (a[n].v[j] - mean) * (a[n].v[j] - mean);
    }
    Moments moments = {mean, 1.0f / square_root(group_sum(HERE squares, scratch) / (float)width + epsilon)};
    return moments;
}
#endif

DEVICE Moments moments_of_row(
    POSITION const GLOBAL ELEMENT* x, uint width, float epsilon, SHARED_POINTER(float) scratch) {
    float sum = 0.0f, squares = 0.0f;
    for (uint i = THREAD; i < width; i += THREADS) sum += widen(x[i]);
    float mean = group_sum(HERE sum, scratch) / (float)width;
    BARRIER();
    for (uint i = THREAD; i < width; i += THREADS) squares += (widen(x[i]) - mean) * (widen(x[i]) - mean);
    Moments moments = {mean, 1.0f / square_root(group_sum(HERE squares, scratch) / (float)width + epsilon)};
    return moments;
}

KERNEL(layer_norm)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL WEIGHT* weight, const GLOBAL BIAS* bias, GLOBAL ELEMENT* out,
    SCALAR(uint, width), SCALAR(uint, inner), SCALAR(uint, weight_heads), SCALAR(uint, bias_heads), SCALAR(uint, pitch),
    SCALAR(uint, out_pitch), SCALAR(float, epsilon)) {
    SHARED float scratch[32];
    x += row_start(GROUP_X, inner, pitch, width);
    out += row_start(GROUP_X, inner, out_pitch, width);
    if (weight) weight += GROUP_X % weight_heads * width;
    if (bias) bias += GROUP_X % bias_heads * width;
#if ALIGNED
    Eight a[VECTORS];
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i < width) a[n] = load_eight(x + i);
    }
    Moments moments = moments_of(HERE a, width, epsilon, scratch);
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i >= width) continue;
        for (int j = 0; j < 8; ++j) a[n].v[j] = (a[n].v[j] - moments.mean) * moments.scale;
        if (weight) {
            Eight w = load_eight(weight + i);
            for (int j = 0; j < 8; ++j) a[n].v[j] *= w.v[j];
        }
        if (bias) {
            Eight b = load_eight(bias + i);
            for (int j = 0; j < 8; ++j) a[n].v[j] += b.v[j];
        }
        store_eight(a[n], out + i);
    }
#else
    Moments moments = moments_of_row(HERE x, width, epsilon, scratch);
    for (uint i = THREAD; i < width; i += THREADS) {
        float value = (widen(x[i]) - moments.mean) * moments.scale * (weight ? widen(weight[i]) : 1.0f);
        narrow(bias ? value + widen(bias[i]) : value, out + i);
    }
#endif
}

KERNEL(layer_norm_backward)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL WEIGHT* weight, const GLOBAL ELEMENT* d_out, GLOBAL ELEMENT* d_x,
    const GLOBAL ELEMENT* held, SCALAR(uint, width), SCALAR(uint, inner), SCALAR(uint, weight_heads), SCALAR(uint, pitch),
    SCALAR(uint, out_pitch), SCALAR(uint, d_pitch), SCALAR(uint, held_pitch), SCALAR(float, epsilon),
    SCALAR(uint, accumulate)) {
    SHARED float scratch[32];
    x += row_start(GROUP_X, inner, pitch, width);
    d_out += row_start(GROUP_X, inner, out_pitch, width);
    d_x += row_start(GROUP_X, inner, d_pitch, width);
    held += row_start(GROUP_X, inner, held_pitch, width);
    if (weight) weight += GROUP_X % weight_heads * width;
    float slopes = 0.0f, products = 0.0f;
#if ALIGNED
    Eight a[VECTORS], d[VECTORS];
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i < width) a[n] = load_eight(x + i);
        if (i < width) d[n] = load_eight(d_out + i);
    }
    Moments moments = moments_of(HERE a, width, epsilon, scratch);
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i >= width) continue;
        if (weight) {
            Eight w = load_eight(weight + i);
            for (int j = 0; j < 8; ++j) d[n].v[j] *= w.v[j];
        }
        for (int j = 0; j < 8; ++j) {
            a[n].v[j] = (a[n].v[j] - moments.mean) * moments.scale;
            slopes += d[n].v[j];
            products += a[n].v[j] * d[n].v[j];
        }
    }
#else
    Moments moments = moments_of_row(HERE x, width, epsilon, scratch);
    for (uint i = THREAD; i < width; i += THREADS) {
        float d = widen(d_out[i]) * (weight ? widen(weight[i]) : 1.0f);
        slopes += d;
        products += (widen(x[i]) - moments.mean) * moments.scale * d;
    }
#endif
    BARRIER();
    slopes = group_sum(HERE slopes, scratch) / (float)width;
    BARRIER();
    products = group_sum(HERE products, scratch) / (float)width;
#if ALIGNED
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i >= width) continue;
        for (int j = 0; j < 8; ++j) a[n].v[j] = moments.scale * (d[n].v[j] - slopes - a[n].v[j] * products);
        if (accumulate) {
            Eight sum = load_eight(held + i);
            for (int j = 0; j < 8; ++j) a[n].v[j] += sum.v[j];
        }
        store_eight(a[n], d_x + i);
    }
#else
    for (uint i = THREAD; i < width; i += THREADS) {
        float d = widen(d_out[i]) * (weight ? widen(weight[i]) : 1.0f);
        float value = moments.scale * (d - slopes - (widen(x[i]) - moments.mean) * moments.scale * products);
        narrow(accumulate ? value + widen(held[i]) : value, d_x + i);
    }
#endif
}

KERNEL(layer_norm_moments)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, GLOBAL float* moments, SCALAR(uint, width), SCALAR(uint, inner), SCALAR(uint, pitch),
    SCALAR(float, epsilon)) {
    SHARED float scratch[32];
    Moments own = moments_of_row(HERE x + row_start(GROUP_X, inner, pitch, width), width, epsilon, scratch);
    if (THREAD > 0) return;
    moments[GROUP_X] = own.mean;
    moments[GROUPS_X + GROUP_X] = own.scale;
}

KERNEL(layer_norm_sums)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, const GLOBAL ELEMENT* d_out, const GLOBAL float* moments, GLOBAL float* sums,
    SCALAR(uint, rows), SCALAR(uint, width), SCALAR(uint, inner), SCALAR(uint, heads), SCALAR(uint, pitch),
    SCALAR(uint, out_pitch), SCALAR(uint, normed)) {
    uint place = GROUP_X * THREADS + THREAD, column = place % width;
    if (place >= heads * width) return;
    float sum = 0.0f;
    for (uint row = GROUP_Y * heads + place / width; row < rows; row += GROUPS_Y * heads) {
        float slope = widen(d_out[row_start(row, inner, out_pitch, width) + column]);
        float value = widen(x[row_start(row, inner, pitch, width) + column]);
        sum += normed ? slope * (value - moments[row]) * moments[rows + row] : slope;
    }
    sums[GROUP_Y * heads * width + place] = sum;
}
