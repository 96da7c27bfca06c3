// cross_entropy of loss.cpp for compute capability 9.0: the blocks of a cluster hold a row of logits in shared memory between them,
// so that it is read once. Needs common.cpp, tiles.cuh and attention_hopper.cuh in front.
//
// extern "C" cross_entropy_cluster: what cross_entropy takes and does, of columns and a pitch that are multiples of 8. CLUSTER:
// blocks of a row, 2 to 8; CAPPED: whether there is a softcap. Grid (CLUSTER, rows), block 512, dynamic shared memory 4 * 8 * ceil(columns / 8 / CLUSTER) bytes.
// Bytes: the logits once, the gradient once.

constexpr u32 HOLDERS = 512;
constexpr u32 COPY_FLOATS = HOLDERS * 4;
// A row's part is waited for in so many pieces.
constexpr u32 PIECES = 4;
constexpr float LOG2_OF_E = 1.44269504f;
constexpr float LOG_OF_2 = 0.69314718f;

// 2^x to 22 bits.
INLINE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A logit as a power of two over `top`; what is left of its own slope when a cap has flattened it.
struct Level {
    float base, cap, scale;
    INLINE float capped_by(float x) const { return CAPPED ? cap * tanhf(x * scale / cap) : x; }
    INLINE float over(float x, float top) const { return fmaf(capped_by(x), base, -top); }
    INLINE float left_of(float x) const {
        float share = capped_by(x) / cap;
        return 1.0f - share * share;
    }
};

// To the same place in another block's shared memory.
INLINE void store_two_at(u32 block, u32 address, float first, float second) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(there), "f"(first), "f"(second) : "memory");
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(HOLDERS, 2) cross_entropy_cluster(
    float* logits, const int* labels, float* losses, u32 columns, u32 pitch, float scale, float cap, float gradient_scale) {
    __shared__ float scratch[32];
    __shared__ float2 parts[CLUSTER];
    __shared__ u64 arrivals[PIECES];
    const float* held = (const float*)dynamic_shared;
    u32 slice = (columns / 8 + CLUSTER - 1) / CLUSTER * 8, first = blockIdx.x * slice;
    u32 count = first >= columns ? 0 : columns - first < slice ? columns - first : slice;
    logits += (u64)blockIdx.y * pitch;
    ELEMENT* gradient = (ELEMENT*)logits + first;
    int label = labels[blockIdx.y];
    if (label < 0) {
        Eight zeros = {};
        for (u32 i = threadIdx.x * 8; i < count; i += HOLDERS * 8) store_eight(zeros, gradient + i);
        if (first == 0 && threadIdx.x == 0) losses[blockIdx.y] = 0.0f;
        return;
    }
    // Floats of a piece: whole copies.
    u32 piece = (count + PIECES * COPY_FLOATS - 1) / (PIECES * COPY_FLOATS) * COPY_FLOATS;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < PIECES; ++i) barrier_initialise(shared_address(arrivals + i), 1);
        fence_barrier_initialisation();
    }
    __syncthreads();
    // Nothing is stored in a block that has not begun.
    cluster_arrive();
    if (threadIdx.x < PIECES) {
        u32 barrier = shared_address(arrivals + threadIdx.x), start = threadIdx.x * piece;
        u32 end = start + piece < count ? start + piece : count;
        barrier_expect_bytes(barrier, start < end ? (end - start) * 4 : 0);
        for (u32 i = start; i < end; i += COPY_FLOATS) {
            u32 some = end - i < COPY_FLOATS ? end - i : COPY_FLOATS;
            copy_bytes(shared_address(held + i), logits + first + i, some * 4, barrier);
        }
    }
    Level level = {CAPPED ? LOG2_OF_E : scale * LOG2_OF_E, cap, scale};
    float largest = -INFINITE, sum = 0.0f;
    for (u32 start = 0, arrival = 0; start < count; start += COPY_FLOATS) {
        if (start % piece == 0) barrier_wait(shared_address(arrivals + arrival++), 0);
        u32 i = start + threadIdx.x * 4;
        if (i >= count) continue;
        float4 four = *(const float4*)(held + i);
        float x[4] = {four.x, four.y, four.z, four.w}, higher = largest, part = 0.0f;
        UNROLL for (int j = 0; j < 4; ++j) higher = maximum(higher, level.over(x[j], 0.0f));
        UNROLL for (int j = 0; j < 4; ++j) part += power_of_two(level.over(x[j], higher));
        sum = sum * power_of_two(largest - higher) + part;
        largest = higher;
    }
    // A NaN compares with nothing and stays in the sum; threads without elements hold minus infinity.
    float top = group_max(largest, scratch);
    __syncthreads();
    sum = group_sum(largest == -INFINITE && sum == 0.0f ? 0.0f : sum * power_of_two(largest - top), scratch);
    cluster_wait();
    if (threadIdx.x < CLUSTER) store_two_at(threadIdx.x, shared_address(parts + blockIdx.x), top, sum);
    synchronise_cluster();
    top = -INFINITE;
    UNROLL for (int block = 0; block < CLUSTER; ++block) top = maximum(top, parts[block].x);
    sum = 0.0f;
    UNROLL for (int block = 0; block < CLUSTER; ++block)
        if (parts[block].x != -INFINITE || parts[block].y != 0.0f) sum += parts[block].y * power_of_two(parts[block].x - top);
    u32 own_label = (u32)label - first;
    if (threadIdx.x == 0 && own_label < count)
        losses[blockIdx.y] = logarithm(sum) - level.over(held[own_label], top) * LOG_OF_2;
    float factor = scale * gradient_scale, share = factor / sum;
    for (u32 i = threadIdx.x * 8; i < count; i += HOLDERS * 8) {
        Eight x = load_eight(held + i), slope;
        UNROLL for (int j = 0; j < 8; ++j) slope.v[j] = power_of_two(level.over(x.v[j], top)) * share;
        if (own_label - i < 8)
            UNROLL for (int j = 0; j < 8; ++j) slope.v[j] -= i + j == own_label ? factor : 0.0f;
        if (CAPPED)
            UNROLL for (int j = 0; j < 8; ++j) slope.v[j] *= level.left_of(x.v[j]);
        store_eight(slope, gradient + i);
    }
}
