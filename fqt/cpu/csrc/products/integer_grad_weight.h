// `grad_weight` of integers. Codes that are summed are made contiguous: four samples at one position, or, where each sample
// has a scale of its own, four positions of a line. Samples are taken in chunks, and each chunk in bands of positions; a round
// is one band of one chunk.

namespace {

template <class Code, class Sum>
class Weigh {
 public:
  explicit Weigh(const IntegerGradWeight& call)
      : c(call), l(call.layer), taps(l.taps()), positions(l.positions()), pixels(l.other_positions()), inputs(l.groups * l.in),
        outputs(l.groups * l.out), row_by(row_shift<Code>(c.x)), column_by(column_shift<Code>(c.g)),
        g_offset(c.g_offset.data != nullptr), panels(panels_of(c)), slots(panels.back().slot + panels.back().width),
        line(c.blocks ? round_up(l.x.size, kPer<Code>) : 0), sample_terms(c.blocks ? l.y.size * line : positions),
        chunk(chunk_of()), x_codes(c.blocks ? chunk * l.other_y * l.x.taps * line : pixels * chunk),
        g_codes(chunk * sample_terms), g_words(g_codes / kPer<Code>),
        pitch(round_up(x_codes * kSize, 64) / kSize + 64 / kSize),
        band(c.blocks ? most(1, positions) : most(1, kChunk / chunk)),
        bands(c.blocks ? 1 : most(1, ceil_div(positions, band))), rounds(most(1, ceil_div(c.sample_count, chunk)) * bands),
        segments(c.blocks ? chunk : 1), steps(steps_of<Code>(c.x, c.g)), decode_x(c.x, row_by), decode_g(c.g, -column_by),
        x((inputs + 1) * pitch), g(slots * g_words), column_of_ones(g_words * kInts), x_list(x_codes), g_list(g_codes),
        totals(c.blocks || rounds == 1 ? 0 : l.in * slots * taps), grads(c.blocks && rounds > 1 ? l.in * slots * taps : 0),
        column_sums(segments * taps * slots), row_sums(segments * taps * inputs), base(segments * taps * slots),
        row_floats(segments * taps * inputs), column_floats(segments * taps * slots), scale(segments * slots),
        offset(segments * slots), terms(segments * taps) {}

  void operator()() {
    for (int64_t number = 0; number < rounds; ++number) {
      const int64_t first = number / bands * chunk, begin = number % bands * band;
      const Round round{first, least(chunk, c.sample_count - first), begin, least(positions, begin + band), number == 0,
                        number == rounds - 1};
      if (round.begin == 0) {
        make_lists(round.samples);
        pack_x(round);
        pack_g(round);
      }
      find_runs(round);
      take_scales(round);
      multiply_panels(round);
    }
  }

 private:
  static constexpr int64_t kSize = sizeof(Code);
  static constexpr int64_t kChunk = 4096;  // terms: a panel of them stays in the second cache

  // Output channels of one group that are multiplied together. slot: the first among all panels' columns, which are filled up
  // to vectors. first: its place in c.channels.
  struct Panel {
    int64_t group, slot, first, used, width;
  };

  // Positions [begin, end) of some samples. fresh: the first round.
  struct Round {
    int64_t first, samples, begin, end;
    bool fresh, last;
  };

  // c.channels is ascending.
  static std::vector<Panel> panels_of(const IntegerGradWeight& c) {
    const Layer& l = c.layer;
    std::vector<Panel> panels;
    int64_t slots = 0;
    for (int64_t group = 0, first = 0; group < l.groups; ++group) {
      while (first < c.channel_count && c.channels[first] < (group + 1) * l.out) {
        int64_t used = 0;
        while (used < kColumns && first + used < c.channel_count && c.channels[first + used] < (group + 1) * l.out) ++used;
        panels.push_back({group, slots, first, used, round_up(used, kInts)});
        slots += panels.back().width;
        first += used;
      }
    }
    return panels;
  }

  int64_t chunk_of() const {
    const int64_t samples = most(1, least(c.sample_count, kChunk / most(1, sample_terms)));
    return c.blocks ? samples : round_up(samples, kPer<Code>);
  }

