// From values to codes: `round_rows` of fqt/reference/codes.py, and the random numbers that it draws (fqt/philox.py).

namespace {

struct Limits {
  Floats low, high;
  Ints mask;
  explicit Limits(const Encoding& e)
      : low(spread(static_cast<float>(e.low))), high(spread(static_cast<float>(e.high))),
        mask(static_cast<int32_t>((1ull << e.storage) - 1) - Ints{}) {}
};

// Codes as they are stored, in the low bits of an integer each.
template <bool kStochastic>
inline Ints coded(Floats v, Floats offset, Floats inverse, const Limits& limits, Floats u) {
  const Floats y = smaller(larger((v - offset) * inverse, limits.low), limits.high);
  if constexpr (kStochastic) {
    const Floats below = floor_of(y);
    return (__builtin_convertvector(below, Ints) - (Ints)(u < (y - below) * 0x1p24f)) & limits.mask;  // true is -1
  } else {
    return (Ints)(y + 0x1.8p23f) & limits.mask;  // rounds to even, and leaves the integer in the low bits
  }
}

constexpr int kVectors = 8;  // encoded at a time, two a counter
constexpr int64_t kStep = kVectors * kLanes;

// As `coded`, for codes whose floats leave no room for the trick that rounds there.
template <bool kStochastic>
inline Ints coded_word(Floats v, Floats offset, Floats inverse, const Limits& limits, Floats u) {
  const Floats y = smaller(larger((v - offset) * inverse, limits.low), limits.high);
  const Floats below = floor_of(y), rest = y - below, half = spread(0.5f);
  const Ints code = __builtin_convertvector(below, Ints);
  if constexpr (kStochastic) return code - (Ints)(u < rest * 0x1p24f);
  return code - ((Ints)(rest > half) | ((Ints)(rest == half) & -(code & 1)));  // ties to even
}

// The same in float64, for codes of more than 24 bits.
template <bool kStochastic>
inline Ints coded_double(Floats v, Floats offset, Floats inverse, const Encoding& e, Floats u) {
  const Floats shifted = v - offset;
  Ints code;
  for (int i = 0; i < kLanes; ++i) {
    double y = static_cast<double>(shifted[i]) * static_cast<double>(inverse[i]);
    y = y > e.low ? y : e.low;
    y = y < e.high ? y : e.high;
    const double even = (y + 0x1.8p52) - 0x1.8p52, below = even - (even > y ? 1.0 : 0.0);
    const double chosen = kStochastic ? below + (static_cast<double>(u[i]) < (y - below) * 0x1p24 ? 1.0 : 0.0) : even;
    code[i] = static_cast<int32_t>(chosen);
  }
  return code;
}

// Random numbers for 2 * kLanes elements a counter, in order.
struct Draws {
  Keys keys;
  Pairs group, stream, order;
  Draws(uint64_t key, uint32_t stream_number) : keys(key), group{}, stream(static_cast<uint64_t>(stream_number) - Pairs{}) {
    for (int i = 0; i < kLanes / 2; ++i) order[i] = i / 2 + i % 2 * (kLanes / 4);  // what interleaving puts in order
  }

  template <int kCounters>
  void operator()(uint32_t block, Floats (&u)[2 * kCounters]) const {
    Counters c[kCounters];
    for (int i = 0; i < kCounters; ++i) c[i] = {order + (block + i * (kLanes / 2)), group, stream, Pairs{}};
    philox(keys, c);
    for (int i = 0; i < kCounters; ++i) {
      const Pairs first = join(c[i].c0, c[i].c1), second = join(c[i].c2, c[i].c3);
      u[2 * i] = u24(interleave<0>(first, second));
      u[2 * i + 1] = u24(interleave<1>(first, second));
    }
  }
};

}  // namespace

void draws(uint64_t key, uint32_t stream, int64_t count, float* out) {
  const Draws draw(key, stream);
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    Floats u[2];
    draw.template operator()<1>(static_cast<uint32_t>(i / 4), u);
    std::memcpy(out + i, u, least(2 * kLanes, count - i) * sizeof(float));
  }
}
