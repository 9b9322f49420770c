// The three products of any two integer formats of at most 8 bits, or with one or both in two's complement of 9 to 16 bits.
//
// Codes that are summed are contiguous within words of 32 bits: four bytes, or two 16-bit integers where the machine has no
// multiply-add of bytes. A tile is some rows of one operand, whose words are broadcast, by a panel of columns of the other,
// whose words fill vectors. What a tile sums is a list of runs, stretches of words at which both operands go on: the taps
// that a pixel meets (`output`, `grad_input`), or the positions that a tap meets (`grad_weight`). So no window is copied, and
// nothing outside the image is multiplied.
//
// Bytes are unsigned in rows and signed in columns: a row's code is a - r, with a fixed shift r, a column's b + c, and
//   sum of codes = (sum of a * b) + c * (sum of a) - r * (sum of b) - r * c * terms.
// 16-bit integers are the codes themselves.
//
// Bounds: a term of bytes is at most 255 * 255, so 32 bits hold kMostTerms of them, with any shift. Of wider codes they hold
// fewer, `most_terms`, down to one: then the columns are taken as two bytes, 256 * high + low, and multiplied twice. Sums of
// more terms are of 64 bits.

namespace {

constexpr int64_t kMostTerms = 32768;
constexpr int64_t kFewTerms = 6;  // to add up so few at a time costs more than to multiply twice
static_assert(kFewTerms >= 2, "a word holds two terms");
constexpr int64_t kFewSteps = 2;  // of bytes; where 16 bits hold fewer, words of 16 bits are as fast
#if defined(FQT_AVX512)
constexpr int kTile = 6, kVectors = 4;  // rows of a tile, vectors of a panel
#elif defined(FQT_AVX2)
constexpr int kTile = 6, kVectors = 2;
#else
constexpr int kTile = 2, kVectors = 4;
#endif
constexpr int kInts = kWidth / 4;           // sums of a vector
constexpr int kColumns = kVectors * kInts;  // columns of a panel

template <class Code>
constexpr int kPer = 4 / sizeof(Code);  // codes of a word

// `words` words from byte `row` of each row, and from word `column` of each column, on.
struct Run {
  int64_t row, column, words;
};

// The magnitude that a code may have.
inline int64_t largest(const Integers& q) {
  return q.meaning == Meaning::sign ? 1 : q.meaning == Meaning::natural ? (1 << q.bits) - 1 : 1 << (q.bits - 1);
}

// How many products of codes 32 bits hold, shifts included; whether the columns must be split into bytes for that.
inline bool apart(const Integers& row, const Integers& column) {
  return column.storage > 8 && INT32_MAX / (largest(row) * largest(column)) < kFewTerms;
}
inline int64_t most_terms(const Integers& row, const Integers& column) {
  if (row.storage <= 8 && column.storage <= 8) return kMostTerms;
  return least(kMostTerms, INT32_MAX / (largest(row) * (apart(row, column) ? 255 : largest(column))));
}

// Appends a run: joined to the one before where both operands go on, no longer than 32 bits hold of bytes.
inline void append(std::vector<Run>& runs, size_t first, Run run) {
  constexpr int64_t most_words = kMostTerms / 4;
  while (run.words > 0) {
    Run* last = runs.size() > first ? &runs.back() : nullptr;
    const bool joined = last && last->words < most_words && last->row + 4 * last->words == run.row &&
                        last->column + last->words == run.column;
    const int64_t now = least(run.words, joined ? most_words - last->words : most_words);
    if (joined) {
      last->words += now;
    } else {
      runs.push_back({run.row, run.column, now});
    }
    run = {run.row + 4 * now, run.column + now, run.words - now};
  }
}

inline int32_t word(const uint8_t* from) {
  int32_t w;
  std::memcpy(&w, from, 4);
  return w;
}

// Of codes of 16 bits: what is decoded, 256 * high + low.
enum class Part { whole, high, low };

// Packed codes as bytes or 16-bit integers, `shift` added.
template <class Code>
class Decoder {
 public:
  Decoder(const Integers& q, int shift, Part part = Part::whole)
      : storage_(q.storage), shift_(shift), meaning_(q.meaning), part_(part) {}

  // Codes [first, first + count) of a row.
  void operator()(const uint8_t* row, int64_t first, int64_t count, Code* out) const {
    if (storage_ == 16) {
      decode_words(row + 2 * first, count, out);
    } else if (storage_ == 8) {
      decode_bytes(row + first, count, out);
    } else {
      storage_ == 1 ? unpack<1>(row, first, count, out)
                    : storage_ == 2 ? unpack<2>(row, first, count, out) : unpack<4>(row, first, count, out);
    }
  }

 private:
  void decode_words(const uint8_t* row, int64_t count, Code* out) const {
    if (part_ == Part::whole) {
      std::memcpy(out, row, 2 * count);
    } else if (part_ == Part::low) {
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Code>(row[2 * i]);
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Code>(static_cast<int8_t>(row[2 * i + 1]));
    }
  }

  void decode_bytes(const uint8_t* row, int64_t count, Code* __restrict out) const {
    const int shift = shift_;
    if (meaning_ == Meaning::complement) {
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Code>(static_cast<int8_t>(row[i]) + shift);
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Code>(row[i] + shift);
    }
  }