  // Sums of a round that become floats by themselves.
  int64_t segments_of(const Round& round) const { return c.blocks ? round.samples : 1; }

  int64_t sample_of(int64_t place) const { return c.samples ? c.samples[place] : place; }

  // Where x_list and g_list have no term.
  int64_t no_x() const { return chunk * pixels; }
  int64_t no_g() const { return chunk * positions; }

  // The row of x behind all channels: 1 where there is a term.
  Code* ones() const { return x.data + inputs * pitch; }

  // Where in the chunk each term is, sample * positions + position; and ones where there is one.
  void make_lists(int64_t samples) {
    if (samples == listed) return;
    listed = samples;
    c.blocks ? list_lines(samples) : list_positions(samples);
    for (int64_t i = 0; i < x_codes; ++i) ones()[i] = x_list[i] != no_x();
    for (int64_t word = 0; word < g_words; ++word) {
      Code four[kPer<Code>];
      for (int j = 0; j < kPer<Code>; ++j) four[j] = g_list[word * kPer<Code> + j] != no_g();
      for (int i = 0; i < kInts; ++i) std::memcpy(column_of_ones.data + word * kInts + i, four, 4);
    }
  }

  // Position after position, the samples side by side.
  void list_positions(int64_t samples) {
    for (int64_t s = 0; s < chunk; ++s) {
      const bool used = s < samples;
      for (int64_t p = 0; p < pixels; ++p) x_list[p * chunk + s] = static_cast<int32_t>(used ? s * pixels + p : no_x());
      for (int64_t p = 0; p < positions; ++p) g_list[p * chunk + s] = static_cast<int32_t>(used ? s * positions + p : no_g());
    }
  }

  // Sample after sample; a line of X once for each tap along it, as the gradient's line meets it.
  void list_lines(int64_t samples) {
    int32_t *to_x = x_list.data, *to_g = g_list.data;
    for (int64_t s = 0; s < chunk; ++s) {
      for (int64_t y = 0; y < l.other_y; ++y) {
        for (int64_t tap = 0; tap < l.x.taps; ++tap) {
          for (int64_t i = 0; i < line; ++i) {
            const int32_t met = i < l.x.size ? l.x.at[i * l.x.taps + tap] : -1;
            *to_x++ = static_cast<int32_t>(s < samples && met >= 0 ? (s * l.other_y + y) * l.other_x + met : no_x());
          }
        }
      }
      for (int64_t y = 0; y < l.y.size; ++y) {
        for (int64_t i = 0; i < line; ++i) {
          *to_g++ = static_cast<int32_t>(s < samples && i < l.x.size ? (s * l.y.size + y) * l.x.size + i : no_g());
        }
      }
    }
  }

  // X: a row a channel, (channel, word).
  void pack_x(const Round& round) {
    constexpr int64_t together = 16;
    const int64_t words = x_codes / kPer<Code>, row_bytes = ceil_div(inputs * c.x.storage, 8);
    parallel(ceil_div(words, together), most(1, 4096 / (inputs + 1)), [&](int64_t begin, int64_t end) {
      const int64_t padded = inputs + 16;  // no power of two: rows would compete for the same lines of the cache
      Buffer<Code> codes(kPer<Code> * padded), zeros(inputs);
      Buffer<uint32_t> words_of(together * padded);
      std::memset(zeros.data, 0, inputs * kSize);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item * together, count = least(together, words - first);
        for (int64_t i = 0; i < count; ++i) {
          const Code* rows[kPer<Code>];
          for (int j = 0; j < kPer<Code>; ++j) {
            const int64_t at = x_list[(first + i) * kPer<Code> + j];
            rows[j] = zeros.data;
            if (at == no_x()) continue;
            const int64_t n = sample_of(round.first + at / pixels);
            decode_x(c.x.data + (n * pixels + at % pixels) * row_bytes, 0, inputs, codes.data + j * padded);
            rows[j] = codes.data + j * padded;
          }
          interleave(rows, inputs, words_of.data + i * padded);
        }
        transpose_words(words_of.data, padded, count, inputs, reinterpret_cast<uint32_t*>(x.data) + first, pitch / kPer<Code>);
      }
    });
  }

