// Products of bits by wgmma m64nNk256 (sm_90a): two warpgroups share a tile of 128 x kN, both operands read from shared memory.
//
// While the tensor cores work on one tile, the copies of a later one are asked for. Planes as in gemm_mma.cu.
#include "tiles.h"

// "Matrix Descriptor Format": start / 16, from bit 32 on the stride between groups of eight rows / 16, 128-byte swizzle. The
// leading dimension's offset is not used by a K-major operand that is no wider than the swizzle.
DEVICE u64 descriptor(u32 start) {
  return (start & 0x3ffff) >> 4 | 1ull << 16 | static_cast<u64>(8 * kRowBytes >> 4) << 32 | 1ull << 62;
}

template <int kM, int kN, int kStages, int kUnit>
DEVICE void gemm(const Product& p) {
  static_assert(kM == 128);
  using L = Layout<kM, kN, kStages>;
  const Work w = work_of<kM, kN, kUnit>(p);
  if (w.none) return;
  const u32 memory = shared_memory();
  describe<kM, kN, kStages>(p, memory, w.first_row, w.first_column);
  barrier();

  const int group = thread() / 128, tiles = p.planes * w.depth;
  const auto load = [&](int tile) {
    if (tile < tiles) {
      load_tile<kM, kN, kStages, kUnit>(p, w, memory, tile % kStages, p.planes - 1 - tile / w.depth, tile % w.depth);
    }
    copies_commit();
  };
  for (int tile = 0; tile < kStages - 1; ++tile) load(tile);

  int d[kN / 2] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    copies_landed<kStages - 2>();
    fence_shared();
    group_done(d);
    barrier();  // this tile is there for all, and all are done with the one before, whose place the next takes
    if (tile > 0 && tile % w.depth == 0) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) d[i] *= 2;
    }
    const u32 a_tile = memory + tile % kStages * L::kStage, b_tile = a_tile + kM * kRowBytes;
    const int steps = steps_of<kUnit>(w, tile % w.depth);
    group_fence(d);
    for (int step = 0; step < steps; ++step) {
      const u32 at = step * kStepBytes;
      multiply_bits_group(d, descriptor(a_tile + group * 64 * kRowBytes + at), descriptor(b_tile + at));
    }
    group_commit();
    load(tile + kStages - 1);
  }
  copies_landed<0>();
  group_done(d);
  barrier();

  const int lane = thread() % 32, row = thread() / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const int column = j * 8 + lane % 4 * 2;
    put_sums<kM, kN, kStages>(memory, row, column, d[j * 4], d[j * 4 + 1]);
    put_sums<kM, kN, kStages>(memory, row + 8, column, d[j * 4 + 2], d[j * 4 + 3]);
  }
  barrier();
  finish<kM, kN, kStages>(p, w, memory);
}
