// Quantize and pack on a CPU: the loops of fqt/reference.py's `group_range`, `absmean`, `calibrate_groups`, `encode`, `pack`
// and `pass_mask`. quantize.cpp decides how a tensor is cut (`Plan`) and calls them for some rows of an image at a time.
//
// This file is included once for each instruction set, inside a namespace of its own. No fused multiply-add may be formed
// (-ffp-contract=off): every float must round as the reference's.

namespace {

constexpr int64_t kChunk = 512;  // floats copied, encoded or added at a time: they stay in L1
constexpr int64_t kTile = 64;    // columns that codes are packed across at a time

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t width(const Plan& p, int64_t row) { return row == p.rows - 1 ? p.last : p.columns; }

// Copies a run of a row to a dense buffer.
inline void copy(const Source& s, int64_t at, int64_t count, float* to) {
  const int64_t step = s.stride.column;
  if (s.bfloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(s.data) + at;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i * step]) << 16;
      std::memcpy(to + i, &bits, 4);
    }
    return;
  }
  const float* from = static_cast<const float*>(s.data) + at;
  if (step == 1) {
    std::memcpy(to, from, count * sizeof(float));
  } else {
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
  }
}

inline void multiply(const Source& fold, int64_t at, int64_t count, float* to) {
  const int64_t step = fold.stride.column;
  const float* factor = static_cast<const float*>(fold.data) + at;
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] *= factor[i];
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] *= factor[i * step];
  }
}

// `count` columns of a row: where they lie, or copied to `buffer` (widened, folded).
inline const float* fetch(const Plan& p, int64_t image, int64_t row, int64_t column, int64_t count, float* buffer) {
  if (p.direct) {
    return static_cast<const float*>(p.x.data) + image * p.x.stride.image + row * p.row_step + column;
  }
  const int64_t flat = row * p.columns + column;
  int64_t in_row = flat / p.inner, at = flat % p.inner;
  float* to = buffer;
  while (count > 0) {
    const int64_t run = least(count, p.inner - at);
    copy(p.x, p.x.stride.at(image, in_row, at), run, to);
    if (p.fold.data != nullptr) multiply(p.fold, p.fold.stride.at(image, in_row, at), run, to);
    to += run;
    count -= run;
    at = 0;
    ++in_row;
  }
  return buffer;
}

inline bool has_nan(const float* v, int64_t count) {
  uint32_t nan = 0;
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    nan |= unordered(load(v + i), load(v + i + kLanes)) | unordered(load(v + i + 2 * kLanes), load(v + i + 3 * kLanes));
  }
  for (; i < count; ++i) nan |= v[i] != v[i];
  return nan != 0;
}

