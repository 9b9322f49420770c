// fqt_cpu::evaluate: quantize, then output, of a linear layer in an evaluation, which keeps no codes of x. One operator in place
// of two, and of the tensors between them: of one row all that takes longer than the kernels.

#include "../quantize/nearest.h"
#include "geometry.h"
#include "operands.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

namespace fqt {
namespace {

using torch::stable::Tensor;

// A scale or offset by output channel, or one for all.
Scale of_channels(const Tensor& t) { return {t.const_data_ptr<float>(), t.numel() == 1 ? 0 : 1, 0}; }

// x: (N, P, C) of float32 or bfloat16; its grid, bits, axes ("", "N" or "NP"), calibration and whether it has an offset.
// w: packed codes of (O, 1, C) with one scale, or one for each output channel. Both of at most 8 bits.
Tensor evaluate(Tensor x, std::string grid, int64_t bits, std::string axes, bool x_offset, std::string calibrate, double first,
                double last, Tensor w, std::string w_grid, int64_t w_bits, Tensor w_scale, std::optional<Tensor> w_offset,
                std::optional<Tensor> bias) {
  STD_TORCH_CHECK(x.dim() == 3 && w.dim() == 3, "evaluate: x and w have three axes, not ", x.dim(), " and ", w.dim());
  const int64_t n = x.size(0), positions = x.size(1), in = x.size(2), out = w.size(0);
  const bool by_row = axes == "NP";
  STD_TORCH_CHECK(axes.empty() || axes == "N" || by_row, "evaluate: the scale axes ", axes, " of x are summed over");
  Tensor y = torch::stable::new_empty(x, std::vector<int64_t>{n, positions, out}, torch::headeronly::ScalarType::Float);
  if (n * positions == 0) return y;

  const int64_t groups = by_row ? n * positions : axes.empty() ? 1 : n;
  const Integers a = integers(nullptr, grid, bits);
  std::vector<uint8_t> codes(n * positions * ((in * a.storage + 7) / 8));
  std::vector<float> numbers(2 * groups);
  float *const scales = numbers.data(), *const offsets = x_offset ? scales + groups : nullptr;
  quantize_nearest(x, {grid, bits, axes, calibrate, first, last}, groups, codes.data(), codes.size(), scales, offsets);

  const SeenLayer seen(Convolution({n, in, out, positions, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1}), true);
  const int64_t of_sample = by_row ? positions : axes.empty() ? 0 : 1, of_position = by_row ? 1 : 0;
  if (grid == "sign" && w_grid == "sign") {
    FQT_KERNEL(sign_output)({.layer = seen.layer,
                             .x = codes.data(),
                             .w = w.const_data_ptr<uint8_t>(),
                             .x_scale = {scales, of_sample, of_position},
                             .w_scale = of_channels(w_scale),
                             .bias = data<float>(bias),
                             .y = y.mutable_data_ptr<float>()});
    return y;
  }
  Integers x_codes = a;
  x_codes.data = codes.data();
  FQT_KERNEL(integer_gather)({.layer = seen.layer,
                              .a = x_codes,
                              .b = integers(w.const_data_ptr(), w_grid, w_bits),
                              .depth = in,
                              .columns = out,
                              .across = false,
                              .a_scale = {scales, of_sample, of_position},
                              .a_offset = offsets ? Scale{offsets, of_sample, of_position} : Scale{},
                              .b_scale = of_channels(w_scale),
                              .b_offset = w_offset ? of_channels(*w_offset) : Scale{},
                              .bias = data<float>(bias),
                              .mask = nullptr,
                              .kept = nullptr,
                              .kept_count = n,
                              .result = y.mutable_data_ptr<float>()});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fqt_cpu, m) {
  m.def(
      "evaluate(Tensor x, str grid, int bits, str axes, bool offset, str calibrate, float first, float last, Tensor w,"
      " str w_grid, int w_bits, Tensor w_scale, Tensor? w_offset, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fqt_cpu, CompositeExplicitAutograd, m) { m.impl("evaluate", TORCH_BOX(&evaluate)); }

}  // namespace fqt
