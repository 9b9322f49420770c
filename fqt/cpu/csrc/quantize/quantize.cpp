// The operators fqt_cpu::calibrate, encode, and quantize, which does both, on LibTorch's stable ABI (one binary for torch 2.11
// and newer). How a tensor is cut is in cut.h, what the threads do in job.h; the loops are in quantize.h.

#include "cut.h"
#include "job.h"
#include "nearest.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

// The codes of a format, as fqt.formats.Format has them.
struct CodeGrid {
  bool sign, fixed;
  int64_t storage;
  double low, high;  // smallest and largest code

  CodeGrid(const std::string& grid, int64_t bits)
      : sign(grid == "sign"),
        fixed(grid == "fixed"),
        storage(bits <= 2 ? bits : bits <= 4 ? 4 : bits <= 8 ? 8 : bits <= 16 ? 16 : 32) {
    const double half = std::ldexp(1.0, static_cast<int>(bits) - 1);
    high = grid == "uint" ? 2 * half - 1 : std::max(half - 1, fixed ? 0.0 : 1.0);
    low = grid == "uint" ? 0.0 : fixed ? -half : -high;
  }
};

uint64_t number(const std::optional<Tensor>& key) {
  return key ? static_cast<uint64_t>(*key->const_data_ptr<int64_t>()) : 0;
}

const float* read(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }
float* write(const std::optional<Tensor>& t) { return t ? t->mutable_data_ptr<float>() : nullptr; }

Calibration calibration_of(const std::string& calibrate, double first, double last, const CodeGrid& codes, bool offset) {
  return {.range = calibrate == "none"     ? Range::none
                   : calibrate == "minmax" ? Range::minmax
                   : calibrate == "absmax" ? Range::absmax
                                           : Range::absmean,
          .first = static_cast<float>(first),
          .last = static_cast<float>(last),
          .low_code = static_cast<float>(codes.low),
          .high_code = static_cast<float>(codes.high),
          .offset = offset,
          .fixed = codes.fixed};
}

// Without a mask. stochastic: nothing is drawn for signs.
Encoding encoding_of(const CodeGrid& codes, bool stochastic, const std::optional<Tensor>& key, int64_t stream, void* to) {
  return {.grid = codes.sign ? Grid::sign : Grid::uniform,
          .storage = static_cast<int>(codes.storage),
          .low = codes.low,
          .high = codes.high,
          .stochastic = stochastic && !codes.sign,
          .key = number(key),
          .stream = static_cast<uint32_t>(stream),
          .codes = static_cast<uint8_t*>(to)};
}

// Rounding draws from an even stream, pruning from the next.
Pruning pruning_of(std::string mode, int64_t keep_one_in, const std::optional<Tensor>& key, int64_t stream) {
  return {std::move(mode), keep_one_in, number(key), static_cast<uint32_t>(stream + 1)};
}

// The numbers of the kept groups, then -1.
void write_index(const std::vector<float>& factor, Tensor& index) {
  int32_t* kept = index.mutable_data_ptr<int32_t>();
  std::fill(kept, kept + factor.size(), -1);
  for (size_t g = 0; g < factor.size(); ++g) {
    if (factor[g] > 0) *kept++ = static_cast<int32_t>(g);
  }
}

// The estimator's mask: made by the job in the same read as the codes where both come from x, row by row, else by itself.
void add_mask(Job& job, const Input& input, bool folded, const Layout& layout, double low, double high, Tensor& mask) {
  job.encoding.pass_low = static_cast<float>(low), job.encoding.pass_high = static_cast<float>(high);
  job.encoding.mask = mask.mutable_data_ptr<uint8_t>();
  if (!folded && !layout.grouping.channel) return;
  Job other = job;
  job.encoding.mask = nullptr;
  other.encoding.codes = nullptr;
  other.plan = cut(input.values(), nullptr, {.grouping = {}, .storage = 1, .stochastic = false, .in_order = false});
  other.encode(Numbers(1), false);
}

void calibrate(Tensor x, std::optional<Tensor> fold, std::optional<Tensor> key, std::optional<Tensor> low,
               std::optional<Tensor> high, std::string grid, int64_t bits, std::string axes, std::string calibrate,
               double first, double last, std::string prune, int64_t keep_one_in, int64_t stream, Tensor scale, Tensor inverse,
               std::optional<Tensor> offset, std::optional<Tensor> factor, std::optional<Tensor> index) {
  if (scale.numel() == 0) return;
  const CodeGrid codes(grid, bits);
  Job job{.calibration = calibration_of(calibrate, first, last, codes, offset.has_value()),
          .pruning = pruning_of(prune, keep_one_in, key, stream),
          .groups = scale.numel(),
          .elements = x.numel() / scale.numel(),
          .low = read(low),
          .high = read(high)};
  Input input(x, fold);
  if (!job.empty()) {
    job.plan = input.cut({.grouping = Grouping(axes), .storage = codes.storage, .stochastic = false, .in_order = false});
    job.ordered = input.cut({.grouping = Grouping(axes), .storage = codes.storage, .stochastic = false, .in_order = true});
  }
  Numbers all(job.groups);
  const std::vector<float> factors = job.calibrate(all);
  std::copy_n(all.scale.data(), job.groups, scale.mutable_data_ptr<float>());
  std::copy_n(all.inverse.data(), job.groups, inverse.mutable_data_ptr<float>());
  if (offset) std::copy_n(all.offset.data(), job.groups, write(offset));
  if (factor) std::copy_n(factors.data(), job.groups, write(factor));
  if (index) write_index(factors, *index);
}

