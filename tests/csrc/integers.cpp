// The products of integers against loops over samples, pixels, taps and channels, with sums of 64 bits
// (fqt/reference/products.py).

#include "layers.h"

namespace check {
namespace {

using fqt::Meaning;

struct Set {
  const char* name;
  bool runs;
  decltype(&fqt::portable::integer_gather) gather;
  decltype(&fqt::portable::integer_grad_weight) grad_weight;
};
#define FQT_ROW(set, runs) {#set, bool(runs), fqt::set::integer_gather, fqt::set::integer_grad_weight},
const Set kSets[] = {FQT_FOR_EACH_ISA(FQT_ROW)};

constexpr int kMostWeightBits = 30;  // of both operands together, which `grad_weight` demands

enum class Fill { any, ends, low, high };  // ends: each code the lowest or the highest

struct Kind {
  Meaning meaning;
  int bits;
  Fill fill = Fill::any;

  bool signs() const { return meaning == Meaning::sign; }
  int64_t low() const { return signs() ? -1 : meaning == Meaning::natural ? 0 : -(int64_t{1} << (bits - 1)); }
  int64_t high() const { return signs() ? 1 : low() + (int64_t{1} << bits) - 1; }
  int64_t largest() const { return std::max(-low(), high()); }
  bool words() const { return bits > 8; }
  bool operator==(const Kind&) const = default;
};

Kind random_kind(Random& r, bool largest) {
  const Meaning meaning = r.choose({Meaning::sign, Meaning::natural, Meaning::complement, Meaning::complement});
  const bool words = meaning == Meaning::complement && r.chance(0.7);
  const int64_t bits = words ? r.choose<int64_t>({15, 16, r.between(9, 16)}) : meaning == Meaning::sign ? 1 : r.between(1, 8);
  const Fill fill = largest ? r.choose({Fill::ends, Fill::low, Fill::high}) : r.choose({Fill::any, Fill::any, Fill::ends});
  return {meaning, static_cast<int>(bits), meaning == Meaning::sign && fill == Fill::any ? Fill::ends : fill};
}

// Of at most `most` bits together, where both are words.
std::pair<Kind, Kind> random_kinds(Random& r, bool largest, int most) {
  const Kind a = random_kind(r, largest);
  Kind b = random_kind(r, largest);
  if (a.words() && b.words()) b.bits = std::min(b.bits, most - a.bits);
  return {a, b};
}

std::ostream& operator<<(std::ostream& to, const Kind& k) {
  const char* const fills[] = {"any", "ends", "low", "high"};
  to << (k.signs() ? "sign" : k.meaning == Meaning::natural ? "natural" : "complement") << k.bits;
  return to << ":" << fills[static_cast<int>(k.fill)];
}

// Rows of packed codes, and the integers that they stand for.
struct Operand {
  Kind kind;
  std::vector<int64_t> code;
  Fenced<uint8_t> bytes;

