// `grad_input` of multi-bit gradients and signs: G (N, P', O) x W (O, K, I) -> (N, P, C), by the lookups of lookup.h. Every
// pixel of the gradient becomes tables, every weight indices. Pixels that meet the same taps share a tile, so that nothing
// outside the image is looked up.

namespace {

class GradInputRun {
 public:
  explicit GradInputRun(const GradInput& call)
      : c(call), l(call.layer), taps(l.taps()), channels(l.groups * l.in), mask_bytes(ceil_div(channels, 8)),
        panels(ceil_div(l.in, kWidth)), parts(l.groups * panels), kinds(l.y.kinds * l.x.kinds), padded(round_up(l.out, 16)),
        quads(padded / 16),
        planes(c.g.planes()), tap_bytes(padded / 4 * kWidth), table_bytes(padded * 4),
        pixel_bytes(l.groups * planes * table_bytes), index(parts * taps * tap_bytes), sum_w(parts * taps * kWidth),
        met(kinds * taps), met_count(kinds), scaled_sum(kinds * parts * kWidth) {}

  void operator()() {
    pack_weights();
    sum_weights_of_kinds();
    multiply_blocks();
  }

 private:
  // Pixels of one kind that are multiplied together, `first` of them in a block's order.
  struct Tile {
    int64_t kind, rows, first;
  };

  // Some samples, or a band of rows of one; and the rows of the gradient that it meets.
  struct Block {
    int64_t first_sample, samples, y_begin, y_end, g_begin, g_end;
    int64_t g_lines() const { return most(0, g_end - g_begin); }
  };

  // What a thread keeps of a block: its pixels by kind, as tiles.
  struct Room {
    int64_t most_pixels, tile_count = 0;
    Buffer<Tile> tiles;
    Buffer<int64_t> sample_of, pixel_of, table_at;  // table_at: as in `Lookups`, tile by tile
    Buffer<int32_t> sum_of;                         // codes of the gradient over what a pixel meets, (pixel, group)
    Buffer<uint8_t> codes;
    Room(int64_t pixels, int64_t taps, int64_t groups, int64_t padded)
        : most_pixels(pixels), tiles(pixels), sample_of(pixels), pixel_of(pixels), table_at(pixels * taps),
          sum_of(pixels * groups), codes(padded) {}
  };

  // The gradient that a block meets.
  struct Tables {
    Buffer<uint8_t> tables;  // (sample, pixel, group, plane)
    Buffer<int32_t> sums;    // of codes, (sample, pixel, group)
    Tables(int64_t pixels, int64_t pixel_bytes, int64_t groups) : tables(pixels * pixel_bytes), sums(pixels * groups) {}
  };

  // A stretch of columns of one group. number: among the panels of all groups.
  struct Panel {
    int64_t number, group, channel, columns;
  };

  // Weights as indices, (group, panel, tap, four output channels, column), and their sums over the output channels.
  void pack_weights() {
    parallel(parts * taps, 1, [&](int64_t begin, int64_t end) {
      const int64_t row_bytes = ceil_div(l.in, 8);
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
  }

  // For each kind of pixel the taps that it meets, and (sum of w's codes over them) * w_scale.
  void sum_weights_of_kinds() {
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
  }

  // A block is some samples, or a band of rows of one where its tables would not stay in the cache.
  void multiply_blocks() {
    const int64_t most_pixels = most(64, (256 << 10) / (pixel_bytes + 1)), image = l.positions();
    const int64_t batch = most(1, least(most_pixels / most(1, l.other_positions()), ceil_div(c.kept_count, 8)));
    const int64_t wanted = most(ceil_div(most(image, l.other_positions()), most_pixels), ceil_div(4, c.kept_count + 1));
    const int64_t bands = batch > 1 ? 1 : most(1, least(l.y.size, wanted));
    const int64_t band = ceil_div(l.y.size, bands), blocks = ceil_div(c.kept_count, batch);
    parallel(blocks * bands, 1, [&](int64_t begin, int64_t end) {
      Room room(batch * band * l.x.size, taps, l.groups, padded);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first_sample = item / bands * batch, y_begin = least(l.y.size, item % bands * band);
        Block block{first_sample, least(batch, c.kept_count - first_sample), y_begin, least(l.y.size, y_begin + band),
                    l.other_y, 0};
        for (int64_t i = block.y_begin * l.y.taps; i < block.y_end * l.y.taps; ++i) {
          if (l.y.at[i] < 0) continue;
          block.g_begin = least(block.g_begin, l.y.at[i]);
          block.g_end = most(block.g_end, l.y.at[i] + 1);
        }
        Tables gradient(block.samples * block.g_lines() * l.other_x, pixel_bytes, l.groups);
        make_gradient_tables(block, room, gradient);
        lay_tiles(block, gradient, room);
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t group = part / panels, first = part % panels * kWidth;
          multiply_panel(block, gradient, room, {part, group, group * l.in + first, least(kWidth, l.in - first)});
        }
      }
    });
  }

