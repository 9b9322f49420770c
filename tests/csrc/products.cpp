// The three products of signs against loops over samples, pixels, taps and channels (fqt/reference/products.py).

#include "layers.h"

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
const Set kSets[] = {FQT_FOR_EACH_ISA(FQT_ROW)};

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

// Sums that fill what holds them: bytes of 240 to 252, 31 words of differing bits, 256 bytes in 16 bits, all of int16 and of
// int32.
void bounds() {
  pieces = 1;
  for (const int64_t terms : {991, 992, 993, 1024, 32766, 32767}) {
    for (const bool opposite : {false, true}) {
      const Shape s = linear(1, 5, terms, 17, true);
      bound(s, [&](Random& r) { check_output(r, s, true, opposite); });
      bound(s, [&](Random& r) { check_output(r, s, false, opposite); });
    }
  }
  for (const int64_t terms : {57344, 57345, 114689}) {  // AVX2 adds up to 57,344 in 16 bits
    const Shape s = linear(1, 5, terms, 35, true);
    bound(s, [&](Random& r) { check_output(r, s, false, true); });
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
