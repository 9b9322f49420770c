// `output` of signs and signs: a dot product of K codes +-1 is K - 2 * (bits that differ).
//
// The bits of a window are copied side by side for a strip of pixels (an im2col of bits); kLanes output channels lie side by
// side, so that sums need no reduction across lanes. A tap outside the image reads bits 0; what its weights then add to the
// count is known for each kind of pixel, and taken out again: padding is the value 0.
//
// Laying the weights out side by side takes as long as computing several pixels. A call of few pixels does without: it compares
// each window with the packed weights of each channel.

namespace {

class SignOutputRun {
 public:
  explicit SignOutputRun(const SignOutput& call)
      : c(call), l(call.layer), bytes(ceil_div(l.in, 8)), taps(l.taps()), words(ceil_div(taps * bytes, 4)),
        panels(ceil_div(l.out, kLanes)), channels(l.groups * l.out), image(l.other_positions() * l.groups * bytes),
        kinds(l.y.kinds * l.x.kinds), few(l.n * l.positions() <= kFewPixels),
        padded(std::any_of(l.y.at, l.y.at + l.y.size * l.y.taps, outside) ||
               std::any_of(l.x.at, l.x.at + l.x.size * l.x.taps, outside)),
        cut(l.groups == 1 ? 0 : l.n * image),
        columns(few ? 0 : l.groups * panels * words * kColumnBytes), terms(kinds * channels), w_scale(channels) {}

  void operator()() {
    x = c.x;
    if (l.groups > 1) {
      align_groups(c.x, l.n * l.other_positions(), l.groups, l.in, bytes, cut.data);
      x = cut.data;
    }
    for (int64_t i = 0; i < channels && c.sums == nullptr; ++i) w_scale[i] = c.w_scale(i, 0);
    if (few) return compare_pixels();
    pack_weights();
    sum_strips();
  }

 private:
  static constexpr int64_t kWordBytes = 4 * kSpread, kColumnBytes = kWordBytes * kLanes;
  static constexpr int64_t kFewPixels = 3;
  static bool outside(int32_t at) { return at < 0; }

  // What the epilogue needs of a pixel.
  struct Pixel {
    const int32_t* terms;  // of each output channel
    float scale;
  };
  // Some output channels, as they lie in `columns` and in the result.
  struct Panel {
    const uint8_t* columns;
    int64_t channel, lanes;
  };

  // Each pixel with each output channel, bit by bit.
  void compare_pixels() {
    const int64_t pixels = l.n * l.positions(), row = taps * bytes, window = 4 * words;
    parallel(l.groups * panels, most(1, 65536 / (row * pixels * kLanes + 1)), [&](int64_t begin, int64_t end) {
      Buffer<int32_t> ones(taps * kLanes);
      Buffer<uint8_t> windows(pixels * window);
      int64_t filled = -1;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / panels, first = item % panels * kLanes;
        const Panel panel{nullptr, group * l.out + first, least(kLanes, l.out - first)};
        for (int64_t i = 0; i < pixels && filled != group; ++i) copy_window<1>(group, i, windows.data + i * window);
        filled = group;
        count_terms(panel.channel, panel.lanes, ones.data);
        for (int64_t i = 0; i < pixels; ++i) {
          int32_t differ[kLanes];
          for (int64_t lane = 0; lane < panel.lanes; ++lane) {
            const uint8_t* weights = c.w + (panel.channel + lane) * row;
            differ[lane] = static_cast<int32_t>(count_differing(windows.data + i * window, weights, row));
          }
          finish(of_pixel(i), panel, i, differ);
        }
      }
    });
  }

