// `output` of integers for few rows, for instance the one token that a language model generates: each result is a dot product that
// reads the packed codes of its column directly. Repacking the columns into panels, as integer_gather.h does, would take longer
// than multiplying so few rows.
//
// Columns of less than 8 bits: the stored bits v of a code give the code as (v << up) + add, and a row's code is a + shift, where
// `shift` is chosen so that a fits a signed byte. Hence
//   sum of (row's code * column's code) = (sum of a * v << up) + add * (sum of a) + shift * (sum of the column's codes).
// A byte of a column holds several codes. A row is therefore stored as several planes: plane j holds, one after another, those
// codes of the row that are multiplied by the j-th code of each byte. Columns of 8 bits, and rows for them, are 16-bit integers.
//
// Overflow: a product of 4-bit codes is at most 15 * 128, an instruction adds two of them to 3,840, and 16 bits hold the sum of eight
// such results: both planes of four vectors of bytes. Narrower codes have more planes, but their sums are smaller.

namespace {

constexpr int64_t kFewRows = 16;

inline bool has_few_rows(const IntegerGather& c) {
  const Layer& l = c.layer;
  const bool pointwise = l.taps() == 1 && l.groups == 1 && l.y.kinds == 1 && l.x.kinds == 1 && l.y.size == l.other_y &&
                         l.x.size == l.other_x && l.y.at[0] == 0 && l.x.at[0] == 0;
  return pointwise && !c.across && c.mask == nullptr && c.kept == nullptr && c.a.storage <= 8 && c.b.storage <= 8 &&
         c.depth <= kMostTerms && l.n * l.positions() <= kFewRows;
}

class FewRows {
 public:
  explicit FewRows(const IntegerGather& call)
      : c(call), rows(call.layer.n * call.layer.positions()), depth(call.depth), storage(static_cast<int>(call.b.storage)),
        row_bytes(ceil_div(depth * storage, 8)), planes(8 / storage), plane(round_up(row_bytes, kStep)),
        row_codes(storage == 8 ? plane : planes * plane / 2),
        shift(storage < 8 ? column_shift<uint8_t>(call.a) : 0), up(call.b.meaning == Meaning::sign),
        flip(storage < 8 && call.b.meaning == Meaning::complement ? 1 << (storage - 1) : 0), add(up ? -1 : -flip),
        need_column_sums(shift != 0 || call.a_offset.data != nullptr), codes((rows + 1) * row_codes), row_sums(rows) {}

  void operator()() {
    for (int64_t m = 0; m < rows; ++m) lay_row(m);
    lay_ones();
    const int64_t panels = ceil_div(c.columns, kColumns);
    parallel(panels, most(1, (1 << 16) / (kColumns * depth + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) multiply_panel(i * kColumns, least(kColumns, c.columns - i * kColumns));
    });
  }

 private:
  static constexpr int64_t kStep = 32;     // bytes of a column at a time
  static constexpr int64_t kTogether = 4;  // rows, or columns of one row

  int16_t* of_row(int64_t m) const { return codes.data + m * row_codes; }

  void lay_row(int64_t m) {
    Buffer<int16_t> row(depth);
    Decoder<int16_t>(c.a, -shift)(c.a.data + m * ceil_div(depth * c.a.storage, 8), 0, depth, row.data);
    int64_t sum = 0;
    for (int64_t i = 0; i < depth; ++i) sum += row[i];
    row_sums[m] = sum + shift * depth;
    lay(m, [&](int64_t i) { return row.data[i]; });
  }

  // The row behind all others, by which columns are summed.
  void lay_ones() {
    if (need_column_sums) lay(rows, [](int64_t) { return 1; });
  }

