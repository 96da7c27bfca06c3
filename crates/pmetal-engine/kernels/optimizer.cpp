// Norms and AdamW over many tensors in one launch.
//
// A table of u64 describes the tensors, `ENTRY` numbers each: value, gradient, first, second (addresses of f32), elements,
// shadow (address of a copy in ELEMENT, 0 = none), columns, shadow's pitch, flags. There are fewer than 2^32 elements. `pieces` u32 [pieces, 2]
// divides the work: entry and number of the piece of PIECE elements in it. Control, f32: gradient scale, largest norm (0 =
// no clipping), rate * decay, 1 - beta1, beta2, 1 - beta2, rate / (1 - beta1^t), sqrt(1 - beta2^t), epsilon.
//
// squares  grid pieces, group 256: sums of squares of the gradients to f32 [pieces]
// adamw    grid pieces, group 256 (Loshchilov and Hutter, arXiv 1711.05101): nothing changes where `norm` [1], the sum of
//          squares, is not finite; `clips` = 0 reads no norm. Clears the gradient. Bytes: four
//          tensors read, four and the shadow written.
// add_squares  total [1] += the sum of values [count] in a fixed order: one group of 1024

#define ENTRY 9
#define PIECE 4096

// Flags: weight decay applies; everything can be read and written by eight elements at 16-byte addresses.
#define DECAYS 1
#define VECTORS 2

KERNEL(squares)(GIVEN_POSITION const GLOBAL ulong64* table, const GLOBAL uint* pieces, GLOBAL float* sums) {
    SHARED float scratch[32];
    const GLOBAL ulong64* entry = table + pieces[2 * GROUP_X] * ENTRY;
    const GLOBAL float* gradient = (const GLOBAL float*)entry[1];
    ulong64 start = (ulong64)pieces[2 * GROUP_X + 1] * PIECE, end = start + PIECE;
    if (end > entry[4]) end = entry[4];
    float sum = 0.0f;
    if (entry[8] & VECTORS) {
        for (ulong64 i = start + THREAD * 8; i < end; i += THREADS * 8) {
            Eight slopes = load_eight(gradient + i);
            for (int j = 0; j < 8; ++j) sum += slopes.v[j] * slopes.v[j];
        }
    } else {
        for (ulong64 i = start + THREAD; i < end; i += THREADS) sum += gradient[i] * gradient[i];
    }
    sum = group_sum(HERE sum, scratch);
    if (THREAD == 0) sums[GROUP_X] = sum;
}

KERNEL(add_squares)(GIVEN_POSITION const GLOBAL float* values, GLOBAL float* total, SCALAR(uint, count)) {
    SHARED float scratch[32];
    float sum = 0.0f;
    for (uint i = THREAD; i < count; i += THREADS) sum += values[i];
    sum = group_sum(HERE sum, scratch);
    if (THREAD == 0) total[0] += sum;
}

struct Moments { float value, first, second; };

// One element's step: `keep` is what weight decay leaves of the value.
DEVICE Moments stepped(Moments old, float slope, float keep, const GLOBAL float* control) {
    Moments now;
    now.first = old.first + (slope - old.first) * control[3];
    now.second = old.second * control[4] + slope * slope * control[5];
    now.value = old.value * keep - control[6] * (now.first / (square_root(now.second) / control[7] + control[8]));
    return now;
}

KERNEL(adamw)(GIVEN_POSITION
    const GLOBAL ulong64* table, const GLOBAL uint* pieces, const GLOBAL float* control, const GLOBAL float* norm,
    SCALAR(uint, clips)) {
    const GLOBAL ulong64* entry = table + pieces[2 * GROUP_X] * ENTRY;
    GLOBAL float* value = (GLOBAL float*)entry[0];
    GLOBAL float* gradient = (GLOBAL float*)entry[1];
    GLOBAL float* first = (GLOBAL float*)entry[2];
    GLOBAL float* second = (GLOBAL float*)entry[3];
    GLOBAL ELEMENT* shadow = (GLOBAL ELEMENT*)entry[5];
    uint columns = (uint)entry[6];
    ulong64 pitch = entry[7];
    float scale = control[0];
    if (clips) {
        float squares = norm[0];
        if (!(squares < INFINITE)) return;
        float length = square_root(squares) * scale;
        if (control[1] > 0.0f && control[1] < length + 1e-6f) scale *= control[1] / (length + 1e-6f);
    }
    float keep = entry[8] & DECAYS ? 1.0f - control[2] : 1.0f;
    ulong64 start = (ulong64)pieces[2 * GROUP_X + 1] * PIECE, end = start + PIECE;
    if (end > entry[4]) end = entry[4];
    if (entry[8] & VECTORS) {
        for (ulong64 i = start + THREAD * 8; i < end; i += THREADS * 8) {
            Eight slopes = load_eight(gradient + i), values = load_eight(value + i);
            Eight means = load_eight(first + i), squares = load_eight(second + i), zeros;
            for (int j = 0; j < 8; ++j) {
                Moments old = {values.v[j], means.v[j], squares.v[j]};
                Moments now = stepped(old, slopes.v[j] * scale, keep, control);
                values.v[j] = now.value;
                means.v[j] = now.first;
                squares.v[j] = now.second;
                zeros.v[j] = 0.0f;
            }
            store_eight(zeros, gradient + i);
            store_eight(means, first + i);
            store_eight(squares, second + i);
            store_eight(values, value + i);
            if (shadow) store_eight(values, shadow + ((uint)i / columns) * pitch + (uint)i % columns);
        }
        return;
    }
    for (ulong64 i = start + THREAD; i < end; i += THREADS) {
        Moments old = {value[i], first[i], second[i]};
        Moments now = stepped(old, gradient[i] * scale, keep, control);
        gradient[i] = 0.0f;
        first[i] = now.first;
        second[i] = now.second;
        value[i] = now.value;
        if (shadow) narrow(now.value, shadow + ((uint)i / columns) * pitch + (uint)i % columns);
    }
}