  void pack_weights() {
    parallel(l.groups * panels, 1, [&](int64_t begin, int64_t end) {
      Buffer<int32_t> ones(taps * kLanes);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / panels, first = item % panels * kLanes;
        const int64_t channel = group * l.out + first, lanes = least(kLanes, l.out - first);
        pack_panel(c.w + channel * taps * bytes, lanes, columns.data + item * words * kColumnBytes);
        count_terms(channel, lanes, ones.data);
      }
    });
  }

  // Writes the weights of some output channels, (word, lane), as `lay_weights` has them. Where a channel's codes are whole words,
  // squares of kSide channels by kSide words are transposed; the rest goes word by word.
  void pack_panel(const uint8_t* rows, int64_t lanes, uint8_t* to) {
    constexpr int64_t kSide = kWidth / 4;
    uint32_t square[kSide][kLanes] = {};
    const int64_t row = taps * bytes, turned = row % 4 == 0 ? lanes / kSide * kSide : 0;
    for (int64_t k = 0; k < words; k += kSide) {
      const int64_t count = least(kSide, words - k), first = count == kSide ? turned : 0;
      for (int64_t lane = 0; lane < first; lane += kSide) {
        transpose(reinterpret_cast<const uint32_t*>(rows + lane * row + 4 * k), row / 4, &square[0][lane], kLanes);
      }
      for (int64_t lane = first; lane < lanes; ++lane) {
        for (int64_t i = 0; i < count; ++i) {
          square[i][lane] = 0;
          std::memcpy(&square[i][lane], rows + lane * row + 4 * (k + i), least(4, row - 4 * (k + i)));
        }
      }
      for (int64_t i = 0; i < count; ++i) lay_weights(square[i], to + (k + i) * kColumnBytes);
    }
  }

  // Finds `terms` of some output channels: for each kind of pixel the number of terms inside the image, and for each tap
  // outside twice the ones among its weights, which takes back what zeros there add. ones: working memory, (tap, kLanes).
  void count_terms(int64_t channel, int64_t lanes, int32_t* ones) {
    for (int64_t lane = 0; lane < lanes && padded; ++lane) {
      const uint8_t* row = c.w + (channel + lane) * taps * bytes;
      for (int64_t tap = 0; tap < taps; ++tap) {
        ones[tap * kLanes + lane] = static_cast<int32_t>(count_bits(row + tap * bytes, bytes));
      }
    }
    for (int64_t kind = 0; kind < kinds; ++kind) {
      const int64_t y = l.y.example[kind / l.x.kinds], x_at = l.x.example[kind % l.x.kinds];
      int32_t *of_kind = terms.data + kind * channels + channel, inside = 0;
      std::memset(of_kind, 0, lanes * sizeof(int32_t));
      for (int64_t tap = 0; tap < taps; ++tap) {
        if (l.y.at[y * l.y.taps + tap / l.x.taps] >= 0 && l.x.at[x_at * l.x.taps + tap % l.x.taps] >= 0) {
          inside += static_cast<int32_t>(l.in);
        } else {
          for (int64_t lane = 0; lane < lanes; ++lane) of_kind[lane] += 2 * ones[tap * kLanes + lane];
        }
      }
      for (int64_t lane = 0; lane < lanes; ++lane) of_kind[lane] += inside;
    }
  }

  // Strips of pixels, and of panels where there are few strips.
  void sum_strips() {
    const int64_t pixels = l.n * l.positions();
    const int64_t strip = most(kRows, least(kMostRows, kStripBytes / (kWordBytes * words + 1) / kRows * kRows));
    const int64_t strips = ceil_div(pixels, strip);
    const int64_t parts = strips >= 32 ? 1 : least(panels, 8), part = ceil_div(panels, parts);
    parallel(strips * l.groups * parts, 1, [&](int64_t begin, int64_t end) {
      Buffer<uint8_t> windows(strip * words * kWordBytes);
      Buffer<Pixel> met(strip);
      Buffer<int32_t[kLanes]> differ(strip);
      int64_t filled = -1;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / parts % l.groups, first = item / parts / l.groups * strip;
        const int64_t count = least(strip, pixels - first);
        if (filled != item / parts) {
          filled = item / parts;
          for (int64_t i = 0; i < count; ++i) {
            copy_window<kSpread>(group, first + i, windows.data + i * words * kWordBytes);
            met[i] = of_pixel(first + i);
          }
        }
        for (int64_t number = item % parts * part; number < least(panels, (item % parts + 1) * part); ++number) {
          const Panel panel{columns.data + (group * panels + number) * words * kColumnBytes, group * l.out + number * kLanes,
                            least(kLanes, l.out - number * kLanes)};
          differing_bits(windows.data, words * kWordBytes, count, panel.columns, words, panel.lanes, differ.data);
          for (int64_t i = 0; i < count; ++i) finish(met[i], panel, first + i, differ[i]);
        }
      }
    });
  }

  Pixel of_pixel(int64_t pixel) const {
    const int64_t n = pixel / l.positions(), p = pixel % l.positions();
    const int64_t kind = l.y.kind[p / l.x.size] * l.x.kinds + l.x.kind[p % l.x.size];
    return {terms.data + kind * channels, c.sums == nullptr ? c.x_scale(n, p) : 0};
  }

  // What a pixel of the output meets of a group: as it is, or as `lay_window` spreads it.
  template <int kSpreadBy>
  void copy_window(int64_t group, int64_t pixel, uint8_t* out) const {
    const auto lay = [](const uint8_t* bits, int64_t count, uint8_t* to) {
      kSpreadBy == 1 ? static_cast<void>(std::memcpy(to, bits, count)) : lay_window(bits, count, to);
    };
    const int64_t n = pixel / l.positions(), p = pixel % l.positions(), oy = p / l.x.size, ox = p % l.x.size;
    if (words) std::memset(out + (words - 1) * 4 * kSpreadBy, 0, 4 * kSpreadBy);
    const uint8_t* of_image = x + n * image;
    const int32_t left = l.x.at[ox * l.x.taps], right = l.x.at[(ox + 1) * l.x.taps - 1];
    const bool row = l.groups == 1 && left >= 0 && right - left == l.x.taps - 1;  // the taps of a line are contiguous
    for (int64_t ky = 0; ky < l.y.taps; ++ky) {
      const int32_t y = l.y.at[oy * l.y.taps + ky];
      if (row && y >= 0) {
        lay(of_image + (y * l.other_x + left) * bytes, bytes * l.x.taps, out);
        out += bytes * l.x.taps * kSpreadBy;
        continue;
      }
      for (int64_t kx = 0; kx < l.x.taps; ++kx, out += bytes * kSpreadBy) {
        const int32_t x_at = l.x.at[ox * l.x.taps + kx];
        if (y < 0 || x_at < 0) {
          std::memset(out, 0, bytes * kSpreadBy);
          continue;
        }
        lay(of_image + ((y * l.other_x + x_at) * l.groups + group) * bytes, bytes, out);
      }
    }
  }

  // The epilogue for a pixel and some output channels. differ: bits in which they do.
  void finish(const Pixel& pixel, const Panel& panel, int64_t number, const int32_t* differ) const {
    const int64_t channel = panel.channel, lanes = panel.lanes;
    const int32_t* of_pixel = pixel.terms + channel;
    if (c.sums != nullptr) {
      int16_t* to = c.sums + number * channels + channel;
      for (int64_t i = 0; i < lanes; ++i) to[i] = static_cast<int16_t>(of_pixel[i] - 2 * differ[i]);
      return;
    }
    const float scale = pixel.scale;
    const float *bias = c.bias, *of_channel = w_scale.data + channel;
    float* to = c.y + number * channels + channel;
    float t[kLanes];
    for (int64_t i = 0; i < lanes; ++i) t[i] = static_cast<float>(of_pixel[i] - 2 * differ[i]) * scale * of_channel[i];
    if (bias == nullptr) {
      for (int64_t i = 0; i < lanes; ++i) to[i] = t[i];
    } else {
      for (int64_t i = 0; i < lanes; ++i) to[i] = t[i] + bias[channel + i];
    }
  }

  const SignOutput& c;
  const Layer& l;
  const int64_t bytes, taps, words, panels, channels, image, kinds;  // bytes: of a tap's codes; image: bytes of a sample
  const bool few, padded;  // padded: whether any tap is outside the image
  Buffer<uint8_t> cut, columns;  // x with every group beginning a byte; the weights, (group, panel, word, lane)
  Buffer<int32_t> terms;         // (kind of pixel, output channel)
  Buffer<float> w_scale;
  const uint8_t* x = nullptr;
};

}  // namespace

void sign_output(const SignOutput& call) {
  if (call.layer.n * call.layer.positions() * call.layer.out == 0) return;
  SignOutputRun{call}();
}
