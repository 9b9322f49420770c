// The few operations that the compiler cannot find by itself, for each instruction set. Everything else is loops.

namespace {

#if defined(FQT_AVX512)
constexpr int kWidth = 64;  // bytes of a vector, and columns that one lookup serves
constexpr int kRows = 8;    // rows of a register tile
#elif defined(FQT_AVX2)
constexpr int kWidth = 32;
constexpr int kRows = 4;
#else
constexpr int kWidth = 16;
constexpr int kRows = 4;
#endif
#if defined(FQT_AVX2)
constexpr int kLanes = 64;  // output channels side by side in `output`
constexpr int kSpread = 2;  // bytes that eight bits take there
#else
constexpr int kLanes = 16;
constexpr int kSpread = 1;
#endif

typedef uint8_t Bytes __attribute__((vector_size(kWidth), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kWidth)));
typedef uint32_t Ints __attribute__((vector_size(kWidth), may_alias));

inline Bytes load(const uint8_t* from) { return *reinterpret_cast<const Bytes*>(from); }  // aligned

// Every second lane of the result is from a, the others from b: the first halves of both, or the last.
template <bool kLast>
inline Ints interleaved(Ints a, Ints b) {
  constexpr int kLanesOf = kWidth / 4, kFirst = kLast ? kLanesOf / 2 : 0;
#if defined(FQT_AVX512)
  return __builtin_shufflevector(a, b, kFirst, 16 + kFirst, kFirst + 1, 17 + kFirst, kFirst + 2, 18 + kFirst, kFirst + 3,
                                 19 + kFirst, kFirst + 4, 20 + kFirst, kFirst + 5, 21 + kFirst, kFirst + 6, 22 + kFirst,
                                 kFirst + 7, 23 + kFirst);
#elif defined(FQT_AVX2)
  return __builtin_shufflevector(a, b, kFirst, 8 + kFirst, kFirst + 1, 9 + kFirst, kFirst + 2, 10 + kFirst, kFirst + 3,
                                 11 + kFirst);
#else
  return __builtin_shufflevector(a, b, kFirst, 4 + kFirst, kFirst + 1, 5 + kFirst);
#endif
}

// A square of words, as many as a vector has, transposed: row i of `in`, which begins i * pitch words on, becomes column i of
// `out`. in and out need not be aligned.
inline void transpose(const uint32_t* in, int64_t pitch, uint32_t* out, int64_t out_pitch) {
  constexpr int kSide = kWidth / 4;
  Ints row[kSide], next[kSide];
  for (int i = 0; i < kSide; ++i) std::memcpy(&row[i], in + i * pitch, kWidth);
  for (int apart = 1; apart < kSide; apart *= 2) {
    for (int i = 0; i < kSide / 2; ++i) {
      next[2 * i] = interleaved<false>(row[i], row[i + kSide / 2]);
      next[2 * i + 1] = interleaved<true>(row[i], row[i + kSide / 2]);
    }
    std::memcpy(row, next, sizeof(row));
  }
  for (int i = 0; i < kSide; ++i) std::memcpy(out + i * out_pitch, &row[i], kWidth);
}

// table[index] in every byte; indices are below 16. The table is 16 bytes, aligned.
inline Bytes lookup(const uint8_t* table, Bytes index) {
#if defined(FQT_AVX512)
  const __m512i t = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  return (Bytes)_mm512_shuffle_epi8(t, (__m512i)index);
#elif defined(FQT_AVX2)
  const __m256i t = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  return (Bytes)_mm256_shuffle_epi8(t, (__m256i)index);
#elif defined(FQT_NEON)
  return (Bytes)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)index);
#else
  Bytes found;
  for (int i = 0; i < kWidth; ++i) found[i] = table[index[i]];
  return found;
#endif
}

