// Quantize and pack on a CPU: the loops of fqt/reference.py's `group_range`, `encode`, `pack` and `pass_mask`, one pass over
// memory each. The few numbers a group (scale, keep or prune) are decided by the reference's own code between the two.
//
// This file is included once for each instruction set, inside a namespace of its own; the compiler vectorizes the loops.
// No fused multiply-add may be formed (-ffp-contract=off): every float must round as the reference's.
//
// A tensor is (N, P, C) with any strides. `Axes` says which of them have a scale of their own and with that, as in
// fqt/formats.py, how groups and elements are counted and where a packed row begins:
//
//   axes    groups   elements of a group   packed rows
//   tensor  1        N, P, C               each (N, P): C codes
//   sample  N        P, C                  each (N, P): C codes
//   token   N*P      C                     each (N, P): C codes
//   channel C        N, P                  each C: N*P codes
//   both    C*N      P                     each (C, N): P codes

namespace {

// A group's elements as up to three nested axes, the innermost last.
struct Walk {
  const float* base;
  int64_t size[3];
  int64_t stride[3];
};

Walk walk(const View& x, Axes axes, int64_t group) {
  switch (axes) {
    case Axes::tensor:
      return {x.data, {x.n, x.p, x.c}, {x.sn, x.sp, x.sc}};
    case Axes::sample:
      return {x.data + group * x.sn, {1, x.p, x.c}, {0, x.sp, x.sc}};
    case Axes::token:
      return {x.data + group / x.p * x.sn + group % x.p * x.sp, {1, 1, x.c}, {0, 0, x.sc}};
    case Axes::channel:
      return {x.data + group * x.sc, {1, x.n, x.p}, {0, x.sn, x.sp}};
    default:  // both: group = channel * N + sample
      return {x.data + group / x.n * x.sc + group % x.n * x.sn, {1, 1, x.p}, {0, 0, x.sp}};
  }
}

// Copies elements [first, first + count) of a group to a dense buffer.
inline void gather(const Walk& w, int64_t first, int64_t count, float* out) {
  int64_t i2 = first % w.size[2], rest = first / w.size[2], i1 = rest % w.size[1], i0 = rest / w.size[1];
  while (count > 0) {
    const int64_t run = std::min(count, w.size[2] - i2);
    const float* from = w.base + i0 * w.stride[0] + i1 * w.stride[1] + i2 * w.stride[2];
    if (w.stride[2] == 1) {
      std::memcpy(out, from, run * sizeof(float));
    } else {
      for (int64_t i = 0; i < run; ++i) out[i] = from[i * w.stride[2]];
    }
    out += run;
    count -= run;
    i2 = 0;
    if (++i1 == w.size[1]) i1 = 0, ++i0;
  }
}

// The same, multiplied by `fold` where there is one.
inline void gather_folded(const Walk& x, const Walk* fold, int64_t first, int64_t count, float* out) {
  gather(x, first, count, out);
  if (fold == nullptr) return;
  alignas(64) float factor[kChunk];
  gather(*fold, first, count, factor);
  for (int64_t i = 0; i < count; ++i) out[i] *= factor[i];
}

// 24 random bits for elements [first, first + count) of a group, as floats: Philox 4x32-10, see fqt/philox.py.
inline void uniform_u24(uint64_t key, uint32_t stream, uint32_t group, int64_t first, int64_t count, float* out) {
  constexpr int kLanes = 16;
  const uint32_t block0 = static_cast<uint32_t>(first / 4);
  const int64_t blocks = (first + count + 3) / 4 - first / 4;
  for (int64_t start = 0; start < blocks; start += kLanes) {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      c0[i] = block0 + static_cast<uint32_t>(start) + i;
      c1[i] = group;
      c2[i] = stream;
      c3[i] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < kLanes; ++i) {
        const uint64_t a = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
        const uint64_t b = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
        c0[i] = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ k0;
        c2[i] = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ k1;
        c1[i] = static_cast<uint32_t>(b);
        c3[i] = static_cast<uint32_t>(a);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    float* to = out + start * 4;
    for (int i = 0; i < kLanes; ++i) {
      to[4 * i] = static_cast<float>(static_cast<int32_t>(c0[i] >> 8));
      to[4 * i + 1] = static_cast<float>(static_cast<int32_t>(c1[i] >> 8));
      to[4 * i + 2] = static_cast<float>(static_cast<int32_t>(c2[i] >> 8));
      to[4 * i + 3] = static_cast<float>(static_cast<int32_t>(c3[i] >> 8));
    }
  }
}

// Stored codes, one a byte, to `bits` bits each, the first in the lowest bits; the last byte is filled with zeros.
inline void pack(uint8_t* codes, int64_t count, int bits, uint8_t* out) {
  const int lanes = 8 / bits;
  const int64_t bytes = (count + lanes - 1) / lanes;
  std::memset(codes + count, 0, bytes * lanes - count);
  if (bits == 8) {
    std::memcpy(out, codes, bytes);
  } else if (bits == 4) {
    for (int64_t i = 0; i < bytes; ++i) out[i] = codes[2 * i] | codes[2 * i + 1] << 4;
  } else if (bits == 2) {
    for (int64_t i = 0; i < bytes; ++i) {
      out[i] = codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6;
    }
  } else {
    for (int64_t i = 0; i < bytes; ++i) {
      uint64_t eight;
      std::memcpy(&eight, codes + 8 * i, 8);
      if constexpr (std::endian::native == std::endian::little) {
        out[i] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
      } else {
        out[i] = static_cast<uint8_t>((eight * 0x8040201008040201u) >> 56);
      }
    }
  }
}

inline void encode_chunk(const Encoding& e, int64_t group, int64_t first, int64_t count, const float* v, uint8_t* codes) {
  if (e.grid == Grid::sign) {
    for (int64_t i = 0; i < count; ++i) codes[i] = v[i] >= 0.0f;
    return;
  }
  if (e.grid == Grid::inside) {
    for (int64_t i = 0; i < count; ++i) codes[i] = (v[i] >= e.low) & (v[i] <= e.high);
    return;
  }
  const float offset = e.offset == nullptr ? 0.0f : e.offset[group];
  const float inverse = e.inverse[group];
  const int32_t mask = (1 << e.bits) - 1;
  alignas(64) float y[kChunk];
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = (v[i] - offset) * inverse;
    y[i] = std::min(std::max(scaled, e.low), e.high);
  }
  if (!e.stochastic) {
    for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(static_cast<int32_t>(std::nearbyintf(y[i])) & mask);
    return;
  }
  alignas(64) float u24[kChunk + 4 * 16 + 4];
  uniform_u24(e.key, e.stream, static_cast<uint32_t>(group), first, count, u24);
  const float* u = u24 + first % 4;
  for (int64_t i = 0; i < count; ++i) {
    const float below = std::floor(y[i]);
    const int32_t up = u[i] < (y[i] - below) * 16777216.0f;
    codes[i] = static_cast<uint8_t>((static_cast<int32_t>(below) + up) & mask);
  }
}

}  // namespace

