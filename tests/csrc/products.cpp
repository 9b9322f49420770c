// The three products of signs against loops over samples, pixels, taps and channels (fqt/reference.py, the products).

#include "../../fqt/csrc/products/isa.h"

#include "check.h"

namespace check {
namespace {

struct Set {
  const char* name;
  bool runs;
  decltype(&fqt::portable::sign_output) sign_output;
  decltype(&fqt::portable::grad_input) grad_input;
  decltype(&fqt::portable::grad_weight) grad_weight;
};
#define FQT_ROW(set, runs) {#set, bool(runs), fqt::set::sign_output, fqt::set::grad_input, fqt::set::grad_weight},
const Set kSets[] = {FQT_SETS(FQT_ROW)};

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

Shape linear(int64_t n, int64_t positions, int64_t in, int64_t out, bool largest) {
  Shape s;
  s.n = n, s.h = positions, s.in = in, s.out = out, s.largest = largest;
  return s;
}

Shape random_shape(Random& r) {
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

void describe(const Shape& s) {
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

std::vector<int32_t> some(Random& r, int64_t count, bool all) {
  std::vector<int32_t> kept;
  const double share = all ? 2.0 : r.choose({0.0, 0.3, 0.6, 2.0});
  for (int64_t i = 0; i < count; ++i) {
    if (r.chance(share)) kept.push_back(static_cast<int32_t>(i));
  }
  return kept;
}

void check_output(Random& r, const Shape& s, bool sums, bool opposite) {
  const int64_t channels = s.groups * s.out, outputs = s.outputs(), in = s.groups * s.in;
  const Packed x(r, s.n * s.pixels(), in, 1, 1, s.largest);
  Packed w(r, channels * s.taps(), s.in, 1, 1, s.largest);
  if (s.largest && opposite) {
    std::fill(w.code.begin(), w.code.end(), 0);
    std::memset(w.bytes.data, 0, w.bytes.count);
  }
  const bool by_sample = r.chance(0.6);
  const Scales x_scale(r, s.n, outputs, by_sample, by_sample && s.linear()), w_scale(r, channels, 1, r.chance(0.7), false);
  Fenced<float> bias(channels);
  for (int64_t i = 0; i < channels; ++i) bias[i] = r.factor();
  const bool biased = r.chance(0.5);
  const Sides sides(s, true);

  std::vector<int16_t> expected_sums(s.n * outputs * channels);
  std::vector<float> expected(expected_sums.size());
  for (int64_t n = 0, at = 0; n < s.n; ++n) {
    for (int64_t p = 0; p < outputs; ++p) {
      for (int64_t o = 0; o < channels; ++o, ++at) {
        int64_t sum = 0;
        for (int64_t k = 0; k < s.taps(); ++k) {
          const int64_t pixel = s.meets(p, k);
          for (int64_t i = 0; pixel >= 0 && i < s.in; ++i) {
            sum += x.sign((n * s.pixels() + pixel) * in + o / s.out * s.in + i) * w.sign((o * s.taps() + k) * s.in + i);
          }
        }
        float t = static_cast<float>(sum) * x_scale(n, p);
        t = t * w_scale(o, 0);
        expected[at] = biased ? t + bias[o] : t;
        expected_sums[at] = static_cast<int16_t>(sum);
      }
    }
  }
  for (const Set& set : kSets) {
    if (!set.runs) continue;
    Fenced<float> y(s.n * outputs * channels);
    Fenced<int16_t> to(s.n * outputs * channels);
    fqt::SignOutput call{sides.layer,     x.bytes.data,    w.bytes.data,                  x_scale.scale(),
                         w_scale.scale(), biased ? bias.data : nullptr, y.data, nullptr};
    if (sums) {
      call = {};
      call.layer = sides.layer, call.x = x.bytes.data, call.w = w.bytes.data, call.sums = to.data;
    }
    set.sign_output(call);
    if (sums) {
      same("sign_output.sums", set.name, to.data, expected_sums);
    } else {
      same("sign_output", set.name, y.data, expected);
    }
    ++served[sums ? "sign_output.sums" : "sign_output"][set.name];
  }
}

int storage_of(int bits) { return bits <= 2 ? bits : bits <= 4 ? 4 : 8; }

void check_grad_input(Random& r, const Shape& s, int bits) {
  const int64_t channels = s.groups * s.in, pixels = s.pixels(), outputs = s.outputs(), out = s.groups * s.out;
  const Packed g(r, s.n * outputs, out, bits, storage_of(bits), s.largest);
  const Packed w(r, out * s.taps(), s.in, 1, 1, s.largest);
  const Packed mask(r, s.n * pixels, channels, 1, 1, false);
  const bool by_sample = r.chance(0.7), by_position = by_sample && s.linear() && r.chance(0.5);
  const Scales g_scale(r, s.n, pixels, by_sample, by_position), g_offset(r, s.n, pixels, by_sample, by_position);
  const bool offset = r.chance(0.6), masked = r.chance(0.5);
  const float w_scale = r.factor();
  const Fenced<int32_t> kept(some(r, s.n, r.chance(0.6)));
  const Sides sides(s, false);
  current.about << "grad_input bits " << bits << (offset ? " offset" : "") << (masked ? " mask" : "") << " kept " << kept.count;

  std::vector<float> expected = Fenced<float>(s.n * pixels * channels).copy();
  for (int64_t i = 0; i < kept.count; ++i) {
    const int64_t n = kept.data[i];
    std::vector<int64_t> sum(pixels * channels), sum_w(pixels * channels);
    for (int64_t p = 0; p < outputs; ++p) {
      for (int64_t k = 0; k < s.taps(); ++k) {
        const int64_t pixel = s.meets(p, k);
        for (int64_t o = 0; pixel >= 0 && o < out; ++o) {
          const int code = g.code[(n * outputs + p) * out + o];
          for (int64_t c = 0; c < s.in; ++c) {
            const int sign = w.sign((o * s.taps() + k) * s.in + c);
            sum[pixel * channels + o / s.out * s.in + c] += code * sign;
            sum_w[pixel * channels + o / s.out * s.in + c] += sign;
          }
        }
      }
    }
    for (int64_t at = 0; at < pixels * channels; ++at) {
      const int64_t p = at / channels;
      float t = static_cast<float>(sum[at]) * g_scale(n, p);
      t = t * w_scale;
      if (offset) t = t + (static_cast<float>(sum_w[at]) * w_scale) * g_offset(n, p);
      if (masked && mask.code[n * pixels * channels + at] == 0) t = 0.0f;
      expected[n * pixels * channels + at] = t;
    }
  }
  for (const Set& set : kSets) {
    if (!set.runs) continue;
    Fenced<float> grad(s.n * pixels * channels);
    set.grad_input({sides.layer, {g.bytes.data, bits, false, false}, w.bytes.data,
                    masked ? mask.bytes.data : nullptr, g_scale.scale(), offset ? g_offset.scale() : fqt::Scale{}, w_scale,
                    kept.data, kept.count, grad.data});
    same("grad_input", set.name, grad.data, expected);
    ++served["grad_input"][set.name];
  }
}

// axes: of g's scale, as in fqt/formats.py
void check_grad_weight(Random& r, const Shape& s, int bits, const std::string& axes) {
  const bool blocks = axes == "N" || axes == "NC", by_channel = axes == "C", channel_major = by_channel || axes == "NC";
  const int64_t outputs = s.outputs(), out = s.groups * s.out, in = s.groups * s.in, taps = s.taps();
  const int64_t rows = s.n * outputs - s.missing, x_rows = s.n * s.pixels() - s.missing;
  const Packed g(r, by_channel ? out : channel_major ? out * s.n : rows,
                 by_channel ? rows : channel_major ? outputs : out, bits, storage_of(bits), s.largest);
  const Packed x(r, x_rows, in, 1, 1, s.largest);
  const Scales g_scale(r, s.n, out, blocks, channel_major, true), g_offset(r, s.n, out, blocks, channel_major, true);
  const bool offset = r.chance(0.6), part = r.chance(0.4);
  const float x_scale = r.factor();
  const Fenced<int32_t> samples(some(r, s.n, !part || s.missing > 0)), channels(some(r, out, !part || blocks));
  const Sides sides(s, true);
  current.about << "grad_weight bits " << bits << " axes '" << axes << "'" << (offset ? " offset" : "") << " samples "
                << samples.count << " channels " << channels.count;

  std::vector<float> expected(out * taps * s.in);
  for (int64_t row = 0; row < channels.count; ++row) {
    const int64_t o = channels.data[row];
    for (int64_t k = 0; k < taps; ++k) {
      for (int64_t i = 0; i < s.in; ++i) {
        float& grad = expected[(o * taps + k) * s.in + i];
        int64_t sum = 0, sum_x = 0;
        const auto value = [&](int64_t n) {
          float t = static_cast<float>(sum) * g_scale(n, o);
          t = t * x_scale;
          return offset ? t + (static_cast<float>(sum_x) * x_scale) * g_offset(n, o) : t;
        };
        for (int64_t j = 0; j < samples.count; ++j) {
          const int64_t n = samples.data[j];
          if (blocks) sum = sum_x = 0;
          for (int64_t p = 0; p < outputs && n * outputs + p < rows; ++p) {
            const int64_t pixel = s.meets(p, k);
            if (pixel < 0) continue;
            const int64_t at = channel_major ? o * rows + n * outputs + p : (n * outputs + p) * out + o;
            const int sign = x.sign((n * s.pixels() + pixel) * in + o / s.out * s.in + i);
            sum += g.code[at] * sign;
            sum_x += sign;
          }
          if (blocks) grad = grad + value(n);
        }
        if (!blocks) grad = value(0);
      }
    }
  }
  for (const Set& set : kSets) {
    if (!set.runs) continue;
    Fenced<float> grad(out * taps * s.in);
    std::fill(grad.data, grad.data + grad.count, 0.0f);
    set.grad_weight({sides.layer, {g.bytes.data, bits, channel_major, by_channel}, x.bytes.data,
                     g_scale.scale(), offset ? g_offset.scale() : fqt::Scale{}, x_scale, blocks, s.missing, samples.data,
                     channels.data, samples.count, channels.count, grad.data});
    same("grad_weight", set.name, grad.data, expected);
    ++served["grad_weight"][set.name];
  }
}

// Rows cut into stretches that count as samples, as the operator cuts those of 1x1 windows.
Shape stretched(Random& r, const Shape& s) {
  const int64_t rows = s.n * s.pixels(), stretch = rows == 0 ? 0 : std::min<int64_t>(rows, r.choose<int64_t>({1, 7, 64, 1024}));
  Shape made = s;
  made.n = rows == 0 ? 0 : (rows + stretch - 1) / stretch;
  made.h = stretch;
  made.missing = made.n * stretch - rows;
  return made;
}

template <class Check>
void bound(const Shape& s, const Check& check) {
  ++current.number;
  Random r(current.seed, static_cast<uint64_t>(current.number));
  current.about.str("");
  describe(s);
  check(r);
}

// Sums that fill what holds them: bytes of 240 to 252, 31 words of differing bits, 256 bytes in 16 bits, all of int16 and of int32.
void bounds() {
  pieces = 1;
  for (const int64_t terms : {991, 992, 993, 1024, 32766, 32767}) {
    for (const bool opposite : {false, true}) {
      const Shape s = linear(1, 5, terms, 17, true);
      bound(s, [&](Random& r) { check_output(r, s, true, opposite); });
      bound(s, [&](Random& r) { check_output(r, s, false, opposite); });
    }
  }
  for (const int bits : {4, 5, 6, 8}) {
    for (const int64_t terms : {4095, 4096, 4097, 9000}) {
      const Shape s = linear(1, 1, 3, terms, true), g = linear(1, terms, 3, 2, true);
      bound(s, [&](Random& r) { check_grad_input(r, s, bits); });
      for (const char* axes : {"", "N", "C", "NC"}) bound(g, [&](Random& r) { check_grad_weight(r, g, bits, axes); });
    }
  }
  const Shape sample = linear(1, (1 << 23) - 1, 1, 1, true);
  bound(sample, [&](Random& r) { check_grad_weight(r, sample, 8, "N"); });
  const Shape batch = linear(8301, 1024, 1, 1, true);
  bound(batch, [&](Random& r) { check_grad_weight(r, batch, 8, ""); });
}

}  // namespace

void products(uint64_t seed, int64_t cases) {
  each_case(seed, cases, 1, [](Random& r) {
    const Shape s = random_shape(r);
    describe(s);
    const std::string shape = current.about.str();
    const bool sums = r.chance(0.3) && s.taps() * s.in < 1 << 15, opposite = r.chance(0.5);
    check_output(r, s, sums, opposite);
    check_grad_input(r, s, static_cast<int>(r.choose<int64_t>({4, 4, r.between(1, 8)})));
    current.about.str("");
    const std::string axes = r.choose<const char*>({"", "N", "C", "NC"});
    const bool cut = s.linear() && (axes.empty() || axes == "C") && r.chance(0.7);
    const Shape of_g = cut ? stretched(r, s) : s;
    describe(of_g);
    check_grad_weight(r, of_g, static_cast<int>(r.choose<int64_t>({4, 4, r.between(1, 8)})), axes);
  });
  bounds();
}

}  // namespace check
