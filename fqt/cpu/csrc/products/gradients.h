// `grad_input` and `grad_weight` of multi-bit gradients and signs, by table lookup.
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

// sums[m][column] += the looked-up entries << shift, for M rows. A tap is a stretch of 4 * `quads` lookups: row m's tables
// begin at tables + table_at[tap * M + m], the indices at index + index_at[tap].
template <int M, int Together>
void lookups(const uint8_t* tables, const int64_t* table_at, const uint8_t* index, const int64_t* index_at, int64_t taps,
             int64_t quads, int shift, int32_t sums[][kWidth]) {
  constexpr int64_t kMost = kMostQuads * Together;
  Sums<M, Together> narrow{};
  int64_t held = 0;
  const auto widen = [&] {
    for (int m = 0; m < M; ++m) {
      for (int i = 0; i < 4; ++i) reinterpret_cast<Ints*>(sums[m])[i] += narrow.quarter(m, i) << shift;
    }
    narrow = {};
    held = 0;
  };
  for (int64_t tap = 0; tap < taps; ++tap) {
    const uint8_t* table[M];
    for (int m = 0; m < M; ++m) table[m] = tables + table_at[tap * M + m];
    for (int64_t done = 0; done < quads;) {
      const int64_t now = least(quads - done, kMost - held);
      narrow.add(table, index + index_at[tap] + done * 4 * kWidth, now);
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

using Lookups = void (*)(const uint8_t*, const int64_t*, const uint8_t*, const int64_t*, int64_t, int64_t, int,
                         int32_t[][kWidth]);

using AddBlocks = void (*)(const Blocks&, float[][kWidth]);

// Rows of a tile when `left` are left, and the loops for them.
inline int tile_rows(int64_t left) { return left >= kRows ? kRows : left >= 4 ? 4 : left >= 2 ? 2 : 1; }
template <int Together>
struct Loops {
  static Lookups lookups_of(int rows) {
    return rows == kRows ? lookups<kRows, Together>
           : rows == 4   ? lookups<4, Together>
           : rows == 2   ? lookups<2, Together>
                         : lookups<1, Together>;
  }
  static AddBlocks add_blocks_of(int rows) {
    return rows == kRows ? add_blocks<kRows, Together>
           : rows == 4   ? add_blocks<4, Together>
           : rows == 2   ? add_blocks<2, Together>
                         : add_blocks<1, Together>;
  }
};
inline Lookups lookups_of(int rows, int together) {
  return together == 4   ? Loops<4>::lookups_of(rows)
         : together == 2 ? Loops<2>::lookups_of(rows)
                         : Loops<1>::lookups_of(rows);
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
    lookups<1, 4>(tables, table_at, index, index_at, count, 1, 0, sums);
  }
}

}  // namespace

// G (N, P', O) x W (O, K, I) -> (N, P, C): tables of every gradient pixel, indices of every weight; pixels that meet the same
// taps share a tile, so nothing outside the image is looked up.
void grad_input(const GradInput& c) {
  const Layer& l = c.layer;
  if (c.kept_count * l.positions() * l.in == 0) return;
  const int64_t taps = l.taps(), channels = l.groups * l.in, panels = ceil_div(l.in, kWidth);
  const int64_t padded = round_up(l.out, 16), quads = padded / 16, planes = c.g.planes();
  const int64_t tap_bytes = padded / 4 * kWidth;
  const int64_t parts = l.groups * panels, row_bytes = ceil_div(l.in, 8), mask_bytes = ceil_div(channels, 8);

  // weights as indices: (group, panel, tap, four output channels, column), and their sums over the output channels
  Buffer<uint8_t> index(parts * taps * tap_bytes);
  Buffer<int32_t> sum_w(parts * taps * kWidth);
  parallel(parts * taps, 1, [&](int64_t begin, int64_t end) {
    Buffer<uint8_t> bits(padded * kWidth / 8);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tap = item % taps, panel = item / taps % panels, group = item / taps / panels;
      const int64_t first = panel * kWidth, columns = least(kWidth, l.in - first);
      std::memset(bits.data, 0, padded * kWidth / 8);
      for (int64_t o = 0; o < l.out; ++o) {
        const uint8_t* row = c.w + ((group * l.out + o) * taps + tap) * row_bytes;
        copy_bits(row, first, columns, bits.data + o * kWidth / 8, kWidth / 8);
      }
      weave(bits.data, l.out * kWidth / 8);
      uint8_t* to = index.data + item * tap_bytes;
      for (int64_t o = 0; o < padded; o += 4) {
        const uint8_t* rows[4];
        for (int j = 0; j < 4; ++j) rows[j] = bits.data + (o + j) * kWidth / 8;
        indices(rows, to + o / 4 * kWidth);
      }
      alignas(64) int32_t ones[1][kWidth] = {};
      count_ones(to, quads, ones);
      for (int k = 0; k < kWidth; ++k) sum_w[item * kWidth + k] = 2 * ones[0][k] - static_cast<int32_t>(l.out);
    }
  });

  // for each kind of pixel the taps it meets, and (sum of w's codes over them) * w_scale
  const int64_t kinds = l.y.kinds * l.x.kinds;
  Buffer<int64_t> met(kinds * taps), met_count(kinds);
  Buffer<float> scaled_sum(kinds * parts * kWidth);
  parallel(kinds, 1, [&](int64_t begin, int64_t end) {
    for (int64_t kind = begin; kind < end; ++kind) {
      const int32_t* y_at = l.y.at + l.y.example[kind / l.x.kinds] * l.y.taps;
      const int32_t* x_at = l.x.at + l.x.example[kind % l.x.kinds] * l.x.taps;
      int64_t count = 0;
      for (int64_t tap = 0; tap < taps; ++tap) {
        if (y_at[tap / l.x.taps] >= 0 && x_at[tap % l.x.taps] >= 0) met[kind * taps + count++] = tap;
      }
      met_count[kind] = count;
      for (int64_t part = 0; part < parts; ++part) {
        int32_t total[kWidth] = {};
        for (int64_t t = 0; t < count; ++t) {
          const int32_t* of_tap = sum_w.data + (part * taps + met[kind * taps + t]) * kWidth;
          for (int k = 0; k < kWidth; ++k) total[k] += of_tap[k];
        }
        float* to = scaled_sum.data + (kind * parts + part) * kWidth;
        for (int k = 0; k < kWidth; ++k) to[k] = static_cast<float>(total[k]) * c.w_scale;
      }
    }
  });

  // a block: some samples, or a band of rows of one where its tables would not stay in the cache
  const int64_t table_bytes = padded * 4, pixel_bytes = l.groups * planes * table_bytes;
  const int64_t most_pixels = most(64, (256 << 10) / (pixel_bytes + 1)), image = l.positions();
  const int64_t batch = most(1, least(most_pixels / most(1, l.other_positions()), ceil_div(c.kept_count, 8)));
  const int64_t wanted = most(ceil_div(most(image, l.other_positions()), most_pixels), ceil_div(4, c.kept_count + 1));
  const int64_t bands = batch > 1 ? 1 : most(1, least(l.y.size, wanted));
  const int64_t band = ceil_div(l.y.size, bands), blocks = ceil_div(c.kept_count, batch);

  struct Tile {
    int64_t kind, rows, first;  // first: of its pixels in the block
  };
  parallel(blocks * bands, 1, [&](int64_t begin, int64_t end) {
    const int64_t most_here = batch * band * l.x.size;
    Buffer<Tile> tiles(most_here);
    Buffer<int64_t> sample_of(most_here), pixel_of(most_here), table_at(most_here * taps);
    Buffer<int32_t> sum_of(most_here * l.groups);
    Buffer<uint8_t> codes(padded);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first_sample = item / bands * batch, samples = least(batch, c.kept_count - first_sample);
      const int64_t y_begin = least(l.y.size, item % bands * band), y_end = least(l.y.size, y_begin + band);
      int64_t g_begin = l.other_y, g_end = 0;  // gradient rows that the band meets
      for (int64_t i = y_begin * l.y.taps; i < y_end * l.y.taps; ++i) {
        if (l.y.at[i] < 0) continue;
        g_begin = least(g_begin, l.y.at[i]);
        g_end = most(g_end, l.y.at[i] + 1);
      }
      const int64_t g_pixels = most(0, g_end - g_begin) * l.other_x;
      Buffer<uint8_t> tables(samples * g_pixels * pixel_bytes);
      Buffer<int32_t> g_sum(samples * g_pixels * l.groups);
      const int64_t packed = ceil_div(l.groups * l.out * c.g.storage(), 8);
      for (int64_t i = 0; i < samples * g_pixels; ++i) {
        const int64_t n = c.kept[first_sample + i / g_pixels], p = g_begin * l.other_x + i % g_pixels;
        const uint8_t* row = c.g.data + (n * l.other_positions() + p) * packed;
        for (int64_t group = 0; group < l.groups; ++group) {
          unpack(row, group * l.out, l.out, c.g.storage(), codes.data);
          std::memset(codes.data + l.out, 0, padded - l.out);
          g_sum[i * l.groups + group] = byte_sum(codes.data, padded);
          uint8_t* to = tables.data + i * pixel_bytes + group * planes * table_bytes;
          for (int64_t plane = 0; plane < planes; ++plane) {
            make_tables(codes.data, padded, planes, plane, to + plane * table_bytes);
          }
        }
      }

      // pixels by kind, as tiles
      int64_t tile_count = 0, pixels = 0;
      std::memset(sum_of.data, 0, most_here * l.groups * sizeof(int32_t));
      for (int64_t kind = 0; kind < kinds; ++kind) {
        const int64_t begin_of_kind = pixels;
        for (int64_t y = y_begin; y < y_end; ++y) {
          if (l.y.kind[y] != kind / l.x.kinds) continue;
          for (int64_t x = 0; x < l.x.size; ++x) {
            if (l.x.kind[x] != kind % l.x.kinds) continue;
            for (int64_t s = 0; s < samples; ++s) sample_of[pixels] = s, pixel_of[pixels++] = y * l.x.size + x;
          }
        }
        for (int64_t first = begin_of_kind; first < pixels;) {
          const int64_t rows = tile_rows(pixels - first);
          tiles[tile_count++] = {kind, rows, first};
          for (int64_t m = 0; m < rows; ++m) {
            const int64_t p = pixel_of[first + m], s = sample_of[first + m];
            const int32_t *y_at = l.y.at + p / l.x.size * l.y.taps, *x_at = l.x.at + p % l.x.size * l.x.taps;
            int64_t* to = table_at.data + first * taps + m;
            for (int64_t ky = 0; ky < l.y.taps; ++ky) {
              if (y_at[ky] < 0) continue;
              const int64_t line = (s * (g_end - g_begin) + y_at[ky] - g_begin) * l.other_x;
              for (int64_t kx = 0; kx < l.x.taps; ++kx) {
                if (x_at[kx] < 0) continue;
                const int64_t at = line + x_at[kx];
                *to = at * pixel_bytes;
                to += rows;
                for (int64_t group = 0; group < l.groups; ++group) {
                  sum_of[(first + m) * l.groups + group] += g_sum[at * l.groups + group];
                }
              }
            }
          }
          first += rows;
        }
      }

      Buffer<int64_t> index_at(taps);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t group = part / panels, first_column = part % panels * kWidth;
        const int64_t columns = least(kWidth, l.in - first_column), channel = group * l.in + first_column;
        for (int64_t i = 0; i < tile_count; ++i) {
          const Tile& tile = tiles[i];
          for (int64_t t = 0; t < met_count[tile.kind]; ++t) index_at[t] = met[tile.kind * taps + t] * tap_bytes;
          const Lookups find = lookups_of(tile.rows, c.g.together());
          alignas(64) int32_t sums[kRows][kWidth] = {};
          for (int64_t plane = 0; plane < planes; ++plane) {
            find(tables.data + (group * planes + plane) * table_bytes, table_at.data + tile.first * taps,
                 index.data + part * taps * tap_bytes, index_at.data, met_count[tile.kind], quads, 4 * plane, sums);
          }
          for (int64_t m = 0; m < tile.rows; ++m) {
            const int64_t n = c.kept[first_sample + sample_of[tile.first + m]], p = pixel_of[tile.first + m];
            const int32_t all = sum_of[(tile.first + m) * l.groups + group];
            const float scale = c.g_scale(n, p), w_scale = c.w_scale;
            alignas(64) float t[kWidth];
            for (int k = 0; k < kWidth; ++k) t[k] = static_cast<float>(signed_sum(sums[m][k], all)) * scale * w_scale;
            if (c.g_offset.data != nullptr) {
              const float offset = c.g_offset(n, p);
              const float* terms = scaled_sum.data + (tile.kind * parts + part) * kWidth;
              for (int k = 0; k < kWidth; ++k) t[k] += terms[k] * offset;
            }
            if (c.mask != nullptr) {
              uint8_t bits[kWidth / 8];
              copy_bits(c.mask + (n * image + p) * mask_bytes, channel, columns, bits, kWidth / 8);
              keep_where_set(bits, t);
            }
            std::memcpy(c.grad + (n * image + p) * channels + channel, t, columns * sizeof(float));
          }
        }
      }
    }
  });
}

