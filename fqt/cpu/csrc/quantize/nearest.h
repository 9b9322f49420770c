// Quantizing to nearest for another operator, which keeps the codes to itself.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>

namespace fqt {

// A format of integers and its calibration, as `fqt_cpu::quantize` takes them.
struct Nearest {
  std::string grid;
  int64_t bits;
  std::string axes, calibrate;
  double first, last;
};

// Codes, scales and offsets (null if the format has none) of x, (N, P, C) of float32 or bfloat16, in `groups` groups.
// bytes: of all codes.
void quantize_nearest(const torch::stable::Tensor& x, const Nearest& how, int64_t groups, uint8_t* codes, int64_t bytes,
                      float* scale, float* offset);

}  // namespace fqt
