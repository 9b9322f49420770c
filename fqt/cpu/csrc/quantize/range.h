// What calibrations ask of the values of a group: the smallest and the largest (`group_range` of fqt/reference/codes.py), and
// the sum of their magnitudes over a fixed tree (`absmean`).

namespace {

// Smallest and largest value of what is added. A vector may be added twice.
struct Extremes {
  Floats low[4], high[4];
  uint32_t nan = 0;

  Extremes() {
    for (int j = 0; j < 4; ++j) low[j] = spread(kInfinity), high[j] = spread(-kInfinity);
  }

  void add(const float* v, int64_t count) {
    float few[kLanes];
    if (count < kLanes) {
      for (int i = 0; i < kLanes; ++i) few[i] = v[i < count ? i : 0];
      v = few;
      count = kLanes;
    }
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
      Floats f[4];
      for (int j = 0; j < 4; ++j) {
        f[j] = load(v + i + j * kLanes);
        low[j] = smaller(f[j], low[j]);
        high[j] = larger(f[j], high[j]);
      }
      nan |= unordered(f[0], f[1]) | unordered(f[2], f[3]);
    }
    for (; i < count; i += kLanes) {
      const Floats f = load(v + least(i, count - kLanes));
      low[0] = smaller(f, low[0]);
      high[0] = larger(f, high[0]);
      nan |= unordered(f, f);
    }
  }

  void finish(float* smallest, float* largest) const {
    const Floats lows = smaller(smaller(low[0], low[1]), smaller(low[2], low[3]));
    const Floats highs = larger(larger(high[0], high[1]), larger(high[2], high[3]));
    float lo = lows[0], hi = highs[0];
    for (int i = 1; i < kLanes; ++i) {
      lo = lows[i] < lo ? lows[i] : lo;
      hi = highs[i] > hi ? highs[i] : hi;
    }
    *smallest = nan ? kNaN : lo;
    *largest = nan ? kNaN : hi;
  }
};

// Down the columns, eight rows at a time: memory is read in order, and `low` and `high` stay in L1.
inline void column_range(const Plan& p, const Rows& at, float* low, float* high) {
  constexpr int kRows = 8;
  alignas(64) float buffer[kRows][kChunk];
  const int64_t block = p.direct ? p.columns : kChunk;
  for (int64_t c = 0; c < p.columns; ++c) low[c] = kInfinity, high[c] = -kInfinity;
  for (int64_t r = at.first; r < at.end; r += kRows) {
    for (int64_t column = 0; column < p.columns; column += block) {
      const int64_t count = least(block, p.columns - column);
      float *lows = low + column, *highs = high + column;
      const float* rows[kRows];
      for (int i = 0; i < kRows; ++i) rows[i] = fetch(p, at.image, least(r + i, at.end - 1), column, count, buffer[i]);
      if (count < kLanes) {
        for (int i = 0; i < kRows; ++i) {
          for (int64_t c = 0; c < count; ++c) {
            const float v = rows[i][c];
            lows[c] = v < lows[c] ? v : lows[c];
            highs[c] = v > highs[c] ? v : highs[c];
            if (v != v) lows[c] = highs[c] = kNaN;
          }
        }
        continue;
      }
      for (int64_t step = 0; step < count; step += kLanes) {
        const int64_t c = least(step, count - kLanes);
        Floats lo = load(lows + c), hi = load(highs + c);  // a NaN in them stays
        uint32_t nan = 0;
        for (int i = 0; i < kRows; i += 2) {
          const Floats a = load(rows[i] + c), b = load(rows[i + 1] + c);
          lo = smaller(b, smaller(a, lo));
          hi = larger(b, larger(a, hi));
          nan |= unordered(a, b);
        }
        store(lows + c, lo);
        store(highs + c, hi);
        for (int i = 0; nan != 0; ++i, nan >>= 1) {
          if (nan & 1) lows[c + i] = highs[c + i] = kNaN;
        }
      }
    }
  }
}

// The sum over a binary tree of neighbours of |v|, kChunk values at most; `v` may be written to.
inline double abs_sum_of(const float* v, int64_t count) {
  alignas(64) float padded[kChunk];
  alignas(64) double sums[2][kChunk / 2];
  int64_t n = 2;
  while (n < count) n *= 2;
  if (n != count) {
    std::memset(padded, 0, n * sizeof(float));
    std::memcpy(padded, v, count * sizeof(float));
    v = padded;
  }
  double* from = sums[0];
  for (int64_t i = 0; i < n / 2; ++i) {
    from[i] = static_cast<double>(std::fabs(v[2 * i])) + static_cast<double>(std::fabs(v[2 * i + 1]));
  }
  for (n /= 2; n > 1; n /= 2) {
    double* to = from == sums[0] ? sums[1] : sums[0];
    for (int64_t i = 0; i < n / 2; ++i) to[i] = from[2 * i] + from[2 * i + 1];
    from = to;
  }
  return from[0];
}

}  // namespace

void range(const Plan& p, const Rows& at, float* low, float* high) {
  if (p.parts == Parts::columns) return column_range(p, at, low, high);
  alignas(64) float buffer[kChunk];
  Extremes all;
  if (p.parts == Parts::whole && p.direct && p.inner == p.columns && p.x.stride.row == p.columns) {  // order does not matter
    all.add(fetch(p, at.image, at.first, 0, 0, buffer), (at.end - at.first - 1) * p.columns + width(p, at.end - 1));
    return all.finish(low, high);
  }
  for (int64_t row = at.first; row < at.end; ++row) {
    const int64_t columns = width(p, row), block = p.direct ? columns : kChunk;
    Extremes one;
    Extremes& extremes = p.parts == Parts::whole ? all : one;
    for (int64_t column = 0; column < columns; column += block) {
      const int64_t count = least(block, columns - column);
      extremes.add(fetch(p, at.image, row, column, count, buffer), count);
    }
    if (p.parts == Parts::rows) one.finish(low + (row - at.first), high + (row - at.first));
  }
  if (p.parts == Parts::whole) all.finish(low, high);
}

double abs_sum(const Plan& p, int64_t group, int64_t first, int64_t count) {
  alignas(64) float buffer[kChunk], piece[kChunk];
  double sums[64];  // of 2^k chunks each, where bit k of their number is set
  int64_t chunks = 0;
  for (int64_t done = 0; done < count; done += kChunk, ++chunks) {
    const int64_t wanted = least(kChunk, count - done);
    const float* v = buffer;
    for (int64_t have = 0; have < wanted;) {
      // which row of which image the group's elements go on in
      const int64_t element = first + done + have, run = element / p.columns, column = element % p.columns;
      int64_t image = 0, row = group;
      if (p.parts == Parts::whole) {
        image = p.group.image == 0 ? run / p.rows : group, row = run % p.rows;
      } else if (p.group.image == 0) {
        image = run;
      } else if (p.group.row == 1) {
        image = group / p.rows, row = group % p.rows;
      } else {
        image = group % p.images, row = group / p.images;
      }
      const int64_t length = least(wanted - have, p.columns - column);
      const float* from = fetch(p, image, row, column, length, piece);
      if (length == wanted) {
        v = from;
      } else {
        std::memcpy(buffer + have, from, length * sizeof(float));
      }
      have += length;
    }
    double sum = abs_sum_of(v, wanted);
    int level = 0;
    for (; chunks >> level & 1; ++level) sum = sums[level] + sum;
    sums[level] = sum;
  }
  double total = 0.0;
  for (int level = 0; chunks >> level != 0; ++level) {
    if (chunks >> level & 1) total = sums[level] + total;
  }
  return total;
}