// `grad_weight` of a linear layer whose samples have one position and a scale each: nothing is left to add in integers. What a
// sample adds is a value of its gradient, made once, with the signs of x.
inline void grad_weight_of_rows(const GradWeight& c) {
  constexpr int kTile = 8, kColumns = 2 * kWidth / 4;
  typedef float Floats __attribute__((vector_size(kWidth)));
  const Layer& l = c.layer;
  const int64_t tiles = ceil_div(c.channel_count, kTile), panels = ceil_div(l.in, kColumns), x_bytes = panels * kColumns / 8;
  Buffer<uint8_t> x(c.sample_count * x_bytes);
  Buffer<uint32_t> values(tiles * c.sample_count * kTile);  // (tile, sample, channel), the bits of floats
  parallel(c.sample_count, most(1, 32768 / (c.channel_count + x_bytes)), [&](int64_t begin, int64_t end) {
    Buffer<uint8_t> codes(l.out);
    const int64_t packed = ceil_div(l.out * c.g.storage(), 8);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = c.samples[i];
      copy_bits(c.x + n * ceil_div(l.in, 8), 0, l.in, x.data + i * x_bytes, x_bytes);
      if (!c.g.channel) unpack(c.g.data + n * packed, 0, l.out, c.g.storage(), codes.data);
      for (int64_t row = 0; row < tiles * kTile; ++row) {
        float value = 0.0f;
        if (row < c.channel_count) {
          const int64_t channel = c.channels[row];
          // channel-major, a sample's only code begins a byte
          const uint8_t code = c.g.channel ? c.g.data[channel * l.n + n] & ((1 << c.g.storage()) - 1) : codes[channel];
          value = static_cast<float>(code) * c.g_scale(n, channel) * c.x_scale;
          if (c.g_offset.data != nullptr) value += c.x_scale * c.g_offset(n, channel);
        }
        std::memcpy(values.data + (row / kTile * c.sample_count + i) * kTile + row % kTile, &value, sizeof(value));
      }
    }
  });
  parallel(tiles * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tile = item / panels, column = item % panels * kColumns;
      const uint32_t* value = values.data + tile * c.sample_count * kTile;
      Floats sums[kTile][2] = {};
      for (int64_t i = 0; i < c.sample_count; ++i, value += kTile) {
        const uint8_t* bits = x.data + i * x_bytes + column / 8;
        const Ints minus[2] = {sign_where_unset(bits, 0), sign_where_unset(bits, kColumns / 2)};
        for (int m = 0; m < kTile; ++m) {
          const Ints all = Ints{} + value[m];
          sums[m][0] += (Floats)(all ^ minus[0]);
          sums[m][1] += (Floats)(all ^ minus[1]);
        }
      }
      for (int64_t m = 0; m < least(kTile, c.channel_count - tile * kTile); ++m) {
        std::memcpy(c.grad + c.channels[tile * kTile + m] * l.in + column, sums[m],
                    least(kColumns, l.in - column) * sizeof(float));
      }
    }
  });
}

