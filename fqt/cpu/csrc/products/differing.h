// The number of bits in which rows and columns differ, of which `output` of signs by signs is made. AVX2 has no instruction
// that counts bits, so four bits at a time are looked up in a table.

namespace {

#if defined(FQT_AVX2)
// Entry 16 * a + b: the bits in which a and b differ, both of four bits.
struct Differ {
  alignas(64) uint8_t of[256];
  constexpr Differ() : of{} {
    for (int i = 0; i < 256; ++i) {
      for (int bit = 0; bit < 4; ++bit) of[i] += (i / 16 ^ i) >> bit & 1;
    }
  }
};
constexpr Differ kDiffer;
#endif

// Bits of a window, kSpread bytes for each byte: as they are, or where in kDiffer each nibble's table begins.
inline void lay_window(const uint8_t* bits, int64_t bytes, uint8_t* out) {
  int64_t i = 0;
#if defined(FQT_AVX2)
  const __m128i high = _mm_set1_epi8(static_cast<char>(0xf0));
  for (; i + 8 <= bytes; i += 8) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bits + i));
    const __m128i offsets = _mm_unpacklo_epi8(_mm_slli_epi16(eight, 4), eight);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i), _mm_and_si128(offsets, high));
  }
  for (; i < bytes; ++i) out[2 * i] = bits[i] << 4, out[2 * i + 1] = bits[i] & 0xf0;
#else
  for (; i + 8 <= bytes; i += 8) std::memcpy(out + i, bits + i, 8);
  for (; i < bytes; ++i) out[i] = bits[i];
#endif
}

// 32 bits of the weights of kLanes output channels, 4 * kSpread bytes for each: as they are, or a byte for each nibble.
inline void lay_weights(const uint32_t* words, uint8_t* out) {
#if defined(FQT_AVX2)
  const __m256i by_byte = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // what unpacking exchanged
  const __m256i low = _mm256_set1_epi8(15);
  for (int first = 0; first < kLanes; first += 32) {
    __m256i four[4];
    for (int i = 0; i < 4; ++i) {
      const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + first + 8 * i));
      four[i] = _mm256_shuffle_epi8(eight, by_byte);
    }
    const __m256i low01 = _mm256_unpacklo_epi32(four[0], four[1]), high01 = _mm256_unpackhi_epi32(four[0], four[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(four[2], four[3]), high23 = _mm256_unpackhi_epi32(four[2], four[3]);
    const __m256i byte[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                             _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
    for (int i = 0; i < 4; ++i) {
      const __m256i bytes = _mm256_permutevar8x32_epi32(byte[i], in_order);
      __m256i* to = reinterpret_cast<__m256i*>(out + 2 * i * kLanes + first);
      _mm256_storeu_si256(to, _mm256_and_si256(bytes, low));
      _mm256_storeu_si256(to + kLanes / 32, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
    }
  }
#else
  std::memcpy(out, words, 4 * kLanes);
#endif
}

#if defined(FQT_AVX2)
constexpr int64_t kBlock = 56;    // nibbles whose entries, of at most 4, add up in a byte: a multiple of a word's eight
constexpr int64_t kBlocks = 256;  // such blocks that add up in 16 bits

// sum[v] += entries[index[v]] in every byte, for V vectors; entries: 16 bytes, aligned.
template <int V>
inline void add_entries(const uint8_t* entries, const __m256i (&index)[V], __m256i (&sum)[V]) {
  const __m128i* table = reinterpret_cast<const __m128i*>(entries);
  if constexpr (V == 1) {
    sum[0] = _mm256_add_epi8(sum[0], _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(table)), index[0]));
  } else {
    // Written in assembler, because the compiler does all lookups first and has no registers left for what waits to be added.
    static_assert(V == 2);
    __m256i both, found;
    asm("vbroadcasti128 %[table], %[both]\n\t"
        "vpshufb %[index0], %[both], %[found]\n\tvpaddb %[found], %[sum0], %[sum0]\n\t"
        "vpshufb %[index1], %[both], %[found]\n\tvpaddb %[found], %[sum1], %[sum1]"
        : [sum0] "+x"(sum[0]), [sum1] "+x"(sum[1]), [both] "=&x"(both), [found] "=&x"(found)
        : [table] "m"(*table), [index0] "x"(index[0]), [index1] "x"(index[1]));
  }
}

