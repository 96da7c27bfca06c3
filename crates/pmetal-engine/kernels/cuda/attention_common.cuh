// What every attention text shares. Put this in front of all of them; it needs nothing in front itself.
//
// Options given to the compiler (-D):
//   HEAD_WIDTH=E, VALUE_WIDTH=Ev   multiples of 8 up to 256; padded inside to 64, 96, 128, 192 or 256
//   ATTENTION_F16=1                f16 instead of bf16 (default 0)
//   ATTENTION_SOFTCAP=1            the scalar `softcap` is above 0 and is honoured (default 0: it is ignored)
// Letters: E key width, Ev value width, H query heads, K key/value heads, Tq query rows, Tk key rows.
//
// Every matrix is a pointer and a row pitch in elements; pointers are aligned to 16 bytes and pitches are multiples of 8.
// Query t sees the keys key_begin[t] <= j < key_end[t]; both arrays are non-decreasing. Scale is above 0.

#ifndef ATTENTION_F16
#define ATTENTION_F16 0
#endif
#ifndef ATTENTION_SOFTCAP
#define ATTENTION_SOFTCAP 0
#endif

typedef unsigned short half_bits;
typedef unsigned int u32;
typedef unsigned long long u64;

#define ATTENTION_INLINE __device__ __forceinline__

// The one name of the dynamic shared memory: the Hopper texts need 1024-byte alignment for swizzled tiles.
extern __shared__ __align__(1024) unsigned char dynamic_shared[];

__device__ constexpr int padded_width(int width) {
    return width <= 64 ? 64 : width <= 96 ? 96 : width <= 128 ? 128 : width <= 192 ? 192 : 256;
}

constexpr int KEY_PAD = padded_width(HEAD_WIDTH);
constexpr int VALUE_PAD = padded_width(VALUE_WIDTH);
constexpr int WIDEST_PAD = KEY_PAD > VALUE_PAD ? KEY_PAD : VALUE_PAD;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NATURAL_LOG_OF_2 = 0.6931471805599453f;

ATTENTION_INLINE float negative_infinity() { return __int_as_float(0xff800000); }
ATTENTION_INLINE float positive_infinity() { return __int_as_float(0x7f800000); }

ATTENTION_INLINE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

ATTENTION_INLINE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

ATTENTION_INLINE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The hardware tanh is off by 5e-4, which a cap of 50 would turn into 0.02 of a logit; this form is off by 1e-7.
ATTENTION_INLINE float tanh_accurate(float x) {
    return 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(fminf(x, 20.0f) * (2.0f * LOG2_E)));
}

ATTENTION_INLINE u32 pack_halves(float low, float high) {
    u32 packed;
#if ATTENTION_F16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

ATTENTION_INLINE float widen_half(half_bits bits) {
#if ATTENTION_F16
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
    return wide;
#else
    return __uint_as_float((u32)bits << 16);
#endif
}

ATTENTION_INLINE float low_half(u32 packed) { return widen_half((half_bits)(packed & 0xffffu)); }
ATTENTION_INLINE float high_half(u32 packed) { return widen_half((half_bits)(packed >> 16)); }

// Byte offset of the 16-byte chunk `chunk` of row `row` in a tile of WIDTH 16-bit columns. The exclusive-or spreads
// eight rows of one chunk over all 32 banks, so neither ldmatrix nor the copies collide.
template <int WIDTH>
ATTENTION_INLINE u32 tile_offset(int row, int chunk) {
    static_assert(WIDTH % 32 == 0, "a tile is made of 64-byte pieces");
    if (WIDTH % 64 == 0) return (u32)(row * (WIDTH * 2) + ((chunk ^ (row & 7)) << 4));
    return (u32)(row * (WIDTH * 2) + ((chunk ^ ((row >> 1) & 3)) << 4));
}

// Sixteen bytes to shared memory, zeros where `present` is false.
ATTENTION_INLINE void copy_chunk_async(u32 destination, const void* source, bool present) {
    int bytes = present ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes) : "memory");
}
ATTENTION_INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
ATTENTION_INLINE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Copies rows [first_row, first_row + ROWS) of one head into a swizzled tile; rows at or past `row_limit` and columns
// past REAL_WIDTH become zeros, so that no later product meets what memory happened to hold.
template <int ROWS, int WIDTH, int REAL_WIDTH, int THREADS>
ATTENTION_INLINE void copy_tile_async(u32 tile, const half_bits* base, int pitch, int first_row, int row_limit, int thread) {
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

ATTENTION_INLINE void load_matrices(u32 (&registers)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address));
}
ATTENTION_INLINE void load_matrices_transposed(u32 (&registers)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address));
}

// d += a b for one 16 x 8 x 16 product.
ATTENTION_INLINE void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if ATTENTION_F16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Addresses that a lane gives to ldmatrix. "Rows" are rows of the stored tile, columns advance in chunks of 8.
// Left operand (16 x 16, stored as is); also the right operand stored with the summed index along rows (transposed load).
template <int WIDTH>
ATTENTION_INLINE u32 left_address(u32 tile, int row, int chunk, int lane) {
    return tile + tile_offset<WIDTH>(row + (lane & 15), chunk + (lane >> 4));
}
// Right operand (two 8-column products, stored with the summed index along columns); also the left operand stored with
// the summed index along rows (transposed load).
template <int WIDTH>
ATTENTION_INLINE u32 right_address(u32 tile, int row, int chunk, int lane) {
    return tile + tile_offset<WIDTH>(row + (lane & 7) + ((lane >> 4) << 3), chunk + ((lane >> 3) & 1));
}

ATTENTION_INLINE float quad_maximum(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
ATTENTION_INLINE float quad_sum(float x) {
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

ATTENTION_INLINE VisibleRange visible_range(const int* key_begin, const int* key_end, int first_query, int query_count,
                                            int query_rows) {
    int last_query = min(first_query + query_count, query_rows) - 1;
    VisibleRange range;
    range.first = key_begin[first_query];
    range.last = key_end[last_query];
    range.all_first = key_begin[last_query];
    range.all_last = first_query + query_count <= query_rows ? key_end[first_query] : 0;
    return range;
}
