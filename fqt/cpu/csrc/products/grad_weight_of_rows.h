// `grad_weight` of a linear layer whose samples have one position and a scale each: nothing is left to add in integers. What a
// sample adds is a value of its gradient, made once, with the signs of x.

namespace {

class GradWeightOfRows {
 public:
  explicit GradWeightOfRows(const GradWeight& call)
      : c(call), l(call.layer), tiles(ceil_div(c.channel_count, kTile)), panels(ceil_div(l.in, kColumns)),
        x_bytes(panels * kColumns / 8), x(c.sample_count * x_bytes), values(tiles * c.sample_count * kTile) {}

  void operator()() {
    parallel(c.sample_count, most(1, 32768 / (c.channel_count + x_bytes)), [&](int64_t begin, int64_t end) {
      Buffer<uint8_t> codes(l.out);
      for (int64_t i = begin; i < end; ++i) pack_sample(i, codes);
    });
    parallel(tiles * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) add_samples(item / panels, item % panels * kColumns);
    });
  }

 private:
  static constexpr int kTile = 8, kColumns = 2 * kWidth / 4;

  // codes: room for those of a sample.
  void pack_sample(int64_t i, Buffer<uint8_t>& codes) {
    const int64_t n = c.samples[i], packed = ceil_div(l.out * c.g.storage(), 8);
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

  void add_samples(int64_t tile, int64_t column) const {
    typedef float Floats __attribute__((vector_size(kWidth)));
    const uint32_t* value = values.data + tile * c.sample_count * kTile;
    const uint8_t* bits = x.data + column / 8;
    const int64_t samples = c.sample_count, step = x_bytes;
    Floats sums[kTile][2] = {};
    for (int64_t i = 0; i < samples; ++i, value += kTile, bits += step) {
      const Ints minus[2] = {sign_where_unset(bits, 0), sign_where_unset(bits, kColumns / 2)};
      for (int m = 0; m < kTile; ++m) {
        const Ints all = Ints{} + value[m];
        sums[m][0] += (Floats)(all ^ minus[0]);
        sums[m][1] += (Floats)(all ^ minus[1]);
      }
    }
    for (int64_t m = 0; m < least(kTile, c.channel_count - tile * kTile); ++m) {
      float* const to = c.grad + c.channels[tile * kTile + m] * l.in + column;
      std::memcpy(to, sums[m], least(kColumns, l.in - column) * sizeof(float));
    }
  }

  const GradWeight& c;
  const Layer& l;
  const int64_t tiles, panels, x_bytes;
  Buffer<uint8_t> x;        // (sample, column)
  Buffer<uint32_t> values;  // (tile, sample, channel), the bits of floats
};

}  // namespace
