// The three products of any two integer formats of at most 8 bits, or with one or both in two's complement of 9 to 16 bits.
//
// Codes that are summed lie side by side in words of 32 bits: four bytes, or two 16-bit integers where the machine has no
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

// How many products of codes 32 bits hold, shifts included; whether the columns must be taken apart for that.
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

template <class Sum>
using Multiply = void (*)(const uint8_t* const*, const Run*, int64_t, const uint32_t*, int64_t, Sum (*)[kColumns]);

typedef int32_t Lanes __attribute__((vector_size(4 * kInts), may_alias));

// Sums to which the products of two pairs of 16-bit integers are added in every lane.
inline Lanes add_pairs(Lanes sum, int32_t row, Lanes column) {
#if defined(FQT_AVX512)
  return (Lanes)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32(row), (__m512i)column);
#elif defined(FQT_AVX2)
  return (Lanes)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(_mm256_set1_epi32(row), (__m256i)column));
#else
  return sum + ((column << 16) >> 16) * static_cast<int16_t>(row) + (column >> 16) * (row >> 16);
#endif
}

// sums[m][column] = the sum over all runs of 16-bit integers, for M rows and V vectors of columns. `steps`: how many words 32
// bits hold; sums of 64 bits take them up then.
template <class Sum, int M, int V>
void multiply_words(const uint8_t* const* rows, const Run* runs, int64_t count, const uint32_t* columns, int64_t steps,
                    Sum (*sums)[kColumns]) {
  typedef Sum Sums __attribute__((vector_size(sizeof(Sum) * kInts), may_alias));
  constexpr bool kWide = sizeof(Sum) == 8;
  Lanes sum[M][V] = {};
  bool fresh = true;
  const auto take_up = [&]() __attribute__((always_inline)) {  // else the sums would lie in memory
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) {
        Sums* to = reinterpret_cast<Sums*>(sums[m] + v * kInts);
        const Sums more = __builtin_convertvector(sum[m][v], Sums);
        *to = fresh ? more : *to + more;
        sum[m][v] = Lanes{};
      }
    }
    fresh = false;
  };
  int64_t left = steps;
  for (const Run* run = runs; run < runs + count; ++run) {
    const uint32_t* column = columns + run->column * V * kInts;
    for (int64_t at = run->row, end = at + 4 * run->words; at < end;) {
      const int64_t stop = kWide ? least(end, at + 4 * left) : end;
      left -= (stop - at) / 4;
      for (; at < stop; at += 4, column += V * kInts) {
        Lanes c[V];
        for (int v = 0; v < V; ++v) c[v] = *reinterpret_cast<const Lanes*>(column + v * kInts);
        for (int m = 0; m < M; ++m) {
          const int32_t r = word(rows[m] + at);
          for (int v = 0; v < V; ++v) sum[m][v] = add_pairs(sum[m][v], r, c[v]);
        }
      }
      if (kWide && left == 0) {
        take_up();
        left = steps;
      }
    }
  }
  take_up();
}

#if defined(FQT_AVX512) || defined(FQT_AVX2)
// The same of bytes. `steps`: how many products of bytes, two of which are added at once, 16 bits hold (AVX2 only).
template <class Sum, int M, int V>
void multiply_bytes(const uint8_t* const* rows, const Run* runs, int64_t count, const uint32_t* columns, int64_t steps,
                    Sum (*sums)[kColumns]) {
#if defined(FQT_AVX512)
  __m512i sum[M][V];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) sum[m][v] = _mm512_setzero_si512();
  }
  for (const Run* run = runs; run < runs + count; ++run) {
    const uint32_t* column = columns + run->column * V * kInts;
    for (int64_t at = run->row, end = at + 4 * run->words; at < end; at += 4, column += V * kInts) {
      __m512i c[V];
      for (int v = 0; v < V; ++v) c[v] = _mm512_load_si512(column + v * kInts);
      for (int m = 0; m < M; ++m) {
        const __m512i r = _mm512_set1_epi32(word(rows[m] + at));
        for (int v = 0; v < V; ++v) sum[m][v] = _mm512_dpbusd_epi32(sum[m][v], r, c[v]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) _mm512_store_si512(sums[m] + v * kInts, sum[m][v]);
  }
#else
  __m256i sum[M][V];
  const auto clear = [&] {
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) sum[m][v] = _mm256_setzero_si256();
    }
  };
  clear();
  int64_t left = steps;
  for (int m = 0; m < M; ++m) std::memset(sums[m], 0, V * kWidth);
  const auto widen = [&] {
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) {
        __m256i* to = reinterpret_cast<__m256i*>(sums[m] + v * kInts);
        _mm256_store_si256(to, _mm256_add_epi32(_mm256_load_si256(to), _mm256_madd_epi16(sum[m][v], _mm256_set1_epi16(1))));
      }
    }
    clear();
    left = steps;
  };
  for (const Run* run = runs; run < runs + count; ++run) {
    const uint32_t* column = columns + run->column * V * kInts;
    for (int64_t at = run->row, end = at + 4 * run->words; at < end;) {
      const int64_t stop = least(end, at + 4 * left);
      left -= (stop - at) / 4;
      for (; at < stop; at += 4, column += V * kInts) {
        __m256i c[V];
        for (int v = 0; v < V; ++v) c[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(column + v * kInts));
        for (int m = 0; m < M; ++m) {
          const __m256i r = _mm256_set1_epi32(word(rows[m] + at));
          for (int v = 0; v < V; ++v) sum[m][v] = _mm256_add_epi16(sum[m][v], _mm256_maddubs_epi16(r, c[v]));
        }
      }
      if (left == 0) widen();
    }
  }
  widen();
#endif
}
#endif

