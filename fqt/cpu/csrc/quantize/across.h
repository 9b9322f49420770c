// Encoding where the codes of a group follow each other down a plan's columns: tiles of columns are packed into words.

namespace {

constexpr int64_t kTile = 64;  // columns that codes are packed across at a time

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

// Where packed bits go: those of kept groups, all if slots is null; the others' are 0.
struct Target {
  const Slots* slots;
  uint8_t* bytes;
  const Affine& byte;
  bool look_for_nan;
};

// The next columns of kept groups from `column` on, which moves behind them: at most a tile, near each other. Returns how many;
// the lanes that fill the last vector repeat the first column. clear(column) is called for those of other groups.
template <class Clear>
inline int take_columns(const Plan& p, const Slots* slots, int64_t& column, Lanes& lanes, const Clear& clear) {
  int n = 0;
  for (; column < p.columns && n < kTile && (n == 0 || column - lanes.column[0] < kChunk); ++column) {
    if (slots == nullptr || slots->keep[column]) {
      lanes.column[n++] = column;
    } else {
      clear(column);
    }
  }
  for (int i = n; i % kLanes != 0; ++i) lanes.column[i] = lanes.column[0];
  return n;
}

// The groups' numbers of the columns taken.
inline void number_lanes(const Plan& p, int64_t image, const Slots& slots, int count, Lanes& lanes) {
  const uint32_t group = static_cast<uint32_t>(p.group.at(image, 0, 0)), step = static_cast<uint32_t>(p.group.column);
  const uint32_t block = static_cast<uint32_t>(p.element.at(image, 0, 0) / 4);
  const uint32_t block_step = static_cast<uint32_t>(p.element.column / 4);
  for (int i = 0; i < count; ++i) {
    const uint32_t c = static_cast<uint32_t>(lanes.column[i]);
    lanes.inverse[i] = slots.inverse[c];
    lanes.offset[i] = slots.offset[c];
    lanes.group[i] = group + c * step;
    lanes.block[i] = block + c * block_step;
  }
}

// `bits` packed bits of a column, 32 in each of the words; not by one memcpy: they may be few.
inline void write_column(const uint32_t (*words)[kTile], int lane, int64_t bits, uint8_t* to) {
  const int64_t whole = bits / 32, rest = bits % 32;
  for (int64_t w = 0; w < whole; ++w) std::memcpy(to + 4 * w, &words[w][lane], 4);
  for (int64_t bit = 0; bit < rest; bit += 8) {
    const uint32_t used = rest - bit < 8 ? (1u << (rest - bit)) - 1 : 255;
    to[4 * whole + bit / 8] = static_cast<uint8_t>(words[whole][lane] >> bit & used);
  }
}

// Packs down the columns: four cache lines of codes of each column of a tile at a time.
// make(rows, lane, lanes, row): kLanes words of packed codes.
template <int kBits, class Make>
inline bool across(const Plan& p, const Rows& at, const Target& target, const Make& make) {
  constexpr int64_t kRows = 32 / kBits, kWords = kLineBits / 32;
  alignas(64) float buffer[kChunk], picked[kRows][kTile] = {};
  alignas(64) uint32_t words[kWords][kTile];
  Lanes lanes;
  bool nan = false;
  const int64_t step = target.byte.column, image = at.image;
  uint8_t* const codes = target.bytes + target.byte.at(image, 0, 0) + at.first * kBits / 8;
  const auto clear = [&](int64_t column) { std::memset(codes + column * step, 0, ((at.end - at.first) * kBits + 7) / 8); };
  for (int64_t column = 0; column < p.columns;) {
    const int n = take_columns(p, target.slots, column, lanes, clear);
    if (n == 0) continue;
    const int padded = (n + kLanes - 1) / kLanes * kLanes;
    const int64_t first = lanes.column[0], span = lanes.column[n - 1] - first + 1;
    if (target.slots != nullptr) number_lanes(p, image, *target.slots, padded, lanes);
    for (int64_t top = at.first; top < at.end; top += kWords * kRows) {
      const int64_t height = least(kWords * kRows, at.end - top), count = (height + kRows - 1) / kRows;
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
            std::memcpy(picked[r], rows[r], n * sizeof(float));  // a vector would be read beyond the tensor's end
            rows[r] = picked[r];
          }
          if (target.look_for_nan) nan |= has_nan(rows[r], n);
        }
        for (int lane = 0; lane < padded; lane += kLanes) {
          store(words[w] + lane, make(rows, lane, lanes, top + w * kRows));
        }
      }
      for (int i = 0; i < n; ++i) {
        write_column(words, i, height * kBits, codes + lanes.column[i] * step + (top - at.first) * kBits / 8);
      }
    }
  }
  return nan;
}