// Smallest and largest value of each group; NaN if it holds one.
void group_range(const View& x, const View* fold, Axes axes, int64_t groups, int64_t elements, float* low, float* high) {
  // a group is cut into parts, so that one group alone can use all threads
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(elements / kChunk, 256 / std::max<int64_t>(groups, 1)));
  const int64_t part = ((elements + parts - 1) / parts + kChunk - 1) / kChunk * kChunk;
  std::vector<float> lows(groups * parts, kInfinity), highs(groups * parts, -kInfinity);
  parallel(groups * parts, std::max<int64_t>(1, 32768 / std::max<int64_t>(part, 1)), [&](int64_t begin, int64_t end) {
    alignas(64) float v[kChunk];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item % groups, first = item / groups * part, last = std::min(elements, first + part);
      const Walk from = walk(x, axes, group);
      Walk factor;
      if (fold != nullptr) factor = walk(*fold, axes, group);
      float lo[16], hi[16];
      uint32_t nan[16] = {};
      std::fill(lo, lo + 16, kInfinity);
      std::fill(hi, hi + 16, -kInfinity);
      for (int64_t e = first; e < last; e += kChunk) {
        const int64_t count = std::min<int64_t>(kChunk, last - e);
        gather_folded(from, fold == nullptr ? nullptr : &factor, e, count, v);
        for (int64_t i = count; i % 16; ++i) v[i] = v[0];
        for (int64_t i = 0; i < count; i += 16) {
          for (int j = 0; j < 16; ++j) {
            lo[j] = v[i + j] < lo[j] ? v[i + j] : lo[j];
            hi[j] = v[i + j] > hi[j] ? v[i + j] : hi[j];
            nan[j] |= v[i + j] != v[i + j];
          }
        }
      }
      bool any = false;
      for (int j = 0; j < 16; ++j) {
        any |= nan[j] != 0;
        lows[item] = std::min(lows[item], lo[j]);
        highs[item] = std::max(highs[item], hi[j]);
      }
      if (any) lows[item] = highs[item] = kNaN;
    }
  });
  for (int64_t group = 0; group < groups; ++group) {
    low[group] = kInfinity;
    high[group] = -kInfinity;
    for (int64_t i = group; i < groups * parts; i += groups) {
      const bool nan = low[group] != low[group] || lows[i] != lows[i];
      low[group] = nan ? kNaN : std::min(low[group], lows[i]);
      high[group] = nan ? kNaN : std::max(high[group], highs[i]);
    }
  }
}

