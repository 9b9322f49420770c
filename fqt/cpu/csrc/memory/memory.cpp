// fqt_cpu::empty: large tensors from memory that is used again. The system hands out zeroed pages one fault at a time, which
// for a tensor of tens of megabytes costs several times as much as writing it; torch's CPU allocator gives such memory back to
// the system with every tensor that dies. Freed blocks stay here, at most twice the bytes that were once in use together.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace fqt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

class Pool {
 public:
  static constexpr size_t kAlignment = 4096;

  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto fit = free_.end();
    for (auto i = free_.begin(); i != free_.end(); ++i) {
      if (i->size >= bytes && i->size <= bytes + bytes / 4 && (fit == free_.end() || i->size < fit->size)) fit = i;
    }
    Block block{nullptr, bytes};
    if (fit != free_.end()) {
      block = *fit;
      free_.erase(fit);
      cached_ -= block.size;
    } else {
      block.data = std::aligned_alloc(kAlignment, bytes);
      STD_TORCH_CHECK(block.data != nullptr, "out of memory: a tensor needs ", bytes, " bytes");
    }
    used_ += block.size;
    most_ = std::max(most_, used_);
    size_of_[block.data] = block.size;
    return block.data;
  }

  void give_back(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = size_of_.find(data);
    free_.push_back({data, found->second});
    used_ -= found->second;
    cached_ += found->second;
    size_of_.erase(found);
    trim(2 * most_);
  }

 private:
  struct Block {
    void* data;
    size_t size;
  };

  // Frees cached blocks, the longest unused first, until at most `bytes` are cached.
  void trim(size_t bytes) {
    while (cached_ > bytes) {
      std::free(free_.front().data);
      cached_ -= free_.front().size;
      free_.pop_front();
    }
  }

  std::mutex mutex_;
  std::list<Block> free_;
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fqt_cpu, m) {
  m.def("empty(int[] sizes, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fqt_cpu, CompositeExplicitAutograd, m) {
  m.impl("empty", TORCH_BOX(&empty));
}

}  // namespace fqt
