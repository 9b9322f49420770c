// The geometry of a layer as the operators get it, and the tables that the kernels read.
#pragma once

#include "isa.h"

#include <torch/headeronly/util/Exception.h>

#include <vector>

namespace fqt {

// One image axis of a convolution.
struct ImageAxis {
  int64_t size, window, stride, before, after, dilation;  // before, after: padding
  int64_t output() const { return (size + before + after - dilation * (window - 1) - 1) / stride + 1; }
  // Whether every position of the output meets just the same position of the input.
  bool pointwise() const { return window == 1 && stride == 1 && before == 0 && after == 0; }
};

// A convolution of some samples; a linear layer is a 1x1 window over a column of positions.
struct Convolution {
  int64_t samples, in, out, groups;  // channels of all groups
  ImageAxis y, x;

  // sizes: samples, input channels, output channels, then fqt.geometry.Geometry.flat().
  explicit Convolution(const std::vector<int64_t>& sizes) {
    STD_TORCH_CHECK(sizes.size() == 16, "expected 16 sizes: samples, channels in and out, and the geometry; got ",
                    sizes.size());
    const int64_t* next = sizes.data();
    for (int64_t* to : {&samples, &in, &out, &y.size, &x.size, &y.window, &x.window, &y.stride, &x.stride, &y.before, &y.after,
                        &x.before, &x.after, &y.dilation, &x.dilation, &groups}) {
      *to = *next++;
    }
  }
};

// Owns what an `Axis` points to.
class AxisTables {
 public:
  // forward: from positions of the output to those of the input; else the way back
  AxisTables(const ImageAxis& axis, bool forward) : size_(forward ? axis.output() : axis.size), taps_(axis.window) {
    at_.resize(size_ * taps_);
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t k = 0; k < taps_; ++k) at_[i * taps_ + k] = static_cast<int32_t>(met(axis, forward, i, k));
      find_kind(i);
    }
  }

  Axis axis() const {
    return {size_, taps_, static_cast<int64_t>(example_.size()), at_.data(), kind_.data(), example_.data()};
  }

 private:
  // What position i meets with tap k on the other side, -1 outside.
  static int64_t met(const ImageAxis& axis, bool forward, int64_t i, int64_t k) {
    if (forward) {
      const int64_t at = i * axis.stride - axis.before + k * axis.dilation;
      return at >= 0 && at < axis.size ? at : -1;
    }
    const int64_t scaled = i + axis.before - k * axis.dilation;
    return scaled >= 0 && scaled % axis.stride == 0 && scaled / axis.stride < axis.output() ? scaled / axis.stride : -1;
  }

  // Positions are of one kind where the same taps meet something.
  void find_kind(int64_t i) {
    const auto same = [&](int32_t other) {
      for (int64_t k = 0; k < taps_; ++k) {
        if ((at_[i * taps_ + k] < 0) != (at_[other * taps_ + k] < 0)) return false;
      }
      return true;
    };
    size_t kind = 0;
    while (kind < example_.size() && !same(example_[kind])) ++kind;
    if (kind == example_.size()) example_.push_back(static_cast<int32_t>(i));
    kind_.push_back(static_cast<int32_t>(kind));
  }

  std::vector<int32_t> at_, kind_, example_;
  int64_t size_, taps_;
};

// The layer as a product's result sees it, and its tables.
struct SeenLayer {
  AxisTables y, x;
  Layer layer;

  // forward: from the output's pixels; else from the input's
  SeenLayer(const Convolution& c, bool forward)
      : y(c.y, forward),
        x(c.x, forward),
        layer{.n = c.samples,
              .groups = c.groups,
              .in = c.in / c.groups,
              .out = c.out / c.groups,
              .y = y.axis(),
              .x = x.axis(),
              .other_y = forward ? c.y.size : c.y.output(),
              .other_x = forward ? c.x.size : c.x.output()} {}
  SeenLayer(const SeenLayer&) = delete;
};

}  // namespace fqt
