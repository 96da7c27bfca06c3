// Numbers of eight bits, e4m3: sign, four bits of exponent, three of mantissa; no infinities, 448 at most.
//
// A row is stored as codes with one f32 scale; its greatest size becomes 448. Sizes above 448 become 448, NaN stays NaN,
// halves go to the even code; a row of zeros has codes of zero.
//
// quantise_rows    codes [rows, columns] and scales [rows] of x SOURCE, each column times factors[column] first when
//                  `weighted`: grid rows, group 32..1024. ALIGNED as for norms: a thread holds VECTORS times 8 elements.
//                  Bytes: 3 an element of 16 bits.
// transpose_codes  out [columns, rows] = the transpose of codes [rows, columns]; both sizes are multiples of 16.
//                  Grid (ceil(columns / 64), ceil(rows / 64)), group 256. Bytes: 2 an element.
// finish_rows      out ELEMENT *= row scale * column scale when `scaled`; += bias f32 when `biased`; += an addend of out's
//                  type and pitch when `added`: grid (rows, ceil(columns / 2048)), group 256.

DEVICE uint portable_e4m3(float x) {
    uint bits = as_bits(x), sign = bits >> 24 & 0x80, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return sign | 0x7f;
    if (size >= 0x43e00000u) return sign | 0x7e;
    // Below 2^-6 codes are multiples of 2^-9, which is the unit of numbers from 2^14 on.
    if (size < 0x3c800000u) return sign | (as_bits(as_float(size) + 16384.0f) & 0xff);
    return sign | (size + 0x7ffffu + (size >> 20 & 1) - 0x3c000000u) >> 20;
}

DEVICE uint e4m3_pair(float low, float high) {
#ifdef NATIVE_E4M3_PAIR
    return NATIVE_E4M3_PAIR(low, high);
#else
    return portable_e4m3(low) | portable_e4m3(high) << 8;
#endif
}

// The factor of a row, whose scale is its inverse; sizes that f32 could not divide by count as zero.
DEVICE float row_factor(float greatest) { return 448.0f / maximum(greatest, 1e-30f); }

#if ALIGNED
DEVICE Eight weighted_eight(Packed<SOURCE> x, const GLOBAL float* factors, bool weighted) {
    Eight a = unpacked(x);
    if (weighted) {
        Eight f = load_eight(factors);
        for (int j = 0; j < 8; ++j) a.v[j] *= f.v[j];
    }
    return a;
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
        for (int j = 0; j < 8; ++j) greatest = maximum(greatest, magnitude(all.v[j]));
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
        ulong64 eight = 0;
        for (int j = 0; j < 4; ++j) {
            eight |= (ulong64)e4m3_pair(all.v[2 * j] * factor, all.v[2 * j + 1] * factor) << 16 * j;
        }
        *(GLOBAL ulong64*)(codes + i) = eight;
    }
#else
    for (uint i = THREAD; i < columns; i += THREADS) {
        codes[i] = (uchar)e4m3_pair(widen(x[i]) * (weighted ? factors[i] : 1.0f) * factor, 0.0f);
    }
#endif
}

// Codes of 64 rows by words of four; a row of the tile is padded so that a column is in different banks.
KERNEL(transpose_codes)(GIVEN_POSITION
    const GLOBAL uchar* codes, GLOBAL uchar* out, SCALAR(uint, rows), SCALAR(uint, columns)) {
    SHARED uint tile[64 * 17];
    uint first_row = GROUP_Y * 64, first_column = GROUP_X * 64;
    uint word = THREAD % 16;
    for (uint r = THREAD / 16; r < 64; r += THREADS / 16) {
        uint row = first_row + r, column = first_column + word * 4;
        if (row < rows && column < columns) {
            tile[r * 17 + word] = *(const GLOBAL uint*)(codes + (ulong64)row * columns + column);
        }
    }
    BARRIER();
    for (uint block = THREAD / 16; block < 16; block += THREADS / 16) {
        // Four rows of the result from a block of four by four codes.
        uint column = first_column + block * 4, row = first_row + word * 4;
        if (row >= rows || column >= columns) continue;
        uint in[4];
        for (uint j = 0; j < 4; ++j) in[j] = tile[(word * 4 + j) * 17 + block];
        for (uint k = 0; k < 4; ++k) {
            uint turned = 0;
            for (uint j = 0; j < 4; ++j) turned |= (in[j] >> 8 * k & 0xff) << 8 * j;
            *(GLOBAL uint*)(out + (ulong64)(column + k) * rows + row) = turned;
        }
    }
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