  Operand(Random& r, const Kind& kind, int64_t rows, int64_t length)
      : kind(kind), code(rows * length), bytes(rows * bytes_of(length, storage_of(kind.bits))) {
    const int storage = storage_of(kind.bits);
    std::memset(bytes.data, 0, bytes.count);
    for (int64_t i = 0; i < rows * length; ++i) {
      const bool high = kind.fill == Fill::high || (kind.fill == Fill::ends && r.chance(0.5));
      code[i] = high ? kind.high() : kind.fill != Fill::any ? kind.low() : r.between(kind.low(), kind.high());
      const int64_t stored = kind.signs() ? code[i] > 0 : code[i] & ((1 << storage) - 1);
      put(bytes.data + i / length * bytes_of(length, storage), i % length, storage, static_cast<uint32_t>(stored));
    }
  }
  fqt::Integers integers(bool channel = false, bool by_channel = false) const {
    return {bytes.data, kind.bits, storage_of(kind.bits), kind.meaning, channel, by_channel};
  }
};

// What is summed for one value of a result, and how it becomes a float, in the order of fqt/reference/products.py.
struct Total {
  int64_t products = 0, a = 0, b = 0, terms = 0;
  void add(int64_t of_a, int64_t of_b) { products += of_a * of_b, a += of_a, b += of_b, ++terms; }
  float value(float a_scale, float b_scale, const float* a_offset, const float* b_offset) const {
    float t = static_cast<float>(products) * a_scale;
    t = t * b_scale;
    if (b_offset) t = t + (static_cast<float>(a) * a_scale) * *b_offset;
    if (a_offset) t = t + (static_cast<float>(b) * b_scale) * *a_offset;
    if (a_offset && b_offset) t = t + (static_cast<float>(terms) * *a_offset) * *b_offset;
    return t;
  }
};

// Scale and offset of an operand; the offset may be absent.
struct Factors {
  Scales scale, offset;
  bool shifted;
  Factors(Random& r, int64_t n0, int64_t n1, bool by0, bool by1, bool first_inside = false)
      : scale(r, n0, n1, by0, by1, first_inside), offset(r, n0, n1, by0, by1, first_inside), shifted(r.chance(0.5)) {}
  const float* offset_at(int64_t i, int64_t j) const {
    return shifted ? offset.values.data + i * offset.s0 + j * offset.s1 : nullptr;
  }
  fqt::Scale offsets() const { return shifted ? offset.scale() : fqt::Scale{}; }
};

const char* name_of(const char* narrow, const char* words, const Kind& a, const Kind& b) {
  return a.words() || b.words() ? words : narrow;
}

// forward: `output`, whose pixels gather what they meet of x; else `grad_input`, whose pixels gather of g.
void check_gather(Random& r, const Shape& s, bool forward, const Kind& of_a, const Kind& of_b) {
  const int64_t depth = forward ? s.in : s.out, columns = forward ? s.out : s.in, channels = s.groups * columns;
  const int64_t others = forward ? s.pixels() : s.outputs(), pixels = forward ? s.outputs() : s.pixels(), taps = s.taps();
  const Operand a(r, of_a, s.n * others, s.groups * depth), b(r, of_b, s.groups * s.out * taps, s.in);
  const bool by_sample = r.chance(0.6);
  const Factors of_row(r, s.n, pixels, by_sample, by_sample && s.linear() && r.chance(0.5));
  const Factors of_column(r, channels, 1, r.chance(0.6), false);
  Fenced<float> bias(channels);
  for (int64_t i = 0; i < channels; ++i) bias[i] = r.factor();
  const Packed mask(r, s.n * pixels, channels, 1, 1, false);
  const bool biased = r.chance(0.4), masked = r.chance(0.4), all = r.chance(0.5);
  const Fenced<int32_t> kept(some(r, s.n, all));
  const Sides sides(s, forward);
  current.about << (forward ? "output " : "grad_input ") << of_a << " by " << of_b << (of_row.shifted ? " a offset" : "")
                << (of_column.shifted ? " b offset" : "") << (biased ? " bias" : "") << (masked ? " mask" : "") << " kept "
                << kept.count;

  struct Met {
    int64_t pixel, tap;  // on the other side
  };
  std::vector<std::vector<Met>> met(pixels);
  for (int64_t p = 0; p < s.outputs(); ++p) {
    for (int64_t k = 0; k < taps; ++k) {
      if (const int64_t pixel = s.meets(p, k); pixel >= 0) met[forward ? p : pixel].push_back({forward ? pixel : p, k});
    }
  }
  std::vector<float> expected = Fenced<float>(s.n * pixels * channels).copy();
  for (int64_t j = 0; j < kept.count; ++j) {
    const int64_t n = kept.data[j];
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t group = c / columns, column = c % columns;
        Total total;
        for (const Met& m : met[p]) {
          for (int64_t i = 0; i < depth; ++i) {
            const int64_t o = forward ? c : group * depth + i;
            total.add(a.code[((n * others + m.pixel) * s.groups + group) * depth + i],
                      b.code[(o * taps + m.tap) * s.in + (forward ? i : column)]);
          }
        }
        const int64_t at = (n * pixels + p) * channels + c;
        float t = total.value(of_row.scale(n, p), of_column.scale(c, 0), of_row.offset_at(n, p), of_column.offset_at(c, 0));
        if (biased) t = t + bias[c];
        expected[at] = masked && mask.code[at] == 0 ? 0.0f : t;
      }
    }
  }
  const char* const name = name_of("integer_gather", "integer_gather.words", of_a, of_b);
  for (const Set& set : kSets) {
    if (!set.runs) continue;
    Fenced<float> result(s.n * pixels * channels);
    set.gather({sides.layer, a.integers(), b.integers(), depth, columns, !forward, of_row.scale.scale(), of_row.offsets(),
                of_column.scale.scale(), of_column.offsets(), biased ? bias.data : nullptr, masked ? mask.bytes.data : nullptr,
                all ? nullptr : kept.data, kept.count, result.data});
    same(name, set.name, result.data, expected);
    ++served[name][set.name];
  }
}