// Compares each of M rows with each of 32 * V columns, and adds the number of bits that differ to `sums`. All have `nibbles`
// nibbles, at most kBlock; a row begins `stride` bytes behind the one before. Unpacking bytes into 16 bits changes their order:
// the sums of 32 columns are those of columns 0 to 7, 16 to 23, 8 to 15 and 24 to 31. The loops are unrolled, because the
// compiler keeps only then every sum in a register.
template <int M, int V>
inline void differing_nibbles(const uint8_t* a, int64_t stride, const uint8_t* w, int64_t nibbles, uint16_t (*sums)[kLanes]) {
  __m256i sum[M][V];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[m][v] = _mm256_setzero_si256();
  }
  for (int64_t k = 0; k < nibbles; ++k, w += kLanes) {
    __m256i index[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) index[v] = (__m256i)load(w + 32 * v);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) add_entries(kDiffer.of + a[m * stride + k], index, sum[m]);
  }
  const __m256i zero = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      __m256i* to = reinterpret_cast<__m256i*>(sums[m] + 32 * v);
      _mm256_store_si256(to, _mm256_add_epi16(_mm256_load_si256(to), _mm256_unpacklo_epi8(sum[m][v], zero)));
      _mm256_store_si256(to + 1, _mm256_add_epi16(_mm256_load_si256(to + 1), _mm256_unpackhi_epi8(sum[m][v], zero)));
    }
  }
}
#else
// Compares each of M rows with each of kLanes columns; out[row][column] is the number of bits that differ. All have `words`
// words of 32 bits; a row begins `stride` bytes behind the one before, and w is what `lay_weights` wrote.
template <int M>
inline void differing_bits_of(const uint8_t* a, int64_t stride, const uint8_t* w, int64_t words, int32_t (*out)[kLanes]) {
#if defined(FQT_AVX512)
  __m512i sum[M];
  for (int m = 0; m < M; ++m) sum[m] = _mm512_setzero_si512();
  for (int64_t k = 0; k < words; ++k) {
    const __m512i column = _mm512_load_si512(w + k * 4 * kLanes);
    for (int m = 0; m < M; ++m) {
      int32_t word;
      std::memcpy(&word, a + m * stride + 4 * k, 4);
      const __m512i differ = _mm512_xor_si512(_mm512_set1_epi32(word), column);
      sum[m] = _mm512_add_epi32(sum[m], _mm512_popcnt_epi32(differ));
    }
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_si512(out[m], sum[m]);
#elif defined(FQT_NEON)
  std::memset(out, 0, M * sizeof(out[0]));
  for (int64_t first = 0; first < words; first += 31) {  // 31 words of at most 8 bits a byte fit a byte
    const int64_t last = first + 31 < words ? first + 31 : words;
    uint8x16_t sum[M][4] = {};
    for (int64_t k = first; k < last; ++k) {
      for (int quarter = 0; quarter < 4; ++quarter) {
        const uint32x4_t column = vld1q_u32(reinterpret_cast<const uint32_t*>(w) + k * kLanes + 4 * quarter);
        for (int m = 0; m < M; ++m) {
          uint32_t word;
          std::memcpy(&word, a + m * stride + 4 * k, 4);
          const uint32x4_t differ = veorq_u32(vdupq_n_u32(word), column);
          sum[m][quarter] = vaddq_u8(sum[m][quarter], vcntq_u8(vreinterpretq_u8_u32(differ)));
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int quarter = 0; quarter < 4; ++quarter) {
        uint32_t* to = reinterpret_cast<uint32_t*>(out[m] + 4 * quarter);
        vst1q_u32(to, vpadalq_u16(vld1q_u32(to), vpaddlq_u8(sum[m][quarter])));
      }
    }
  }
#else
  std::memset(out, 0, M * sizeof(out[0]));
  for (int64_t k = 0; k < words; ++k) {
    uint32_t column[kLanes], word;
    std::memcpy(column, w + k * 4 * kLanes, sizeof(column));
    for (int m = 0; m < M; ++m) {
      std::memcpy(&word, a + m * stride + 4 * k, 4);
      for (int lane = 0; lane < kLanes; ++lane) out[m][lane] += __builtin_popcount(word ^ column[lane]);
    }
  }
#endif
}
#endif

// Rows that are compared together, and the bytes that they may have. AVX2 takes them in blocks, of which one is in the first
// cache while all are in the second; the other loops read whole rows, which have to fit the first.
constexpr int64_t kMostRows = 64;
#if defined(FQT_AVX2)
constexpr int64_t kStripBytes = 1 << 17;
#else
constexpr int64_t kStripBytes = 1 << 14;
#endif

// Compares each row with each of the first `lanes` columns of w; out[row][column] is the number of bits that differ. There are
// at most kMostRows rows. All have `words` words of 32 bits; a row is what `lay_window` wrote and begins `stride` bytes behind
// the one before, and w is what `lay_weights` wrote.
inline void differing_bits(const uint8_t* a, int64_t stride, int64_t rows, const uint8_t* w, int64_t words, int64_t lanes,
                           int32_t (*out)[kLanes]) {
#if defined(FQT_AVX2)
  // For all rows one block of nibbles after the other, so that the block's columns stay in the first cache.
  const auto tile = lanes > 32 ? differing_nibbles<kRows, 2> : differing_nibbles<kRows, 1>;
  const auto single = lanes > 32 ? differing_nibbles<1, 2> : differing_nibbles<1, 1>;
  alignas(64) uint16_t sums[kMostRows][kLanes];
  std::memset(out, 0, rows * sizeof(*out));
  for (int64_t from = 0; from < 8 * words; from += kBlocks * kBlock) {
    const int64_t end = least(8 * words, from + kBlocks * kBlock);
    std::memset(sums, 0, rows * sizeof(*sums));
    for (int64_t k = from; k < end; k += kBlock) {
      const int64_t nibbles = least(kBlock, end - k);
      int64_t row = 0;
      for (; row + kRows <= rows; row += kRows) tile(a + row * stride + k, stride, w + k * kLanes, nibbles, sums + row);
      for (; row < rows; ++row) single(a + row * stride + k, stride, w + k * kLanes, nibbles, sums + row);
    }
    constexpr int kUnpacked[4] = {0, 16, 8, 24};  // where the sums of columns 0 to 7, 8 to 15, ... begin
    for (int64_t row = 0; row < rows; ++row) {
      for (int i = 0; i < kLanes / 8; ++i) {
        const uint16_t* eight = sums[row] + i / 4 * 32 + kUnpacked[i % 4];
        __m256i* to = reinterpret_cast<__m256i*>(out[row] + 8 * i);
        const __m256i more = _mm256_cvtepu16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(eight)));
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), more));
      }
    }
  }
#else
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) differing_bits_of<kRows>(a + row * stride, stride, w, words, out + row);
  for (; row < rows; ++row) differing_bits_of<1>(a + row * stride, stride, w, words, out + row);
#endif
}

}  // namespace
