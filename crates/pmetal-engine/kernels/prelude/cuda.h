// The words that kernels are written in, for CUDA. NVRTC compiles this text in front of a kernel's; nothing is included.
// A group is a block of threads along x, a SIMD group 32 of them.

#define KERNEL(name) extern "C" __global__ void KERNEL_BOUNDS name
// What a text may say of its kernels, as KERNEL_BOUNDS: registers are to be divided so that so many groups are on a
// multiprocessor.
#define AT_ONCE(threads, groups) __launch_bounds__(threads, groups)
#define KERNEL_BOUNDS
// Where a thread is are parameters in Metal: a kernel is given them first, a function that asks takes them first (POSITION)
// and is handed them first (HERE). What a function writes by reference is LOCAL.
#define GIVEN_POSITION
#define POSITION
#define HERE
#define LOCAL
#define DEVICE __device__ __forceinline__
#define GLOBAL
// Aligned, so that neighbours are read and written by 16 bytes.
#define SHARED __shared__ __align__(16)
#define SHARED_POINTER(type) type*
#define SCALAR(type, name) type name
#define THREAD threadIdx.x
#define THREADS blockDim.x
#define GROUP_X blockIdx.x
#define GROUP_Y blockIdx.y
#define GROUP_Z blockIdx.z
#define GROUPS_X gridDim.x
#define GROUPS_Y gridDim.y
#define BARRIER() __syncthreads()
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long long ulong64;

struct bf16 { ushort bits; };
struct f16 { ushort bits; };
typedef float f32;

DEVICE float as_float(uint bits) { return __uint_as_float(bits); }
DEVICE uint as_bits(float value) { return __float_as_uint(value); }

DEVICE float widen(f32 x) { return x; }
DEVICE float widen(bf16 x) { return as_float((uint)x.bits << 16); }
DEVICE float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// To nearest, ties to even; NaN stays NaN.
DEVICE void narrow(float x, GLOBAL f32* y) { *y = x; }
DEVICE void narrow(float x, GLOBAL bf16* y) {
    ushort bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    y->bits = bits;
}
DEVICE void narrow(float x, GLOBAL f16* y) {
    ushort bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    y->bits = bits;
}

// Eight elements at an address that 16 bytes divide.
struct Eight { float v[8]; };
DEVICE Eight load_eight(const GLOBAL f32* p) {
    float4 a = *(const float4*)p, b = *(const float4*)(p + 4);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
template <typename T> DEVICE Eight widen_eight(uint4 raw) {
    uint words[4] = {raw.x, raw.y, raw.z, raw.w};
    Eight out;
    for (int i = 0; i < 4; ++i) {
        T low, high;
        low.bits = (ushort)(words[i] & 0xffff);
        high.bits = (ushort)(words[i] >> 16);
        out.v[2 * i] = widen(low);
        out.v[2 * i + 1] = widen(high);
    }
    return out;
}
DEVICE Eight load_eight(const bf16* p) { return widen_eight<bf16>(*(const uint4*)p); }
DEVICE Eight load_eight(const f16* p) { return widen_eight<f16>(*(const uint4*)p); }
// The same, for what nobody reads again soon: it does not push other lines out of the first cache.
DEVICE uint4 load_once(const void* p) {
    uint4 raw;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w) : "l"(p));
    return raw;
}
DEVICE Eight load_eight_once(const f32* p) {
    uint4 a = load_once(p), b = load_once(p + 4);
    return {{as_float(a.x), as_float(a.y), as_float(a.z), as_float(a.w), as_float(b.x), as_float(b.y), as_float(b.z),
             as_float(b.w)}};
}
template <typename T> DEVICE Eight load_eight_once(const T* p) { return widen_eight<T>(load_once(p)); }
#define load_eight_once load_eight_once
// Eight elements as they lie in memory, for who holds many.
template <typename T> struct Packed { uint4 raw; };
template <> struct Packed<f32> { float4 low, high; };
template <typename T> DEVICE Packed<T> load_packed(const T* p) { return {*(const uint4*)p}; }
template <> DEVICE Packed<f32> load_packed(const f32* p) { return {*(const float4*)p, *(const float4*)(p + 4)}; }
template <typename T> DEVICE Eight unpacked(Packed<T> x) { return widen_eight<T>(x.raw); }
template <> DEVICE Eight unpacked(Packed<f32> x) {
    return {{x.low.x, x.low.y, x.low.z, x.low.w, x.high.x, x.high.y, x.high.z, x.high.w}};
}
template <typename T> DEVICE uint two_narrow(float low, float high) {
    T a, b;
    narrow(low, &a);
    narrow(high, &b);
    return (uint)a.bits | ((uint)b.bits << 16);
}
template <typename T> DEVICE Packed<T> packed(Eight x) {
    return {make_uint4(
        two_narrow<T>(x.v[0], x.v[1]), two_narrow<T>(x.v[2], x.v[3]), two_narrow<T>(x.v[4], x.v[5]),
        two_narrow<T>(x.v[6], x.v[7]))};
}
template <> DEVICE Packed<f32> packed<f32>(Eight x) {
    return {make_float4(x.v[0], x.v[1], x.v[2], x.v[3]), make_float4(x.v[4], x.v[5], x.v[6], x.v[7])};
}
// Two elements at an address that their size divides.
struct Two { float v[2]; };
DEVICE Two load_two(const f32* p) {
    float2 two = *(const float2*)p;
    return {{two.x, two.y}};
}
template <typename T> DEVICE Two load_two(const T* p) {
    uint raw = *(const uint*)p;
    T low, high;
    low.bits = (ushort)(raw & 0xffff);
    high.bits = (ushort)(raw >> 16);
    return {{widen(low), widen(high)}};
}
DEVICE void store_two(Two x, f32* p) { *(float2*)p = make_float2(x.v[0], x.v[1]); }
template <typename T> DEVICE void store_two(Two x, T* p) { *(uint*)p = two_narrow<T>(x.v[0], x.v[1]); }
// Sixteen bytes at an address that 16 divides.
struct Sixteen { uint words[4]; };
DEVICE Sixteen load_sixteen(const uchar* p) {
    uint4 raw = *(const uint4*)p;
    return {{raw.x, raw.y, raw.z, raw.w}};
}
DEVICE void store_sixteen(Sixteen x, uchar* p) {
    *(uint4*)p = make_uint4(x.words[0], x.words[1], x.words[2], x.words[3]);
}
DEVICE void store_eight(Eight x, f32* p) {
    *(float4*)p = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    *(float4*)(p + 4) = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}
