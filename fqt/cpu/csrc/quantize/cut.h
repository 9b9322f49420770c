// How a tensor is cut into images of rows of columns, see `Plan`.
#pragma once

#include "../dispatch/grouping.h"
#include "isa.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

namespace fqt {

// (N, P, C) with strides counted in elements.
struct View {
  const void* data = nullptr;
  bool bfloat16 = false;
  int64_t n = 0, p = 0, c = 0, sn = 0, sp = 0, sc = 0;

  View() = default;
  explicit View(const torch::stable::Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 3, "expected a tensor of three axes, got ", t.dim());
    data = t.const_data_ptr();
    bfloat16 = t.scalar_type() == torch::headeronly::ScalarType::BFloat16;
    n = t.size(0), p = t.size(1), c = t.size(2);
    sn = t.stride(0), sp = t.stride(1), sc = c == 1 ? 1 : t.stride(2);
  }

  // Whether samples and positions can be counted as one axis.
  bool merges() const { return n == 1 || p == 1 || sn == p * sp; }

  float at(int64_t i, int64_t j, int64_t k) const {
    const int64_t element = i * sn + j * sp + k * sc;
    if (!bfloat16) return static_cast<const float*>(data)[element];
    return std::bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[element]) << 16);
  }
};

// What a plan is made for.
struct Layout {
  Grouping grouping;
  int64_t storage;
  bool stochastic;
  bool in_order;  // rows follow each other in the order of a group's elements, whatever memory is like
};

// Whether channels are a plan's columns, else positions are.
inline bool channels_inside(const View& x, const Layout& layout) {
  const Grouping& by = layout.grouping;
  if (layout.in_order) return !by.channel;
  if (x.sc == 1 || x.c == 1 || x.sp != 1 || x.p == 1) return true;
  // random numbers come four to a counter: it must not begin within a row that is packed across
  return !by.channel && layout.stochastic && !by.position && x.c % 4 != 0;
}

// A tensor's strides as (image, row, column). merged: samples and positions are one axis.
inline Source source(const View& x, bool inside, bool merged) {
  const int64_t rows = inside ? x.sp : x.sc, columns = inside ? x.sc : x.sp;
  return {x.data, x.bfloat16, {merged ? 0 : x.sn, merged && x.p == 1 ? x.sn : rows, columns}};
}

// Rows whose codes follow each other without a gap are cut anew, into rows that are long but not too long.
inline void cut_anew(Plan& plan, int64_t storage) {
  constexpr int64_t kColumns = 4096;
  const int64_t elements = plan.rows * plan.columns;
  plan.rows = (elements + kColumns - 1) / kColumns;
  plan.columns = plan.row_step = kColumns;
  plan.last = elements - (plan.rows - 1) * kColumns;
  plan.element.row = kColumns;
  plan.byte.row = kColumns * storage / 8;
  plan.mask.row = kColumns / 8;
}

// fold: null if nothing is multiplied in.
inline Plan cut(const View& x, const View* fold, const Layout& layout) {
  const Grouping& by = layout.grouping;
  const int64_t n = x.n, p = x.p, c = x.c, storage = layout.storage;
  const bool inside = channels_inside(x, layout), channel = by.channel_alone();
  const bool merged = inside && (by.whole() || channel) && x.merges() && (fold == nullptr || fold->merges());
  STD_TORCH_CHECK(!channel || layout.in_order || n == 1 || merged || p % 8 == 0, "codes of a channel begin within a byte");

  Plan made;
  made.x = source(x, inside, merged);
  if (fold != nullptr) made.fold = source(*fold, inside, merged);
  made.images = merged ? 1 : n;
  made.rows = inside ? (merged ? n * p : p) : c;
  made.columns = made.last = made.inner = inside ? c : p;
  made.along = inside != by.channel;
  const int64_t bytes = (c * storage + 7) / 8, mask_bytes = (c + 7) / 8;
  // (image, row, column), the latter two exchanged where positions are inside
  const auto at = [&](int64_t image, int64_t position, int64_t in_channel) {
    return inside ? Affine{image, position, in_channel} : Affine{image, in_channel, position};
  };
  made.mask = at(p * mask_bytes, mask_bytes, 0);
  if (by.channel) {
    made.parts = inside ? Parts::columns : Parts::rows;
    const int64_t row = ((channel ? n * p : p) * storage + 7) / 8;
    made.group = channel ? at(0, 0, 1) : at(1, 0, n);
    made.element = channel ? at(p, 1, 0) : at(0, 1, 0);
    made.byte = channel ? at(p * storage / 8, 0, row) : at(row, 0, n * row);
  } else {
    made.parts = by.position ? (inside ? Parts::rows : Parts::columns) : Parts::whole;
    made.group = by.whole() ? Affine{} : by.position ? at(p, 1, 0) : at(1, 0, 0);
    made.element = by.position ? at(0, 0, 1) : at(by.whole() ? p * c : 0, c, 1);
    made.byte = at(p * bytes, bytes, 0);
  }
  made.direct = !x.bfloat16 && fold == nullptr && made.x.stride.column == 1;
  made.row_step = made.x.stride.row;
  made.extent = (n - 1) * x.sn + (p - 1) * x.sp + (c - 1) * x.sc + 1;
  const bool dense = made.parts == Parts::whole && made.along && !layout.in_order && (made.rows == 1 || c % 8 == 0);
  if (dense && (!made.direct || made.rows == 1 || made.x.stride.row == made.columns)) cut_anew(made, storage);
  return made;
}

// A tensor and what is multiplied into it: copied, as their product, where a channel's codes would begin within a byte.
class Input {
 public:
  Input(const torch::stable::Tensor& x, const std::optional<torch::stable::Tensor>& fold)
      : x_(x), fold_(fold ? View(*fold) : View()) {}
  Input(const Input&) = delete;

  const View& values() const { return x_; }

  Plan cut(const Layout& layout) {
    const bool folded = fold_.data != nullptr;
    if (layout.grouping.channel_alone() && x_.n > 1 && x_.p % 8 != 0 && !(x_.merges() && (!folded || fold_.merges()))) copy();
    return fqt::cut(x_, fold_.data != nullptr ? &fold_ : nullptr, layout);
  }

 private:
  void copy() {
    copied_.resize(x_.n * x_.p * x_.c);
    float* to = copied_.data();
    for (int64_t n = 0; n < x_.n; ++n) {
      for (int64_t p = 0; p < x_.p; ++p) {
        for (int64_t c = 0; c < x_.c; ++c, ++to) *to = fold_.data ? x_.at(n, p, c) * fold_.at(n, p, c) : x_.at(n, p, c);
      }
    }
    x_.data = copied_.data(), x_.bfloat16 = false;
    x_.sn = x_.p * x_.c, x_.sp = x_.c, x_.sc = 1;
    fold_ = View();
  }

  View x_, fold_;
  std::vector<float> copied_;
};

}  // namespace fqt
