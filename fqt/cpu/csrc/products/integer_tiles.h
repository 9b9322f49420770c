// Tiles of the products of integers: the loops that sum them, and the float part that finishes them.

namespace {

// What tiles of some rows sum: the runs at which both operands go on; a panel of columns; and how many words a loop may add up
// before it takes them up in wider sums.
struct Terms {
  const Run *first, *last;
  const uint32_t* columns;
  int64_t steps;
};

// Rows of a tile: all kTile of them, half or one are read. next: the first of the tile that comes next, which is brought near
// meanwhile, as if its rows followed each other in memory.
struct Rows {
  const uint8_t* of[kTile];
  const uint8_t* next;
};

template <class Sum>
using Multiply = void (*)(const Terms&, const Rows&, Sum (*)[kColumns]);

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

// sums[m][column] = the sum over all runs of 16-bit integers, for M rows and V vectors of columns. After `steps` words, which
// 32 bits hold, sums of 64 bits take them up.
template <class Sum, int M, int V>
void multiply_words(const Terms& terms, const Rows& rows, Sum (*sums)[kColumns]) {
  const Terms t = terms;  // copies: for all the compiler knows, writing the sums changes the originals
  const Rows r = rows;
  typedef Sum Sums __attribute__((vector_size(sizeof(Sum) * kInts), may_alias));
  constexpr bool kWide = sizeof(Sum) == 8;
  Lanes sum[M][V];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) sum[m][v] = Lanes{};
  }
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
  int64_t left = t.steps;
  for (const Run* run = t.first; run < t.last; ++run) {
    const uint32_t* column = t.columns + run->column * V * kInts;
    for (int64_t at = run->row, end = at + 4 * run->words; at < end;) {
      const int64_t stop = kWide ? least(end, at + 4 * left) : end;
      left -= (stop - at) / 4;
      for (; at < stop; at += 4, column += V * kInts) {
        __builtin_prefetch(r.next + at * M);
        Lanes c[V];
        for (int v = 0; v < V; ++v) c[v] = *reinterpret_cast<const Lanes*>(column + v * kInts);
        for (int m = 0; m < M; ++m) {
          const int32_t row = word(r.of[m] + at);
          for (int v = 0; v < V; ++v) sum[m][v] = add_pairs(sum[m][v], row, c[v]);
        }
      }
      if (kWide && left == 0) {
        take_up();
        left = t.steps;
      }
    }
  }
  take_up();
}

#if defined(FQT_AVX512) || defined(FQT_AVX2)
// The same of bytes. AVX2 adds two products at once in 16 bits, which hold `steps` of these pairs.
template <class Sum, int M, int V>
void multiply_bytes(const Terms& terms, const Rows& rows, Sum (*sums)[kColumns]) {
  const Terms t = terms;  // copies: for all the compiler knows, writing the sums changes the originals
  const Rows r = rows;
#if defined(FQT_AVX512)
  __m512i sum[M][V];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) sum[m][v] = _mm512_setzero_si512();
  }
  for (const Run* run = t.first; run < t.last; ++run) {
    const uint32_t* column = t.columns + run->column * V * kInts;
    for (int64_t at = run->row, end = at + 4 * run->words; at < end; at += 4, column += V * kInts) {
      __m512i c[V];
      for (int v = 0; v < V; ++v) c[v] = _mm512_load_si512(column + v * kInts);
      for (int m = 0; m < M; ++m) {
        const __m512i row = _mm512_set1_epi32(word(r.of[m] + at));
        for (int v = 0; v < V; ++v) sum[m][v] = _mm512_dpbusd_epi32(sum[m][v], row, c[v]);
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
  int64_t left = t.steps;
  for (int m = 0; m < M; ++m) std::memset(sums[m], 0, V * kWidth);
  const auto widen = [&] {
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) {
        __m256i* to = reinterpret_cast<__m256i*>(sums[m] + v * kInts);
        _mm256_store_si256(to, _mm256_add_epi32(_mm256_load_si256(to), _mm256_madd_epi16(sum[m][v], _mm256_set1_epi16(1))));
      }
    }
    clear();
    left = t.steps;
  };
  for (const Run* run = t.first; run < t.last; ++run) {
    const uint32_t* column = t.columns + run->column * V * kInts;
    for (int64_t at = run->row, end = at + 4 * run->words; at < end;) {
      const int64_t stop = least(end, at + 4 * left);
      left -= (stop - at) / 4;
      for (; at < stop; at += 4, column += V * kInts) {
        __builtin_prefetch(r.next + at * M);
        __m256i c[V];
        for (int v = 0; v < V; ++v) c[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(column + v * kInts));
        for (int m = 0; m < M; ++m) {
          const __m256i row = _mm256_set1_epi32(word(r.of[m] + at));
          for (int v = 0; v < V; ++v) sum[m][v] = _mm256_add_epi16(sum[m][v], _mm256_maddubs_epi16(row, c[v]));
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
    static constexpr Multiply<Sum> of[3][4] = FQT_TILES(multiply_bytes);
    return of[height][width / kInts - 1];
  }
#endif
  static constexpr Multiply<Sum> of[3][4] = FQT_TILES(multiply_words);
  return of[height][width / kInts - 1];
#undef FQT_TILES
#undef FQT_LOOPS
}

// The loop that sums a tile over all runs into sums of the type it is asked for.
template <class Code, class Sum>
struct Loop {
  // bytes have no loop for 64 bits: a run fits 32
  using Narrow = std::conditional_t<sizeof(Code) == 1, int32_t, Sum>;
  Multiply<Narrow> multiply;
  int64_t width;
  Loop(int64_t rows, int64_t width) : multiply(multiply_of<Code, Narrow>(rows, width)), width(width) {}

  void operator()(const Terms& t, const Rows& rows, Sum (*sums)[kColumns]) const {
    if constexpr (sizeof(Sum) == sizeof(Narrow)) {
      multiply(t, rows, sums);
    } else {
      std::memset(sums, 0, kTile * sizeof(sums[0]));
      for (Terms one = t; one.first < t.last; ++one.first) {
        alignas(64) int32_t narrow[kTile][kColumns] = {};
        one.last = one.first + 1;
        multiply(one, rows, narrow);
        for (int m = 0; m < kTile; ++m) {
          for (int64_t k = 0; k < width; ++k) sums[m][k] += narrow[m][k];
        }
      }
    }
  }
};

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
  static constexpr Finish<Sum> of_width[] = {finish<row_first, add, 1, Sum>, finish<row_first, add, 2, Sum>,
                                      finish<row_first, add, kVectors == 2 ? 2 : 3, Sum>,
                                      finish<row_first, add, kVectors, Sum>};
  return of_width[width / kInts - 1];
}

}  // namespace
