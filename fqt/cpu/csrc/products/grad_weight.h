// `grad_weight` of multi-bit gradients and signs: G (N, P', O) x X (N, P, C) -> (O, K, I), by the lookups of lookup.h. Four
// positions of an output channel become a table, four positions of X an index for every tap. Samples are worked off in chunks
// that stay in the cache. Integers are accumulated over all samples, or, where each has a scale, per sample: they become floats
// at the end of each and are added in ascending order.

namespace {

// The positions of an image axis that each tap meets: [begin, end).
struct MetRange {
  Buffer<int64_t> begin, end;
  bool whole = true;  // whether each tap meets all positions

  explicit MetRange(const Axis& axis) : begin(axis.taps), end(axis.taps) {
    for (int64_t tap = 0; tap < axis.taps; ++tap) {
      begin[tap] = end[tap] = 0;
      for (int64_t i = 0; i < axis.size; ++i) {
        if (axis.at[i * axis.taps + tap] < 0) continue;
        if (end[tap] == 0) begin[tap] = i;
        end[tap] = i + 1;
      }
      whole &= begin[tap] == 0 && end[tap] == axis.size;
    }
  }
};

class GradWeightRun {
 public:
  explicit GradWeightRun(const GradWeight& call)
      : c(call), l(call.layer), taps(l.taps()), panels(ceil_div(l.in, kWidth)), parts(l.groups * panels * taps),
        planes(c.g.planes()), rows(c.channel_count), positions(l.positions()), outputs(l.groups * l.out),
        offset(c.g_offset.data != nullptr), x_bytes(panels * kWidth / 8), x_rows(l.n * l.other_positions() - c.missing),
        // a sample takes `fours` lookups; where each sample has a scale of its own, they are rounded up to whole groups of four
        fours(c.blocks ? round_up(ceil_div(positions, 4), 4) : ceil_div(positions, 4)), chunk(chunk_of()),
        room(round_up(chunk * fours, 4)), segments(c.blocks ? chunk : 1), table_bytes(room * 16), part_bytes(room * kWidth),
        one_chunk(c.sample_count <= chunk),
        narrow(c.blocks && planes == 1 && fours / 4 <= kMostQuads * c.g.together()), met_y(l.y), met_x(l.x),
        x((x_rows + 1) * l.groups * x_bytes), codes(rows * room * 4), tables(rows * planes * table_bytes),
        index(parts * part_bytes), sum_g(segments * rows * taps), sum_x(offset && !c.blocks ? parts * kWidth : 0),
        totals(c.blocks || one_chunk ? 0 : rows * taps * panels * kWidth), g_totals(c.blocks ? 0 : rows * taps),
        scaled_sum(offset ? segments * parts * kWidth : 0), scales(segments * rows), offsets(segments * rows), tiles(rows) {}

  void operator()() {
    pack_x();
    lay_tiles();
    for (int64_t first = 0; first == 0 || first < c.sample_count; first += chunk) {
      const int64_t samples = least(chunk, c.sample_count - first);
      const Chunk now{first, samples, c.blocks ? 1 : round_up(samples * fours, 4), first + samples == c.sample_count};
      unpack_codes(now);
      make_row_tables(now);
      make_indices(now);
      take_scales(now);
      multiply_tiles(now);
    }
  }

 private:
  // Samples that are worked off together. used: its lookups, where it is one sum.
  struct Chunk {
    int64_t first, samples, used;
    bool last;
  };

  // Rows that are multiplied together: output channels of one group, by their places in c.channels.
  struct Tile {
    int64_t group, row;
    int height;
  };

  int64_t chunk_of() const {
    const int64_t bytes_of_four = rows * planes * 16 + parts * kWidth;
    const int64_t most_fours = most(c.blocks ? 256 : 512, (3 << 19) / (bytes_of_four + 1));
    return most(1, least(c.sample_count, most_fours / most(1, fours)));
  }

  // Sums of a chunk that become floats by themselves.
  int64_t segments_of(const Chunk& now) const { return c.blocks ? now.samples : 1; }

  int64_t positions_of(int64_t n) const { return n == l.n - 1 ? positions - c.missing : positions; }

