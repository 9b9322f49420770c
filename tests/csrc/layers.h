// What the checks of the products share: layers of random shapes, whom their pixels meet, packed codes and scales.
#pragma once

#include "../../fqt/cpu/csrc/products/isa.h"

#include "check.h"

namespace check {

// A convolution; a linear layer is a 1x1 window over a column of positions.
struct Shape {
  int64_t n = 1, groups = 1, in = 1, out = 1;  // channels of a group
  int64_t h = 1, w = 1, kh = 1, kw = 1, sh = 1, sw = 1, dh = 1, dw = 1, top = 0, bottom = 0, left = 0, right = 0;
  bool largest = false;  // the largest codes and equal signs, so that sums reach their bounds
  int64_t missing = 0;   // rows that the last sample lacks

  int64_t oh() const { return (h + top + bottom - dh * (kh - 1) - 1) / sh + 1; }
  int64_t ow() const { return (w + left + right - dw * (kw - 1) - 1) / sw + 1; }
  int64_t pixels() const { return h * w; }
  int64_t outputs() const { return oh() * ow(); }
  int64_t taps() const { return kh * kw; }
  bool linear() const { return taps() * sh * sw * w == 1 && top + bottom + left + right == 0; }
  int64_t work() const { return n * outputs() * taps() * in * out * groups; }

  // The input's pixel that tap k of output pixel o meets, or -1.
  int64_t meets(int64_t o, int64_t k) const {
    const int64_t y = o / ow() * sh - top + k / kw * dh, x = o % ow() * sw - left + k % kw * dw;
    return y >= 0 && y < h && x >= 0 && x < w ? y * w + x : -1;
  }
};

inline Shape linear(int64_t n, int64_t positions, int64_t in, int64_t out, bool largest) {
  Shape s;
  s.n = n, s.h = positions, s.in = in, s.out = out, s.largest = largest;
  return s;
}

inline Shape random_shape(Random& r) {
  for (;;) {
    Shape s;
    s.n = r.choose<int64_t>({0, 1, 1, 2, 3, 5, 17});
    s.in = r.size(), s.out = r.size();
    s.largest = r.chance(0.1);
    if (r.chance(0.4)) {
      s.h = r.choose<int64_t>({0, 1, 1, 1, 2, 5, 33, r.between(1, 300)});
      s.n = r.chance(0.1) ? r.between(1, 300) : s.n;
    } else {
      s.groups = r.choose<int64_t>({1, 1, 1, 2, 3, 17, 64});
      if (s.groups > 1) s.in = r.choose<int64_t>({1, 1, 2, 5, 8, 9}), s.out = r.choose<int64_t>({1, 1, 2, 5, 8, 9});
      s.h = r.between(1, 9), s.w = r.between(1, 9);
      s.kh = r.choose<int64_t>({1, 2, 3, 3, 5}), s.kw = r.choose<int64_t>({1, 2, 3, 3, 4});
      s.sh = r.choose<int64_t>({1, 1, 2, 3}), s.sw = r.choose<int64_t>({1, 1, 2, 3});
      s.dh = r.choose<int64_t>({1, 1, 2}), s.dw = r.choose<int64_t>({1, 1, 3});
      s.top = r.between(0, 3), s.bottom = r.between(0, 3), s.left = r.between(0, 3), s.right = r.between(0, 3);
      if (s.h + s.top + s.bottom < s.dh * (s.kh - 1) + 1 || s.w + s.left + s.right < s.dw * (s.kw - 1) + 1) continue;
    }
    if (s.work() <= 300'000) return s;
  }
}

inline void describe(const Shape& s) {
  current.about << "n " << s.n << " groups " << s.groups << " in " << s.in << " out " << s.out << " image " << s.h << "x" << s.w
                << " window " << s.kh << "x" << s.kw << " stride " << s.sh << "," << s.sw << " dilation " << s.dh << "," << s.dw
                << " padding " << s.top << "," << s.bottom << "," << s.left << "," << s.right << " missing " << s.missing
                << " pieces " << pieces << (s.largest ? " largest" : "") << "; ";
}

// An axis of the layer: whom each position meets, found by trying.
struct Meeting {
  std::vector<int32_t> at, kind, example;
  int64_t size, taps;

  Meeting(int64_t input, int64_t output, int64_t window, int64_t stride, int64_t padding, int64_t dilation, bool forward)
      : size(forward ? output : input), taps(window) {
    at.assign(size * taps, -1);
    for (int64_t o = 0; o < output; ++o) {
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t i = o * stride - padding + k * dilation;
        if (i >= 0 && i < input) at[(forward ? o : i) * taps + k] = static_cast<int32_t>(forward ? i : o);
      }
    }
    std::map<std::vector<bool>, int32_t> kinds;
    for (int64_t i = 0; i < size; ++i) {
      std::vector<bool> met;
      for (int64_t k = 0; k < taps; ++k) met.push_back(at[i * taps + k] >= 0);
      kind.push_back(kinds.emplace(met, static_cast<int32_t>(kinds.size())).first->second);
      if (kinds.size() > example.size()) example.push_back(static_cast<int32_t>(i));
    }
  }
  fqt::Axis axis() const {
    return {size, taps, static_cast<int64_t>(example.size()), at.data(), kind.data(), example.data()};
  }
};

struct Sides {
  Meeting y, x;
  fqt::Layer layer;
  Sides(const Shape& s, bool forward)
      : y(s.h, s.oh(), s.kh, s.sh, s.top, s.dh, forward), x(s.w, s.ow(), s.kw, s.sw, s.left, s.dw, forward),
        layer{s.n, s.groups, s.in, s.out, y.axis(), x.axis(), forward ? s.h : s.oh(), forward ? s.w : s.ow()} {}
};

// Rows of packed codes, and the codes by themselves.
struct Packed {
  std::vector<int> code;
  Fenced<uint8_t> bytes;

