// The operator fqt_cpu::decode: where each group's codes lie, and where their values go.

#include "../dispatch/grouping.h"
#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

namespace fqt {
namespace {

using torch::stable::Tensor;

// Codes in the order of the result, (N, P, C): runs with a scale of their own, cut into pieces that begin with a byte.
void decode_in_order(const Coded& q, const uint8_t* codes, int64_t n, int64_t p, int64_t c, const Grouping& by,
                     const float* scale, const float* offset, float* out) {
  constexpr int64_t kPiece = 16384;
  const int64_t bytes = (c * q.storage + 7) / 8;
  const bool dense = c * q.storage % 8 == 0 && !by.position;
  const int64_t runs = !dense ? n * p : by.whole() ? 1 : n, length = !dense ? c : by.whole() ? n * p * c : p * c;
  const int64_t run_bytes = dense ? length * q.storage / 8 : bytes, pieces = (length + kPiece - 1) / kPiece;
  parallel(runs * pieces, std::max<int64_t>(1, 2 * kPiece / (length + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t run = i / pieces, first = i % pieces * kPiece;
      const int64_t group = by.whole() ? 0 : by.position || dense ? run : run / p;
      FQT_KERNEL(decode)(q, codes + run * run_bytes + first * q.storage / 8, std::min(kPiece, length - first), scale[group],
                         offset ? offset + group : nullptr, out + run * length + first);
    }
  });
}

// Codes stored channel first, (C, images, positions): tiles are decoded and turned.
void decode_turned(const Coded& q, const uint8_t* codes, int64_t images, int64_t positions, int64_t c, const float* scale,
                   const float* offset, float* out) {
  constexpr int64_t kBeside = 16, kDown = 128;
  const int64_t bytes = (positions * q.storage + 7) / 8, cuts = (positions + kDown - 1) / kDown;
  parallel(images * cuts, std::max<int64_t>(1, 256 / (c + 1)), [&](int64_t begin, int64_t end) {
    alignas(64) float tile[kBeside][kDown];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / cuts, first = item % cuts * kDown, count = std::min(kDown, positions - first);
      for (int64_t channel = 0; channel < c; channel += kBeside) {
        const int64_t width = std::min(kBeside, c - channel);
        for (int64_t i = 0; i < width; ++i) {
          const int64_t group = (channel + i) * images + image;
          FQT_KERNEL(decode)(q, codes + group * bytes + first * q.storage / 8, count, scale[group],
                             offset ? offset + group : nullptr, tile[i]);
        }
        float* to = out + (image * positions + first) * c + channel;
        for (int64_t j = 0; j < count; ++j, to += c) {
          for (int64_t i = 0; i < width; ++i) to[i] = tile[i][j];
        }
      }
    }
  });
}

// decode(Tensor codes, str grid, int bits, str axes, Tensor scale, Tensor? offset, Tensor(a!) out) -> ()
void decode(Tensor codes, std::string grid, int64_t bits, std::string axes, Tensor scale, std::optional<Tensor> offset,
            Tensor out) {
  STD_TORCH_CHECK(out.dim() == 3, "expected a result of three axes, got ", out.dim());
  const int64_t n = out.size(0), p = out.size(1), c = out.size(2);
  if (out.numel() == 0) return;
  const int storage = bits <= 2 ? static_cast<int>(bits) : bits <= 4 ? 4 : bits <= 8 ? 8 : bits <= 16 ? 16 : 32;
  const Coded q{storage, grid == "sign", grid != "sign" && grid != "uint", bits > 24};
  const uint8_t* from = static_cast<const uint8_t*>(codes.const_data_ptr());
  const float *scales = scale.const_data_ptr<float>(), *offsets = offset ? offset->const_data_ptr<float>() : nullptr;
  float* to = out.mutable_data_ptr<float>();
  const Grouping by(axes);
  if (!by.channel) return decode_in_order(q, from, n, p, c, by, scales, offsets, to);
  decode_turned(q, from, by.sample ? n : 1, by.sample ? p : n * p, c, scales, offsets, to);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fqt_cpu, m) {
  m.def(
      "decode(Tensor codes, str grid, int bits, str axes, Tensor scale, Tensor? offset, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fqt_cpu, CompositeExplicitAutograd, m) { m.impl("decode", TORCH_BOX(&decode)); }

}  // namespace fqt
