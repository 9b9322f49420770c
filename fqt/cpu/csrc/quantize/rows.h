// The rows of a plan as floats, wherever they lie: those of bfloat16 widened, folded ones multiplied.

namespace {

constexpr int64_t kChunk = 512;  // floats copied, encoded or added at a time: they stay in L1

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Columns of a row.
inline int64_t width(const Plan& p, int64_t row) { return row == p.rows - 1 ? p.last : p.columns; }

// Copies a run of a row to a dense buffer.
inline void copy(const Source& s, int64_t at, int64_t count, float* to) {
  const int64_t step = s.stride.column;
  if (s.bfloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(s.data) + at;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i * step]) << 16;
      std::memcpy(to + i, &bits, 4);
    }
    return;
  }
  const float* from = static_cast<const float*>(s.data) + at;
  if (step == 1) {
    std::memcpy(to, from, count * sizeof(float));
  } else {
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
  }
}

inline void multiply(const Source& fold, int64_t at, int64_t count, float* to) {
  const int64_t step = fold.stride.column;
  const float* factor = static_cast<const float*>(fold.data) + at;
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] *= factor[i];
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] *= factor[i * step];
  }
}

// Copies a run of a row of floats that lie side by side, multiplied: in one pass, as most folded runs are.
inline bool copy_multiplied(const Source& s, int64_t at, const Source& fold, int64_t fold_at, int64_t count, float* __restrict to) {
  if (s.bfloat16 || s.stride.column != 1 || fold.stride.column > 1) return false;
  const float* from = static_cast<const float*>(s.data) + at;
  const float* factor = static_cast<const float*>(fold.data) + fold_at;
  if (fold.stride.column == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] * factor[i];
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] * *factor;
  }
  return true;
}

// `count` columns of a row: where they lie, or copied to `buffer` (widened, folded).
inline const float* fetch(const Plan& p, int64_t image, int64_t row, int64_t column, int64_t count, float* buffer) {
  if (p.direct) {
    return static_cast<const float*>(p.x.data) + image * p.x.stride.image + row * p.row_step + column;
  }
  const int64_t flat = row * p.columns + column;
  int64_t in_row = flat / p.inner, at = flat % p.inner;
  float* to = buffer;
  while (count > 0) {
    const int64_t run = least(count, p.inner - at);
    const int64_t x_at = p.x.stride.at(image, in_row, at);
    if (p.fold.data == nullptr) {
      copy(p.x, x_at, run, to);
    } else if (const int64_t fold_at = p.fold.stride.at(image, in_row, at); !copy_multiplied(p.x, x_at, p.fold, fold_at, run, to)) {
      copy(p.x, x_at, run, to);
      multiply(p.fold, fold_at, run, to);
    }
    to += run;
    count -= run;
    at = 0;
    ++in_row;
  }
  return buffer;
}

inline bool has_nan(const float* v, int64_t count) {
  uint32_t nan = 0;
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    nan |= unordered(load(v + i), load(v + i + kLanes)) | unordered(load(v + i + 2 * kLanes), load(v + i + 3 * kLanes));
  }
  for (; i < count; ++i) nan |= v[i] != v[i];
  return nan != 0;
}

}  // namespace
