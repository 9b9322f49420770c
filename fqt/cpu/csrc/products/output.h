// `output` of signs and signs: a dot product of K codes +-1 is K - 2 * (bits that differ).
//
// The bits of a window are copied side by side for a strip of pixels (an im2col of bits); kLanes output channels lie side by
// side, so that sums need no reduction across lanes. A tap outside the image reads bits 0; what its
// weights then add to the count is known for each kind of pixel, and taken out again: padding is the value 0.

namespace {

inline void copy_window(const SignOutput& c, const uint8_t* image, int64_t group, int64_t bytes, int64_t oy, int64_t ox,
                        uint8_t* out) {
  const Layer& l = c.layer;
  const int32_t left = l.x.at[ox * l.x.taps], right = l.x.at[(ox + 1) * l.x.taps - 1];
  const bool row = l.groups == 1 && left >= 0 && right - left == l.x.taps - 1;  // the taps of a line lie side by side
  for (int64_t ky = 0; ky < l.y.taps; ++ky) {
    const int32_t y = l.y.at[oy * l.y.taps + ky];
    if (row && y >= 0) {
      lay_window(image + (y * l.other_x + left) * bytes, bytes * l.x.taps, out);
      out += bytes * l.x.taps * kSpread;
      continue;
    }
    for (int64_t kx = 0; kx < l.x.taps; ++kx, out += bytes * kSpread) {
      const int32_t x = l.x.at[ox * l.x.taps + kx];
      if (y < 0 || x < 0) {
        std::memset(out, 0, bytes * kSpread);
        continue;
      }
      lay_window(image + ((y * l.other_x + x) * l.groups + group) * bytes, bytes, out);
    }
  }
}

struct Pixel {
  const int32_t* terms;  // of each output channel
  float scale;
};

// M pixels x kLanes output channels: count, then the epilogue in the reference's order.
template <int M>
void output_tile(const SignOutput& c, const uint8_t* a, int64_t words, const uint8_t* w, const Pixel* pixels,
                 const float* w_scale, int64_t first, int64_t channel, int64_t lanes, int64_t stride) {
  int32_t differ[M][kLanes];
  differing_bits<M>(a, words * 4 * kSpread, w, words, lanes, differ);
  for (int m = 0; m < M; ++m) {
    const int32_t* terms = pixels[m].terms + channel;
    if (c.sums != nullptr) {
      int16_t* to = c.sums + (first + m) * stride + channel;
      for (int64_t i = 0; i < lanes; ++i) to[i] = static_cast<int16_t>(terms[i] - 2 * differ[m][i]);
      continue;
    }
    const float scale = pixels[m].scale;
    const float* bias = c.bias;
    float* to = c.y + (first + m) * stride + channel;
    float t[kLanes];
    for (int64_t i = 0; i < lanes; ++i) {
      t[i] = static_cast<float>(terms[i] - 2 * differ[m][i]) * scale * w_scale[channel + i];
    }
    if (bias == nullptr) {
      for (int64_t i = 0; i < lanes; ++i) to[i] = t[i];
    } else {
      for (int64_t i = 0; i < lanes; ++i) to[i] = t[i] + bias[channel + i];
    }
  }
}

}  // namespace

