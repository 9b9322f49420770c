// How ranges become scales, inverses and offsets: `calibrate_groups` of fqt/reference/codes.py, in its order of roundings.

void calibrate(const Calibration& c, int64_t count, const Statistics& of, float* scale, const Slots& slots) {
  const float *low = of.low, *high = of.high, *mean = of.mean;
  const float steps = c.low_code < 0 ? c.high_code : c.high_code - c.low_code;
  if (c.range == Range::none) {
    const float span = c.low_code < 0 ? c.last : c.last - c.first;
    const float whole = c.fixed ? c.first / c.low_code : span / steps;
    const float inverse = c.fixed ? 1.0f / c.first * c.low_code : steps / span;
    for (int64_t i = 0; i < count; ++i) {
      const bool bad = low[i] != low[i];
      scale[i] = bad ? kNaN : whole;
      slots.inverse[i] = bad ? 0.0f : inverse;
      slots.offset[i] = bad || !c.offset ? 0.0f : c.first;
      slots.keep[i] = scale[i] == scale[i];
    }
    return;
  }
  const float divisor = c.range == Range::absmean ? 1.0f : steps;
  float *span = scale, *offset = slots.offset;
  for (int64_t i = 0; c.range == Range::minmax && i < count; ++i) {
    span[i] = high[i] - low[i];
    offset[i] = low[i];
  }
  for (int64_t i = 0; c.range == Range::absmax && i < count; ++i) {
    const float widest = low[i] != low[i] || high[i] > -low[i] ? high[i] : -low[i];
    offset[i] = widest >= kMinRange ? -widest : 0.0f;
    span[i] = c.offset ? widest * 2.0f : widest;
  }
  for (int64_t i = 0; c.range == Range::absmean && i < count; ++i) span[i] = mean[i];
  for (int64_t i = 0; i < count; ++i) {
    const float value = span[i], quotient = value / divisor, reciprocal = divisor / value;
    const bool good = std::fabs(value) < kInfinity, wide = value >= kMinRange;
    slots.inverse[i] = good && wide ? reciprocal : 0.0f;
    offset[i] = good && c.offset ? offset[i] : 0.0f;
    scale[i] = !good ? kNaN : wide ? quotient : 0.0f;
  }
  for (int64_t i = 0; i < count; ++i) slots.keep[i] = scale[i] == scale[i];
}
