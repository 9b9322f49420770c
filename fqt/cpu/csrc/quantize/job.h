// Calibrating and encoding a tensor that has been cut: which threads do what, and whose numbers go where.
#pragma once

#include "isa.h"
#include "prune.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <optional>
#include <vector>

namespace fqt {

constexpr int64_t kTask = 32768;  // elements below which another thread does not pay

inline int64_t tasks_of(int64_t elements) { return std::max<int64_t>(1, kTask / std::max<int64_t>(1, elements)); }

// Numbers of some slots, or of all groups.
struct Numbers {
  std::vector<float> low, high, mean, scale, inverse, offset;
  std::vector<uint8_t> keep;
  explicit Numbers(int64_t count)
      : low(count), high(count), mean(count), scale(count), inverse(count), offset(count), keep(count) {}
  Statistics statistics() const { return {low.data(), high.data(), mean.data()}; }
  Slots slots() { return {inverse.data(), offset.data(), keep.data()}; }
};

// The groups of an image's slots from a row on.
struct GroupOf {
  int64_t first, step;
  GroupOf(const Plan& p, int64_t image, int64_t row)
      : first(p.group.at(image, p.parts == Parts::rows ? row : 0, 0)),
        step(p.parts == Parts::rows ? p.group.row : p.group.column) {}
  int64_t operator[](int64_t slot) const { return first + slot * step; }
};

struct Job {
  Plan plan, ordered;  // ordered: for means
  Encoding encoding;
  Calibration calibration;
  Pruning pruning;
  int64_t groups, elements;                     // elements of a group; if it has none there are no plans
  const float *low = nullptr, *high = nullptr;  // ranges of all groups, where they are known

  bool empty() const { return elements == 0; }
  bool pruned() const { return !pruning.mode.empty(); }
  bool by_mean() const { return calibration.range == Range::absmean; }

  // Whether only a NaN is left to find out about the one range, which encoding sees.
  bool range_is_fixed() const {
    return calibration.range == Range::none && groups == 1 && !pruned() && low == nullptr;
  }

  // Whether images can be calibrated and encoded one by one, each while it is in the cache: groups lie within an image, and
  // there are enough images for the threads.
  bool by_image() const {
    return !empty() && !pruned() && !range_is_fixed() && low == nullptr && (!by_mean() || plan.parts == Parts::whole) &&
           (plan.group.image != 0 || plan.images == 1) &&
           (plan.rows * plan.columns <= kTask || plan.images >= 4 * torch::stable::get_num_threads());
  }

  // Fills the numbers of all groups. Returns what pruning multiplies each group by.
  std::vector<float> calibrate(Numbers& all) const {
    if (low != nullptr) {
      std::copy_n(low, groups, all.low.data());
      std::copy_n(high, groups, all.high.data());
    } else if (!empty() && (!by_mean() || pruned())) {  // a mean shows what is not finite as well as a range does
      find_ranges(all);
    }
    if (by_mean() && !empty()) find_means(all);
    take_ranges(all, groups);
    if (!pruned()) return std::vector<float>(groups, 1.0f);
    std::vector<float> factor = factors(all.low, all.high, pruning);
    for (int64_t g = 0; g < groups; ++g) all.keep[g] &= factor[g] > 0;
    return factor;
  }

  // The numbers of slots or groups whose ranges are known.
  void take_ranges(Numbers& n, int64_t count) const {
    FQT_KERNEL(calibrate)(calibration, count, n.statistics(), n.scale.data(), n.slots());
  }

  // Returns whether there was a NaN, if asked to look.
  bool encode(const Numbers& all, bool look_for_nan) const {
    const int64_t step = plan.along ? 1 : kLineBits / encoding.storage;
    const int64_t rows = (std::max<int64_t>(1, kTask / plan.columns) + step - 1) / step * step;
    std::atomic<bool> nan = false;
    for_rows(rows, [&](int64_t, const Rows& at) {
      thread_local Numbers n(0);
      if (static_cast<int64_t>(n.keep.size()) < room()) n = Numbers(room());
      const GroupOf group(plan, at.image, at.first);
      for (int64_t slot = 0; slot < plan.slots(at.end - at.first); ++slot) {
        n.inverse[slot] = all.inverse[group[slot]];
        n.offset[slot] = all.offset[group[slot]];
        n.keep[slot] = all.keep[group[slot]];
      }
      if (encode_rows(at, n, look_for_nan)) nan = true;
    });
    return nan;
  }

