// Batch normalization in front of a sign, included once for each instruction set, inside a namespace of its own: the loops of
// fqt/reference/norm.py. Every float rounds as the reference's, so no fused multiply-add may be formed (-ffp-contract=off).

#include "rows.h"
#include "above.h"

void norm_sums(const Normed& y, double* sums) {
  sum_blocks(y.rows, y.channels, sums, [&](int64_t begin, int64_t end, int64_t first, int64_t last, double* s, double* q) {
    each_column(y, first, last, [&](const auto& column, int64_t c, auto codes, auto) {
      Sum values(s + c), squares(q + c);
      for (int64_t row = begin; row < end; ++row) {
        const Floats v = column.template at<codes>(row);
        const Doubles v0 = Sum::first(v), v1 = Sum::second(v);
        values.add(v0, v1);
        squares.add(v0 * v0, v1 * v1);
      }
      values.store(s + c);
      squares.store(q + c);
    });
  });
}

void norm_value(const Pooled& p, float* z) {
  const Normed& y = p.y;
  const Normalization& f = p.affine;
  each_stretch(y, p.windows, 1, [&](const auto& column, int64_t c, auto codes, auto full, auto pooled, const Stretch& rows) {
    const Floats a = load<Floats, full>(f.a + c, column.count), b = load<Floats, full>(f.b + c, column.count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      store<full>(z + row * y.channels + c, largest<codes, pooled>(column, rows.window(row), a, b).z, column.count);
    }
  });
}

bool norm_sign(const Pooled& p, float low, float high, uint8_t* codes, uint8_t* mask) {
  const Normed& y = p.y;
  const Normalization& f = p.affine;
  const int64_t bytes = (y.channels + 7) / 8;
  std::atomic<bool> found{false};
  each_stretch(y, p.windows, 1, [&](const auto& column, int64_t c, auto coded, auto full, auto pooled, const Stretch& rows) {
    const Floats a = load<Floats, full>(f.a + c, column.count), b = load<Floats, full>(f.b + c, column.count);
    const uint32_t used = static_cast<uint32_t>((uint64_t{1} << column.count) - 1);
    const int64_t size = (column.count + 7) / 8;
    const Floats lowest = Floats{} + low, highest = Floats{} + high;
    Ints nan{};
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const Floats z = largest<coded, pooled>(column, rows.window(row), a, b).z;
      const uint32_t sign = at_least(z, Floats{}) & used, inside = at_least(z, lowest) & at_least(highest, z) & used;
      nan |= z != z;
      if constexpr (kFloats >= 8) {
        std::memcpy(codes + row * bytes + c / 8, &sign, full ? kFloats / 8 : size);
        std::memcpy(mask + row * bytes + c / 8, &inside, full ? kFloats / 8 : size);
      } else if (c % 8 == 0) {
        codes[row * bytes + c / 8] = static_cast<uint8_t>(sign);
        mask[row * bytes + c / 8] = static_cast<uint8_t>(inside);
      } else {
        codes[row * bytes + c / 8] |= static_cast<uint8_t>(sign << c % 8);
        mask[row * bytes + c / 8] |= static_cast<uint8_t>(inside << c % 8);
      }
    }
    if (bits_of(nan) & used) found = true;
  });
  return found;
}

void norm_grad_sums(const Pooled& p, const Gradient& g, double* sums) {
  const Normed& y = p.y;
  const Normalization& f = p.affine;
  const Windows& windows = p.windows;
  const bool pools = windows.pools();
  const int64_t rows = windows.pooled_rows(y.rows);
  sum_blocks(rows, y.channels, sums, [&](int64_t begin, int64_t end, int64_t first, int64_t last, double* s, double* q) {
    Window window[kTogether];
    int64_t rows_of[kTogether], count = 0;
    for (int64_t row = begin; row < end; ++row) {
      const Window w(windows, row);
      if (g.kept != nullptr && !g.kept[w.sample]) continue;  // zeros change no sum
      rows_of[count] = row;
      window[count++] = w;
    }
    each_column(y, first, last, [&](const auto& column, int64_t c, auto codes, auto full) {
      const Floats a = load<Floats, full>(f.a + c, column.count), b = load<Floats, full>(f.b + c, column.count);
      const Floats mean = load<Floats, full>(f.mean + c, column.count), inv = load<Floats, full>(f.inv + c, column.count);
      Sum plain(s + c), products(q + c);
      for (int64_t i = 0; i < count; ++i) {
        const Floats gradient = load<Floats, full>(g.data + rows_of[i] * y.channels + c, column.count);
        const Floats y_of = pools ? largest<codes, true>(column, window[i], a, b).y : column.template at<codes>(rows_of[i]);
        const Floats x = (y_of - mean) * inv;
        const Doubles g0 = Sum::first(gradient), g1 = Sum::second(gradient);
        plain.add(g0, g1);
        products.add(g0 * Sum::first(x), g1 * Sum::second(x));
      }
      plain.store(s + c);
      products.store(q + c);
    });
  });
}

void norm_grad(const Pooled& p, const Gradient& g, const float* means, float* dy, const Ranges& ranges) {
  const Normed& y = p.y;
  const Normalization& f = p.affine;
  const Windows& windows = p.windows;
  const int64_t samples = y.rows / (windows.height * windows.width), image = windows.pooled_y() * windows.pooled_x();
  std::fill(ranges.low, ranges.low + samples * y.channels, kInfinity);
  std::fill(ranges.high, ranges.high + samples * y.channels, -kInfinity);
  each_stretch(y, windows, image, [&](const auto& column, int64_t c, auto codes, auto full, auto pooled, const Stretch& rows) {
    const Floats a = load<Floats, full>(f.a + c, column.count), b = load<Floats, full>(f.b + c, column.count);
    const Floats mean = load<Floats, full>(f.mean + c, column.count), inv = load<Floats, full>(f.inv + c, column.count);
    const Floats mean_g = load<Floats, full>(means + c, column.count);
    const Floats mean_gx = load<Floats, full>(means + y.channels + c, column.count);
    for (int64_t row = rows.begin; row < rows.end;) {
      const int64_t sample = rows.window(row).sample;
      Extremes extremes;
      for (; row < rows.end && rows.window(row).sample == sample; ++row) {
        const Window& w = rows.window(row);
        Floats gradient{};
        Ints chosen{};
        if (g.kept == nullptr || g.kept[sample]) {
          gradient = load<Floats, full>(g.data + row * y.channels + c, column.count);
          chosen = largest<codes, pooled>(column, w, a, b).number;
        }
        const auto finish = [&](int64_t to, Floats dz) {
          const Floats x = (column.template at<codes>(to) - mean) * inv;
          const Floats value = ((dz - mean_g) - x * mean_gx) * a;
          store<full>(dy + to * y.channels + c, value, column.count);
          extremes.add(value);
        };
        if constexpr (!pooled) {
          finish(row, gradient);
          continue;
        }
        int32_t number = 0;
        for (int64_t line = 0; line < w.rows; ++line) {
          for (int64_t i = 0; i < w.columns; ++i, ++number) {
            finish(w.first + line * w.width + i, chosen == number ? gradient : Floats{});
          }
        }
      }
      const int64_t at = sample * y.channels + c;
      extremes.template join<full>(ranges.low + at, ranges.high + at, column.count);
    }
  });
}
