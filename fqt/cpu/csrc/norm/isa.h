// What the batch normalization operators and the kernels of all instruction sets share.
#pragma once

#include "../products/isa.h"  // FQT_X86, FQT_ARM, parallel, Buffer

namespace fqt {

constexpr int64_t kBlockRows = 256;  // rows that are summed in order, before the blocks are: part of the specification

// What is normalized, `rows` of `channels`: floats, or integers that stand for code * scale + offset, channel by channel.
struct Normed {
  const float* floats = nullptr;
  const int16_t* codes = nullptr;
  const float *scale = nullptr, *offset = nullptr;  // of the codes; the offset may be absent
  int64_t rows, channels;
};

// Max-pooling by windows that do not overlap, over images of height x width; 1x1 windows where nothing is pooled.
struct Windows {
  int64_t height, width, kernel_y, kernel_x;
  int64_t pooled_y() const { return (height + kernel_y - 1) / kernel_y; }
  int64_t pooled_x() const { return (width + kernel_x - 1) / kernel_x; }
  int64_t pooled_rows(int64_t rows) const { return rows / (height * width) * pooled_y() * pooled_x(); }
  bool pools() const { return kernel_y * kernel_x != 1; }
};

// z = y * a + b by channel, and for the gradient x^ = (y - mean) * inv.
struct Normalization {
  const float *a, *b, *mean, *inv;
};

// z, normalized and pooled.
struct Pooled {
  Normed y;
  Normalization affine;
  Windows windows;
};

// The pooled gradient; of a sample that is not `kept` (null: all are) it is zero and not read.
struct Gradient {
  const float* data;
  const bool* kept;
};

// Smallest and largest value by sample and channel, NaN if there is one: what the next quantizer asks for first.
struct Ranges {
  float *low, *high;
};

// Signs by the codes alone: (code > above) differs from the bit of `flipped`, channel by channel.
struct Above {
  const int16_t *codes, *above;
  const uint8_t* flipped;  // packed as signs are; no bit behind the last channel
  Windows windows;
  int64_t rows, channels;
};

FQT_DECLARE(
  // The sums of y and of y * y by channel, (2, channels).
  void norm_sums(const Normed& y, double* sums);

  // The pooled z.
  void norm_value(const Pooled& p, float* z);

  // Its signs, and the mask of those in [low, high]. Returns whether a value is NaN.
  bool norm_sign(const Pooled& p, float low, float high, uint8_t* codes, uint8_t* mask);

  // The signs of the pooled z, by codes alone.
  void norm_above(const Above& of, uint8_t* signs);

  // The sums of the gradient of z and of its product with x^ by channel, (2, channels).
  void norm_grad_sums(const Pooled& p, const Gradient& g, double* sums);

  // The gradient of y. means: of what norm_grad_sums sums.
  void norm_grad(const Pooled& p, const Gradient& g, const float* means, float* dy, const Ranges& ranges);
)

}  // namespace fqt
