// The product operators of fqt_cpu, on LibTorch's stable ABI. They take packed codes, scales as (sample, position or
// channel) views, and `layer`: the logical sizes and the geometry as integers.

#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

namespace fqt {
namespace {

using torch::stable::Tensor;

// Owns what an `Axis` points to.
struct AxisTables {
  std::vector<int32_t> at, kind, example;
  int64_t size, taps;

  // forward: from positions of the output to those of the input; else the way back
  AxisTables(int64_t input, int64_t output, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool forward)
      : size(forward ? output : input), taps(kernel) {
    at.resize(size * taps);
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t scaled = forward ? i * stride - padding + k * dilation : i + padding - k * dilation;
        const int64_t met = forward ? scaled : scaled / stride;
        const bool inside = scaled >= 0 && met < (forward ? input : output) && (forward || scaled % stride == 0);
        at[i * taps + k] = inside ? static_cast<int32_t>(met) : -1;
      }
      const auto same = [&](int32_t other) {
        for (int64_t k = 0; k < taps; ++k) {
          if ((at[i * taps + k] < 0) != (at[other * taps + k] < 0)) return false;
        }
        return true;
      };
      int32_t found = 0;
      while (found < static_cast<int32_t>(example.size()) && !same(example[found])) ++found;
      if (found == static_cast<int32_t>(example.size())) example.push_back(static_cast<int32_t>(i));
      kind.push_back(found);
    }
  }

  Axis axis() const {
    return {size, taps, static_cast<int64_t>(example.size()), at.data(), kind.data(), example.data()};
  }
};

struct Plan {
  AxisTables y, x;
  Layer layer;
};

// sizes: samples, input channels, output channels, then fqt.geometry.Geometry.flat().
Plan plan(const std::vector<int64_t>& sizes, bool forward) {
  STD_TORCH_CHECK(sizes.size() == 16, "expected 16 sizes, got ", sizes.size());
  const int64_t *s = sizes.data(), n = s[0], in = s[1], out = s[2], height = s[3], width = s[4], kh = s[5], kw = s[6];
  const int64_t sh = s[7], sw = s[8], top = s[9], bottom = s[10], left = s[11], right = s[12], dh = s[13], dw = s[14];
  const int64_t groups = s[15];
  const int64_t out_height = (height + top + bottom - dh * (kh - 1) - 1) / sh + 1;
  const int64_t out_width = (width + left + right - dw * (kw - 1) - 1) / sw + 1;
  Plan made{{height, out_height, kh, sh, top, dh, forward}, {width, out_width, kw, sw, left, dw, forward}, {}};
  made.layer = {n, groups, in / groups, out / groups, made.y.axis(), made.x.axis(), forward ? height : out_height,
                forward ? width : out_width};
  return made;
}

// Whether every position of the output meets just the same position of the input.
bool pointwise(const std::vector<int64_t>& s) {
  return s[5] * s[6] == 1 && s[7] * s[8] == 1 && s[9] == 0 && s[10] == 0 && s[11] == 0 && s[12] == 0;
}

// An axis of size 1 stands for any size.
Scale scale(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, "expected a scale of two axes, got ", t.dim());
  return {t.const_data_ptr<float>(), t.size(0) == 1 ? 0 : t.stride(0), t.size(1) == 1 ? 0 : t.stride(1)};
}

Scale scale(const std::optional<Tensor>& t) { return t ? scale(*t) : Scale{}; }

template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// sign_output(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor? bias, int[] sizes, Tensor(a!) y) -> ()
void sign_output(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, std::optional<Tensor> bias, std::vector<int64_t> sizes,
                 Tensor y) {
  const Plan made = plan(sizes, true);
  const SignOutput call{made.layer,     x.const_data_ptr<uint8_t>(), w.const_data_ptr<uint8_t>(), scale(x_scale),
                        scale(w_scale), data<float>(bias),           y.mutable_data_ptr<float>(),   nullptr};
  FQT_KERNEL(sign_output)(call);
}

