// out[row, column] += bias[column]; types: 0 f32, 1 bf16, 2 f16.
typedef unsigned short half_bits;
typedef unsigned long long size;

template <int TYPE> struct Element;
template <> struct Element<0> {
    typedef float stored;
    static __device__ float load(float x) { return x; }
    static __device__ float store(float x) { return x; }
};
template <> struct Element<1> {
    typedef half_bits stored;
    static __device__ float load(half_bits x) { return __uint_as_float((unsigned)x << 16); }
    static __device__ half_bits store(float x) {
        unsigned bits = __float_as_uint(x);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return (half_bits)((bits >> 16) | 0x40u);
        return (half_bits)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
};
template <> struct Element<2> {
    typedef half_bits stored;
    static __device__ float load(half_bits x) {
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
        return y;
    }
    static __device__ half_bits store(float x) {
        half_bits y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
};

extern "C" __global__ void add_bias(
    Element<OUT_TYPE>::stored* out, const Element<BIAS_TYPE>::stored* bias, size rows, size columns, size pitch) {
    size column = (size)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    float added = Element<BIAS_TYPE>::load(bias[column]);
    for (size row = blockIdx.y; row < rows; row += gridDim.y) {
        size at = row * pitch + column;
        out[at] = Element<OUT_TYPE>::store(Element<OUT_TYPE>::load(out[at]) + added);
    }
}
