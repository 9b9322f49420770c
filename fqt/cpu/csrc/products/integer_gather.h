// `output` and `grad_input` of integers: each pixel of the result gathers what it meets of the first operand.

namespace {

template <class Code, class Sum>
class Gather {
 public:
  explicit Gather(const IntegerGather& call)
      : c(call), l(call.layer), taps(l.taps()), words(ceil_div(c.depth, kPer<Code>)), padded(words * kPer<Code>),
        pixels(l.other_positions()), image(l.positions()), channels(l.groups * c.columns),
        panels(ceil_div(c.columns, kColumns)), group_width(round_up(c.columns, kInts)), slots(l.groups * group_width),
        row_codes(l.groups * padded),
        kind_count(l.y.kinds * l.x.kinds), row_by(row_shift<Code>(c.a)), column_by(column_shift<Code>(c.b)),
        need_row_sums(column_by != 0 || c.b_offset.data != nullptr), twice(apart(c.a, c.b)), column_words(slots * taps * words),
        rows(c.kept_count * pixels * row_codes), pixel_sums(need_row_sums ? c.kept_count * pixels * l.groups : 0),
        columns((1 + twice) * column_words), tap_sums((1 + twice) * taps * slots), scale(slots), offset(slots), bias(slots),
        met(kind_count * taps), base(kind_count * slots), column_sums(kind_count * slots) {}

  void operator()() {
    pack_rows();
    pack_columns(twice ? Part::high : Part::whole, columns.data, tap_sums.data);
    if (twice) {
      pack_columns(Part::low, columns.data + column_words, tap_sums.data + taps * slots);
      for (int64_t i = 0; i < taps * slots; ++i) tap_sums[i] = 256 * tap_sums[i] + tap_sums[taps * slots + i];
    }
    take_scales();
    find_kinds();
    multiply_blocks();
  }

 private:
  static constexpr int64_t kSize = sizeof(Code);

  // For a kind of pixel the runs of the taps that it meets, as seen from the first of them.
  struct Kind {
    size_t begin, end;           // of its runs
    int64_t met_begin, met_end;  // the pixels that its taps meet: [begin, end) of `met`
    int64_t y_tap, x_tap;        // the first of them, -1 if it meets none
    int64_t terms;
  };

  struct Pixel {
    int64_t from, to;  // the first tap's pixel, the result's
    float scale, offset;
  };

  // Some samples, or a band of rows of one.
  struct Block {
    int64_t first_slot, last_slot, y_begin, y_end;  // slot: place of a sample among those kept
  };

  // A stretch of columns of one group. at: its first among `slots`.
  struct Panel {
    int64_t group, channel, used, width, at;
  };

  // The first operand, (sample, pixel, group, word), and the sums of its codes, (sample, pixel, group).
  void pack_rows() {
    const int64_t row_bytes = ceil_div(l.groups * c.depth * c.a.storage, 8);
    const Decoder<Code> decode(c.a, row_by);
    const bool dense = padded == c.depth && row_codes * c.a.storage % 8 == 0;
    parallel(c.kept_count * pixels, most(1, 65536 / (row_codes + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t slot = at / pixels, pixel = at % pixels, run = dense ? least(end - at, pixels - pixel) : 1;
        const uint8_t* from = c.a.data + ((c.kept ? c.kept[slot] : slot) * pixels + pixel) * row_bytes;
        Code* to = rows.data + at * row_codes;
        if (dense) {
          decode(from, 0, run * row_codes, to);
        } else {
          for (int64_t group = 0; group < l.groups; ++group) {
            decode(from, group * c.depth, c.depth, to + group * padded);
            std::memset(to + group * padded + c.depth, 0, (padded - c.depth) * sizeof(Code));
          }
        }
        for (int64_t i = 0; need_row_sums && i < run * l.groups; ++i) {
          pixel_sums[at * l.groups + i] = sum_codes(to + i * padded, padded, false);
        }
        at += run;
      }
    });
  }

  Panel panel_of(int64_t number) const {
    const int64_t group = number / panels, first = number % panels * kColumns, used = least(kColumns, c.columns - first);
    return {group, group * c.columns + first, used, round_up(used, kInts), group * group_width + first};
  }

