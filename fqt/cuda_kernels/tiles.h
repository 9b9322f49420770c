// What the bit products share: their arguments, how a tile of an operand gets to shared memory, and how sums become floats.
//
// A product is S[m][n] = sum over planes j of 2^j * popcount(A_j[m] & B[n]). Row m of A is a window of an image of bits, read
// where it lies (implicit GEMM; a matrix is an image of width 1 under a 1x1 window); row n of B lies side by side. Both
// operands' rows are cut into units of 4, 8 or 16 bytes, none of which crosses a tap. Outside the image bits are 0, in S and in
// the sums.
//
// With a the codes of A's row, w = +-1 those of B's, pa and pw their sums as bits and K the terms, all inside the image:
//   a = +-1:   sum of a * w = K + 4 S - 2 pa - 2 pw
//   a >= 0:    sum of a * w = 2 S - pa
#pragma once
#include "primitives.h"

constexpr int kRowBytes = 128;  // of a row of a tile: 1024 bits, four instructions deep
constexpr int kStepBytes = 32;  // of one instruction: 256 bits

struct Product {
  const u8 *a, *b;                                    // bits: (planes, pixels, a_pitch), (columns, b_pitch)
  const int *a_sums, *b_sums;                         // (pixels) sums of A's codes; (taps, columns) bits of B that are set
  const int* index;                                   // samples of A's slots, ascending, then -1; or null: slot = sample
  int* partial;                                       // (slices, rows, columns): S, and nothing else is done; or null
  float* y;                                           // (samples, positions, columns)
  short* sums;                                        // the same, the integers instead; or null
  const float *scale, *offset, *column_scale, *bias;  // offset and bias may be null
  const u8* mask;                                     // (samples, positions, ceil(columns / 8)), or null
  int planes;
  i64 plane_bytes;
  int is_sign;
  i64 rows;  // slots * positions
  int positions, columns;
  i64 a_pitch, b_pitch;
  int units, slice_units, slices_are_slots;  // of a row and plane; of a slice; whether slice z is a slot of `index`
  int tap_units, channels, kernel_width, taps;
  int out_width, in_height, in_width;
  int mul_y, mul_x, step_y, step_x, base_y, base_x, div_y, div_x;  // pixel = (position * mul + tap * step + base) / div
  int scale_sample, scale_position, column_scale_step;
  int column_tiles;
};

// Kernels take numbers of 64 bits, whatever their meaning: so they are passed.
#define PRODUCT_ARGUMENTS                                                                                                     \
  const u8 *a, const u8 *b, const int *a_sums, const int *b_sums, const int *index, int *partial, float *y, short *sums,      \
      const float *scale, const float *offset, const float *column_scale, const float *bias, const u8 *mask, i64 planes,      \
      i64 plane_bytes, i64 is_sign, i64 rows, i64 positions, i64 columns, i64 a_pitch, i64 b_pitch, i64 units,                \
      i64 slice_units, i64 slices_are_slots, i64 tap_units, i64 channels, i64 kernel_width, i64 taps, i64 out_width,          \
      i64 in_height, i64 in_width, i64 mul_y, i64 mul_x, i64 step_y, i64 step_x, i64 base_y, i64 base_x, i64 div_y,           \
      i64 div_x, i64 scale_sample, i64 scale_position, i64 column_scale_step, i64 column_tiles
#define PRODUCT                                                                                                                \
  Product(a, b, a_sums, b_sums, index, partial, y, sums, scale, offset, column_scale, bias, mask, planes, plane_bytes,        \
          is_sign, rows, positions, columns, a_pitch, b_pitch, units, slice_units, slices_are_slots, tap_units, channels,     \
          kernel_width, taps, out_width, in_height, in_width, mul_y, mul_x, step_y, step_x, base_y, base_x, div_y, div_x,     \
          scale_sample, scale_position, column_scale_step, column_tiles)

// 16-byte chunks of a row trade places with its number, so that eight rows at one column lie in different banks; it is also the
// swizzle of 128 bytes that wgmma reads.
DEVICE u32 in_tile(int row, int byte) { return row * kRowBytes + ((byte / 16 ^ row % 8) * 16 | byte % 16); }

// How one axis of the window meets the image: -1 outside.
DEVICE int pixel_of(int at, int div, int size) {
  if (at < 0 || (div > 1 && at % div != 0)) return -1;
  const int pixel = div > 1 ? at / div : at;
  return pixel < size ? pixel : -1;
}