// For every four codes c0 .. c3 below 64 a table of their 16 subset sums: entry i adds those c_j whose bit j is set in i.
// Makes kWidth / 16 tables from kWidth / 4 codes.
inline void subset_sums(const uint8_t* codes, uint8_t* tables) {
#if defined(FQT_AVX512) || defined(FQT_AVX2)
  const __m128i pick0 = _mm_set_epi8(0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1);
  const __m128i pick1 = _mm_set_epi8(1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1);
  const __m128i pick2 = _mm_set_epi8(2, 2, 2, 2, -1, -1, -1, -1, 2, 2, 2, 2, -1, -1, -1, -1);
  const __m128i pick3 = _mm_set_epi8(3, 3, 3, 3, 3, 3, 3, 3, -1, -1, -1, -1, -1, -1, -1, -1);
#endif
#if defined(FQT_AVX512)
  const __m512i each = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m512i c = _mm512_permutexvar_epi32(each, _mm512_castsi128_si512(sixteen));
  const __m512i low = _mm512_add_epi8(_mm512_shuffle_epi8(c, _mm512_broadcast_i32x4(pick0)),
                                      _mm512_shuffle_epi8(c, _mm512_broadcast_i32x4(pick1)));
  const __m512i high = _mm512_add_epi8(_mm512_shuffle_epi8(c, _mm512_broadcast_i32x4(pick2)),
                                       _mm512_shuffle_epi8(c, _mm512_broadcast_i32x4(pick3)));
  _mm512_store_si512(tables, _mm512_add_epi8(low, high));
#elif defined(FQT_AVX2)
  const __m256i each = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const __m256i c = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(eight), each);
  const __m256i low = _mm256_add_epi8(_mm256_shuffle_epi8(c, _mm256_broadcastsi128_si256(pick0)),
                                      _mm256_shuffle_epi8(c, _mm256_broadcastsi128_si256(pick1)));
  const __m256i high = _mm256_add_epi8(_mm256_shuffle_epi8(c, _mm256_broadcastsi128_si256(pick2)),
                                       _mm256_shuffle_epi8(c, _mm256_broadcastsi128_si256(pick3)));
  _mm256_store_si256(reinterpret_cast<__m256i*>(tables), _mm256_add_epi8(low, high));
#elif defined(FQT_NEON)
  // an index beyond the sixteen bytes finds 0
  const uint8x16_t pick0 = {99, 0, 99, 0, 99, 0, 99, 0, 99, 0, 99, 0, 99, 0, 99, 0};
  const uint8x16_t pick1 = {99, 99, 1, 1, 99, 99, 1, 1, 99, 99, 1, 1, 99, 99, 1, 1};
  const uint8x16_t pick2 = {99, 99, 99, 99, 2, 2, 2, 2, 99, 99, 99, 99, 2, 2, 2, 2};
  const uint8x16_t pick3 = {99, 99, 99, 99, 99, 99, 99, 99, 3, 3, 3, 3, 3, 3, 3, 3};
  uint32_t four;
  std::memcpy(&four, codes, 4);
  const uint8x16_t c = vreinterpretq_u8_u32(vdupq_n_u32(four));
  const uint8x16_t low = vaddq_u8(vqtbl1q_u8(c, pick0), vqtbl1q_u8(c, pick1));
  vst1q_u8(tables, vaddq_u8(low, vaddq_u8(vqtbl1q_u8(c, pick2), vqtbl1q_u8(c, pick3))));
#else
  for (int i = 0; i < 16; ++i) {
    uint8_t sum = 0;
    for (int j = 0; j < 4; ++j) sum += (i >> j & 1) * codes[j];
    tables[i] = sum;
  }
#endif
}

// kWidth / 8 bytes of each of four bit rows, turned into kWidth indices: bit j of index i is bit i of row j.
inline void indices(const uint8_t* const rows[4], uint8_t* out) {
#if defined(FQT_AVX512)
  __m512i index = _mm512_setzero_si512();
  for (int j = 0; j < 4; ++j) {
    uint64_t bits;
    std::memcpy(&bits, rows[j], 8);
    index = _mm512_mask_add_epi8(index, bits, index, _mm512_set1_epi8(1 << j));
  }
  _mm512_store_si512(out, index);
#elif defined(FQT_AVX2)
  const __m256i byte_of = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
  const __m256i bit_of = _mm256_set1_epi64x(0x8040201008040201);
  __m256i index = _mm256_setzero_si256();
  for (int j = 0; j < 4; ++j) {
    int32_t bits;
    std::memcpy(&bits, rows[j], 4);
    const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of), bit_of);
    const __m256i set = _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit_of), _mm256_set1_epi8(1 << j));
    index = _mm256_or_si256(index, set);
  }
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), index);
#elif defined(FQT_NEON)
  const uint8x16_t byte_of = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  const uint8x16_t bit_of = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const auto set = [&](int j) {
    uint16_t bits;
    std::memcpy(&bits, rows[j], 2);
    return vtstq_u8(vqtbl1q_u8(vreinterpretq_u8_u16(vdupq_n_u16(bits)), byte_of), bit_of);
  };
  // each row overwrites the bits from its own on
  vst1q_u8(out, vsliq_n_u8(vsliq_n_u8(vsliq_n_u8(set(0), set(1), 1), set(2), 2), set(3), 3) & vdupq_n_u8(15));