// axes: of g's scale, as in fqt/formats.py
void check_grad_weight(Random& r, const Shape& s, const std::string& axes, const Kind& of_g, const Kind& of_x) {
  const bool blocks = axes == "N" || axes == "NC", by_channel = axes == "C", channel_major = by_channel || axes == "NC";
  const int64_t outputs = s.outputs(), out = s.groups * s.out, in = s.groups * s.in, taps = s.taps(), rows = s.n * outputs;
  const Operand g(r, of_g, by_channel ? out : channel_major ? out * s.n : rows,
                  by_channel ? rows : channel_major ? outputs : out);
  const Operand x(r, of_x, s.n * s.pixels(), in);
  const Factors by_output(r, s.n, out, blocks, channel_major, true), by_input(r, 1, 1, false, false);
  const bool all = r.chance(0.5);
  const Fenced<int32_t> samples(some(r, s.n, all)), channels(some(r, out, r.chance(0.6)));
  const Sides sides(s, true);
  current.about << "grad_weight of " << of_g << " by " << of_x << " axes '" << axes << "'"
                << (by_output.shifted ? " g offset" : "") << (by_input.shifted ? " x offset" : "") << " samples "
                << samples.count << " channels " << channels.count;

  std::vector<float> expected(out * taps * s.in);
  for (int64_t row = 0; row < channels.count; ++row) {
    const int64_t o = channels.data[row];
    for (int64_t k = 0; k < taps; ++k) {
      for (int64_t i = 0; i < s.in; ++i) {
        float& grad = expected[(o * taps + k) * s.in + i];
        Total total;
        const auto value = [&](int64_t n) {
          return total.value(by_output.scale(n, o), by_input.scale(0, 0), by_output.offset_at(n, o), by_input.offset_at(0, 0));
        };
        for (int64_t j = 0; j < samples.count; ++j) {
          const int64_t n = samples.data[j];
          if (blocks) total = {};
          for (int64_t p = 0; p < outputs; ++p) {
            const int64_t pixel = s.meets(p, k);
            if (pixel < 0) continue;
            total.add(g.code[channel_major ? o * rows + n * outputs + p : (n * outputs + p) * out + o],
                      x.code[(n * s.pixels() + pixel) * in + o / s.out * s.in + i]);
          }
          if (blocks) grad = grad + value(n);
        }
        if (!blocks) grad = value(0);
      }
    }
  }
  const char* const name = name_of("integer_grad_weight", "integer_grad_weight.words", of_g, of_x);
  for (const Set& set : kSets) {
    if (!set.runs) continue;
    Fenced<float> grad(out * taps * s.in);
    std::fill(grad.data, grad.data + grad.count, 0.0f);
    set.grad_weight({sides.layer, g.integers(channel_major, by_channel), x.integers(), by_output.scale.scale(),
                     by_output.offsets(), by_input.scale(0, 0), by_input.offset_at(0, 0), blocks,
                     all ? nullptr : samples.data, channels.data, samples.count, channels.count, grad.data});
    same(name, set.name, grad.data, expected);
    ++served[name][set.name];
  }
}

// Positions of 1x1 windows count as samples or, where samples have scales of their own, as a line, as the operator has it.
Shape flattened(const Shape& s, bool blocks) {
  Shape made = s;
  made.n = blocks ? s.n : s.n * s.pixels();
  made.w = blocks ? s.pixels() : 1;
  made.h = 1;
  return made;
}