// The loop for `rows` rows and `width` columns. It reads all kTile rows, half of them or one.
template <class Code, class Sum>
Multiply<Sum> multiply_of(int64_t rows, int64_t width) {
  constexpr int kHalf = kTile / 2, kThree = kVectors == 2 ? 2 : 3;
#define FQT_LOOPS(multiply, M) {multiply<Sum, M, 1>, multiply<Sum, M, 2>, multiply<Sum, M, kThree>, multiply<Sum, M, kVectors>}
#define FQT_TILES(multiply) {FQT_LOOPS(multiply, 1), FQT_LOOPS(multiply, kHalf), FQT_LOOPS(multiply, kTile)}
  const int height = rows == 1 ? 0 : rows <= kHalf ? 1 : 2;
#if defined(FQT_AVX512) || defined(FQT_AVX2)
  if constexpr (sizeof(Code) == 1) {
    constexpr Multiply<Sum> of[3][4] = FQT_TILES(multiply_bytes);
    return of[height][width / kInts - 1];
  }
#endif
  constexpr Multiply<Sum> of[3][4] = FQT_TILES(multiply_words);
  return of[height][width / kInts - 1];
#undef FQT_TILES
#undef FQT_LOOPS
}

// Of codes of 16 bits: what is decoded, 256 * high + low.
enum class Part { whole, high, low };

// Packed codes as bytes or 16-bit integers, `shift` added.
template <class Code>
class Decoder {
 public:
  Decoder(const Integers& q, int shift, Part part = Part::whole)
      : storage_(q.storage), shift_(shift), negative_(q.meaning == Meaning::complement), part_(part) {
    if (storage_ >= 8) return;
    const int lanes = 8 / storage_, count = 1 << storage_;
    for (int byte = 0; byte < 256; ++byte) {
      for (int i = 0; i < lanes; ++i) {
        const int lane = byte >> i * storage_ & (count - 1);
        const int code = q.meaning == Meaning::sign ? 2 * lane - 1 : negative_ && lane >= count / 2 ? lane - count : lane;
        table_[byte * lanes + i] = static_cast<Code>(code + shift);
      }
    }
  }

  // Codes [first, first + count) of a row.
  void operator()(const uint8_t* row, int64_t first, int64_t count, Code* out) const {
    if (storage_ == 16) {
      row += 2 * first;
      if (part_ == Part::whole) {
        std::memcpy(out, row, 2 * count);
        return;
      }
      for (int64_t i = 0; i < count; ++i) {
        out[i] = part_ == Part::low ? static_cast<Code>(row[2 * i]) : static_cast<Code>(static_cast<int8_t>(row[2 * i + 1]));
      }
      return;
    }
    if (storage_ == 8) {
      row += first;
      if (negative_) {
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Code>(static_cast<int8_t>(row[i]) + shift_);
      } else {
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Code>(row[i] + shift_);
      }
      return;
    }
    storage_ == 1 ? look_up<8>(row, first, count, out)
                  : storage_ == 2 ? look_up<4>(row, first, count, out) : look_up<2>(row, first, count, out);
  }

 private:
  template <int kLanesOfByte>
  void look_up(const uint8_t* row, int64_t first, int64_t count, Code* out) const {
    row += first / kLanesOfByte;
    if (const int64_t skip = first % kLanesOfByte; skip && count) {
      const int64_t now = least(count, kLanesOfByte - skip);
      std::memcpy(out, table_ + *row++ * kLanesOfByte + skip, now * sizeof(Code));
      out += now, count -= now;
    }
    for (; count >= kLanesOfByte; count -= kLanesOfByte, out += kLanesOfByte) {
      std::memcpy(out, table_ + *row++ * kLanesOfByte, kLanesOfByte * sizeof(Code));
    }
    if (count) std::memcpy(out, table_ + *row * kLanesOfByte, count * sizeof(Code));
  }

  int64_t storage_;
  int shift_;
  bool negative_;
  Part part_;
  Code table_[256 * 8];
};

// What is added to the codes of rows, and taken from those of columns.
template <class Code>
int row_shift(const Integers& q) {
  return sizeof(Code) == 2 ? 0 : q.meaning == Meaning::sign ? 1 : q.meaning == Meaning::complement ? 1 << (q.storage - 1) : 0;
}
template <class Code>
int column_shift(const Integers& q) {
  return sizeof(Code) == 1 && q.meaning == Meaning::natural && q.storage == 8 ? 128 : 0;
}

