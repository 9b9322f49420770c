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
  decltype(&fqt::portable::norm_grad_sums) grad_sums;
  decltype(&fqt::portable::norm_grad) grad;
};
#define FQT_ROW(set, runs)                                                               \
  {#set, bool(runs), fqt::set::norm_sums, fqt::set::norm_value, fqt::set::norm_sign,     \
   fqt::set::norm_grad_sums, fqt::set::norm_grad},
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

void check_case(Random& r) {
  const int64_t height = r.choose<int64_t>({1, 2, 3, 5, 8}), width = r.choose<int64_t>({1, 2, 3, 4, 7});
  const fqt::Windows windows{height, width, r.choose<int64_t>({1, 1, 2, 2, 3}), r.choose<int64_t>({1, 1, 2, 2, 3})};
  const int64_t n = r.choose<int64_t>({0, 1, 2, 3, 20}), channels = r.size(), pixels = height * width, rows = n * pixels;
  const int64_t ph = windows.pooled_y(), pw = windows.pooled_x(), pooled = n * ph * pw;
  const std::string kind = r.choose<const char*>({"codes", "codes", "normal", "coarse", "large", "small", "special"});
  const bool codes = kind == "codes", shifted = r.chance(0.5), some_kept = r.chance(0.5);
  current.about << "norm of " << n << " images " << height << "x" << width << " of " << channels << " channels, windows "
                << windows.kernel_y << "x" << windows.kernel_x << ", " << kind << (shifted ? " shifted" : "")
                << (some_kept ? " some kept" : "") << " pieces " << pieces;

  Fenced<int16_t> code(rows * channels);
  Fenced<float> floats(rows * channels), scale(channels), offset(channels), affine(4 * channels), means(2 * channels);
  for (int64_t c = 0; c < channels; ++c) scale[c] = r.factor(), offset[c] = r.factor();
  for (int64_t i = 0; i < 4 * channels; ++i) affine[i] = r.factor();
  for (int64_t i = 0; i < 2 * channels; ++i) means[i] = r.factor();
  std::vector<float> y(rows * channels);
  for (int64_t i = 0; i < rows * channels; ++i) {
    code[i] = static_cast<int16_t>(r.chance(0.01) ? r.choose({-32768, 32767}) : r.between(-9, 9));
    floats[i] = kind == "special" ? r.factor() : r.normal() * (kind == "large" ? 1e30f : kind == "small" ? 1e-30f : 1.0f);
    if (kind == "coarse") floats[i] = std::nearbyint(floats[i]);  // so that maxima are often equal
    y[i] = codes ? static_cast<float>(code[i]) * scale[i % channels] : floats[i];
    if (codes && shifted) y[i] = y[i] + offset[i % channels];
  }
  Fenced<bool> kept(n);
  for (int64_t i = 0; i < n; ++i) kept[i] = !some_kept || r.chance(0.5);
  Fenced<float> g(pooled * channels);
  for (int64_t i = 0; i < pooled * channels; ++i) g[i] = kept[i / channels / (ph * pw)] ? r.factor() : fqt::kNaN;  // not read

  const float *a = affine.data, *b = a + channels, *mean = b + channels, *inv = mean + channels;
  const float low = -1.0f, high = r.choose({1.0f, 0.5f});
  std::vector<double> values(rows * channels), squares(rows * channels), gs(pooled * channels), gxs(pooled * channels);
  for (int64_t i = 0; i < rows * channels; ++i) values[i] = y[i], squares[i] = values[i] * values[i];

  std::vector<float> z(pooled * channels), dy(rows * channels), lows(n * channels), highs(n * channels);
  const int64_t bytes = bytes_of(channels, 1);
  std::vector<uint8_t> signs(pooled * bytes), mask(pooled * bytes);
  bool nan = false;
  const auto x = [&](int64_t at) { return (y[at] - mean[at % channels]) * inv[at % channels]; };
  for (int64_t p = 0; p < pooled; ++p) {
    const int64_t sample = p / (ph * pw), first_y = p / pw % ph * windows.kernel_y, first_x = p % pw * windows.kernel_x;
    for (int64_t c = 0; c < channels; ++c) {
      int64_t chosen = -1;
      float& best = z[p * channels + c];
      const auto each = [&](const auto& body) {
        for (int64_t iy = first_y; iy < std::min(height, first_y + windows.kernel_y); ++iy) {
          for (int64_t ix = first_x; ix < std::min(width, first_x + windows.kernel_x); ++ix) {
            body(((sample * height + iy) * width + ix) * channels + c);
          }
        }
      };
      each([&](int64_t at) {
        const float value = y[at] * a[c] + b[c];
        if (chosen < 0 || value > best || value != value) best = value, chosen = at;
      });
      put(signs.data() + p * bytes, c, 1, best >= 0.0f);
      put(mask.data() + p * bytes, c, 1, best >= low && best <= high);
      nan |= best != best;
      const float gradient = kept[sample] ? g[p * channels + c] : 0.0f;
      gs[p * channels + c] = gradient;
      gxs[p * channels + c] = gs[p * channels + c] * static_cast<double>(kept[sample] ? x(chosen) : 0.0f);
      each([&](int64_t at) {
        const float dz = at == chosen ? gradient : 0.0f;
        dy[at] = ((dz - means[c]) - x(at) * means[channels + c]) * a[c];
      });
    }
  }
  for (int64_t i = 0; i < n * channels; ++i) {
    float &smallest = lows[i] = fqt::kInfinity, &largest = highs[i] = -fqt::kInfinity;
    for (int64_t p = 0; p < pixels; ++p) {
      const float v = dy[(i / channels * pixels + p) * channels + i % channels];
      if (v != v || smallest != smallest) {
        smallest = largest = fqt::kNaN;
      } else {
        smallest = std::min(smallest, v), largest = std::max(largest, v);
      }
    }
  }

  const fqt::Normed source{codes ? nullptr : floats.data, codes ? code.data : nullptr, codes ? scale.data : nullptr,
                           codes && shifted ? offset.data : nullptr, rows, channels};
  const fqt::Pooled z_of{source, {a, b, mean, inv}, windows};
  const fqt::Gradient gradient{g.data, some_kept ? kept.data : nullptr};
  for (const Set& set : kSets) {
    if (!set.runs) continue;
    Fenced<double> sums(2 * channels), grad_sums(2 * channels);
    Fenced<float> to_z(pooled * channels), to_dy(rows * channels), to_low(n * channels), to_high(n * channels);
    Fenced<uint8_t> to_signs(pooled * bytes), to_mask(pooled * bytes);
    set.sums(source, sums.data);
    same("norm_sums", set.name, sums.data, joined(block_sums(values, channels), block_sums(squares, channels)));
    set.value(z_of, to_z.data);
    same("norm_value", set.name, to_z.data, z);
    const bool found = set.sign(z_of, low, high, to_signs.data, to_mask.data);
    same("norm_sign", set.name, &found, std::vector<bool>{nan});
    same("norm_sign", set.name, to_signs.data, signs);
    same("norm_sign", set.name, to_mask.data, mask);
    set.grad_sums(z_of, gradient, grad_sums.data);
    same("norm_grad_sums", set.name, grad_sums.data, joined(block_sums(gs, channels), block_sums(gxs, channels)));
    set.grad(z_of, gradient, means.data, to_dy.data, {to_low.data, to_high.data});
    same("norm_grad", set.name, to_dy.data, dy);
    same("norm_grad", set.name, unsigned_zeros(to_low.copy()).data(), unsigned_zeros(lows));
    same("norm_grad", set.name, unsigned_zeros(to_high.copy()).data(), unsigned_zeros(highs));
    for (const char* kernel : {"norm_sums", "norm_value", "norm_sign", "norm_grad_sums", "norm_grad"}) {
      ++served[kernel][set.name];
    }
  }
}

}  // namespace

void norm(uint64_t seed, int64_t cases) { each_case(seed, cases, 2, check_case); }

}  // namespace check
