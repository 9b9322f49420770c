// Encoding where the codes of a group follow each other along a plan's rows: each row by itself.

namespace {

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

inline bool encode_along(const Plan& p, const Encoding& e, const Rows& at, const Slots& slots, bool look_for_nan) {
  alignas(64) float buffer[kChunk];
  const Limits limits(e);
  Draws draws(e.key, e.stream);
  const Floats pass_low = spread(e.pass_low), pass_high = spread(e.pass_high);
  const auto sign = [](Floats v) { return at_least(v, Floats{}); };
  const auto inside = [&](Floats v) { return at_least(v, pass_low) & at_least(pass_high, v); };
  bool nan = false;
  for (int64_t row = at.first; row < at.end; ++row) {
    const int64_t slot = p.parts == Parts::rows ? row - at.first : 0, columns = width(p, row);
    draws.group = static_cast<uint64_t>(p.group.at(at.image, row, 0)) - Pairs{};
    for (int64_t column = 0; column < columns; column += kChunk) {
      const int64_t count = least(kChunk, columns - column);
      const float* v = fetch(p, at.image, row, column, count, buffer);
      if (look_for_nan) nan |= has_nan(v, count);
      if (e.mask != nullptr) bits_run(v, count, inside, e.mask + p.mask.at(at.image, row, 0) + column / 8);
      if (e.codes == nullptr) continue;
      uint8_t* out = e.codes + p.byte.at(at.image, row, 0) + column * e.storage / 8;
      if (!slots.keep[slot]) {
        std::memset(out, 0, (count * e.storage + 7) / 8);
      } else if (e.grid == Grid::sign) {
        bits_run(v, count, sign, out);
      } else {
        const int64_t element = p.element.at(at.image, row, column);
        encode_run(e, limits, draws, v, count, slots.offset[slot], slots.inverse[slot], element, out);
      }
    }
  }
  return nan;
}

}  // namespace
