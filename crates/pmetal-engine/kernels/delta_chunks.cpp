// The gated delta rule over chunks of up to 64 tokens, of which only the states between chunks wait for each other (Yang et
// al., arXiv 2406.06484 and 2412.06464). A document's chunks are counted from its first token, so what is computed for it
// depends on no other. Arrays are those of delta.cpp: normed f32 [2, T, G, D], gates f32 [T, H, 2], errors u and recalled
// R^T k f32 [T, H, E]; answers, past and future f32 [T, H, D]. Documents are read from marks alone.
//
// With c_ij the product of the decays of tokens j + 1 .. i, B the rates, S the state before a chunk, F the gradient of that
// behind it, X_ij = c_ij k_i.k_j below the diagonal, Y_ij = c_ij q_i.k_j on it and below, N = (1 + X B)^-1 X:
//   u = v' - N B v', v' = v - c_i S^T k_i               the state behind is c S + sum of c_i (to the end) b_i k_i u_i^T
//   o = c_i S^T q_i + Y B u
//   r = y - N^T B y, y = c_i F^T k_i + Y^T do           that of S is c F + sum of c_i (q_i do_i^T - b_i k_i r_i^T)
// and with P_ij = c_ij b_j do_i.u_j and O_ij = -c_ij b_i b_j r_i.u_j below the diagonal:
//   answers = c_i S do_i + P K, past = -c_i b_i S r_i + O K, future = c_i b_i F u_i + P^T Q + O^T K.
// Decays are multiplied, never divided by, so that none can be too small.
//
// states and slopes f32 [ceil(T / 64), H, D, E] are S and F between two chunks of a document, at the number of the 64 tokens
// in which the second begins: two such begin at least 64 tokens apart. coupling f32 [T, H, 64] is N; spans f32 [T, H, 2] are,
// for each token, c from its chunk's first token on (with that) and c up to its chunk's last.
//
// delta_couple         coupling and spans. Grid (ceil(T / 64), H)
// delta_scan           errors and states; reads the state before the first token and writes that behind the last where
//                      `has_state`, then also to states. Grid (ceil(E / SLICE), H, parts): group z takes the documents that
//                      begin in the z-th part of the tokens
// delta_outputs        o. Grid (ceil(T / 64), H)
// delta_outputs_back   recalled = Y^T do. The same grid
// delta_scan_back      recalled and slopes. Grid as delta_scan
// delta_rows           answers, past and future. Grid (ceil(T / 64), H)
// Group 128. Group x of 64 tokens takes the chunks that begin among them. Flops of a token and head of 128 x 128: 10 D E
// forward, 25 D E backward: in f32; where the device has units for them, with operands rounded to 11 bits if ROUNDED is 1, and
// with what that leaves of them besides if it is 2. ALIGNED: 8 divides D, E and the pitch of do, and 16 its address.

#define CHUNK 64
#define GROUP 128
// Where matrix units multiply, groups wait for memory and for each other more than they compute.
#if ROUNDED == 1 && ALIGNED
#undef KERNEL_BOUNDS
#define KERNEL_BOUNDS AT_ONCE(GROUP, 4)
#endif
// Columns of operands in shared memory at a time, and pitches there that SIMD groups read without conflicts. Who waits for memory
// asks for more of it at a time; 32 KiB of shared memory are enough for 16.
#if defined(NATIVE_ROUNDED_PRODUCT) && ROUNDED == 1 && ALIGNED
#define STEP 32
#else
#define STEP 16
#endif
#define TALL (STEP + 4)
#define WIDE (CHUNK + 8)
#define FULL (CHUNK + 4)
#define SCAN_STEP 32
#define SCAN_TALL (SCAN_STEP + 4)
#define SCAN_WIDE (CHUNK + 8)
#define SCAN_TILE (CHUNK * SCAN_TALL)
// A state's columns of a group; 32 KiB of shared memory are enough for every width up to 256.
#define HELD_PITCH (KEY_WIDTH > 128 ? SLICE : SLICE + 8)
#define HELD_ROWS ((KEY_WIDTH + SCAN_STEP - 1) / SCAN_STEP * SCAN_STEP)
// What is known of a chunk's tokens: decay, rate, product of decays up to this token, and behind it; how many tokens.
#define DECAYS 0
#define RATES CHUNK
#define SINCE (2 * CHUNK)
#define UNTIL (3 * CHUNK)
#define COUNT (4 * CHUNK)
#define CONTROLS (4 * CHUNK + 1)

// The first token at or behind one with which a chunk begins.
DEVICE uint next_chunk(const GLOBAL int* marks, uint tokens, uint token) {
    while (token < tokens) {
        int first = marks[token];
        uint end = (uint)marks[tokens + token];
        uint inside = first < 0 ? 0 : (token - (uint)first) % CHUNK;
        if (first >= 0 && inside == 0) return token;
        token = first >= 0 && token + CHUNK - inside < end ? token + CHUNK - inside : end;
    }
    return tokens;
}

// The first token of the documents that begin in a part or behind it.
DEVICE uint document_bound(const GLOBAL int* marks, uint tokens, uint part, uint parts) {
    uint token = (uint)((ulong64)tokens * part / parts);
    if (token >= tokens) return tokens;
    uint first = (uint)(marks[token] < 0 ? -1 - marks[token] : marks[token]);
    return first == token ? token : (uint)marks[tokens + token];
}

// How many tokens a document has, which may have padding behind it.
DEVICE uint document_length(const GLOBAL int* marks, uint tokens, uint first) {
    uint low = first, high = (uint)marks[tokens + first];
    while (low < high) {
        uint middle = low + (high - low) / 2;
        if (marks[middle] < 0) high = middle;
        else low = middle + 1;
    }
    return low - first;
}