// How many additions of two products of bytes 16 bits hold.
inline int64_t narrow_steps(const Integers& row, const Integers& column) {
  if (row.storage > 8 || column.storage > 8) return 0;
  const int64_t of_row = row.meaning == Meaning::sign ? 2 : (1 << row.storage) - 1;
  const int64_t of_column = column.meaning == Meaning::sign                                         ? 1
                            : column.meaning == Meaning::complement || column.storage == 8 ? 1 << (column.storage - 1)
                                                                                               : (1 << column.storage) - 1;
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

// Columns of a panel and rows of a tile, as `finish` sees them. The sums are those of the codes; offset and bias may be absent.
template <class Sum>
struct Columns {
  const Sum* base;  // what is added to the sum of products for the column's part of the shifts
  const float *sum, *scale, *offset, *bias;
};
template <class Sum>
struct Row {
  Sum base;
  float sum, scale;
  const float* offset;
  float* to;
};

// The float part of a product in the reference's order, written or added to the result. row_first: whether the row is the
// reference's first operand.
template <bool row_first, bool add, int V, class Sum>
void finish(const Sum (*sums)[kColumns], int64_t height, const Row<Sum>* rows, const Columns<Sum>& column, float terms) {
  using Unsigned = std::make_unsigned_t<Sum>;  // wraps, where the sum of the parts fits
  const auto finish_rows = [&](auto row_offset, auto column_offset) {
    for (int64_t m = 0; m < height; ++m) {
      const Row<Sum> row = rows[m];
      const float offset = row_offset ? *row.offset : 0, scaled = row.sum * row.scale, both = terms * offset;
      float* __restrict to = row.to;
      for (int k = 0; k < V * kInts; ++k) {
        const Unsigned whole = static_cast<Unsigned>(sums[m][k]) + static_cast<Unsigned>(row.base) +
                               static_cast<Unsigned>(column.base[k]);
        float t = static_cast<float>(static_cast<Sum>(whole));
        t = row_first ? t * row.scale * column.scale[k] : t * column.scale[k] * row.scale;
        if (!row_first && row_offset) t += column.sum[k] * column.scale[k] * offset;
        if (column_offset) t += scaled * column.offset[k];
        if (row_first && row_offset) t += column.sum[k] * column.scale[k] * offset;
        if (row_offset && column_offset) t += row_first ? both * column.offset[k] : terms * column.offset[k] * offset;
        to[k] = add ? to[k] + t : t;
      }
      if (column.bias == nullptr) continue;
      for (int k = 0; k < V * kInts; ++k) to[k] += column.bias[k];
    }
  };
  const bool row_offset = rows[0].offset != nullptr, column_offset = column.offset != nullptr;
  if (row_offset) {
    column_offset ? finish_rows(std::true_type{}, std::true_type{}) : finish_rows(std::true_type{}, std::false_type{});
  } else {
    column_offset ? finish_rows(std::false_type{}, std::true_type{}) : finish_rows(std::false_type{}, std::false_type{});
  }
}

template <class Sum>
using Finish = void (*)(const Sum (*)[kColumns], int64_t, const Row<Sum>*, const Columns<Sum>&, float);

template <bool row_first, bool add, class Sum>
Finish<Sum> finish_of(int64_t width) {
  constexpr Finish<Sum> of_width[] = {finish<row_first, add, 1, Sum>, finish<row_first, add, 2, Sum>,
                                      finish<row_first, add, kVectors == 2 ? 2 : 3, Sum>,
                                      finish<row_first, add, kVectors, Sum>};
  return of_width[width / kInts - 1];
}

// The loop that sums a tile over all runs into sums of the type it is asked for.
template <class Code, class Sum>
struct Loop {
  // bytes have no loop for 64 bits: a run fits 32
  using Narrow = std::conditional_t<sizeof(Code) == 1, int32_t, Sum>;
  Multiply<Narrow> multiply;
  int64_t width;
  Loop(int64_t rows, int64_t width) : multiply(multiply_of<Code, Narrow>(rows, width)), width(width) {}

  void operator()(const uint8_t* const* rows, const Run* runs, int64_t count, const uint32_t* columns, int64_t steps,
                  Sum (*sums)[kColumns]) const {
    if constexpr (sizeof(Sum) == sizeof(Narrow)) {
      multiply(rows, runs, count, columns, steps, sums);
    } else {
      std::memset(sums, 0, kTile * sizeof(sums[0]));
      for (int64_t i = 0; i < count; ++i) {
        alignas(64) int32_t narrow[kTile][kColumns] = {};
        multiply(rows, runs + i, 1, columns, steps, narrow);
        for (int m = 0; m < kTile; ++m) {
          for (int64_t k = 0; k < width; ++k) sums[m][k] += narrow[m][k];
        }
      }
    }
  }
};

// --- output and grad_input -------------------------------------------------------------------------------------------

// The second operand, or a part of it, in panels: (group, panel, tap, word, column); each column's sum of codes for each tap.
template <class Code>
void pack_columns(const IntegerGather& c, int64_t words, Part which, uint32_t* panels, int64_t* sums) {
  const Layer& l = c.layer;
  const int64_t taps = l.taps(), group_width = round_up(c.columns, kInts), count = ceil_div(c.columns, kColumns);
  const int64_t row_bytes = ceil_div((c.across ? c.columns : c.depth) * c.b.storage, 8);
  const Decoder<Code> decode(c.b, -column_shift<Code>(c.b), which);
  parallel(l.groups * count * (c.across ? taps : 1), 1, [&](int64_t begin, int64_t end) {
    Buffer<Code> codes(c.across ? kPer<Code> * kColumns : kColumns * taps * words * kPer<Code>);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tap = c.across ? item % taps : 0, part = c.across ? item / taps : item;
      const int64_t group = part / count, first = part % count * kColumns;
      const int64_t columns = least(kColumns, c.columns - first), width = round_up(columns, kInts);
      uint32_t* to = panels + (group * group_width + first) * taps * words;
      int64_t* sum = sums + group * taps * group_width + first;
      if (c.across) {
        to += tap * words * width;
        sum += tap * group_width;
        std::memset(sum, 0, width * sizeof(int64_t));
        const Code* rows[kPer<Code>];
        for (int64_t word = 0; word < words; ++word, to += width) {
          for (int j = 0; j < kPer<Code>; ++j) {
            Code* row = codes.data + j * kColumns;
            rows[j] = row;
            const int64_t k = word * kPer<Code> + j;
            const int64_t used = k < c.depth ? columns : 0;
            if (used) decode(c.b.data + ((group * c.depth + k) * taps + tap) * row_bytes, first, used, row);
            std::memset(row + used, 0, (width - used) * sizeof(Code));
            for (int64_t i = 0; i < used; ++i) {
              sum[i] += sizeof(Code) == 1 ? static_cast<int8_t>(row[i]) : static_cast<int16_t>(row[i]);
            }
          }
          interleave(rows, width, to);
        }
        continue;
      }
      const int64_t all = taps * words, padded = words * kPer<Code>;
      std::memset(codes.data, 0, width * all * 4);
      for (int64_t i = 0; i < width; ++i) {
        for (int64_t k = 0; k < taps; ++k) {
          Code* row = codes.data + (i * taps + k) * padded;
          if (i < columns) decode(c.b.data + ((group * c.columns + first + i) * taps + k) * row_bytes, 0, c.depth, row);
          sum[k * group_width + i] = sum_codes(row, padded, true);
        }
      }
      const uint32_t* from = reinterpret_cast<const uint32_t*>(codes.data);
      for (int64_t k = 0; k < all; k += 16) {
        for (int64_t i = 0; i < width; ++i) {
          for (int64_t j = k; j < least(all, k + 16); ++j) to[j * width + i] = from[i * all + j];
        }
      }
    }
  });
}

