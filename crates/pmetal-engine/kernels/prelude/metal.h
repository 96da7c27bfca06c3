// The words that kernels are written in, for the Metal Shading Language 3.0 or later. The Metal compiler takes this text in
// front of a kernel's. A group is a threadgroup along x, a SIMD group 32 threads of it. Not yet run on Apple hardware, and
// never seen by Apple's compiler: tools/check_metal_kernels.py parses it with clang and the language's address spaces.
//
// Arguments are bound in the order of the kernel's parameters, buffers and scalars alike, from index 0; a null address is
// a buffer that is not bound. Addresses that kernels read from memory are what `gpuAddress` of a buffer says; such buffers
// must be made resident by the launch. Compile without fast math: infinities and NaN mean something here.

#include <metal_stdlib>
using namespace metal;

#define KERNEL(name) kernel void name
#define AT_ONCE(threads, groups)
#define KERNEL_BOUNDS
// Where a thread is are parameters: a kernel is given them first, a function that asks takes them first and is handed
// them first.
#define GIVEN_POSITION                                                                            \
    uint3 thread_at [[thread_position_in_threadgroup]], uint3 threads_of [[threads_per_threadgroup]], \
    uint3 group_at [[threadgroup_position_in_grid]], uint3 groups_of [[threadgroups_per_grid]],
#define POSITION uint3 thread_at, uint3 threads_of, uint3 group_at, uint3 groups_of,
#define HERE thread_at, threads_of, group_at, groups_of,
#define LOCAL thread
#define DEVICE static inline
#define GLOBAL device
#define SHARED threadgroup
#define SHARED_POINTER(type) threadgroup type*
#define SCALAR(type, name) constant type& name
#define THREAD (thread_at.x)
#define THREADS (threads_of.x)
#define GROUP_X (group_at.x)
#define GROUP_Y (group_at.y)
#define GROUP_Z (group_at.z)
#define GROUPS_X (groups_of.x)
#define GROUPS_Y (groups_of.y)
#define UNROLL _Pragma("clang loop unroll(full)")
#define ROLLED _Pragma("clang loop unroll(disable)")
#define BARRIER() threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup)

typedef ulong ulong64;

struct bf16 { ushort bits; };
struct f16 { ushort bits; };
typedef float f32;

DEVICE float as_float(uint bits) { return as_type<float>(bits); }
DEVICE uint as_bits(float value) { return as_type<uint>(value); }

DEVICE float widen(f32 x) { return x; }
DEVICE float widen(bf16 x) { return as_float((uint)x.bits << 16); }
DEVICE float widen(f16 x) { return (float)as_type<half>(x.bits); }

