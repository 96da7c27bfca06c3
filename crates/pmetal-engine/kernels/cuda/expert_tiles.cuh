// What products of experts share, whichever instructions multiply them: tiles of TILE_ROWS rows by COLUMN_TILE columns, over steps of
// 64 of the summed index. Put this in front of them, behind tiles.cuh.
//
// Both compute out [P, N] = scale * (left right_e + second left second right_e) (+ bias) (+ out).
// A tile is an expert, its first row and its rows, at most TILE_ROWS; no rows = no work. Right operands are stacks [X, K, N], or
// [X, N, K] with TURNED and SECOND_TURNED. All sizes and pitches are multiples of 8 elements, addresses of 16 bytes.
// Bytes: left once for every COLUMN_TILE columns, right once for every tile, the output once.

constexpr int STEP = 64;
constexpr int LEFT_BYTES = TILE_ROWS * STEP * 2;
constexpr int STAGE_BYTES = LEFT_BYTES + COLUMN_TILE * STEP * 2;

INLINE u32 two_halves(float low, float high) {
    u32 packed;
#if HALVES_F16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

INLINE float half_of(u32 packed, int which) {
    half_bits bits = (half_bits)(which ? packed >> 16 : packed & 0xffff);
#if HALVES_F16
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return __uint_as_float((u32)bits << 16);
#endif
}

// What happens to sums before they are stored.
struct Finish {
    const float* bias;
    float scale;
    u32 biased, accumulate;
};

// Two sums of neighbouring columns.
INLINE void store_two(const Finish& finish, half_bits* out_row, u64 bias_row, int column, float low, float high) {
    low *= finish.scale;
    high *= finish.scale;
    if (finish.biased) {
        float2 added = *(const float2*)(finish.bias + bias_row + column);
        low += added.x;
        high += added.y;
    }
    u32* place = (u32*)(out_row + column);
    if (finish.accumulate) {
        u32 held = *place;
        low += half_of(held, 0);
        high += half_of(held, 1);
    }
    *place = two_halves(low, high);
}