// Shared memory: kStages times (A's tile, B's tile), then what is known of each row and column. When all is multiplied the sums
// take the tiles' place.
template <int kM, int kN, int kStages>
struct Layout {
  static constexpr u32 kStage = (kM + kN) * kRowBytes;
  static constexpr u32 kRows = kStages * kStage;       // Int4: first pixel, y and x of the window, sample or -1
  static constexpr u32 kRowSums = kRows + kM * 16;     // Int4: sum of A's codes, terms, whether all taps are inside
  static constexpr u32 kColumns = kRowSums + kM * 16;  // int: bits of B over all taps
  static constexpr u32 kSumsPitch = (kN + 8) * 4;      // 8 more: a quarter warp's pairs lie in different banks
  static_assert(kM * kSumsPitch <= kRows);
};

// Fills in the rows and columns of a tile. `barrier` has to follow.
template <int kM, int kN, int kStages>
DEVICE void describe(const Product& p, u32 memory, i64 first_row, int first_column) {
  using L = Layout<kM, kN, kStages>;
  for (int i = thread(); i < kM; i += threads()) {
    const i64 m = first_row + i, slot = m / p.positions;
    const int position = static_cast<int>(m % p.positions);
    const int sample = m >= p.rows ? -1 : p.index && !p.slices_are_slots ? p.index[slot] : static_cast<int>(slot);
    const int y = position / p.out_width * p.mul_y + p.base_y, x = position % p.out_width * p.mul_x + p.base_x;
    const int first_pixel = static_cast<int>(slot * p.in_height * p.in_width);
    store_shared(memory + L::kRows + i * 16, Int4{first_pixel, y, x, sample});
    if (p.partial) continue;
    int sum = 0, inside = 0;
    for (int tap = 0; tap < p.taps && sample >= 0; ++tap) {
      const int py = pixel_of(y + tap / p.kernel_width * p.step_y, p.div_y, p.in_height);
      const int px = pixel_of(x + tap % p.kernel_width * p.step_x, p.div_x, p.in_width);
      if (py < 0 || px < 0) continue;
      sum += p.a_sums[first_pixel + py * p.in_width + px];
      ++inside;
    }
    store_shared(memory + L::kRowSums + i * 16, Int4{sum, inside * p.channels, inside == p.taps, 0});
  }
  for (int i = thread(); i < kN && !p.partial; i += threads()) {
    int bits = 0;
    for (int tap = 0; tap < p.taps && first_column + i < p.columns; ++tap) {
      bits += p.b_sums[static_cast<i64>(tap) * p.columns + first_column + i];
    }
    store_shared_int(memory + L::kColumns + i * 4, bits);
  }
}

// What a block does: rows and columns from where on, units from and to where, how many tiles deep.
struct Work {
  i64 first_row;
  int first_column, first_unit, end_unit, depth;  // depth: tiles of a plane
  bool none;
};

template <int kM, int kN, int kUnit>
DEVICE Work work_of(const Product& p) {
  Work w;
  w.first_row = block_x() / p.column_tiles * kM;
  w.first_column = static_cast<int>(block_x() % p.column_tiles) * kN;
  w.first_unit = block_z() * p.slice_units;
  w.end_unit = w.first_unit + p.slice_units < p.units ? w.first_unit + p.slice_units : p.units;
  const int units = w.end_unit > w.first_unit ? w.end_unit - w.first_unit : 0;
  w.depth = (units + kRowBytes / kUnit - 1) / (kRowBytes / kUnit);
  // pruned samples and channels come last in the index: a block that begins there has nothing to do
  w.none = p.index && p.index[p.slices_are_slots ? block_z() : w.first_row / p.positions] < 0;
  return w;
}

