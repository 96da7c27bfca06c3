// Operations on single elements and on rows. SOURCE is read, ELEMENT written.
//
// Matrices are [rows, columns] with a pitch in elements. Grid: (rows, ceil(columns / 2048)), group 256;
// others state theirs. ALIGNED: columns, pitches and addresses are multiples of 8 elements and 16 bytes.
//
// convert_rows       out = x * factor (+ out when `accumulate`)
// add_scaled         y = x + factor * y; SOURCE is ELEMENT
// softcap            x = cap * tanh(x / cap); never ALIGNED
// gather_rows        out[r] = x[indices[r]]
// scatter_rows       out[indices[r]] = x[r]
// embedding          out[t] = scale * table[ids[t]]: table SOURCE [V, D]; grid as convert_rows
// embedding_gradient table f32 [V, D] += scale * d_out: grid (T, ceil(D / 256)). The group of a token whose id came
//                    before adds nothing; that of the first adds all, in order, so the sum does not depend on timing.
// sum_columns        sums f32 [parts, columns] of rows part, part + parts, ...: grid (ceil(columns / 128), parts), group 128
// add_partial_sums   out f32 [columns] += factor * the sums of the parts in order: grid ceil(columns / 128), group 128

DEVICE void move_row(
    POSITION const GLOBAL SOURCE* x, GLOBAL ELEMENT* out, uint columns, float factor, bool accumulate) {
    uint start = (GROUP_Y * THREADS + THREAD) * 8;
#if ALIGNED
    if (start < columns) {
        Eight a = load_eight(x + start);
        for (int j = 0; j < 8; ++j) a.v[j] *= factor;
        if (accumulate) {
            Eight held = load_eight(out + start);
            for (int j = 0; j < 8; ++j) a.v[j] += held.v[j];
        }
        store_eight(a, out + start);
    }
#else
    for (uint i = start; i < start + 8 && i < columns; ++i) {
        float value = widen(x[i]) * factor;
        narrow(accumulate ? value + widen(out[i]) : value, out + i);
    }
#endif
}

KERNEL(convert_rows)(GIVEN_POSITION
    const GLOBAL SOURCE* x, GLOBAL ELEMENT* out, SCALAR(uint, columns), SCALAR(uint, pitch), SCALAR(uint, out_pitch),
    SCALAR(float, factor), SCALAR(uint, accumulate)) {
    ulong64 row = GROUP_X;
    move_row(HERE x + row * pitch, out + row * out_pitch, columns, factor, accumulate != 0);
}

KERNEL(add_scaled)(GIVEN_POSITION
    const GLOBAL ELEMENT* x, GLOBAL ELEMENT* y, SCALAR(uint, columns), SCALAR(uint, pitch), SCALAR(uint, y_pitch),
    SCALAR(float, factor)) {
    x += (ulong64)GROUP_X * pitch;
    y += (ulong64)GROUP_X * y_pitch;
    uint start = (GROUP_Y * THREADS + THREAD) * 8;
#if ALIGNED
    if (start < columns) {
        Eight a = load_eight(x + start), b = load_eight(y + start);
        for (int j = 0; j < 8; ++j) a.v[j] += factor * b.v[j];
        store_eight(a, y + start);
    }
#else
    for (uint i = start; i < start + 8 && i < columns; ++i) narrow(widen(x[i]) + factor * widen(y[i]), y + i);
#endif
}

KERNEL(softcap)(GIVEN_POSITION
    GLOBAL ELEMENT* x, SCALAR(uint, columns), SCALAR(uint, pitch), SCALAR(float, cap)) {
    x += (ulong64)GROUP_X * pitch;
    uint start = (GROUP_Y * THREADS + THREAD) * 8;
    for (uint i = start; i < start + 8 && i < columns; ++i) narrow(cap * hyperbolic_tangent(widen(x[i]) / cap), x + i);
}

KERNEL(gather_rows)(GIVEN_POSITION
    const GLOBAL SOURCE* x, const GLOBAL uint* indices, GLOBAL ELEMENT* out, SCALAR(uint, columns), SCALAR(uint, pitch),
    SCALAR(uint, out_pitch)) {
    move_row(HERE x + (ulong64)indices[GROUP_X] * pitch, out + (ulong64)GROUP_X * out_pitch, columns, 1.0f, false);
}

KERNEL(scatter_rows)(GIVEN_POSITION
    const GLOBAL SOURCE* x, const GLOBAL uint* indices, GLOBAL ELEMENT* out, SCALAR(uint, columns), SCALAR(uint, pitch),
    SCALAR(uint, out_pitch)) {
    move_row(HERE x + (ulong64)GROUP_X * pitch, out + (ulong64)indices[GROUP_X] * out_pitch, columns, 1.0f, false);
}

