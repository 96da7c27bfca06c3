// Numbers of eight bits, e4m3: sign, four bits of exponent, three of mantissa; no infinities, 448 at most.
//
// A row is stored as codes with one f32 scale; its greatest size becomes 448. Sizes above 448 become 448, NaN stays NaN,
// halves go to the even code; a row of zeros has codes of zero.
//
// quantise_rows    codes [rows, columns] and scales [rows] of x SOURCE, each column times factors[column] first when
//                  `weighted`: grid rows, group 32..1024. ALIGNED as for norms: a thread holds VECTORS times 8 elements.
//                  Bytes: 3 an element of 16 bits.
// transpose_codes  out [columns, rows] = the transpose of codes [rows, columns]; both sizes are multiples of 16.
//                  Grid (ceil(columns / 128), ceil(rows / 128)), group 256. Bytes: 2 an element.
// finish_rows      out ELEMENT *= row scale * column scale when `scaled`; += bias f32 when `biased`; += an addend of out's
//                  type and pitch when `added`: grid (rows, ceil(columns / 2048)), group 256.

#if ALIGNED
DEVICE Eight weighted_eight(Packed<SOURCE> x, const GLOBAL float* factors, bool weighted) {
    return weighted ? times_eight(unpacked(x), factors) : unpacked(x);
}
#endif

KERNEL(quantise_rows)(GIVEN_POSITION
    const GLOBAL SOURCE* x, const GLOBAL float* factors, GLOBAL uchar* codes, GLOBAL float* scales, SCALAR(uint, columns),
    SCALAR(uint, pitch), SCALAR(uint, weighted)) {
    SHARED float scratch[32];
    x += (ulong64)GROUP_X * pitch;
    codes += (ulong64)GROUP_X * columns;
    float greatest = 0.0f;
#if ALIGNED
    // Packed, because registers are what limits the groups that run at one time.
    Packed<SOURCE> a[VECTORS];
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i < columns) a[n] = load_packed(x + i);
    }
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i >= columns) continue;
        Eight all = weighted_eight(a[n], factors + i, weighted != 0);
        greatest = greatest_of(greatest, all);
    }
#else
    for (uint i = THREAD; i < columns; i += THREADS) {
        greatest = maximum(greatest, magnitude(widen(x[i]) * (weighted ? factors[i] : 1.0f)));
    }
#endif
    float factor = row_factor(group_max(HERE greatest, scratch));
    if (THREAD == 0) scales[GROUP_X] = 1.0f / factor;
#if ALIGNED
    UNROLL for (uint n = 0; n < VECTORS; ++n) {
        uint i = (n * THREADS + THREAD) * 8;
        if (i >= columns) continue;
        Eight all = weighted_eight(a[n], factors + i, weighted != 0);
        store_codes(all, factor, codes + i);
    }
#else
    for (uint i = THREAD; i < columns; i += THREADS) {
        codes[i] = (uchar)e4m3_pair(widen(x[i]) * (weighted ? factors[i] : 1.0f) * factor, 0.0f);
    }
#endif
}

// Byte k of four words, as one word for each k.
DEVICE void turn_four(LOCAL uint* w) {
    uint mask = 0x00ff00ffu;
    uint low0 = (w[0] & mask) | (w[1] & mask) << 8, low1 = (w[0] >> 8 & mask) | (w[1] & ~mask);
    uint high0 = (w[2] & mask) | (w[3] & mask) << 8, high1 = (w[2] >> 8 & mask) | (w[3] & ~mask);
    w[0] = (low0 & 0xffffu) | high0 << 16;
    w[1] = (low1 & 0xffffu) | high1 << 16;
    w[2] = low0 >> 16 | (high0 & 0xffff0000u);
    w[3] = low1 >> 16 | (high1 & 0xffff0000u);
}

// A tile of 128 x 128 codes in words of four; word w of row r lies at w ^ (r / 16 * 4), so that threads that read the
// same word of rows 16 apart are in different banks.
KERNEL(transpose_codes)(GIVEN_POSITION
    const GLOBAL uchar* codes, GLOBAL uchar* out, SCALAR(uint, rows), SCALAR(uint, columns)) {
    SHARED uint tile[128 * 32];
    uint first_row = GROUP_Y * 128, first_column = GROUP_X * 128;
    Sixteen in[4];
    UNROLL for (uint n = 0; n < 4; ++n) {
        uint row = first_row + n * 32 + THREAD / 8, column = first_column + THREAD % 8 * 16;
        if (row < rows && column < columns) in[n] = load_sixteen(codes + (ulong64)row * columns + column);
    }
    UNROLL for (uint n = 0; n < 4; ++n) {
        uint r = n * 32 + THREAD / 8;
        if (first_row + r >= rows || first_column + THREAD % 8 * 16 >= columns) continue;
        uint start = r * 32 + ((THREAD % 8 * 4) ^ (r / 16 * 4));
        UNROLL for (uint j = 0; j < 4; ++j) tile[start + j] = in[n].words[j];
    }
    BARRIER();
    // Four columns of sixteen rows: four rows of the result by 16 bytes.
    uint part = THREAD % 8, word = THREAD / 8;
    uint row = first_row + part * 16, column = first_column + word * 4;
    if (row >= rows || column >= columns) return;
    Sixteen turned[4];
    UNROLL for (uint block = 0; block < 4; ++block) {
        uint w[4];
        UNROLL for (uint j = 0; j < 4; ++j) w[j] = tile[(part * 16 + block * 4 + j) * 32 + (word ^ (part * 4))];
        turn_four(w);
        UNROLL for (uint k = 0; k < 4; ++k) turned[k].words[block] = w[k];
    }
    UNROLL for (uint k = 0; k < 4; ++k) store_sixteen(turned[k], out + (ulong64)(column + k) * rows + row);
}

KERNEL(finish_rows)(GIVEN_POSITION
    GLOBAL ELEMENT* out, const GLOBAL float* row_scales, const GLOBAL float* column_scales, const GLOBAL float* bias,
    const GLOBAL ELEMENT* addend, SCALAR(uint, columns), SCALAR(uint, pitch), SCALAR(uint, scaled), SCALAR(uint, biased),
    SCALAR(uint, added)) {
    out += (ulong64)GROUP_X * pitch;
    addend += (ulong64)GROUP_X * pitch;
    float row_scale = scaled ? row_scales[GROUP_X] : 1.0f;
    for (uint n = 0; n < 8; ++n) {
        uint i = GROUP_Y * 2048 + n * THREADS + THREAD;
        if (i >= columns) return;
        float value = widen(out[i]);
        if (scaled) value *= row_scale * column_scales[i];
        if (biased) value += bias[i];
        if (added) value += widen(addend[i]);
        narrow(value, out + i);
    }
}
