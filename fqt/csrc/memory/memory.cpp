// fqt_cpu::empty: large tensors from memory that is used again. The system hands out zeroed pages one fault at a time, which
// for a tensor of tens of megabytes costs several times as much as writing it; torch's CPU allocator gives such memory back to
// the system with every tensor that dies. Freed blocks stay here, never more than were once in use together.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace fqt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

class Pool {
 public:
  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    void* block = nullptr;
    size_t size = bytes;
    const auto fit = free_.lower_bound(bytes);
    if (fit != free_.end() && fit->first <= bytes + bytes / 4) {
      size = fit->first;
      block = fit->second;
      free_.erase(fit);
      cached_ -= size;
    }
    most_ = std::max(most_, used_ + size);
    if (block == nullptr) {
      trim(most_ - used_ - size);
      block = std::aligned_alloc(kAlignment, size);
      STD_TORCH_CHECK(block != nullptr, "out of memory: a tensor needs ", bytes, " bytes");
    }
    used_ += size;
    size_of_[block] = size;
    return block;
  }

  void give_back(void* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = size_of_.find(block);
    const size_t size = found->second;
    size_of_.erase(found);
    used_ -= size;
    cached_ += size;
    free_.emplace(size, block);
    trim(most_ - used_);
  }

  // Gives everything that is not in use back to the system.
  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    trim(0);
    most_ = used_;
  }

  static constexpr size_t kAlignment = 4096;

 private:
  // Frees cached blocks, the largest first, until at most `bytes` are cached.
  void trim(size_t bytes) {
    while (cached_ > bytes) {
      const auto last = std::prev(free_.end());
      std::free(last->second);
      cached_ -= last->first;
      free_.erase(last);
    }
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  std::unordered_map<void*, size_t> size_of_;
  size_t used_ = 0, cached_ = 0, most_ = 0;
};

Pool& pool() {
  static Pool* const made = new Pool;  // never destroyed: tensors may outlive every other static
  return *made;
}

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
  bytes = (bytes + Pool::kAlignment - 1) / Pool::kAlignment * Pool::kAlignment;
  void (*give_back)(void*) = [](void* block) { pool().give_back(block); };
  return torch::stable::from_blob(pool().take(bytes), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype, give_back);
}

// release_memory() -> ()
void release_memory() { pool().clear(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fqt_cpu, m) {
  m.def("empty(int[] sizes, ScalarType dtype) -> Tensor");
  m.def("release_memory() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fqt_cpu, CompositeExplicitAutograd, m) {
  m.impl("empty", TORCH_BOX(&empty));
  m.impl("release_memory", TORCH_BOX(&release_memory));
}

}  // namespace fqt