DEVICE void stage_controls(
    POSITION const GLOBAL float* gates, const GLOBAL float* spans, const GLOBAL int* marks, uint tokens, uint heads,
    uint start, SHARED_POINTER(float) controls) {
    BARRIER();
    if (THREAD < CHUNK) {
        uint token = start + THREAD;
        int first = marks[start];
        bool is_there = token < tokens && marks[token] == first;
        ulong64 place = ((ulong64)token * heads + GROUP_Y) * 2;
        controls[DECAYS + THREAD] = is_there ? gates[place] : 1.0f;
        controls[RATES + THREAD] = is_there ? gates[place + 1] : 0.0f;
        controls[SINCE + THREAD] = is_there && spans ? spans[place] : 0.0f;
        controls[UNTIL + THREAD] = is_there && spans ? spans[place + 1] : 0.0f;
        bool is_last = THREAD + 1 == CHUNK || token + 1 >= tokens || marks[token + 1] != first;
        if (is_there && is_last) controls[COUNT] = (float)(THREAD + 1);
    }
    BARRIER();
}

// A matrix of which rows and columns beyond these are zeros.
template <typename T> struct Rows {
    const GLOBAL T* from;
    ulong64 pitch;
    uint rows, columns;
};

// A thread's part of a tile on its way to shared memory.
template <uint SIZE> struct Slab { float v[SIZE]; };

#if ALIGNED
#define RUN 8
#else
#define RUN 1
#endif

// RUN neighbours at a time.
template <uint M, uint N, typename T>
DEVICE Slab<M * N / GROUP> fetch(POSITION Rows<T> x, uint first_row, uint first_column) {
    Slab<M * N / GROUP> slab;
    UNROLL for (uint n = 0; n < M * N / GROUP; n += RUN) {
        uint i = n * GROUP + THREAD * RUN, row = first_row + i / N, column = first_column + i % N;
        bool is_there = row < x.rows && column < x.columns;
        const GLOBAL T* from = x.from + row * x.pitch + column;
#if ALIGNED
        Eight eight = {};
        if (is_there) eight = load_eight(from);
        UNROLL for (uint j = 0; j < 8; ++j) slab.v[n + j] = eight.v[j];
#else
        slab.v[n] = is_there ? widen(*from) : 0.0f;
#endif
    }
    return slab;
}

template <uint N, uint PITCH, uint SIZE>
DEVICE void put(POSITION Slab<SIZE> slab, SHARED_POINTER(float) tile) {
    UNROLL for (uint n = 0; n < SIZE; n += RUN) {
        uint i = n * GROUP + THREAD * RUN;
        SHARED_POINTER(float) to = tile + i / N * PITCH + i % N;
#if ALIGNED
        Eight eight;
        UNROLL for (uint j = 0; j < 8; ++j) eight.v[j] = slab.v[n + j];
        share_eight(eight, to);
#else
        *to = slab.v[n];
#endif
    }
}

// Where a thread's sums are in its SIMD group's part of a product; matrix units hand them out like this.
DEVICE uint own_row(uint lane, uint i) { return 8 * i + lane % 32 / 4; }
DEVICE uint own_column(uint lane, uint j) { return 8 * (j / 2) + lane % 4 * 2 + j % 2; }

// What the rounding to 11 bits leaves of a number.
DEVICE float rest_of(float x) { return x - as_float((as_bits(x) + 0x1000u) & 0xffffe000u); }

// Adds a product over `depth`, a multiple of 8, to the sums of a SIMD group, of M x N for each thread. The numbers
// are what lies between neighbouring rows, steps and columns of its operands.
template <uint M, uint N, uint LEFT_ROW, uint LEFT_STEP, uint RIGHT_STEP, uint RIGHT_COLUMN>
DEVICE void multiply(
    POSITION SHARED_POINTER(const float) left, SHARED_POINTER(const float) right, uint depth, LOCAL float* sums) {
#if defined(NATIVE_ROUNDED_PRODUCT) && ROUNDED
    uint row = THREAD % 32 / 4, step = THREAD % 4;
    for (uint k = 0; k < depth; k += 8) {
        float a[M * 2], a_rest[M * 2];
        UNROLL for (uint n = 0; n < M * 2; ++n) {
            a[n] = left[(16 * (n / 4) + row + n % 2 * 8) * LEFT_ROW + (k + step + n % 4 / 2 * 4) * LEFT_STEP];
            a_rest[n] = rest_of(a[n]);
        }
        UNROLL for (uint j = 0; j < N / 2; ++j) {
            float b[2], b_rest[2];
            UNROLL for (uint n = 0; n < 2; ++n) {
                b[n] = right[(k + step + n * 4) * RIGHT_STEP + (8 * j + row) * RIGHT_COLUMN];
                b_rest[n] = rest_of(b[n]);
            }
            UNROLL for (uint m = 0; m < M / 2; ++m) {
                LOCAL float* low = sums + 2 * m * N + 2 * j;
#if ROUNDED == 2
                NATIVE_ROUNDED_PRODUCT(HERE a + m * 4, b_rest, low, low + N);
                NATIVE_ROUNDED_PRODUCT(HERE a_rest + m * 4, b, low, low + N);
#endif
                NATIVE_ROUNDED_PRODUCT(HERE a + m * 4, b, low, low + N);
            }
        }
    }
#else
    for (uint k = 0; k < depth; ++k) {
        float values[N];
        UNROLL for (uint j = 0; j < N; ++j)
            values[j] = right[k * RIGHT_STEP + own_column(THREAD, j) * RIGHT_COLUMN];
        UNROLL for (uint i = 0; i < M; ++i) {
            float value = left[own_row(THREAD, i) * LEFT_ROW + k * LEFT_STEP];
            UNROLL for (uint j = 0; j < N; ++j) sums[i * N + j] += value * values[j];
        }
    }
#endif
}

