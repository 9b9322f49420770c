// How batch normalization reads its rows: vectors of channels, windows of pixels, sums in blocks.
//
// A row is the channels of one pixel, contiguous; a vector holds kFloats of them. Sums go in the reference's order: rows of a
// block in order, then the blocks.

namespace {

#if defined(FQT_AVX512)
constexpr int kFloats = 16;
#elif defined(FQT_AVX2)
constexpr int kFloats = 8;
#else
constexpr int kFloats = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kFloats)));
typedef int32_t Ints __attribute__((vector_size(4 * kFloats)));
typedef int16_t Shorts __attribute__((vector_size(2 * kFloats)));
typedef double Doubles __attribute__((vector_size(4 * kFloats)));
typedef float HalfFloats __attribute__((vector_size(2 * kFloats)));

// `count` lanes from memory, zeros behind them.
template <class Vector, bool kFull, class T>
inline Vector load(const T* from, int64_t count) {
  Vector v{};
  if constexpr (kFull) {
    std::memcpy(&v, from, sizeof(v));
  } else {
    std::memcpy(&v, from, count * sizeof(T));
  }
  return v;
}

template <bool kFull>
inline void store(float* to, Floats v, int64_t count) {
  std::memcpy(to, &v, kFull ? sizeof(v) : count * sizeof(float));
}

// One bit a lane, the first lowest.
inline uint32_t bits_of(Ints set) {
#if defined(FQT_AVX512)
  return _mm512_movepi32_mask((__m512i)set);
#elif defined(FQT_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)set));
#elif defined(FQT_NEON)
  return vaddvq_u32((uint32x4_t)set & uint32x4_t{1, 2, 4, 8});
#else
  uint32_t bits = 0;
  for (int i = 0; i < kFloats; ++i) bits |= static_cast<uint32_t>(set[i] & 1) << i;
  return bits;
#endif
}

// bits_of(a >= b)
inline uint32_t at_least(Floats a, Floats b) {
#if defined(FQT_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#else
  return bits_of(a >= b);
#endif
}

// sum += the lanes, in double precision.
struct Sum {
  Doubles low, high;
  void add(Doubles first, Doubles second) { low += first, high += second; }
  static Doubles first(Floats v) {
    HalfFloats half;
    std::memcpy(&half, &v, sizeof(half));
    return __builtin_convertvector(half, Doubles);
  }
  static Doubles second(Floats v) {
    HalfFloats half;
    std::memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof(half), sizeof(half));
    return __builtin_convertvector(half, Doubles);
  }
  explicit Sum(const double* from) {
    std::memcpy(&low, from, sizeof(low));
    std::memcpy(&high, from + kFloats / 2, sizeof(high));
  }
  void store(double* to) const {
    std::memcpy(to, &low, sizeof(low));
    std::memcpy(to + kFloats / 2, &high, sizeof(high));
  }
};

// The values of one vector of channels in any row.
template <bool kFull>
struct Column {
  const float* floats;
  const int16_t* codes;
  int64_t stride, count;
  Floats scale, offset;
  bool shifted;

  Column(const Normed& y, int64_t c)
      : floats(y.floats == nullptr ? nullptr : y.floats + c), codes(y.codes == nullptr ? nullptr : y.codes + c),
        stride(y.channels), count(kFull ? kFloats : y.channels - c), scale(), offset(), shifted(y.offset != nullptr) {
    if (y.scale != nullptr) scale = load<Floats, kFull>(y.scale + c, count);
    if (y.offset != nullptr) offset = load<Floats, kFull>(y.offset + c, count);
  }
  template <bool kCodes>
  Floats at(int64_t row) const {
    if constexpr (kCodes) {
      const Shorts code = load<Shorts, kFull>(codes + row * stride, count);
      const Floats value = __builtin_convertvector(__builtin_convertvector(code, Ints), Floats) * scale;
      return shifted ? value + offset : value;
    } else {
      return load<Floats, kFull>(floats + row * stride, count);
    }
  }
};

// Calls body(column of the vector at channel c, c) for every vector of channels in [begin, end), compiled for full vectors and
// for the last, partial one, and for codes and floats.
template <class Body>
inline void each_column(const Normed& y, int64_t begin, int64_t end, const Body& body) {
  const auto with = [&](auto codes) {
    int64_t c = begin;
    for (; c + kFloats <= end; c += kFloats) body(Column<true>(y, c), c, codes, std::true_type{});
    if (c < end) body(Column<false>(y, c), c, codes, std::false_type{});
  };
  if (y.codes != nullptr) {
    with(std::true_type{});
  } else {
    with(std::false_type{});
  }
}

// The pixels of one window.
struct Window {
  int64_t first, rows, columns, width;  // first: row of its first pixel; width: rows from one line to the next
  int64_t sample;
  Window() = default;
  Window(const Windows& w, int64_t pooled) : width(w.width) {
    const int64_t per_image = w.pooled_y() * w.pooled_x();
    const int64_t n = pooled / per_image, p = pooled % per_image;
    const int64_t y = p / w.pooled_x() * w.kernel_y, x = p % w.pooled_x() * w.kernel_x;
    sample = n;
    first = (n * w.height + y) * w.width + x;
    rows = std::min(w.kernel_y, w.height - y);
    columns = std::min(w.kernel_x, w.width - x);
  }
};

