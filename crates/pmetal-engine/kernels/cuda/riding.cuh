// Products with an adapter's A [S, D] inside kernels that have 16 rows in hand: compute capability 8.0 and above. Needs
// prelude/cuda.h, common.cpp and tiles.cuh in front.
//
// Options given to the compiler (-D): ELEMENT bf16 or f16, the latter with HALVES_F16=1; ROW_WIDTH = D, a multiple of 8;
// RANKS = S, a multiple of 16. Pointers are aligned to 16 bytes, pitches are multiples of 8 elements.
//
// A product sums over columns in any order and puts columns of its result in any place, so that lanes take whole chunks of
// eight neighbours where the matrix instruction speaks of pairs: nothing is turned in shared memory.

constexpr int BLOCK_ROWS = 16;
constexpr int RANK_TILES = RANKS / 8;
static_assert(RANKS % 16 == 0 && ROW_WIDTH % 8 == 0, "whole tiles");

INLINE uint4 chunk_or_zeros(const void* p, bool present) { return present ? *(const uint4*)p : make_uint4(0, 0, 0, 0); }

// Rows of D elements in shared memory: eight rows of 64 bytes fall into different banks.
constexpr int ROW_BYTES = (ROW_WIDTH * 2 + 127) / 128 * 128 + 64;

// scale * x A^T of 16 rows that lie in shared memory; the warps of a block divide the columns among them. Dynamic shared
// memory: max(16 * ROW_BYTES, 64 * WARPS * S) bytes.
template <int WARPS>
struct Reduction {
    static constexpr int SHARE = (ROW_WIDTH + 32 * WARPS - 1) / (32 * WARPS);
    uint4 right[SHARE][RANK_TILES];

    static INLINE int first_column(int index, int warp) { return (index * WARPS + warp) * 32; }

    // A does not depend on the rows: it is under way while they are made.
    INLINE void load(const half_bits* a, u32 a_pitch, int warp, int lane) {
        UNROLL for (int m = 0; m < SHARE; ++m) {
            int column = first_column(m, warp) + (lane & 3) * 8;
            UNROLL for (int n = 0; n < RANK_TILES; ++n)
                right[m][n] = chunk_or_zeros(a + (u64)(n * 8 + (lane >> 2)) * a_pitch + column, column < ROW_WIDTH);
        }
    }

    // The rows were written before; `out` begins at the result's first column of the first row.
    INLINE void finish(half_bits* out, u32 pitch, int rows, float scale, int warp, int lane) const {
        float sums[RANK_TILES][4] = {};
        __syncthreads();
        UNROLL for (int m = 0; m < SHARE; ++m) {
            int column = first_column(m, warp) + (lane & 3) * 8;
            if (first_column(m, warp) >= ROW_WIDTH) break;
            const unsigned char* row = dynamic_shared + (lane >> 2) * ROW_BYTES + column * 2;
            uint4 above = chunk_or_zeros(row, column < ROW_WIDTH), below = chunk_or_zeros(row + 8 * ROW_BYTES, column < ROW_WIDTH);
            u32 left[2][4] = {{above.x, below.x, above.y, below.y}, {above.z, below.z, above.w, below.w}};
            UNROLL for (int n = 0; n < RANK_TILES; ++n) {
                multiply_add(sums[n], left[0], right[m][n].x, right[m][n].y);
                multiply_add(sums[n], left[1], right[m][n].z, right[m][n].w);
            }
        }
        __syncthreads();
        // Nobody reads the rows any more.
        float* parts = (float*)dynamic_shared + lane;
        UNROLL for (int n = 0; n < RANK_TILES; ++n)
            UNROLL for (int i = 0; i < 4; ++i) parts[((warp * RANK_TILES + n) * 4 + i) * 32] = sums[n][i];
        __syncthreads();
        // A warp adds up pairs of neighbours; the lowest bit says which eight rows of a tile.
        for (int pair = warp; pair < RANK_TILES * 2; pair += WARPS) {
            float low = 0.0f, high = 0.0f;
            UNROLL for (int part = 0; part < WARPS; ++part) {
                low += parts[(part * RANK_TILES * 4 + pair * 2) * 32];
                high += parts[(part * RANK_TILES * 4 + pair * 2 + 1) * 32];
            }
            int row = (lane >> 2) + (pair & 1) * 8, column = (pair >> 1) * 8 + (lane & 3) * 2;
            if (row < rows) *(u32*)(out + (u64)row * pitch + column) = two_narrow<ELEMENT>(low * scale, high * scale);
        }
    }
};

// d A for 16 rows of d [T, S] and 64 columns of A from `first`. With t a lane's place among four and g that of the four, it gets
// in sums[half][vector] eight columns from 8 t + 32 vector of row g + 8 half.
INLINE void expand(Eight (&sums)[2][2], const half_bits* d, u32 d_pitch, const half_bits* a, u32 a_pitch, int first, int rows,
                   int lane) {
    int place = lane & 3, row = lane >> 2, column = first + ((row & 1) * 4 + (row >> 1)) * 8;
    float tiles[8][4] = {};
    uint4 right[RANKS / 16][4];
    u32 left[RANKS / 16][4];
    UNROLL for (int step = 0; step < RANKS / 16; ++step)
        UNROLL for (int i = 0; i < 4; ++i) {
            int rank = step * 16 + place * 2 + (i >> 1) * 8;
            right[step][i] = chunk_or_zeros(a + (u64)(rank + (i & 1)) * a_pitch + column, column < ROW_WIDTH);
            int own = row + (i & 1) * 8;
            left[step][i] = own < rows ? *(const u32*)(d + (u64)own * d_pitch + rank) : 0;
        }
    UNROLL for (int step = 0; step < RANKS / 16; ++step) {
        const uint4* chunk = right[step];
        u32 words[4][4] = {{chunk[0].x, chunk[0].y, chunk[0].z, chunk[0].w}, {chunk[1].x, chunk[1].y, chunk[1].z, chunk[1].w},
                           {chunk[2].x, chunk[2].y, chunk[2].z, chunk[2].w}, {chunk[3].x, chunk[3].y, chunk[3].z, chunk[3].w}};
        UNROLL for (int j = 0; j < 8; ++j) {
            u32 pick = j & 1 ? 0x7632 : 0x5410;
            multiply_add(tiles[j], left[step], __byte_perm(words[0][j / 2], words[1][j / 2], pick),
                         __byte_perm(words[2][j / 2], words[3][j / 2], pick));
        }
    }
    UNROLL for (int half = 0; half < 2; ++half)
        UNROLL for (int vector = 0; vector < 2; ++vector)
            UNROLL for (int j = 0; j < 8; ++j) sums[half][vector].v[j] = tiles[j][half * 2 + vector];
}