// A group's product of 64 x 64 is four parts of 32 x 32.
#define TILE_ROW(i) (THREAD / 64 * 32 + own_row(THREAD, i))
#define TILE_COLUMN(j) (THREAD / 32 % 2 * 32 + own_column(THREAD, j))
struct Sums { float v[32]; };

DEVICE Sums no_sums() {
    Sums sums;
    UNROLL for (uint i = 0; i < 32; ++i) sums.v[i] = 0.0f;
    return sums;
}

// Adds left [64, depth] times right: the transpose of 64 rows from `first` on, or 64 columns from there where IS_WIDE.
template <bool IS_WIDE, typename L, typename R>
DEVICE void add_product(
    POSITION Rows<L> left, Rows<R> right, uint first, uint depth, SHARED_POINTER(float) tiles, LOCAL Sums& sums) {
    SHARED_POINTER(float) other = tiles + CHUNK * TALL;
    Slab<CHUNK * STEP / GROUP> next = fetch<CHUNK, STEP>(HERE left, 0, 0), next_other;
    if (IS_WIDE) next_other = fetch<STEP, CHUNK>(HERE right, 0, first);
    else next_other = fetch<CHUNK, STEP>(HERE right, first, 0);
    for (uint k = 0; k < depth; k += STEP) {
        BARRIER();
        put<STEP, TALL>(HERE next, tiles);
        if (IS_WIDE) put<CHUNK, WIDE>(HERE next_other, other);
        else put<STEP, TALL>(HERE next_other, other);
        BARRIER();
        if (k + STEP < depth) {
            next = fetch<CHUNK, STEP>(HERE left, 0, k + STEP);
            if (IS_WIDE) next_other = fetch<STEP, CHUNK>(HERE right, k + STEP, first);
            else next_other = fetch<CHUNK, STEP>(HERE right, first, k + STEP);
        }
        uint column = THREAD / 32 % 2 * 32;
        multiply<4, 8, TALL, 1, IS_WIDE ? WIDE : 1, IS_WIDE ? 1 : TALL>(
            HERE tiles + THREAD / 64 * 32 * TALL, other + (IS_WIDE ? column : column * TALL), STEP, sums.v);
    }
}

// Adds a matrix [64, 64] that is zero above its diagonal, or its transpose, times 64 columns of right from `first` on.
template <bool IS_TURNED, typename R>
DEVICE void add_coupled(
    POSITION SHARED_POINTER(const float) matrix, Rows<R> right, uint first, SHARED_POINTER(float) tiles,
    LOCAL Sums& sums) {
    uint row = THREAD / 64 * 32;
    Slab<CHUNK * STEP / GROUP> next = fetch<STEP, CHUNK>(HERE right, 0, first);
    for (uint k = 0; k < right.rows; k += STEP) {
        BARRIER();
        put<CHUNK, WIDE>(HERE next, tiles);
        BARRIER();
        if (k + STEP < right.rows) next = fetch<STEP, CHUNK>(HERE right, k + STEP, first);
        if (IS_TURNED ? k + STEP <= row : k >= row + 32) continue;
        multiply<4, 8, IS_TURNED ? 1 : FULL, IS_TURNED ? FULL : 1, WIDE, 1>(
            HERE matrix + (IS_TURNED ? k * FULL + row : row * FULL + k), tiles + THREAD / 32 % 2 * 32, STEP, sums.v);
    }
}

DEVICE void scale_rows(POSITION SHARED_POINTER(const float) factors, LOCAL Sums& sums) {
    UNROLL for (uint i = 0; i < 4; ++i) {
        UNROLL for (uint j = 0; j < 8; ++j) sums.v[i * 8 + j] *= factors[TILE_ROW(i)];
    }
}

// Sums become a matrix that is zero above its diagonal, and on it unless it is kept: (i, j) times the decays of tokens
// j + 1 .. i, and times j's rate and -i's.
template <bool KEEPS_DIAGONAL, bool BY_RATE, bool BY_LOSS>
DEVICE void couple(
    POSITION LOCAL const Sums& sums, SHARED_POINTER(const float) controls, SHARED_POINTER(float) matrix) {
    UNROLL for (uint i = 0; i < 4; ++i) {
        UNROLL for (uint j = 0; j < 8; ++j) matrix[TILE_ROW(i) * FULL + TILE_COLUMN(j)] = sums.v[i * 8 + j];
    }
    BARRIER();
    uint column = THREAD % CHUNK, side = THREAD / CHUNK;
    float factor = BY_RATE ? controls[RATES + column] : 1.0f;
    for (uint row = 0; row < CHUNK; ++row) {
        if (row > column) factor *= controls[DECAYS + row];
        if (row / (CHUNK / 2) != side) continue;
        float left = BY_LOSS ? -controls[RATES + row] * factor : factor;
        bool is_kept = row > column || (KEEPS_DIAGONAL && row == column);
        matrix[row * FULL + column] = is_kept ? matrix[row * FULL + column] * left : 0.0f;
    }
    BARRIER();
}

