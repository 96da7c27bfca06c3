// The words that kernels are written in, for a C++17 compiler of the host, so that kernels can be tested without a GPU.
// kernels/host/runner.cpp runs the threads of a group as fibres; arrays of SHARED are one for each group because groups run
// one after another, and lie in a section of their own so that they can be poisoned before each.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long long ulong64;

// Where the running fibre is.
struct HostPlace { uint thread, threads, group[3], groups[3]; };
static HostPlace host_place;

static void host_barrier();
static float host_shuffle_xor(float x, uint mask);
[[noreturn]] static void host_fault(const char* what);

// Handed on like the parameters that Metal gives, so that a kernel that forgets to does not compile here either.
struct HostPosition {};
static inline const HostPlace& host_at(HostPosition) { return host_place; }

#define KERNEL(name) static void name
#define AT_ONCE(threads, groups)
#define KERNEL_BOUNDS
#define GIVEN_POSITION HostPosition here,
#define POSITION HostPosition here,
#define HERE here,
#define LOCAL
#define DEVICE static inline
#define GLOBAL
#ifdef __APPLE__
#define SHARED static __attribute__((section("__DATA,kernel_shared")))
#else
#define SHARED static __attribute__((section("kernel_shared")))
#endif
#define SHARED_POINTER(type) type*
#define SCALAR(type, name) type name
#define THREAD (host_at(here).thread)
#define THREADS (host_at(here).threads)
#define GROUP_X (host_at(here).group[0])
#define GROUP_Y (host_at(here).group[1])
#define GROUP_Z (host_at(here).group[2])
#define GROUPS_X (host_at(here).groups[0])
#define GROUPS_Y (host_at(here).groups[1])
#define BARRIER() host_barrier()
#define UNROLL
#define ROLLED

struct bf16 { ushort bits; };
struct f16 { ushort bits; };
typedef float f32;

DEVICE float as_float(uint bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
DEVICE uint as_bits(float x) {
    uint bits;
    memcpy(&bits, &x, 4);
    return bits;
}

DEVICE float widen(f32 x) { return x; }
DEVICE float widen(bf16 x) { return as_float((uint)x.bits << 16); }
DEVICE float widen(f16 x) {
    uint exponent = (x.bits >> 10) & 31, mantissa = x.bits & 0x3ff;
    float size = exponent == 0    ? (float)mantissa * 0x1p-24f
                 : exponent == 31 ? as_float(0x7f800000u | mantissa << 13)
                                  : as_float((exponent + 112) << 23 | mantissa << 13);
    return as_float(as_bits(size) | (uint)(x.bits & 0x8000) << 16);
}

// To nearest, ties to even; NaN stays NaN.
DEVICE void narrow(float x, f32* y) { *y = x; }
DEVICE void narrow(float x, bf16* y) {
    uint bits = as_bits(x);
    bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    y->bits = (ushort)(is_nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEVICE void narrow(float x, f16* y) {
    uint sign = as_bits(x) >> 16 & 0x8000, size = as_bits(x) & 0x7fffffffu, result;
    if (size > 0x7f800000u) {
        result = 0x7e00 | (size >> 13 & 0x3ff);
    } else if (size >= 0x477ff000u) {
        result = 0x7c00;  // From 65520 on.
    } else if (size < 0x38800000u) {
        result = (uint)rintf(as_float(size) * 0x1p24f);  // Multiples of 2^-24.
    } else {
        result = (size + 0xfff + (size >> 13 & 1) - 0x38000000u) >> 13;
    }
    y->bits = (ushort)(sign | result);
}

// Eight elements at an address that 16 bytes divide.
struct Eight { float v[8]; };
DEVICE void check_alignment(const void* p) {
    if ((uintptr_t)p % 16 != 0) host_fault("eight elements are not at an address that 16 bytes divide");
}
template <typename T> DEVICE Eight load_eight(const T* p) {
    check_alignment(p);
    Eight out;
    for (int i = 0; i < 8; ++i) out.v[i] = widen(p[i]);
    return out;
}
// Eight elements as they lie in memory, for who holds many.
template <typename T> struct Packed { T v[8]; };
template <typename T> DEVICE Packed<T> load_packed(const T* p) {
    check_alignment(p);
    Packed<T> out;
    memcpy(out.v, p, sizeof out.v);
    return out;
}
template <typename T> DEVICE Eight unpacked(Packed<T> x) {
    Eight out;
    for (int i = 0; i < 8; ++i) out.v[i] = widen(x.v[i]);
    return out;
}
template <typename T> DEVICE Packed<T> packed(Eight x) {
    Packed<T> out;
    for (int i = 0; i < 8; ++i) narrow(x.v[i], out.v + i);
    return out;
}
// Two elements at an address that their size divides.
struct Two { float v[2]; };
template <typename T> DEVICE void check_pair(const T* p) {
    if ((uintptr_t)p % (2 * sizeof(T)) != 0) host_fault("two elements are not at an address that their size divides");
}
template <typename T> DEVICE Two load_two(const T* p) {
    check_pair(p);
    return {{widen(p[0]), widen(p[1])}};
}
template <typename T> DEVICE void store_two(Two x, T* p) {
    check_pair(p);
    for (int i = 0; i < 2; ++i) narrow(x.v[i], p + i);
}
// Sixteen bytes at an address that 16 divides.
struct Sixteen { uint words[4]; };
DEVICE Sixteen load_sixteen(const uchar* p) {
    check_alignment(p);
    Sixteen out;
    memcpy(out.words, p, sizeof out.words);
    return out;
}
DEVICE void store_sixteen(Sixteen x, uchar* p) {
    check_alignment(p);
    memcpy(p, x.words, sizeof x.words);
}
template <typename T> DEVICE void store_eight(Eight x, T* p) {
    check_alignment(p);
    for (int i = 0; i < 8; ++i) narrow(x.v[i], p + i);
}

// To shared memory.
DEVICE void share_eight(Eight x, SHARED_POINTER(float) p) {
    for (int i = 0; i < 8; ++i) p[i] = x.v[i];
}

DEVICE float simd_shuffle_xor(float x, uint mask) { return host_shuffle_xor(x, mask); }

DEVICE float exponential(float x) { return expf(x); }
DEVICE float logarithm(float x) { return logf(x); }
DEVICE float square_root(float x) { return sqrtf(x); }
DEVICE float reciprocal(float x) { return 1.0f / x; }
DEVICE float reciprocal_root(float x) { return 1.0f / sqrtf(x); }
DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
// Rounded once.
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
DEVICE float magnitude(float x) { return fabsf(x); }
DEVICE uint multiply_high(uint a, uint b) { return (uint)(((ulong64)a * b) >> 32); }
// Fibres change places at barriers alone.
DEVICE void atomic_add(SHARED_POINTER(uint) p, uint x) { *p += x; }
#define INFINITE as_float(0x7f800000u)