  // X with every group padded to whole vectors, and a row of zeros for positions outside the image.
  void pack_x() {
    align_groups(c.x, x_rows, l.groups, l.in, x_bytes, x.data);
    parallel(x_rows, most(1, 32768 / (l.groups * x_bytes + 1)), [&](int64_t begin, int64_t end) {
      weave(x.data + begin * l.groups * x_bytes, (end - begin) * l.groups * x_bytes);
    });
    std::memset(x.data + x_rows * l.groups * x_bytes, 0, l.groups * x_bytes);
  }

  // c.channels is ascending.
  void lay_tiles() {
    for (int64_t group = 0, row = 0; group < l.groups; ++group) {
      int64_t end = row;
      while (end < rows && c.channels[end] < (group + 1) * l.out) ++end;
      for (; row < end; row += tiles[tile_count++].height) tiles[tile_count] = {group, row, tile_rows(end - row)};
    }
  }

  // Codes, one a byte, channel-major; `fours` * 4 for a sample.
  void unpack_codes(const Chunk& now) {
    parallel(c.g.channel ? rows : now.samples, 1, [&](int64_t begin, int64_t end) {
      if (c.g.channel) {
        for (int64_t row = begin; row < end; ++row) unpack_row(now, row);
        return;
      }
      Buffer<uint8_t> pixels(outputs * 4);
      for (int64_t s = begin; s < end; ++s) unpack_sample(c.samples[now.first + s], s, pixels);
      if (!c.blocks && end == now.samples) {
        const int64_t tail = now.samples * fours * 4;
        for (int64_t row = 0; row < rows; ++row) std::memset(codes.data + row * room * 4 + tail, 0, room * 4 - tail);
      }
    });
  }

  void unpack_row(const Chunk& now, int64_t row) {
    uint8_t* to = codes.data + row * room * 4;
    std::memset(to, 0, room * 4);
    for (int64_t s = 0; s < now.samples; ++s, to += fours * 4) {
      const int64_t n = c.samples[now.first + s], channel = c.channels[row];
      if (c.g.by_channel) {
        const int64_t all = l.n * positions - c.missing;
        unpack(c.g.data + channel * ceil_div(all * c.g.storage(), 8), n * positions, positions_of(n), c.g.storage(), to);
      } else {
        unpack(c.g.data + (channel * l.n + n) * ceil_div(positions * c.g.storage(), 8), 0, positions, c.g.storage(), to);
      }
    }
  }

  // pixels: room for the codes of four.
  void unpack_sample(int64_t n, int64_t s, Buffer<uint8_t>& pixels) {
    const int64_t packed = ceil_div(outputs * c.g.storage(), 8);
    for (int64_t four = 0; four < fours; ++four) {
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t p = 4 * four + j;
        if (p < positions_of(n)) {
          unpack(c.g.data + (n * positions + p) * packed, 0, outputs, c.g.storage(), pixels.data + j * outputs);
        } else {
          std::memset(pixels.data + j * outputs, 0, outputs);
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        uint8_t* to = codes.data + row * room * 4 + s * fours * 4 + four * 4;
        for (int64_t j = 0; j < 4; ++j) to[j] = pixels[j * outputs + c.channels[row]];
      }
    }
  }

  // Tables, and the sums of the codes that each tap meets.
  void make_row_tables(const Chunk& now) {
    parallel(rows, 1, [&](int64_t begin, int64_t end) {
      Buffer<int32_t> pixel(positions);
      for (int64_t row = begin; row < end; ++row) {
        const uint8_t* from = codes.data + row * room * 4;
        for (int64_t plane = 0; plane < planes; ++plane) {
          make_tables(from, room * 4, planes, plane, tables.data + (row * planes + plane) * table_bytes);
        }
        for (int64_t segment = 0; segment < segments_of(now); ++segment) {
          int32_t* sums = sum_g.data + (segment * rows + row) * taps;
          const uint8_t* of_segment = from + segment * fours * 4;
          if (met_y.whole && met_x.whole) {
            const int32_t total = byte_sum(of_segment, (c.blocks ? fours : now.used) * 4);
            for (int64_t tap = 0; tap < taps; ++tap) sums[tap] = total;
          } else {
            sum_inside(of_segment, c.blocks ? 1 : now.samples, pixel.data, sums);
          }
          int64_t* all = g_totals.data + (c.blocks ? 0 : row * taps);
          for (int64_t tap = 0; !c.blocks && tap < taps; ++tap) all[tap] = (now.first ? all[tap] : 0) + sums[tap];
        }
      }
    });
  }