// X in, N out, block of 16 rows by block: N_i = X_i - sum over l < i of X_il b_l N_l.
DEVICE void solve(
    POSITION SHARED_POINTER(const float) controls, SHARED_POINTER(float) matrix, SHARED_POINTER(float) tile) {
    uint column = THREAD % CHUNK, side = THREAD / CHUNK;
    for (uint block = 0; block < CHUNK; block += 16) {
        for (uint i = THREAD; i < 16 * CHUNK; i += GROUP) tile[i] = matrix[(block + i / CHUNK) * FULL + i % CHUNK];
        BARRIER();
        float sums[8];
        UNROLL for (uint n = 0; n < 8; ++n) sums[n] = tile[(side * 8 + n) * CHUNK + column];
        for (uint l = 0; l < block; ++l) {
            float value = matrix[l * FULL + column] * controls[RATES + l];
            UNROLL for (uint n = 0; n < 8; ++n) sums[n] -= tile[(side * 8 + n) * CHUNK + l] * value;
        }
        UNROLL for (uint n = 0; n < 8; ++n) matrix[(block + side * 8 + n) * FULL + column] = sums[n];
        BARRIER();
        if (side == 0) {
            float scaled[16];
            UNROLL for (uint n = 0; n < 16; ++n) {
                float sum = matrix[(block + n) * FULL + column];
                UNROLL for (uint l = 0; l < n; ++l) sum -= tile[n * CHUNK + block + l] * scaled[l];
                matrix[(block + n) * FULL + column] = sum;
                scaled[n] = sum * controls[RATES + block + n];
            }
        }
        BARRIER();
    }
}

// A head's keys or queries from a token on.
DEVICE Rows<float> key_rows(
    const GLOBAL float* normed, ulong64 token, uint count, uint key_heads, uint heads, uint head) {
    const GLOBAL float* first = normed + (token * key_heads + head * key_heads / heads) * KEY_WIDTH;
    return {first, (ulong64)key_heads * KEY_WIDTH, count, KEY_WIDTH};
}

// Of arrays [T, H, width].
template <typename T>
DEVICE Rows<T> head_rows(const GLOBAL T* x, ulong64 pitch, uint token, uint count, uint width, uint head) {
    return {x + token * pitch + head * width, pitch, count, width};
}

DEVICE Rows<float> state_at(const GLOBAL float* states, uint token, uint heads, uint width, uint head) {
    return {states + ((ulong64)(token / CHUNK) * heads + head) * KEY_WIDTH * width, width, KEY_WIDTH, width};
}

KERNEL(delta_couple)(GIVEN_POSITION
    const GLOBAL float* normed, const GLOBAL float* gates, const GLOBAL int* marks, GLOBAL float* spans,
    GLOBAL float* coupling, SCALAR(uint, tokens), SCALAR(uint, key_heads), SCALAR(uint, heads)) {
    SHARED float tiles[2 * CHUNK * TALL];
    SHARED float matrix[CHUNK * FULL];
    SHARED float controls[CONTROLS];
    uint end = (GROUP_X + 1) * CHUNK < tokens ? (GROUP_X + 1) * CHUNK : tokens, count = 0;
    for (uint start = next_chunk(marks, tokens, GROUP_X * CHUNK); start < end;
         start = next_chunk(marks, tokens, start + count)) {
        stage_controls(HERE gates, 0, marks, tokens, heads, start, controls);
        count = (uint)controls[COUNT];
        GLOBAL float* own = spans + ((ulong64)start * heads + GROUP_Y) * 2;
        if (THREAD == 32) {
            float product = 1.0f;
            for (uint i = 0; i < count; ++i) own[(ulong64)i * heads * 2] = product *= controls[DECAYS + i];
        }
        if (THREAD == 96) {
            float product = 1.0f;
            for (uint i = count; i-- > 0; product *= controls[DECAYS + i]) own[(ulong64)i * heads * 2 + 1] = product;
        }
        Rows<float> keys = key_rows(normed, start, count, key_heads, heads, GROUP_Y);
        Sums sums = no_sums();
        add_product<false>(HERE keys, keys, 0, KEY_WIDTH, tiles, sums);
        couple<false, false, false>(HERE sums, controls, matrix);
        solve(HERE controls, matrix, tiles);
        GLOBAL float* out = coupling + ((ulong64)start * heads + GROUP_Y) * CHUNK;
        for (uint i = THREAD; i < count * CHUNK; i += GROUP)
            out[(ulong64)(i / CHUNK) * heads * CHUNK + i % CHUNK] = matrix[i / CHUNK * FULL + i % CHUNK];
    }
}

KERNEL(delta_outputs)(GIVEN_POSITION
    const GLOBAL float* normed, const GLOBAL float* gates, const GLOBAL int* marks, const GLOBAL float* spans,
    const GLOBAL float* errors, const GLOBAL float* states, GLOBAL ELEMENT* out, SCALAR(uint, tokens),
    SCALAR(uint, key_heads), SCALAR(uint, heads), SCALAR(uint, width), SCALAR(uint, out_pitch), SCALAR(uint, has_state)) {
    SHARED float tiles[2 * CHUNK * TALL];
    SHARED float matrix[CHUNK * FULL];
    SHARED float controls[CONTROLS];
    uint end = (GROUP_X + 1) * CHUNK < tokens ? (GROUP_X + 1) * CHUNK : tokens, count = 0, head = GROUP_Y;
    for (uint token = GROUP_X * CHUNK; token < end; ++token) {
        if (marks[token] >= 0) continue;
        for (uint i = THREAD; i < width; i += GROUP) narrow(0.0f, out + (ulong64)token * out_pitch + head * width + i);
    }
    for (uint start = next_chunk(marks, tokens, GROUP_X * CHUNK); start < end;
         start = next_chunk(marks, tokens, start + count)) {
        stage_controls(HERE gates, spans, marks, tokens, heads, start, controls);
        count = (uint)controls[COUNT];
        Rows<float> keys = key_rows(normed, start, count, key_heads, heads, head);
        Rows<float> queries = key_rows(normed, (ulong64)tokens + start, count, key_heads, heads, head);
        Rows<float> learned = head_rows(errors, (ulong64)heads * width, start, count, width, head);
        Rows<float> state = state_at(states, start, heads, width, head);
        Sums sums = no_sums();
        add_product<false>(HERE queries, keys, 0, KEY_WIDTH, tiles, sums);
        couple<true, true, false>(HERE sums, controls, matrix);
        for (uint first = 0; first < width; first += CHUNK) {
            sums = no_sums();
            if (has_state || marks[start] != (int)start) {
                add_product<true>(HERE queries, state, first, KEY_WIDTH, tiles, sums);
                scale_rows(HERE controls + SINCE, sums);
            }
            add_coupled<false>(HERE matrix, learned, first, tiles, sums);
            UNROLL for (uint i = 0; i < 4; ++i) {
                UNROLL for (uint j = 0; j < 8; ++j) {
                    uint row = TILE_ROW(i), column = first + TILE_COLUMN(j);
                    if (row >= count || column >= width) continue;
                    narrow(sums.v[i * 8 + j], out + (ulong64)(start + row) * out_pitch + head * width + column);
                }
            }
        }
    }
}

