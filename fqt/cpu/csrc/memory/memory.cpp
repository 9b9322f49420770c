// fqt_cpu::empty: large tensors from the pool, where torch's own allocator would take new pages for each.

#include "pool.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

namespace fqt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

size_t size_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return 1;
    case ScalarType::Short: return 2;
    default: STD_TORCH_CHECK(dtype == ScalarType::Float, "empty: float32, int16 or uint8"); return 4;
  }
}

// empty(int[] sizes, ScalarType dtype) -> Tensor
Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  size_t bytes = size_of(dtype);
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = i + 1 < sizes.size() ? strides[i + 1] * sizes[i + 1] : 1;
    bytes *= sizes[i];
  }
  void* const block = take_block(bytes);
  STD_TORCH_CHECK(block != nullptr, "out of memory: a tensor needs ", bytes, " bytes");
  return torch::stable::from_blob(block, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  &give_block_back);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fqt_cpu, m) {
  m.def("empty(int[] sizes, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fqt_cpu, CompositeExplicitAutograd, m) {
  m.impl("empty", TORCH_BOX(&empty));
}

}  // namespace fqt
