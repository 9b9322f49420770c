// The kernels of fqt/cuda_kernels as host code on the emulator, behind one function that a test calls by ctypes.
//
// Tensors are copied to memory of their own, which begins at a multiple of 16 bytes and ends, within 15, where a page ends that
// may not be touched; what lies between is noise.
#include <map>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

#include "tiles.h"

namespace gemm_mma {
#include "gemm_mma.cu"
}
namespace gemm_wgmma {
#include "gemm_wgmma.cu"
}
namespace planes {
#include "planes.cu"
}
namespace weight {
#include "weight.cu"
}

namespace {

template <typename T>
T argument(i64 value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

using Call = std::function<void(const i64*)>;

template <typename... T, size_t... kIndex>
Call call_of(void (*kernel)(T...), std::index_sequence<kIndex...>) {
  return [kernel](const i64* arguments) { kernel(argument<T>(arguments[kIndex])...); };
}

struct Entry {
  size_t arguments;
  Call call;
};

template <typename... T>
Entry entry(void (*kernel)(T...)) {
  return {sizeof...(T), call_of(kernel, std::index_sequence_for<T...>())};
}

// The instances that fqt/cuda_kernels/plan.py may choose.
#define INSTANCE(family, rows, columns, stages, unit)                                                \
  {                                                                                                  \
    #family " " #rows " " #columns " " #stages " " #unit, entry(+[](PRODUCT_ARGUMENTS) {             \
      family::gemm<rows, columns, stages, unit>(PRODUCT);                                            \
    })                                                                                               \
  }
#define INSTANCES(family, rows, columns, stages)                                                     \
  INSTANCE(family, rows, columns, stages, 4), INSTANCE(family, rows, columns, stages, 8),            \
      INSTANCE(family, rows, columns, stages, 16)

const std::map<std::string, Entry> kKernels = {
    INSTANCES(gemm_mma, 64, 64, 4),
    INSTANCES(gemm_mma, 128, 128, 3),
    INSTANCES(gemm_wgmma, 128, 128, 3),
    INSTANCES(gemm_wgmma, 128, 256, 4),
    {"planes_of_rows", entry(planes::planes_of_rows)},
    {"planes_of_columns", entry(planes::planes_of_columns)},
    {"sums_of_rows", entry(planes::sums_of_rows)},
    {"finish_weight", entry(weight::finish_weight)},
};

// A tensor's copy, between pages that may not be touched.
class Guarded {
 public:
  Guarded(void* tensor, size_t size, std::mt19937& random) : tensor_(tensor), size_(size) {
    const size_t page = sysconf(_SC_PAGESIZE);
    inner_ = (size + page - 1) / page * page;
    whole_ = inner_ + 2 * page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, whole_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + page, inner_, PROT_READ | PROT_WRITE);
    for (size_t i = 0; i < inner_; i += 4) {
      const uint32_t noise = random();
      std::memcpy(base_ + page + i, &noise, 4);
    }
    data = base_ + page + (inner_ - size) / 16 * 16;
    std::memcpy(data, tensor, size);
  }
  ~Guarded() {
    std::memcpy(tensor_, data, size_);
    munmap(base_, whole_);
  }
  uint8_t* data;

 private:
  void* tensor_;
  size_t size_, inner_, whole_;
  uint8_t* base_;
};

}  // namespace

// Instructions of the tensor cores that the last kernel needed.
extern "C" i64 instructions() { return emulator::instructions; }

// sizes[i]: bytes of the tensor that argument i points to, -1 where it is a number or null. Returns "" or what went wrong.
extern "C" const char* run(const char* name, i64 blocks, int slices, int threads, int shared, const i64* arguments,
                           const i64* sizes, int count, unsigned seed) {
  static std::string said;
  said.clear();
  const auto kernel = kKernels.find(name);
  if (kernel == kKernels.end()) return "no such kernel";
  if (static_cast<int>(kernel->second.arguments) != count) return "the number of arguments is wrong";
  std::mt19937 random(seed);
  std::vector<i64> passed(arguments, arguments + count);
  std::map<i64, std::unique_ptr<Guarded>> copies;
  for (int i = 0; i < count; ++i) {
    if (sizes[i] < 0) continue;
    auto& copy = copies[arguments[i]];
    if (!copy) copy = std::make_unique<Guarded>(reinterpret_cast<void*>(arguments[i]), sizes[i], random);
    passed[i] = reinterpret_cast<i64>(copy->data);
  }
  try {
    emulator::launch(blocks, slices, threads, shared, seed, [&] { kernel->second.call(passed.data()); });
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
