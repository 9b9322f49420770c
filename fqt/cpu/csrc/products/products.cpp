// The product operators of fqt_cpu, on LibTorch's stable ABI. They take packed codes, scales as (sample, position or
// channel) views, and `sizes`: those of the layer, see `Convolution`.

#include "geometry.h"
#include "operands.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace fqt {
namespace {

using torch::stable::Tensor;

// --- signs -------------------------------------------------------------------------------------------------------------------

void sign_output(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, std::optional<Tensor> bias, std::vector<int64_t> sizes,
                 Tensor y) {
  const SeenLayer seen(Convolution(sizes), true);
  FQT_KERNEL(sign_output)({.layer = seen.layer,
                           .x = x.const_data_ptr<uint8_t>(),
                           .w = w.const_data_ptr<uint8_t>(),
                           .x_scale = scale(x_scale),
                           .w_scale = scale(w_scale),
                           .bias = data<float>(bias),
                           .y = y.mutable_data_ptr<float>()});
}

void sign_accumulate(Tensor x, Tensor w, std::vector<int64_t> sizes, Tensor sums) {
  const SeenLayer seen(Convolution(sizes), true);
  const int64_t terms = seen.layer.taps() * seen.layer.in;
  STD_TORCH_CHECK(terms < 1 << 15, "accumulate: ", terms, " terms may overflow 16 bits");
  FQT_KERNEL(sign_output)({.layer = seen.layer,
                           .x = x.const_data_ptr<uint8_t>(),
                           .w = w.const_data_ptr<uint8_t>(),
                           .sums = sums.mutable_data_ptr<int16_t>()});
}

void sign_grad_input(Tensor g, int64_t bits, Tensor g_scale, std::optional<Tensor> g_offset, Tensor kept, Tensor w,
                     Tensor w_scale, std::optional<Tensor> mask, std::vector<int64_t> sizes, Tensor grad) {
  const SeenLayer seen(Convolution(sizes), false);
  FQT_KERNEL(grad_input)({.layer = seen.layer,
                          .g = {.data = g.const_data_ptr<uint8_t>(), .bits = bits},
                          .w = w.const_data_ptr<uint8_t>(),
                          .mask = data<uint8_t>(mask),
                          .g_scale = scale(g_scale),
                          .g_offset = scale(g_offset),
                          .w_scale = *w_scale.const_data_ptr<float>(),
                          .kept = kept.const_data_ptr<int32_t>(),
                          .kept_count = kept.numel(),
                          .grad = grad.mutable_data_ptr<float>()});
}

void sign_grad_weight(Tensor g, int64_t bits, std::string axes, Tensor g_scale, std::optional<Tensor> g_offset, Tensor samples,
                      Tensor channels, Tensor x, Tensor x_scale, std::vector<int64_t> sizes, Tensor grad) {
  Convolution convolution(sizes);
  const Grouping by(axes);
  const bool blocks = by.within_sample();
  std::vector<int32_t> stretches;
  int64_t missing = 0;
  if (!blocks && convolution.y.pointwise() && convolution.x.pointwise()) {  // any stretch of rows may count as a sample
    const int64_t rows = convolution.samples * convolution.y.size * convolution.x.size;
    const int64_t stretch = std::min<int64_t>(rows, 1024), count = stretch ? (rows + stretch - 1) / stretch : 0;
    missing = count * stretch - rows;
    convolution.samples = count, convolution.y.size = stretch, convolution.x.size = 1;
    stretches.resize(count);
    std::iota(stretches.begin(), stretches.end(), 0);
  }
  const SeenLayer seen(convolution, true);
  STD_TORCH_CHECK(seen.layer.positions() < 1 << 23, "grad_weight: a sample of ", seen.layer.positions(),
                  " positions may overflow its 32-bit sums: split it along its positions");
  FQT_KERNEL(grad_weight)({.layer = seen.layer,
                           .g = {.data = g.const_data_ptr<uint8_t>(),
                                 .bits = bits,
                                 .channel = by.channel,
                                 .by_channel = by.channel_alone()},
                           .x = x.const_data_ptr<uint8_t>(),
                           .g_scale = scale(g_scale),
                           .g_offset = scale(g_offset),
                           .x_scale = *x_scale.const_data_ptr<float>(),
                           .blocks = blocks,
                           .missing = missing,
                           .samples = stretches.empty() ? samples.const_data_ptr<int32_t>() : stretches.data(),
                           .channels = channels.const_data_ptr<int32_t>(),
                           .sample_count = stretches.empty() ? samples.numel() : static_cast<int64_t>(stretches.size()),
                           .channel_count = channels.numel(),
                           .grad = grad.mutable_data_ptr<float>()});
}

// --- integers ----------------------------------------------------------------------------------------------------------------

void integer_gather(Tensor a, std::string a_grid, int64_t a_bits, Tensor a_scale, std::optional<Tensor> a_offset, Tensor b,
                    std::string b_grid, int64_t b_bits, Tensor b_scale, std::optional<Tensor> b_offset,
                    std::optional<Tensor> bias, std::optional<Tensor> mask, std::optional<Tensor> kept,
                    std::vector<int64_t> sizes, bool forward, Tensor result) {
  const SeenLayer seen(Convolution(sizes), forward);
  const Layer& l = seen.layer;
  FQT_KERNEL(integer_gather)({.layer = l,
                              .a = integers(a.const_data_ptr(), a_grid, a_bits),
                              .b = integers(b.const_data_ptr(), b_grid, b_bits),
                              .depth = forward ? l.in : l.out,
                              .columns = forward ? l.out : l.in,
                              .across = !forward,
                              .a_scale = scale(a_scale),
                              .a_offset = scale(a_offset),
                              .b_scale = scale(b_scale),
                              .b_offset = scale(b_offset),
                              .bias = data<float>(bias),
                              .mask = data<uint8_t>(mask),
                              .kept = data<int32_t>(kept),
                              .kept_count = kept ? kept->numel() : l.n,
                              .result = result.mutable_data_ptr<float>()});
}

void integer_grad_weight(Tensor g, std::string g_grid, int64_t g_bits, std::string axes, Tensor g_scale,
                         std::optional<Tensor> g_offset, std::optional<Tensor> samples, Tensor channels, Tensor x,
                         std::string x_grid, int64_t x_bits, Tensor x_scale, std::optional<Tensor> x_offset,
                         std::vector<int64_t> sizes, Tensor grad) {
  Convolution convolution(sizes);
  const Grouping by(axes);
  const bool blocks = by.within_sample();
  if (convolution.y.pointwise() && convolution.x.pointwise()) {  // positions are as good as samples, or as a line
    const int64_t positions = convolution.y.size * convolution.x.size;
    if (!blocks) convolution.samples *= positions;
    convolution.y.size = 1, convolution.x.size = blocks ? positions : 1;
  }
  const SeenLayer seen(convolution, true);
  FQT_KERNEL(integer_grad_weight)({.layer = seen.layer,
                                   .g = integers(g.const_data_ptr(), g_grid, g_bits, by),
                                   .x = integers(x.const_data_ptr(), x_grid, x_bits),
                                   .g_scale = scale(g_scale),
                                   .g_offset = scale(g_offset),
                                   .x_scale = *x_scale.const_data_ptr<float>(),
                                   .x_offset = data<float>(x_offset),
                                   .blocks = blocks,
                                   .samples = data<int32_t>(samples),
                                   .channels = channels.const_data_ptr<int32_t>(),
                                   .sample_count = samples ? samples->numel() : seen.layer.n,
                                   .channel_count = channels.numel(),
                                   .grad = grad.mutable_data_ptr<float>()});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fqt_cpu, m) {
  m.def(
      "sign_output(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor? bias, int[] sizes, Tensor(a!) y) -> ()");
  m.def("sign_accumulate(Tensor x, Tensor w, int[] sizes, Tensor(a!) sums) -> ()");
  m.def(
      "sign_grad_input(Tensor g, int bits, Tensor g_scale, Tensor? g_offset, Tensor kept, Tensor w, Tensor w_scale,"
      " Tensor? mask, int[] sizes, Tensor(a!) grad) -> ()");
  m.def(
      "sign_grad_weight(Tensor g, int bits, str axes, Tensor g_scale, Tensor? g_offset, Tensor samples, Tensor channels,"
      " Tensor x, Tensor x_scale, int[] sizes, Tensor(a!) grad) -> ()");
  m.def(
      "integer_gather(Tensor a, str a_grid, int a_bits, Tensor a_scale, Tensor? a_offset, Tensor b, str b_grid, int b_bits,"
      " Tensor b_scale, Tensor? b_offset, Tensor? bias, Tensor? mask, Tensor? kept, int[] sizes, bool forward,"
      " Tensor(a!) result) -> ()");
  m.def(
      "integer_grad_weight(Tensor g, str g_grid, int g_bits, str axes, Tensor g_scale, Tensor? g_offset, Tensor? samples,"
      " Tensor channels, Tensor x, str x_grid, int x_bits, Tensor x_scale, Tensor? x_offset, int[] sizes,"
      " Tensor(a!) grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fqt_cpu, CompositeExplicitAutograd, m) {
  m.impl("sign_output", TORCH_BOX(&sign_output));
  m.impl("sign_accumulate", TORCH_BOX(&sign_accumulate));
  m.impl("sign_grad_input", TORCH_BOX(&sign_grad_input));
  m.impl("sign_grad_weight", TORCH_BOX(&sign_grad_weight));
  m.impl("integer_gather", TORCH_BOX(&integer_gather));
  m.impl("integer_grad_weight", TORCH_BOX(&integer_grad_weight));
}

}  // namespace fqt
