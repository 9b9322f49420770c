// How a tensor is cut into groups that have a scale each: `Grouping` of fqt/formats.py. No kernel here knows blocks.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>

namespace fqt {

// Which of the logical axes have a scale of their own. A weight's (O, K, I) stand in the place of (N, P, C).
struct Grouping {
  bool sample = false, position = false, channel = false;

  Grouping() = default;

  // axes: as in fqt/formats.py.
  explicit Grouping(const std::string& axes) {
    sample = axes == "N" || axes == "O" || axes == "NP" || axes == "OK" || axes == "NC";
    position = axes == "NP" || axes == "OK";
    channel = axes == "C" || axes == "NC";
    STD_TORCH_CHECK(axes.empty() || sample || channel, "the kernels know no groups by the axes ", axes);
  }

  bool whole() const { return !sample && !channel; }

  // Whether a channel has one scale for all samples.
  bool channel_alone() const { return channel && !sample; }

  // Whether a sample has scales of its own, each for all its positions or for those of one channel.
  bool within_sample() const { return sample && !position; }
};

}  // namespace fqt