  // For each tap the sum of a channel's codes, of some samples, over the positions that the tap meets. pixel: room for a number
  // of each position.
  void sum_inside(const uint8_t* of_channel, int64_t samples, int32_t* pixel, int32_t* sums) const {
    std::memset(pixel, 0, positions * sizeof(int32_t));
    for (int64_t s = 0; s < samples; ++s) {
      for (int64_t i = 0; i < positions; ++i) pixel[i] += of_channel[s * fours * 4 + i];
    }
    std::memset(sums, 0, taps * sizeof(int32_t));
    for (int64_t y = 0; y < l.y.size; ++y) {
      const int32_t* line = pixel + y * l.x.size;
      int32_t total = 0;
      for (int64_t i = 0; i < l.x.size; ++i) total += line[i];
      for (int64_t kx = 0; kx < l.x.taps; ++kx) {
        int32_t inside = total;
        for (int64_t i = 0; i < met_x.begin.data[kx]; ++i) inside -= line[i];
        for (int64_t i = met_x.end.data[kx]; i < l.x.size; ++i) inside -= line[i];
        for (int64_t ky = 0; ky < l.y.taps; ++ky) {
          if (y >= met_y.begin.data[ky] && y < met_y.end.data[ky]) sums[ky * l.x.taps + kx] += inside;
        }
      }
    }
  }

