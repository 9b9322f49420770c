// What the kernels ask of the machine: PTX on a device (compiled by NVRTC), tests/cuda/instructions.h under the same names on a
// host.
//
// Sections of the PTX ISA manual are named where a layout is relied on. Shared memory is addressed by 32-bit offsets and
// reached through these functions alone, so that the emulator sees every access.
#pragma once

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct alignas(16) Int4 {
  int x, y, z, w;
};

#ifndef __CUDACC_RTC__
#include "instructions.h"
#else

#define DEVICE __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)

DEVICE int thread() { return threadIdx.x; }
DEVICE int threads() { return blockDim.x; }
DEVICE i64 block_x() { return blockIdx.x; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int popcount(u32 word) { return __popc(word); }

// The dynamic shared memory, from a multiple of 1024 bytes on: what a 128-byte swizzle asks for ("Strides", wgmma).
DEVICE u32 shared_memory() {
  extern __shared__ u8 memory[];
  return (static_cast<u32>(__cvta_generic_to_shared(memory)) + 1023u) & ~1023u;
}

DEVICE void store_shared(u32 to, Int4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE Int4 load_shared(u32 from) {
  Int4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}
DEVICE void store_shared_int(u32 to, int v) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(v) : "memory"); }
DEVICE int load_shared_int(u32 from) {
  int v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  return v;
}

// Bytes (4, 8 or 16) from global to shared memory, or as many zeros where not `valid`; landed after `copies_landed`.
template <int kBytes>
DEVICE void copy_async(u32 to, const void* from, bool valid) {
  const int size = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past L1: the tile is read once a block
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(size) : "memory");
  }
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// This thread's copies have landed, but for those of its last kLeft groups; the other threads' are seen after `barrier`.
template <int kLeft>
DEVICE void copies_landed() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
DEVICE void barrier() { __syncthreads(); }

DEVICE u32 ballot(bool bit) { return __ballot_sync(0xffffffffu, bit); }
DEVICE u32 shuffle_xor(u32 v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
DEVICE int warp_sum(int v) { return __reduce_add_sync(0xffffffffu, v); }

// Four 8x8 matrices of 16 bits, here 8 rows of 128 bits: lane i names row i % 8 of matrix i / 8 and gets the word i % 4 of row
// i / 4 of each ("Warp-level matrix instructions: ldmatrix").
DEVICE void load_matrices(u32 (&r)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// d (16 x 8) += popcount(a & b), a of 16 x 256 bits, b of 256 x 8 ("Matrix fragments for mma.m16n8k256").
DEVICE void multiply_bits(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What this thread wrote to shared memory is seen by wgmma, which reads by the async proxy, after the next barrier.
DEVICE void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Registers written before are ready for wgmma. `d` is named so that no compiler moves what writes it past the fence.
template <int kCount>
DEVICE void group_fence(int (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All of the warpgroup's products are done; `d` may be read again.
template <int kCount>
DEVICE void group_done(int (&d)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// d (64 x 2 * kCount) += popcount(a & b) of 256 bits, both K-major in shared memory, named by descriptors
// ("Asynchronous warpgroup level matrix instructions: register fragments and shared memory layout").
#define R4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
#define R64(i) R16(i), R16(i + 16), R16(i + 32), R16(i + 48)
#define T(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define T0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,"
#define WGMMA(shape) "{.reg .pred p; setp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned." shape ".s32.b1.b1.and.popc {"
DEVICE void multiply_bits_group(int (&d)[64], u64 a, u64 b) {
  asm volatile(WGMMA("m64n128k256") T0 T(1) T(2) T(3) T(4) T(5) "%60,%61,%62,%63}, %64, %65, p;}" : R64(0) : "l"(a), "l"(b));
}
DEVICE void multiply_bits_group(int (&d)[128], u64 a, u64 b) {
  asm volatile(WGMMA("m64n256k256") T0 T(1) T(2) T(3) T(4) T(5) T(6) T(7) T(8) T(9) T(10) T(11)
               "%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, p;}"
               : R64(0), R64(64)
               : "l"(a), "l"(b));
}
#undef R4
#undef R16
#undef R64
#undef T
#undef T0
#undef WGMMA

#endif
#endif
