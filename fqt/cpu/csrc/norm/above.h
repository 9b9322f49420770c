// The signs of a normalization whose statistics are known before: z = (code * scale + offset) * a + b rises or falls with the
// code, so its sign is +1 for the codes above one integer, or for those that are not. Behind max-pooling it is +1 where that of
// any pixel is.

namespace {

// Bit c: whether codes[c] > above[c], of kLane channels.
#if defined(FQT_AVX512)
constexpr int64_t kLane = 32;
inline uint32_t bits_above(const int16_t* codes, const int16_t* above) {
  return _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(codes), _mm512_loadu_si512(above));
}
#elif defined(FQT_AVX2)
constexpr int64_t kLane = 32;
inline uint32_t bits_above(const int16_t* codes, const int16_t* above) {
  const auto half = [&](int64_t at) {
    return _mm256_cmpgt_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at)),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(above + at)));
  };
  const __m256i bytes = _mm256_packs_epi16(half(0), half(16));  // 64 bits of either half in turn
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8)));
}
#else
constexpr int64_t kLane = 8;
inline uint32_t bits_above(const int16_t* codes, const int16_t* above) {
  uint32_t bits = 0;
  for (int i = 0; i < kLane; ++i) bits |= static_cast<uint32_t>(codes[i] > above[i]) << i;
  return bits;
}
#endif

// The same of fewer channels.
inline uint32_t last_bits_above(const int16_t* codes, const int16_t* above, int64_t count) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint32_t>(codes[i] > above[i]) << i;
  return bits;
}

}  // namespace

void norm_above(const Above& of, uint8_t* signs) {
  const int64_t channels = of.channels, bytes = (channels + 7) / 8, pooled = of.windows.pooled_rows(of.rows);
  parallel(pooled, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, channels)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Window window;
      if (of.windows.pools()) {
        window = Window(of.windows, row);
      } else {
        window.first = row, window.rows = window.columns = 1, window.width = 0;
      }
      uint8_t* const to = signs + row * bytes;
      for (int64_t c = 0; c < channels; c += kLane) {
        const int64_t count = std::min(kLane, channels - c), size = (count + 7) / 8;
        uint32_t flipped = 0, any = 0;
        std::memcpy(&flipped, of.flipped + c / 8, size);
        for (int64_t line = 0; line < window.rows; ++line) {
          const int16_t* codes = of.codes + (window.first + line * window.width) * channels + c;
          for (int64_t i = 0; i < window.columns; ++i, codes += channels) {
            any |= flipped ^ (count == kLane ? bits_above(codes, of.above + c) : last_bits_above(codes, of.above + c, count));
          }
        }
        std::memcpy(to + c / 8, &any, size);
      }
    }
  });
}
