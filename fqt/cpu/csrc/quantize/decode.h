// The way back: a run of packed codes as floats, code * scale + offset. decode.cpp knows which run has which scale.

namespace {

template <class Word>
inline void decode_words(const uint8_t* from, int64_t count, float scale, const float* offset, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, from + i * sizeof(Word), sizeof(Word));
    to[i] = static_cast<float>(word) * scale;
  }
  for (int64_t i = 0; offset != nullptr && i < count; ++i) to[i] += *offset;
}

template <int kBits>
inline void decode_bits(const uint8_t* from, int64_t count, const float* values, float* to) {
  constexpr int kLanes = 8 / kBits, kMask = (1 << kBits) - 1;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const uint8_t byte = *from++;
    for (int j = 0; j < kLanes; ++j) to[i + j] = values[byte >> j * kBits & kMask];
  }
  for (int j = 0; i < count; ++i, ++j) to[i] = values[*from >> j * kBits & kMask];
}

}  // namespace

void decode(const Coded& q, const uint8_t* from, int64_t count, float scale, const float* offset, float* to) {
  if (q.storage < 8) {
    float values[16];
    const int codes = 1 << q.storage;
    for (int i = 0; i < codes; ++i) {
      const int code = q.sign ? 2 * i - 1 : q.negative && i >= codes / 2 ? i - codes : i;
      values[i] = static_cast<float>(code) * scale;
      if (offset != nullptr) values[i] += *offset;
    }
    return q.storage == 1   ? decode_bits<1>(from, count, values, to)
           : q.storage == 2 ? decode_bits<2>(from, count, values, to)
                            : decode_bits<4>(from, count, values, to);
  }
  if (q.doubles) {
    for (int64_t i = 0; i < count; ++i) {
      int32_t word;
      std::memcpy(&word, from + 4 * i, 4);
      to[i] = static_cast<float>(static_cast<double>(word) * static_cast<double>(scale));
    }
    return;
  }
  switch (q.storage) {
    case 8:
      return q.negative ? decode_words<int8_t>(from, count, scale, offset, to)
                        : decode_words<uint8_t>(from, count, scale, offset, to);
    case 16:
      return q.negative ? decode_words<int16_t>(from, count, scale, offset, to)
                        : decode_words<uint16_t>(from, count, scale, offset, to);
    default: return decode_words<int32_t>(from, count, scale, offset, to);
  }
}
