// `output` of signs and signs: a dot product of K codes +-1 is K - 2 * (bits that differ).
//
// The bits of a window are copied side by side for a strip of pixels (an im2col of bits); 16 output channels lie side by side
// in the lanes of 32-bit words, so that sums need no reduction across lanes. A tap outside the image reads bits 0; what its
// weights then add to the count is known for each kind of pixel, and taken out again: padding is the value 0.

namespace {

inline void copy_window(const SignOutput& c, const uint8_t* image, int64_t group, int64_t bytes, int64_t oy, int64_t ox,
                        uint8_t* out) {
  const Layer& l = c.layer;
  for (int64_t ky = 0; ky < l.y.taps; ++ky) {
    const int32_t y = l.y.at[oy * l.y.taps + ky];
    for (int64_t kx = 0; kx < l.x.taps; ++kx, out += bytes) {
      const int32_t x = l.x.at[ox * l.x.taps + kx];
      if (y < 0 || x < 0) {
        std::memset(out, 0, bytes);
        continue;
      }
      const uint8_t* from = image + ((y * l.other_x + x) * l.groups + group) * bytes;
      int64_t i = 0;
      for (; i + 8 <= bytes; i += 8) std::memcpy(out + i, from + i, 8);
      for (; i < bytes; ++i) out[i] = from[i];
    }
  }
}

struct Pixel {
  const int32_t* terms;  // of each output channel
  float scale;
};

// M pixels x 16 output channels: count, then the epilogue in the reference's order.
template <int M>
void output_tile(const SignOutput& c, const uint32_t* a, int64_t words, const uint32_t* w, const Pixel* pixels,
                 const float* w_scale, int64_t first, int64_t channel, int64_t lanes, int64_t stride) {
  int32_t differ[M][kLanes];
  differing_bits<M>(a, words, w, words, differ);
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

  // weights: (group, panel, word, lane); and for each kind of pixel the terms inside the image, corrected for those outside
  Buffer<uint32_t> w(l.groups * panels * words * kLanes);
  const int64_t kinds = l.y.kinds * l.x.kinds;
  Buffer<int32_t> terms(kinds * channels);
  Buffer<float> w_scale(channels);
  for (int64_t i = 0; i < channels && c.sums == nullptr; ++i) w_scale[i] = c.w_scale(i, 0);
  parallel(l.groups * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / panels, first = item % panels * kLanes;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t channel = group * l.out + first + lane;
        const bool used = first + lane < l.out;
        const uint8_t* row = c.w + channel * taps * bytes;
        for (int64_t k = 0; k < words; ++k) {
          uint32_t word = 0;
          if (used) std::memcpy(&word, row + 4 * k, least(4, taps * bytes - 4 * k));
          w[(item * words + k) * kLanes + lane] = word;
        }
        for (int64_t kind = 0; used && kind < kinds; ++kind) {
          const int64_t y = l.y.example[kind / l.x.kinds], x = l.x.example[kind % l.x.kinds];
          int64_t count = 0;
          for (int64_t tap = 0; tap < taps; ++tap) {
            if (l.y.at[y * l.y.taps + tap / l.x.taps] >= 0 && l.x.at[x * l.x.taps + tap % l.x.taps] >= 0) {
              count += l.in;
            } else {
              for (int64_t i = 0; i < bytes; ++i) count += 2 * __builtin_popcount(row[tap * bytes + i]);
            }
          }
          terms[kind * channels + channel] = static_cast<int32_t>(count);
        }
      }
    }
  });

  // strips of pixels, and of panels where there are few strips
  const int64_t pixels = l.n * l.positions();
  const int64_t strip = most(kRows, least(64, 16384 / (4 * words + 1) / kRows * kRows));
  const int64_t strips = ceil_div(pixels, strip);
  const int64_t parts = strips >= 32 ? 1 : least(panels, 8), part = ceil_div(panels, parts);
  parallel(strips * l.groups * parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<uint32_t> windows(strip * words);
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
          if (words) windows[i * words + words - 1] = 0;
          copy_window(c, x + n * image, group, bytes, y, x_at, reinterpret_cast<uint8_t*>(windows.data + i * words));
          met[i] = {terms.data + (l.y.kind[y] * l.x.kinds + l.x.kind[x_at]) * channels, c.sums == nullptr ? c.x_scale(n, p) : 0};
        }
      }
      for (int64_t panel = item % parts * part; panel < least(panels, (item % parts + 1) * part); ++panel) {
        const uint32_t* columns = w.data + (group * panels + panel) * words * kLanes;
        const int64_t channel = group * l.out + panel * kLanes, lanes = least(kLanes, l.out - panel * kLanes);
        for (int64_t i = 0; i < count;) {
          const bool full = count - i >= kRows;
          const auto tile = full ? output_tile<kRows> : output_tile<1>;
          tile(c, windows.data + i * words, words, columns, met.data + i, w_scale.data, first + i, channel, lanes, channels);
          i += full ? kRows : 1;
        }
      }
    }
  });
}