  // G: panels of output channels, (panel, word, column).
  void pack_g(const Round& round) {
    if (!c.g.channel) return pack_g_by_position(round);
    parallel(slots / kInts, 1, [&](int64_t begin, int64_t end) {
      const int64_t length = g_codes + 64;  // what is read beyond is not used
      Buffer<Code> codes(kInts * length);
      for (int64_t item = begin; item < end; ++item) {
        int64_t number = 0;
        while (item * kInts >= panels[number].slot + panels[number].width) ++number;
        const Panel& panel = panels[number];
        const int64_t first = item * kInts - panel.slot;
        std::memset(codes.data, 0, kInts * length * kSize);
        for (int64_t i = 0; i < least(kInts, panel.used - first); ++i) {
          decode_channel(round, c.channels[panel.first + first + i], codes.data + i * length);
        }
        interleave_channels(codes.data, length, panel, g.data + panel.slot * g_words + first);
      }
    });
  }

  // A channel's codes in a row: a line or a sample begins a word, or words are made of one code a sample.
  void decode_channel(const Round& round, int64_t channel, Code* to) const {
    const int64_t packed = ceil_div(positions * c.g.storage, 8), whole = ceil_div(l.n * positions * c.g.storage, 8);
    if (c.g.by_channel && c.samples == nullptr && sample_terms == positions) {
      decode_g(c.g.data + channel * whole, round.first * positions, round.samples * positions, to);
      return;
    }
    for (int64_t s = 0; s < round.samples; ++s, to += sample_terms) {
      const int64_t n = sample_of(round.first + s), from = c.g.by_channel ? n * positions : 0;
      const uint8_t* row = c.g.data + (c.g.by_channel ? channel * whole : (channel * l.n + n) * packed);
      if (line == l.x.size || !c.blocks) {
        decode_g(row, from, positions, to);
      } else {
        for (int64_t y = 0; y < l.y.size; ++y) decode_g(row, from + y * l.x.size, l.x.size, to + y * line);
      }
    }
  }

  // The codes of kInts channels, one every `length` integers, written as the columns of a panel.
  void interleave_channels(const Code* codes, int64_t length, const Panel& panel, uint32_t* to) const {
    constexpr int64_t together = 16;
    const bool side_by_side = c.blocks || positions == 1;
    const int64_t step = side_by_side ? 1 : chunk / kPer<Code>, strips = side_by_side ? g_words : positions;
    for (int64_t group = 0; group < step; ++group) {
      for (int64_t strip = 0; strip < strips; strip += together) {
        uint32_t words[kInts * together];
        for (int64_t i = 0; i < kInts; ++i) {
          const Code* row = codes + i * length;
          if (side_by_side) {
            std::memcpy(words + i * together, row + strip * kPer<Code>, together * sizeof(uint32_t));
            continue;
          }
          const Code* rows[kPer<Code>];
          for (int j = 0; j < kPer<Code>; ++j) rows[j] = row + (group * kPer<Code> + j) * positions + strip;
          interleave(rows, together, words + i * together);
        }
        transpose_words(words, together, kInts, least(together, strips - strip), to + (strip * step + group) * panel.width,
                        step * panel.width);
      }
    }
  }

  void pack_g_by_position(const Round& round) {
    const int64_t row_bytes = ceil_div(outputs * c.g.storage, 8);
    parallel(g_words, most(1, 16384 / (outputs + 1)), [&](int64_t begin, int64_t end) {
      Buffer<Code> codes(kPer<Code> * outputs), zeros(outputs);
      Buffer<uint32_t> words_of(outputs);
      std::memset(zeros.data, 0, outputs * kSize);
      for (int64_t word = begin; word < end; ++word) {
        const Code* rows[kPer<Code>];
        for (int j = 0; j < kPer<Code>; ++j) {
          const int64_t at = g_list[word * kPer<Code> + j];
          rows[j] = zeros.data;
          if (at == no_g()) continue;
          decode_g(c.g.data + (sample_of(round.first + at / positions) * positions + at % positions) * row_bytes, 0, outputs,
                   codes.data + j * outputs);
          rows[j] = codes.data + j * outputs;
        }
        interleave(rows, outputs, words_of.data);
        for (const Panel& panel : panels) {
          uint32_t* to = g.data + panel.slot * g_words + word * panel.width;
          for (int64_t i = 0; i < panel.used; ++i) to[i] = words_of[c.channels[panel.first + i]];
          std::memset(to + panel.used, 0, (panel.width - panel.used) * 4);
        }
      }
    });
  }