#else
  for (int i = 0; i < kWidth; ++i) {
    uint8_t index = 0;
    for (int j = 0; j < 4; ++j) index |= (rows[j][i / 8] >> i % 8 & 1) << j;
    out[i] = index;
  }
#endif
}

// The sum of `count` bytes, a multiple of 16: below 2^31, as 8 million of 255 are.
inline int32_t byte_sum(const uint8_t* bytes, int64_t count) {
#if defined(FQT_AVX512) || defined(FQT_AVX2)
  __m128i sum = _mm_setzero_si128();
  for (int64_t i = 0; i < count; i += 16) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
    sum = _mm_add_epi64(sum, _mm_sad_epu8(sixteen, _mm_setzero_si128()));
  }
  return _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 2);
#elif defined(FQT_NEON)
  uint32x4_t sum = vdupq_n_u32(0);
  for (int64_t i = 0; i < count; i += 16) sum = vpadalq_u16(sum, vpaddlq_u8(vld1q_u8(bytes + i)));
  return static_cast<int32_t>(vaddvq_u32(sum));
#else
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += bytes[i];
  return sum;
#endif
}

// 0 where the bit of a float is not set; kWidth floats, aligned.
inline void keep_where_set(const uint8_t* bits, float* values) {
#if defined(FQT_AVX512)
  for (int i = 0; i < kWidth / 16; ++i) {
    __mmask16 sixteen;
    std::memcpy(&sixteen, bits + 2 * i, 2);
    _mm512_store_ps(values + 16 * i, _mm512_maskz_load_ps(sixteen, values + 16 * i));
  }
#elif defined(FQT_AVX2)
  const __m256i bit_of = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  for (int i = 0; i < kWidth / 8; ++i) {
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits[i]), bit_of), bit_of);
    _mm256_store_ps(values + 8 * i, _mm256_and_ps(_mm256_load_ps(values + 8 * i), _mm256_castsi256_ps(set)));
  }
#elif defined(FQT_NEON)
  for (int i = 0; i < kWidth / 4; ++i) {
    const uint32x4_t set = vtstq_u32(vdupq_n_u32(bits[i / 2] >> i % 2 * 4), uint32x4_t{1, 2, 4, 8});
    vst1q_f32(values + 4 * i, vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(vld1q_f32(values + 4 * i)), set)));
  }
#else
  for (int i = 0; i < kWidth; ++i) values[i] = bits[i / 8] >> i % 8 & 1 ? values[i] : 0.0f;
#endif
}

// The sign bit of a float in every lane whose bit is not set, from bit `first` on.
inline Ints sign_where_unset(const uint8_t* bits, int first) {
#if defined(FQT_AVX512)
  __mmask16 set;
  std::memcpy(&set, bits + first / 8, 2);
  return (Ints)_mm512_maskz_set1_epi32(_knot_mask16(set), static_cast<int32_t>(0x80000000u));
#elif defined(FQT_AVX2)
  const __m256i bit_of = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits[first / 8]), bit_of);
  const __m256i unset = _mm256_cmpeq_epi32(set, _mm256_setzero_si256());
  return (Ints)_mm256_slli_epi32(unset, 31);
#elif defined(FQT_NEON)
  const uint32x4_t set = vtstq_u32(vdupq_n_u32(bits[first / 8] >> first % 8), uint32x4_t{1, 2, 4, 8});
  return (Ints)vbicq_u32(vdupq_n_u32(0x80000000u), set);
#else
  Ints minus{};
  for (int i = 0; i < kWidth / 4; ++i) minus[i] = bits[(first + i) / 8] >> (first + i) % 8 & 1 ? 0 : 0x80000000u;
  return minus;
#endif
}

}  // namespace