// --- ranges ------------------------------------------------------------------------------------------------------------------

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
inline void column_range(const Plan& p, int64_t image, int64_t first_row, int64_t end_row, float* low, float* high) {
  constexpr int kRows = 8;
  alignas(64) float buffer[kRows][kChunk];
  const int64_t block = p.direct ? p.columns : kChunk;
  for (int64_t c = 0; c < p.columns; ++c) low[c] = kInfinity, high[c] = -kInfinity;
  for (int64_t r = first_row; r < end_row; r += kRows) {
    for (int64_t column = 0; column < p.columns; column += block) {
      const int64_t count = least(block, p.columns - column);
      float *lows = low + column, *highs = high + column;
      const float* rows[kRows];
      for (int i = 0; i < kRows; ++i) rows[i] = fetch(p, image, least(r + i, end_row - 1), column, count, buffer[i]);
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

// --- codes along a row -------------------------------------------------------------------------------------------------------

struct Limits {
  Floats low, high;
  Ints mask;
  explicit Limits(const Encoding& e)
      : low(spread(static_cast<float>(e.low))), high(spread(static_cast<float>(e.high))), mask(static_cast<int32_t>((1ull << e.storage) - 1) - Ints{}) {}
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

// Elements of a group from element 4 * `block` on, `count` a multiple of kStep.
template <bool kStochastic>
inline void encode_chunk(const float* v, int64_t count, const Limits& limits, float offset, float inverse, const Draws& draws,
                         uint32_t block, uint8_t* codes) {
  const Floats offsets = spread(offset), inverses = spread(inverse);
  for (int64_t i = 0; i < count; i += kStep) {
    Floats u[kVectors] = {};
    if constexpr (kStochastic) draws.template operator()<kVectors / 2>(block + static_cast<uint32_t>(i / 4), u);
    Ints code[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      code[j] = coded<kStochastic>(load(v + i + j * kLanes), offsets, inverses, limits, u[j]);
    }
    for (int j = 0; j < kVectors; j += 4) store_bytes(code + j, codes + i + j * kLanes);
  }
}

// Stored codes, one a byte, to `bits` bits each, the first in the lowest bits; the last byte is filled with zeros.
inline void pack(uint8_t* codes, int64_t count, int bits, uint8_t* out) {
  const int lanes = 8 / bits;
  const int64_t bytes = (count + lanes - 1) / lanes;
  std::memset(codes + count, 0, bytes * lanes - count);
  if (bits == 8) {
    std::memcpy(out, codes, bytes);
  } else if (bits == 4) {
    for (int64_t i = 0; i < bytes; ++i) out[i] = codes[2 * i] | codes[2 * i + 1] << 4;
  } else if (bits == 2) {
    for (int64_t i = 0; i < bytes; ++i) {
      out[i] = codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6;
    }
  } else {
    for (int64_t i = 0; i < bytes; ++i) {
      uint8_t byte = 0;
      for (int j = 0; j < 8; ++j) byte |= codes[8 * i + j] << j;
      out[i] = byte;
    }
  }
}

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

// As `encode_chunk`, to codes of 16 or 32 bits.
template <class Word, bool kStochastic>
inline void encode_words(const float* v, int64_t count, const Encoding& e, const Limits& limits, float offset, float inverse,
                         const Draws& draws, uint32_t block, Word* codes) {
  typedef Word Stored __attribute__((vector_size(sizeof(Word) * kLanes)));
  const Floats offsets = spread(offset), inverses = spread(inverse);
  const bool doubles = e.high >= 0x1p24 - 1;
  for (int64_t i = 0; i < count; i += kStep) {
    Floats u[kVectors] = {};
    if constexpr (kStochastic) draws.template operator()<kVectors / 2>(block + static_cast<uint32_t>(i / 4), u);
    for (int j = 0; j < kVectors; ++j) {
      const Floats from = load(v + i + j * kLanes);
      const Ints code = doubles ? coded_double<kStochastic>(from, offsets, inverses, e, u[j])
                                : coded_word<kStochastic>(from, offsets, inverses, limits, u[j]);
      store(codes + i + j * kLanes, __builtin_convertvector(code, Stored));
    }
  }
}

// At most kChunk elements of a group from `element` on.
inline void encode_run(const Encoding& e, const Limits& limits, const Draws& draws, const float* v, int64_t count,
                       float offset, float inverse, int64_t element, uint8_t* out) {
  alignas(64) float moved[kChunk + 4 + kStep];
  alignas(64) uint8_t codes[4 * (kChunk + 4 + kStep) + 8];
  // whole counters and whole vectors: what is not is moved to where it is
  const int64_t lead = e.stochastic ? element % 4 : 0;
  const int64_t padded = (lead + count + kStep - 1) / kStep * kStep;
  if (padded != count) {
    std::memset(moved, 0, lead * sizeof(float));
    std::memcpy(moved + lead, v, count * sizeof(float));
    std::memset(moved + lead + count, 0, (padded - lead - count) * sizeof(float));
    v = moved;
  }
  const uint32_t block = static_cast<uint32_t>(element / 4);
  const auto words = [&](auto* to) {
    using Word = std::remove_pointer_t<decltype(to)>;
    if (e.stochastic) {
      encode_words<Word, true>(v, padded, e, limits, offset, inverse, draws, block, to);
    } else {
      encode_words<Word, false>(v, padded, e, limits, offset, inverse, draws, block, to);
    }
    std::memcpy(out, to + lead, count * sizeof(Word));
  };
  if (e.storage == 16) return words(reinterpret_cast<int16_t*>(codes));
  if (e.storage == 32) return words(reinterpret_cast<int32_t*>(codes));
  if (e.stochastic) {
    encode_chunk<true>(v, padded, limits, offset, inverse, draws, block, codes);
  } else {
    encode_chunk<false>(v, padded, limits, offset, inverse, draws, block, codes);
  }
  pack(codes + lead, count, e.storage, out);
}

// One bit for each element, of `test`; the last byte is filled with zeros.
template <class Test>
inline void bits_run(const float* v, int64_t count, const Test& test, uint8_t* out) {
  const auto eight_bytes = [&](const float* from) {
    uint64_t bits = 0;
    for (int j = 0; j < 64; j += kLanes) bits |= static_cast<uint64_t>(test(load(from + j))) << j;
    return bits;
  };
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) store(out + i / 8, eight_bytes(v + i));
  if (i == count) return;
  alignas(64) float rest[64] = {};
  std::memcpy(rest, v + i, (count - i) * sizeof(float));
  const uint64_t bits = eight_bytes(rest) & ((uint64_t{1} << (count - i)) - 1);
  std::memcpy(out + i / 8, &bits, (count - i + 7) / 8);
}

inline bool encode_along(const Plan& p, const Encoding& e, int64_t image, int64_t first_row, int64_t end_row,
                         const Slots& slots, bool look_for_nan) {
  alignas(64) float buffer[kChunk];
  const Limits limits(e);
  Draws draws(e.key, e.stream);
  const Floats pass_low = spread(e.pass_low), pass_high = spread(e.pass_high);
  const auto sign = [](Floats v) { return at_least(v, Floats{}); };
  const auto inside = [&](Floats v) { return at_least(v, pass_low) & at_least(pass_high, v); };
  bool nan = false;
  for (int64_t row = first_row; row < end_row; ++row) {
    const int64_t slot = p.parts == Parts::rows ? row - first_row : 0, columns = width(p, row);
    draws.group = static_cast<uint64_t>(p.group.at(image, row, 0)) - Pairs{};
    for (int64_t column = 0; column < columns; column += kChunk) {
      const int64_t count = least(kChunk, columns - column);
      const float* v = fetch(p, image, row, column, count, buffer);
      if (look_for_nan) nan |= has_nan(v, count);
      if (e.mask != nullptr) bits_run(v, count, inside, e.mask + p.mask.at(image, row, 0) + column / 8);
      if (e.codes == nullptr) continue;
      uint8_t* out = e.codes + p.byte.at(image, row, 0) + column * e.storage / 8;
      if (!slots.keep[slot]) {
        std::memset(out, 0, (count * e.storage + 7) / 8);
      } else if (e.grid == Grid::sign) {
        bits_run(v, count, sign, out);
      } else {
        const int64_t element = p.element.at(image, row, column);
        encode_run(e, limits, draws, v, count, slots.offset[slot], slots.inverse[slot], element, out);
      }
    }
  }
  return nan;
}

// --- codes across the columns ------------------------------------------------------------------------------------------------

// The columns of a tile: those of `kept` groups, with their numbers.
struct Lanes {
  int64_t column[kTile];
  alignas(64) float inverse[kTile], offset[kTile];
  alignas(64) uint32_t group[kTile], block[kTile];  // block: number of a group's first element, over 4
};

// 32 bits of packed codes for kLanes columns from `lane` on, of 32 / kBits rows of which the first is element 4 * `block`.
template <int kBits, bool kStochastic>
inline Words packed_word(const float* const* rows, int lane, const Lanes& lanes, const Limits& limits, const Keys& keys,
                         uint32_t stream, uint32_t block) {
  const Floats offset = load(lanes.offset + lane), inverse = load(lanes.inverse + lane);
  const Words groups = load_as<Words>(lanes.group + lane), blocks = load_as<Words>(lanes.block + lane) + block;
  constexpr int kRows = 32 / kBits, kTogether = kRows < 8 ? kRows : kVectors;
  Words word{};
  for (int r = 0; r < kRows; r += kTogether) {
    Floats u[kTogether] = {};
    if constexpr (kStochastic) {
      const Pairs c2 = static_cast<uint64_t>(stream) - Pairs{};
      Counters c[kTogether / 2];
      for (int i = 0; i < kTogether / 4; ++i) {
        const Words c0 = blocks + static_cast<uint32_t>(r / 4 + i);
        c[2 * i] = {(Pairs)c0, (Pairs)groups, c2, Pairs{}};
        c[2 * i + 1] = {(Pairs)c0 >> 32, (Pairs)groups >> 32, c2, Pairs{}};
      }
      philox(keys, c);
      for (int i = 0; i < kTogether / 4; ++i) {
        const Counters &even = c[2 * i], &odd = c[2 * i + 1];
        u[4 * i] = u24(join(even.c0, odd.c0));
        u[4 * i + 1] = u24(join(even.c1, odd.c1));
        u[4 * i + 2] = u24(join(even.c2, odd.c2));
        u[4 * i + 3] = u24(join(even.c3, odd.c3));
      }
    }
    for (int j = 0; j < kTogether; ++j) {
      const Ints code = coded<kStochastic>(load(rows[r + j] + lane), offset, inverse, limits, u[j]);
      word |= (Words)code << (kBits * (r + j));
    }
  }
  return word;
}

// Packs down the columns: four cache lines of codes of each column of a tile at a time.
// make(rows, lane, lanes, row): kLanes words of packed codes.
template <int kBits, class Make>
inline bool across(const Plan& p, int64_t image, int64_t first_row, int64_t end_row, const Slots* slots, uint8_t* codes,
                   const Affine& byte, bool look_for_nan, const Make& make) {
  constexpr int64_t kRows = 32 / kBits, kWords = kLineBits / 32;
  alignas(64) float buffer[kChunk], picked[kRows][kTile] = {};
  alignas(64) uint32_t words[kWords][kTile];
  Lanes lanes;
  bool nan = false;
  codes += byte.at(image, 0, 0) + first_row * kBits / 8;
  for (int64_t column = 0; column < p.columns;) {
    int n = 0;
    while (column < p.columns && n < kTile && (n == 0 || column - lanes.column[0] < kChunk)) {
      if (slots == nullptr || slots->keep[column]) {
        lanes.column[n++] = column;
      } else {
        std::memset(codes + column * byte.column, 0, ((end_row - first_row) * kBits + 7) / 8);
      }
      ++column;
    }
    if (n == 0) continue;
    const int padded = (n + kLanes - 1) / kLanes * kLanes;
    const int64_t first = lanes.column[0], span = lanes.column[n - 1] - first + 1;
    for (int i = n; i < padded; ++i) lanes.column[i] = first;
    const uint32_t group = static_cast<uint32_t>(p.group.at(image, 0, 0)), step = static_cast<uint32_t>(p.group.column);
    const uint32_t block = static_cast<uint32_t>(p.element.at(image, 0, 0) / 4);
    const uint32_t block_step = static_cast<uint32_t>(p.element.column / 4);
    for (int i = 0; slots != nullptr && i < padded; ++i) {
      const uint32_t c = static_cast<uint32_t>(lanes.column[i]);
      lanes.inverse[i] = slots->inverse[c];
      lanes.offset[i] = slots->offset[c];
      lanes.group[i] = group + c * step;
      lanes.block[i] = block + c * block_step;
    }
    for (int64_t top = first_row; top < end_row; top += kWords * kRows) {
      const int64_t height = least(kWords * kRows, end_row - top), count = (height + kRows - 1) / kRows;
      for (int64_t w = 0; w < count; ++w) {
        const float* rows[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t row = top + least(w * kRows + r, height - 1);
          rows[r] = fetch(p, image, row, first, span, span == n ? picked[r] : buffer);
          if (span != n) {
#pragma GCC unroll 4
            for (int i = 0; i < n; ++i) picked[r][i] = rows[r][lanes.column[i] - first];
            rows[r] = picked[r];
          } else if (p.direct && n < padded && rows[r] + padded > static_cast<const float*>(p.x.data) + p.extent) {
            std::memcpy(picked[r], rows[r], n * sizeof(float));
            rows[r] = picked[r];
          }
          if (look_for_nan) nan |= has_nan(rows[r], n);
        }
        for (int lane = 0; lane < padded; lane += kLanes) {
          store(words[w] + lane, make(rows, lane, lanes, top + w * kRows));
        }
      }
      const int64_t whole = height / kRows, bits = height % kRows * kBits;
      for (int i = 0; i < n; ++i) {  // no call to memcpy: a column's codes may be few
        uint8_t* to = codes + lanes.column[i] * byte.column + (top - first_row) * kBits / 8;
        for (int64_t w = 0; w < whole; ++w) std::memcpy(to + 4 * w, &words[w][i], 4);
        for (int64_t bit = 0; bit < bits; bit += 8) {
          const uint32_t used = bits - bit < 8 ? (1u << (bits - bit)) - 1 : 255;
          to[4 * whole + bit / 8] = static_cast<uint8_t>(words[whole][i] >> bit & used);
        }
      }
    }
  }
  return nan;
}

// `bit` of a vector as its lanes' bit 0, for `across`.
template <class Test>
inline bool bits_across(const Plan& p, int64_t image, int64_t first_row, int64_t end_row, const Slots* slots, uint8_t* out,
                        const Affine& byte, bool look_for_nan, const Test& test) {
  return across<1>(p, image, first_row, end_row, slots, out, byte, look_for_nan,
                   [&](const float* const* rows, int lane, const Lanes&, int64_t) {
                     Words word{};
                     for (int r = 0; r < 32; ++r) word |= (Words)test(load(rows[r] + lane)) & (1u << r);
                     return word;
                   });
}

template <int kBits>
inline bool codes_across(const Plan& p, const Encoding& e, int64_t image, int64_t first_row, int64_t end_row,
                         const Slots& slots, bool look_for_nan) {
  const Limits limits(e);
  const Keys keys(e.key);
  const int64_t first = p.element.at(image, 0, 0);
  const auto with = [&](auto stochastic) {
    return across<kBits>(p, image, first_row, end_row, &slots, e.codes, p.byte, look_for_nan,
                         [&](const float* const* rows, int lane, const Lanes& lanes, int64_t row) {
                           const uint32_t block = static_cast<uint32_t>((p.element.at(image, row, 0) - first) / 4);
                           return packed_word<kBits, decltype(stochastic)::value>(rows, lane, lanes, limits, keys, e.stream,
                                                                                  block);
                         });
  };
  return e.stochastic ? with(std::true_type{}) : with(std::false_type{});
}

// Codes of 16 and 32 bits: tiles are turned, then encoded along what were columns.
inline bool words_across(const Plan& p, const Encoding& e, int64_t image, int64_t first_row, int64_t end_row,
                         const Slots& slots, bool look_for_nan) {
  constexpr int64_t kDown = 128, kBeside = 16;
  alignas(64) float buffer[kBeside], turned[kDown * kBeside];
  const Limits limits(e);
  Draws draws(e.key, e.stream);
  const int64_t size = e.storage / 8;
  uint8_t* const codes = e.codes + p.byte.at(image, 0, 0);
  bool nan = false;
  for (int64_t first = 0; first < p.columns; first += kBeside) {
    const int64_t width = least(kBeside, p.columns - first);
    for (int64_t top = first_row; top < end_row; top += kDown) {
      const int64_t height = least(kDown, end_row - top);
      for (int64_t r = 0; r < height; ++r) {
        const float* row = fetch(p, image, top + r, first, width, buffer);
        for (int64_t i = 0; i < width; ++i) turned[i * height + r] = row[i];
      }
      if (look_for_nan) nan |= has_nan(turned, width * height);
      // columns that follow each other in memory and in their group are one run
      const bool joined = p.parts == Parts::whole && height == p.rows && p.byte.column == height * size &&
                          p.element.column == height;
      const int64_t run = joined ? width * height : height;
      for (int64_t at = 0; at < width * height; at += run) {
        const int64_t column = first + at / height;
        uint8_t* const to = codes + column * p.byte.column + top * size;
        if (!slots.keep[column]) {
          std::memset(to, 0, run * size);
          continue;
        }
        draws.group = static_cast<uint64_t>(p.group.at(image, 0, column)) - Pairs{};
        const int64_t element = p.element.at(image, top, column);
        for (int64_t i = 0; i < run; i += kChunk) {
          encode_run(e, limits, draws, turned + at + i, least(kChunk, run - i), slots.offset[column], slots.inverse[column],
                     element + i, to + i * size);
        }
      }
    }
  }
  return nan;
}

inline bool encode_across(const Plan& p, const Encoding& e, int64_t image, int64_t first_row, int64_t end_row,
                          const Slots& slots, bool look_for_nan) {
  if (e.mask != nullptr) {
    const Floats low = spread(e.pass_low), high = spread(e.pass_high);
    bits_across(p, image, first_row, end_row, nullptr, e.mask, p.mask, false,
                [=](Floats v) { return (Ints)(v >= low) & (Ints)(v <= high); });
  }
  if (e.codes == nullptr) return false;
  if (e.grid == Grid::sign) {
    return bits_across(p, image, first_row, end_row, &slots, e.codes, p.byte, look_for_nan,
                       [zero = Floats{}](Floats v) { return (Ints)(v >= zero); });
  }
  if (e.storage > 8) return words_across(p, e, image, first_row, end_row, slots, look_for_nan);
  switch (e.storage) {
    case 1: return codes_across<1>(p, e, image, first_row, end_row, slots, look_for_nan);
    case 2: return codes_across<2>(p, e, image, first_row, end_row, slots, look_for_nan);
    case 4: return codes_across<4>(p, e, image, first_row, end_row, slots, look_for_nan);
    default: return codes_across<8>(p, e, image, first_row, end_row, slots, look_for_nan);
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

void range(const Plan& p, int64_t image, int64_t first_row, int64_t end_row, float* low, float* high) {
  if (p.parts == Parts::columns) return column_range(p, image, first_row, end_row, low, high);
  alignas(64) float buffer[kChunk];
  Extremes all;
  if (p.parts == Parts::whole && p.direct && p.inner == p.columns && p.x.stride.row == p.columns) {  // order does not matter
    all.add(fetch(p, image, first_row, 0, 0, buffer), (end_row - first_row - 1) * p.columns + width(p, end_row - 1));
    return all.finish(low, high);
  }
  for (int64_t row = first_row; row < end_row; ++row) {
    const int64_t columns = width(p, row), block = p.direct ? columns : kChunk;
    Extremes one;
    Extremes& extremes = p.parts == Parts::whole ? all : one;
    for (int64_t column = 0; column < columns; column += block) {
      const int64_t count = least(block, columns - column);
      extremes.add(fetch(p, image, row, column, count, buffer), count);
    }
    if (p.parts == Parts::rows) one.finish(low + (row - first_row), high + (row - first_row));
  }
  if (p.parts == Parts::whole) all.finish(low, high);
}

bool encode(const Plan& p, const Encoding& e, int64_t image, int64_t first_row, int64_t end_row, const Slots& slots,
            bool look_for_nan) {
  return (p.along ? encode_along : encode_across)(p, e, image, first_row, end_row, slots, look_for_nan);
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

void calibrate(const Calibration& c, int64_t count, const float* low, const float* high, const float* mean, float* scale,
               const Slots& slots) {
  const float steps = c.low_code < 0 ? c.high_code : c.high_code - c.low_code;
  if (c.range == Range::none) {
    const float span = c.low_code < 0 ? c.last : c.last - c.first;
    const float whole = c.fixed ? c.first / c.low_code : span / steps;
    const float inverse = c.fixed ? 1.0f / c.first * c.low_code : steps / span;
    for (int64_t i = 0; i < count; ++i) {
      const bool bad = low[i] != low[i];
      scale[i] = bad ? kNaN : whole;
      slots.inverse[i] = bad ? 0.0f : inverse;
      slots.offset[i] = bad || !c.offset ? 0.0f : c.first;
      slots.keep[i] = scale[i] == scale[i];
    }
    return;
  }
  const float divisor = c.range == Range::absmean ? 1.0f : steps;
  float *span = scale, *offset = slots.offset;
  for (int64_t i = 0; c.range == Range::minmax && i < count; ++i) {
    span[i] = high[i] - low[i];
    offset[i] = low[i];
  }
  for (int64_t i = 0; c.range == Range::absmax && i < count; ++i) {
    const float widest = low[i] != low[i] || high[i] > -low[i] ? high[i] : -low[i];
    offset[i] = widest >= kMinRange ? -widest : 0.0f;
    span[i] = c.offset ? widest * 2.0f : widest;
  }
  for (int64_t i = 0; c.range == Range::absmean && i < count; ++i) span[i] = mean[i];
  for (int64_t i = 0; i < count; ++i) {
    const float value = span[i], quotient = value / divisor, reciprocal = divisor / value;
    const bool good = std::fabs(value) < kInfinity, wide = value >= kMinRange;
    slots.inverse[i] = good && wide ? reciprocal : 0.0f;
    offset[i] = good && c.offset ? offset[i] : 0.0f;
    scale[i] = !good ? kNaN : wide ? quotient : 0.0f;
  }
  for (int64_t i = 0; i < count; ++i) slots.keep[i] = scale[i] == scale[i];
}

void draws(uint64_t key, uint32_t stream, int64_t count, float* out) {
  const Draws draw(key, stream);
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    Floats u[2];
    draw.template operator()<1>(static_cast<uint32_t>(i / 4), u);
    std::memcpy(out + i, u, least(2 * kLanes, count - i) * sizeof(float));
  }
}
