// Multi-bit gradients times signs by table lookup, which `grad_input` and `grad_weight` of signs are made of.
//
// Four codes of the gradient along the summed axis make a table of their 16 subset sums; the signs of the other operand along
// that axis make a 4-bit index into it, for kWidth columns at once (one byte shuffle). With b = +-1 and g >= 0,
// sum of g * b = 2 * (sum of the g whose b is +1) - (sum of all g). Codes of more than 6 bits are two planes of nibbles.
//
// Bounds: a table's entry is at most 4 * 15 = 60, so four of them fit a byte (240); of 5 bits two do (2 * 4 * 31 = 248), of
// 6 bits one (4 * 63 = 252). 256 bytes fit 16 bits (64,512); the 32-bit sums hold 8 million terms of 255, which
// `products.cpp` checks.

namespace {

constexpr int64_t kMostQuads = 64;  // quads of lookups whose sums fit 16 bits, times the entries that add up in a byte

// Sums of bytes in 16 bits: all bytes as they lie, even + 256 * odd modulo 2^16, and the odd ones apart. Together: entries of
// the tables that are added first, as bytes.
template <int M, int Together>
struct Sums {
  Halves all[M], odd[M];

  // Row m's tables are at table[m], four lookups a quad.
  void add(const uint8_t* const* table, const uint8_t* index, int64_t quads) {
    for (int64_t quad = 0; quad < quads; ++quad, index += 4 * kWidth) {
      const Bytes i0 = load(index), i1 = load(index + kWidth), i2 = load(index + 2 * kWidth), i3 = load(index + 3 * kWidth);
      for (int m = 0; m < M; ++m) {
        const uint8_t* t = table[m] + quad * 64;
        const Bytes e0 = lookup(t, i0), e1 = lookup(t + 16, i1), e2 = lookup(t + 32, i2), e3 = lookup(t + 48, i3);
        if constexpr (Together == 4) {
          add(m, (e0 + e1) + (e2 + e3));
        } else if constexpr (Together == 2) {
          add(m, e0 + e1), add(m, e2 + e3);
        } else {
          add(m, e0), add(m, e1), add(m, e2), add(m, e3);
        }
      }
    }
  }
  void add(int m, Bytes bytes) {
    all[m] += (Halves)bytes;
    odd[m] += (Halves)bytes >> 8;
  }

