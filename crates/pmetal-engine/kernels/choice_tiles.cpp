// The scores of choice.cpp by matrix units: q and k of 16 bits, of type PAIRED, in rows at addresses that 16 bytes divide;
// WIDTH is a multiple of 32, at most 128. Operands are multiplied as they are, sums are in f32.
//
// score_tiles  grid (ceil(Tk / 256), ceil(rows / 32)), group 256: scores f32 [rows, Tk] of keys that are seen, for queries
//              that see more than `count`
// Each SIMD group holds 32 keys in registers. The group's queries go through shared memory head by head, the next head's
// being on their way. Flops: 2 H E for a pair of a tile. Bytes: q once for 256 keys, k once for 32 queries.

#ifndef WIDTH
#define WIDTH 32
#endif

#define GROUP 256
#define QUERIES 32
// Words of a row; of one in shared memory, such that no two of eight lanes that read 16 bytes each meet in a bank.
#define WORDS (WIDTH / 2)
#define PITCH (WORDS % 32 == 0 ? WORDS + 16 : WORDS)
#define TILE (QUERIES * PITCH)
// Pieces of 16 bytes of a row, of which a thread brings each eighth.
#define PIECES (WIDTH / 8)
#define SHARE ((PIECES + 7) / 8)

// What a thread brings of a head's queries.
struct Brought {
    Sixteen pieces[SHARE];
    float weight;
};

DEVICE Brought bring(POSITION const GLOBAL uchar* q, const GLOBAL float* weights, bool is_there, uint head) {
    Brought brought = {};
    if (!is_there) return brought;
    UNROLL for (uint n = 0; n < SHARE; ++n) {
        if (n * 8 + THREAD % 8 < PIECES) brought.pieces[n] = load_sixteen(q + head * (WIDTH * 2) + n * 128);
    }
    brought.weight = weights[head];
    return brought;
}

DEVICE void put(POSITION Brought brought, SHARED_POINTER(uint) tile, SHARED_POINTER(float) factors) {
    UNROLL for (uint n = 0; n < SHARE; ++n) {
        uint piece = n * 8 + THREAD % 8;
        if (piece >= PIECES) continue;
        UNROLL for (uint j = 0; j < 4; ++j) tile[THREAD / 8 * PITCH + piece * 4 + j] = brought.pieces[n].words[j];
    }
    if (THREAD % 8 == 0) factors[THREAD / 8] = brought.weight;
}

// A thread's part of the keys of its SIMD group: of each eighth row the words that its products of 16 columns take.
struct Keys { Sixteen pieces[4][WIDTH / 32]; };

// Products of 32 keys and 8 queries from `tile` on, a matrix of 16 keys after the other. The order of columns within 32 is
// that in which lanes read 16 bytes, in both operands.
DEVICE void multiply(POSITION LOCAL const Keys& keys, SHARED_POINTER(const uint) tile, LOCAL float* products) {
    uint row = THREAD % 32 / 4, lane = THREAD % 4;
    UNROLL for (uint d = 0; d < WIDTH / 32; ++d) {
        uint right[4];
        UNROLL for (uint j = 0; j < 4; ++j) right[j] = tile[row * PITCH + d * 16 + lane * 4 + j];
        UNROLL for (uint n = 0; n < 4; n += 2) {
            UNROLL for (uint m = 0; m < 2; ++m) {
                uint left[4] = {
                    keys.pieces[2 * m][d].words[n], keys.pieces[2 * m + 1][d].words[n],
                    keys.pieces[2 * m][d].words[n + 1], keys.pieces[2 * m + 1][d].words[n + 1]};
                paired_product<PAIRED>(HERE left, right + n, products + 4 * m);
            }
        }
    }
}

#undef KERNEL_BOUNDS
#define KERNEL_BOUNDS AT_ONCE(GROUP, 2)

KERNEL(score_tiles)(GIVEN_POSITION
    const GLOBAL uchar* q, const GLOBAL uchar* k, const GLOBAL float* weights, const GLOBAL int* key_begin,
    const GLOBAL int* key_end, GLOBAL float* scores, SCALAR(uint, first), SCALAR(uint, rows), SCALAR(uint, keys),
    SCALAR(uint, heads), SCALAR(uint, q_pitch), SCALAR(uint, k_pitch), SCALAR(uint, weights_pitch), SCALAR(uint, count)) {
    SHARED uint tiles[2 * TILE];
    SHARED float factors[2 * QUERIES];
    uint row = GROUP_Y * QUERIES, token = first + row, left = rows - row < QUERIES ? rows - row : QUERIES;
    int start = (int)(GROUP_X * GROUP), own = start + (int)(THREAD / 32 * 32);
    // Whether the group's keys, and those of the SIMD group, are looked at by anybody who chooses.
    bool is_needed = false, is_own_needed = false;
    for (uint i = 0; i < left; ++i) {
        int begin = key_begin[token + i], end = key_end[token + i];
        bool chooses = end - begin > (int)count;
        is_needed |= chooses && start < end && begin < start + GROUP;
        is_own_needed |= chooses && own < end && begin < own + 32;
    }
    if (!is_needed) return;
    Keys held = {};
    UNROLL for (uint i = 0; i < 4; ++i) {
        uint key = (uint)own + 8 * i + THREAD % 32 / 4;
        if (key >= keys || !is_own_needed) continue;
        UNROLL for (uint d = 0; d < WIDTH / 32; ++d)
            held.pieces[i][d] = load_sixteen(k + 2 * (ulong64)key * k_pitch + d * 64 + THREAD % 4 * 16);
    }
    bool is_there = THREAD / 8 < left;
    q += 2 * (ulong64)(token + THREAD / 8) * q_pitch + THREAD % 8 * 16;
    weights += (ulong64)(token + THREAD / 8) * weights_pitch;
    float sums[QUERIES / 8][8] = {};
    put(HERE bring(HERE q, weights, is_there, 0), tiles, factors);
    BARRIER();
    for (uint head = 0; head < heads; ++head) {
        Brought next = {};
        if (head + 1 < heads) next = bring(HERE q, weights, is_there, head + 1);
        if (is_own_needed) {
            SHARED_POINTER(const uint) tile = tiles + head % 2 * TILE;
            SHARED_POINTER(const float) factor = factors + head % 2 * QUERIES + THREAD % 4 * 2;
            UNROLL for (uint n = 0; n < QUERIES / 8; ++n) {
                float products[8] = {};
                multiply(HERE held, tile + n * 8 * PITCH, products);
                UNROLL for (uint j = 0; j < 8; ++j) sums[n][j] += factor[n * 8 + j % 2] * maximum(products[j], 0.0f);
            }
        }
        uint other = (head + 1) % 2;
        put(HERE next, tiles + other * TILE, factors + other * QUERIES);
        BARRIER();
    }
    UNROLL for (uint n = 0; n < QUERIES / 8; ++n) {
        UNROLL for (uint j = 0; j < 8; ++j) {
            uint query = n * 8 + THREAD % 4 * 2 + j % 2;
            int key = own + (int)(j / 2 * 8 + THREAD % 32 / 4);
            if (query >= left || key < key_begin[token + query] || key >= key_end[token + query]) continue;
            scores[(ulong64)(row + query) * keys + (uint)key] = sums[n][j];
        }
    }
}