  template <class Code>
  void lay(int64_t m, const Code& code) {
    std::memset(of_row(m), 0, row_codes * sizeof(int16_t));
    int8_t* const bytes = reinterpret_cast<int8_t*>(of_row(m));  // of columns of less than 8 bits
    if (storage == 8) {
      for (int64_t i = 0; i < depth; ++i) of_row(m)[i] = static_cast<int16_t>(code(i));
      return;
    }
    for (int64_t j = 0; j < planes; ++j) {
      int8_t* to = bytes + j * plane;
      for (int64_t i = j; i < depth; i += planes) *to++ = static_cast<int8_t>(code(i));
    }
  }

  // Columns [first, first + used): their numbers, then some rows at a time.
  void multiply_panel(int64_t first, int64_t used) {
    static constexpr int32_t base[kColumns] = {};
    alignas(64) float column_sum[kColumns], scale[kColumns], offset[kColumns], bias[kColumns];
    int64_t column_codes[kColumns];
    const int64_t width = round_up(used, kInts);
    for (int64_t k = 0; k < width; ++k) {
      column_codes[k] = 0;
      column_sum[k] = scale[k] = offset[k] = bias[k] = 0;
      if (k >= used) continue;
      if (need_column_sums) {
        int32_t ones;
        multiply<1>(first + k, rows, &ones);
        column_codes[k] = (int64_t{ones} << up) + add * depth;
        column_sum[k] = static_cast<float>(column_codes[k]);
      }
      scale[k] = c.b_scale(first + k, 0);
      if (c.b_offset.data) offset[k] = c.b_offset(first + k, 0);
      if (c.bias) bias[k] = c.bias[first + k];
    }
    const Columns<int32_t> columns{base, column_sum, scale, c.b_offset.data ? offset : nullptr, c.bias ? bias : nullptr};
    for (int64_t row = 0; row < rows; row += kTogether) {
      const int64_t count = least(kTogether, rows - row);
      alignas(64) int32_t sums[kTogether][kColumns];
      for (int64_t m = 0; m < count; ++m) {
        for (int64_t k = used; k < width; ++k) sums[m][k] = 0;
      }
      const auto put = [&](int64_t m, int64_t k, int32_t dot) {
        const int64_t shifted = row_sums[row + m] - shift * depth;
        sums[m][k] = static_cast<int32_t>((int64_t{dot} << up) + add * shifted + shift * column_codes[k]);
      };
      int64_t k = 0;
      if (count == 1 && storage < 8) {
        for (; k + kTogether <= used; k += kTogether) {
          int32_t dots[kTogether];
          multiply_columns(first + k, row, dots);
          for (int64_t i = 0; i < kTogether; ++i) put(0, k + i, dots[i]);
        }
      }
      for (; k < used; ++k) {
        int32_t dots[kTogether];
        count == 1   ? multiply<1>(first + k, row, dots)
        : count == 2 ? multiply<2>(first + k, row, dots)
        : count == 3 ? multiply<3>(first + k, row, dots)
                     : multiply<4>(first + k, row, dots);
        for (int64_t m = 0; m < count; ++m) put(m, k, dots[m]);
      }
      finish_rows(row, count, first, used, sums, columns);
    }
  }

  // The float part, as of any tile.
  void finish_rows(int64_t row, int64_t count, int64_t first, int64_t used, const int32_t (*sums)[kColumns],
                   const Columns<int32_t>& columns) {
    alignas(64) float t[kTogether][kColumns], a_offset[kTogether];
    Row<int32_t> of_row[kTogether];
    for (int64_t m = 0; m < count; ++m) {
      const int64_t n = (row + m) / c.layer.positions(), p = (row + m) % c.layer.positions();
      a_offset[m] = c.a_offset.data ? c.a_offset(n, p) : 0;
      of_row[m] = {0, static_cast<float>(row_sums[row + m]), c.a_scale(n, p), c.a_offset.data ? a_offset + m : nullptr, t[m]};
    }
    finish_of<true, false, int32_t>(round_up(used, kInts))(sums, count, of_row, columns, static_cast<float>(depth));
    for (int64_t m = 0; m < count; ++m) std::memcpy(c.result + (row + m) * c.columns + first, t[m], used * sizeof(float));
  }