// By scales from anywhere; with a key rounding is stochastic. A group whose scale is NaN, or whose factor is 0, has bits 0.
// What code a NaN has elsewhere, one of x or the product of infinity and 0, is not specified: a calibration gives such a group
// scale NaN.
void encode(Tensor x, std::optional<Tensor> fold, std::optional<Tensor> key, Tensor scale, Tensor inverse,
            std::optional<Tensor> offset, std::optional<Tensor> factor, std::string grid, int64_t bits, std::string axes,
            int64_t stream, Tensor codes) {
  if (x.numel() == 0) return;
  const CodeGrid of(grid, bits);
  Job job{.encoding = encoding_of(of, key.has_value(), key, stream, codes.mutable_data_ptr()),
          .groups = scale.numel(),
          .elements = x.numel() / scale.numel()};
  Input input(x, fold);
  job.plan = input.cut({.grouping = Grouping(axes), .storage = of.storage, .stochastic = job.encoding.stochastic, .in_order = false});
  const float *scales = read(scale), *inverses = read(inverse), *offsets = read(offset), *factors = read(factor);
  Numbers all(job.groups);
  for (int64_t g = 0; g < job.groups; ++g) {
    all.inverse[g] = inverses[g];
    all.offset[g] = offsets ? offsets[g] : 0.0f;
    all.keep[g] = scales[g] == scales[g] && (factors == nullptr || factors[g] > 0);
  }
  job.encode(all, false);
}

// Both: image by image where groups lie within one, and without a read of its own for a range that is fixed.
// bytes: of all codes. offsets: null if the format has none. index: of the groups that pruning keeps.
void calibrate_and_encode(Job& job, Input& input, Layout layout, int64_t bytes, float* scales, float* offsets,
                          std::optional<Tensor> index) {
  if (!job.empty()) {
    job.plan = input.cut(layout);
    layout.in_order = true, layout.stochastic = false;
    job.ordered = input.cut(layout);
  }
  if (job.by_image()) return job.encode_image_by_image(scales, offsets);

  Numbers all(job.groups);
  std::vector<float> factors(1, 1.0f);
  if (job.range_is_fixed()) {
    job.take_ranges(all, 1);
  } else {
    factors = job.calibrate(all);
  }
  if (index) write_index(factors, *index);
  for (int64_t g = 0; g < job.groups; ++g) {
    const bool kept = factors[g] > 0;
    scales[g] = kept ? all.scale[g] * factors[g] : 0.0f;
    if (offsets) offsets[g] = kept ? all.offset[g] * factors[g] : 0.0f;
  }
  if (!job.empty() && job.encode(all, job.range_is_fixed())) {
    scales[0] = kNaN;
    if (offsets) offsets[0] = 0.0f;
    std::memset(job.encoding.codes, 0, bytes);
  }
}

void quantize(Tensor x, std::optional<Tensor> fold, std::optional<Tensor> key, std::optional<Tensor> low,
              std::optional<Tensor> high, std::string grid, int64_t bits, std::string axes, std::string calibrate,
              double first, double last, bool stochastic, std::string prune, int64_t keep_one_in, int64_t stream,
              double pass_low, double pass_high, Tensor codes, Tensor scale, std::optional<Tensor> offset,
              std::optional<Tensor> index, std::optional<Tensor> mask) {
  if (scale.numel() == 0) return;
  const CodeGrid of(grid, bits);
  Job job{.encoding = encoding_of(of, stochastic, key, stream, codes.mutable_data_ptr()),
          .calibration = calibration_of(calibrate, first, last, of, offset.has_value()),
          .pruning = pruning_of(prune, keep_one_in, key, stream),
          .groups = scale.numel(),
          .elements = x.numel() / scale.numel(),
          .low = read(low),
          .high = read(high)};
  Input input(x, fold);
  const Layout layout{
      .grouping = Grouping(axes), .storage = of.storage, .stochastic = job.encoding.stochastic, .in_order = false};
  if (!job.empty() && mask) add_mask(job, input, fold.has_value(), layout, pass_low, pass_high, *mask);
  const int64_t bytes = codes.numel() * (of.storage <= 8 ? 1 : of.storage / 8);
  calibrate_and_encode(job, input, layout, bytes, write(scale), write(offset), index);
}

}  // namespace

void quantize_nearest(const Tensor& x, const Nearest& how, int64_t groups, uint8_t* codes, int64_t bytes, float* scale,
                      float* offset) {
  const CodeGrid of(how.grid, how.bits);
  Job job{.encoding = encoding_of(of, false, {}, 0, codes),
          .calibration = calibration_of(how.calibrate, how.first, how.last, of, offset != nullptr),
          .pruning = pruning_of("", 1, {}, 0),
          .groups = groups,
          .elements = x.numel() / groups};
  Input input(x, {});
  const Layout layout{.grouping = Grouping(how.axes), .storage = of.storage, .stochastic = false, .in_order = false};
  calibrate_and_encode(job, input, layout, bytes, scale, offset, {});
}

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
