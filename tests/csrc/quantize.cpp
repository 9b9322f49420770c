// Quantize and pack against loops over groups and their elements (fqt/formats.py, fqt/philox.py, fqt/reference/codes.py).

#include "tensors.h"

namespace check {
namespace {

using fqt::Grid;
using fqt::kInfinity;
using fqt::kNaN;
using fqt::Range;

struct Set {
  const char* name;
  bool runs;
  decltype(&fqt::portable::range) range;
  decltype(&fqt::portable::encode) encode;
  decltype(&fqt::portable::abs_sum) abs_sum;
  decltype(&fqt::portable::calibrate) calibrate;
  decltype(&fqt::portable::draws) draws;
};
#define FQT_ROW(set, runs) \
  {#set, bool(runs), fqt::set::range, fqt::set::encode, fqt::set::abs_sum, fqt::set::calibrate, fqt::set::draws},
const Set kSets[] = {FQT_FOR_EACH_ISA(FQT_ROW)};

// --- the model ---------------------------------------------------------------------------------------------------------------

float uniform_u24(uint64_t group, uint64_t element, uint32_t stream, uint64_t key) {
  uint32_t c[4] = {static_cast<uint32_t>(element / 4), static_cast<uint32_t>(group), stream, 0};
  uint32_t k[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  for (int round = 0; round < 10; ++round, k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, c);
  }
  return static_cast<float>(c[element % 4] >> 8);
}

// Over a binary tree: neighbours first, an odd one alone.
double tree_sum(std::vector<double> v) {
  if (v.empty()) return 0.0;
  while (v.size() > 1) {
    if (v.size() % 2) v.push_back(0.0);
    for (size_t i = 0; i < v.size() / 2; ++i) v[i] = v[2 * i] + v[2 * i + 1];
    v.resize(v.size() / 2);
  }
  return v[0];
}

struct Numbers {
  float scale, inverse, offset;
  bool keep() const { return scale == scale; }
};

Numbers calibrated(const fqt::Calibration& c, float low, float high, float mean) {
  float steps = c.low_code < 0 ? c.high_code : c.high_code - c.low_code;
  if (c.range == Range::none) {
    const float span = c.low_code < 0 ? c.last : c.last - c.first, reciprocal = 1.0f / c.first;
    if (low != low) return {kNaN, 0.0f, 0.0f};
    return {c.fixed ? c.first / c.low_code : span / steps, c.fixed ? reciprocal * c.low_code : steps / span,
            c.offset ? c.first : 0.0f};
  }
  float span = high - low, offset = low;
  if (c.range == Range::absmax) {
    span = low != low || high != high ? kNaN : std::max(high, -low);
    offset = span >= 0x1p-100f ? -span : 0.0f;
    if (c.offset) span = span * 2.0f;
  } else if (c.range == Range::absmean) {
    span = mean;
    steps = 1.0f;
  }
  if (!std::isfinite(span)) return {kNaN, 0.0f, 0.0f};
  const bool wide = span >= 0x1p-100f;
  return {wide ? span / steps : 0.0f, wide ? steps / span : 0.0f, c.offset ? offset : 0.0f};
}

// Real: float, or double for codes of more than 24 bits. A NaN is the smallest code.
template <class Real>
int64_t code_of(const fqt::Encoding& e, float v, const Numbers& group, float u24) {
  const float shifted = v - group.offset;
  const Real low = static_cast<Real>(e.low), high = static_cast<Real>(e.high);
  Real y = static_cast<Real>(shifted) * static_cast<Real>(group.inverse);
  y = y > low ? y : low;
  y = y < high ? y : high;
  const Real below = std::floor(y);
  const bool up = static_cast<Real>(u24) < (y - below) * static_cast<Real>(0x1p24);
  return static_cast<int64_t>(e.stochastic ? below + static_cast<Real>(up) : std::nearbyint(y));
}

// The code as it is stored. A NaN that no scale shows (of a fixed range) the operator clears.
uint32_t stored(const fqt::Encoding& e, int bits, float v, const Numbers& group, float u24) {
  if (e.grid == Grid::sign) return v >= 0.0f;
  const int64_t code = bits > 24 ? code_of<double>(e, v, group, u24) : code_of<float>(e, v, group, u24);
  return static_cast<uint32_t>(code & ((int64_t{1} << e.storage) - 1));
}

// Calls body(image, first row, end row) for stretches of rows, each a multiple of `step` but for the last.
template <class Body>
void each_stretch(Random r, const fqt::Plan& plan, int64_t step, const Body& body) {
  for (int64_t image = 0; image < plan.images; ++image) {
    for (int64_t first = 0, end; first < plan.rows; first = end) {
      end = r.chance(0.5) ? plan.rows : std::min(plan.rows, first + step * r.between(1, 1 + plan.rows / (3 * step)));
      body(image, first, end);
    }
  }
}

// --- the checks --------------------------------------------------------------------------------------------------------------

struct Strides {
  int64_t sn, sp, sc;
};

Strides layout(Random& r, int64_t n, int64_t p, int64_t c) {
  const int64_t gap = r.choose<int64_t>({0, 0, 3});
  switch (r.between(0, 6)) {
    case 0: return {c * (p + gap), 1, p + gap};                // positions innermost
    case 1: return {2 * c * p, 2 * c, 2};                      // every second of twice as many
    case 2: return {c, 0, 1};                                  // one position for all
    case 3: return {p, 1, 0};                                  // one channel for all
    case 4: return {1, n, n * p};                              // samples innermost
    default: return {(c + gap) * (p + gap), c + gap, 1};       // channels innermost
  }
}

// Where codes lie: code k at zero + k * step, from `bottom` to `top`. Values beyond low or high would alter the range.
struct Codes {
  double bottom, top, zero, step;
  float low, high;
};

Codes codes_of(const fqt::Calibration& c) {
  const double first = c.low_code, last = c.high_code, steps = last - first;
  const float low = -0.7f, high = 0.9f;
  if (c.fixed) return {first, last, 0.0, c.first / first, -kInfinity, kInfinity};
  if (c.range == Range::minmax) return {first, last, low, (high - low) / steps, low, high};
  if (c.range == Range::absmax && c.offset) return {first, last, -high, 2.0 * high / steps, -high, high};
  if (c.range != Range::none || first < 0.0) return {first, last, 0.0, high / last, -high, high};
  return {first, last, c.offset ? c.first : 0.0, (c.last - c.first) / steps, -kInfinity, kInfinity};
}

// Halfway between two codes, some of them the outermost or beyond, give or take a bit: where one rounding more or less is seen.
float edge(Random& r, const Codes& codes) {
  const double reach = std::ldexp(1.0, static_cast<int>(r.between(0, 24)));  // floats have ties of small codes only
  const double code = r.choose({codes.bottom + std::floor(r.uniform() * (codes.top - codes.bottom)),
                                std::floor(r.normal() * reach), codes.top - static_cast<double>(r.between(-1, 2)),
                                codes.bottom + static_cast<double>(r.between(-2, 1))});
  float v = static_cast<float>(codes.zero + (code + 0.5) * codes.step);
  for (int64_t nudges = r.between(0, 2); nudges > 0; --nudges) v = std::nextafter(v, r.choose({-kInfinity, kInfinity}));
  return std::min(std::max(v, codes.low), codes.high);
}

// Values of many kinds.
void fill(Random& r, Tensor& x, const Codes& codes) {
  const std::string kind = r.choose<const char*>({"normal", "normal", "normal", "special", "tiny", "huge", "constant", "zeros",
                                                  "ties", "negative zero", "edges", "edges"});
  const bool once = kind == "special" && r.chance(0.7);
  current.about << kind << " ";
  for (int64_t i = 0; i < x.extent(); ++i) {
    const float v = r.normal();
    x.set(i, kind == "tiny"            ? v * 1e-33f
             : kind == "huge"          ? v * 1e38f
             : kind == "constant"      ? 0.3f
             : kind == "zeros"         ? 0.0f
             : kind == "ties"          ? std::nearbyint(v * 16.0f) / 16.0f
             : kind == "negative zero" ? (v < 0.0f ? -0.0f : 0.0f)
             : kind == "special" && !once ? r.factor()
                                       : v);
    if (kind != "edges") continue;
    const bool limit = std::isfinite(codes.low) && (i == 0 || i == x.extent() - 1 || r.chance(0.05));
    x.set(i, limit ? (i == 0 || r.chance(0.5) ? codes.low : codes.high) : edge(r, codes));
  }
  if (once && x.extent() > 0) x.set(r.between(0, x.extent() - 1), r.choose({kNaN, kInfinity, -kInfinity}));
}

void check_calibrate(Random& r, const fqt::Calibration& c) {
  const int64_t count = r.size();
  Fenced<float> low(count), high(count), mean(count);
  std::vector<float> scale(count), inverse(count), offset(count);
  std::vector<uint8_t> keep(count);
  for (int64_t i = 0; i < count; ++i) {
    low[i] = r.factor(), high[i] = r.chance(0.1) ? low[i] : low[i] + std::fabs(r.factor()), mean[i] = std::fabs(r.factor());
    if (low[i] != low[i] || high[i] != high[i]) low[i] = high[i] = kNaN;
    const Numbers made = calibrated(c, low[i], high[i], mean[i]);
    scale[i] = made.scale, inverse[i] = made.inverse, offset[i] = made.offset, keep[i] = made.keep();
  }
  for (const Set& set : kSets) {
    if (!set.runs) continue;
    Fenced<float> to_scale(count), to_inverse(count), to_offset(count);
    Fenced<uint8_t> to_keep(count);
    set.calibrate(c, count, {low.data, high.data, mean.data}, to_scale.data, {to_inverse.data, to_offset.data, to_keep.data});
    same("calibrate", set.name, to_scale.data, scale);
    same("calibrate", set.name, to_inverse.data, inverse);
    same("calibrate", set.name, to_offset.data, offset);
    same("calibrate", set.name, to_keep.data, keep);
    ++served["calibrate"][set.name];
  }
}

void check_draws(Random& r) {
  const int64_t count = r.size();
  const uint64_t key = r.bits();
  const uint32_t stream = static_cast<uint32_t>(r.bits());
  std::vector<float> expected(count);
  for (int64_t i = 0; i < count; ++i) expected[i] = uniform_u24(0, i, stream, key);
  for (const Set& set : kSets) {
    if (!set.runs) continue;
    Fenced<float> out(count);
    set.draws(key, stream, count, out.data);
    same("draws", set.name, out.data, expected);
    ++served["draws"][set.name];
  }
}

// A tensor of random sizes and strides, which may be multiplied by another.
struct Input {
  int64_t n, p, c;
  Groups groups;
  Tensor x, factors;
  bool folded;

  const Tensor* fold() const { return folded ? &factors : nullptr; }
  int64_t elements() const { return n * p * c; }

  // Calls body(sample, position, channel, what is quantized, its group).
  template <class Body>
  void each(const Body& body) const {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < p; ++j) {
        for (int64_t k = 0; k < c; ++k) {
          const float value = folded ? x.get(i, j, k) * factors.get(i, j, k) : x.get(i, j, k);
          body(i, j, k, value, groups.group(i, j, k));
        }
      }
    }
  }
};

Input draw_input(Random& r) {
  int64_t n, p, c;
  do {
    n = r.choose<int64_t>({1, 1, 2, 3, 5, 16, 33});
    p = r.chance(0.03) ? r.between(2000, 4200) : std::max<int64_t>(1, r.size());
    c = r.chance(0.03) ? r.between(1000, 9000) : std::max<int64_t>(1, r.size());
  } while (n * p * c > 20'000);
  const Groups groups{r.choose<const char*>({"", "", "N", "NP", "C", "NC"}), n, p, c};
  const Strides s = layout(r, n, p, c);
  Tensor x(n, p, c, s.sn, s.sp, s.sc, r.chance(0.15));
  const bool folded = r.chance(0.2), f0 = r.chance(0.5), f1 = r.chance(0.3), f2 = r.chance(0.5);
  const int64_t of_p = f2 ? c : 1, of_n = of_p * (f1 ? p : 1);
  Tensor factors(n, p, c, f0 ? of_n : 0, f1 ? of_p : 0, f2, false);
  for (int64_t i = 0; i < factors.extent(); ++i) factors.set(i, r.normal());
  current.about << "quantize " << n << "x" << p << "x" << c << " axes '" << groups.axes << "' strides " << s.sn << "," << s.sp
                << "," << s.sc << (x.bfloat16 ? " bfloat16" : "") << (folded ? " folded " : " ");
  return {n, p, c, groups, std::move(x), std::move(factors), folded};
}

// A format, and how its range is found.
struct Grids {
  std::string grid;
  int bits;
  fqt::Calibration calibration;
  fqt::Encoding encoding;
};

Grids draw_format(Random& r) {
  const std::string grid = r.choose<const char*>({"sign", "uint", "uint", "int", "fixed", "fixed", "ternary"});
  const bool fixed = grid == "fixed", words = grid != "sign" && grid != "ternary" && r.chance(0.5);
  const int64_t narrow = r.between(grid == "int" ? 2 : 1, 8), wide = r.between(9, fixed ? 32 : 16);
  const int bits = static_cast<int>(grid == "sign"      ? 1
                                    : grid == "ternary" ? 2
                                    : !words            ? narrow
                                    : fixed             ? r.choose<int64_t>({16, 24, 25, 32, wide, wide})
                                                        : wide);
  const double half = std::ldexp(1.0, bits - 1);
  const double top = grid == "uint" ? 2.0 * half - 1.0 : fixed ? half - 1.0 : std::max(1.0, half - 1.0);
  const double bottom = grid == "uint" ? 0.0 : fixed ? -half : -top;
  const Range range = fixed ? Range::none
                      : grid == "sign" || grid == "ternary" ? r.choose({Range::absmean, Range::absmax, Range::none})
                      : grid == "uint" ? r.choose({Range::minmax, Range::absmax, Range::none}) : Range::absmax;
  const float reach = r.choose({1.0f, 0.7f, 0.3f, 4.0f});
  const fqt::Calibration calibration{range, grid == "uint" && r.chance(0.5) ? 0.0f : -reach, reach, static_cast<float>(bottom),
                                     static_cast<float>(top), grid == "uint" && r.chance(0.7), fixed};
  const fqt::Encoding encoding{grid == "sign" ? Grid::sign : Grid::uniform, storage_of(bits), bottom, top,
                               grid != "sign" && r.chance(0.6), r.bits(), static_cast<uint32_t>(r.bits()), nullptr, nullptr,
                               -1.0f, r.choose({1.0f, 0.5f})};
  return {grid, bits, calibration, encoding};
}

// The tensor's values; now and then fractions that equal their random numbers, which are rounded down.
void draw_values(Random& r, Input& in, Grids& of) {
  const fqt::Encoding& e = of.encoding;
  fqt::Calibration& by = of.calibration;
  fill(r, in.x, codes_of(by));
  if (by.range == Range::none && r.chance(0.3)) in.x.set(r.between(0, in.x.extent() - 1), kNaN);
  if (!e.stochastic || (of.grid != "uint" && !by.fixed) || !r.chance(0.2)) return;
  by = {Range::none, by.low_code, by.high_code, by.low_code, by.high_code, false, by.fixed};
  for (int64_t i = 0; i < in.elements(); ++i) {
    const int64_t n = i / in.c / in.p, p = i / in.c % in.p, c = i % in.c;
    const uint64_t group = in.groups.group(n, p, c), element = in.groups.element(n, p, c);
    in.x.set(in.x.at(n, p, c), uniform_u24(group, element, e.stream, e.key) * 0x1p-24f);
  }
}

// How a tensor is cut: `inside`: whether channels are columns, else positions are.
struct Cuts {
  bool inside, merged;
  fqt::Plan plan;
};

// Positions may be columns where codes and random numbers begin where bytes and counters do. False if there is no way.
bool draw_cuts(Random& r, const Input& in, const Grids& of, Cuts& made) {
  const Groups& groups = in.groups;
  const int storage = of.encoding.storage;
  const bool by_channel = groups.by_channel(), channel = groups.axes == "C", tensor = groups.axes.empty();
  const bool merges = in.x.merges() && (!in.folded || in.factors.merges()), bytes = !channel || in.n == 1 || in.p % 8 == 0;
  bool inside = r.chance(0.5) || (!by_channel && of.encoding.stochastic && groups.axes != "NP" && in.c % 4 != 0);
  bool merged = inside && (tensor || channel) && merges && r.chance(0.7);
  if (!bytes && !merged) {
    if (!merges) return false;
    inside = merged = true;
  }
  int64_t recut = 0;
  if (inside && !by_channel && groups.axes != "NP" && r.chance(0.7)) {
    const fqt::Plan plain = cut(in.x, in.fold(), groups, storage, inside, merged, 0);
    const bool dense = !plain.direct || plain.rows == 1 || plain.x.stride.row == in.c;
    if (dense && (plain.rows == 1 || in.c % 8 == 0)) recut = r.choose<int64_t>({8, 64, 512, 1000, 4096});
  }
  current.about << of.grid << of.bits << (of.encoding.stochastic ? " stochastic" : "")
                << (inside ? " channels inside" : " positions inside") << (merged ? " merged" : "") << " recut " << recut
                << " range " << static_cast<int>(of.calibration.range);
  made = {inside, merged, cut(in.x, in.fold(), groups, storage, inside, merged, recut)};
  return true;
}

// What straight loops find, by group; and the codes and the mask that they make.
struct Found {
  std::vector<float> low, high;
  std::vector<std::vector<double>> sizes;  // |x| of each element of a group
  std::vector<double> sums;
  std::vector<Numbers> numbers;
  std::vector<uint8_t> keep, codes, mask;
  bool look, nan;  // look: nobody looks at the range, so that encoding has to look for a NaN

  Found(Random& r, const Input& in, const Grids& of)
      : low(in.groups.count(), kInfinity), high(in.groups.count(), -kInfinity),
        sizes(in.groups.count(), std::vector<double>(in.groups.elements())), codes(in.groups.bytes(of.encoding.storage)),
        mask(in.n * in.p * bytes_of(in.c, 1)), look(of.calibration.range == Range::none && in.groups.count() == 1), nan(false) {
    in.each([&](int64_t i, int64_t j, int64_t k, float v, int64_t g) {
      nan |= v != v;
      low[g] = v != v || low[g] != low[g] ? kNaN : std::min(low[g], v);
      high[g] = v != v || high[g] != high[g] ? kNaN : std::max(high[g], v);
      sizes[g][in.groups.element(i, j, k)] = std::fabs(v);
    });
    for (size_t g = 0; g < low.size(); ++g) {
      sums.push_back(tree_sum(sizes[g]));
      const float mean = static_cast<float>(sums[g] / static_cast<double>(in.groups.elements()));
      numbers.push_back(calibrated(of.calibration, look ? 0.0f : low[g], high[g], mean));
    }
    const bool prune = !look && r.chance(0.3);
    for (const Numbers& made : numbers) keep.push_back(made.keep() && !(prune && r.chance(0.6)));
    encode(in, of);
    for (size_t g = 0; g < low.size(); ++g) low[g] += 0.0f, high[g] += 0.0f;  // which of two zeros is smaller is free
  }

 private:
  void encode(const Input& in, const Grids& of) {
    const fqt::Encoding& e = of.encoding;
    in.each([&](int64_t i, int64_t j, int64_t k, float v, int64_t g) {
      const float u24 = e.stochastic ? uniform_u24(g, in.groups.element(i, j, k), e.stream, e.key) : 0.0f;
      const int64_t bit = in.groups.bit(i, j, k, e.storage);
      if (keep[g]) put(codes.data() + bit / 8, bit % 8 / e.storage, e.storage, stored(e, of.bits, v, numbers[g], u24));
      const float plain = in.x.get(i, j, k);
      put(mask.data() + (i * in.p + j) * bytes_of(in.c, 1), k, 1, plain >= e.pass_low && plain <= e.pass_high);
    });
  }
};

int64_t group_of(const fqt::Plan& plan, int64_t image, int64_t first, int64_t slot) {
  return plan.group.at(image, plan.parts == Parts::rows ? first + slot : 0, plan.parts == Parts::columns ? slot : 0);
}

void check_range(const Set& set, const Random& stretches, const fqt::Plan& plan, const Found& found) {
  std::vector<float> low(found.low.size(), kInfinity), high(found.low.size(), -kInfinity);
  each_stretch(stretches, plan, 1, [&](int64_t image, int64_t first, int64_t end) {
    Fenced<float> lows(plan.slots(end - first)), highs(lows.count);
    set.range(plan, {image, first, end}, lows.data, highs.data);
    for (int64_t slot = 0; slot < lows.count; ++slot) {
      float &a = low[group_of(plan, image, first, slot)], &b = high[group_of(plan, image, first, slot)];
      a = a != a || lows[slot] != lows[slot] ? kNaN : std::min(a, lows[slot] + 0.0f);
      b = b != b || highs[slot] != highs[slot] ? kNaN : std::max(b, highs[slot] + 0.0f);
    }
  });
  same("range", set.name, low.data(), found.low);
  same("range", set.name, high.data(), found.high);
  ++served["range"][set.name];
}

void check_abs_sum(const Set& set, const fqt::Plan& ordered, int64_t elements, const Found& found) {
  const int64_t count = static_cast<int64_t>(found.sums.size());
  std::vector<double> sums;
  for (int64_t g = 0; g < count; ++g) sums.push_back(set.abs_sum(ordered, g, 0, elements));
  same("abs_sum", set.name, sums.data(), found.sums);
  for (int64_t first = 0; first < elements; first += 1024) {  // parts are subtrees
    const int64_t end = std::min<int64_t>(first + 1024, elements);
    const double part = set.abs_sum(ordered, count - 1, first, end - first);
    const auto from = found.sizes[count - 1].begin();
    same("abs_sum", set.name, &part, std::vector<double>{tree_sum({from + first, from + end})});
  }
  ++served["abs_sum"][set.name];
}

// Codes, the mask or both (null: not this one); returns whether a NaN was found.
bool encode(const Set& set, const Random& stretches, const fqt::Plan& plan, fqt::Encoding call, const Found& found) {
  bool nan = false;
  const int64_t step = plan.along ? 1 : fqt::kLineBits / call.storage;
  each_stretch(stretches, plan, step, [&](int64_t image, int64_t first, int64_t end) {
    Fenced<float> inverse(plan.along ? plan.slots(end - first) : plan.columns), offset(inverse.count);
    Fenced<uint8_t> kept(inverse.count);
    for (int64_t slot = 0; slot < inverse.count && call.codes != nullptr; ++slot) {
      const int64_t g = group_of(plan, image, first, slot);
      inverse[slot] = found.numbers[g].inverse, offset[slot] = found.numbers[g].offset, kept[slot] = found.keep[g];
    }
    const bool look = call.codes != nullptr && found.look;
    nan |= set.encode(plan, call, {image, first, end}, {inverse.data, offset.data, kept.data}, look);
  });
  return nan;
}

void check_encode(const Set& set, const Random& stretches, const Grids& of, const fqt::Plan& plan, const fqt::Plan* mask_plan,
                  const Found& found) {
  Fenced<uint8_t> codes(static_cast<int64_t>(found.codes.size())), mask(static_cast<int64_t>(found.mask.size()));
  fqt::Encoding call = of.encoding;
  call.codes = codes.data, call.mask = mask_plan == nullptr ? mask.data : nullptr;
  const bool nan = encode(set, stretches, plan, call, found);
  if (mask_plan != nullptr) {
    call.codes = nullptr, call.mask = mask.data;
    encode(set, stretches, *mask_plan, call, found);
  }
  const char* const name = of.bits > 8 ? "encode.words" : "encode";
  same(name, set.name, &nan, std::vector<bool>{found.look && found.nan});
  same(name, set.name, codes.data, found.codes);
  same(name, set.name, mask.data, found.mask);
  ++served[name][set.name];
}

void check_case(Random& r) {
  Input in = draw_input(r);
  Grids of = draw_format(r);
  draw_values(r, in, of);
  Cuts cuts;
  if (!draw_cuts(r, in, of, cuts)) return;
  const Found found(r, in, of);

  const bool by_channel = in.groups.by_channel(), mask_with_codes = !in.folded && !by_channel && r.chance(0.7);
  const bool merges = in.x.merges() && (!in.folded || in.factors.merges());
  const fqt::Plan mask_plan = cut(in.x, nullptr, Groups{"", in.n, in.p, in.c}, 1, cuts.inside, false, 0);
  const fqt::Plan ordered = cut(in.x, in.fold(), in.groups, of.encoding.storage, !by_channel,
                                !by_channel && in.groups.axes.empty() && merges, 0);
  const Random stretches = r;
  for (const Set& set : kSets) {
    if (!set.runs) continue;
    check_range(set, stretches, cuts.plan, found);
    check_abs_sum(set, ordered, in.groups.elements(), found);
    check_encode(set, stretches, of, cuts.plan, mask_with_codes ? nullptr : &mask_plan, found);
  }
  check_calibrate(r, of.calibration);
  check_draws(r);
}

}  // namespace

void quantize(uint64_t seed, int64_t cases) { each_case(seed, cases, 0, check_case); }

}  // namespace check