void sign_output(const SignOutput& c) {
  const Layer& l = c.layer;
  if (l.n * l.positions() * l.out == 0) return;
  const int64_t bytes = ceil_div(l.in, 8), taps = l.taps(), words = ceil_div(taps * bytes, 4);
  const int64_t panels = ceil_div(l.out, kLanes), channels = l.groups * l.out, image = l.other_positions() * l.groups * bytes;

  const bool aligned = l.groups == 1;
  Buffer<uint8_t> cut(aligned ? 0 : l.n * image);
  if (!aligned) align_groups(c.x, l.n * l.other_positions(), l.groups, l.in, bytes, cut.data);
  const uint8_t* x = aligned ? c.x : cut.data;

  // weights: (group, panel, word, lane) as `lay_weights` has them; and for each kind of pixel the terms inside the image,
  // corrected for those outside
  const int64_t word_bytes = 4 * kSpread, column_bytes = word_bytes * kLanes;
  Buffer<uint8_t> w(l.groups * panels * words * column_bytes);
  const int64_t kinds = l.y.kinds * l.x.kinds;
  Buffer<int32_t> terms(kinds * channels);
  Buffer<float> w_scale(channels);
  for (int64_t i = 0; i < channels && c.sums == nullptr; ++i) w_scale[i] = c.w_scale(i, 0);
  parallel(l.groups * panels, 1, [&](int64_t begin, int64_t end) {
    Buffer<int64_t> ones(taps);  // of an output channel's weights
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / panels, first = item % panels * kLanes;
      const int64_t first_channel = group * l.out + first, lanes = least(kLanes, l.out - first);
      const uint8_t* rows = c.w + first_channel * taps * bytes;
      uint32_t column[kLanes] = {};
      for (int64_t k = 0; k < words; ++k) {
        const int64_t used = taps * bytes - 4 * k;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const uint8_t* from = rows + lane * taps * bytes + 4 * k;
          if (used >= 4) {
            std::memcpy(column + lane, from, 4);
          } else {
            column[lane] = 0;
            std::memcpy(column + lane, from, used);
          }
        }
        lay_weights(column, w.data + (item * words + k) * column_bytes);
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t channel = first_channel + lane;
        for (int64_t tap = 0; tap < taps; ++tap) ones[tap] = count_bits(rows + (lane * taps + tap) * bytes, bytes);
        for (int64_t kind = 0; kind < kinds; ++kind) {
          const int64_t y = l.y.example[kind / l.x.kinds], x = l.x.example[kind % l.x.kinds];
          int64_t count = 0;
          for (int64_t tap = 0; tap < taps; ++tap) {
            const bool inside = l.y.at[y * l.y.taps + tap / l.x.taps] >= 0 && l.x.at[x * l.x.taps + tap % l.x.taps] >= 0;
            count += inside ? l.in : 2 * ones[tap];
          }
          terms[kind * channels + channel] = static_cast<int32_t>(count);
        }
      }
    }
  });

  // strips of pixels, and of panels where there are few strips
  const int64_t pixels = l.n * l.positions();
  const int64_t strip = most(kRows, least(64, 16384 / (word_bytes * words + 1) / kRows * kRows));
  const int64_t strips = ceil_div(pixels, strip);
  const int64_t parts = strips >= 32 ? 1 : least(panels, 8), part = ceil_div(panels, parts);
  parallel(strips * l.groups * parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<uint8_t> windows(strip * words * word_bytes);
    Buffer<Pixel> met(strip);
    int64_t filled = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / parts % l.groups, first = item / parts / l.groups * strip;
      const int64_t count = least(strip, pixels - first);
      if (filled != item / parts) {
        filled = item / parts;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t n = (first + i) / l.positions(), p = (first + i) % l.positions();
          const int64_t y = p / l.x.size, x_at = p % l.x.size;
          uint8_t* window = windows.data + i * words * word_bytes;
          if (words) std::memset(window + (words - 1) * word_bytes, 0, word_bytes);
          copy_window(c, x + n * image, group, bytes, y, x_at, window);
          const int64_t kind = l.y.kind[y] * l.x.kinds + l.x.kind[x_at];
          met[i] = {terms.data + kind * channels, c.sums == nullptr ? c.x_scale(n, p) : 0};
        }
      }
      for (int64_t panel = item % parts * part; panel < least(panels, (item % parts + 1) * part); ++panel) {
        const uint8_t* columns = w.data + (group * panels + panel) * words * column_bytes;
        const int64_t channel = group * l.out + panel * kLanes, lanes = least(kLanes, l.out - panel * kLanes);
        for (int64_t i = 0; i < count;) {
          const bool full = count - i >= kRows;
          const auto tile = full ? output_tile<kRows> : output_tile<1>;
          const uint8_t* window = windows.data + i * words * word_bytes;
          tile(c, window, words, columns, met.data + i, w_scale.data, first + i, channel, lanes, channels);
          i += full ? kRows : 1;
        }
      }
    }
  });
}
