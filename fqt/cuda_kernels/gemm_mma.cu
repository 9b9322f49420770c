// Products of bits by mma.sync m16n8k256 (sm_80, sm_86, sm_89, sm_90): a tile of kM x kN, a warp 64 x 64 or 32 x 32 of it.
//
// Planes run from the highest to the lowest through the same registers, which are doubled in between (Horner's rule), so a
// product of b planes needs no more registers than one.
#include "tiles.h"

template <int kM, int kN, int kStages, int kUnit>
DEVICE void gemm(const Product& p) {
  using L = Layout<kM, kN, kStages>;
  constexpr int kWarp = kM / 2;  // rows and columns of a warp: 2 x 2 warps
  constexpr int kRowTiles = kWarp / 16, kColumnTiles = kWarp / 8;
  static_assert(kM == kN);
  const Work w = work_of<kM, kN, kUnit>(p);
  if (w.none) return;
  const u32 memory = shared_memory();
  describe<kM, kN, kStages>(p, memory, w.first_row, w.first_column);
  barrier();

  const int lane = thread() % 32, warp = thread() / 32, tiles = p.planes * w.depth;
  const int first_row = warp / 2 * kWarp, first_column = warp % 2 * kWarp;
  const auto load = [&](int tile) {
    if (tile < tiles) {
      load_tile<kM, kN, kStages, kUnit>(p, w, memory, tile % kStages, p.planes - 1 - tile / w.depth, tile % w.depth);
    }
    copies_commit();  // an empty group where there is nothing left, so that groups can be counted
  };
  for (int tile = 0; tile < kStages - 1; ++tile) load(tile);

  int d[kRowTiles][kColumnTiles][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    copies_landed<kStages - 2>();
    barrier();  // this tile is there for all, and all are done with the one before, whose place the next takes
    load(tile + kStages - 1);
    if (tile > 0 && tile % w.depth == 0) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
          for (int k = 0; k < 4; ++k) d[i][j][k] *= 2;
        }
      }
    }
    const u32 a_tile = memory + tile % kStages * L::kStage, b_tile = a_tile + kM * kRowBytes;
    const int steps = steps_of<kUnit>(w, tile % w.depth);
    for (int step = 0; step < steps; ++step) {
      // A: rows 0-7, 8-15 of the first 128 bits, then of the second. B: both halves of 8 columns, then of the next 8.
      u32 a[kRowTiles][4], b[kColumnTiles / 2][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_matrices(a[i], a_tile + in_tile(first_row + i * 16 + lane % 16, step * kStepBytes + lane / 16 * 16));
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles / 2; ++j) {
        const int row = first_column + j * 16 + lane / 16 * 8 + lane % 8;
        load_matrices(b[j], b_tile + in_tile(row, step * kStepBytes + lane / 8 % 2 * 16));
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) multiply_bits(d[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
  copies_landed<0>();
  barrier();

#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      const int row = first_row + i * 16 + lane / 4, column = first_column + j * 8 + lane % 4 * 2;
      put_sums<kM, kN, kStages>(memory, row, column, d[i][j][0], d[i][j][1]);
      put_sums<kM, kN, kStages>(memory, row + 8, column, d[i][j][2], d[i][j][3]);
    }
  }
  barrier();
  finish<kM, kN, kStages>(p, w, memory);
}