// Asks for the tile of a plane at `depth`: A's rows through the window, B's as they lie.
template <int kM, int kN, int kStages, int kUnit>
DEVICE void load_tile(const Product& p, const Work& w, u32 memory, int stage, int plane, int depth) {
  using L = Layout<kM, kN, kStages>;
  constexpr int kAcross = kRowBytes / kUnit;
  const int across = thread() % kAcross;
  const u32 a_tile = memory + stage * L::kStage, b_tile = a_tile + kM * kRowBytes;
  const int unit = w.first_unit + depth * kAcross + across;
  const bool used = unit < w.end_unit;
  const int tap = unit / p.tap_units, within = unit % p.tap_units;
  const int dy = tap / p.kernel_width * p.step_y, dx = tap % p.kernel_width * p.step_x;
  const u8* a = p.a + plane * p.plane_bytes + within * kUnit;
  for (int row = thread() / kAcross; row < kM; row += threads() / kAcross) {
    const Int4 at = load_shared(memory + L::kRows + row * 16);
    const int y = pixel_of(at.y + dy, p.div_y, p.in_height), x = pixel_of(at.z + dx, p.div_x, p.in_width);
    const bool valid = used && at.w >= 0 && y >= 0 && x >= 0;
    const i64 pixel = at.x + y * p.in_width + x;
    copy_async<kUnit>(a_tile + in_tile(row, across * kUnit), valid ? a + pixel * p.a_pitch : p.a, valid);
  }
  for (int row = thread() / kAcross; row < kN; row += threads() / kAcross) {
    const int n = w.first_column + row;
    const bool valid = used && n < p.columns;
    copy_async<kUnit>(b_tile + in_tile(row, across * kUnit), valid ? p.b + n * p.b_pitch + static_cast<i64>(unit) * kUnit : p.b,
                      valid);
  }
}

// Instructions that the tile at `depth` is deep.
template <int kUnit>
DEVICE int steps_of(const Work& w, int depth) {
  const int left = w.end_unit - w.first_unit - depth * (kRowBytes / kUnit);
  return left >= kRowBytes / kUnit ? kRowBytes / kStepBytes : (left * kUnit + kStepBytes - 1) / kStepBytes;
}

// Two neighbouring sums to where `finish` reads them.
template <int kM, int kN, int kStages>
DEVICE void put_sums(u32 memory, int row, int column, int first, int second) {
  const u32 to = memory + row * Layout<kM, kN, kStages>::kSumsPitch + column * 4;
  store_shared_int(to, first);
  store_shared_int(to + 4, second);
}

// The float part, in the order that fqt/reference/products.py states. A warp a row.
template <int kM, int kN, int kStages>
DEVICE void finish(const Product& p, const Work& w, u32 memory) {
  using L = Layout<kM, kN, kStages>;
  for (int row = thread() / 32; row < kM; row += threads() / 32) {
    const Int4 at = load_shared(memory + L::kRows + row * 16);
    const i64 m = w.first_row + row;
    if (at.w < 0) return;  // neither this row nor a later one is there
    if (p.partial) {
      int* to = p.partial + (block_z() * p.rows + m) * p.columns + w.first_column;
      for (int column = thread() % 32; column < kN && w.first_column + column < p.columns; column += 32) {
        to[column] = load_shared_int(memory + row * L::kSumsPitch + column * 4);
      }
      continue;
    }
    const Int4 of_row = load_shared(memory + L::kRowSums + row * 16);
    const int position = static_cast<int>(m % p.positions);
    const i64 group = static_cast<i64>(at.w) * p.scale_sample + static_cast<i64>(position) * p.scale_position;
    const i64 out = static_cast<i64>(at.w) * p.positions + position;
    const float scale = p.sums ? 0.0f : p.scale[group], offset = p.offset ? p.offset[group] : 0.0f;
    for (int column = thread() % 32; column < kN; column += 32) {
      const int n = w.first_column + column;
      if (n >= p.columns) break;
      const int s = load_shared_int(memory + row * L::kSumsPitch + column * 4);
      int bits = 0;  // of B that are set, inside the image
      if (of_row.z) {
        bits = load_shared_int(memory + L::kColumns + column * 4);
      } else if (p.is_sign || p.offset) {
        for (int tap = 0; tap < p.taps; ++tap) {
          const int y = pixel_of(at.y + tap / p.kernel_width * p.step_y, p.div_y, p.in_height);
          const int x = pixel_of(at.z + tap % p.kernel_width * p.step_x, p.div_x, p.in_width);
          if (y >= 0 && x >= 0) bits += p.b_sums[static_cast<i64>(tap) * p.columns + n];
        }
      }
      const int codes = p.is_sign ? of_row.y + 4 * s - 2 * of_row.x - 2 * bits : 2 * s - of_row.x;
      if (p.sums) {
        p.sums[out * p.columns + n] = static_cast<short>(codes);
        continue;
      }
      const float column_scale = p.column_scale[n * p.column_scale_step];
      float t = static_cast<float>(codes) * scale;
      t = t * column_scale;
      if (p.offset) t = t + static_cast<float>(2 * bits - of_row.y) * column_scale * offset;
      if (p.bias) t = t + p.bias[n];
      if (p.mask && !(p.mask[out * ((p.columns + 7) / 8) + n / 8] >> n % 8 & 1)) t = 0.0f;
      p.y[out * p.columns + n] = t;
    }
  }
}
