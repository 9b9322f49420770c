// What the product operators and the kernels of all instruction sets share: plain structs, so that nothing that is compiled
// for a newer machine can be linked into code for an older one.
#pragma once

#include "../memory/pool.h"
#include "../quantize/isa.h"  // FQT_X86, FQT_ARM, parallel

#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

namespace fqt {

// One image axis of a convolution: where position i meets tap k on the other side, at[i * taps + k], or -1 outside. Positions
// of one `kind` meet the same taps; `example` has one position of each kind. A linear layer is a 1x1 convolution of a column
// of positions.
struct Axis {
  int64_t size, taps, kinds;
  const int32_t *at, *kind, *example;
};

// A scale or offset by two axes, either of which may have stride 0.
struct Scale {
  const float* data = nullptr;
  int64_t s0 = 0, s1 = 0;
  float operator()(int64_t i, int64_t j) const { return data[i * s0 + j * s1]; }
};

// What the three products know of the layer: images of y.size x x.size pixels and what they meet, seen from the side of the
// product's result (`output`: from its pixels to the input's; `grad_input`: from the input's to the gradient's).
struct Layer {
  int64_t n, groups, in, out;  // samples; channels of a group
  Axis y, x;
  int64_t other_y, other_x;  // size of the images on the other side
  int64_t positions() const { return y.size * x.size; }
  int64_t other_positions() const { return other_y * other_x; }
  int64_t taps() const { return y.taps * x.taps; }
};

// Codes of 1 to 8 bits, packed as in fqt/formats.py.
struct Codes {
  const uint8_t* data;
  int64_t bits;
  bool channel, by_channel;  // channel-major; if so, whether a channel's codes are one row ("C") or one a sample ("NC")
  int64_t storage() const { return bits <= 2 ? bits : bits <= 4 ? 4 : 8; }  // bits a code takes in memory
  // Four codes of at most 6 bits add up to a byte (252); those of 7 and 8 are looked up by their two nibbles.
  int64_t planes() const { return bits > 6 ? 2 : 1; }
  int together() const { return bits == 6 ? 1 : bits == 5 ? 2 : 4; }  // such sums of four that fit a byte
};

struct SignOutput {
  Layer layer;
  const uint8_t *x, *w;
  Scale x_scale, w_scale;  // by (sample, position), by (output channel, 0)
  const float* bias;
  float* y;
  int16_t* sums = nullptr;  // if given, the accumulators alone, of at most 32,767 terms: no scale, no bias
};

struct GradInput {
  Layer layer;
  Codes g;
  const uint8_t *w, *mask;
  Scale g_scale, g_offset;  // by (sample, position); the offset may be absent
  float w_scale;
  const int32_t* kept;  // samples to compute; the others' gradient is 0
  int64_t kept_count;
  float* grad;
};

struct GradWeight {
  Layer layer;
  Codes g;
  const uint8_t* x;
  Scale g_scale, g_offset;  // by (sample, output channel)
  float x_scale;
  bool blocks;      // a scale for each sample: integers within a sample, floats between
  int64_t missing;  // positions that the last sample lacks: where any stretch of rows may be a sample
  const int32_t *samples, *channels;  // what is kept of each
  int64_t sample_count, channel_count;
  float* grad;  // zero where no kept channel writes
};

// Codes of any integer format of at most 8 bits, or in two's complement of at most 16: unsigned, two's complement, or bits that
// stand for -1 and +1.
enum class Meaning { natural, complement, sign };
struct Integers {
  const uint8_t* data;
  int64_t bits, storage;  // of a code, and those it takes in memory
  Meaning meaning;
  bool channel, by_channel;  // as in Codes
};

// `output` (X by W) and `grad_input` (G by W): the layer is seen from the result's pixels, which gather what they meet of `a`.
struct IntegerGather {
  Layer layer;
  Integers a, b;
  int64_t depth, columns;   // channels of a group: those of `a`, which are summed, and those of the result
  bool across;              // whether the result's channels are b's last axis
  Scale a_scale, a_offset;  // by (sample, position); offsets may be absent
  Scale b_scale, b_offset;  // by (the result's channel, 0)
  const float* bias;
  const uint8_t* mask;
  const int32_t* kept;  // samples to compute, null for all; the others' result is not written
  int64_t kept_count;
  float* result;
};

struct IntegerGradWeight {
  Layer layer;
  Integers g, x;
  Scale g_scale, g_offset;  // by (sample, output channel)
  float x_scale;
  const float* x_offset;  // may be null
  bool blocks;            // a scale for each sample: integers within a sample, floats between
  const int32_t *samples, *channels;  // what is kept of each, all samples if null
  int64_t sample_count, channel_count;
  float* grad;  // zero where no kept channel writes
};

// Uninitialized memory, aligned for every vector; from the pool where it is large.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count) : pooled_(count * sizeof(T) >= kLarge) {
    const size_t bytes = (count * sizeof(T) + 64 + 63) / 64 * 64;
    data = static_cast<T*>(pooled_ ? take_block(bytes) : std::aligned_alloc(64, bytes));
    if (data == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { pooled_ ? give_block_back(data) : std::free(data); }
  T& operator[](int64_t i) { return data[i]; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kLarge = SIZE_MAX;  // memory that is used again hides what is read beyond its end, or too late
#else
  static constexpr size_t kLarge = 1 << 17;
#endif
  const bool pooled_;
};

FQT_DECLARE(
  void sign_output(const SignOutput& call);
  void grad_input(const GradInput& call);
  void grad_weight(const GradWeight& call);
  void integer_gather(const IntegerGather& call);
  void integer_grad_weight(const IntegerGradWeight& call);
)

}  // namespace fqt