// The largest z of a window, the first of equals, with its y and its number; a NaN is larger than all, as torch has it.
struct Largest {
  Floats z, y;
  Ints number;
};

template <bool kCodes, bool kPooled, bool kFull>
inline Largest largest(const Column<kFull>& column, const Window& window, Floats a, Floats b) {
  const Floats y = column.template at<kCodes>(window.first);
  Largest best{y * a + b, y, Ints{}};
  if constexpr (!kPooled) return best;
  int32_t number = 0;
  for (int64_t line = 0; line < window.rows; ++line) {
    for (int64_t i = 0; i < window.columns; ++i, ++number) {
      if (number == 0) continue;
      const Floats other = column.template at<kCodes>(window.first + line * window.width + i), z = other * a + b;
      const Ints better = (z > best.z) | (z != z);
      best.z = better ? z : best.z;
      best.y = better ? other : best.y;
      best.number = better ? Ints{} + number : best.number;
    }
  }
  return best;
}

constexpr int64_t kTogether = 8;  // rows whose columns are worked off one after the other

// Runs body(first row, last row, first channel, last channel, sums of this block) over blocks of rows and stretches of
// channels, then adds the blocks' two sums a channel in order.
template <class Body>
inline void sum_blocks(int64_t rows, int64_t channels, double* sums, const Body& body) {
  constexpr int64_t kStretch = 64;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows, padded = (channels + kStretch - 1) / kStretch * kStretch;
  const int64_t stretches = padded / kStretch;
  Buffer<double> partial(blocks * 2 * padded);
  parallel(blocks * stretches, 2, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / stretches, c = item % stretches * kStretch;
      double* to = partial.data + block * 2 * padded;
      std::fill(to + c, to + c + kStretch, 0.0);
      std::fill(to + padded + c, to + padded + c + kStretch, 0.0);
      // a few rows at a time, so that memory is read nearly in its own order
      const int64_t last = std::min(rows, (block + 1) * kBlockRows);
      for (int64_t row = block * kBlockRows; row < last; row += kTogether) {
        body(row, std::min(last, row + kTogether), c, std::min(channels, c + kStretch), to, to + padded);
      }
    }
  });
  std::fill(sums, sums + 2 * channels, 0.0);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int which = 0; which < 2; ++which) {
      const double* from = partial.data + (2 * block + which) * padded;
      for (int64_t c = 0; c < channels; ++c) sums[which * channels + c] += from[c];
    }
  }
}

// Pooled rows [begin, end) and their windows.
struct Stretch {
  const Window* windows;
  int64_t begin, end;
  const Window& window(int64_t row) const { return windows[row - begin]; }
};

// Runs body(column, its first channel, codes?, full?, pooled?, stretch) over stretches of pooled rows that stay in the cache
// while their columns are worked off one after the other. No two threads have rows of the same `unit`.
template <class Body>
inline void each_stretch(const Normed& y, const Windows& w, int64_t unit, const Body& body) {
  constexpr int64_t kStretch = kTogether;
  const int64_t pooled = w.pooled_rows(y.rows);
  const int64_t rows = std::max<int64_t>(1, kStretch / unit) * unit, items = (pooled + rows - 1) / rows;
  parallel(items, std::max<int64_t>(1, 16384 / std::max<int64_t>(y.channels * rows, 1)), [&](int64_t begin, int64_t end) {
    Window window[kStretch];
    const int64_t to = std::min(pooled, end * rows);
    for (int64_t first = begin * rows, last; first < to; first = last) {
      last = std::min(to, first + kStretch);
      for (int64_t row = first; row < last; ++row) window[row - first] = Window(w, row);
      each_column(y, 0, y.channels, [&](const auto& column, int64_t c, auto codes, auto full) {
        const Stretch stretch{window, first, last};
        if (w.pools()) {
          body(column, c, codes, full, std::true_type{}, stretch);
        } else {
          body(column, c, codes, full, std::false_type{}, stretch);
        }
      });
    }
  });
}

// The range of a sample's values in one vector of channels.
struct Extremes {
  Floats low, high;
  Ints nan;
  Extremes() : low(Floats{} + std::numeric_limits<float>::infinity()), high(-low), nan{} {}
  void add(Floats v) {
    low = v < low ? v : low;
    high = v > high ? v : high;
    nan |= v != v;
  }
  // Joins what is known of the sample; a NaN stays.
  template <bool kFull>
  void join(float* low_at, float* high_at, int64_t count) const {
    const Floats l = load<Floats, kFull>(low_at, count), h = load<Floats, kFull>(high_at, count);
    const Floats bad = Floats{} + std::numeric_limits<float>::quiet_NaN();
    store<kFull>(low_at, nan ? bad : low < l ? low : l, count);
    store<kFull>(high_at, nan ? bad : high > h ? high : h, count);
  }
};

}  // namespace