// `bit` of a vector as its lanes' bit 0, for `across`.
template <class Test>
inline bool bits_across(const Plan& p, const Rows& at, const Target& target, const Test& test) {
  return across<1>(p, at, target, [&](const float* const* rows, int lane, const Lanes&, int64_t) {
    Words word{};
    for (int r = 0; r < 32; ++r) word |= (Words)test(load(rows[r] + lane)) & (1u << r);
    return word;
  });
}

template <int kBits>
inline bool codes_across(const Plan& p, const Encoding& e, const Rows& at, const Target& target) {
  const Limits limits(e);
  const Keys keys(e.key);
  const int64_t first = p.element.at(at.image, 0, 0);
  const auto with = [&](auto stochastic) {
    return across<kBits>(p, at, target, [&](const float* const* rows, int lane, const Lanes& lanes, int64_t row) {
      const uint32_t block = static_cast<uint32_t>((p.element.at(at.image, row, 0) - first) / 4);
      return packed_word<kBits, decltype(stochastic)::value>(rows, lane, lanes, limits, keys, e.stream, block);
    });
  };
  return e.stochastic ? with(std::true_type{}) : with(std::false_type{});
}

// Codes of 16 and 32 bits: tiles are turned, then encoded along what were columns.
inline bool words_across(const Plan& p, const Encoding& e, const Rows& rows, const Slots& slots, bool look_for_nan) {
  constexpr int64_t kDown = 128, kBeside = 16;
  alignas(64) float buffer[kBeside], turned[kDown * kBeside];
  const Limits limits(e);
  Draws draws(e.key, e.stream);
  const int64_t size = e.storage / 8;
  uint8_t* const codes = e.codes + p.byte.at(rows.image, 0, 0);
  bool nan = false;
  for (int64_t first = 0; first < p.columns; first += kBeside) {
    const int64_t width = least(kBeside, p.columns - first);
    for (int64_t top = rows.first; top < rows.end; top += kDown) {
      const int64_t height = least(kDown, rows.end - top);
      for (int64_t r = 0; r < height; ++r) {
        const float* row = fetch(p, rows.image, top + r, first, width, buffer);
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
        draws.group = static_cast<uint64_t>(p.group.at(rows.image, 0, column)) - Pairs{};
        const int64_t element = p.element.at(rows.image, top, column);
        for (int64_t i = 0; i < run; i += kChunk) {
          encode_run(e, limits, draws, turned + at + i, least(kChunk, run - i), slots.offset[column], slots.inverse[column],
                     element + i, to + i * size);
        }
      }
    }
  }
  return nan;
}

inline bool encode_across(const Plan& p, const Encoding& e, const Rows& at, const Slots& slots, bool look_for_nan) {
  if (e.mask != nullptr) {
    const Floats low = spread(e.pass_low), high = spread(e.pass_high);
    bits_across(p, at, {nullptr, e.mask, p.mask, false}, [=](Floats v) { return (Ints)(v >= low) & (Ints)(v <= high); });
  }
  if (e.codes == nullptr) return false;
  const Target target{&slots, e.codes, p.byte, look_for_nan};
  if (e.grid == Grid::sign) return bits_across(p, at, target, [zero = Floats{}](Floats v) { return (Ints)(v >= zero); });
  switch (e.storage) {
    case 1: return codes_across<1>(p, e, at, target);
    case 2: return codes_across<2>(p, e, at, target);
    case 4: return codes_across<4>(p, e, at, target);
    case 8: return codes_across<8>(p, e, at, target);
    default: return words_across(p, e, at, slots, look_for_nan);
  }
}

}  // namespace