  // Of kBits in memory: the code is (bits ^ flip << up) + add, which fits a signed byte.
  template <int kBits>
  void unpack(const uint8_t* row, int64_t first, int64_t count, Code* __restrict out) const {
    constexpr int kLanesOfByte = 8 / kBits, kMask = (1 << kBits) - 1, kHalf = 1 << (kBits - 1);
    const bool complement = meaning_ == Meaning::complement, sign = meaning_ == Meaning::sign;
    const uint8_t flip = complement ? kHalf : 0, up = sign, add = static_cast<uint8_t>(shift_ - (complement ? kHalf : sign));
    const auto code = [=](uint8_t byte, int lane) {
      const uint8_t bits = (byte >> lane * kBits) & kMask;
      return static_cast<Code>(static_cast<int8_t>(static_cast<uint8_t>(((bits ^ flip) << up) + add)));
    };
    row += first / kLanesOfByte;
    int64_t i = 0;
    for (int lane = first % kLanesOfByte; lane != 0 && i < count; ++i) {
      out[i] = code(*row, lane);
      if (++lane == kLanesOfByte) lane = 0, ++row;
    }
    const int64_t bytes = (count - i) / kLanesOfByte;
    Code* __restrict to = out + i;
    for (int64_t byte = 0; byte < bytes; ++byte) {
      for (int lane = 0; lane < kLanesOfByte; ++lane) to[byte * kLanesOfByte + lane] = code(row[byte], lane);
    }
    i += bytes * kLanesOfByte;
    for (int lane = 0; i < count; ++i, ++lane) out[i] = code(row[bytes], lane);
  }

  int64_t storage_;
  int shift_;
  Meaning meaning_;
  Part part_;
};

// What is added to the codes of rows, and taken from those of columns.
template <class Code>
int row_shift(const Integers& q) {
  return sizeof(Code) == 2 ? 0 : q.meaning == Meaning::sign ? 1 : q.meaning == Meaning::complement ? 1 << (q.bits - 1) : 0;
}
template <class Code>
int column_shift(const Integers& q) {
  return sizeof(Code) == 1 && q.meaning == Meaning::natural && q.bits == 8 ? 128 : 0;
}

// How many additions of two products of bytes 16 bits hold.
inline int64_t narrow_steps(const Integers& row, const Integers& column) {
  if (row.storage > 8 || column.storage > 8) return 0;
  const int64_t of_row = row.meaning == Meaning::sign ? 2 : (1 << row.bits) - 1;
  const int64_t of_column = column.meaning == Meaning::sign                                      ? 1
                            : column.meaning == Meaning::complement || column.bits == 8 ? 1 << (column.bits - 1)
                                                                                            : (1 << column.bits) - 1;
  return 32767 / (2 * of_row * of_column);
}

// How many words a loop may add up before it takes them up in wider sums.
template <class Code>
int64_t steps_of(const Integers& row, const Integers& column) {
  return sizeof(Code) == 1 ? narrow_steps(row, column) : most_terms(row, column) / 2;
}

// out[i] = the word of the i-th codes of kPer rows.
template <class Code>
void interleave(const Code* const* rows, int64_t count, uint32_t* __restrict out) {
  if constexpr (sizeof(Code) == 1) {
    const Code *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    for (int64_t i = 0; i < count; ++i) {
      out[i] = r0[i] | static_cast<uint32_t>(r1[i]) << 8 | static_cast<uint32_t>(r2[i]) << 16 |
               static_cast<uint32_t>(r3[i]) << 24;
    }
  } else {
    const Code *r0 = rows[0], *r1 = rows[1];
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint16_t>(r0[i]) | static_cast<uint32_t>(r1[i]) << 16;
  }
}

// Words as they are: `rows` rows of `count` words each become `count` rows of `rows` words.
inline void transpose_words(const uint32_t* in, int64_t pitch, int64_t rows, int64_t count, uint32_t* out, int64_t out_pitch) {
  constexpr int64_t kSide = kInts;
  for (int64_t i = 0; i < rows; i += kSide) {
    for (int64_t j = 0; j < count; j += kSide) {
      const uint32_t* from = in + i * pitch + j;
      uint32_t* to = out + j * out_pitch + i;
      if (i + kSide <= rows && j + kSide <= count) {
        transpose(from, pitch, to, out_pitch);
        continue;
      }
      for (int64_t m = 0; m < least(kSide, rows - i); ++m) {
        for (int64_t n = 0; n < least(kSide, count - j); ++n) to[n * out_pitch + m] = from[m * pitch + n];
      }
    }
  }
}

template <class Code>
int64_t sum_codes(const Code* codes, int64_t count, bool column) {
  int64_t total = 0;
  for (int64_t first = 0; first < count; first += kMostTerms) {
    int32_t sum = 0;
    const int64_t end = least(count, first + kMostTerms);
    if (sizeof(Code) == 1 && column) {
      for (int64_t i = first; i < end; ++i) sum += static_cast<int8_t>(codes[i]);
    } else {
      for (int64_t i = first; i < end; ++i) sum += codes[i];
    }
    total += sum;
  }
  return total;
}

// Bytes where the machine multiplies them, or where their sums fit 16 bits for a while.
inline bool in_bytes(const Integers& row, const Integers& column) {
#if defined(FQT_AVX512)
  return row.storage <= 8 && column.storage <= 8;
#elif defined(FQT_AVX2)
  return narrow_steps(row, column) >= kFewSteps;
#else
  return false;
#endif
}

}  // namespace