  // Calibrates and encodes image by image. offset: null if the format has none.
  void encode_image_by_image(float* scale, float* offset) const {
    const int64_t slots = plan.slots(plan.rows);
    parallel(plan.images, tasks_of(plan.rows * plan.columns), [&](int64_t begin, int64_t end) {
      constexpr int64_t kBatch = 16;  // images whose numbers are written together: by (C, N) they share cache lines
      Numbers n(room());
      std::vector<float> scales(kBatch * slots), offsets(kBatch * slots);
      for (int64_t image = begin; image < end; ++image) {
        const GroupOf group(plan, image, 0);
        const Rows all{image, 0, plan.rows};
        if (by_mean()) {
          n.mean[0] = mean(group[0]);
        } else {
          FQT_KERNEL(range)(plan, all, n.low.data(), n.high.data());
        }
        take_ranges(n, slots);
        const int64_t done = (image - begin) % kBatch;
        std::copy_n(n.scale.data(), slots, scales.data() + done * slots);
        std::copy_n(n.offset.data(), slots, offsets.data() + done * slots);
        encode_rows(all, n, false);
        if (done + 1 < kBatch && image + 1 < end) continue;
        for (int64_t slot = 0; slot < slots; ++slot) {
          for (int64_t i = 0; i <= done; ++i) {
            const int64_t g = group[slot] - (done - i) * plan.group.image;
            scale[g] = scales[i * slots + slot];
            if (offset != nullptr) offset[g] = offsets[i * slots + slot];
          }
        }
      }
    });
  }

 private:
  // Calls body(task, its rows) for all rows of all images.
  template <class Body>
  void for_rows(int64_t rows, const Body& body) const {
    const int64_t cuts = (plan.rows + rows - 1) / rows;
    parallel(plan.images * cuts, tasks_of(std::min(rows, plan.rows) * plan.columns), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % cuts * rows;
        body(i, Rows{i / cuts, first, std::min(plan.rows, first + rows)});
      }
    });
  }

  void find_ranges(Numbers& all) const {
    const int64_t least_rows = plan.parts == Parts::columns ? plan.rows / 64 : 0;  // few partial results
    const int64_t rows = std::min(plan.rows, std::max({int64_t{1}, kTask / plan.columns, least_rows}));
    const int64_t cuts = (plan.rows + rows - 1) / rows, slots = plan.slots(rows);
    Numbers part(plan.images * cuts * slots);
    for_rows(rows, [&](int64_t task, const Rows& at) {
      FQT_KERNEL(range)(plan, at, part.low.data() + task * slots, part.high.data() + task * slots);
    });
    std::fill(all.low.begin(), all.low.end(), kInfinity);
    std::fill(all.high.begin(), all.high.end(), -kInfinity);
    for (int64_t task = 0; task < plan.images * cuts; ++task) {
      const int64_t first = task % cuts * rows;
      const GroupOf group(plan, task / cuts, first);
      for (int64_t slot = 0; slot < plan.slots(std::min(rows, plan.rows - first)); ++slot) {
        float &lowest = all.low[group[slot]], &highest = all.high[group[slot]];
        const float a = part.low[task * slots + slot], b = part.high[task * slots + slot];
        lowest = lowest != lowest || a != a ? kNaN : std::min(lowest, a);
        highest = highest != highest || b != b ? kNaN : std::max(highest, b);
      }
    }
  }

  float mean(int64_t group) const {
    return static_cast<float>(FQT_KERNEL(abs_sum)(ordered, group, 0, elements) / static_cast<double>(elements));
  }

  // A group that is large is cut into parts: subtrees of its sum.
  void find_means(Numbers& all) const {
    if (groups > 8 || elements <= kTask) {
      return parallel(groups, tasks_of(elements), [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) all.mean[g] = mean(g);
      });
    }
    const int64_t parts = (elements + kTask - 1) / kTask;
    std::vector<double> sums(groups * parts);
    parallel(groups * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % parts * kTask;
        sums[i] = FQT_KERNEL(abs_sum)(ordered, i / parts, first, std::min(kTask, elements - first));
      }
    });
    for (int64_t g = 0; g < groups; ++g) {
      double* sum = sums.data() + g * parts;
      for (int64_t n = parts; n > 1; n = (n + 1) / 2) {
        for (int64_t i = 0; i < n / 2; ++i) sum[i] = sum[2 * i] + sum[2 * i + 1];
        if (n % 2) sum[n / 2] = sum[n - 1];
      }
      all.mean[g] = static_cast<float>(sum[0] / static_cast<double>(elements));
    }
  }

  // Room for the slots of an image; where codes run across, lanes are columns even if all have one scale.
  int64_t room() const { return std::max(plan.slots(plan.rows), plan.along ? 0 : plan.columns); }

  bool encode_rows(const Rows& at, Numbers& n, bool look_for_nan) const {
    if (!plan.along && plan.parts != Parts::columns) {
      std::fill(n.inverse.begin() + 1, n.inverse.end(), n.inverse[0]);
      std::fill(n.offset.begin() + 1, n.offset.end(), n.offset[0]);
      std::fill(n.keep.begin() + 1, n.keep.end(), n.keep[0]);
    }
    return FQT_KERNEL(encode)(plan, encoding, at, n.slots(), look_for_nan);
  }
};

}  // namespace fqt
