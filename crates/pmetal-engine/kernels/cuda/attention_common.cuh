// What every attention text shares. Put this in front of all of them, behind tiles.cuh.
//
// Options given to the compiler (-D):
//   HEAD_WIDTH=E, VALUE_WIDTH=Ev   multiples of 8 up to 256; padded inside to 64, 96, 128, 192 or 256
//   ATTENTION_SOFTCAP=1            the scalar `softcap` is above 0 and is honoured (default 0: it is ignored)
// Letters: E key width, Ev value width, H query heads, K key/value heads, Tq query rows, Tk key rows.
//
// Every matrix is a pointer and a row pitch in elements; pointers are aligned to 16 bytes and pitches are multiples of 8.
// Query t sees the keys key_begin[t] <= j < key_end[t]; both arrays are non-decreasing. Scale is above 0.

#ifndef ATTENTION_SOFTCAP
#define ATTENTION_SOFTCAP 0
#endif

__device__ constexpr int padded_width(int width) {
    return width <= 64 ? 64 : width <= 96 ? 96 : width <= 128 ? 128 : width <= 192 ? 192 : 256;
}

constexpr int KEY_PAD = padded_width(HEAD_WIDTH);
constexpr int VALUE_PAD = padded_width(VALUE_WIDTH);
constexpr int WIDEST_PAD = KEY_PAD > VALUE_PAD ? KEY_PAD : VALUE_PAD;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NATURAL_LOG_OF_2 = 0.6931471805599453f;

INLINE float negative_infinity() { return __int_as_float(0xff800000); }
INLINE float positive_infinity() { return __int_as_float(0x7f800000); }

INLINE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The hardware tanh is off by 5e-4, which a cap of 50 would turn into 0.02 of a logit; this form is off by 1e-7.
INLINE float tanh_accurate(float x) {
    return 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(fminf(x, 20.0f) * (2.0f * LOG2_E)));
}

INLINE u32 pack_halves(float low, float high) {
    u32 packed;
#if HALVES_F16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

INLINE float widen_half(half_bits bits) {
#if HALVES_F16
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
    return wide;
#else
    return __uint_as_float((u32)bits << 16);
#endif
}

INLINE float low_half(u32 packed) { return widen_half((half_bits)(packed & 0xffffu)); }
INLINE float high_half(u32 packed) { return widen_half((half_bits)(packed >> 16)); }

// Copies rows [first_row, first_row + ROWS) of one head into a swizzled tile; rows at or past `row_limit` and columns
// past REAL_WIDTH become zeros, so that no later product meets what memory happened to hold.
template <int ROWS, int WIDTH, int REAL_WIDTH, int THREADS>
INLINE void copy_tile_async(u32 tile, const half_bits* base, int pitch, int first_row, int row_limit, int thread) {
    constexpr int CHUNKS = WIDTH / 8;
#pragma unroll
    for (int start = 0; start < ROWS * CHUNKS; start += THREADS) {
        int index = start + thread;
        if ((ROWS * CHUNKS) % THREADS != 0 && index >= ROWS * CHUNKS) break;
        int row = index / CHUNKS;
        int chunk = index % CHUNKS;
        int source_row = first_row + row;
        bool present = source_row < row_limit && (WIDTH == REAL_WIDTH || chunk * 8 < REAL_WIDTH);
        const half_bits* source = base + (present ? (long long)source_row * pitch + chunk * 8 : 0);
        copy_chunk_async(tile + tile_offset<WIDTH>(row, chunk), source, present);
    }
}

INLINE float quad_maximum(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
INLINE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Which keys a run of queries needs, and whether all of them see a whole run of keys.
struct VisibleRange {
    int first;      // lowest key that the first query sees
    int last;       // one past the highest key that the last query sees
    int all_first;  // every query sees keys from here
    int all_last;   // ... up to here
};

INLINE VisibleRange visible_range(const int* key_begin, const int* key_end, int first_query, int query_count,
                                            int query_rows) {
    int last_query = min(first_query + query_count, query_rows) - 1;
    VisibleRange range;
    range.first = key_begin[first_query];
    range.last = key_end[last_query];
    range.all_first = key_begin[last_query];
    range.all_last = first_query + query_count <= query_rows ? key_end[first_query] : 0;
    return range;
}

#if ATTENTION_CHOICE
// The keys that a query looks at, of those that it sees: bit k % 32 of word k / 32 of its row. These are the bits of 64 keys; no
// row = none.
INLINE u64 chosen_keys(const u32* chosen, int words, int query, int query_rows, int first_key) {
    if (query >= query_rows) return 0;
    const u32* row = chosen + (long long)query * words;
    int word = first_key / 32;
    u32 part[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) part[i] = word + i < words ? row[word + i] : 0;
    return (u64)__funnelshift_r(part[1], part[2], first_key) << 32 | __funnelshift_r(part[0], part[1], first_key);
}
#endif