  // A quarter of row m's columns: `weave` put them where they now come out in order.
  Ints quarter(int m, int which) const {
    const Ints pairs = (Ints)(which % 2 ? odd[m] : all[m] - (odd[m] << 8));
    return which < 2 ? pairs & 0xffff : pairs >> 16;
  }
};

// Lookups for the rows of a tile. A tap is a stretch of 4 * `quads` of them: row m's tables begin at
// tables + table_at[tap * M + m], the indices at index + index_at[tap].
struct Lookups {
  const uint8_t* tables;
  const int64_t* table_at;
  const uint8_t* index;
  const int64_t* index_at;
  int64_t taps, quads;
  int shift;  // of the sums: 4 for the upper nibbles of codes
};

// sums[m][column] += the looked-up entries << shift, for M rows.
template <int M, int Together>
void look_up(const Lookups l, int32_t sums[][kWidth]) {
  constexpr int64_t kMost = kMostQuads * Together;
  Sums<M, Together> narrow{};
  int64_t held = 0;
  const auto widen = [&] {
    for (int m = 0; m < M; ++m) {
      for (int i = 0; i < 4; ++i) reinterpret_cast<Ints*>(sums[m])[i] += narrow.quarter(m, i) << l.shift;
    }
    narrow = {};
    held = 0;
  };
  for (int64_t tap = 0; tap < l.taps; ++tap) {
    const uint8_t* table[M];
    for (int m = 0; m < M; ++m) table[m] = l.tables + l.table_at[tap * M + m];
    for (int64_t done = 0; done < l.quads;) {
      const int64_t now = least(l.quads - done, kMost - held);
      narrow.add(table, l.index + l.index_at[tap] + done * 4 * kWidth, now);
      for (int m = 0; m < M; ++m) table[m] += now * 64;
      done += now;
      held += now;
      if (held == kMost) widen();
    }
  }
  widen();
}

// What `add_blocks` reads of the samples of a chunk, each at `*_step` behind the one before.
struct Blocks {
  int64_t count, quads;
  const uint8_t *tables, *index;
  int64_t row_step, table_step, index_step;
  const int32_t* sum_g;
  int64_t sum_row_step, sum_step;
  const float *scale, *offset, *terms;  // of row 0; offset may be null
  int64_t scale_step, terms_step;
  float x_scale;
};

// grad[m][column] += the sample's product, sample by sample: integers within, floats between, in the reference's order.
// One plane, at most kMostQuads * Together: the integers never leave the registers.
template <int M, int Together>
void add_blocks(const Blocks& b, float grad[][kWidth]) {
  typedef int32_t Signed __attribute__((vector_size(kWidth)));
  typedef float Floats __attribute__((vector_size(kWidth), may_alias));
  for (int64_t s = 0; s < b.count; ++s) {
    Sums<M, Together> sums{};
    const uint8_t* table[M];
    for (int m = 0; m < M; ++m) table[m] = b.tables + s * b.table_step + m * b.row_step;
    sums.add(table, b.index + s * b.index_step, b.quads);
    const Floats* terms = reinterpret_cast<const Floats*>(b.terms + s * b.terms_step);
    for (int m = 0; m < M; ++m) {
      const int32_t all = b.sum_g[s * b.sum_step + m * b.sum_row_step];
      const float scale = b.scale[s * b.scale_step + m];
      Floats* to = reinterpret_cast<Floats*>(grad[m]);
      for (int i = 0; i < 4; ++i) {
        const Signed codes = ((Signed)sums.quarter(m, i) << 1) - all;
        Floats t = __builtin_convertvector(codes, Floats) * scale * b.x_scale;
        if (b.offset != nullptr) t += terms[i] * b.offset[s * b.scale_step + m];
        to[i] += t;
      }
    }
  }
}

using LookUp = void (*)(Lookups, int32_t[][kWidth]);
using AddBlocks = void (*)(const Blocks&, float[][kWidth]);

// Rows of a tile when `left` are left, and the loops for them.
inline int tile_rows(int64_t left) { return left >= kRows ? kRows : left >= 4 ? 4 : left >= 2 ? 2 : 1; }
template <int Together>
struct Loops {
  static LookUp look_up_of(int rows) {
    return rows == kRows ? look_up<kRows, Together>
           : rows == 4   ? look_up<4, Together>
           : rows == 2   ? look_up<2, Together>
                         : look_up<1, Together>;
  }
  static AddBlocks add_blocks_of(int rows) {
    return rows == kRows ? add_blocks<kRows, Together>
           : rows == 4   ? add_blocks<4, Together>
           : rows == 2   ? add_blocks<2, Together>
                         : add_blocks<1, Together>;
  }
};
inline LookUp look_up_of(int rows, int together) {
  return together == 4   ? Loops<4>::look_up_of(rows)
         : together == 2 ? Loops<2>::look_up_of(rows)
                         : Loops<1>::look_up_of(rows);
}
inline AddBlocks add_blocks_of(int rows, int together) {
  return together == 4   ? Loops<4>::add_blocks_of(rows)
         : together == 2 ? Loops<2>::add_blocks_of(rows)
                         : Loops<1>::add_blocks_of(rows);
}

// The sum of g * b. Both sums and the result fit 31 bits, but twice the first may not: it wraps around, and back.
inline int32_t signed_sum(int32_t of_set, int32_t all) {
  return static_cast<int32_t>(2 * static_cast<uint32_t>(of_set) - static_cast<uint32_t>(all));
}

// How often each column's bit is set: the lookup with four ones for every table.
inline void count_ones(const uint8_t* index, int64_t quads, int32_t sums[][kWidth]) {
  constexpr int64_t kTogether = 64;
  alignas(64) uint8_t ones[16], tables[64];
  std::memset(ones, 1, 16);
  make_tables(ones, 16, 1, 0, tables);
  int64_t table_at[kTogether] = {}, index_at[kTogether];
  for (int64_t quad = 0; quad < quads; quad += kTogether) {
    const int64_t count = least(kTogether, quads - quad);
    for (int64_t i = 0; i < count; ++i) index_at[i] = (quad + i) * 4 * kWidth;
    look_up<1, 4>({tables, table_at, index, index_at, count, 1, 0}, sums);
  }
}

}  // namespace