  // The second operand, or a part of its codes, in panels, (group, panel, tap, word, column), and each column's sum of codes
  // for each tap.
  void pack_columns(Part which, uint32_t* to, int64_t* sums) const {
    const Decoder<Code> decode(c.b, -column_shift<Code>(c.b), which);
    parallel(l.groups * panels * (c.across ? taps : 1), 1, [&](int64_t begin, int64_t end) {
      Buffer<Code> codes(c.across ? kPer<Code> * kColumns : kColumns * taps * padded);
      for (int64_t item = begin; item < end; ++item) {
        const Panel panel = panel_of(c.across ? item / taps : item);
        uint32_t* of_panel = to + panel.at * taps * words;
        int64_t* sum = sums + panel.group * taps * group_width + panel.at % group_width;
        if (c.across) {
          pack_across(panel, item % taps, decode, codes.data, of_panel, sum);
        } else {
          pack_along(panel, decode, codes.data, of_panel, sum);
        }
      }
    });
  }

  // One tap of a panel whose columns are contiguous in memory.
  void pack_across(const Panel& panel, int64_t tap, const Decoder<Code>& decode, Code* codes, uint32_t* to,
                   int64_t* sum) const {
    const int64_t first = panel.channel - panel.group * c.columns, width = panel.width;
    const int64_t row_bytes = ceil_div(c.columns * c.b.storage, 8);
    to += tap * words * width;
    sum += tap * group_width;
    std::memset(sum, 0, width * sizeof(int64_t));
    const Code* of_word[kPer<Code>];
    for (int64_t word = 0; word < words; ++word, to += width) {
      for (int j = 0; j < kPer<Code>; ++j) {
        Code* row = codes + j * kColumns;
        of_word[j] = row;
        const int64_t k = word * kPer<Code> + j, used = k < c.depth ? panel.used : 0;
        if (used) decode(c.b.data + ((panel.group * c.depth + k) * taps + tap) * row_bytes, first, used, row);
        std::memset(row + used, 0, (width - used) * sizeof(Code));
        for (int64_t i = 0; i < used; ++i) {
          sum[i] += sizeof(Code) == 1 ? static_cast<int8_t>(row[i]) : static_cast<int16_t>(row[i]);
        }
      }
      interleave(of_word, width, to);
    }
  }

