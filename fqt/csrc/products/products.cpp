// The product operators of fqt_cpu, on LibTorch's stable ABI, and the choice of the instruction set at run time. They take
// packed codes, scales as (sample, position or channel) views, and `layer`: the logical sizes and the geometry as integers.

#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

namespace fqt {
namespace {

using torch::stable::Tensor;

#if defined(FQT_X86)
const bool kAvx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vpopcntdq");
const bool kAvx2 = __builtin_cpu_supports("avx2");
const int kBest = kAvx512 ? 2 : kAvx2 ? 1 : 0;
#elif defined(FQT_ARM)
const int kBest = 1;
#else
const int kBest = 0;
#endif
int isa_limit = 2;  // tests lower it

template <class Call>
void dispatch(const Call& call, void (*portable_kernel)(const Call&), void (*kernel)(const Call&),
              void (*wide_kernel)(const Call&)) {
  const int isa = std::min(kBest, isa_limit);
  (isa == 2 ? wide_kernel : isa == 1 ? kernel : portable_kernel)(call);
}
#if defined(FQT_X86)
#define FQT_DISPATCH(name, call) dispatch(call, portable::name, avx2::name, avx512::name)
#elif defined(FQT_ARM)
#define FQT_DISPATCH(name, call) dispatch(call, portable::name, neon::name, neon::name)
#else
#define FQT_DISPATCH(name, call) dispatch(call, portable::name, portable::name, portable::name)
#endif

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
  FQT_DISPATCH(sign_output, call);
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
  FQT_DISPATCH(sign_output, call);
}

// sign_grad_input(Tensor g, int bits, Tensor g_scale, Tensor? g_offset, Tensor kept, Tensor w, Tensor w_scale, Tensor? mask,
//                 int[] sizes, Tensor(a!) grad) -> ()
void sign_grad_input(Tensor g, int64_t bits, Tensor g_scale, std::optional<Tensor> g_offset, Tensor kept, Tensor w,
                     Tensor w_scale, std::optional<Tensor> mask, std::vector<int64_t> sizes, Tensor grad) {
  const Plan made = plan(sizes, false);
  const int64_t storage = bits <= 2 ? bits : bits <= 4 ? 4 : 8;
  const GradInput call{made.layer,
                       {g.const_data_ptr<uint8_t>(), storage, bits > 4 ? 2 : 1, false, false},
                       w.const_data_ptr<uint8_t>(),
                       data<uint8_t>(mask),
                       scale(g_scale),
                       scale(g_offset),
                       *w_scale.const_data_ptr<float>(),
                       kept.const_data_ptr<int32_t>(),
                       kept.numel(),
                       grad.mutable_data_ptr<float>()};
  FQT_DISPATCH(grad_input, call);
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
  const int64_t storage = bits <= 2 ? bits : bits <= 4 ? 4 : 8;
  const GradWeight call{made.layer,
                        {g.const_data_ptr<uint8_t>(), storage, bits > 4 ? 2 : 1, axes == "C" || axes == "NC", axes == "C"},
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
  FQT_DISPATCH(grad_weight, call);
}

// limit_products(int level) -> int: at most this instruction set (0 portable, 1 AVX2 or NEON, 2 AVX-512); returns what is used
int64_t limit_products(int64_t level) {
  isa_limit = static_cast<int>(level);
  return std::min(kBest, isa_limit);
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
  m.def("limit_products(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fqt_cpu, CompositeExplicitAutograd, m) {
  m.impl("sign_output", TORCH_BOX(&sign_output));
  m.impl("sign_accumulate", TORCH_BOX(&sign_accumulate));
  m.impl("sign_grad_input", TORCH_BOX(&sign_grad_input));
  m.impl("sign_grad_weight", TORCH_BOX(&sign_grad_weight));
  m.impl("limit_products", TORCH_BOX(&limit_products));
}

}  // namespace fqt
