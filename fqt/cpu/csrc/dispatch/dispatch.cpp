// The choice of the instruction set at run time, and the operators of fqt_cpu that tell and limit it.

#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <string>

namespace fqt {
namespace {

#define FQT_NAME(set, runs) #set,
#define FQT_RUNS(set, runs) static_cast<bool>(runs),
const char* const kNames[] = {FQT_FOR_EACH_ISA(FQT_NAME)};

int best() {
  const bool runs[] = {FQT_FOR_EACH_ISA(FQT_RUNS)};
  int last = static_cast<int>(std::size(runs)) - 1;
  while (!runs[last]) --last;
  return last;
}

int asked() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string name = capability == nullptr ? "" : capability;
  if (name == "default") return 0;  // torch's word for the portable set
  const auto found = std::find(std::begin(kNames), std::end(kNames), name);
  return static_cast<int>(std::min(found, std::end(kNames) - 1) - std::begin(kNames));  // the best set if it names none
}

const int kServes = std::min(best(), asked());
int limit = static_cast<int>(std::size(kNames)) - 1;  // tests and benchmarks lower it

std::string instruction_set() { return kNames[isa()]; }

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