// G (N, P', O) x X (N, P, C) -> (O, K, I): tables of four positions of an output channel, indices of four positions of X for
// every tap. Samples are worked off in chunks that stay in the cache; integers are summed over all of them, or, with a scale
// for each sample, become floats at the end of each and are added in ascending order.
void grad_weight(const GradWeight& c) {
  const Layer& l = c.layer;
  if (c.channel_count * l.taps() * l.in == 0) return;
  const int64_t taps = l.taps(), panels = ceil_div(l.in, kWidth), planes = c.g.planes(), rows = c.channel_count;
  const int64_t positions = l.positions(), outputs = l.groups * l.out;
  const bool offset = c.g_offset.data != nullptr;
  if (c.blocks && positions * taps * l.groups == 1 && l.other_positions() == 1) return grad_weight_of_rows(c);

  // X with every group padded to whole vectors, and a row of zeros for positions outside the image
  const int64_t x_bytes = panels * kWidth / 8, x_rows = l.n * l.other_positions() - c.missing;
  const auto positions_of = [&](int64_t n) { return n == l.n - 1 ? positions - c.missing : positions; };
  Buffer<uint8_t> x((x_rows + 1) * l.groups * x_bytes);
  align_groups(c.x, x_rows, l.groups, l.in, x_bytes, x.data);
  parallel(x_rows, most(1, 32768 / (l.groups * x_bytes + 1)), [&](int64_t begin, int64_t end) {
    weave(x.data + begin * l.groups * x_bytes, (end - begin) * l.groups * x_bytes);
  });
  uint8_t* outside = x.data + x_rows * l.groups * x_bytes;
  std::memset(outside, 0, l.groups * x_bytes);

  // the rectangle of positions that each tap meets
  Buffer<int64_t> y_begin(l.y.taps), y_end(l.y.taps), x_begin(l.x.taps), x_end(l.x.taps);
  const auto met = [](const Axis& axis, int64_t* begin, int64_t* end) {
    for (int64_t tap = 0; tap < axis.taps; ++tap) {
      begin[tap] = end[tap] = 0;
      for (int64_t i = 0; i < axis.size; ++i) {
        if (axis.at[i * axis.taps + tap] < 0) continue;
        if (end[tap] == 0) begin[tap] = i;
        end[tap] = i + 1;
      }
    }
  };
  met(l.y, y_begin.data, y_end.data);
  met(l.x, x_begin.data, x_end.data);

  bool whole = true;
  for (int64_t tap = 0; tap < l.y.taps; ++tap) whole &= y_begin[tap] == 0 && y_end[tap] == l.y.size;
  for (int64_t tap = 0; tap < l.x.taps; ++tap) whole &= x_begin[tap] == 0 && x_end[tap] == l.x.size;

  // for each tap the sum of a channel's codes, of `samples` images, over the positions that the tap meets
  const auto sum_inside = [&](const uint8_t* codes, int64_t samples, int64_t stride, int32_t* pixel, int32_t* sums) {
    std::memset(pixel, 0, positions * sizeof(int32_t));
    for (int64_t s = 0; s < samples; ++s) {
      for (int64_t i = 0; i < positions; ++i) pixel[i] += codes[s * stride + i];
    }
    std::memset(sums, 0, taps * sizeof(int32_t));
    for (int64_t y = 0; y < l.y.size; ++y) {
      const int32_t* line = pixel + y * l.x.size;
      int32_t total = 0;
      for (int64_t i = 0; i < l.x.size; ++i) total += line[i];
      for (int64_t kx = 0; kx < l.x.taps; ++kx) {
        int32_t inside = total;
        for (int64_t i = 0; i < x_begin[kx]; ++i) inside -= line[i];
        for (int64_t i = x_end[kx]; i < l.x.size; ++i) inside -= line[i];
        for (int64_t ky = 0; ky < l.y.taps; ++ky) {
          if (y >= y_begin[ky] && y < y_end[ky]) sums[ky * l.x.taps + kx] += inside;
        }
      }
    }
  };

  // rows of each group: c.channels is ascending
  Buffer<int64_t> group_begin(l.groups + 1);
  for (int64_t group = 0, row = 0; group <= l.groups; ++group) {
    while (row < rows && c.channels[row] < group * l.out) ++row;
    group_begin[group] = row;
  }

  // a sample is `fours` lookups; where samples are apart, whole quads of them
  const int64_t fours = c.blocks ? round_up(ceil_div(positions, 4), 4) : ceil_div(positions, 4);
  const int64_t bytes_of_four = rows * planes * 16 + l.groups * panels * taps * kWidth;
  const int64_t most_fours = most(c.blocks ? 256 : 512, (3 << 19) / (bytes_of_four + 1));
  const int64_t chunk = most(1, least(c.sample_count, most_fours / most(1, fours)));
  const int64_t room = round_up(chunk * fours, 4), segments = c.blocks ? chunk : 1;
  const int64_t table_bytes = room * 16, part_bytes = room * kWidth;
  Buffer<uint8_t> codes(rows * room * 4), tables(rows * planes * table_bytes);
  Buffer<uint8_t> index(l.groups * panels * taps * part_bytes);
  Buffer<int32_t> sum_g(segments * rows * taps);
  Buffer<int64_t> sum_x(offset && !c.blocks ? l.groups * panels * taps * kWidth : 0);
  Buffer<float> scaled_sum(offset ? segments * l.groups * panels * taps * kWidth : 0);
  Buffer<float> scales(segments * rows), offsets(segments * rows);
  const bool one_chunk = c.sample_count <= chunk, narrow = c.blocks && planes == 1 && fours / 4 <= kMostQuads * c.g.together();
  Buffer<int64_t> totals(c.blocks || one_chunk ? 0 : rows * taps * panels * kWidth);
  Buffer<int64_t> g_totals(c.blocks ? 0 : rows * taps);

  for (int64_t first = 0; first == 0 || first < c.sample_count; first += chunk) {
    const int64_t samples = least(chunk, c.sample_count - first);
    const bool last = first + samples == c.sample_count;
    const int64_t used = c.blocks ? 1 : ceil_div(samples * fours, 4) * 4;  // lookups of a chunk that is one sum
    const int64_t stride = fours * 4;                                     // codes of a sample in a row

    // codes, one a byte, channel-major
    parallel(c.g.channel ? rows : samples, 1, [&](int64_t begin, int64_t end) {
      if (c.g.channel) {
        for (int64_t row = begin; row < end; ++row) {
          uint8_t* to = codes.data + row * room * 4;
          std::memset(to, 0, room * 4);
          for (int64_t s = 0; s < samples; ++s) {
            const int64_t n = c.samples[first + s], channel = c.channels[row];
            if (c.g.by_channel) {
              const int64_t all = l.n * positions - c.missing;
              unpack(c.g.data + channel * ceil_div(all * c.g.storage(), 8), n * positions, positions_of(n), c.g.storage(),
                     to + s * stride);
            } else {
              const int64_t packed = ceil_div(positions * c.g.storage(), 8);
              unpack(c.g.data + (channel * l.n + n) * packed, 0, positions, c.g.storage(), to + s * stride);
            }
          }
        }
        return;
      }
      Buffer<uint8_t> pixels(outputs * 4);
      const int64_t packed = ceil_div(outputs * c.g.storage(), 8);
      for (int64_t s = begin; s < end; ++s) {
        for (int64_t four = 0; four < fours; ++four) {
          for (int64_t j = 0; j < 4; ++j) {
            const int64_t p = 4 * four + j;
            if (p < positions_of(c.samples[first + s])) {
              unpack(c.g.data + (c.samples[first + s] * positions + p) * packed, 0, outputs, c.g.storage(),
                     pixels.data + j * outputs);
            } else {
              std::memset(pixels.data + j * outputs, 0, outputs);
            }
          }
          for (int64_t row = 0; row < rows; ++row) {
            uint8_t* to = codes.data + row * room * 4 + s * stride + four * 4;
            for (int64_t j = 0; j < 4; ++j) to[j] = pixels[j * outputs + c.channels[row]];
          }
        }
      }
      if (!c.blocks && end == samples) {
        const int64_t tail = samples * stride;
        for (int64_t row = 0; row < rows; ++row) std::memset(codes.data + row * room * 4 + tail, 0, room * 4 - tail);
      }
    });

    // tables, and the sums of the codes that each tap meets
    parallel(rows, 1, [&](int64_t begin, int64_t end) {
      Buffer<int32_t> pixel(positions);
      for (int64_t row = begin; row < end; ++row) {
        const uint8_t* from = codes.data + row * room * 4;
        for (int64_t plane = 0; plane < planes; ++plane) {
          make_tables(from, room * 4, planes, plane, tables.data + (row * planes + plane) * table_bytes);
        }
        for (int64_t segment = 0; segment < (c.blocks ? samples : 1); ++segment) {
          int32_t* sums = sum_g.data + (segment * rows + row) * taps;
          int64_t* all = g_totals.data + (c.blocks ? 0 : row * taps);
          if (whole) {
            const int32_t total = byte_sum(from + segment * stride, c.blocks ? stride : used * 4);
            for (int64_t tap = 0; tap < taps; ++tap) sums[tap] = total;
          } else {
            sum_inside(from + segment * stride, c.blocks ? 1 : samples, stride, pixel.data, sums);
          }
          for (int64_t tap = 0; !c.blocks && tap < taps; ++tap) all[tap] = (first ? all[tap] : 0) + sums[tap];
        }
      }
    });

    // indices, and the sums of X's codes that each tap meets
    parallel(l.groups * panels * taps, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t tap = part % taps, ky = tap / l.x.taps, kx = tap % l.x.taps;
        const int64_t group = part / taps / panels, panel = part / taps % panels;
        const int64_t column = group * x_bytes + panel * kWidth / 8;
        uint8_t* to = index.data + part * part_bytes;
        for (int64_t s = 0; s < samples; ++s) {
          const int64_t n = c.samples[first + s], image = n * l.other_positions(), count = positions_of(n);
          int64_t y = 0, x_at = 0;
          for (int64_t four = 0; four < fours; ++four, to += kWidth) {
            const uint8_t* bits[4];
            for (int j = 0; j < 4; ++j) {
              bits[j] = outside + column;
              if (4 * four + j >= count) continue;
              const int32_t iy = l.y.at[y * l.y.taps + ky], ix = l.x.at[x_at * l.x.taps + kx];
              if (iy >= 0 && ix >= 0) bits[j] = x.data + (image + iy * l.other_x + ix) * l.groups * x_bytes + column;
              if (++x_at == l.x.size) x_at = 0, ++y;
            }
            indices(bits, to);
          }
        }
        std::memset(to, 0, index.data + (part + 1) * part_bytes - to);
        if (!offset) continue;
        const int64_t inside = (y_end[ky] - y_begin[ky]) * (x_end[kx] - x_begin[kx]);
        for (int64_t segment = 0; segment < (c.blocks ? samples : 1); ++segment) {
          alignas(64) int32_t ones[1][kWidth] = {};
          count_ones(index.data + part * part_bytes + segment * fours * kWidth, (c.blocks ? fours : used) / 4, ones);
          float* scaled = scaled_sum.data + (segment * l.groups * panels * taps + part) * kWidth;
          for (int k = 0; k < kWidth; ++k) {
            int64_t total = 2 * ones[0][k] - (c.blocks ? 1 : samples) * inside + (last ? c.missing : 0);
            if (!c.blocks) {
              int64_t& all = sum_x[part * kWidth + k];
              total = all = (first ? all : 0) + total;
            }
            scaled[k] = static_cast<float>(total) * c.x_scale;
          }
        }
      }
    });

    for (int64_t i = 0; i < (narrow ? samples : 0) * rows; ++i) {
      const int64_t n = c.samples[first + i / rows], channel = c.channels[i % rows];
      scales[i] = c.g_scale(n, channel);
      if (offset) offsets[i] = c.g_offset(n, channel);
    }

    // tiles of rows x columns of one tap, rows outermost: their tables stay in the cache
    Buffer<int64_t> tile_row(rows), tile_height(rows), tile_group(rows);
    int64_t tiles = 0;
    for (int64_t group = 0; group < l.groups; ++group) {
      for (int64_t row = group_begin[group]; row < group_begin[group + 1]; row += tile_height[tiles++]) {
        tile_row[tiles] = row, tile_group[tiles] = group, tile_height[tiles] = tile_rows(group_begin[group + 1] - row);
      }
    }
    parallel(tiles * panels * taps, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t tile = item / taps / panels, row = tile_row[tile], group = tile_group[tile];
        const int height = static_cast<int>(tile_height[tile]);
        const int64_t part = group * panels * taps + item % (taps * panels), tap = part % taps, panel = part / taps % panels;
        const int64_t columns = least(kWidth, l.in - panel * kWidth);
        const auto of_row = [&](int m) {
          return c.grad + (c.channels[row + m] * taps + tap) * l.in + panel * kWidth;
        };
        int64_t table_at[kRows];
        alignas(64) int32_t sums[kRows][kWidth];
        alignas(64) float grad[kRows][kWidth];
        if (c.blocks) {
          for (int m = 0; m < height; ++m) std::memcpy(grad[m], of_row(m), columns * sizeof(float));
        }
        if (narrow) {
          const int64_t parts = l.groups * panels * taps;
          const AddBlocks add = add_blocks_of(height, c.g.together());
          add({samples, fours / 4, tables.data + row * table_bytes, index.data + part * part_bytes, table_bytes, fours * 16,
               fours * kWidth, sum_g.data + row * taps + tap, taps, rows * taps, scales.data + row,
               offset ? offsets.data + row : nullptr, scaled_sum.data + part * kWidth, rows, parts * kWidth, c.x_scale},
              grad);
        }
        const Lookups find = lookups_of(height, c.g.together());
        for (int64_t segment = 0; segment < (narrow ? 0 : c.blocks ? samples : 1); ++segment) {
          std::memset(sums, 0, sizeof(sums));
          const int64_t index_at = segment * fours * kWidth;
          for (int64_t plane = 0; plane < planes; ++plane) {
            for (int m = 0; m < height; ++m) {
              table_at[m] = ((row + m) * planes + plane) * table_bytes + segment * fours * 16;
            }
            find(tables.data, table_at, index.data + part * part_bytes, &index_at, 1, (c.blocks ? fours : used) / 4, 4 * plane,
                 sums);
          }
          const int64_t n = c.blocks ? c.samples[first + segment] : 0;
          const float* terms = scaled_sum.data + (segment * l.groups * panels * taps + part) * kWidth;
          for (int m = 0; m < height; ++m) {
            const int64_t channel = c.channels[row + m];
            const float scale = c.g_scale(n, channel), x_scale = c.x_scale;
            alignas(64) float t[kWidth];
            if (c.blocks || one_chunk) {
              const int32_t all = sum_g[(segment * rows + row + m) * taps + tap];
              for (int k = 0; k < kWidth; ++k) t[k] = static_cast<float>(signed_sum(sums[m][k], all)) * scale * x_scale;
            } else {
              int64_t* total = totals.data + ((row + m) * taps * panels + part % (taps * panels)) * kWidth;
              for (int k = 0; k < kWidth; ++k) total[k] = (first ? total[k] : 0) + sums[m][k];
              if (!last) continue;
              const int64_t all = g_totals[(row + m) * taps + tap];
              for (int k = 0; k < kWidth; ++k) t[k] = static_cast<float>(2 * total[k] - all) * scale * x_scale;
            }
            if (offset) {
              const float of_g = c.g_offset(n, channel);
              for (int k = 0; k < kWidth; ++k) t[k] += terms[k] * of_g;
            }
            if (c.blocks) {
              for (int k = 0; k < kWidth; ++k) grad[m][k] += t[k];
            } else {
              std::memcpy(of_row(m), t, columns * sizeof(float));
            }
          }
        }
        if (c.blocks) {
          for (int m = 0; m < height; ++m) std::memcpy(of_row(m), grad[m], columns * sizeof(float));
        }
      }
    });
  }
}