// sign_accumulate(Tensor x, Tensor w, int[] sizes, Tensor(a!) sums) -> ()
void sign_accumulate(Tensor x, Tensor w, std::vector<int64_t> sizes, Tensor sums) {
  const Plan made = plan(sizes, true);
  STD_TORCH_CHECK(made.layer.taps() * made.layer.in < 1 << 15, "accumulate: ", made.layer.taps() * made.layer.in,
                  " terms may overflow 16 bits");
  SignOutput call{};
  call.layer = made.layer;
  call.x = x.const_data_ptr<uint8_t>();
  call.w = w.const_data_ptr<uint8_t>();
  call.sums = sums.mutable_data_ptr<int16_t>();
  FQT_KERNEL(sign_output)(call);
}

// sign_grad_input(Tensor g, int bits, Tensor g_scale, Tensor? g_offset, Tensor kept, Tensor w, Tensor w_scale, Tensor? mask,
//                 int[] sizes, Tensor(a!) grad) -> ()
void sign_grad_input(Tensor g, int64_t bits, Tensor g_scale, std::optional<Tensor> g_offset, Tensor kept, Tensor w,
                     Tensor w_scale, std::optional<Tensor> mask, std::vector<int64_t> sizes, Tensor grad) {
  const Plan made = plan(sizes, false);
  const GradInput call{made.layer,
                       {g.const_data_ptr<uint8_t>(), bits, false, false},
                       w.const_data_ptr<uint8_t>(),
                       data<uint8_t>(mask),
                       scale(g_scale),
                       scale(g_offset),
                       *w_scale.const_data_ptr<float>(),
                       kept.const_data_ptr<int32_t>(),
                       kept.numel(),
                       grad.mutable_data_ptr<float>()};
  FQT_KERNEL(grad_input)(call);
}

// sign_grad_weight(Tensor g, int bits, str axes, Tensor g_scale, Tensor? g_offset, Tensor samples, Tensor channels, Tensor x,
//                  Tensor x_scale, int[] sizes, Tensor(a!) grad) -> ()
void sign_grad_weight(Tensor g, int64_t bits, std::string axes, Tensor g_scale, std::optional<Tensor> g_offset, Tensor samples,
                      Tensor channels, Tensor x, Tensor x_scale, std::vector<int64_t> sizes, Tensor grad) {
  const bool blocks = axes == "N" || axes == "NC";
  std::vector<int32_t> stretches;
  int64_t missing = 0;
  if (!blocks && pointwise(sizes)) {
    const int64_t rows = sizes[0] * sizes[3] * sizes[4], stretch = std::min<int64_t>(rows, 1024);
    const int64_t count = stretch ? (rows + stretch - 1) / stretch : 0;
    missing = count * stretch - rows;
    sizes[0] = count, sizes[3] = stretch, sizes[4] = 1;
    for (int64_t i = 0; i < count; ++i) stretches.push_back(static_cast<int32_t>(i));
  }
  const Plan made = plan(sizes, true);
  STD_TORCH_CHECK(made.layer.positions() < 1 << 23, "grad_weight: a sample of ", made.layer.positions(),
                  " positions may overflow its 32-bit sums: split it along its positions");
  const GradWeight call{made.layer,
                        {g.const_data_ptr<uint8_t>(), bits, axes == "C" || axes == "NC", axes == "C"},
                        x.const_data_ptr<uint8_t>(),
                        scale(g_scale),
                        scale(g_offset),
                        *x_scale.const_data_ptr<float>(),
                        blocks,
                        missing,
                        stretches.empty() ? samples.const_data_ptr<int32_t>() : stretches.data(),
                        channels.const_data_ptr<int32_t>(),
                        stretches.empty() ? samples.numel() : static_cast<int64_t>(stretches.size()),
                        channels.numel(),
                        grad.mutable_data_ptr<float>()};
  FQT_KERNEL(grad_weight)(call);
}