template <class Code, class Sum>
void gather(const IntegerGather& c) {
  const Layer& l = c.layer;
  const int64_t taps = l.taps(), words = ceil_div(c.depth, kPer<Code>), padded = words * kPer<Code>;
  const int64_t pixels = l.other_positions(), image = l.positions(), channels = l.groups * c.columns;
  if (c.kept_count * image * channels == 0) return;
  const int64_t panels = ceil_div(c.columns, kColumns);
  const int64_t group_width = round_up(c.columns, kInts), slots = l.groups * group_width;
  const int row_by = row_shift<Code>(c.a), column_by = column_shift<Code>(c.b);
  const bool row_sums = column_by != 0 || c.b_offset.data != nullptr;

  // rows: (sample, pixel, group, word)
  const int64_t row_bytes = ceil_div(l.groups * c.depth * c.a.storage, 8), row_codes = l.groups * padded;
  Buffer<Code> rows(c.kept_count * pixels * row_codes);
  Buffer<int64_t> pixel_sums(row_sums ? c.kept_count * pixels * l.groups : 0);
  const Decoder<Code> decode(c.a, row_by);
  const bool dense = padded == c.depth && row_codes * c.a.storage % 8 == 0;
  parallel(c.kept_count * pixels, most(1, 65536 / (row_codes + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t slot = at / pixels, pixel = at % pixels, run = dense ? least(end - at, pixels - pixel) : 1;
      const uint8_t* from = c.a.data + ((c.kept ? c.kept[slot] : slot) * pixels + pixel) * row_bytes;
      Code* to = rows.data + at * row_codes;
      if (dense) {
        decode(from, 0, run * row_codes, to);
      } else {
        for (int64_t group = 0; group < l.groups; ++group) {
          decode(from, group * c.depth, c.depth, to + group * padded);
          std::memset(to + group * padded + c.depth, 0, (padded - c.depth) * sizeof(Code));
        }
      }
      for (int64_t i = 0; row_sums && i < run * l.groups; ++i) {
        pixel_sums[at * l.groups + i] = sum_codes(to + i * padded, padded, false);
      }
      at += run;
    }
  });

  const bool twice = apart(c.a, c.b);
  const int64_t column_words = slots * taps * words;  // of all panels
  Buffer<uint32_t> columns((1 + twice) * column_words);
  Buffer<int64_t> tap_sums((1 + twice) * taps * slots);
  pack_columns<Code>(c, words, twice ? Part::high : Part::whole, columns.data, tap_sums.data);
  if (twice) {
    pack_columns<Code>(c, words, Part::low, columns.data + column_words, tap_sums.data + taps * slots);
    for (int64_t i = 0; i < taps * slots; ++i) tap_sums[i] = 256 * tap_sums[i] + tap_sums[taps * slots + i];
  }
  Buffer<float> scale(slots), offset(slots), bias(slots);
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t k = i % group_width, channel = i / group_width * c.columns + k;
    const bool used = k < c.columns;
    scale[i] = used ? c.b_scale(channel, 0) : 0;
    offset[i] = used && c.b_offset.data ? c.b_offset(channel, 0) : 0;
    bias[i] = used && c.bias ? c.bias[channel] : 0;
  }

  // for each kind of pixel the runs of the taps it meets, as seen from the first of them, and the columns' sums over them
  struct Kind {
    size_t begin, end;  // of its runs
    int64_t met_begin, met_end, y_tap, x_tap, terms;
  };
  std::vector<Kind> kinds;
  std::vector<Run> runs;
  Buffer<int64_t> met(l.y.kinds * l.x.kinds * taps), total(slots);  // met: pixels from the first tap's
  int64_t met_count = 0;
  Buffer<Sum> base(l.y.kinds * l.x.kinds * slots);
  Buffer<float> sums(l.y.kinds * l.x.kinds * slots);
  for (int64_t kind = 0; kind < l.y.kinds * l.x.kinds; ++kind) {
    const int32_t* y_at = l.y.at + l.y.example[kind / l.x.kinds] * l.y.taps;
    const int32_t* x_at = l.x.at + l.x.example[kind % l.x.kinds] * l.x.taps;
    Kind made{runs.size(), 0, met_count, 0, -1, -1, 0};
    std::memset(total.data, 0, slots * sizeof(int64_t));
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = tap / l.x.taps, x = tap % l.x.taps;
      if (y_at[y] < 0 || x_at[x] < 0) continue;
      if (made.y_tap < 0) made.y_tap = y, made.x_tap = x;
      const int64_t from_first = (y_at[y] - y_at[made.y_tap]) * l.other_x + x_at[x] - x_at[made.x_tap];
      met[met_count++] = from_first;
      append(runs, made.begin, {from_first * row_codes * static_cast<int64_t>(sizeof(Code)), tap * words, words});
      made.terms += c.depth;
      for (int64_t group = 0; group < l.groups; ++group) {
        const int64_t* of_tap = tap_sums.data + (group * taps + tap) * group_width;
        for (int64_t i = 0; i < group_width; ++i) total[group * group_width + i] += of_tap[i];
      }
    }
    made.end = runs.size(), made.met_end = met_count;
    kinds.push_back(made);
    for (int64_t i = 0; i < slots; ++i) {
      base[kind * slots + i] = static_cast<Sum>(-row_by * (total[i] + column_by * made.terms));
      sums[kind * slots + i] = static_cast<float>(total[i] + column_by * made.terms);
    }
  }

  // a block: some samples, or a band of rows of one; where there are few blocks, some of the panels. Large blocks have many
  // pixels of each kind, hence few tiles that are not full
  const int64_t all_panels = l.groups * panels;
  const int64_t block_pixels = most(16, (256 << 10) / (row_codes * static_cast<int64_t>(sizeof(Code)) + 1));
  const int64_t together = most(1, least(block_pixels / image, ceil_div(c.kept_count, ceil_div(8, all_panels))));
  const int64_t band = together > 1 ? l.y.size : most(1, least(l.y.size, block_pixels / l.x.size));
  const int64_t bands = ceil_div(l.y.size, band), blocks = ceil_div(c.kept_count, together) * bands;
  const int64_t parts = blocks >= 16 ? 1 : least(all_panels, ceil_div(16, blocks));
  const int64_t steps = steps_of<Code>(c.a, c.b);
  const int64_t mask_bytes = ceil_div(channels, 8);
  struct Pixel {
    int64_t from, to;  // the first tap's pixel, the result's
    float scale, offset;
  };
  parallel(blocks * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<Pixel> found(together * band * l.x.size);
    Buffer<int64_t> kind_begin(kinds.size() + 1);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / parts, first_slot = block / bands * together, y_begin = block % bands * band;
      const int64_t last_slot = least(c.kept_count, first_slot + together), y_end = least(l.y.size, y_begin + band);
      int64_t count = 0;
      for (size_t kind = 0; kind < kinds.size(); ++kind) {
        kind_begin[kind] = count;
        const Kind& k = kinds[kind];
        for (int64_t slot = first_slot; slot < last_slot; ++slot) {
          const int64_t n = c.kept ? c.kept[slot] : slot;
          for (int64_t y = y_begin; y < y_end; ++y) {
            if (l.y.kind[y] != static_cast<int64_t>(kind) / l.x.kinds) continue;
            for (int64_t x = 0; x < l.x.size; ++x) {
              if (l.x.kind[x] != static_cast<int64_t>(kind) % l.x.kinds) continue;
              int64_t from = 0;
              if (k.y_tap >= 0) from = l.y.at[y * l.y.taps + k.y_tap] * l.other_x + l.x.at[x * l.x.taps + k.x_tap];
              const int64_t p = y * l.x.size + x;
              found[count++] = {slot * pixels + from, n * image + p, c.a_scale(n, p),
                                c.a_offset.data ? c.a_offset(n, p) : 0};
            }
          }
        }
      }
      kind_begin[kinds.size()] = count;

      const int64_t part = item % parts;
      for (int64_t panel = all_panels * part / parts; panel < all_panels * (part + 1) / parts; ++panel) {
        const int64_t group = panel / panels, first = panel % panels * kColumns, channel = group * c.columns + first;
        const int64_t used = least(kColumns, c.columns - first), width = round_up(used, kInts);
        const int64_t at = group * group_width + first;
        const bool direct = used == width && c.mask == nullptr;
        const uint32_t* of_panel = columns.data + at * taps * words;
        for (size_t kind = 0; kind < kinds.size(); ++kind) {
          const Kind& k = kinds[kind];
          const Columns<Sum> column{base.data + kind * slots + at, sums.data + kind * slots + at, scale.data + at,
                                    c.b_offset.data ? offset.data + at : nullptr, c.bias ? bias.data + at : nullptr};
          for (int64_t i = kind_begin[kind]; i < kind_begin[kind + 1]; i += kTile) {
            const int64_t height = least(kTile, kind_begin[kind + 1] - i);
            const uint8_t* row[kTile];
            for (int64_t m = 0; m < kTile; ++m) {
              const Code* of_pixel = rows.data + found[i + least(m, height - 1)].from * row_codes + group * padded;
              row[m] = reinterpret_cast<const uint8_t*>(of_pixel);
            }
            const Loop<Code, Sum> loop(height, width);
            alignas(64) Sum sums_of[kTile][kColumns];
            loop(row, runs.data() + k.begin, k.end - k.begin, of_panel, steps, sums_of);
            if (twice) {
              alignas(64) Sum low[kTile][kColumns];
              loop(row, runs.data() + k.begin, k.end - k.begin, of_panel + column_words, steps, low);
              for (int64_t m = 0; m < height; ++m) {
                for (int64_t i = 0; i < width; ++i) sums_of[m][i] = 256 * sums_of[m][i] + low[m][i];
              }
            }
            alignas(64) float t[kTile][kWidth];
            Row<Sum> of_row[kTile];
            for (int64_t m = 0; m < height; ++m) {
              const Pixel& pixel = found[i + m];
              int64_t sum = 0;
              for (int64_t t = k.met_begin; row_sums && t < k.met_end; ++t) {
                sum += pixel_sums[(pixel.from + met[t]) * l.groups + group];
              }
              of_row[m] = {static_cast<Sum>(column_by * sum), static_cast<float>(sum - row_by * k.terms), pixel.scale,
                           c.a_offset.data ? &pixel.offset : nullptr, direct ? c.result + pixel.to * channels + channel : t[m]};
            }
            finish_of<true, false, Sum>(width)(sums_of, height, of_row, column, static_cast<float>(k.terms));
            for (int64_t m = 0; !direct && m < height; ++m) {
              const int64_t to = found[i + m].to;
              if (c.mask) {
                uint8_t bits[kWidth / 8];
                copy_bits(c.mask + to * mask_bytes, channel, used, bits, kWidth / 8);
                keep_where_set(bits, t[m]);
              }
              std::memcpy(c.result + to * channels + channel, t[m], used * sizeof(float));
            }
          }
        }
      }
    }
  });
}

