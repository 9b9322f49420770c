#include "pool.h"

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>
#include <unordered_map>

namespace fqt {
namespace {

class Pool {
 public:
  void* take(size_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
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
      block.data = std::aligned_alloc(kPage, bytes);
      if (block.data == nullptr) return nullptr;
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

}  // namespace

void* take_block(size_t bytes) { return pool().take(bytes); }

void give_block_back(void* block) { pool().give_back(block); }

}  // namespace fqt