// Integers as they lie in memory; `axes` are those of their scales.
Integers integers(const Tensor& codes, const std::string& grid, int64_t bits, const std::string& axes) {
  const int64_t storage = bits <= 2 ? bits : bits <= 4 ? 4 : bits <= 8 ? 8 : 16;
  const Meaning meaning = grid == "sign" ? Meaning::sign : grid == "uint" ? Meaning::natural : Meaning::complement;
  return {static_cast<const uint8_t*>(codes.const_data_ptr()), bits, storage, meaning, axes == "C" || axes == "NC", axes == "C"};
}

// integer_gather(Tensor a, str a_grid, int a_bits, Tensor a_scale, Tensor? a_offset, Tensor b, str b_grid, int b_bits,
//                Tensor b_scale, Tensor? b_offset, Tensor? bias, Tensor? mask, Tensor? kept, int[] sizes, bool forward,
//                Tensor(a!) result) -> ()
void integer_gather(Tensor a, std::string a_grid, int64_t a_bits, Tensor a_scale, std::optional<Tensor> a_offset, Tensor b,
                    std::string b_grid, int64_t b_bits, Tensor b_scale, std::optional<Tensor> b_offset,
                    std::optional<Tensor> bias, std::optional<Tensor> mask, std::optional<Tensor> kept,
                    std::vector<int64_t> sizes, bool forward, Tensor result) {
  const Plan made = plan(sizes, forward);
  const Layer& l = made.layer;
  const IntegerGather call{l,
                           integers(a, a_grid, a_bits, ""),
                           integers(b, b_grid, b_bits, ""),
                           forward ? l.in : l.out,
                           forward ? l.out : l.in,
                           !forward,
                           scale(a_scale),
                           scale(a_offset),
                           scale(b_scale),
                           scale(b_offset),
                           data<float>(bias),
                           data<uint8_t>(mask),
                           data<int32_t>(kept),
                           kept ? kept->numel() : l.n,
                           result.mutable_data_ptr<float>()};
  FQT_KERNEL(integer_gather)(call);
}

// integer_grad_weight(Tensor g, str g_grid, int g_bits, str axes, Tensor g_scale, Tensor? g_offset, Tensor? samples,
//                     Tensor channels, Tensor x, str x_grid, int x_bits, Tensor x_scale, Tensor? x_offset, int[] sizes,
//                     Tensor(a!) grad) -> ()
void integer_grad_weight(Tensor g, std::string g_grid, int64_t g_bits, std::string axes, Tensor g_scale,
                         std::optional<Tensor> g_offset, std::optional<Tensor> samples, Tensor channels, Tensor x,
                         std::string x_grid, int64_t x_bits, Tensor x_scale, std::optional<Tensor> x_offset,
                         std::vector<int64_t> sizes, Tensor grad) {
  const bool blocks = axes == "N" || axes == "NC";
  if (pointwise(sizes)) {  // positions are as good as samples, or as a line
    const int64_t positions = sizes[3] * sizes[4];
    if (!blocks) sizes[0] *= positions;
    sizes[3] = 1, sizes[4] = blocks ? positions : 1;
  }
  const Plan made = plan(sizes, true);
  const IntegerGradWeight call{made.layer,
                               integers(g, g_grid, g_bits, axes),
                               integers(x, x_grid, x_bits, ""),
                               scale(g_scale),
                               scale(g_offset),
                               *x_scale.const_data_ptr<float>(),
                               data<float>(x_offset),
                               blocks,
                               data<int32_t>(samples),
                               channels.const_data_ptr<int32_t>(),
                               samples ? samples->numel() : made.layer.n,
                               channels.numel(),
                               grad.mutable_data_ptr<float>()};
  FQT_KERNEL(integer_grad_weight)(call);
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