  // The runs of every segment and tap, and the sums of codes over them.
  void find_runs(const Round& round) {
    if (round.fresh || c.blocks) {
      std::memset(column_sums.data, 0, segments * taps * slots * sizeof(Sum));
      std::memset(row_sums.data, 0, segments * taps * inputs * sizeof(Sum));
      std::memset(terms.data, 0, segments * taps * sizeof(int64_t));
    }
    const int64_t count = segments_of(round) * taps;
    runs = std::vector<std::vector<Run>>(count);
    parallel(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        c.blocks ? meet_lines(at % taps, at / taps, runs[at]) : meet_positions(at % taps, round, runs[at]);
        for (size_t i = 0; i < panels.size(); ++i) {
          add_column_sums(panels[i], at);
          const bool first_of_group = i == 0 || panels[i].group != panels[i - 1].group;
          if (first_of_group && (g_offset || column_by != 0)) add_row_sums(panels[i].group, at);
        }
        if (round.last || c.blocks) finish_sums(at);
      }
    });
  }

  // What a tap meets in one sample.
  void meet_lines(int64_t tap, int64_t sample, std::vector<Run>& met_runs) const {
    const int64_t ky = tap / l.x.taps, kx = tap % l.x.taps;
    for (int64_t y = 0; y < l.y.size; ++y) {
      const int32_t met = l.y.at[y * l.y.taps + ky];
      if (met < 0) continue;
      append(met_runs, 0, {((sample * l.other_y + met) * l.x.taps + kx) * line * kSize,
                           (sample * l.y.size + y) * line / kPer<Code>, line / kPer<Code>});
    }
  }

  // What a tap meets in a band of all samples.
  void meet_positions(int64_t tap, const Round& round, std::vector<Run>& met_runs) const {
    const int64_t ky = tap / l.x.taps, kx = tap % l.x.taps;
    for (int64_t p = round.begin; p < round.end; ++p) {
      const int32_t y = l.y.at[p / l.x.size * l.y.taps + ky], x_at = l.x.at[p % l.x.size * l.x.taps + kx];
      if (y < 0 || x_at < 0) continue;
      append(met_runs, 0, {(y * l.other_x + x_at) * chunk * kSize, p * chunk / kPer<Code>, chunk / kPer<Code>});
    }
  }

  Terms terms_of(int64_t at, const uint32_t* columns) const {
    return {runs[at].data(), runs[at].data() + runs[at].size(), columns, steps};
  }

  // Codes of columns, and terms: products with rows of ones.
  void add_column_sums(const Panel& panel, int64_t at) {
    Rows row;
    alignas(64) Sum sums[kTile][kColumns];
    row.of[0] = row.next = reinterpret_cast<const uint8_t*>(ones());
    Loop<Code, Sum>(1, panel.width)(terms_of(at, g.data + panel.slot * g_words), row, sums);
    for (int64_t i = 0; i < panel.width; ++i) column_sums[at * slots + panel.slot + i] += sums[0][i];
    if (panel.slot != 0) return;
    Loop<Code, Sum>(1, kInts)(terms_of(at, column_of_ones.data), row, sums);
    terms[at] += sums[0][0];
  }

  // Codes of rows: products with columns of ones.
  void add_row_sums(int64_t group, int64_t at) {
    alignas(64) Sum sums[kTile][kColumns];
    for (int64_t i = 0; i < l.in; i += kTile) {
      const int64_t height = least(kTile, l.in - i);
      Loop<Code, Sum>(height, kInts)(terms_of(at, column_of_ones.data), rows_at(group, i, height), sums);
      for (int64_t m = 0; m < height; ++m) row_sums[at * inputs + group * l.in + i + m] += sums[m][0];
    }
  }

  void finish_sums(int64_t at) {
    for (int64_t i = 0; i < slots; ++i) {
      const int64_t whole = column_sums[at * slots + i] + column_by * terms[at];
      base[at * slots + i] = static_cast<Sum>(-row_by * whole);
      column_floats[at * slots + i] = static_cast<float>(whole);
    }
    for (int64_t i = 0; i < inputs; ++i) {
      row_floats[at * inputs + i] = static_cast<float>(row_sums[at * inputs + i] - row_by * terms[at]);
    }
  }

  // Rows [first, first + height) of a group.
  Rows rows_at(int64_t group, int64_t first, int64_t height) const {
    const Code* const of_group = x.data + group * l.in * pitch;
    Rows row{{}, reinterpret_cast<const uint8_t*>(of_group + (first + height) * pitch)};
    for (int64_t m = 0; m < kTile; ++m) {
      row.of[m] = reinterpret_cast<const uint8_t*>(of_group + (first + least(m, height - 1)) * pitch);
    }
    return row;
  }

  void take_scales(const Round& round) {
    for (int64_t s = 0; s < segments_of(round); ++s) {
      const int64_t n = c.blocks ? sample_of(round.first + s) : 0;  // no sample may be kept
      for (const Panel& panel : panels) {
        for (int64_t i = 0; i < panel.width; ++i) {
          const int64_t channel = i < panel.used ? c.channels[panel.first + i] : -1;
          scale[s * slots + panel.slot + i] = channel < 0 ? 0 : c.g_scale(n, channel);
          offset[s * slots + panel.slot + i] = channel < 0 || !g_offset ? 0 : c.g_offset(n, channel);
        }
      }
    }
  }

  // An item is some rows of a tap by a panel; the result's cells are (tap, panel, row, column).
  void multiply_panels(const Round& round) {
    const int64_t tiles = ceil_div(l.in, kTile), all_panels = static_cast<int64_t>(panels.size());
    const int64_t parts = least(tiles, ceil_div(16, all_panels * taps));
    parallel(all_panels * taps * parts, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> own(ceil_div(tiles, parts) * kTile * kColumns);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t part = item % parts, tap = item / parts % taps;
        const Panel& panel = panels[item / parts / taps];
        const int64_t row_begin = tiles * part / parts * kTile, row_end = least(l.in, tiles * (part + 1) / parts * kTile);
        const int64_t cell = (tap * slots + panel.slot) * l.in + row_begin * panel.width;
        float* const grad = c.blocks && rounds > 1 ? grads.data + cell : own.data;
        if (c.blocks && round.fresh) std::memset(grad, 0, (row_end - row_begin) * panel.width * sizeof(float));
        for (int64_t i = row_begin; i < row_end; i += kTile) {
          const int64_t from_begin = (i - row_begin) * panel.width;
          multiply_tile(round, panel, tap, i, least(kTile, row_end - i), cell + from_begin, grad + from_begin);
        }
        if (round.last) write_turned(panel, tap, row_begin, row_end, grad);
      }
    });
  }

  // Rows [first, first + height) of a tap by a panel, in all segments. cell: its place in totals; grad: in the result.
  void multiply_tile(const Round& round, const Panel& panel, int64_t tap, int64_t first, int64_t height, int64_t cell,
                     float* grad) {
    const Rows row = rows_at(panel.group, first, height);
    const Loop<Code, Sum> loop(height, panel.width);
    for (int64_t s = 0; s < segments_of(round); ++s) {
      alignas(64) Sum sums[kTile][kColumns];
      loop(terms_of(s * taps + tap, g.data + panel.slot * g_words), row, sums);
      if (!c.blocks && rounds > 1) add_totals(round, height, panel.width, totals.data + cell, sums);
      if (c.blocks || round.last) finish_tile(panel, s, tap, first, height, sums, grad);
    }
  }

  // The sums of the rounds so far.
  void add_totals(const Round& round, int64_t height, int64_t width, Sum* total, Sum (*sums)[kColumns]) const {
    for (int64_t m = 0; m < height; ++m, total += width) {
      for (int64_t j = 0; !round.fresh && j < width; ++j) sums[m][j] += total[j];
      if (!round.last) std::memcpy(total, sums[m], width * sizeof(Sum));
    }
  }

  void finish_tile(const Panel& panel, int64_t s, int64_t tap, int64_t first, int64_t height, const Sum (*sums)[kColumns],
                   float* grad) const {
    const int64_t segment = s * taps + tap, at = segment * slots + panel.slot, slot = s * slots + panel.slot;
    Row<Sum> of_row[kTile];
    for (int64_t m = 0; m < height; ++m) {
      const int64_t row = segment * inputs + panel.group * l.in + first + m;
      of_row[m] = {static_cast<Sum>(column_by * row_sums.data[row]), row_floats.data[row], c.x_scale, c.x_offset,
                   grad + m * panel.width};
    }
    const Columns<Sum> column{base.data + at, column_floats.data + at, scale.data + slot,
                              g_offset ? offset.data + slot : nullptr, nullptr};
    const auto finish = c.blocks ? finish_of<false, true, Sum> : finish_of<false, false, Sum>;
    finish(panel.width)(sums, height, of_row, column, static_cast<float>(terms.data[segment]));
  }

  // Rows and columns are exchanged.
  void write_turned(const Panel& panel, int64_t tap, int64_t row_begin, int64_t row_end, const float* grad) const {
    constexpr int64_t together = 16;
    uint32_t turned[kColumns * together];
    for (int64_t i = row_begin; i < row_end; i += together) {
      const int64_t count = least(together, row_end - i);
      const float* from = grad + (i - row_begin) * panel.width;
      transpose_words(reinterpret_cast<const uint32_t*>(from), panel.width, count, panel.used, turned, together);
      for (int64_t j = 0; j < panel.used; ++j) {
        std::memcpy(c.grad + (c.channels[panel.first + j] * taps + tap) * l.in + i, turned + j * together, count * sizeof(float));
      }
    }
  }

  const IntegerGradWeight& c;
  const Layer& l;
  const int64_t taps, positions, pixels, inputs, outputs;  // positions of the gradient, pixels of X; channels of each
  const int row_by, column_by;                             // what is added to the codes of rows, taken from those of columns
  const bool g_offset;
  const std::vector<Panel> panels;
  const int64_t slots;                                     // columns of all panels
  const int64_t line, sample_terms;                        // codes of a gradient's line, filled up to words, and of a sample
  const int64_t chunk, x_codes, g_codes, g_words, pitch;   // chunk: its samples; pitch: codes of a row of x
  const int64_t band, bands, rounds, segments, steps;      // band: its positions
  const Decoder<Code> decode_x, decode_g;
  Buffer<Code> x;
  Buffer<uint32_t> g, column_of_ones;
  Buffer<int32_t> x_list, g_list;
  int64_t listed = -1;                                     // samples that the lists are of
  Buffer<Sum> totals;
  Buffer<float> grads;
  Buffer<Sum> column_sums, row_sums, base;                 // (segment, tap, slot or channel)
  Buffer<float> row_floats, column_floats;
  Buffer<float> scale, offset;                             // (segment, slot)
  Buffer<int64_t> terms;                                   // (segment, tap)
  std::vector<std::vector<Run>> runs;                      // of each segment and tap
};

template <class Code, class Sum>
void weigh(const IntegerGradWeight& call) {
  if (call.channel_count * call.layer.taps() * call.layer.in != 0) Weigh<Code, Sum>{call}();
}

}  // namespace

void integer_grad_weight(const IntegerGradWeight& c) {
  const bool wide = (c.blocks ? 1 : c.sample_count) * c.layer.positions() > most_terms(c.x, c.g);
#if defined(FQT_AVX512) || defined(FQT_AVX2)
  if (in_bytes(c.x, c.g)) return wide ? weigh<uint8_t, int64_t>(c) : weigh<uint8_t, int32_t>(c);
#endif
  wide ? weigh<int16_t, int64_t>(c) : weigh<int16_t, int32_t>(c);
}
