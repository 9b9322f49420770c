// The batch normalization operators of fqt_cpu, on LibTorch's stable ABI.
//
// y (N, P, C), contiguous: float, or int16 with a scale and perhaps an offset a channel. affine: (4, C) rows a, b, mean, inv.
// windows: height and width of the images, then of the pooling's windows.

#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

namespace fqt {
namespace {

using torch::stable::Tensor;

const float* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

Normed normed(const Tensor& y, const std::optional<Tensor>& scale, const std::optional<Tensor>& offset) {
  STD_TORCH_CHECK(y.dim() == 3 && y.is_contiguous(), "expected a contiguous tensor of three axes");
  Normed made{nullptr, nullptr, data(scale), data(offset), y.size(0) * y.size(1), y.size(2)};
  if (scale) {
    made.codes = y.const_data_ptr<int16_t>();
  } else {
    made.floats = y.const_data_ptr<float>();
  }
  return made;
}

Pooled pooled(const Normed& y, const Tensor& affine, const std::vector<int64_t>& windows) {
  STD_TORCH_CHECK(windows.size() == 4, "expected the sizes of image and window, got ", windows.size());
  const float* rows = affine.const_data_ptr<float>();
  const int64_t step = affine.size(1);
  return {.y = y,
          .affine = {.a = rows, .b = rows + step, .mean = rows + 2 * step, .inv = rows + 3 * step},
          .windows = {.height = windows[0], .width = windows[1], .kernel_y = windows[2], .kernel_x = windows[3]}};
}

Gradient gradient(const Tensor& g, const std::optional<Tensor>& kept) {
  return {g.const_data_ptr<float>(), kept ? kept->const_data_ptr<bool>() : nullptr};
}

void norm_sums(Tensor y, std::optional<Tensor> scale, std::optional<Tensor> offset, Tensor sums) {
  FQT_KERNEL(norm_sums)(normed(y, scale, offset), sums.mutable_data_ptr<double>());
}

void norm_value(Tensor y, std::optional<Tensor> scale, std::optional<Tensor> offset, Tensor affine,
                std::vector<int64_t> windows, Tensor z) {
  FQT_KERNEL(norm_value)(pooled(normed(y, scale, offset), affine, windows), z.mutable_data_ptr<float>());
}

bool norm_sign(Tensor y, std::optional<Tensor> scale, std::optional<Tensor> offset, Tensor affine,
               std::vector<int64_t> windows, double low, double high, Tensor codes, Tensor mask) {
  return FQT_KERNEL(norm_sign)(pooled(normed(y, scale, offset), affine, windows), static_cast<float>(low),
                               static_cast<float>(high), codes.mutable_data_ptr<uint8_t>(), mask.mutable_data_ptr<uint8_t>());
}

void norm_above(Tensor y, Tensor above, Tensor flipped, std::vector<int64_t> windows, Tensor signs) {
  STD_TORCH_CHECK(y.dim() == 3 && y.is_contiguous(), "expected a contiguous tensor of three axes");
  STD_TORCH_CHECK(windows.size() == 4, "expected the sizes of image and window, got ", windows.size());
  FQT_KERNEL(norm_above)({.codes = y.const_data_ptr<int16_t>(),
                          .above = above.const_data_ptr<int16_t>(),
                          .flipped = flipped.const_data_ptr<uint8_t>(),
                          .windows = {.height = windows[0], .width = windows[1], .kernel_y = windows[2], .kernel_x = windows[3]},
                          .rows = y.size(0) * y.size(1),
                          .channels = y.size(2)},
                         signs.mutable_data_ptr<uint8_t>());
}

void norm_grad_sums(Tensor g, std::optional<Tensor> kept, Tensor y, std::optional<Tensor> scale, std::optional<Tensor> offset,
                    Tensor affine, std::vector<int64_t> windows, Tensor sums) {
  FQT_KERNEL(norm_grad_sums)(pooled(normed(y, scale, offset), affine, windows), gradient(g, kept),
                             sums.mutable_data_ptr<double>());
}

void norm_grad(Tensor g, std::optional<Tensor> kept, Tensor y, std::optional<Tensor> scale, std::optional<Tensor> offset,
               Tensor affine, std::vector<int64_t> windows, Tensor means, Tensor dy, Tensor low, Tensor high) {
  FQT_KERNEL(norm_grad)(pooled(normed(y, scale, offset), affine, windows), gradient(g, kept), means.const_data_ptr<float>(),
                        dy.mutable_data_ptr<float>(), {low.mutable_data_ptr<float>(), high.mutable_data_ptr<float>()});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fqt_cpu, m) {
  m.def("norm_sums(Tensor y, Tensor? scale, Tensor? offset, Tensor(a!) sums) -> ()");
  m.def("norm_value(Tensor y, Tensor? scale, Tensor? offset, Tensor affine, int[] windows, Tensor(a!) z) -> ()");
  m.def(
      "norm_sign(Tensor y, Tensor? scale, Tensor? offset, Tensor affine, int[] windows, float low, float high,"
      " Tensor(a!) codes, Tensor(b!) mask) -> bool");
  m.def("norm_above(Tensor y, Tensor above, Tensor flipped, int[] windows, Tensor(a!) signs) -> ()");
  m.def(
      "norm_grad_sums(Tensor g, Tensor? kept, Tensor y, Tensor? scale, Tensor? offset, Tensor affine, int[] windows,"
      " Tensor(a!) sums) -> ()");
  m.def(
      "norm_grad(Tensor g, Tensor? kept, Tensor y, Tensor? scale, Tensor? offset, Tensor affine, int[] windows, Tensor means,"
      " Tensor(a!) dy, Tensor(b!) low, Tensor(c!) high) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fqt_cpu, CompositeExplicitAutograd, m) {
  m.impl("norm_sums", TORCH_BOX(&norm_sums));
  m.impl("norm_value", TORCH_BOX(&norm_value));
  m.impl("norm_sign", TORCH_BOX(&norm_sign));
  m.impl("norm_above", TORCH_BOX(&norm_above));
  m.impl("norm_grad_sums", TORCH_BOX(&norm_grad_sums));
  m.impl("norm_grad", TORCH_BOX(&norm_grad));
}

}  // namespace fqt