// Mean |x| of each group: a float64 sum over neighbours, then neighbours of neighbours, as the reference adds.
void absmean(const View& x, const View* fold, Axes axes, int64_t groups, int64_t elements, float* mean) {
  parallel(groups, std::max<int64_t>(1, 32768 / std::max<int64_t>(elements, 1)), [&](int64_t begin, int64_t end) {
    alignas(64) float v[kChunk];
    std::vector<double> sums(elements);
    for (int64_t group = begin; group < end; ++group) {
      const Walk from = walk(x, axes, group);
      Walk factor;
      if (fold != nullptr) factor = walk(*fold, axes, group);
      for (int64_t first = 0; first < elements; first += kChunk) {
        const int64_t count = std::min<int64_t>(kChunk, elements - first);
        gather_folded(from, fold == nullptr ? nullptr : &factor, first, count, v);
        for (int64_t i = 0; i < count; ++i) sums[first + i] = std::fabs(v[i]);
      }
      for (int64_t n = elements; n > 1; n = (n + 1) / 2) {
        for (int64_t i = 0; i < n / 2; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
        if (n % 2) sums[n / 2] = sums[n - 1];
      }
      mean[group] = static_cast<float>(sums[0] / static_cast<double>(elements));
    }
  });
}

// Codes of the groups whose `keep` is set, zero bits for the others.
void encode(const View& x, const View* fold, const Encoding& e, Axes axes, int64_t groups, int64_t elements, uint8_t* out) {
  const bool by_channel = axes == Axes::channel || axes == Axes::both;
  // whole groups are packed in one row, and so are rows that end with their byte
  const bool dense = by_channel || x.c * e.storage % 8 == 0;
  const int64_t length = dense ? elements : x.c;
  const int64_t rows = length == 0 ? 0 : elements / length, chunks = (length + kChunk - 1) / kChunk;
  const int64_t row_bytes = (length * e.storage + 7) / 8;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, std::min<int64_t>(length, kChunk)));
  parallel(groups * rows * chunks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float v[kChunk];
    alignas(64) uint8_t codes[kChunk + 8];
    for (int64_t item = begin; item < end; ++item) {
      // channels of a stretch of positions follow each other: in channels_last they share cache lines
      int64_t group, row, chunk;
      if (axes == Axes::both) {
        const int64_t c = item % x.c, rest = item / x.c;
        chunk = rest % chunks, row = 0, group = c * x.n + rest / chunks;
      } else if (axes == Axes::channel) {
        group = item % groups, row = 0, chunk = item / groups;
      } else {
        chunk = item % chunks, row = item / chunks % rows, group = item / chunks / rows;
      }
      const int64_t in_row = chunk * kChunk, count = std::min<int64_t>(kChunk, length - in_row);
      uint8_t* to = out + (group * rows + row) * row_bytes + in_row * e.storage / 8;
      if (e.keep != nullptr && !e.keep[group]) {
        std::memset(to, 0, (count * e.storage + 7) / 8);
        continue;
      }
      const int64_t first = row * length + in_row;
      const Walk from = walk(x, axes, group);
      if (fold == nullptr) {
        gather(from, first, count, v);
      } else {
        const Walk factor = walk(*fold, axes, group);
        gather_folded(from, &factor, first, count, v);
      }
      encode_chunk(e, group, first, count, v, codes);
      pack(codes, count, e.storage, to);
    }
  });
}
