// The operator fqt_cpu::quantize, on LibTorch's stable ABI (one binary for torch 2.11 and newer): how a tensor is cut into
// tasks and which groups pruning keeps. The loops are in quantize.h.

#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <optional>
#include <string>
#include <utility>

namespace fqt {

void parallel(int64_t items, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (items > grain) {
    torch::stable::parallel_for(0, items, grain, body);
  } else if (items > 0) {
    body(0, items);
  }
}

namespace {

using torch::stable::Tensor;

constexpr int64_t kTask = 32768;  // elements below which another thread does not pay

int64_t tasks_of(int64_t elements) { return std::max<int64_t>(1, kTask / std::max<int64_t>(1, elements)); }

// --- how a tensor is cut -----------------------------------------------------------------------------------------------------

// (N, P, C) with strides counted in elements.
struct View {
  const void* data = nullptr;
  bool bfloat16 = false;
  int64_t n = 0, p = 0, c = 0, sn = 0, sp = 0, sc = 0;
};

View view(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3, "expected a tensor of three axes, got ", t.dim());
  const bool bfloat16 = t.scalar_type() == torch::headeronly::ScalarType::BFloat16;
  const int64_t step = t.size(2) == 1 ? 1 : t.stride(2);
  return {t.const_data_ptr(), bfloat16, t.size(0), t.size(1), t.size(2), t.stride(0), t.stride(1), step};
}

// Whether samples and positions can be counted as one axis.
bool merges(const View& x) { return x.n == 1 || x.p == 1 || x.sn == x.p * x.sp; }

// The axes' sizes and strides as (images, rows, columns).
Source source(const View& x, bool channels_inside, bool merged) {
  const int64_t rows = channels_inside ? x.sp : x.sc, columns = channels_inside ? x.sc : x.sp;
  return {x.data, x.bfloat16, {merged ? 0 : x.sn, merged && x.p == 1 ? x.sn : rows, columns}};
}

// axes: as in fqt/formats.py. in_order: rows follow each other in the order of a group's elements, whatever memory is like.
Plan plan(const View& x, const View* fold, const std::string& axes, int64_t storage, bool stochastic, bool in_order) {
  const int64_t n = x.n, p = x.p, c = x.c;
  const bool by_channel = axes == "C" || axes == "NC", tensor = axes.empty(), channel = axes == "C";
  bool inside = x.sc == 1 || c == 1 || x.sp != 1 || p == 1;
  // random numbers come four to a counter: it must not begin within a row that is packed across
  if (!inside && !by_channel && stochastic && axes != "NP" && c % 4 != 0) inside = true;
  if (in_order) inside = !by_channel;
  const bool merged = inside && (tensor || channel) && merges(x) && (fold == nullptr || merges(*fold));
  STD_TORCH_CHECK(!channel || in_order || n == 1 || merged || p % 8 == 0, "codes of a channel begin within a byte");

  Plan made;
  made.x = source(x, inside, merged);
  if (fold != nullptr) made.fold = source(*fold, inside, merged);
  made.images = merged ? 1 : n;
  made.rows = inside ? (merged ? n * p : p) : c;
  made.columns = made.last = made.inner = inside ? c : p;
  made.along = inside != by_channel;
  const int64_t bytes = (c * storage + 7) / 8, mask_bytes = (c + 7) / 8;
  // (image, row, column), the latter two exchanged where positions are inside
  const auto at = [&](int64_t image, int64_t position, int64_t in_channel) {
    return inside ? Affine{image, position, in_channel} : Affine{image, in_channel, position};
  };
  made.mask = at(p * mask_bytes, mask_bytes, 0);
  if (by_channel) {
    made.parts = inside ? Parts::columns : Parts::rows;
    const int64_t row = ((channel ? n * p : p) * storage + 7) / 8;
    made.group = channel ? at(0, 0, 1) : at(1, 0, n);
    made.element = channel ? at(p, 1, 0) : at(0, 1, 0);
    made.byte = channel ? at(p * storage / 8, 0, row) : at(row, 0, n * row);
  } else {
    made.parts = axes == "NP" ? (inside ? Parts::rows : Parts::columns) : Parts::whole;
    made.group = tensor ? Affine{} : axes == "NP" ? at(p, 1, 0) : at(1, 0, 0);
    made.element = axes == "NP" ? at(0, 0, 1) : at(tensor ? p * c : 0, c, 1);
    made.byte = at(p * bytes, bytes, 0);
  }
  made.direct = !x.bfloat16 && fold == nullptr && made.x.stride.column == 1;
  made.row_step = made.x.stride.row;
  made.extent = (n - 1) * x.sn + (p - 1) * x.sp + (c - 1) * x.sc + 1;

  // rows whose codes follow each other without a gap are cut anew, into rows that are long but not too long
  constexpr int64_t kColumns = 4096;
  const int64_t elements = made.rows * made.columns;
  const bool dense = made.parts == Parts::whole && made.along && !in_order && (made.rows == 1 || c % 8 == 0);
  if (dense && (!made.direct || made.rows == 1 || made.x.stride.row == made.columns)) {
    made.rows = (elements + kColumns - 1) / kColumns;
    made.columns = made.row_step = kColumns;
    made.last = elements - (made.rows - 1) * kColumns;
    made.element.row = kColumns;
    made.byte.row = kColumns * storage / 8;
    made.mask.row = kColumns / 8;
  }
  return made;
}

// --- activation gradient pruning ---------------------------------------------------------------------------------------------

// What `fqt.reference.keep_groups` multiplies each group by, 0 where it is pruned, in the same exact arithmetic.
void factors(const std::vector<float>& lows, const std::vector<float>& highs, bool topk, int64_t b, uint64_t key,
             uint32_t stream, std::vector<float>& factor) {
  const int64_t groups = static_cast<int64_t>(lows.size());
  std::vector<double> span(groups);
  std::vector<bool> bad(groups);
  double widest = 0.0;
  for (int64_t g = 0; g < groups; ++g) {
    const float high = highs[g] < 0 ? 0.0f : highs[g], low = lows[g] > 0 ? 0.0f : lows[g];
    bad[g] = !(std::fabs(high - low) < kInfinity);
    span[g] = topk ? (bad[g] ? kInfinity : std::max(high, -low)) : bad[g] ? 0.0f : high - low;
    widest = std::max(widest, span[g]);
  }
  if (topk) {
    std::vector<int64_t> order(groups);
    for (int64_t g = 0; g < groups; ++g) order[g] = g;
    const int64_t kept = std::min(groups, std::max<int64_t>(1, groups / b));
    std::nth_element(order.begin(), order.begin() + (kept - 1), order.end(),
                     [&](int64_t a, int64_t c) { return span[a] != span[c] ? span[a] > span[c] : a < c; });
    for (int64_t g = 0; g < groups; ++g) factor[g] = bad[g] ? 1.0f : 0.0f;
    for (int64_t i = 0; i < kept; ++i) factor[order[i]] = 1.0f;
    return;
  }
  constexpr double kOne = 1 << 24;  // the probability 1
  std::vector<int64_t> range(groups), heap;
  int64_t rest = 0;
  for (int64_t g = 0; g < groups; ++g) {
    range[g] = span[g] > 0 ? std::max<int64_t>(1, static_cast<int64_t>(span[g] * (0x1p30 / widest))) : 0;
    rest += range[g];
  }
  heap = range;
  std::make_heap(heap.begin(), heap.end());
  // the k widest are kept for sure, with the least k for which no other's probability exceeds 1
  const double budget = std::max(static_cast<double>(groups << 24) / static_cast<double>(b), kOne);
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
  std::vector<float> u24(groups);
  FQT_KERNEL(draws)(key, stream, groups, u24.data());
  for (int64_t g = 0; g < groups; ++g) {
    double threshold = 0.0;
    if (range[g] > 0) threshold = std::min(std::max(std::nearbyint(static_cast<double>(range[g]) * share), 1.0), kOne);
    if (bad[g] || (k > 0 && range[g] >= narrowest_sure)) threshold = kOne;
    factor[g] = u24[g] < threshold ? static_cast<float>(kOne / threshold) : 0.0f;
  }
}

// --- the operator ------------------------------------------------------------------------------------------------------------

// Numbers of some slots, or of all groups.
struct Numbers {
  std::vector<float> low, high, mean, scale, inverse, offset;
  std::vector<uint8_t> keep;
  explicit Numbers(int64_t count)
      : low(count), high(count), mean(count), scale(count), inverse(count), offset(count), keep(count) {}
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
  int64_t groups, elements;  // elements of a group
  float *scale, *offset;     // offset may be null

