// Tiles of 16-bit numbers in shared memory and the matrix instructions on them, compute capability 8.0 and above. Put this
// in front of every text that uses them; it needs nothing in front itself.
//
// Option given to the compiler (-D): HALVES_F16=1: f16 instead of bf16 (default 0).

#ifndef HALVES_F16
#define HALVES_F16 0
#endif

typedef unsigned short half_bits;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__

// The one name of the dynamic shared memory: the Hopper texts need 1024-byte alignment for swizzled tiles.
extern __shared__ __align__(1024) unsigned char dynamic_shared[];

// All blocks of a cluster, on compute capability 9.0.
INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
INLINE void synchronise_cluster() {
    cluster_arrive();
    cluster_wait();
}

INLINE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// Byte offset of the 16-byte chunk `chunk` of row `row` in a tile of WIDTH 16-bit columns. The exclusive-or spreads
// eight rows of one chunk over all 32 banks, so neither ldmatrix nor the copies collide.
template <int WIDTH>
INLINE u32 tile_offset(int row, int chunk) {
    static_assert(WIDTH % 32 == 0, "a tile is made of 64-byte pieces");
    if (WIDTH % 64 == 0) return (u32)(row * (WIDTH * 2) + ((chunk ^ (row & 7)) << 4));
    return (u32)(row * (WIDTH * 2) + ((chunk ^ ((row >> 1) & 3)) << 4));
}

// Sixteen bytes to shared memory: the first `bytes` of the source, then zeros.
INLINE void copy_bytes_async(u32 destination, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes) : "memory");
}
// Sixteen bytes to shared memory, zeros where `present` is false.
INLINE void copy_chunk_async(u32 destination, const void* source, bool present) {
    copy_bytes_async(destination, source, present ? 16 : 0);
}
INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
INLINE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

INLINE void load_matrices(u32 (&registers)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address));
}
INLINE void load_matrices_transposed(u32 (&registers)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address));
}

// d += a b for one 16 x 8 x 16 product.
INLINE void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if HALVES_F16
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
INLINE u32 left_address(u32 tile, int row, int chunk, int lane) {
    return tile + tile_offset<WIDTH>(row + (lane & 15), chunk + (lane >> 4));
}
// Right operand (two 8-column products, stored with the summed index along columns); also the left operand stored with
// the summed index along rows (transposed load).
template <int WIDTH>
INLINE u32 right_address(u32 tile, int row, int chunk, int lane) {
    return tile + tile_offset<WIDTH>(row + (lane & 7) + ((lane >> 4) << 3), chunk + ((lane >> 3) & 1));
}
