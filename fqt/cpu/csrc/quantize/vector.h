// Vectors of floats and integers for each instruction set: the compiler's own vector types, and the few operations that it
// does not find by itself.

namespace {

#if defined(FQT_AVX512)
constexpr int kLanes = 16;
#elif defined(FQT_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Pairs __attribute__((vector_size(4 * kLanes)));  // of words

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector, class T>
inline Vector load_as(const T* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector, class T>
inline void store(T* to, Vector v) {
  std::memcpy(to, &v, sizeof v);
}

inline Floats spread(float value) { return value - Floats{}; }
inline Words spread(uint32_t value) { return value - Words{}; }

// The smaller and the larger; `b` where either is NaN.
inline Floats smaller(Floats a, Floats b) {
#if defined(FQT_AVX512)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(FQT_AVX2)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

inline Floats larger(Floats a, Floats b) {
#if defined(FQT_AVX512)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(FQT_AVX2)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline Floats floor_of(Floats y) {
#if defined(FQT_AVX512)
  return (Floats)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(FQT_AVX2)
  return (Floats)_mm256_floor_ps((__m256)y);
#elif defined(FQT_NEON)
  return (Floats)vrndmq_f32((float32x4_t)y);
#else
  const Floats cut = __builtin_convertvector(__builtin_convertvector(y, Ints), Floats);  // |y| is at most 2^24
  return cut + __builtin_convertvector((Ints)(cut > y), Floats);                         // true is -1
#endif
}

// A bit for each lane, the first lowest: a >= b; whether either is NaN.
inline uint32_t at_least(Floats a, Floats b) {
#if defined(FQT_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(FQT_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#elif defined(FQT_X86)
  return _mm_movemask_ps(_mm_cmpge_ps((__m128)a, (__m128)b));
#elif defined(FQT_NEON)
  return vaddvq_u32((uint32x4_t)(a >= b) & uint32x4_t{1, 2, 4, 8});
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a[i] >= b[i]) << i;
  return bits;
#endif
}

inline uint32_t unordered(Floats a, Floats b) {
#if defined(FQT_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q);
#elif defined(FQT_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q));
#elif defined(FQT_X86)
  return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b));
#elif defined(FQT_NEON)
  return vaddvq_u32((uint32x4_t)((a != a) | (b != b)) & uint32x4_t{1, 2, 4, 8});
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(__builtin_isunordered(a[i], b[i])) << i;
  return bits;
#endif
}

// Products of the low words of two vectors of pairs.
inline Pairs multiply(Pairs a, uint32_t b) {
#if defined(FQT_AVX512)
  return (Pairs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(FQT_AVX2)
  return (Pairs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(FQT_X86)
  return (Pairs)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  Pairs product;
  for (int i = 0; i < kLanes / 2; ++i) product[i] = static_cast<uint64_t>(static_cast<uint32_t>(a[i])) * b;
  return product;
#endif
}

// The low words of two vectors of pairs, in turns.
inline Pairs join(Pairs even, Pairs odd) { return (even & 0xFFFFFFFFu) | (odd << 32); }

// Pairs 0 and 2 ... (which = 0), 1 and 3 ... (which = 1) of two vectors, in turns.
template <int kWhich>
inline Pairs interleave(Pairs a, Pairs b) {
#if defined(FQT_AVX512)
  return kWhich ? (Pairs)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b) : (Pairs)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
#elif defined(FQT_AVX2)
  return kWhich ? (Pairs)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b) : (Pairs)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#elif defined(FQT_NEON)
  return (Pairs)(kWhich ? vzip2q_u64((uint64x2_t)a, (uint64x2_t)b) : vzip1q_u64((uint64x2_t)a, (uint64x2_t)b));
#else
  return Pairs{a[kWhich], b[kWhich]};
#endif
}

// Four vectors of integers from 0 to 255 as bytes, in order.
inline void store_bytes(const Ints v[4], uint8_t* to) {
#if defined(FQT_AVX512)
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * i), _mm512_cvtepi32_epi8((__m512i)v[i]));
  }
#elif defined(FQT_AVX2)
  const __m256i halves01 = _mm256_packus_epi32((__m256i)v[0], (__m256i)v[1]);
  const __m256i halves23 = _mm256_packus_epi32((__m256i)v[2], (__m256i)v[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(halves01, halves23), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
#elif defined(FQT_X86)
  const __m128i halves01 = _mm_packs_epi32((__m128i)v[0], (__m128i)v[1]);
  const __m128i halves23 = _mm_packs_epi32((__m128i)v[2], (__m128i)v[3]);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves01, halves23));
