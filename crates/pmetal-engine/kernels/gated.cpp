// Gated activations of feed-forward layers (Shazeer, arXiv 2002.05202): out = activation(gate) * up.
//
// Matrices of ELEMENT [rows, columns], each with a pitch. SILU = 1: x sigmoid(x); GELU = 1: GELU; SIGMOID = 1: sigmoid(x); else the
// tanh form of GELU. Grid (rows, ceil(columns / 2048)), group 256. Bytes: three matrices forward, five
// backward. ALIGNED: columns, pitches and addresses are multiples of 8 elements and 16 bytes.
//
// Results that are also rounded, as quantise_rows of fp8.cpp does: ALIGNED alone; grid rows, group 32..1024, a thread holds
// VECTORS times 8 elements of each row. One more byte an element of the result.
// gated_codes           codes [rows, columns] and scales [rows] of out
// gated_backward_codes  codes [rows, 2 columns] and scales [rows] of d_gate next to d_up, times factors [2 columns]

// activation(x) and its derivative.
DEVICE void activate(float x, LOCAL float& value, LOCAL float& slope) {
#if SILU
    Activated result = silu(x);
#elif GELU
    Activated result = gelu(x);
#elif SIGMOID
    Activated result = logistic_gate(x);
#else
    Activated result = gelu_tanh(x);
#endif
    value = result.value;
    slope = result.slope;
}

KERNEL(gated)(GIVEN_POSITION
    const GLOBAL ELEMENT* gate, const GLOBAL ELEMENT* up, GLOBAL ELEMENT* out, SCALAR(uint, columns),
    SCALAR(uint, gate_pitch), SCALAR(uint, up_pitch), SCALAR(uint, out_pitch)) {
    ulong64 row = GROUP_X;
    gate += row * gate_pitch;
    up += row * up_pitch;
    out += row * out_pitch;
    uint start = (GROUP_Y * THREADS + THREAD) * 8;
    float value, slope;
#if ALIGNED
    if (start < columns) {
        Eight g = load_eight(gate + start), u = load_eight(up + start);
        for (int j = 0; j < 8; ++j) {
            activate(g.v[j], value, slope);
            g.v[j] = value * u.v[j];
        }
        store_eight(g, out + start);
    }
#else
    for (uint i = start; i < start + 8 && i < columns; ++i) {
        activate(widen(gate[i]), value, slope);
        narrow(value * widen(up[i]), out + i);
    }
#endif
}

KERNEL(gated_backward)(GIVEN_POSITION
    const GLOBAL ELEMENT* gate, const GLOBAL ELEMENT* up, const GLOBAL ELEMENT* d_out, GLOBAL ELEMENT* d_gate,
    GLOBAL ELEMENT* d_up, SCALAR(uint, columns), SCALAR(uint, gate_pitch), SCALAR(uint, up_pitch),
    SCALAR(uint, d_out_pitch), SCALAR(uint, d_gate_pitch), SCALAR(uint, d_up_pitch)) {
    ulong64 row = GROUP_X;
    gate += row * gate_pitch;
    up += row * up_pitch;
    d_out += row * d_out_pitch;
    d_gate += row * d_gate_pitch;
    d_up += row * d_up_pitch;
    uint start = (GROUP_Y * THREADS + THREAD) * 8;
    float value, slope;
#if ALIGNED
    if (start < columns) {
        Eight g = load_eight(gate + start), u = load_eight(up + start), d = load_eight(d_out + start);
        for (int j = 0; j < 8; ++j) {
            activate(g.v[j], value, slope);
            g.v[j] = d.v[j] * u.v[j] * slope;
            u.v[j] = d.v[j] * value;
        }
        store_eight(g, d_gate + start);
        store_eight(u, d_up + start);
    }
#else
    for (uint i = start; i < start + 8 && i < columns; ++i) {
        float d = widen(d_out[i]), u = widen(up[i]);
        activate(widen(gate[i]), value, slope);
        narrow(d * u * slope, d_gate + i);
        narrow(d * value, d_up + i);
    }
#endif
}