// --- grad_weight -----------------------------------------------------------------------------------------------------

// X and G of a chunk of samples. What is summed lies side by side: four samples at one position, or, where samples are apart,
// four positions of a line. X has a row a channel, (channel, word), G panels of output channels, (group, panel, word, column).
template <class Code, class Sum>
void weigh(const IntegerGradWeight& c) {
  constexpr int64_t kSize = sizeof(Code);
  const Layer& l = c.layer;
  const int64_t taps = l.taps(), positions = l.positions(), pixels = l.other_positions(), inputs = l.groups * l.in;
  if (c.channel_count * taps * l.in == 0) return;
  const int row_by = row_shift<Code>(c.x), column_by = column_shift<Code>(c.g);
  const bool g_offset = c.g_offset.data != nullptr;

  // the columns of each group: c.channels is ascending
  struct Panel {
    int64_t group, slot, first, used, width;  // its first column in padded columns and in c.channels
  };
  std::vector<Panel> panels;
  int64_t slots = 0;
  for (int64_t group = 0, first = 0; group < l.groups; ++group) {
    while (first < c.channel_count && c.channels[first] < (group + 1) * l.out) {
      int64_t used = 0;
      while (used < kColumns && first + used < c.channel_count && c.channels[first + used] < (group + 1) * l.out) ++used;
      panels.push_back({group, slots, first, used, round_up(used, kInts)});
      slots += panels.back().width;
      first += used;
    }
  }

  const int64_t line = c.blocks ? round_up(l.x.size, kPer<Code>) : 0;
  const int64_t sample_terms = c.blocks ? l.y.size * line : positions;
  constexpr int64_t kChunk = 4096;  // terms: a panel of them stays in the second cache
  int64_t chunk = most(1, least(c.sample_count, kChunk / most(1, sample_terms)));
  if (!c.blocks) chunk = round_up(chunk, kPer<Code>);
  const int64_t x_codes = c.blocks ? chunk * l.other_y * l.x.taps * line : pixels * chunk;
  const int64_t g_codes = chunk * sample_terms, g_words = g_codes / kPer<Code>;
  const int64_t pitch = round_up(x_codes * kSize, 64) / kSize + 64 / kSize;

  Buffer<Code> x((inputs + 1) * pitch);  // the last row: 1 inside the image
  Code* const ones = x.data + inputs * pitch;
  Buffer<uint32_t> g(slots * g_words), column_of_ones(g_words * kInts);
  const int64_t cells = l.in * slots * taps;  // of the result, columns last: (tap, slot of the panel, row, column)
  const int64_t bands = c.blocks ? 1 : most(1, ceil_div(positions, most(1, kChunk / chunk)));
  const int64_t rounds = most(1, ceil_div(c.sample_count, chunk)) * bands;
  Buffer<Sum> totals(c.blocks || rounds == 1 ? 0 : cells);
  Buffer<float> grads(c.blocks && rounds > 1 ? cells : 0);
  const int64_t segments = c.blocks ? chunk : 1;
  Buffer<Sum> column_sums(segments * taps * slots), row_sums(segments * taps * inputs), base(segments * taps * slots);
  Buffer<float> row_floats(segments * taps * inputs), column_floats(segments * taps * slots);
  Buffer<float> scale(segments * slots), offset(segments * slots);
  Buffer<int64_t> terms(segments * taps);
  const Decoder<Code> decode_x(c.x, row_by), decode_g(c.g, -column_by);
  const int64_t steps = steps_of<Code>(c.x, c.g);

  Buffer<int32_t> x_list(x_codes), g_list(g_codes);  // where each term is in the chunk: sample * positions + position
  int64_t listed = -1;
  const auto make_lists = [&](int64_t samples) {
    if (samples == listed) return;
    listed = samples;
    const int32_t no_x = static_cast<int32_t>(chunk * pixels), no_g = static_cast<int32_t>(chunk * positions);
    if (!c.blocks) {
      for (int64_t s = 0; s < chunk; ++s) {
        for (int64_t p = 0; p < pixels; ++p) x_list[p * chunk + s] = s < samples ? static_cast<int32_t>(s * pixels + p) : no_x;
        for (int64_t p = 0; p < positions; ++p) {
          g_list[p * chunk + s] = s < samples ? static_cast<int32_t>(s * positions + p) : no_g;
        }
      }
    } else {
      int32_t *to_x = x_list.data, *to_g = g_list.data;
      for (int64_t s = 0; s < chunk; ++s) {
        for (int64_t y = 0; y < l.other_y; ++y) {
          for (int64_t tap = 0; tap < l.x.taps; ++tap) {
            for (int64_t i = 0; i < line; ++i) {
              const int32_t met = i < l.x.size ? l.x.at[i * l.x.taps + tap] : -1;
              *to_x++ = s < samples && met >= 0 ? static_cast<int32_t>((s * l.other_y + y) * l.other_x + met) : no_x;
            }
          }
        }
        for (int64_t y = 0; y < l.y.size; ++y) {
          for (int64_t i = 0; i < line; ++i) {
            *to_g++ = s < samples && i < l.x.size ? static_cast<int32_t>((s * l.y.size + y) * l.x.size + i) : no_g;
          }
        }
      }
    }
    for (int64_t i = 0; i < x_codes; ++i) ones[i] = x_list[i] != no_x;
    for (int64_t word = 0; word < g_words; ++word) {
      Code four[kPer<Code>];
      for (int j = 0; j < kPer<Code>; ++j) four[j] = g_list[word * kPer<Code> + j] != no_g;
      for (int i = 0; i < kInts; ++i) std::memcpy(column_of_ones.data + word * kInts + i, four, 4);
    }
  };

  // the runs that a tap meets, in positions [begin, end) of all samples or of one
  const auto runs_of = [&](int64_t tap, int64_t segment, int64_t begin, int64_t end, std::vector<Run>& runs) {
    const size_t first = runs.size();
    const int64_t ky = tap / l.x.taps, kx = tap % l.x.taps;
    if (c.blocks) {
      for (int64_t y = 0; y < l.y.size; ++y) {
        const int32_t met = l.y.at[y * l.y.taps + ky];
        if (met < 0) continue;
        append(runs, first, {((segment * l.other_y + met) * l.x.taps + kx) * line * kSize,
                             (segment * l.y.size + y) * line / kPer<Code>, line / kPer<Code>});
      }
      return;
    }
    for (int64_t p = begin; p < end; ++p) {
      const int32_t y = l.y.at[p / l.x.size * l.y.taps + ky], x_at = l.x.at[p % l.x.size * l.x.taps + kx];
      if (y < 0 || x_at < 0) continue;
      append(runs, first, {(y * l.other_x + x_at) * chunk * kSize, p * chunk / kPer<Code>, chunk / kPer<Code>});
    }
  };

  const auto pack_x = [&](int64_t first_sample) {
    constexpr int64_t together = 16;
    const int64_t words = x_codes / kPer<Code>, row_bytes = ceil_div(inputs * c.x.storage, 8), none = chunk * pixels;
    parallel(ceil_div(words, together), most(1, 4096 / (inputs + 1)), [&](int64_t begin, int64_t end) {
      const int64_t padded = inputs + 16;  // rows that do not lie a power of two apart
      Buffer<Code> codes(kPer<Code> * padded), zeros(inputs);
      Buffer<uint32_t> words_of(together * padded);
      std::memset(zeros.data, 0, inputs * kSize);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item * together, count = least(together, words - first);
        for (int64_t i = 0; i < count; ++i) {
          const Code* rows[kPer<Code>];
          for (int j = 0; j < kPer<Code>; ++j) {
            const int64_t at = x_list[(first + i) * kPer<Code> + j];
            rows[j] = zeros.data;
            if (at == none) continue;
            const int64_t sample = first_sample + at / pixels, n = c.samples ? c.samples[sample] : sample;
            decode_x(c.x.data + (n * pixels + at % pixels) * row_bytes, 0, inputs, codes.data + j * padded);
            rows[j] = codes.data + j * padded;
          }
          interleave(rows, inputs, words_of.data + i * padded);
        }
        for (int64_t channel = 0; channel < inputs; ++channel) {
          uint32_t* to = reinterpret_cast<uint32_t*>(x.data + channel * pitch) + first;
          const uint32_t* from = words_of.data + channel;
          for (int64_t i = 0; i < count; ++i) to[i] = from[i * padded];
        }
      }
    });
  };

  const auto pack_g = [&](int64_t first_sample, int64_t samples) {
    const int64_t none = chunk * positions, outputs = l.groups * l.out;
    const auto sample_of = [&](int64_t s) -> int64_t { return c.samples ? c.samples[first_sample + s] : first_sample + s; };
    if (c.g.channel) {
      // some columns' codes in a row each: a line or a sample begins a word, or words are made of one code a sample
      const bool side_by_side = c.blocks || positions == 1;
      const int64_t packed = ceil_div(positions * c.g.storage, 8), whole = ceil_div(l.n * positions * c.g.storage, 8);
      const int64_t step = side_by_side ? 1 : chunk / kPer<Code>, length = g_codes + 64;  // what is read beyond is not used
      parallel(slots / kInts, 1, [&](int64_t begin, int64_t end) {
        Buffer<Code> codes(kInts * length);
        for (int64_t item = begin; item < end; ++item) {
          int64_t number = 0;
          while (item * kInts >= panels[number].slot + panels[number].width) ++number;
          const Panel& panel = panels[number];
          const int64_t first = item * kInts - panel.slot;
          uint32_t* to = g.data + panel.slot * g_words + first;
          std::memset(codes.data, 0, kInts * length * kSize);
          for (int64_t i = 0; i < least(kInts, panel.used - first); ++i) {
            const int64_t channel = c.channels[panel.first + first + i];
            for (int64_t s = 0; s < samples; ++s) {
              const int64_t n = sample_of(s), from = c.g.by_channel ? n * positions : 0;
              const uint8_t* row = c.g.data + (c.g.by_channel ? channel * whole : (channel * l.n + n) * packed);
              Code* at = codes.data + i * length + s * sample_terms;
              if (line == l.x.size || !c.blocks) {
                decode_g(row, from, positions, at);
              } else {
                for (int64_t y = 0; y < l.y.size; ++y) decode_g(row, from + y * l.x.size, l.x.size, at + y * line);
              }
            }
          }
          constexpr int64_t together = 16;
          const int64_t strips = side_by_side ? g_words : positions;
          for (int64_t group = 0; group < step; ++group) {
            for (int64_t strip = 0; strip < strips; strip += together) {
              for (int64_t i = 0; i < kInts; ++i) {
                const Code* row = codes.data + i * length;
                uint32_t words[together];
                if (side_by_side) {
                  std::memcpy(words, row + strip * kPer<Code>, sizeof(words));
                } else {
                  const Code* rows[kPer<Code>];
                  for (int j = 0; j < kPer<Code>; ++j) rows[j] = row + (group * kPer<Code> + j) * positions + strip;
                  interleave(rows, together, words);
                }
                for (int64_t w = 0; w < least(together, strips - strip); ++w) {
                  to[((strip + w) * step + group) * panel.width + i] = words[w];
                }
              }
            }
          }
        }
      });
      return;
    }
    const int64_t row_bytes = ceil_div(outputs * c.g.storage, 8);
    parallel(g_words, most(1, 16384 / (outputs + 1)), [&](int64_t begin, int64_t end) {
      Buffer<Code> codes(kPer<Code> * outputs), zeros(outputs);
      Buffer<uint32_t> words_of(outputs);
      std::memset(zeros.data, 0, outputs * kSize);
      for (int64_t word = begin; word < end; ++word) {
        const Code* rows[kPer<Code>];
        for (int j = 0; j < kPer<Code>; ++j) {
          const int64_t at = g_list[word * kPer<Code> + j];
          rows[j] = zeros.data;
          if (at == none) continue;
          decode_g(c.g.data + (sample_of(at / positions) * positions + at % positions) * row_bytes, 0, outputs,
                   codes.data + j * outputs);
          rows[j] = codes.data + j * outputs;
        }
        interleave(rows, outputs, words_of.data);
        for (const Panel& panel : panels) {
          uint32_t* to = g.data + panel.slot * g_words + word * panel.width;
          for (int64_t i = 0; i < panel.used; ++i) to[i] = words_of[c.channels[panel.first + i]];
          std::memset(to + panel.used, 0, (panel.width - panel.used) * 4);
        }
      }
    });
  };

  // rows [first, first + height) of the group by a panel
  const auto rows_at = [&](const Panel& panel, int64_t first, int64_t height, const uint8_t** row) {
    for (int64_t m = 0; m < kTile; ++m) {
      row[m] = reinterpret_cast<const uint8_t*>(x.data + (panel.group * l.in + first + least(m, height - 1)) * pitch);
    }
  };
  const auto add_sums = [&](const Panel& panel, int64_t at, const std::vector<Run>& runs, bool of_rows) {
    const uint8_t* row[kTile];
    alignas(64) Sum sums[kTile][kColumns];
    const auto multiply_ones = [&](int64_t height, int64_t width, const uint32_t* columns) {
      Loop<Code, Sum>(height, width)(row, runs.data(), runs.size(), columns, steps, sums);
    };
    for (int m = 0; m < kTile; ++m) row[m] = reinterpret_cast<const uint8_t*>(ones);
    multiply_ones(1, panel.width, g.data + panel.slot * g_words);
    for (int64_t i = 0; i < panel.width; ++i) column_sums[at * slots + panel.slot + i] += sums[0][i];
    if (panel.slot == 0) {
      multiply_ones(1, kInts, column_of_ones.data);
      terms[at] += sums[0][0];
    }
    for (int64_t i = 0; of_rows && i < l.in; i += kTile) {
      const int64_t height = least(kTile, l.in - i);
      rows_at(panel, i, height, row);
      multiply_ones(height, kInts, column_of_ones.data);
      for (int64_t m = 0; m < height; ++m) row_sums[at * inputs + panel.group * l.in + i + m] += sums[m][0];
    }
  };
  const auto first_of_group = [&](size_t i) { return i == 0 || panels[i].group != panels[i - 1].group; };
  const bool need_rows = g_offset || column_by != 0;

  const int64_t tiles = ceil_div(l.in, kTile), all_panels = static_cast<int64_t>(panels.size());
  const int64_t parts = least(tiles, ceil_div(16, all_panels * taps));
  const auto finish_sums = [&](int64_t at) {
    for (int64_t i = 0; i < slots; ++i) {
      const int64_t whole = column_sums[at * slots + i] + column_by * terms[at];
      base[at * slots + i] = static_cast<Sum>(-row_by * whole);
      column_floats[at * slots + i] = static_cast<float>(whole);
    }
    for (int64_t i = 0; i < inputs; ++i) {
      row_floats[at * inputs + i] = static_cast<float>(row_sums[at * inputs + i] - row_by * terms[at]);
    }
  };

  const int64_t band = c.blocks ? most(1, positions) : most(1, kChunk / chunk);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t first = round / bands * chunk, samples = least(chunk, c.sample_count - first);
    const int64_t begin_position = round % bands * band, end_position = least(positions, begin_position + band);
    const bool fresh = round == 0, last = round == rounds - 1;
    if (begin_position == 0) {
      make_lists(samples);
      pack_x(first);
      pack_g(first, samples);
    }
    const int64_t used = c.blocks ? samples : 1;
    if (fresh || c.blocks) {
      std::memset(column_sums.data, 0, segments * taps * slots * sizeof(Sum));
      std::memset(row_sums.data, 0, segments * taps * inputs * sizeof(Sum));
      std::memset(terms.data, 0, segments * taps * sizeof(int64_t));
    }
    std::vector<std::vector<Run>> runs(used * taps);
    parallel(used * taps, 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        runs_of(at % taps, at / taps, begin_position, end_position, runs[at]);
        for (size_t i = 0; i < panels.size(); ++i) add_sums(panels[i], at, runs[at], need_rows && first_of_group(i));
        if (last || c.blocks) finish_sums(at);
      }
    });
    for (int64_t s = 0; s < used; ++s) {
      const int64_t n = !c.blocks ? 0 : c.samples ? c.samples[first + s] : first + s;  // no sample may be kept
      for (const Panel& panel : panels) {
        for (int64_t i = 0; i < panel.width; ++i) {
          const int64_t channel = i < panel.used ? c.channels[panel.first + i] : -1;
          scale[s * slots + panel.slot + i] = channel < 0 ? 0 : c.g_scale(n, channel);
          offset[s * slots + panel.slot + i] = channel < 0 || !g_offset ? 0 : c.g_offset(n, channel);
        }
      }
    }

    parallel(all_panels * taps * parts, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> own(ceil_div(tiles, parts) * kTile * kColumns);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t part = item % parts, tap = item / parts % taps;
        const Panel& panel = panels[item / parts / taps];
        const int64_t row_begin = tiles * part / parts * kTile, row_end = least(l.in, tiles * (part + 1) / parts * kTile);
        const int64_t cell = (tap * slots + panel.slot) * l.in + row_begin * panel.width;
        float* const grad = c.blocks && rounds > 1 ? grads.data + cell : own.data;
        if (c.blocks && fresh) std::memset(grad, 0, (row_end - row_begin) * panel.width * sizeof(float));
        for (int64_t i = row_begin; i < row_end; i += kTile) {
          const int64_t height = least(kTile, row_end - i);
          const uint8_t* row[kTile];
          rows_at(panel, i, height, row);
          const Loop<Code, Sum> loop(height, panel.width);
          for (int64_t s = 0; s < used; ++s) {
            const std::vector<Run>& of_tap = runs[s * taps + tap];
            alignas(64) Sum sums[kTile][kColumns];
            loop(row, of_tap.data(), of_tap.size(), g.data + panel.slot * g_words, steps, sums);
            for (int64_t m = 0; !(c.blocks || rounds == 1) && m < height; ++m) {
              Sum* total = totals.data + cell + (i - row_begin + m) * panel.width;
              for (int64_t j = 0; !fresh && j < panel.width; ++j) sums[m][j] += total[j];
              if (!last) std::memcpy(total, sums[m], panel.width * sizeof(Sum));
            }
            if (!c.blocks && !last) continue;
            Row<Sum> of_row[kTile];
            for (int64_t m = 0; m < height; ++m) {
              const int64_t at = (s * taps + tap) * inputs + panel.group * l.in + i + m;
              of_row[m] = {static_cast<Sum>(column_by * row_sums[at]), row_floats[at], c.x_scale, c.x_offset,
                           grad + (i - row_begin + m) * panel.width};
            }
            const int64_t at = (s * taps + tap) * slots + panel.slot, slot = s * slots + panel.slot;
            const Columns<Sum> column{base.data + at, column_floats.data + at, scale.data + slot,
                                      g_offset ? offset.data + slot : nullptr, nullptr};
            const auto finish = c.blocks ? finish_of<false, true, Sum> : finish_of<false, false, Sum>;
            finish(panel.width)(sums, height, of_row, column, static_cast<float>(terms[s * taps + tap]));
          }
        }
        constexpr int64_t together = 16;  // rows and columns are exchanged
        for (int64_t i = row_begin; last && i < row_end; i += together) {
          for (int64_t j = 0; j < panel.used; ++j) {
            float* to = c.grad + (c.channels[panel.first + j] * taps + tap) * l.in;
            for (int64_t k = i; k < least(row_end, i + together); ++k) to[k] = grad[(k - row_begin) * panel.width + j];
          }
        }
      }
    });
  }
}