  // dots[m] = the sum over column `k` of its stored codes times those of row first + m.
  template <int M>
  void multiply(int64_t k, int64_t first, int32_t* dots) const {
    const uint8_t* column = c.b.data + k * row_bytes;
    if (storage == 8) {
      c.b.meaning == Meaning::complement ? multiply_bytes<M>(reinterpret_cast<const int8_t*>(column), of_row(first), dots)
                                         : multiply_bytes<M>(column, of_row(first), dots);
      return;
    }
    const int8_t* planes_of = reinterpret_cast<const int8_t*>(of_row(first));
    storage == 4   ? multiply_packed<4, M>(column, planes_of, dots)
    : storage == 2 ? multiply_packed<2, M>(column, planes_of, dots)
                   : multiply_packed<1, M>(column, planes_of, dots);
  }

  // dots[i] = the same of column k + i and one row: what is read of the row serves four columns of less than 8 bits.
  void multiply_columns(int64_t k, int64_t row, int32_t* dots) const {
    const uint8_t* const columns = c.b.data + k * row_bytes;
    const int8_t* const planes_of = reinterpret_cast<const int8_t*>(of_row(row));
    storage == 4   ? multiply_packed_columns<4>(columns, planes_of, dots)
    : storage == 2 ? multiply_packed_columns<2>(columns, planes_of, dots)
                   : multiply_packed_columns<1>(columns, planes_of, dots);
  }

#if defined(FQT_AVX512) || defined(FQT_AVX2)
  static int32_t total(__m256i sums) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }

  static __m256i load_column(const uint8_t* column) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column)); }

  // The last bytes of a column, filled up with zeros.
  static __m256i load_last(const uint8_t* column, int64_t bytes) {
    alignas(kStep) uint8_t last[kStep] = {};
    std::memcpy(last, column, bytes);
    return load_column(last);
  }

  // Adds kStep bytes of a column times what the rows have in their planes.
  template <int kBits, int M>
  __attribute__((always_inline)) void add_packed(__m256i bits, const int8_t* planes_at, __m256i (&sum)[M]) const {
    const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1);
#pragma GCC unroll 8
    for (int j = 0; j < 8 / kBits; ++j, bits = _mm256_srli_epi16(bits, kBits), planes_at += plane) {
      const __m256i v = _mm256_and_si256(bits, mask);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes_at + 2 * m * row_codes));
        sum[m] = _mm256_add_epi16(sum[m], _mm256_maddubs_epi16(v, row));
      }
    }
  }

  // As `add_packed`, of one row and four columns.
  template <int kBits>
  __attribute__((always_inline)) void add_packed_columns(__m256i (&bits)[kTogether], const int8_t* planes_at,
                                                         __m256i (&sum)[kTogether]) const {
    const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1);
