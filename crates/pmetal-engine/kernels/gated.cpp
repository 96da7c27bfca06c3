// Gated activations of feed-forward layers (Shazeer, arXiv 2002.05202): out = activation(gate) * up.
//
// Matrices of ELEMENT [rows, columns], each with a pitch. SILU = 1: x sigmoid(x), else the tanh form of GELU (Hendrycks
// and Gimpel, arXiv 1606.08415). Grid (rows, ceil(columns / 2048)), group 256. Bytes: three matrices forward, five
// backward. ALIGNED: columns, pitches and addresses are multiples of 8 elements and 16 bytes.

// activation(x) and its derivative.
DEVICE void activate(float x, LOCAL float& value, LOCAL float& slope) {
#if SILU
    float gate = 1.0f / (1.0f + exponential(-x));
    value = x * gate;
    slope = gate * (1.0f + x * (1.0f - gate));
#else
    // (1 + tanh u) / 2 as sigmoid(2u), which does not cancel for negative u.
    float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    float gate = 1.0f / (1.0f + exponential(-2.0f * u));
    value = x * gate;
    slope = gate + x * gate * (1.0f - gate) * 2.0f * 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
#endif
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