// What rows of an array [T, heads, width] hold where sums are written.
DEVICE Sums held_sums(POSITION const GLOBAL float* from, uint start, uint count, uint heads, uint width, uint first) {
    Sums sums;
    UNROLL for (uint i = 0; i < 4; ++i) {
        UNROLL for (uint j = 0; j < 8; ++j) {
            uint row = TILE_ROW(i), column = first + TILE_COLUMN(j);
            bool is_there = row < count && column < width;
            sums.v[i * 8 + j] = is_there ? from[((ulong64)(start + row) * heads + GROUP_Y) * width + column] : 0.0f;
        }
    }
    return sums;
}

DEVICE void store_sums(
    POSITION LOCAL const Sums& sums, GLOBAL float* out, uint start, uint count, uint heads, uint width, uint first) {
    UNROLL for (uint i = 0; i < 4; ++i) {
        UNROLL for (uint j = 0; j < 8; ++j) {
            uint row = TILE_ROW(i), column = first + TILE_COLUMN(j);
            if (row >= count || column >= width) continue;
            out[((ulong64)(start + row) * heads + GROUP_Y) * width + column] = sums.v[i * 8 + j];
        }
    }
}

KERNEL(delta_outputs_back)(GIVEN_POSITION
    const GLOBAL float* normed, const GLOBAL float* gates, const GLOBAL int* marks, const GLOBAL float* spans,
    const GLOBAL ELEMENT* d_out, GLOBAL float* recalled, SCALAR(uint, tokens), SCALAR(uint, key_heads),
    SCALAR(uint, heads), SCALAR(uint, width), SCALAR(uint, d_pitch)) {
    SHARED float tiles[2 * CHUNK * TALL];
    SHARED float matrix[CHUNK * FULL];
    SHARED float controls[CONTROLS];
    uint end = (GROUP_X + 1) * CHUNK < tokens ? (GROUP_X + 1) * CHUNK : tokens, count = 0, head = GROUP_Y;
    for (uint start = next_chunk(marks, tokens, GROUP_X * CHUNK); start < end;
         start = next_chunk(marks, tokens, start + count)) {
        stage_controls(HERE gates, spans, marks, tokens, heads, start, controls);
        count = (uint)controls[COUNT];
        Rows<float> keys = key_rows(normed, start, count, key_heads, heads, head);
        Rows<float> queries = key_rows(normed, (ulong64)tokens + start, count, key_heads, heads, head);
        Rows<ELEMENT> slopes = head_rows(d_out, d_pitch, start, count, width, head);
        Sums sums = no_sums();
        add_product<false>(HERE queries, keys, 0, KEY_WIDTH, tiles, sums);
        couple<true, false, false>(HERE sums, controls, matrix);
        for (uint first = 0; first < width; first += CHUNK) {
            sums = no_sums();
            add_coupled<true>(HERE matrix, slopes, first, tiles, sums);
            store_sums(HERE sums, recalled, start, count, heads, width, first);
        }
    }
}

// What a chunk's tokens get by rows x of do, or of r where IS_LOSS: S x_i and the chunk's keys to `out`, and what those
// behind get of them, by `other` and from F, to `future`.
template <bool IS_LOSS, typename T>
DEVICE void couple_rows(
    POSITION Rows<T> x, Rows<float> learned, Rows<float> keys, Rows<float> other, Rows<float> state, bool has_state,
    Rows<float> behind, bool has_behind, SHARED_POINTER(float) tiles, SHARED_POINTER(float) matrix,
    SHARED_POINTER(const float) controls, GLOBAL float* out, GLOBAL float* future, uint start, uint heads) {
    uint count = keys.rows, width = x.columns;
    Sums sums = no_sums();
    add_product<false>(HERE x, learned, 0, width, tiles, sums);
    couple<false, true, IS_LOSS>(HERE sums, controls, matrix);
    for (uint first = 0; first < KEY_WIDTH; first += CHUNK) {
        sums = no_sums();
        if (has_state) {
            add_product<false>(HERE x, state, first, width, tiles, sums);
            scale_rows(HERE controls + SINCE, sums);
            if (IS_LOSS) {
                UNROLL for (uint i = 0; i < 32; ++i) sums.v[i] *= -controls[RATES + TILE_ROW(i / 8)];
            }
        }
        add_coupled<false>(HERE matrix, keys, first, tiles, sums);
        store_sums(HERE sums, out, start, count, heads, KEY_WIDTH, first);
        sums = IS_LOSS ? held_sums(HERE future, start, count, heads, KEY_WIDTH, first) : no_sums();
        if (!IS_LOSS && has_behind) {
            add_product<false>(HERE learned, behind, first, width, tiles, sums);
            scale_rows(HERE controls + UNTIL, sums);
            scale_rows(HERE controls + RATES, sums);
        }
        add_coupled<true>(HERE matrix, other, first, tiles, sums);
        store_sums(HERE sums, future, start, count, heads, KEY_WIDTH, first);
    }
}

