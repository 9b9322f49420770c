// The choice of the instruction set at run time, and the operators of fqt_cpu that tell and limit it.

#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace fqt {
namespace {

int best() {
#if defined(FQT_X86)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vnni");
  return avx512 ? 2 : __builtin_cpu_supports("avx2") ? 1 : 0;
#elif defined(FQT_ARM)
  return 1;
#else
  return 0;
#endif
}

int asked() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string name = capability == nullptr ? "" : capability;
  return name == "default" ? 0 : name == "avx2" ? 1 : 2;
}

const int kServes = std::min(best(), asked());
int limit = 2;  // tests and benchmarks lower it

std::string instruction_set() {
#if defined(FQT_ARM)
  const char* const names[] = {"portable", "neon"};
#else
  const char* const names[] = {"portable", "avx2", "avx512"};
#endif
  return names[isa()];
}

// Returns what is used then.
int64_t limit_isa(int64_t level) {
  limit = static_cast<int>(level);
  return isa();
}

}  // namespace

int isa() { return std::min(kServes, limit); }

STABLE_TORCH_LIBRARY_FRAGMENT(fqt_cpu, m) {
  m.def("instruction_set() -> str");
  m.def("limit_isa(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fqt_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("limit_isa", TORCH_BOX(&limit_isa));
}

}  // namespace fqt