#elif defined(FQT_NEON)
  const uint16x8_t halves01 = vuzp1q_u16((uint16x8_t)v[0], (uint16x8_t)v[1]);
  const uint16x8_t halves23 = vuzp1q_u16((uint16x8_t)v[2], (uint16x8_t)v[3]);
  vst1q_u8(to, vuzp1q_u8((uint8x16_t)halves01, (uint8x16_t)halves23));
#else
  for (int i = 0; i < 4 * kLanes; ++i) to[i] = static_cast<uint8_t>(v[i / kLanes][i % kLanes]);
#endif
}

// --- Philox 4x32-10, see fqt/philox.py ---------------------------------------------------------------------------------------

struct Counters {
  Pairs c0, c1, c2, c3;  // in the low word of each pair; the high words are never read
};

// The round keys in every word of a vector.
struct Keys {
  Pairs k[20];
  explicit Keys(uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      k[2 * round] = (Pairs)spread(k0);
      k[2 * round + 1] = (Pairs)spread(k1);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

// A round is two multiplications, two shifts and two three-way xors, because neither takes its words apart. Several counters go
// through each round together: one alone waits for its own results.
template <int kCounters>
inline void philox(const Keys& keys, Counters (&c)[kCounters]) {
#if defined(FQT_NEON)
  // Its multiplication reads contiguous words, so two counters are multiplied at once, and uzp sorts the products' halves.
  constexpr int kPairs = (kCounters + 1) / 2;
  const auto word = [](Pairs a, Pairs b) { return vuzp1q_u32((uint32x4_t)a, (uint32x4_t)b); };
  uint32x4_t w[kPairs][4];
#pragma GCC unroll 2
  for (int i = 0; i < kPairs; ++i) {
    const Counters &a = c[2 * i], &b = c[2 * i + 1 < kCounters ? 2 * i + 1 : 2 * i];
    w[i][0] = word(a.c0, b.c0), w[i][1] = word(a.c1, b.c1), w[i][2] = word(a.c2, b.c2), w[i][3] = word(a.c3, b.c3);
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
    for (int i = 0; i < kPairs; ++i) {
      const uint32x4_t a0 = (uint32x4_t)vmull_n_u32(vget_low_u32(w[i][0]), 0xD2511F53u);
      const uint32x4_t a1 = (uint32x4_t)vmull_high_n_u32(w[i][0], 0xD2511F53u);
      const uint32x4_t b0 = (uint32x4_t)vmull_n_u32(vget_low_u32(w[i][2]), 0xCD9E8D57u);
      const uint32x4_t b1 = (uint32x4_t)vmull_high_n_u32(w[i][2], 0xCD9E8D57u);
      w[i][0] = vuzp2q_u32(b0, b1) ^ w[i][1] ^ (uint32x4_t)keys.k[2 * round];
      w[i][2] = vuzp2q_u32(a0, a1) ^ w[i][3] ^ (uint32x4_t)keys.k[2 * round + 1];
      w[i][1] = vuzp1q_u32(b0, b1);
      w[i][3] = vuzp1q_u32(a0, a1);
    }
  }
  const auto low = [](uint32x4_t words) { return (Pairs)vmovl_u32(vget_low_u32(words)); };
  const auto high = [](uint32x4_t words) { return (Pairs)vmovl_high_u32(words); };
#pragma GCC unroll 4
  for (int i = 0; i < kCounters; ++i) {
    const uint32x4_t* from = w[i / 2];
    c[i] = i % 2 ? Counters{high(from[0]), high(from[1]), high(from[2]), high(from[3])}
                 : Counters{low(from[0]), low(from[1]), low(from[2]), low(from[3])};
  }
#else
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int i = 0; i < kCounters; ++i) {
      const Pairs a = multiply(c[i].c0, 0xD2511F53u), b = multiply(c[i].c2, 0xCD9E8D57u);
      c[i].c0 = (b >> 32) ^ c[i].c1 ^ keys.k[2 * round];
      c[i].c2 = (a >> 32) ^ c[i].c3 ^ keys.k[2 * round + 1];
      c[i].c1 = b;
      c[i].c3 = a;
    }
  }
#endif
}

// 24 random bits of each word, as a float.
inline Floats u24(Pairs words) { return __builtin_convertvector((Ints)((Words)words >> 8), Floats); }

}  // namespace