  void make_gradient_tables(const Block& block, Room& room, Tables& to) {
    const int64_t packed = ceil_div(l.groups * l.out * c.g.storage(), 8), g_pixels = block.g_lines() * l.other_x;
    uint8_t* const codes = room.codes.data;
    for (int64_t i = 0; i < block.samples * g_pixels; ++i) {
      const int64_t n = c.kept[block.first_sample + i / g_pixels], p = block.g_begin * l.other_x + i % g_pixels;
      const uint8_t* row = c.g.data + (n * l.other_positions() + p) * packed;
      for (int64_t group = 0; group < l.groups; ++group) {
        unpack(row, group * l.out, l.out, c.g.storage(), codes);
        std::memset(codes + l.out, 0, padded - l.out);
        to.sums[i * l.groups + group] = byte_sum(codes, padded);
        uint8_t* tables = to.tables.data + i * pixel_bytes + group * planes * table_bytes;
        for (int64_t plane = 0; plane < planes; ++plane) {
          make_tables(codes, padded, planes, plane, tables + plane * table_bytes);
        }
      }
    }
  }

  // The pixels of a block by kind, as tiles.
  void lay_tiles(const Block& block, Tables& gradient, Room& room) {
    int64_t pixels = 0;
    room.tile_count = 0;
    std::memset(room.sum_of.data, 0, room.most_pixels * l.groups * sizeof(int32_t));
    for (int64_t kind = 0; kind < kinds; ++kind) {
      const int64_t begin_of_kind = pixels;
      for (int64_t y = block.y_begin; y < block.y_end; ++y) {
        if (l.y.kind[y] != kind / l.x.kinds) continue;
        for (int64_t x = 0; x < l.x.size; ++x) {
          if (l.x.kind[x] != kind % l.x.kinds) continue;
          for (int64_t s = 0; s < block.samples; ++s) {
            room.sample_of[pixels] = s, room.pixel_of[pixels++] = y * l.x.size + x;
          }
        }
      }
      for (int64_t first = begin_of_kind; first < pixels;) {
        const int64_t rows = tile_rows(pixels - first);
        room.tiles[room.tile_count++] = {kind, rows, first};
        for (int64_t m = 0; m < rows; ++m) find_tables(block, gradient, room, first, rows, m);
        first += rows;
      }
    }
  }

