// Batch normalization in front of a sign against loops over rows and channels (fqt/reference/norm.py).

#include "../../fqt/cpu/csrc/norm/isa.h"

#include "check.h"

namespace check {
namespace {

struct Set {
  const char* name;
  bool runs;
  decltype(&fqt::portable::norm_sums) sums;
  decltype(&fqt::portable::norm_value) value;
  decltype(&fqt::portable::norm_sign) sign;
  decltype(&fqt::portable::norm_above) above;
  decltype(&fqt::portable::norm_grad_sums) grad_sums;
  decltype(&fqt::portable::norm_grad) grad;
};
#define FQT_ROW(set, runs)                                                               \
  {#set, bool(runs), fqt::set::norm_sums, fqt::set::norm_value, fqt::set::norm_sign,     \
   fqt::set::norm_above, fqt::set::norm_grad_sums, fqt::set::norm_grad},
const Set kSets[] = {FQT_FOR_EACH_ISA(FQT_ROW)};

// Sums by channel over rows of `values`: in order within blocks of 256 rows, then the blocks in order.
std::vector<double> block_sums(const std::vector<double>& values, int64_t channels) {
  std::vector<double> total(channels), block(channels);
  const int64_t rows = channels == 0 ? 0 : static_cast<int64_t>(values.size()) / channels;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < channels; ++c) block[c] += values[row * channels + c];
    if ((row + 1) % 256 != 0 && row + 1 != rows) continue;
    for (int64_t c = 0; c < channels; ++c) total[c] += block[c], block[c] = 0.0;
  }
  return total;
}

