// What the operators and the kernels of all instruction sets share: plain structs, so that nothing that is compiled for a newer
// machine can be linked into code for an older one.
#pragma once

#include "../dispatch/isa.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace fqt {

static_assert(std::endian::native == std::endian::little, "packed codes are written as words");

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kLineBits = 2048;       // codes of a column that are written at a time, where codes run across
constexpr float kMinRange = 0x1p-100f;  // fqt.reference.MIN_RANGE

// A number that is affine in the place of an element: its group, its number within the group, the byte of its code.
struct Affine {
  int64_t image = 0, row = 0, column = 0;
  int64_t at(int64_t i, int64_t r, int64_t c) const { return i * image + r * row + c * column; }
};

// Floats with any strides, counted in elements.
struct Source {
  const void* data = nullptr;
  bool bfloat16 = false;
  Affine stride;
};

enum class Parts { whole, rows, columns };

// A tensor (N, P, C) as images of rows of columns, in the order of its memory: the samples as they are or as one, the columns
// being channels (channels_last) or positions. Rows of codes run along the columns, or down the rows ("across").
struct Plan {
  Source x, fold;                      // fold.data may be null
  int64_t images, rows, columns;       // of packed rows; in memory a row has `inner` columns
  int64_t last, inner;                 // last: columns of an image's last row
  bool along, direct;                  // direct: a row is x's memory itself
  int64_t row_step, extent;            // direct: distance of rows; elements that may be read from x.data on
  Parts parts;                         // which parts of an image have scales of their own
  Affine group, element, byte, mask;   // byte.column: where codes run across, else codes follow each other
  int64_t slots(int64_t taken_rows) const {
    return parts == Parts::whole ? 1 : parts == Parts::rows ? taken_rows : columns;
  }
};

// Rows [first, end) of an image.
struct Rows {
  int64_t image, first, end;
};

enum class Range { none, minmax, absmax, absmean };

// How a group's range becomes scale, inverse and offset.
struct Calibration {
  Range range;
  float first, last;          // Range::none: values of the smallest and the largest code
  float low_code, high_code;  // of the grid
  bool offset, fixed;
};

enum class Grid { sign, uniform };

struct Encoding {
  Grid grid;
  int storage;       // bits a code takes in memory: 1, 2, 4, 8, 16, 32
  double low, high;  // smallest and largest code
  bool stochastic;
  uint64_t key;
  uint32_t stream;
  uint8_t *codes, *mask;  // mask: null if none is made in the same read
  float pass_low, pass_high;
};

// By group: the smallest and the largest value, and the mean magnitude.
struct Statistics {
  const float *low, *high, *mean;
};

// Of the groups of one image, or some of its rows: one entry for each of `Plan::slots`.
struct Slots {
  float *inverse, *offset;
  uint8_t* keep;
};

// What decoding asks of codes.
struct Coded {
  int storage;
  bool sign, negative, doubles;  // bits that stand for -1 and +1; two's complement; float64 until the last rounding
};

// torch's own thread pool.
void parallel(int64_t items, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

FQT_DECLARE(
  // The smallest and the largest value of each slot, NaN if it holds one.
  void range(const Plan& plan, const Rows& rows, float* low, float* high);

  // Codes of these rows, and the estimator's mask. Returns whether it saw a NaN, if it is asked to look.
  bool encode(const Plan& plan, const Encoding& e, const Rows& rows, const Slots& slots, bool look_for_nan);

  // The sum of |x| over elements [first, first + count) of a group, by a binary tree of neighbours. first and, but for the last
  // part of a group, count are multiples of a power of two.
  double abs_sum(const Plan& ordered, int64_t group, int64_t first, int64_t count);

  // The scales of `count` groups; what the range does not ask for is not read.
  void calibrate(const Calibration& c, int64_t count, const Statistics& of, float* scale, const Slots& slots);

  // fqt.philox.uniform_u24 of group 0.
  void draws(uint64_t key, uint32_t stream, int64_t count, float* out);

  // The values of `count` codes of one group, which begin with a byte. The offset may be null.
  void decode(const Coded& q, const uint8_t* from, int64_t count, float scale, const float* offset, float* to);
)

}  // namespace fqt
