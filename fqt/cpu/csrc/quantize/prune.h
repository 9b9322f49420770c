// Activation gradient pruning: `keep_groups` of fqt/reference/pruning.py, in the same exact arithmetic.
#pragma once

#include "isa.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

namespace fqt {

struct Pruning {
  std::string mode;  // "", "bernoulli" or "topk"
  int64_t keep_one_in;
  uint64_t key;
  uint32_t stream;  // of its random numbers
};

// Of each group how wide it is, and whether it is not finite: such a group is kept as it is.
struct Spans {
  std::vector<double> width;
  std::vector<bool> bad;

  Spans(const std::vector<float>& lows, const std::vector<float>& highs, bool topk) : width(lows.size()), bad(lows.size()) {
    for (size_t g = 0; g < lows.size(); ++g) {
      const float high = highs[g] < 0 ? 0.0f : highs[g], low = lows[g] > 0 ? 0.0f : lows[g];
      bad[g] = !(std::fabs(high - low) < kInfinity);
      width[g] = topk ? (bad[g] ? kInfinity : std::max(high, -low)) : bad[g] ? 0.0f : high - low;
    }
  }
};

// 1 for the groups of the largest magnitude, 0 for the others.
inline std::vector<float> topk_factors(const Spans& spans, int64_t b) {
  const std::vector<double>& width = spans.width;
  const int64_t groups = static_cast<int64_t>(width.size()), kept = std::min(groups, std::max<int64_t>(1, groups / b));
  std::vector<int64_t> order(groups);
  std::iota(order.begin(), order.end(), 0);
  std::nth_element(order.begin(), order.begin() + (kept - 1), order.end(),
                   [&](int64_t a, int64_t c) { return width[a] != width[c] ? width[a] > width[c] : a < c; });
  std::vector<float> factor(spans.bad.begin(), spans.bad.end());
  for (int64_t i = 0; i < kept; ++i) factor[order[i]] = 1.0f;
  return factor;
}

// 1 / p for the groups that are kept, with probability p by their width; 0 for the others.
inline std::vector<float> bernoulli_factors(const Spans& spans, const Pruning& pruning) {
  constexpr double kOne = 1 << 24;  // the probability 1
  const int64_t groups = static_cast<int64_t>(spans.width.size());
  const double widest = *std::max_element(spans.width.begin(), spans.width.end());
  std::vector<int64_t> range(groups);  // of 30 bits, so that sums are exact
  for (int64_t g = 0; g < groups; ++g) {
    const double width = spans.width[g];
    range[g] = width > 0 ? std::max<int64_t>(1, static_cast<int64_t>(width * (0x1p30 / widest))) : 0;
  }
  int64_t rest = std::accumulate(range.begin(), range.end(), int64_t{0});
  std::vector<int64_t> heap = range;
  std::make_heap(heap.begin(), heap.end());
  // the k widest are kept for sure, with the least k for which no other's probability exceeds 1
  const double budget = std::max(static_cast<double>(groups << 24) / static_cast<double>(pruning.keep_one_in), kOne);
  int64_t k = 0, narrowest_sure = 0;
  double left = budget;
  for (; k < groups; ++k) {
    left = std::max(budget - kOne * static_cast<double>(k), 0.0);
    if (left * static_cast<double>(heap.front()) <= kOne * static_cast<double>(rest)) break;
    narrowest_sure = heap.front();
    rest -= narrowest_sure;
    std::pop_heap(heap.begin(), heap.end() - k);
  }
  const double share = k < groups ? left / std::max(static_cast<double>(rest), 1.0) : 0.0;
  std::vector<float> u24(groups), factor(groups);
  FQT_KERNEL(draws)(pruning.key, pruning.stream, groups, u24.data());
  for (int64_t g = 0; g < groups; ++g) {
    double threshold = 0.0;
    if (range[g] > 0) threshold = std::min(std::max(std::nearbyint(static_cast<double>(range[g]) * share), 1.0), kOne);
    if (spans.bad[g] || (k > 0 && range[g] >= narrowest_sure)) threshold = kOne;
    factor[g] = u24[g] < threshold ? static_cast<float>(kOne / threshold) : 0.0f;
  }
  return factor;
}

// What each group is multiplied by, 0 where it is pruned. There is at least one group.
inline std::vector<float> factors(const std::vector<float>& lows, const std::vector<float>& highs, const Pruning& pruning) {
  const bool topk = pruning.mode == "topk";
  const Spans spans(lows, highs, topk);
  return topk ? topk_factors(spans, pruning.keep_one_in) : bernoulli_factors(spans, pruning);
}

}  // namespace fqt