  // Indices, and the sums of X's codes that each tap meets: a part is a tap of a panel of a group.
  void make_indices(const Chunk& now) {
    parallel(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t column = part / taps / panels * x_bytes + part / taps % panels * kWidth / 8;
        uint8_t* to = index.data + part * part_bytes;
        for (int64_t s = 0; s < now.samples; ++s, to += fours * kWidth) {
          make_sample_indices(c.samples[now.first + s], part % taps, column, to);
        }
        std::memset(to, 0, index.data + (part + 1) * part_bytes - to);
        if (offset) sum_signs(now, part);
      }
    });
  }

  // column: byte of a row of X at which the panel begins.
  void make_sample_indices(int64_t n, int64_t tap, int64_t column, uint8_t* to) const {
    const int64_t ky = tap / l.x.taps, kx = tap % l.x.taps, image = n * l.other_positions(), count = positions_of(n);
    const uint8_t* const outside = x.data + x_rows * l.groups * x_bytes + column;
    int64_t y = 0, x_at = 0;
    for (int64_t four = 0; four < fours; ++four, to += kWidth) {
      const uint8_t* bits[4];
      for (int j = 0; j < 4; ++j) {
        bits[j] = outside;
        if (4 * four + j >= count) continue;
        const int32_t iy = l.y.at[y * l.y.taps + ky], ix = l.x.at[x_at * l.x.taps + kx];
        if (iy >= 0 && ix >= 0) bits[j] = x.data + (image + iy * l.other_x + ix) * l.groups * x_bytes + column;
        if (++x_at == l.x.size) x_at = 0, ++y;
      }
      indices(bits, to);
    }
  }

  // (Sum of X's codes) * x_scale for every segment, by which the offset is multiplied.
  void sum_signs(const Chunk& now, int64_t part) {
    const int64_t tap = part % taps, ky = tap / l.x.taps, kx = tap % l.x.taps;
    const int64_t inside = (met_y.end[ky] - met_y.begin[ky]) * (met_x.end[kx] - met_x.begin[kx]);
    for (int64_t segment = 0; segment < segments_of(now); ++segment) {
      alignas(64) int32_t ones[1][kWidth] = {};
      count_ones(index.data + part * part_bytes + segment * fours * kWidth, (c.blocks ? fours : now.used) / 4, ones);
      float* scaled = scaled_sum.data + (segment * parts + part) * kWidth;
      for (int k = 0; k < kWidth; ++k) {
        int64_t total = 2 * ones[0][k] - (c.blocks ? 1 : now.samples) * inside + (now.last ? c.missing : 0);
        if (!c.blocks) {
          int64_t& all = sum_x[part * kWidth + k];
          total = all = (now.first ? all : 0) + total;
        }
        scaled[k] = static_cast<float>(total) * c.x_scale;
      }
    }
  }

  // The scales that `add_blocks` reads.
  void take_scales(const Chunk& now) {
    for (int64_t i = 0; i < (narrow ? now.samples : 0) * rows; ++i) {
      const int64_t n = c.samples[now.first + i / rows], channel = c.channels[i % rows];
      scales[i] = c.g_scale(n, channel);
      if (offset) offsets[i] = c.g_offset(n, channel);
    }
  }

  // Tiles of rows x columns of one tap, rows outermost: their tables stay in the cache.
  void multiply_tiles(const Chunk& now) {
    parallel(tile_count * panels * taps, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const Tile& tile = tiles[item / taps / panels];
        const int64_t part = tile.group * panels * taps + item % (taps * panels);
        if (c.blocks) {
          multiply_samples(now, tile, part);
        } else {
          multiply_chunk(now, tile, part);
        }
      }
    });
  }

  // Where row m of a tile goes in the result, and how many columns of the part's panel.
  float* to_row(const Tile& tile, int m, int64_t part) const {
    return c.grad + (c.channels[tile.row + m] * taps + part % taps) * l.in + part / taps % panels * kWidth;
  }
  int64_t columns_of(int64_t part) const { return least(kWidth, l.in - part / taps % panels * kWidth); }

  // Samples with a scale each: they are added to the result one after the other.
  void multiply_samples(const Chunk& now, const Tile& tile, int64_t part) {
    const size_t bytes = columns_of(part) * sizeof(float);
    alignas(64) float grad[kRows][kWidth];
    for (int m = 0; m < tile.height; ++m) std::memcpy(grad[m], to_row(tile, m, part), bytes);
    if (narrow) {
      add_blocks_of(tile.height, c.g.together())({.count = now.samples,
                                                  .quads = fours / 4,
                                                  .tables = tables.data + tile.row * table_bytes,
                                                  .index = index.data + part * part_bytes,
                                                  .row_step = table_bytes,
                                                  .table_step = fours * 16,
                                                  .index_step = fours * kWidth,
                                                  .sum_g = sum_g.data + tile.row * taps + part % taps,
                                                  .sum_row_step = taps,
                                                  .sum_step = rows * taps,
                                                  .scale = scales.data + tile.row,
                                                  .offset = offset ? offsets.data + tile.row : nullptr,
                                                  .terms = scaled_sum.data + part * kWidth,
                                                  .scale_step = rows,
                                                  .terms_step = parts * kWidth,
                                                  .x_scale = c.x_scale},
                                                 grad);
    } else {
      for (int64_t s = 0; s < now.samples; ++s) {
        alignas(64) int32_t sums[kRows][kWidth];
        look_up_segment(tile, part, s, fours / 4, sums);
        for (int m = 0; m < tile.height; ++m) {
          const int32_t all = sum_g[(s * rows + tile.row + m) * taps + part % taps];
          int32_t whole[kWidth];
          for (int k = 0; k < kWidth; ++k) whole[k] = signed_sum(sums[m][k], all);
          alignas(64) float t[kWidth];
          finish(whole, c.samples[now.first + s], c.channels[tile.row + m], s, part, t);
          for (int k = 0; k < kWidth; ++k) grad[m][k] += t[k];
        }
      }
    }
    for (int m = 0; m < tile.height; ++m) std::memcpy(to_row(tile, m, part), grad[m], bytes);
  }

  // A chunk as one sum, added to those of the chunks before; after the last they become floats.
  void multiply_chunk(const Chunk& now, const Tile& tile, int64_t part) {
    alignas(64) int32_t sums[kRows][kWidth];
    look_up_segment(tile, part, 0, now.used / 4, sums);
    for (int m = 0; m < tile.height; ++m) {
      const int64_t row = tile.row + m, tap = part % taps;
      alignas(64) float t[kWidth];
      if (one_chunk) {
        int32_t whole[kWidth];
        for (int k = 0; k < kWidth; ++k) whole[k] = signed_sum(sums[m][k], sum_g[row * taps + tap]);
        finish(whole, 0, c.channels[row], 0, part, t);
      } else {
        int64_t* total = totals.data + (row * taps * panels + part % (taps * panels)) * kWidth;
        for (int k = 0; k < kWidth; ++k) total[k] = (now.first ? total[k] : 0) + sums[m][k];
        if (!now.last) continue;
        int64_t whole[kWidth];
        for (int k = 0; k < kWidth; ++k) whole[k] = 2 * total[k] - g_totals[row * taps + tap];
        finish(whole, 0, c.channels[row], 0, part, t);
      }
      std::memcpy(to_row(tile, m, part), t, columns_of(part) * sizeof(float));
    }
  }

  // The looked-up sums of a tile over one segment, of all planes.
  void look_up_segment(const Tile& tile, int64_t part, int64_t segment, int64_t quads, int32_t sums[][kWidth]) {
    const LookUp look_up_tile = look_up_of(tile.height, c.g.together());
    const int64_t index_at = segment * fours * kWidth;
    std::memset(sums, 0, kRows * sizeof(sums[0]));
    for (int64_t plane = 0; plane < planes; ++plane) {
      int64_t table_at[kRows];
      for (int m = 0; m < tile.height; ++m) {
        table_at[m] = ((tile.row + m) * planes + plane) * table_bytes + segment * fours * 16;
      }
      look_up_tile({.tables = tables.data,
                    .table_at = table_at,
                    .index = index.data + part * part_bytes,
                    .index_at = &index_at,
                    .taps = 1,
                    .quads = quads,
                    .shift = static_cast<int>(4 * plane)},
                   sums);
    }
  }

  // The float part in the reference's order: of the sums of codes by signs of a sample and an output channel.
  template <class Sum>
  void finish(const Sum* whole, int64_t n, int64_t channel, int64_t segment, int64_t part, float* t) const {
    const float scale = c.g_scale(n, channel), x_scale = c.x_scale;
    for (int k = 0; k < kWidth; ++k) t[k] = static_cast<float>(whole[k]) * scale * x_scale;
    if (!offset) return;
    const float of_g = c.g_offset(n, channel);
    const float* terms = scaled_sum.data + (segment * parts + part) * kWidth;
    for (int k = 0; k < kWidth; ++k) t[k] += terms[k] * of_g;
  }

  const GradWeight& c;
  const Layer& l;
  const int64_t taps, panels, parts, planes, rows, positions, outputs;  // rows: kept output channels
  const bool offset;
  const int64_t x_bytes, x_rows;                    // of a group's codes in a row of X; rows of X
  const int64_t fours, chunk, room, segments;       // chunk: samples of one; room: its lookups
  const int64_t table_bytes, part_bytes;            // of a row and plane; of a part's indices
  const bool one_chunk, narrow;                     // narrow: `add_blocks` serves
  MetRange met_y, met_x;
  Buffer<uint8_t> x, codes, tables, index;
  Buffer<int32_t> sum_g;                            // (segment, row, tap)
  Buffer<int64_t> sum_x, totals, g_totals;          // of the chunks so far: of X by part, of products, of G by row and tap
  Buffer<float> scaled_sum, scales, offsets;        // (segment, part, column); (sample, row)
  Buffer<Tile> tiles;
  int64_t tile_count = 0;
};

}  // namespace

void grad_weight(const GradWeight& call) {
  const Layer& l = call.layer;
  if (call.channel_count * l.taps() * l.in == 0) return;
  if (call.blocks && l.positions() * l.taps() * l.groups == 1 && l.other_positions() == 1) return GradWeightOfRows{call}();
  GradWeightRun{call}();
}
