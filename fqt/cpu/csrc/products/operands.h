// Tensors as the kernels of the products take them.
#pragma once

#include "../dispatch/grouping.h"
#include "isa.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

namespace fqt {

// By two axes, of which one of size 1 stands for any size.
inline Scale scale(const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, "expected a scale of two axes, got ", t.dim());
  return {t.const_data_ptr<float>(), t.size(0) == 1 ? 0 : t.stride(0), t.size(1) == 1 ? 0 : t.stride(1)};
}

inline Scale scale(const std::optional<torch::stable::Tensor>& t) { return t ? scale(*t) : Scale{}; }

template <class T>
const T* data(const std::optional<torch::stable::Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// Codes, described for the kernels.
inline Integers integers(const void* codes, const std::string& grid, int64_t bits, const Grouping& by = {}) {
  return {.data = static_cast<const uint8_t*>(codes),
          .bits = bits,
          .storage = bits <= 2 ? bits : bits <= 4 ? 4 : bits <= 8 ? 8 : 16,
          .meaning = grid == "sign" ? Meaning::sign : grid == "uint" ? Meaning::natural : Meaning::complement,
          .channel = by.channel,
          .by_channel = by.channel_alone()};
}

}  // namespace fqt
