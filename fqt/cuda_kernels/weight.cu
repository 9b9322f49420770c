// The float part of grad_weight: integer sums of slices (rows of G by columns of X, gemm_*.cu) become the gradient.
//
// sum of g * x = 2 S - (sum of g where the tap meets the image); the latter is one more column of the product, whose bits say
// where that is. Slices of one scale are added as integers; samples with scales of their own as floats, in ascending order.
#include "primitives.h"

constexpr int kThreads = 256;

// partial (slices, slots, taps * channels + taps), x_sums (slices or 1, taps * channels + taps) -> grad (outputs, taps *
// channels). channel_index, sample_index: which output channel a slot, which sample a slice is; null: the same number. add: to
// what grad holds, sample by sample; else grad is written.
KERNEL(kThreads)
finish_weight(const int* partial, const int* x_sums, const int* channel_index, const int* sample_index, const float* scale,
              const float* offset, const float* x_scale, float* grad, i64 slices, i64 first_sample, i64 slots, i64 taps,
              i64 channels, i64 scale_channel, i64 scale_sample, i64 add) {
  const i64 at = block_x() * kThreads + thread(), width = taps * channels, columns = width + taps;
  const i64 slot = at / width, column = at % width, inside = width + column / channels;
  if (slot >= slots) return;
  const i64 channel = channel_index ? channel_index[slot] : slot;
  if (channel < 0) return;
  float* to = grad + channel * width + column;
  const auto dequantize = [&](int s, int sum_g, int x_codes, i64 sample) {
    const i64 group = channel * scale_channel + sample * scale_sample;
    float t = static_cast<float>(2 * s - sum_g) * scale[group];
    t = t * x_scale[0];
    if (offset) t = t + static_cast<float>(x_codes) * x_scale[0] * offset[group];
    return t;
  };
  if (!add) {
    int s = 0, sum_g = 0;
    for (i64 z = 0; z < slices; ++z) {
      const int* from = partial + (z * slots + slot) * columns;
      s += from[column];
      sum_g += from[inside];
    }
    *to = dequantize(s, sum_g, 2 * x_sums[column] - x_sums[inside], 0);
    return;
  }
  float total = *to;
  for (i64 z = 0; z < slices; ++z) {
    const i64 sample = sample_index ? sample_index[first_sample + z] : first_sample + z;
    if (sample < 0) break;  // pruned samples come last
    const int *from = partial + (z * slots + slot) * columns, *sums = x_sums + z * columns;
    total = total + dequantize(from[column], from[inside], 2 * sums[column] - sums[inside], sample);
  }
  *to = total;
}