std::vector<double> joined(std::vector<double> a, const std::vector<double>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// Zeros of either sign are equal where the order of comparisons is free.
std::vector<float> unsigned_zeros(const std::vector<float>& values) {
  std::vector<float> made;
  for (const float v : values) made.push_back(v + 0.0f);
  return made;
}

// What is normalized, and the gradient that comes back.
struct Input {
  fqt::Windows windows;
  int64_t n, channels;
  bool codes, shifted, some_kept;
  Fenced<int16_t> code;
  Fenced<float> floats, scale, offset, affine, means, g;
  Fenced<bool> kept;
  std::vector<float> y;
  float low = -1.0f, high = 1.0f;

  Input(Random& r, const fqt::Windows& of, int64_t samples, int64_t width, const std::string& kind)
      : windows(of), n(samples), channels(width), codes(kind == "codes"), shifted(r.chance(0.5)), some_kept(r.chance(0.5)),
        code(rows() * channels), floats(rows() * channels), scale(channels), offset(channels), affine(4 * channels),
        means(2 * channels), g(pooled() * channels), kept(n), y(rows() * channels) {
    for (int64_t c = 0; c < channels; ++c) scale[c] = r.factor(), offset[c] = r.factor();
    for (int64_t i = 0; i < 4 * channels; ++i) affine[i] = r.factor();
    for (int64_t i = 0; i < 2 * channels; ++i) means[i] = r.factor();
    for (int64_t i = 0; i < rows() * channels; ++i) {
      code[i] = static_cast<int16_t>(r.chance(0.01) ? r.choose({-32768, 32767}) : r.between(-9, 9));
      floats[i] = kind == "special" ? r.factor() : r.normal() * (kind == "large" ? 1e30f : kind == "small" ? 1e-30f : 1.0f);
      if (kind == "coarse") floats[i] = std::nearbyint(floats[i]);  // so that maxima are often equal
      y[i] = codes ? static_cast<float>(code[i]) * scale[i % channels] : floats[i];
      if (codes && shifted) y[i] = y[i] + offset[i % channels];
    }
    for (int64_t i = 0; i < n; ++i) kept[i] = !some_kept || r.chance(0.5);
    for (int64_t i = 0; i < pooled() * channels; ++i) g[i] = kept[sample(i / channels)] ? r.factor() : fqt::kNaN;  // not read
    high = r.choose({1.0f, 0.5f});
  }

  int64_t pixels() const { return windows.height * windows.width; }
  int64_t rows() const { return n * pixels(); }
  int64_t pooled() const { return n * windows.pooled_y() * windows.pooled_x(); }
  int64_t sample(int64_t window) const { return window / (windows.pooled_y() * windows.pooled_x()); }
  const float* a() const { return affine.data; }
  const float* b() const { return affine.data + channels; }
  const float* mean() const { return affine.data + 2 * channels; }
  const float* inv() const { return affine.data + 3 * channels; }
  fqt::Normed source() const {
    return {codes ? nullptr : floats.data, codes ? code.data : nullptr, codes ? scale.data : nullptr,
            codes && shifted ? offset.data : nullptr, rows(), channels};
  }

  // Calls body(place of the element) for a channel of each pixel of a window.
  template <class Body>
  void each_of(int64_t window, int64_t c, const Body& body) const {
    const int64_t ph = windows.pooled_y(), pw = windows.pooled_x();
    const int64_t first_y = window / pw % ph * windows.kernel_y, first_x = window % pw * windows.kernel_x;
    for (int64_t iy = first_y; iy < std::min(windows.height, first_y + windows.kernel_y); ++iy) {
      for (int64_t ix = first_x; ix < std::min(windows.width, first_x + windows.kernel_x); ++ix) {
        body(((sample(window) * windows.height + iy) * windows.width + ix) * channels + c);
      }
    }
  }
};

Input draw(Random& r) {
  const int64_t height = r.choose<int64_t>({1, 2, 3, 5, 8}), width = r.choose<int64_t>({1, 2, 3, 4, 7});
  const fqt::Windows windows{height, width, r.choose<int64_t>({1, 1, 2, 2, 3}), r.choose<int64_t>({1, 1, 2, 2, 3})};
  const int64_t n = r.choose<int64_t>({0, 1, 2, 3, 20}), channels = r.size();
  const std::string kind = r.choose<const char*>({"codes", "codes", "normal", "coarse", "large", "small", "special"});
  current.about << "norm of " << n << " images " << height << "x" << width << " of " << channels << " channels, windows "
                << windows.kernel_y << "x" << windows.kernel_x << ", " << kind << " pieces " << pieces;
  return {r, windows, n, channels, kind};
}

// What straight loops find.
struct Found {
  int64_t bytes;  // of a row of bits
  std::vector<double> sums, grad_sums;
  std::vector<float> z, dy, lows, highs;
  std::vector<uint8_t> signs, mask;
  bool nan = false;

  explicit Found(const Input& in)
      : bytes(bytes_of(in.channels, 1)), z(in.pooled() * in.channels), dy(in.rows() * in.channels), lows(in.n * in.channels),
        highs(in.n * in.channels), signs(in.pooled() * bytes), mask(in.pooled() * bytes) {
    std::vector<double> values(dy.size()), squares(dy.size()), gs(z.size()), gxs(z.size());
    for (size_t i = 0; i < dy.size(); ++i) values[i] = in.y[i], squares[i] = values[i] * values[i];
    for (int64_t window = 0; window < in.pooled(); ++window) {
      for (int64_t c = 0; c < in.channels; ++c) pool(in, window, c, gs[window * in.channels + c], gxs[window * in.channels + c]);
    }
    sums = joined(block_sums(values, in.channels), block_sums(squares, in.channels));
    grad_sums = joined(block_sums(gs, in.channels), block_sums(gxs, in.channels));
    find_ranges(in);
  }

 private:
  void pool(const Input& in, int64_t window, int64_t c, double& of_g, double& of_gx) {
    const int64_t at_z = window * in.channels + c;
    const auto x = [&](int64_t at) { return (in.y[at] - in.mean()[c]) * in.inv()[c]; };
    int64_t chosen = -1;
    float& best = z[at_z];
    in.each_of(window, c, [&](int64_t at) {
      const float value = in.y[at] * in.a()[c] + in.b()[c];
      if (chosen < 0 || value > best || value != value) best = value, chosen = at;
    });
    put(signs.data() + window * bytes, c, 1, best >= 0.0f);
    put(mask.data() + window * bytes, c, 1, best >= in.low && best <= in.high);
    nan |= best != best;
    const bool is_kept = in.kept.data[in.sample(window)];
    const float gradient = is_kept ? in.g.data[at_z] : 0.0f;
    of_g = gradient;
    of_gx = of_g * static_cast<double>(is_kept ? x(chosen) : 0.0f);
    in.each_of(window, c, [&](int64_t at) {
      const float dz = at == chosen ? gradient : 0.0f;
      dy[at] = ((dz - in.means.data[c]) - x(at) * in.means.data[in.channels + c]) * in.a()[c];
    });
  }

  void find_ranges(const Input& in) {
    for (int64_t i = 0; i < in.n * in.channels; ++i) {
      float &smallest = lows[i] = fqt::kInfinity, &largest = highs[i] = -fqt::kInfinity;
      for (int64_t p = 0; p < in.pixels(); ++p) {
        const float v = dy[(i / in.channels * in.pixels() + p) * in.channels + i % in.channels];
        if (v != v || smallest != smallest) {
          smallest = largest = fqt::kNaN;
        } else {
          smallest = std::min(smallest, v), largest = std::max(largest, v);
        }
      }
    }
  }
};

void check_set(const Set& set, const Input& in, const Found& found) {
  const fqt::Pooled z_of{in.source(), {in.a(), in.b(), in.mean(), in.inv()}, in.windows};
  const fqt::Gradient gradient{in.g.data, in.some_kept ? in.kept.data : nullptr};
  const int64_t channels = in.channels, pooled = in.pooled();
  Fenced<double> sums(2 * channels), grad_sums(2 * channels);
  Fenced<float> z(pooled * channels), dy(in.rows() * channels), low(in.n * channels), high(in.n * channels);
  Fenced<uint8_t> signs(pooled * found.bytes), mask(pooled * found.bytes);
  set.sums(in.source(), sums.data);
  same("norm_sums", set.name, sums.data, found.sums);
  set.value(z_of, z.data);
  same("norm_value", set.name, z.data, found.z);
  const bool nan = set.sign(z_of, in.low, in.high, signs.data, mask.data);
  same("norm_sign", set.name, &nan, std::vector<bool>{found.nan});
  same("norm_sign", set.name, signs.data, found.signs);
  same("norm_sign", set.name, mask.data, found.mask);
  set.grad_sums(z_of, gradient, grad_sums.data);
  same("norm_grad_sums", set.name, grad_sums.data, found.grad_sums);
  set.grad(z_of, gradient, in.means.data, dy.data, {low.data, high.data});
  same("norm_grad", set.name, dy.data, found.dy);
  same("norm_grad", set.name, unsigned_zeros(low.copy()).data(), unsigned_zeros(found.lows));
  same("norm_grad", set.name, unsigned_zeros(high.copy()).data(), unsigned_zeros(found.highs));
  for (const char* kernel : {"norm_sums", "norm_value", "norm_sign", "norm_grad_sums", "norm_grad"}) {
    ++served[kernel][set.name];
  }
}

// Signs by codes alone: thresholds at both ends of 16 bits and between, some channels turned round, the largest of each window.
void check_above(Random& r, const Input& in) {
  const int64_t channels = in.channels, bytes = bytes_of(channels, 1);
  Fenced<int16_t> above(channels);
  Fenced<uint8_t> flipped(bytes);
  std::memset(flipped.data, 0, bytes);
  std::vector<bool> turned(channels);
  for (int64_t c = 0; c < channels; ++c) {
    above.data[c] = static_cast<int16_t>(r.chance(0.2) ? r.choose<int64_t>({-32768, 32767}) : r.between(-40, 40));
    turned[c] = r.chance(0.4);
    put(flipped.data, c, 1, turned[c]);
  }
  std::vector<uint8_t> expected(in.pooled() * bytes);
  for (int64_t window = 0; window < in.pooled(); ++window) {
    for (int64_t c = 0; c < channels; ++c) {
      bool any = false;
      in.each_of(window, c, [&](int64_t at) { any |= (in.code.data[at] > above.data[c]) != turned[c]; });
      put(expected.data() + window * bytes, c, 1, any);
    }
  }
  for (const Set& set : kSets) {
    if (!set.runs) continue;
    Fenced<uint8_t> signs(in.pooled() * bytes);
    set.above({in.code.data, above.data, flipped.data, in.windows, in.rows(), channels}, signs.data);
    same("norm_above", set.name, signs.data, expected);
    ++served["norm_above"][set.name];
  }
}

void check_case(Random& r) {
  const Input in = draw(r);
  const Found found(in);
  for (const Set& set : kSets) {
    if (set.runs) check_set(set, in, found);
  }
  if (in.codes) check_above(r, in);
}

}  // namespace

void norm(uint64_t seed, int64_t cases) { each_case(seed, cases, 2, check_case); }

}  // namespace check