  // Calls body(task, image, first row, end row) for all rows of all images.
  template <class Body>
  void for_rows(int64_t rows, const Body& body) const {
    const int64_t cuts = (plan.rows + rows - 1) / rows;
    parallel(plan.images * cuts, tasks_of(std::min(rows, plan.rows) * plan.columns), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % cuts * rows;
        body(i, i / cuts, first, std::min(plan.rows, first + rows));
      }
    });
  }

  void ranges(Numbers& all) const {
    const int64_t least_rows = plan.parts == Parts::columns ? plan.rows / 64 : 0;  // few partial results
    const int64_t rows = std::min(plan.rows, std::max({int64_t{1}, kTask / plan.columns, least_rows}));
    const int64_t cuts = (plan.rows + rows - 1) / rows, slots = plan.slots(rows);
    Numbers part(plan.images * cuts * slots);
    for_rows(rows, [&](int64_t task, int64_t image, int64_t first, int64_t end) {
      FQT_KERNEL(range)(plan, image, first, end, part.low.data() + task * slots, part.high.data() + task * slots);
    });
    std::fill(all.low.begin(), all.low.end(), kInfinity);
    std::fill(all.high.begin(), all.high.end(), -kInfinity);
    for (int64_t task = 0; task < plan.images * cuts; ++task) {
      const int64_t first = task % cuts * rows;
      const GroupOf group(plan, task / cuts, first);
      for (int64_t slot = 0; slot < plan.slots(std::min(rows, plan.rows - first)); ++slot) {
        float &low = all.low[group[slot]], &high = all.high[group[slot]];
        const float a = part.low[task * slots + slot], b = part.high[task * slots + slot];
        low = low != low || a != a ? kNaN : std::min(low, a);
        high = high != high || b != b ? kNaN : std::max(high, b);
      }
    }
  }

  float mean(int64_t group) const {
    return static_cast<float>(FQT_KERNEL(abs_sum)(ordered, group, 0, elements) / static_cast<double>(elements));
  }

  // A group that is large is cut into parts: subtrees of its sum.
  void means(Numbers& all) const {
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

  void calibrate(Numbers& n, int64_t count) const {
    FQT_KERNEL(calibrate)(calibration, count, n.low.data(), n.high.data(), n.mean.data(), n.scale.data(), n.slots());
  }

  // Whether images can be done one by one, each while it is in the cache: groups lie within an image, and threads find enough.
  bool by_image() const {
    return (plan.group.image != 0 || plan.images == 1) &&
           (plan.rows * plan.columns <= kTask || plan.images >= 4 * torch::stable::get_num_threads());
  }

  // Room for the slots of an image; where codes run across, lanes are columns even if all have one scale.
  int64_t room() const { return std::max(plan.slots(plan.rows), plan.along ? 0 : plan.columns); }

  void encode_image_by_image() const {
    const int64_t slots = plan.slots(plan.rows);
    parallel(plan.images, tasks_of(plan.rows * plan.columns), [&](int64_t begin, int64_t end) {
      constexpr int64_t kBatch = 16;  // images whose numbers are written together: by (C, N) they share cache lines
      Numbers n(room());
      std::vector<float> scales(kBatch * slots), offsets(kBatch * slots);
      for (int64_t image = begin; image < end; ++image) {
        const GroupOf group(plan, image, 0);
        const int64_t done = (image - begin) % kBatch;
        if (calibration.range == Range::absmean && plan.parts == Parts::whole) {
          n.mean[0] = mean(group[0]);
        } else {
          FQT_KERNEL(range)(plan, image, 0, plan.rows, n.low.data(), n.high.data());
        }
        calibrate(n, slots);
        std::copy_n(n.scale.data(), slots, scales.data() + done * slots);
        std::copy_n(n.offset.data(), slots, offsets.data() + done * slots);
        encode(image, 0, plan.rows, n, false);
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

  // Returns whether there was a NaN, if asked to look.
  bool encode_all(const Numbers& all, bool look_for_nan) const {
    const int64_t step = plan.along ? 1 : kLineBits / encoding.storage;
    const int64_t rows = (std::max<int64_t>(1, kTask / plan.columns) + step - 1) / step * step;
    std::atomic<bool> nan = false;
    for_rows(rows, [&](int64_t, int64_t image, int64_t first, int64_t end) {
      thread_local Numbers n(0);
      if (static_cast<int64_t>(n.keep.size()) < room()) n = Numbers(room());
      const GroupOf group(plan, image, first);
      for (int64_t slot = 0; slot < plan.slots(end - first); ++slot) {
        n.inverse[slot] = all.inverse[group[slot]];
        n.offset[slot] = all.offset[group[slot]];
        n.keep[slot] = all.keep[group[slot]];
      }
      if (encode(image, first, end, n, look_for_nan)) nan = true;
    });
    return nan;
  }

  bool encode(int64_t image, int64_t first, int64_t end, Numbers& n, bool look_for_nan) const {
    if (!plan.along && plan.parts != Parts::columns) {
      std::fill(n.inverse.begin() + 1, n.inverse.end(), n.inverse[0]);
      std::fill(n.offset.begin() + 1, n.offset.end(), n.offset[0]);
      std::fill(n.keep.begin() + 1, n.keep.end(), n.keep[0]);
    }
    return FQT_KERNEL(encode)(plan, encoding, image, first, end, n.slots(), look_for_nan);
  }
};

// x * fold, dense: where a channel's codes begin within a byte.
std::vector<float> dense(View& x, const View* fold) {
  std::vector<float> copied(x.n * x.p * x.c);
  for (int64_t n = 0, i = 0; n < x.n; ++n) {
    for (int64_t p = 0; p < x.p; ++p) {
      for (int64_t c = 0; c < x.c; ++c, ++i) {
        const int64_t at = n * x.sn + p * x.sp + c * x.sc;
        if (x.bfloat16) {
          const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(x.data)[at]) << 16;
          std::memcpy(&copied[i], &bits, 4);
        } else {
          copied[i] = static_cast<const float*>(x.data)[at];
        }
        if (fold != nullptr) copied[i] *= static_cast<const float*>(fold->data)[n * fold->sn + p * fold->sp + c * fold->sc];
      }
    }
  }
  x = {copied.data(), false, x.n, x.p, x.c, x.p * x.c, x.c, 1};
  return copied;
}

// What codes mean, as fqt.formats.Format says it.
struct Meaning {
  bool sign, unsigned_codes, fixed;
  int64_t storage;
  double low, high;  // smallest and largest code

  Meaning(const std::string& grid, int64_t bits)
      : sign(grid == "sign"),
        unsigned_codes(grid == "uint"),
        fixed(grid == "fixed"),
        storage(bits <= 2 ? bits : bits <= 4 ? 4 : bits <= 8 ? 8 : bits <= 16 ? 16 : 32) {
    const double half = std::ldexp(1.0, static_cast<int>(bits) - 1);
    high = unsigned_codes ? 2 * half - 1 : std::max(half - 1, fixed ? 0.0 : 1.0);
    low = unsigned_codes ? 0.0 : fixed ? -half : -high;
  }
};

uint64_t number(const std::optional<Tensor>& key) {
  return key ? static_cast<uint64_t>(*key->const_data_ptr<int64_t>()) : 0;
}

float* floats(const std::optional<Tensor>& t) { return t ? t->mutable_data_ptr<float>() : nullptr; }

// How a job's codes are rounded and where they are written.
Encoding encoding(const Meaning& meaning, bool stochastic, uint64_t key, int64_t stream, uint8_t* codes) {
  return {meaning.sign ? Grid::sign : Grid::uniform,
          static_cast<int>(meaning.storage),
          meaning.low,
          meaning.high,
          stochastic && !meaning.sign,
          key,
          static_cast<uint32_t>(stream),
          codes,
          nullptr,
          0.0f,
          0.0f};
}

Range range_of(const std::string& calibrate) {
  return calibrate == "none"     ? Range::none
         : calibrate == "minmax" ? Range::minmax
         : calibrate == "absmax" ? Range::absmax
                                 : Range::absmean;
}

// A tensor and its folded factor, cut into a job's tasks. `copied` holds x * fold where codes of a channel begin within a byte.
struct Input {
  View from, factor;
  std::vector<float> copied;
  const View* folded;

  Input(const Tensor& x, const std::optional<Tensor>& fold)
      : from(view(x)), factor(fold ? view(*fold) : View{}), folded(fold ? &factor : nullptr) {}
  Input(const Input&) = delete;

  void cut(Job& job, const std::string& axes, int64_t storage, bool stochastic) {
    if (axes == "C" && from.n > 1 && from.p % 8 != 0 && !(merges(from) && (folded == nullptr || merges(factor)))) {
      copied = dense(from, folded);
      folded = nullptr;
    }
    job.plan = plan(from, folded, axes, storage, stochastic, false);
    job.ordered = plan(from, folded, axes, storage, false, true);
  }
};

// The names and values that tell how groups are calibrated and pruned.
struct Asked {
  std::string calibrate;
  double first, last;
  std::string prune;
  int64_t keep_one_in, stream;
  uint64_t key;
  bool pruned() const { return !prune.empty(); }
};

// The numbers of all groups: ranges, given or found, and what follows from them. Returns what pruning multiplies each group by.
std::vector<float> calibrate_all(const Job& job, const Asked& asked, const std::optional<Tensor>& low,
                                 const std::optional<Tensor>& high, bool range_is_given, Numbers& all,
                                 const std::optional<Tensor>& index) {
  const bool empty = job.elements == 0, mean = job.calibration.range == Range::absmean;
  if (low) {
    std::copy_n(low->const_data_ptr<float>(), job.groups, all.low.data());
    std::copy_n(high->const_data_ptr<float>(), job.groups, all.high.data());
  } else if (!empty && !range_is_given && (!mean || asked.pruned())) {  // a mean shows what is not finite as a range does
    job.ranges(all);
  }
  if (mean && !empty) job.means(all);
  job.calibrate(all, job.groups);
  std::vector<float> factor(job.groups, 1.0f);
  if (asked.pruned()) {
    const uint32_t draws = static_cast<uint32_t>(asked.stream + 1);
    factors(all.low, all.high, asked.prune == "topk", asked.keep_one_in, asked.key, draws, factor);
    int32_t* kept = index->mutable_data_ptr<int32_t>();
    std::fill(kept, kept + job.groups, -1);
    for (int64_t g = 0; g < job.groups; ++g) {
      if (factor[g] > 0) *kept++ = static_cast<int32_t>(g);
      all.keep[g] &= factor[g] > 0;
    }
  }
  return factor;
}

Job job_of(const Tensor& x, const Meaning& meaning, const Asked& asked, int64_t groups, bool offset) {
  Job job;
  job.calibration = {range_of(asked.calibrate),         static_cast<float>(asked.first), static_cast<float>(asked.last),
                     static_cast<float>(meaning.low), static_cast<float>(meaning.high), offset,
                     meaning.fixed};
  job.groups = groups;
  job.elements = x.numel() / groups;
  job.scale = job.offset = nullptr;
  return job;
}

// Calibrate and encode in one: image by image where groups lie within one, and without a read for a range that is given.
void quantize(Tensor x, std::optional<Tensor> fold, std::optional<Tensor> key, std::optional<Tensor> low,
              std::optional<Tensor> high, std::string grid, int64_t bits, std::string axes, std::string calibrate,
              double first, double last, bool stochastic, std::string prune, int64_t keep_one_in, int64_t stream,
              double pass_low, double pass_high, Tensor codes, Tensor scale, std::optional<Tensor> offset,
              std::optional<Tensor> index, std::optional<Tensor> mask) {
  if (scale.numel() == 0) return;
  const Meaning meaning(grid, bits);
  const Asked asked{calibrate, first, last, prune, keep_one_in, stream, number(key)};
  Input input(x, fold);
  Job job = job_of(x, meaning, asked, scale.numel(), offset.has_value());
  job.encoding = encoding(meaning, stochastic, asked.key, stream, static_cast<uint8_t*>(codes.mutable_data_ptr()));
  job.encoding.pass_low = static_cast<float>(pass_low);
  job.encoding.pass_high = static_cast<float>(pass_high);
  job.scale = scale.mutable_data_ptr<float>();
  job.offset = floats(offset);

  const bool empty = job.elements == 0;
  if (mask && !empty) {  // in the same read as the codes where both come from x, row by row
    Job other = job;
    job.encoding.mask = mask->mutable_data_ptr<uint8_t>();
    if (fold || axes == "C" || axes == "NC") {
      other.encoding.mask = std::exchange(job.encoding.mask, nullptr);
      other.encoding.codes = nullptr;
      other.plan = plan(input.from, nullptr, "", 1, false, false);
      other.encode_all(Numbers(1), false);
    }
  }
  if (!empty) input.cut(job, axes, meaning.storage, job.encoding.stochastic);

  const bool mean = job.calibration.range == Range::absmean;
  const bool range_is_given = job.calibration.range == Range::none && job.groups == 1 && !asked.pruned() && !low;
  if (!empty && !asked.pruned() && !range_is_given && !low && job.by_image() && (!mean || job.plan.parts == Parts::whole)) {
    return job.encode_image_by_image();
  }
  Numbers all(job.groups);
  const std::vector<float> factor = calibrate_all(job, asked, low, high, range_is_given, all, index);
  for (int64_t g = 0; g < job.groups; ++g) {
    const bool kept = !asked.pruned() || factor[g] > 0;
    job.scale[g] = kept ? all.scale[g] * factor[g] : 0.0f;
    if (offset) job.offset[g] = kept ? all.offset[g] * factor[g] : 0.0f;
  }
  if (!empty && job.encode_all(all, range_is_given)) {
    job.scale[0] = kNaN;
    if (offset) job.offset[0] = 0.0f;
    std::memset(job.encoding.codes, 0, codes.numel() * (meaning.storage <= 8 ? 1 : meaning.storage / 8));
  }
}

// What `encode` reads, and what pruning multiplies each group by, of fqt.qtensor.Scales.
void calibrate(Tensor x, std::optional<Tensor> fold, std::optional<Tensor> key, std::optional<Tensor> low,
               std::optional<Tensor> high, std::string grid, int64_t bits, std::string axes, std::string calibrate, double first,
               double last, std::string prune, int64_t keep_one_in, int64_t stream, Tensor scale, Tensor inverse,
               std::optional<Tensor> offset, std::optional<Tensor> factor, std::optional<Tensor> index) {
  if (scale.numel() == 0) return;
  const Meaning meaning(grid, bits);
  const Asked asked{calibrate, first, last, prune, keep_one_in, stream, number(key)};
  Input input(x, fold);
  Job job = job_of(x, meaning, asked, scale.numel(), offset.has_value());
  if (job.elements != 0) input.cut(job, axes, meaning.storage, false);
  Numbers all(job.groups);
  const std::vector<float> multiplied = calibrate_all(job, asked, low, high, false, all, index);
  std::copy_n(all.scale.data(), job.groups, scale.mutable_data_ptr<float>());
  std::copy_n(all.inverse.data(), job.groups, inverse.mutable_data_ptr<float>());
  if (offset) std::copy_n(all.offset.data(), job.groups, floats(offset));
  if (factor) std::copy_n(multiplied.data(), job.groups, floats(factor));
}

// Codes by scales from anywhere. With a key rounding is stochastic. A group whose scale is NaN, or whose factor is 0, has bits 0.
void encode(Tensor x, std::optional<Tensor> fold, std::optional<Tensor> key, Tensor scale, Tensor inverse,
            std::optional<Tensor> offset, std::optional<Tensor> factor, std::string grid, int64_t bits, std::string axes,
            int64_t stream, Tensor codes) {
  if (x.numel() == 0) return;
  const Meaning meaning(grid, bits);
  Input input(x, fold);
  Job job = job_of(x, meaning, {"none", -1.0, 1.0, "", 1, stream, number(key)}, scale.numel(), offset.has_value());
  job.encoding = encoding(meaning, key.has_value(), number(key), stream, static_cast<uint8_t*>(codes.mutable_data_ptr()));
  input.cut(job, axes, meaning.storage, job.encoding.stochastic);
  Numbers all(job.groups);
  for (int64_t g = 0; g < job.groups; ++g) {
    const float of_group = scale.const_data_ptr<float>()[g];
    all.inverse[g] = inverse.const_data_ptr<float>()[g];
    all.offset[g] = offset ? floats(offset)[g] : 0.0f;
    all.keep[g] = of_group == of_group && (!factor || floats(factor)[g] > 0);
  }
  job.encode_all(all, false);
}

}  // namespace

STABLE_TORCH_LIBRARY(fqt_cpu, m) {
  m.def(
      "quantize(Tensor x, Tensor? fold, Tensor? key, Tensor? low, Tensor? high, str grid, int bits, str axes, str calibrate,"
      " float first, float last, bool stochastic, str prune, int keep_one_in, int stream, float pass_low, float pass_high,"
      " Tensor(a!) codes, Tensor(b!) scale, Tensor(c!)? offset, Tensor(d!)? index, Tensor(e!)? mask) -> ()");
  m.def(
      "calibrate(Tensor x, Tensor? fold, Tensor? key, Tensor? low, Tensor? high, str grid, int bits, str axes, str calibrate,"
      " float first, float last, str prune, int keep_one_in, int stream, Tensor(a!) scale, Tensor(b!) inverse,"
      " Tensor(c!)? offset, Tensor(d!)? factor, Tensor(e!)? index) -> ()");
  m.def(
      "encode(Tensor x, Tensor? fold, Tensor? key, Tensor scale, Tensor inverse, Tensor? offset, Tensor? factor, str grid,"
      " int bits, str axes, int stream, Tensor(a!) codes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fqt_cpu, CompositeExplicitAutograd, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("calibrate", TORCH_BOX(&calibrate));
  m.impl("encode", TORCH_BOX(&encode));
}

}  // namespace fqt