  // All taps of a panel whose summed codes are contiguous in memory: they are decoded, then transposed.
  void pack_along(const Panel& panel, const Decoder<Code>& decode, Code* codes, uint32_t* to, int64_t* sum) const {
    const int64_t all = taps * words, row_bytes = ceil_div(c.depth * c.b.storage, 8), width = panel.width;
    std::memset(codes, 0, width * all * 4);
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t k = 0; k < taps; ++k) {
        Code* row = codes + (i * taps + k) * padded;
        if (i < panel.used) decode(c.b.data + ((panel.channel + i) * taps + k) * row_bytes, 0, c.depth, row);
        sum[k * group_width + i] = sum_codes(row, padded, true);
      }
    }
    transpose_words(reinterpret_cast<const uint32_t*>(codes), all, width, all, to, width);
  }

  void take_scales() {
    for (int64_t i = 0; i < slots; ++i) {
      const int64_t k = i % group_width, channel = i / group_width * c.columns + k;
      const bool used = k < c.columns;
      scale[i] = used ? c.b_scale(channel, 0) : 0;
      offset[i] = used && c.b_offset.data ? c.b_offset(channel, 0) : 0;
      bias[i] = used && c.bias ? c.bias[channel] : 0;
    }
  }

  // The runs of each kind of pixel, and the columns' sums over them.
  void find_kinds() {
    Buffer<int64_t> total(slots);
    int64_t met_count = 0;
    for (int64_t kind = 0; kind < kind_count; ++kind) {
      const int32_t* y_at = l.y.at + l.y.example[kind / l.x.kinds] * l.y.taps;
      const int32_t* x_at = l.x.at + l.x.example[kind % l.x.kinds] * l.x.taps;
      Kind made{runs.size(), 0, met_count, 0, -1, -1, 0};
      std::memset(total.data, 0, slots * sizeof(int64_t));
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t y = tap / l.x.taps, x = tap % l.x.taps;
        if (y_at[y] < 0 || x_at[x] < 0) continue;
        if (made.y_tap < 0) made.y_tap = y, made.x_tap = x;
        const int64_t from_first = (y_at[y] - y_at[made.y_tap]) * l.other_x + x_at[x] - x_at[made.x_tap];
        met[met_count++] = from_first;
        append(runs, made.begin, {from_first * row_codes * kSize, tap * words, words});
        made.terms += c.depth;
        for (int64_t group = 0; group < l.groups; ++group) {
          const int64_t* of_tap = tap_sums.data + (group * taps + tap) * group_width;
          for (int64_t i = 0; i < group_width; ++i) total[group * group_width + i] += of_tap[i];
        }
      }
      made.end = runs.size(), made.met_end = met_count;
      kinds.push_back(made);
      for (int64_t i = 0; i < slots; ++i) {
        base[kind * slots + i] = static_cast<Sum>(-row_by * (total[i] + column_by * made.terms));
        column_sums[kind * slots + i] = static_cast<float>(total[i] + column_by * made.terms);
      }
    }
  }

  // Where there are few blocks, an item is some of the panels. Large blocks have many pixels of each kind, hence few tiles that
  // are not full.
  void multiply_blocks() {
    const int64_t all_panels = l.groups * panels;
    const int64_t block_pixels = most(16, (256 << 10) / (row_codes * kSize + 1));
    const int64_t together = most(1, least(block_pixels / image, ceil_div(c.kept_count, ceil_div(8, all_panels))));
    const int64_t band = together > 1 ? l.y.size : most(1, least(l.y.size, block_pixels / l.x.size));
    const int64_t bands = ceil_div(l.y.size, band), blocks = ceil_div(c.kept_count, together) * bands;
    const int64_t parts = blocks >= 16 ? 1 : least(all_panels, ceil_div(16, blocks));
    parallel(blocks * parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<Pixel> found(together * band * l.x.size);
      Buffer<int64_t> kind_begin(kinds.size() + 1);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t number = item / parts, part = item % parts;
        const int64_t first_slot = number / bands * together, y_begin = number % bands * band;
        find_pixels({first_slot, least(c.kept_count, first_slot + together), y_begin, least(l.y.size, y_begin + band)},
                    found.data(), kind_begin.data);
        for (int64_t i = all_panels * part / parts; i < all_panels * (part + 1) / parts; ++i) {
          const Panel panel = panel_of(i);
          for (size_t kind = 0; kind < kinds.size(); ++kind) {
            multiply_pixels(panel, kind, found.data() + kind_begin[kind], kind_begin[kind + 1] - kind_begin[kind]);
          }
        }
      }
    });
  }

  // The pixels of a block, kind after kind.
  void find_pixels(const Block& block, Pixel* found, int64_t* kind_begin) const {
    int64_t count = 0;
    for (size_t kind = 0; kind < kinds.size(); ++kind) {
      kind_begin[kind] = count;
      const Kind& k = kinds[kind];
      for (int64_t slot = block.first_slot; slot < block.last_slot; ++slot) {
        const int64_t n = c.kept ? c.kept[slot] : slot;
        for (int64_t y = block.y_begin; y < block.y_end; ++y) {
          if (l.y.kind[y] != static_cast<int64_t>(kind) / l.x.kinds) continue;
          for (int64_t x = 0; x < l.x.size; ++x) {
            if (l.x.kind[x] != static_cast<int64_t>(kind) % l.x.kinds) continue;
            int64_t from = 0;
            if (k.y_tap >= 0) from = l.y.at[y * l.y.taps + k.y_tap] * l.other_x + l.x.at[x * l.x.taps + k.x_tap];
            const int64_t p = y * l.x.size + x;
            found[count++] = {slot * pixels + from, n * image + p, c.a_scale(n, p), c.a_offset.data ? c.a_offset(n, p) : 0};
          }
        }
      }
    }
    kind_begin[kinds.size()] = count;
  }

  const uint8_t* row_of(int64_t pixel, const Panel& panel) const {
    return reinterpret_cast<const uint8_t*>(rows.data + pixel * row_codes + panel.group * padded);
  }

  // Pixels of one kind by a panel.
  void multiply_pixels(const Panel& panel, size_t kind, const Pixel* found, int64_t count) {
    const Kind& k = kinds[kind];
    const int64_t at = kind * slots + panel.at, steps = steps_of<Code>(c.a, c.b);
    const Columns<Sum> column{base.data + at, column_sums.data + at, scale.data + panel.at,
                              c.b_offset.data ? offset.data + panel.at : nullptr, c.bias ? bias.data + panel.at : nullptr};
    const Terms terms{runs.data() + k.begin, runs.data() + k.end, columns.data + panel.at * taps * words, steps};
    const Terms low_terms{terms.first, terms.last, terms.columns + column_words, steps};
    for (int64_t i = 0; i < count; i += kTile) {
      const int64_t height = least(kTile, count - i);
      Rows row{{}, row_of(found[least(i + kTile, count - 1)].from, panel)};
      for (int64_t m = 0; m < kTile; ++m) row.of[m] = row_of(found[i + least(m, height - 1)].from, panel);
      const Loop<Code, Sum> loop(height, panel.width);
      alignas(64) Sum sums[kTile][kColumns];
      loop(terms, row, sums);
      if (twice) {
        alignas(64) Sum low[kTile][kColumns];
        loop(low_terms, row, low);
        for (int64_t m = 0; m < height; ++m) {
          for (int64_t j = 0; j < panel.width; ++j) sums[m][j] = 256 * sums[m][j] + low[m][j];
        }
      }
      finish_tile(panel, k, found + i, height, sums, column);
    }
  }

  // The float part of a tile, and the mask.
  void finish_tile(const Panel& panel, const Kind& k, const Pixel* found, int64_t height, const Sum (*sums)[kColumns],
                   const Columns<Sum>& column) {
    const bool direct = panel.used == panel.width && c.mask == nullptr;
    alignas(64) float t[kTile][kWidth];
    Row<Sum> of_row[kTile];
    for (int64_t m = 0; m < height; ++m) {
      const Pixel& pixel = found[m];
      int64_t sum = 0;
      for (int64_t tap = k.met_begin; need_row_sums && tap < k.met_end; ++tap) {
        sum += pixel_sums[(pixel.from + met[tap]) * l.groups + panel.group];
      }
      of_row[m] = {static_cast<Sum>(column_by * sum), static_cast<float>(sum - row_by * k.terms), pixel.scale,
                   c.a_offset.data ? &pixel.offset : nullptr, direct ? c.result + pixel.to * channels + panel.channel : t[m]};
    }
    finish_of<true, false, Sum>(panel.width)(sums, height, of_row, column, static_cast<float>(k.terms));
    for (int64_t m = 0; !direct && m < height; ++m) {
      const int64_t to = found[m].to;
      if (c.mask) {
        uint8_t bits[kWidth / 8];
        copy_bits(c.mask + to * ceil_div(channels, 8), panel.channel, panel.used, bits, kWidth / 8);
        keep_where_set(bits, t[m]);
      }
      std::memcpy(c.result + to * channels + panel.channel, t[m], panel.used * sizeof(float));
    }
  }

  const IntegerGather& c;
  const Layer& l;
  const int64_t taps, words, padded;            // words: of a group's codes; padded: codes of these
  const int64_t pixels, image;                  // of a sample of the first operand, and of the result
  const int64_t channels, panels;               // of the result; of a group
  const int64_t group_width, slots, row_codes;  // columns of a group, and of all, filled up to vectors; codes of a pixel
  const int64_t kind_count;
  const int row_by, column_by;                  // what is added to the codes of rows, taken from those of columns
  const bool need_row_sums, twice;              // twice: each column is split into its high and low bytes and multiplied twice
  const int64_t column_words;                   // of all panels
  Buffer<Code> rows;
  Buffer<int64_t> pixel_sums;
  Buffer<uint32_t> columns;
  Buffer<int64_t> tap_sums;                     // (group, tap, column)
  Buffer<float> scale, offset, bias;            // by slot
  Buffer<int64_t> met;                          // pixels from the first tap's
  Buffer<Sum> base;                             // (kind, slot)
  Buffer<float> column_sums;                    // (kind, slot)
  std::vector<Kind> kinds;
  std::vector<Run> runs;
};

template <class Code, class Sum>
void gather(const IntegerGather& call) {
  if (call.kept_count * call.layer.positions() * call.layer.groups * call.columns != 0) Gather<Code, Sum>{call}();
}

}  // namespace

void integer_gather(const IntegerGather& c) {
  if (has_few_rows(c)) return FewRows{c}();
  const bool wide = c.layer.taps() * c.depth > most_terms(c.a, c.b) || apart(c.a, c.b);
#if defined(FQT_AVX512) || defined(FQT_AVX2)
  if (in_bytes(c.a, c.b)) return wide ? gather<uint8_t, int64_t>(c) : gather<uint8_t, int32_t>(c);
#endif
  wide ? gather<int16_t, int64_t>(c) : gather<int16_t, int32_t>(c);
}