  // Where row m of a tile finds the tables of what it meets, and the sum of their codes.
  void find_tables(const Block& block, Tables& gradient, Room& room, int64_t first, int64_t rows, int64_t m) {
    const int64_t p = room.pixel_of[first + m], s = room.sample_of[first + m];
    const int32_t *y_at = l.y.at + p / l.x.size * l.y.taps, *x_at = l.x.at + p % l.x.size * l.x.taps;
    int64_t* to = room.table_at.data + first * taps + m;
    int32_t* sums = room.sum_of.data + (first + m) * l.groups;
    for (int64_t ky = 0; ky < l.y.taps; ++ky) {
      if (y_at[ky] < 0) continue;
      const int64_t line = (s * (block.g_end - block.g_begin) + y_at[ky] - block.g_begin) * l.other_x;
      for (int64_t kx = 0; kx < l.x.taps; ++kx) {
        if (x_at[kx] < 0) continue;
        const int64_t at = line + x_at[kx];
        *to = at * pixel_bytes;
        to += rows;
        for (int64_t group = 0; group < l.groups; ++group) sums[group] += gradient.sums[at * l.groups + group];
      }
    }
  }

  // The tiles of a block by a panel.
  void multiply_panel(const Block& block, Tables& gradient, Room& room, const Panel& panel) {
    Buffer<int64_t> index_at(taps);
    for (int64_t i = 0; i < room.tile_count; ++i) {
      const Tile& tile = room.tiles[i];
      for (int64_t t = 0; t < met_count[tile.kind]; ++t) index_at[t] = met[tile.kind * taps + t] * tap_bytes;
      const LookUp look_up_tile = look_up_of(tile.rows, c.g.together());
      alignas(64) int32_t sums[kRows][kWidth] = {};
      for (int64_t plane = 0; plane < planes; ++plane) {
        look_up_tile({.tables = gradient.tables.data + (panel.group * planes + plane) * table_bytes,
                      .table_at = room.table_at.data + tile.first * taps,
                      .index = index.data + panel.number * taps * tap_bytes,
                      .index_at = index_at.data,
                      .taps = met_count[tile.kind],
                      .quads = quads,
                      .shift = static_cast<int>(4 * plane)},
                     sums);
      }
      for (int64_t m = 0; m < tile.rows; ++m) {
        const int64_t n = c.kept[block.first_sample + room.sample_of[tile.first + m]];
        const int32_t all = room.sum_of[(tile.first + m) * l.groups + panel.group];
        finish(n, room.pixel_of[tile.first + m], panel, tile.kind, sums[m], all);
      }
    }
  }

  // The float part in the reference's order. of_set: sums of the codes whose weight is +1; all: of all codes.
  void finish(int64_t n, int64_t p, const Panel& panel, int64_t kind, const int32_t* of_set, int32_t all) const {
    const int64_t pixel = n * l.positions() + p;
    const float scale = c.g_scale(n, p), w_scale = c.w_scale;
    alignas(64) float t[kWidth];
    for (int k = 0; k < kWidth; ++k) t[k] = static_cast<float>(signed_sum(of_set[k], all)) * scale * w_scale;
    if (c.g_offset.data != nullptr) {
      const float offset = c.g_offset(n, p);
      const float* terms = scaled_sum.data + (kind * parts + panel.number) * kWidth;
      for (int k = 0; k < kWidth; ++k) t[k] += terms[k] * offset;
    }
    if (c.mask != nullptr) {
      uint8_t bits[kWidth / 8];
      copy_bits(c.mask + pixel * mask_bytes, panel.channel, panel.columns, bits, kWidth / 8);
      keep_where_set(bits, t);
    }
    std::memcpy(c.grad + pixel * channels + panel.channel, t, panel.columns * sizeof(float));
  }

  const GradInput& c;
  const Layer& l;
  const int64_t taps, channels, mask_bytes, panels, parts, kinds;  // parts: panels of all groups
  const int64_t padded, quads, planes;                 // of the output channels, which are summed
  const int64_t tap_bytes, table_bytes, pixel_bytes;   // of a tap's indices; of a plane's tables, and a pixel's
  Buffer<uint8_t> index;
  Buffer<int32_t> sum_w;
  Buffer<int64_t> met, met_count;
  Buffer<float> scaled_sum;
};

}  // namespace

void grad_input(const GradInput& call) {
  if (call.kept_count * call.layer.positions() * call.layer.in == 0) return;
  GradInputRun{call}();
}