// Codes at their limits, of either sign, and as many terms as 16 bits, 32 bits or a run hold, give or take one.
void bounds() {
  pieces = 1;
  const auto complement = [](int bits) { return Kind{Meaning::complement, bits}; };
  const Kind sign{Meaning::sign, 1}, two{Meaning::natural, 2}, four{Meaning::natural, 4}, byte{Meaning::natural, 8};
  const std::pair<Kind, Kind> pairs[] = {
      {sign, sign}, {two, two}, {four, four}, {four, complement(5)}, {byte, sign}, {byte, byte}, {byte, complement(8)},
      {complement(8), complement(8)}, {complement(9), sign}, {complement(9), byte}, {complement(9), complement(9)},
      {complement(12), complement(12)}, {complement(16), sign}, {complement(16), byte}, {complement(16), complement(14)},
      {complement(15), complement(15)}, {complement(16), complement(15)}, {complement(16), complement(16)}};
  for (const auto& [one, other] : pairs) {
    const int64_t held = INT32_MAX / (one.largest() * other.largest()), of_half = INT32_MAX / (one.largest() * 255);
    const std::initializer_list<int64_t> terms = {held - 1, held, held + 1, 2 * held + 1, of_half, of_half + 1,
                                                  INT16_MAX / (one.largest() * other.largest()) + 1, 32768, 32769, 70'001};
    for (const int64_t count : terms) {
      if (count < 1 || count > 70'001) continue;
      for (const bool swapped : {false, true}) {
        for (const Fill fill : {Fill::low, Fill::high}) {
          for (const Fill against : {Fill::low, Fill::high}) {
            if ((count > 32769 && fill != against) || (swapped && one == other)) continue;
            Kind a = swapped ? other : one, b = swapped ? one : other;
            a.fill = fill, b.fill = against;
            const Shape s = linear(1, 1, count, 2, true), back = linear(1, 1, 2, count, true);
            bound(s, [&](Random& r) { check_gather(r, s, true, a, b); });
            bound(back, [&](Random& r) { check_gather(r, back, false, a, b); });
            if (a.bits + b.bits > kMostWeightBits) continue;
            const Shape g = linear(1, count, 2, 1, true), rows = flattened(g, false);
            bound(g, [&](Random& r) { check_grad_weight(r, g, r.choose<const char*>({"", "N", "C", "NC"}), a, b); });
            bound(rows, [&](Random& r) { check_grad_weight(r, rows, r.choose<const char*>({"", "C"}), a, b); });
          }
        }
      }
    }
  }
}

// Sums of more samples, positions or terms than the kernels take at a time.
void long_sums() {
  pieces = 3;
  Shape images;
  images.n = 130, images.h = images.w = 6, images.kh = images.kw = images.in = 3, images.out = 2, images.top = images.left = 1;
  const Shape samples = linear(9, 1000, 3, 2, false), positions = linear(1, 9000, 3, 2, false);
  for (const Shape& s : {images, samples, positions, flattened(samples, true), flattened(samples, false)}) {
    for (const char* axes : {"", "N", "C", "NC"}) {
      for (int i = 0; i < 4; ++i) {
        bound(s, [&](Random& r) {
          const auto [g, x] = random_kinds(r, false, kMostWeightBits);
          check_grad_weight(r, s, axes, g, x);
        });
      }
    }
  }
  for (const int bits : {3, 4, 7, 8}) {
    const Kind a{bits % 2 ? Meaning::complement : Meaning::natural, bits}, b{Meaning::complement, bits};
    const Shape s = linear(1, 3, 33'000, 16, false), back = linear(1, 3, 16, 33'000, false);
    bound(s, [&](Random& r) { check_gather(r, s, true, a, b); });
    bound(back, [&](Random& r) { check_gather(r, back, false, b, a); });
  }
}

}  // namespace

void integers(uint64_t seed, int64_t cases) {
  each_case(seed, cases, 4, [](Random& r) {
    const Shape s = random_shape(r);
    for (const bool forward : {true, false}) {
      current.about.str("");
      describe(s);
      const auto [a, b] = random_kinds(r, s.largest, 32);
      check_gather(r, s, forward, a, b);
    }
    const std::string axes = r.choose<const char*>({"", "N", "C", "NC"});
    const Shape of_g = s.linear() && r.chance(0.7) ? flattened(s, axes == "N" || axes == "NC") : s;
    current.about.str("");
    describe(of_g);
    const auto [g, x] = random_kinds(r, s.largest, kMostWeightBits);
    check_grad_weight(r, of_g, axes, g, x);
  });
  bounds();
  long_sums();
}

}  // namespace check