  Packed(Random& r, int64_t rows, int64_t length, int bits, int storage, bool largest)
      : code(rows * length), bytes(rows * bytes_of(length, storage)) {
    std::memset(bytes.data, 0, bytes.count);
    const unsigned top = (1u << bits) - 1;
    for (int64_t i = 0; i < rows * length; ++i) {
      code[i] = static_cast<int>(largest ? top : r.bits() & top);
      put(bytes.data + i / length * bytes_of(length, storage), i % length, storage, code[i]);
    }
  }
  int sign(int64_t i) const { return 2 * code[i] - 1; }
};

// A scale with the strides of its axes.
struct Scales {
  Fenced<float> values;
  int64_t s0, s1;
  Scales(Random& r, int64_t n0, int64_t n1, bool by0, bool by1, bool first_inside = false)
      : values((by0 ? n0 : 1) * (by1 ? n1 : 1)), s0(by0 ? (by1 && !first_inside ? n1 : 1) : 0),
        s1(by1 ? (by0 && first_inside ? n0 : 1) : 0) {
    for (int64_t i = 0; i < values.count; ++i) values[i] = r.factor();
  }
  fqt::Scale scale() const { return {values.data, s0, s1}; }
  float operator()(int64_t i, int64_t j) const { return values.data[i * s0 + j * s1]; }
};

inline std::vector<int32_t> some(Random& r, int64_t count, bool all) {
  std::vector<int32_t> kept;
  const double share = all ? 2.0 : r.choose({0.0, 0.3, 0.6, 2.0});
  for (int64_t i = 0; i < count; ++i) {
    if (r.chance(share)) kept.push_back(static_cast<int32_t>(i));
  }
  return kept;
}

// One more case, which is not drawn.
template <class Check>
void bound(const Shape& s, const Check& check) {
  ++current.number;
  Random r(current.seed, static_cast<uint64_t>(current.number));
  current.about.str("");
  describe(s);
  check(r);
}

}  // namespace check