KERNEL(delta_rows)(GIVEN_POSITION
    const GLOBAL float* normed, const GLOBAL float* gates, const GLOBAL int* marks, const GLOBAL float* spans,
    const GLOBAL ELEMENT* d_out, const GLOBAL float* errors, const GLOBAL float* recalled, const GLOBAL float* states,
    const GLOBAL float* slopes, GLOBAL float* answers, GLOBAL float* past, GLOBAL float* future, SCALAR(uint, tokens),
    SCALAR(uint, key_heads), SCALAR(uint, heads), SCALAR(uint, width), SCALAR(uint, d_pitch)) {
    SHARED float tiles[2 * CHUNK * TALL];
    SHARED float matrix[CHUNK * FULL];
    SHARED float controls[CONTROLS];
    uint end = (GROUP_X + 1) * CHUNK < tokens ? (GROUP_X + 1) * CHUNK : tokens, count = 0, head = GROUP_Y;
    ulong64 pitch = (ulong64)heads * width;
    for (uint start = next_chunk(marks, tokens, GROUP_X * CHUNK); start < end;
         start = next_chunk(marks, tokens, start + count)) {
        stage_controls(HERE gates, spans, marks, tokens, heads, start, controls);
        count = (uint)controls[COUNT];
        Rows<float> keys = key_rows(normed, start, count, key_heads, heads, head);
        Rows<float> queries = key_rows(normed, (ulong64)tokens + start, count, key_heads, heads, head);
        Rows<float> learned = head_rows(errors, pitch, start, count, width, head);
        Rows<float> lost = head_rows(recalled, pitch, start, count, width, head);
        Rows<ELEMENT> asked = head_rows(d_out, d_pitch, start, count, width, head);
        bool has_state = marks[start] != (int)start;
        bool has_behind = start + CHUNK < tokens && marks[start + CHUNK] == marks[start];
        Rows<float> state = state_at(states, start, heads, width, head);
        Rows<float> behind = state_at(slopes, start + CHUNK, heads, width, head);
        couple_rows<false>(
            HERE asked, learned, keys, queries, state, has_state, behind, has_behind, tiles, matrix, controls, answers,
            future, start, heads);
        couple_rows<true>(
            HERE lost, learned, keys, keys, state, has_state, behind, has_behind, tiles, matrix, controls, past, future,
            start, heads);
    }
}

// A scan's part of 64 x SLICE: a SIMD group has 16 rows of it.
#define SCAN_COLUMNS (SLICE / 4)
#define SCAN_ROW(i) (THREAD / 32 * 16 + own_row(THREAD, i))
struct ScanSums { float v[2 * SCAN_COLUMNS]; };

// A thread's part of the group's columns of a chunk's rows.
template <typename T> DEVICE ScanSums scan_values(POSITION Rows<T> x) {
    ScanSums values;
    UNROLL for (uint i = 0; i < 2 * SCAN_COLUMNS; ++i) {
        uint row = SCAN_ROW(i / SCAN_COLUMNS), column = GROUP_X * SLICE + own_column(THREAD, i % SCAN_COLUMNS);
        values.v[i] = row < x.rows && column < x.columns ? widen(x.from[row * x.pitch + column]) : 0.0f;
    }
    return values;
}

// What a pass brings to shared memory at a time; the first of it is asked for long before.
typedef Slab<CHUNK * SCAN_STEP / GROUP> ScanSlab;

// Keys times the state's columns.
DEVICE ScanSums recall(
    POSITION Rows<float> keys, ScanSlab next, SHARED_POINTER(const float) held, SHARED_POINTER(float) tile) {
    ScanSums sums;
    UNROLL for (uint i = 0; i < 2 * SCAN_COLUMNS; ++i) sums.v[i] = 0.0f;
    for (uint k = 0; k < KEY_WIDTH; k += SCAN_STEP) {
        BARRIER();
        put<SCAN_STEP, SCAN_TALL>(HERE next, tile);
        BARRIER();
        if (k + SCAN_STEP < KEY_WIDTH) next = fetch<CHUNK, SCAN_STEP>(HERE keys, 0, k + SCAN_STEP);
        multiply<2, SCAN_COLUMNS, SCAN_TALL, 1, HELD_PITCH, 1>(
            HERE tile + THREAD / 32 * 16 * SCAN_TALL, held + k * HELD_PITCH, SCAN_STEP, sums.v);
    }
    return sums;
}

template <bool IS_TURNED>
DEVICE ScanSlab fetch_coupling(POSITION Rows<float> coupling, uint k) {
    if (IS_TURNED) return fetch<SCAN_STEP, CHUNK>(HERE coupling, k, 0);
    return fetch<CHUNK, SCAN_STEP>(HERE coupling, 0, k);
}

// Subtracts N B sums, or N^T B sums.
template <bool IS_TURNED>
DEVICE void uncouple(
    POSITION Rows<float> coupling, ScanSlab next, SHARED_POINTER(const float) controls, SHARED_POINTER(float) fresh,
    SHARED_POINTER(float) tile, LOCAL ScanSums& sums) {
    uint first = THREAD / 32 * 16;
    ScanSums product;
    UNROLL for (uint i = 0; i < 2 * SCAN_COLUMNS; ++i) {
        uint row = SCAN_ROW(i / SCAN_COLUMNS);
        product.v[i] = 0.0f;
        fresh[row * HELD_PITCH + own_column(THREAD, i % SCAN_COLUMNS)] = controls[RATES + row] * sums.v[i];
    }
    for (uint k = 0; k < coupling.rows; k += SCAN_STEP) {
        BARRIER();
        if (IS_TURNED) put<CHUNK, SCAN_WIDE>(HERE next, tile);
        else put<SCAN_STEP, SCAN_TALL>(HERE next, tile);
        BARRIER();
        if (k + SCAN_STEP < coupling.rows) next = fetch_coupling<IS_TURNED>(HERE coupling, k + SCAN_STEP);
        if (IS_TURNED ? k + SCAN_STEP <= first : k >= first + 16) continue;
        multiply<2, SCAN_COLUMNS, IS_TURNED ? 1 : SCAN_TALL, IS_TURNED ? SCAN_WIDE : 1, HELD_PITCH, 1>(
            HERE tile + (IS_TURNED ? first : first * SCAN_TALL), fresh + k * HELD_PITCH, SCAN_STEP, product.v);
    }
    UNROLL for (uint i = 0; i < 2 * SCAN_COLUMNS; ++i) sums.v[i] -= product.v[i];
    BARRIER();
}

