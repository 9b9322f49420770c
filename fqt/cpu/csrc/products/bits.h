// Packed codes: taken apart, cut by group and counted.

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Copies `count` bits that begin at bit `first` of a row to `bytes` bytes, filled with zeros.
inline void copy_bits(const uint8_t* row, int64_t first, int64_t count, uint8_t* out, int64_t bytes) {
  const int64_t used = ceil_div(count, 8), end = ceil_div(first + count, 8);
  const int shift = first % 8;
  row += first / 8;
  if (shift == 0) {
    std::memcpy(out, row, used);
  } else {
    for (int64_t i = 0; i < used; ++i) {
      const int next = first / 8 + i + 1 < end ? row[i + 1] : 0;
      out[i] = static_cast<uint8_t>(row[i] >> shift | next << (8 - shift));
    }
  }
  if (count % 8) out[used - 1] &= (1 << count % 8) - 1;
  std::memset(out + used, 0, bytes - used);
}

// Rows of `groups` * `channels` bits as rows of `groups` * `bytes` bytes: every group begins a byte, zeros behind it.
inline void align_groups(const uint8_t* rows, int64_t count, int64_t groups, int64_t channels, int64_t bytes, uint8_t* out) {
  const int64_t row_bytes = ceil_div(groups * channels, 8);
  parallel(count, most(1, 32768 / (groups * bytes + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t g = 0; g < groups; ++g) {
        copy_bits(rows + i * row_bytes, g * channels, channels, out + (i * groups + g) * bytes, bytes);
      }
    }
  });
}

// The bits of some bytes that are set.
inline int64_t count_bits(const uint8_t* bytes, int64_t count) {
  int64_t ones = 0, i = 0;
  for (uint64_t word; i + 8 <= count; i += 8) {
    std::memcpy(&word, bytes + i, 8);
    ones += __builtin_popcountll(word);
  }
  for (; i < count; ++i) ones += __builtin_popcount(bytes[i]);
  return ones;
}

// The bits in which some bytes differ from others.
inline int64_t count_differing(const uint8_t* a, const uint8_t* b, int64_t count) {
  int64_t differ = 0, i = 0;
  for (uint64_t of_a, of_b; i + 8 <= count; i += 8) {
    std::memcpy(&of_a, a + i, 8);
    std::memcpy(&of_b, b + i, 8);
    differ += __builtin_popcountll(of_a ^ of_b);
  }
  for (; i < count; ++i) differ += __builtin_popcount(a[i] ^ b[i]);
  return differ;
}

// Codes [first, first + count) of a packed row, one a byte.
inline void unpack(const uint8_t* row, int64_t first, int64_t count, int storage, uint8_t* out) {
  if (count == 0) return;
  if (storage == 8) {
    std::memcpy(out, row + first, count);
    return;
  }
  if (storage == 4) {
    if (first % 2) *out++ = row[first++ / 2] >> 4, --count;
    row += first / 2;
    for (int64_t i = 0; i < count / 2; ++i) {
      out[2 * i] = row[i] & 15;
      out[2 * i + 1] = row[i] >> 4;
    }
    if (count % 2) out[count - 1] = row[count / 2] & 15;
    return;
  }
  const int mask = (1 << storage) - 1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t bit = (first + i) * storage;
    out[i] = row[bit / 8] >> bit % 8 & mask;
  }
}

// Reorders the bits of every kWidth columns, in place: bit b becomes that of column b % 4 * (kWidth / 4) + b / 4, so that the
// bytes of a vector of looked-up sums, taken apart into four vectors of 32-bit integers, are columns in order.
inline void weave(uint8_t* bits, int64_t bytes) {
  struct Table {
    uint32_t fours[256];  // bit i of a byte at bit 4 * i
    constexpr Table() : fours{} {
      for (int byte = 0; byte < 256; ++byte) {
        for (int i = 0; i < 8; ++i) fours[byte] |= static_cast<uint32_t>(byte >> i & 1) << 4 * i;
      }
    }
  };
  static constexpr Table table;
  for (int64_t at = 0; at < bytes; at += kWidth / 8) {
    uint64_t woven = 0;
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < (kWidth + 31) / 32; ++i) {
        const int bit = r * (kWidth / 4) + 8 * i;
        const int byte = kWidth < 32 ? bits[at + bit / 8] >> bit % 8 & 15 : bits[at + bit / 8];
        woven |= static_cast<uint64_t>(table.fours[byte]) << (r + 32 * i);
      }
    }
    std::memcpy(bits + at, &woven, kWidth / 8);
  }
}

// The codes, or of two planes their nibbles of one, as tables of subset sums; `count` is a multiple of 16.
inline void make_tables(const uint8_t* codes, int64_t count, int64_t planes, int64_t plane, uint8_t* tables) {
  typedef uint16_t Eight __attribute__((vector_size(16)));
  for (int64_t i = 0; i < count; i += 16) {
    Eight pairs;
    std::memcpy(&pairs, codes + i, 16);
    if (planes > 1) pairs = (pairs >> 4 * plane) & 0x0f0f;
    uint8_t of_plane[16];
    std::memcpy(of_plane, &pairs, 16);
    for (int j = 0; j < 16; j += kWidth / 4) subset_sums(of_plane + j, tables + (i + j) * 4);
  }
}

}  // namespace