KERNEL(embedding)(GIVEN_POSITION
    const GLOBAL SOURCE* table, const GLOBAL uint* ids, GLOBAL ELEMENT* out, SCALAR(uint, columns),
    SCALAR(uint, out_pitch), SCALAR(float, scale)) {
    move_row(HERE table + (ulong64)ids[GROUP_X] * columns, out + (ulong64)GROUP_X * out_pitch, columns, scale, false);
}

KERNEL(embedding_gradient)(GIVEN_POSITION
    const GLOBAL SOURCE* d_out, const GLOBAL uint* ids, GLOBAL float* table, SCALAR(uint, tokens), SCALAR(uint, columns),
    SCALAR(uint, pitch), SCALAR(float, scale), SCALAR(uint, skips), SCALAR(uint, skipped)) {
    uint token = GROUP_X, id = ids[token], column = GROUP_Y * THREADS + THREAD;
    if (column >= columns || (skips && id == skipped)) return;
    for (uint before = 0; before < token; ++before) {
        if (ids[before] == id) return;
    }
    float sum = table[(ulong64)id * columns + column];
    for (uint later = token; later < tokens; ++later) {
        if (ids[later] == id) sum += scale * widen(d_out[(ulong64)later * pitch + column]);
    }
    table[(ulong64)id * columns + column] = sum;
}

KERNEL(sum_columns)(GIVEN_POSITION
    const GLOBAL SOURCE* x, GLOBAL float* sums, SCALAR(uint, rows), SCALAR(uint, columns), SCALAR(uint, pitch)) {
    uint column = GROUP_X * THREADS + THREAD;
    if (column >= columns) return;
    float sum = 0.0f;
    for (uint row = GROUP_Y; row < rows; row += GROUPS_Y) sum += widen(x[(ulong64)row * pitch + column]);
    sums[(ulong64)GROUP_Y * columns + column] = sum;
}

KERNEL(add_partial_sums)(GIVEN_POSITION
    const GLOBAL float* sums, GLOBAL float* out, SCALAR(uint, parts), SCALAR(uint, columns), SCALAR(float, factor)) {
    uint column = GROUP_X * THREADS + THREAD;
    if (column >= columns) return;
    float sum = 0.0f;
    for (uint part = 0; part < parts; ++part) sum += sums[(ulong64)part * columns + column];
    out[column] += factor * sum;
}

// out[i] = bound * (2 u - 1) with the i-th uniform number u, a multiple of 2^-24. Grid ceil(elements / 1024), group 256.
KERNEL(uniform)(GIVEN_POSITION
    GLOBAL ELEMENT* out, SCALAR(ulong64, elements), SCALAR(float, bound), SCALAR(uint, seed_low),
    SCALAR(uint, seed_high), SCALAR(uint, step), SCALAR(uint, stream)) {
    ulong64 block = (ulong64)GROUP_X * THREADS + THREAD;
    uint c[4];
    philox(block, seed_low, seed_high, step, stream, c);
    for (int j = 0; j < 4; ++j) {
        ulong64 i = block * 4 + j;
        if (i < elements) narrow((2.0f * ((float)(c[j] >> 8) * 5.9604644775390625e-8f) - 1.0f) * bound, out + i);
    }
}

// Inverted dropout: element i is dropped when the upper 24 bits of its word are below the threshold. x and out are
// contiguous; steps_before [1] or null is added to the step. Grid ceil(elements / 1024), group 256: four elements a thread.
KERNEL(dropout)(GIVEN_POSITION
    const GLOBAL SOURCE* x, GLOBAL ELEMENT* out, SCALAR(ulong64, elements), SCALAR(uint, threshold),
    SCALAR(float, factor), SCALAR(uint, seed_low), SCALAR(uint, seed_high), SCALAR(uint, step), SCALAR(uint, stream),
    const GLOBAL uint* steps_before, SCALAR(uint, accumulate)) {
    ulong64 block = (ulong64)GROUP_X * THREADS + THREAD;
    uint c[4];
    philox(block, seed_low, seed_high, steps_before ? step + steps_before[0] : step, stream, c);
    for (int j = 0; j < 4; ++j) {
        ulong64 i = block * 4 + j;
        if (i >= elements) return;
        float value = (c[j] >> 8) < threshold ? 0.0f : widen(x[i]) * factor;
        narrow(accumulate ? value + widen(out[i]) : value, out + i);
    }
}
