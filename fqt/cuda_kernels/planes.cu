// Codes as planes of bits, packed along the axis that a product sums over, and sums of such rows.
#include "primitives.h"

constexpr int kThreads = 256;

// Every storage-th bit of a word, from bit 0 on, side by side: the lowest bit of each of its codes.
DEVICE u32 lowest_bits(u32 word, int storage) {
  if (storage == 1) return word;
  if (storage == 2) {
    word &= 0x55555555;
    word = (word | word >> 1) & 0x33333333;
    word = (word | word >> 2) & 0x0f0f0f0f;
    word = (word | word >> 4) & 0x00ff00ff;
    return (word | word >> 8) & 0xffff;
  }
  if (storage == 4) {
    word &= 0x11111111;
    word = (word | word >> 3) & 0x03030303;
    word = (word | word >> 6) & 0x000f000f;
    return (word | word >> 12) & 0xff;
  }
  word &= 0x01010101;
  word = (word | word >> 7) & 0x00030003;
  return (word | word >> 14) & 0xf;
}

// Rows of codes as they lie: (samples * positions, row_bytes) -> (planes, slots * positions, words). A slot whose `index` is
// negative is left alone. One thread a word of 32 codes; bits beyond a row's last code are 0 in it already.
KERNEL(kThreads)
planes_of_rows(const u8* codes, const int* index, u32* out, i64 rows, i64 positions, i64 row_bytes, i64 storage, i64 planes,
               i64 words) {
  const i64 at = block_x() * kThreads + thread(), row = at / words, word = at % words;
  if (row >= rows) return;
  const i64 slot = row / positions, sample = index ? index[slot] : slot;
  if (sample < 0) return;
  const u8* from = codes + (sample * positions + row % positions) * row_bytes;
  const int wide = static_cast<int>(storage);
  u32 plane[8] = {};
  for (int i = 0; i < wide; ++i) {
    const i64 first = (word * wide + i) * 4;
    u32 packed = 0;
    for (int byte = 0; byte < 4; ++byte) {
      if (first + byte < row_bytes) packed |= static_cast<u32>(from[first + byte]) << 8 * byte;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < planes) plane[j] |= lowest_bits(packed >> j, wide) << i * (32 / wide);
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j < planes) out[(j * rows + row) * words + word] = plane[j];
  }
}

// A 32 x 32 matrix of bits, a row a lane, turned round: lane i gets bit i of every lane. Halves of halves trade places.
DEVICE u32 transposed(u32 row) {
  const int lane = thread() % 32;
  u32 low = 0x0000ffff;
#pragma unroll
  for (int half = 16; half > 0; half /= 2, low ^= low << half) {
    const u32 other = shuffle_xor(row, half);
    row = lane & half ? (row & ~low) | (other >> half & low) : (row & low) | (other << half & ~low);
  }
  return row;
}

// Columns of codes, turned round: the bits of a channel over positions (and samples, or the samples of a slice) side by side.
//
// Codes (samples, in_height * in_width, row_bytes), channels packed; for every tap of a window the pixel that each of
// `positions` outputs meets, as in tiles.h. out (planes, ...) at channel * channel_words + tap * tap_words +
// slice * slice_words + word; and, unless inside_words is negative, at inside_words + tap * channel_words + ...: whether the
// pixel is in the image. Slice z holds `together` samples, or the sample index[z]; one whose index is negative is left alone.
// A warp turns four bytes of 32 positions.
KERNEL(kThreads)
planes_of_columns(const u8* codes, const int* index, u32* out, i64 inside_words, i64 slices, i64 together, i64 positions,
                  i64 row_bytes, i64 storage, i64 planes, i64 channels, i64 words, i64 plane_words, i64 channel_words,
                  i64 tap_words, i64 slice_words, i64 taps, i64 kernel_width, i64 out_width, i64 in_height, i64 in_width,
                  i64 mul_y, i64 mul_x, i64 step_y, i64 step_x, i64 base_y, i64 base_x) {
  // words run fastest, so that a block's words of a channel lie side by side
  const i64 warp = block_x() * (kThreads / 32) + thread() / 32, runs = (row_bytes + 3) / 4;
  const i64 word = warp % words, slice = warp / words % slices, run = warp / words / slices % runs;
  const int tap = static_cast<int>(warp / words / slices / runs), width = static_cast<int>(kernel_width);
  if (tap >= taps) return;
  if (index && index[slice] < 0) return;
  const int lane = thread() % 32;
  const i64 k = word * 32 + lane, sample = index ? index[slice] : slice * together + k / positions;
  const int position = static_cast<int>(k % positions), across = static_cast<int>(out_width);
  const i64 y = position / across * mul_y + tap / width * step_y + base_y;
  const i64 x = position % across * mul_x + tap % width * step_x + base_x;
  const bool valid = k < together * positions && y >= 0 && y < in_height && x >= 0 && x < in_width;
  const u8* from = codes + ((sample * in_height + y) * in_width + x) * row_bytes;
  u32 bits = 0;
  for (int i = 0; i < 4; ++i) {
    if (valid && run * 4 + i < row_bytes) bits |= static_cast<u32>(from[run * 4 + i]) << 8 * i;
  }
  bits = transposed(bits);
  const int wide = static_cast<int>(storage), plane = lane % wide;
  const i64 channel = (run * 32 + lane) / wide, at = tap * tap_words + slice * slice_words + word;
  if (plane < planes && channel < channels) out[plane * plane_words + channel * channel_words + at] = bits;
  if (inside_words >= 0 && run == 0) {
    const u32 meets = ballot(valid);
    if (lane == 0) out[inside_words + tap * channel_words + slice * slice_words + word] = meets;
  }
}

// sums[slice][row] = sum over planes j of 2^j * the bits set in words [slice * slice_words, + slice_words) of a row. One warp
// each.
KERNEL(kThreads)
sums_of_rows(const u32* bits, int* sums, i64 rows, i64 planes, i64 slices, i64 row_words, i64 slice_words) {
  const i64 warp = block_x() * (kThreads / 32) + thread() / 32, row = warp / slices, slice = warp % slices;
  if (row >= rows) return;
  int sum = 0;
  for (int j = 0; j < planes; ++j) {
    const u32* from = bits + (j * rows + row) * row_words + slice * slice_words;
    for (i64 word = thread() % 32; word < slice_words; word += 32) sum += popcount(from[word]) << j;
  }
  sum = warp_sum(sum);
  if (thread() % 32 == 0) sums[slice * rows + row] = sum;
}
