// What the operators and the kernels of all instruction sets share.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FQT_X86
#endif

namespace fqt {

constexpr int64_t kChunk = 512;  // elements encoded at a time: a multiple of 8, so that chunks begin a byte
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct View {
  const float* data = nullptr;
  int64_t n = 0, p = 0, c = 0, sn = 0, sp = 0, sc = 0;
};

enum class Axes { tensor, sample, token, channel, both };

// inside: not codes but the estimator's mask, low <= x <= high
enum class Grid { sign, uniform, inside };

struct Encoding {
  Grid grid;
  int bits, storage;
  float low, high;  // smallest and largest code (inside: value)
  const float *inverse, *offset;
  const bool* keep;
  bool stochastic;
  uint64_t key;
  uint32_t stream;
};

// torch's own thread pool.
void parallel(int64_t items, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

#define FQT_DECLARE                                                                                                       \
  void group_range(const View& x, const View* fold, Axes axes, int64_t groups, int64_t elements, float* low, float* high); \
  void absmean(const View& x, const View* fold, Axes axes, int64_t groups, int64_t elements, float* mean);                 \
  void encode(const View& x, const View* fold, const Encoding& e, Axes axes, int64_t groups, int64_t elements, uint8_t* out);

namespace portable { FQT_DECLARE }
#if defined(FQT_X86)
namespace avx2 { FQT_DECLARE }
namespace avx512 { FQT_DECLARE }
#endif

}  // namespace fqt