// To nearest, ties to even; NaN stays NaN.
DEVICE ushort bits_of(float x, bf16) {
    uint bits = as_bits(x);
    return (ushort)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
DEVICE ushort bits_of(float x, f16) { return as_type<ushort>((half)x); }
DEVICE void narrow(float x, GLOBAL f32* y) { *y = x; }
DEVICE void narrow(float x, GLOBAL bf16* y) { y->bits = bits_of(x, bf16()); }
DEVICE void narrow(float x, GLOBAL f16* y) { y->bits = bits_of(x, f16()); }

// Eight elements at an address that 16 bytes divide.
struct Eight { float v[8]; };
DEVICE Eight load_eight(const GLOBAL f32* p) {
    float4 a = *(const GLOBAL float4*)p, b = *(const GLOBAL float4*)(p + 4);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
template <typename T> DEVICE Eight widen_eight(uint4 raw) {
    Eight out;
    for (uint i = 0; i < 4; ++i) {
        T low, high;
        low.bits = (ushort)(raw[i] & 0xffffu);
        high.bits = (ushort)(raw[i] >> 16);
        out.v[2 * i] = widen(low);
        out.v[2 * i + 1] = widen(high);
    }
    return out;
}
DEVICE Eight load_eight(const GLOBAL bf16* p) { return widen_eight<bf16>(*(const GLOBAL uint4*)p); }
DEVICE Eight load_eight(const GLOBAL f16* p) { return widen_eight<f16>(*(const GLOBAL uint4*)p); }
// Eight elements as they lie in memory, for who holds many.
template <typename T> struct Packed { uint4 raw; };
template <> struct Packed<f32> { float4 low, high; };
DEVICE Packed<f32> load_packed(const GLOBAL f32* p) { return {*(const GLOBAL float4*)p, *(const GLOBAL float4*)(p + 4)}; }
DEVICE Packed<bf16> load_packed(const GLOBAL bf16* p) { return {*(const GLOBAL uint4*)p}; }
DEVICE Packed<f16> load_packed(const GLOBAL f16* p) { return {*(const GLOBAL uint4*)p}; }
DEVICE Eight unpacked(Packed<f32> x) {
    return {{x.low.x, x.low.y, x.low.z, x.low.w, x.high.x, x.high.y, x.high.z, x.high.w}};
}
DEVICE Eight unpacked(Packed<bf16> x) { return widen_eight<bf16>(x.raw); }
DEVICE Eight unpacked(Packed<f16> x) { return widen_eight<f16>(x.raw); }
DEVICE void store_eight(Eight x, GLOBAL f32* p) {
    *(GLOBAL float4*)p = float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    *(GLOBAL float4*)(p + 4) = float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}
// To shared memory.
DEVICE void share_eight(Eight x, SHARED_POINTER(float) p) {
    *(threadgroup packed_float4*)p = packed_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    *(threadgroup packed_float4*)(p + 4) = packed_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}
template <typename T> DEVICE uint two_bits_of(float low, float high, T type) {
    return (uint)bits_of(low, type) | (uint)bits_of(high, type) << 16;
}
template <typename T> DEVICE void store_eight_narrow(Eight x, GLOBAL T* p) {
    T type = T();
    *(GLOBAL uint4*)p = uint4(
        two_bits_of(x.v[0], x.v[1], type), two_bits_of(x.v[2], x.v[3], type), two_bits_of(x.v[4], x.v[5], type),
        two_bits_of(x.v[6], x.v[7], type));
}
template <typename T> DEVICE Packed<T> packed(Eight x) {
    T type = T();
    return {uint4(
        two_bits_of(x.v[0], x.v[1], type), two_bits_of(x.v[2], x.v[3], type), two_bits_of(x.v[4], x.v[5], type),
        two_bits_of(x.v[6], x.v[7], type))};
}
template <> DEVICE Packed<f32> packed<f32>(Eight x) {
    return {float4(x.v[0], x.v[1], x.v[2], x.v[3]), float4(x.v[4], x.v[5], x.v[6], x.v[7])};
}
// Two elements at an address that their size divides.
struct Two { float v[2]; };
DEVICE Two load_two(const GLOBAL f32* p) {
    float2 two = *(const GLOBAL float2*)p;
    return {{two.x, two.y}};
}
template <typename T> DEVICE Two widen_two(uint raw) {
    T low, high;
    low.bits = (ushort)(raw & 0xffffu);
    high.bits = (ushort)(raw >> 16);
    return {{widen(low), widen(high)}};
}
DEVICE Two load_two(const GLOBAL bf16* p) { return widen_two<bf16>(*(const GLOBAL uint*)p); }
DEVICE Two load_two(const GLOBAL f16* p) { return widen_two<f16>(*(const GLOBAL uint*)p); }
DEVICE void store_two(Two x, GLOBAL f32* p) { *(GLOBAL float2*)p = float2(x.v[0], x.v[1]); }
DEVICE void store_two(Two x, GLOBAL bf16* p) { *(GLOBAL uint*)p = two_bits_of(x.v[0], x.v[1], bf16()); }
DEVICE void store_two(Two x, GLOBAL f16* p) { *(GLOBAL uint*)p = two_bits_of(x.v[0], x.v[1], f16()); }
// Sixteen bytes at an address that 16 divides.
struct Sixteen { uint words[4]; };
DEVICE Sixteen load_sixteen(const GLOBAL uchar* p) {
    uint4 raw = *(const GLOBAL uint4*)p;
    return {{raw.x, raw.y, raw.z, raw.w}};
}
DEVICE void store_sixteen(Sixteen x, GLOBAL uchar* p) {
    *(GLOBAL uint4*)p = uint4(x.words[0], x.words[1], x.words[2], x.words[3]);
}
DEVICE void store_eight(Eight x, GLOBAL bf16* p) { store_eight_narrow(x, p); }
DEVICE void store_eight(Eight x, GLOBAL f16* p) { store_eight_narrow(x, p); }

#define simd_shuffle_xor(x, mask) metal::simd_shuffle_xor(x, (ushort)(mask))
// Our own, whose order of additions is that of the other devices, under names that the library does not have.
#define simd_sum ordered_simd_sum
#define simd_max ordered_simd_max

DEVICE float exponential(float x) { return precise::exp(x); }
DEVICE float logarithm(float x) { return precise::log(x); }
DEVICE float square_root(float x) { return precise::sqrt(x); }
DEVICE float reciprocal(float x) { return 1.0f / x; }
DEVICE float reciprocal_root(float x) { return precise::rsqrt(x); }
DEVICE float hyperbolic_tangent(float x) { return precise::tanh(x); }
// Rounded once.
DEVICE float multiply_add(float a, float b, float c) { return fma(a, b, c); }
DEVICE float maximum(float a, float b) { return precise::fmax(a, b); }
DEVICE float magnitude(float x) { return fabs(x); }
DEVICE uint multiply_high(uint a, uint b) { return mulhi(a, b); }
// Of threads of one group.
DEVICE void atomic_add(SHARED_POINTER(uint) p, uint x) {
    atomic_fetch_add_explicit((threadgroup atomic_uint*)p, x, memory_order_relaxed);
}
#define INFINITE INFINITY
