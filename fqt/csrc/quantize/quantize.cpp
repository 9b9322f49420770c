// The operators fqt_cpu::group_range, absmean and encode, on LibTorch's stable ABI (one binary for torch 2.11 and newer), and
// the choice of the instruction set at run time.

#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

namespace fqt {

void parallel(int64_t items, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (items > 0) torch::stable::parallel_for(0, items, grain, body);
}

namespace {

using torch::stable::Tensor;

#if defined(FQT_X86)
const bool kAvx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
const bool kAvx2 = __builtin_cpu_supports("avx2");
#define FQT_DISPATCH(call) (kAvx512 ? avx512::call : kAvx2 ? avx2::call : portable::call)
#else
#define FQT_DISPATCH(call) (portable::call)
#endif

View view(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3, "expected a tensor of three axes, got ", t.dim());
  return {t.const_data_ptr<float>(), t.size(0), t.size(1), t.size(2), t.stride(0), t.stride(1), t.stride(2)};
}

Axes axes_of(const std::string& name) {
  if (name.empty()) return Axes::tensor;
  if (name == "N" || name == "O") return Axes::sample;
  if (name == "NP") return Axes::token;
  return name == "C" ? Axes::channel : Axes::both;
}

int64_t groups_of(const View& x, Axes axes) {
  switch (axes) {
    case Axes::tensor: return 1;
    case Axes::sample: return x.n;
    case Axes::token: return x.n * x.p;
    case Axes::channel: return x.c;
    default: return x.c * x.n;
  }
}

// group_range(Tensor x, Tensor? fold, str axes, Tensor(a!) low, Tensor(b!) high) -> ()
void group_range(Tensor x, std::optional<Tensor> fold, std::string axes, Tensor low, Tensor high) {
  const View from = view(x), factor = fold ? view(*fold) : View{};
  const Axes kind = axes_of(axes);
  const int64_t groups = groups_of(from, kind);
  FQT_DISPATCH(group_range(from, fold ? &factor : nullptr, kind, groups, from.n * from.p * from.c / groups,
                           low.mutable_data_ptr<float>(), high.mutable_data_ptr<float>()));
}

// absmean(Tensor x, Tensor? fold, str axes, Tensor(a!) mean) -> ()
void absmean(Tensor x, std::optional<Tensor> fold, std::string axes, Tensor mean) {
  const View from = view(x), factor = fold ? view(*fold) : View{};
  const Axes kind = axes_of(axes);
  const int64_t groups = groups_of(from, kind);
  FQT_DISPATCH(absmean(from, fold ? &factor : nullptr, kind, groups, from.n * from.p * from.c / groups,
                       mean.mutable_data_ptr<float>()));
}

// encode(Tensor x, Tensor? fold, Tensor? inverse, Tensor? offset, Tensor? keep, Tensor? key, int stream, str grid, float low,
//        float high, int storage, str axes, Tensor(a!) codes) -> ()
void encode(Tensor x, std::optional<Tensor> fold, std::optional<Tensor> inverse, std::optional<Tensor> offset,
            std::optional<Tensor> keep, std::optional<Tensor> key, int64_t stream, std::string grid, double low, double high,
            int64_t storage, std::string axes, Tensor codes) {
  const View from = view(x), factor = fold ? view(*fold) : View{};
  const Axes kind = axes_of(axes);
  const int64_t groups = groups_of(from, kind);
  Encoding e;
  e.grid = grid == "sign" ? Grid::sign : grid == "inside" ? Grid::inside : Grid::uniform;
  e.storage = e.bits = static_cast<int>(storage);
  e.low = static_cast<float>(low);
  e.high = static_cast<float>(high);
  e.inverse = inverse ? inverse->const_data_ptr<float>() : nullptr;
  e.offset = offset ? offset->const_data_ptr<float>() : nullptr;
  e.keep = keep ? keep->const_data_ptr<bool>() : nullptr;
  e.stochastic = key.has_value();
  e.key = key ? static_cast<uint64_t>(*key->const_data_ptr<int64_t>()) : 0;
  e.stream = static_cast<uint32_t>(stream);
  FQT_DISPATCH(encode(from, fold ? &factor : nullptr, e, kind, groups, from.n * from.p * from.c / groups,
                      codes.mutable_data_ptr<uint8_t>()));
}

std::string instruction_set() {
#if defined(FQT_X86)
  return kAvx512 ? "avx512" : kAvx2 ? "avx2" : "portable";
#else
  return "portable";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(fqt_cpu, m) {
  m.def("group_range(Tensor x, Tensor? fold, str axes, Tensor(a!) low, Tensor(b!) high) -> ()");
  m.def("absmean(Tensor x, Tensor? fold, str axes, Tensor(a!) mean) -> ()");
  m.def(
      "encode(Tensor x, Tensor? fold, Tensor? inverse, Tensor? offset, Tensor? keep, Tensor? key, int stream, str grid,"
      " float low, float high, int storage, str axes, Tensor(a!) codes) -> ()");
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fqt_cpu, CompositeExplicitAutograd, m) {
  m.impl("group_range", TORCH_BOX(&group_range));
  m.impl("absmean", TORCH_BOX(&absmean));
  m.impl("encode", TORCH_BOX(&encode));
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace fqt