#ifndef VECTORS
#define VECTORS 1
#endif

KERNEL(gated_codes)(GIVEN_POSITION
    const GLOBAL ELEMENT* gate, const GLOBAL ELEMENT* up, GLOBAL ELEMENT* out, GLOBAL uchar* codes, GLOBAL float* scales,
    SCALAR(uint, columns), SCALAR(uint, gate_pitch), SCALAR(uint, up_pitch), SCALAR(uint, out_pitch)) {
    SHARED float scratch[32];
    ulong64 row = GROUP_X;
    gate += row * gate_pitch;
    up += row * up_pitch;
    out += row * out_pitch;
    codes += row * columns;
    Packed<ELEMENT> g[VECTORS], u[VECTORS];
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i < columns) g[n] = load_packed(gate + i);
        if (i < columns) u[n] = load_packed(up + i);
    }
    float value, slope, greatest = 0.0f;
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i >= columns) continue;
        Eight a = unpacked(g[n]), b = unpacked(u[n]);
        for (int j = 0; j < 8; ++j) {
            activate(a.v[j], value, slope);
            a.v[j] = value * b.v[j];
        }
        store_eight(a, out + i);
        g[n] = packed<ELEMENT>(a);
        greatest = greatest_of(greatest, unpacked(g[n]));
    }
    float factor = row_factor(group_max(HERE greatest, scratch));
    if (THREAD == 0) scales[GROUP_X] = 1.0f / factor;
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i < columns) store_codes(unpacked(g[n]), factor, codes + i);
    }
}

KERNEL(gated_backward_codes)(GIVEN_POSITION
    const GLOBAL ELEMENT* gate, const GLOBAL ELEMENT* up, const GLOBAL ELEMENT* d_out, GLOBAL ELEMENT* d_gate,
    GLOBAL ELEMENT* d_up, const GLOBAL float* factors, GLOBAL uchar* codes, GLOBAL float* scales, SCALAR(uint, columns),
    SCALAR(uint, gate_pitch), SCALAR(uint, up_pitch), SCALAR(uint, d_out_pitch), SCALAR(uint, d_gate_pitch),
    SCALAR(uint, d_up_pitch)) {
    SHARED float scratch[32];
    ulong64 row = GROUP_X;
    gate += row * gate_pitch;
    up += row * up_pitch;
    d_out += row * d_out_pitch;
    d_gate += row * d_gate_pitch;
    d_up += row * d_up_pitch;
    codes += row * 2 * columns;
    Packed<ELEMENT> g[VECTORS], u[VECTORS];
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i < columns) g[n] = load_packed(gate + i);
        if (i < columns) u[n] = load_packed(up + i);
    }
    float value, slope, greatest = 0.0f;
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i >= columns) continue;
        Eight a = unpacked(g[n]), b = unpacked(u[n]), d = load_eight(d_out + i);
        for (int j = 0; j < 8; ++j) {
            activate(a.v[j], value, slope);
            a.v[j] = d.v[j] * b.v[j] * slope;
            b.v[j] = d.v[j] * value;
        }
        store_eight(a, d_gate + i);
        store_eight(b, d_up + i);
        g[n] = packed<ELEMENT>(a);
        u[n] = packed<ELEMENT>(b);
        greatest = greatest_of(greatest, times_eight(unpacked(g[n]), factors + i));
        greatest = greatest_of(greatest, times_eight(unpacked(u[n]), factors + columns + i));
    }
    float factor = row_factor(group_max(HERE greatest, scratch));
    if (THREAD == 0) scales[GROUP_X] = 1.0f / factor;
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i >= columns) continue;
        store_codes(times_eight(unpacked(g[n]), factors + i), factor, codes + i);
        store_codes(times_eight(unpacked(u[n]), factors + columns + i), factor, codes + columns + i);
    }
}
