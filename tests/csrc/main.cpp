// Checks every kernel of every instruction set that this machine runs, without torch: main [SEED [CASES a family]].
// A line a kernel; at the first difference it says what and where, and exits 1.

#include <malloc.h>

#include <functional>
#include <thread>

#include "check.h"

// The kernels' thread pool: pieces that must not depend on each other, one after the other from the last, or all at once.
void fqt::parallel(int64_t items, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(check::pieces, items / std::max<int64_t>(1, grain)));
  std::vector<std::thread> threads;
  for (int64_t i = count; i-- > 0;) {
    const int64_t begin = items * i / count, end = items * (i + 1) / count;
    if (begin == end) continue;
    if (count == 3) {
      threads.emplace_back(body, begin, end);
    } else {
      body(begin, end);
    }
  }
  for (std::thread& thread : threads) thread.join();
}

int main(int argc, char** argv) {
#if defined(M_PERTURB)
  mallopt(M_PERTURB, 0x5A);  // no kernel may rely on what new memory holds
#endif
  std::setbuf(stdout, nullptr);
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20240817;
  const int64_t cases = argc > 2 ? std::strtoll(argv[2], nullptr, 10) : 400;
  check::quantize(seed, cases);
  check::decode(seed, cases);
  check::products(seed, cases);
  check::integers(seed, cases);
  check::norm(seed, cases);
  for (const auto& [kernel, sets] : check::served) {
    std::printf("%-25s", kernel.c_str());
    for (const auto& [set, count] : sets) std::printf(" %s %lld,", set.c_str(), static_cast<long long>(count));
    std::printf(" ok\n");
  }
}