// Bytes where the machine multiplies them, or where their sums fit 16 bits for a while.
inline bool in_bytes(const Integers& row, const Integers& column) {
#if defined(FQT_AVX512)
  return row.storage <= 8 && column.storage <= 8;
#elif defined(FQT_AVX2)
  return narrow_steps(row, column) >= 8;
#else
  return false;
#endif
}

}  // namespace

void integer_gather(const IntegerGather& c) {
  const bool wide = c.layer.taps() * c.depth > most_terms(c.a, c.b) || apart(c.a, c.b);
#if defined(FQT_AVX512) || defined(FQT_AVX2)
  if (in_bytes(c.a, c.b)) return wide ? gather<uint8_t, int64_t>(c) : gather<uint8_t, int32_t>(c);
#endif
  wide ? gather<int16_t, int64_t>(c) : gather<int16_t, int32_t>(c);
}

void integer_grad_weight(const IntegerGradWeight& c) {
  const bool wide = (c.blocks ? 1 : c.sample_count) * c.layer.positions() > most_terms(c.x, c.g);
#if defined(FQT_AVX512) || defined(FQT_AVX2)
  if (in_bytes(c.x, c.g)) return wide ? weigh<uint8_t, int64_t>(c) : weigh<uint8_t, int32_t>(c);
#endif
  wide ? weigh<int16_t, int64_t>(c) : weigh<int16_t, int32_t>(c);
}