// Where a thread's sums of 16 rows and half of the columns are in a state.
#define HELD_PLACE(i) \
    (own_row(THREAD, (i) / (SCAN_COLUMNS / 2)) * HELD_PITCH + own_column(THREAD, (i) % (SCAN_COLUMNS / 2)))

// The state's columns times a factor, and the transpose of rows times what is fresh.
DEVICE void learn(
    POSITION Rows<float> rows, ScanSlab next, float factor, SHARED_POINTER(const float) fresh, SHARED_POINTER(float) tile,
    SHARED_POINTER(float) held) {
    uint row = THREAD / 64 * 16, column = THREAD / 32 % 2 * (SLICE / 2);
    for (uint d = 0; d < KEY_WIDTH; d += SCAN_STEP) {
        BARRIER();
        put<SCAN_STEP, SCAN_TALL>(HERE next, tile);
        BARRIER();
        if (d + SCAN_STEP < KEY_WIDTH) next = fetch<CHUNK, SCAN_STEP>(HERE rows, 0, d + SCAN_STEP);
        SHARED_POINTER(float) own = held + (d + row) * HELD_PITCH + column;
        float sums[SCAN_COLUMNS];
        UNROLL for (uint i = 0; i < SCAN_COLUMNS; ++i) sums[i] = factor * own[HELD_PLACE(i)];
        multiply<2, SCAN_COLUMNS / 2, 1, SCAN_TALL, HELD_PITCH, 1>(HERE tile + row, fresh + column, CHUNK, sums);
        UNROLL for (uint i = 0; i < SCAN_COLUMNS; ++i) own[HELD_PLACE(i)] = sums[i];
    }
    BARRIER();
}

// The group's columns of a state, or zeros.
DEVICE void load_held(POSITION const GLOBAL float* state, bool has_state, uint width, SHARED_POINTER(float) held) {
    for (uint i = THREAD; i < HELD_ROWS * SLICE; i += GROUP) {
        uint row = i / SLICE, column = GROUP_X * SLICE + i % SLICE;
        bool is_there = has_state && row < KEY_WIDTH && column < width;
        held[row * HELD_PITCH + i % SLICE] = is_there ? state[row * width + column] : 0.0f;
    }
}

DEVICE void store_held(POSITION SHARED_POINTER(const float) held, uint width, GLOBAL float* state) {
    for (uint i = THREAD; i < KEY_WIDTH * SLICE; i += GROUP) {
        uint row = i / SLICE, column = GROUP_X * SLICE + i % SLICE;
        if (column < width) state[row * width + column] = held[row * HELD_PITCH + i % SLICE];
    }
}

// A chunk that is scanned: its keys and what couples them, and the first that passes bring of both.
struct ScanChunk {
    Rows<float> keys, coupling;
    ScanSlab keys_slab, coupling_slab;
};

template <bool IS_BACK>
DEVICE ScanChunk scanned_chunk(
    POSITION const GLOBAL float* normed, const GLOBAL float* coupling, uint start, uint count, uint key_heads, uint heads) {
    ScanChunk chunk;
    chunk.keys = key_rows(normed, start, count, key_heads, heads, GROUP_Y);
    chunk.coupling = {coupling + ((ulong64)start * heads + GROUP_Y) * CHUNK, (ulong64)heads * CHUNK, count, CHUNK};
    chunk.keys_slab = fetch<CHUNK, SCAN_STEP>(HERE chunk.keys, 0, 0);
    chunk.coupling_slab = fetch_coupling<IS_BACK>(HERE chunk.coupling, 0);
    return chunk;
}

// By v and, in `held`, S: errors to `out`, and times what is left of them behind the chunk to `fresh`. Where IS_BACK, by
// Y^T do and F: r to `out`, and times minus what the state before had of it to `fresh`.
template <bool IS_BACK>
DEVICE void scan_chunk(
    POSITION LOCAL const ScanChunk& chunk, LOCAL const ScanSums& values, bool has_held,
    SHARED_POINTER(const float) controls, SHARED_POINTER(const float) held, SHARED_POINTER(float) fresh,
    SHARED_POINTER(float) tile, GLOBAL float* out, uint start, uint heads, uint width) {
    uint near = IS_BACK ? UNTIL : SINCE, far = IS_BACK ? SINCE : UNTIL;
    ScanSums sums = {};
    if (has_held) sums = recall(HERE chunk.keys, chunk.keys_slab, held, tile);
    UNROLL for (uint i = 0; i < 2 * SCAN_COLUMNS; ++i) {
        float known = controls[near + SCAN_ROW(i / SCAN_COLUMNS)] * sums.v[i];
        sums.v[i] = IS_BACK ? values.v[i] + known : values.v[i] - known;
    }
    uncouple<IS_BACK>(HERE chunk.coupling, chunk.coupling_slab, controls, fresh, tile, sums);
    UNROLL for (uint i = 0; i < 2 * SCAN_COLUMNS; ++i) {
        uint row = SCAN_ROW(i / SCAN_COLUMNS), place = own_column(THREAD, i % SCAN_COLUMNS);
        uint column = GROUP_X * SLICE + place;
        float factor = IS_BACK ? -controls[far + row] : controls[far + row];
        fresh[row * HELD_PITCH + place] = factor * controls[RATES + row] * sums.v[i];
        if (row < chunk.keys.rows && column < width)
            out[((ulong64)(start + row) * heads + GROUP_Y) * width + column] = sums.v[i];
    }
}