template <typename T> DEVICE void store_eight_narrow(Eight x, T* p) {
    uint words[4];
    for (int i = 0; i < 4; ++i) {
        T low, high;
        narrow(x.v[2 * i], &low);
        narrow(x.v[2 * i + 1], &high);
        words[i] = (uint)low.bits | ((uint)high.bits << 16);
    }
    *(uint4*)p = make_uint4(words[0], words[1], words[2], words[3]);
}
// To shared memory.
DEVICE void share_eight(Eight x, float* p) { store_eight(x, p); }
DEVICE void store_eight(Eight x, bf16* p) { store_eight_narrow(x, p); }
DEVICE void store_eight(Eight x, f16* p) { store_eight_narrow(x, p); }

DEVICE float simd_shuffle_xor(float x, uint mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

DEVICE float exponential(float x) { return expf(x); }
DEVICE float logarithm(float x) { return logf(x); }
DEVICE float square_root(float x) { return sqrtf(x); }
// Off by one unit in the last place.
DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }
DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
// Rounded once.
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
DEVICE float magnitude(float x) { return fabsf(x); }
DEVICE uint multiply_high(uint a, uint b) { return __umulhi(a, b); }
DEVICE void atomic_add(SHARED_POINTER(uint) p, uint x) { atomicAdd(p, x); }
#if __CUDA_ARCH__ >= 890
// Two numbers to e4m3, the first to the lower byte.
DEVICE uint native_e4m3_pair(float low, float high) {
    ushort bits;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
    return bits;
}
#define NATIVE_E4M3_PAIR native_e4m3_pair
#endif
#if __CUDA_ARCH__ >= 800
// Adds a product of 16 x 8 and 8 x 8 by the matrix unit to a SIMD group's sums, in the order that mma.m16n8k8 says, operands
// rounded to 11 bits: the unit ignores what is behind them, so half of the last is added.
DEVICE void native_rounded_product(const float* a, const float* b, float* low, float* high) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(low[0]), "+f"(low[1]), "+f"(high[0]), "+f"(high[1])
        : "r"(as_bits(a[0]) + 0x1000u), "r"(as_bits(a[1]) + 0x1000u), "r"(as_bits(a[2]) + 0x1000u),
          "r"(as_bits(a[3]) + 0x1000u), "r"(as_bits(b[0]) + 0x1000u), "r"(as_bits(b[1]) + 0x1000u));
}
#define NATIVE_ROUNDED_PRODUCT native_rounded_product
// See paired_product of common.cpp.
#define MULTIPLY_PAIRS(type)                                                                                              \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                                      \
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]))
template <typename T> DEVICE void native_paired_product(const uint* left, const uint* right, float* sums);
template <> DEVICE void native_paired_product<bf16>(const uint* left, const uint* right, float* sums) {
    MULTIPLY_PAIRS("bf16");
}
template <> DEVICE void native_paired_product<f16>(const uint* left, const uint* right, float* sums) {
    MULTIPLY_PAIRS("f16");
}
#define NATIVE_PAIRED_PRODUCT native_paired_product
#endif
#define INFINITE __int_as_float(0x7f800000)