#pragma GCC unroll 8
    for (int j = 0; j < 8 / kBits; ++j, planes_at += plane) {
      const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes_at));
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        const __m256i v = _mm256_and_si256(_mm256_srli_epi16(bits[i], j * kBits), mask);
        sum[i] = _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(v, row));
      }
    }
  }

  template <int kBits>
  void multiply_packed_columns(const uint8_t* columns, const int8_t* row_at, int32_t* dots) const {
    constexpr int64_t kMost = 4 * kStep;
    const __m256i flipped = _mm256_set1_epi8(static_cast<char>(flip * (255 / ((1 << kBits) - 1))));
    __m256i sum[kTogether] = {};
    for (int64_t at = 0; at < row_bytes;) {
      __m256i narrow[kTogether] = {}, bits[kTogether];
      for (const int64_t stop = at + kMost; at < stop && at < row_bytes; at += kStep) {
        const int64_t left = row_bytes - at;
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
          const uint8_t* const from = columns + i * row_bytes + at;
          bits[i] = _mm256_xor_si256(left < kStep ? load_last(from, left) : load_column(from), flipped);
        }
        add_packed_columns<kBits>(bits, row_at + at, narrow);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(narrow[i], _mm256_set1_epi16(1)));
      }
    }
    const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dots), four);
  }

  template <int kBits, int M>
  void multiply_packed(const uint8_t* column, const int8_t* rows_at, int32_t* dots) const {
    constexpr int64_t kMost = 4 * kStep;
    const __m256i flipped = _mm256_set1_epi8(static_cast<char>(flip * (255 / ((1 << kBits) - 1))));  // in every code of a byte
    __m256i sum[M] = {};
    for (int64_t at = 0; at < row_bytes;) {
      __m256i narrow[M] = {};
      const int64_t stop = at + kMost;
      for (; at < stop && at + kStep <= row_bytes; at += kStep) {
        add_packed<kBits, M>(_mm256_xor_si256(load_column(column + at), flipped), rows_at + at, narrow);
      }
      if (at < stop && at < row_bytes) {
        add_packed<kBits, M>(_mm256_xor_si256(load_last(column + at, row_bytes - at), flipped), rows_at + at, narrow);
        at = row_bytes;
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(narrow[m], _mm256_set1_epi16(1)));
      }
    }
    for (int m = 0; m < M; ++m) dots[m] = total(sum[m]);
  }

  template <int M, class Byte>
  __attribute__((always_inline)) void add_bytes(__m256i bytes, const int16_t* row_at, __m256i (&sum)[M]) const {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m128i sixteen = half ? _mm256_extracti128_si256(bytes, 1) : _mm256_castsi256_si128(bytes);
      const __m256i b = std::is_signed_v<Byte> ? _mm256_cvtepi8_epi16(sixteen) : _mm256_cvtepu8_epi16(sixteen);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row_at + m * row_codes + 16 * half));
        sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(row, b));
      }
    }
  }

  template <int M, class Byte>
  void multiply_bytes(const Byte* column, const int16_t* rows_at, int32_t* dots) const {
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(column);
    __m256i sum[M] = {};
    int64_t at = 0;
    for (; at + kStep <= depth; at += kStep) add_bytes<M, Byte>(load_column(bytes + at), rows_at + at, sum);
    if (at < depth) add_bytes<M, Byte>(load_last(bytes + at, depth - at), rows_at + at, sum);
    for (int m = 0; m < M; ++m) dots[m] = total(sum[m]);
  }
#else
  template <int kBits>
  void multiply_packed_columns(const uint8_t* columns, const int8_t* row_at, int32_t* dots) const {
    for (int i = 0; i < kTogether; ++i) multiply_packed<kBits, 1>(columns + i * row_bytes, row_at, dots + i);
  }

  template <int kBits, int M>
  void multiply_packed(const uint8_t* column, const int8_t* rows_at, int32_t* dots) const {
    for (int m = 0; m < M; ++m) {
      int32_t sum = 0;
      for (int j = 0; j < 8 / kBits; ++j) {
        const int8_t* row = rows_at + 2 * m * row_codes + j * plane;
        for (int64_t i = 0; i < row_bytes; ++i) sum += ((column[i] >> j * kBits & ((1 << kBits) - 1)) ^ flip) * row[i];
      }
      dots[m] = sum;
    }
  }

  template <int M, class Byte>
  void multiply_bytes(const Byte* column, const int16_t* rows_at, int32_t* dots) const {
    for (int m = 0; m < M; ++m) {
      int32_t sum = 0;
      for (int64_t i = 0; i < depth; ++i) sum += rows_at[m * row_codes + i] * column[i];
      dots[m] = sum;
    }
  }
#endif

  const IntegerGather& c;
  const int64_t rows, depth;
  const int storage;                     // of columns
  const int64_t row_bytes, planes, plane;  // bytes of a column; planes of a row, and the codes of one, with room behind
  const int64_t row_codes;                 // 16-bit integers of a row
  const int shift, up, flip, add;
  const bool need_column_sums;
  Buffer<int16_t> codes;                 // (row, plane, code), and a row of ones
  Buffer<int64_t> row_sums;              // of codes
};

}  // namespace