KERNEL(delta_scan)(GIVEN_POSITION
    const GLOBAL float* normed, const GLOBAL float* gates, const GLOBAL int* marks, const GLOBAL float* spans,
    const GLOBAL float* coupling, const GLOBAL ELEMENT* v, GLOBAL float* errors, GLOBAL float* states,
    GLOBAL float* state, SCALAR(uint, tokens), SCALAR(uint, key_heads), SCALAR(uint, heads), SCALAR(uint, width),
    SCALAR(uint, v_pitch), SCALAR(uint, parts), SCALAR(uint, has_state)) {
    SHARED float held[HELD_ROWS * HELD_PITCH];
    SHARED float fresh[CHUNK * HELD_PITCH];
    SHARED float tile[SCAN_TILE];
    SHARED float controls[CONTROLS];
    uint head = GROUP_Y;
    ulong64 elements = (ulong64)KEY_WIDTH * width;
    uint end = document_bound(marks, tokens, GROUP_Z + 1, parts);
    for (uint document = document_bound(marks, tokens, GROUP_Z, parts); document < end;
         document = (uint)marks[tokens + document]) {
        uint behind = document + (marks[document] < 0 ? 0 : document_length(marks, tokens, document));
        for (uint start = document; start < behind; start += CHUNK) {
            bool has_before = start != document || has_state;
            stage_controls(HERE gates, spans, marks, tokens, heads, start, controls);
            if (start == document) load_held(HERE state + head * elements, has_state, width, held);
            BARRIER();
            if (has_before) store_held(HERE held, width, states + ((ulong64)(start / CHUNK) * heads + head) * elements);
            uint count = (uint)controls[COUNT];
            ScanChunk chunk = scanned_chunk<false>(HERE normed, coupling, start, count, key_heads, heads);
            ScanSums values = scan_values(HERE head_rows(v, v_pitch, start, count, width, head));
            scan_chunk<false>(
                HERE chunk, values, has_before, controls, held, fresh, tile, errors, start, heads, width);
            if (has_state || start + CHUNK < behind)
                learn(HERE chunk.keys, chunk.keys_slab, controls[SINCE + count - 1], fresh, tile, held);
        }
        if (has_state && behind > document) store_held(HERE held, width, state + head * elements);
    }
}

KERNEL(delta_scan_back)(GIVEN_POSITION
    const GLOBAL float* normed, const GLOBAL float* gates, const GLOBAL int* marks, const GLOBAL float* spans,
    const GLOBAL float* coupling, const GLOBAL ELEMENT* d_out, GLOBAL float* recalled, GLOBAL float* slopes,
    SCALAR(uint, tokens), SCALAR(uint, key_heads), SCALAR(uint, heads), SCALAR(uint, width), SCALAR(uint, d_pitch),
    SCALAR(uint, parts)) {
    SHARED float held[HELD_ROWS * HELD_PITCH];
    SHARED float fresh[CHUNK * HELD_PITCH];
    SHARED float tile[SCAN_TILE];
    SHARED float controls[CONTROLS];
    uint head = GROUP_Y;
    ulong64 elements = (ulong64)KEY_WIDTH * width;
    uint end = document_bound(marks, tokens, GROUP_Z + 1, parts);
    for (uint document = document_bound(marks, tokens, GROUP_Z, parts); document < end;
         document = (uint)marks[tokens + document]) {
        uint length = marks[document] < 0 ? 0 : document_length(marks, tokens, document);
        uint chunks = (length + CHUNK - 1) / CHUNK;
        for (uint index = chunks; index-- > 0;) {
            uint start = document + index * CHUNK;
            bool has_behind = index + 1 < chunks;
            stage_controls(HERE gates, spans, marks, tokens, heads, start, controls);
            if (!has_behind) load_held(HERE slopes, false, width, held);
            else store_held(HERE held, width, slopes + ((ulong64)(start / CHUNK + 1) * heads + head) * elements);
            uint count = (uint)controls[COUNT];
            ScanChunk chunk = scanned_chunk<true>(HERE normed, coupling, start, count, key_heads, heads);
            Rows<float> direct = head_rows((const GLOBAL float*)recalled, (ulong64)heads * width, start, count, width, head);
            ScanSums values = scan_values(HERE direct);
            ScanSums asked = scan_values(HERE head_rows(d_out, d_pitch, start, count, width, head));
            scan_chunk<true>(
                HERE chunk, values, has_behind, controls, held, fresh, tile, recalled, start, heads, width);
            if (index == 0) continue;
            Rows<float> queries = key_rows(normed, (ulong64)tokens + start, count, key_heads, heads, head);
            ScanSlab queries_slab = fetch<CHUNK, SCAN_STEP>(HERE queries, 0, 0);
            learn(HERE chunk.keys, chunk.keys_slab, controls[SINCE + count - 1], fresh, tile, held);
            UNROLL for (uint i = 0; i < 2 * SCAN_COLUMNS; ++i) {
                uint row = SCAN_ROW(i / SCAN_COLUMNS), place = own_column(THREAD, i % SCAN_COLUMNS);
                fresh[row * HELD_PITCH + place] = controls[SINCE + row] * asked.v[i];
            }
            learn(HERE queries, queries_slab, 1.0f, fresh, tile, held);
        }
    }
}
