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

  // Whether a group reaches over all samples of a channel.
  bool channel_alone() const { return channel && !sample; }

  // Whether a group lies within a sample and holds more than one position of it.
  bool within_sample() const { return sample && !position; }
};

}  // namespace fqt
