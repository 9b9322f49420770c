// Tensors in memory of any strides, their groups, and how they are cut into images of rows (fqt/formats.py and
// fqt/cpu/csrc/quantize/cut.h).
#pragma once

#include "check.h"

namespace check {

using fqt::Affine;
using fqt::Parts;

// (N, P, C) in memory that ends with its last element.
struct Tensor {
  int64_t n, p, c, sn, sp, sc;
  bool bfloat16 = false;
  Fenced<float> floats;
  Fenced<uint16_t> halves;

  int64_t at(int64_t i, int64_t j, int64_t k) const { return i * sn + j * sp + k * sc; }
  int64_t extent() const { return n * p * c == 0 ? 0 : at(n - 1, p - 1, c - 1) + 1; }
  Tensor(int64_t n, int64_t p, int64_t c, int64_t sn, int64_t sp, int64_t sc, bool bfloat16)
      : n(n), p(p), c(c), sn(sn), sp(sp), sc(c == 1 ? 1 : sc), bfloat16(bfloat16), floats(bfloat16 ? 0 : extent()),
        halves(bfloat16 ? extent() : 0) {}
  void set(int64_t i, float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (bfloat16) {
      halves[i] = static_cast<uint16_t>(v != v ? 0x7FC0 : bits >> 16);
    } else {
      floats[i] = v;
    }
  }
  float get(int64_t i, int64_t j, int64_t k) const {
    if (!bfloat16) return floats.data[at(i, j, k)];
    const uint32_t bits = uint32_t{halves.data[at(i, j, k)]} << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
  }
  const void* data() const { return bfloat16 ? static_cast<const void*>(halves.data) : floats.data; }
  bool merges() const { return n == 1 || p == 1 || sn == p * sp; }
};

// The groups of a scale's axes, as fqt/formats.py counts them.
struct Groups {
  std::string axes;
  int64_t n, p, c;
  bool by_channel() const { return axes == "C" || axes == "NC"; }
  int64_t count() const { return axes.empty() ? 1 : axes == "N" ? n : axes == "NP" ? n * p : axes == "C" ? c : n * c; }
  int64_t elements() const { return n * p * c / count(); }
  int64_t group(int64_t i, int64_t j, int64_t k) const {
    return axes.empty() ? 0 : axes == "N" ? i : axes == "NP" ? i * p + j : axes == "C" ? k : k * n + i;
  }
  int64_t element(int64_t i, int64_t j, int64_t k) const {
    return axes.empty() ? (i * p + j) * c + k : axes == "N" ? j * c + k : axes == "NP" ? k : axes == "C" ? i * p + j : j;
  }
  // Bit at which an element's code lies.
  int64_t bit(int64_t i, int64_t j, int64_t k, int bits) const {
    if (axes == "C") return k * bytes_of(n * p, bits) * 8 + (i * p + j) * bits;
    if (axes == "NC") return (k * n + i) * bytes_of(p, bits) * 8 + j * bits;
    return (i * p + j) * bytes_of(c, bits) * 8 + k * bits;
  }
  int64_t bytes(int bits) const {
    return axes == "C" ? c * bytes_of(n * p, bits) : axes == "NC" ? c * n * bytes_of(p, bits) : n * p * bytes_of(c, bits);
  }
};

// How the tensor is cut with channels (`inside`) or positions as columns. recut: columns of rows that are cut anew, or 0.
inline fqt::Plan cut(const Tensor& x, const Tensor* fold, const Groups& g, int bits, bool inside, bool merged, int64_t recut) {
  const auto at = [&](int64_t i, int64_t j, int64_t k) { return inside ? Affine{i, j, k} : Affine{i, k, j}; };
  const auto source = [&](const Tensor& t) {
    return fqt::Source{t.data(), t.bfloat16, at(merged ? 0 : t.sn, merged && t.p == 1 ? t.sn : t.sp, t.sc)};
  };
  fqt::Plan plan{};
  plan.x = source(x);
  if (fold != nullptr) plan.fold = source(*fold);
  plan.images = merged ? 1 : x.n;
  plan.rows = inside ? (merged ? x.n * x.p : x.p) : x.c;
  plan.columns = plan.last = plan.inner = inside ? x.c : x.p;
  plan.along = inside != g.by_channel();
  plan.direct = !x.bfloat16 && fold == nullptr && plan.x.stride.column == 1;
  plan.row_step = plan.x.stride.row;
  plan.extent = x.extent();
  const bool tokens = g.axes == "NP", whole = g.axes.empty() || g.axes == "N";
  plan.parts = whole ? Parts::whole : (tokens == inside) ? Parts::rows : Parts::columns;
  // what is affine in (sample, position, channel), by its differences
  const auto affine = [&](const auto& f) {
    return at(x.n > 1 ? f(1, 0, 0) : 0, x.p > 1 ? f(0, 1, 0) : 0, x.c > 1 ? f(0, 0, 1) : 0);
  };
  plan.group = affine([&](int64_t i, int64_t j, int64_t k) { return g.group(i, j, k); });
  plan.element = affine([&](int64_t i, int64_t j, int64_t k) { return g.element(i, j, k); });
  plan.byte = affine([&](int64_t i, int64_t j, int64_t k) { return g.bit(i, j, k, bits) / 8; });
  plan.mask = at(x.p * bytes_of(x.c, 1), bytes_of(x.c, 1), 0);
  (plan.along ? plan.byte.column : plan.byte.row) = 0;
  if (merged && x.p == 1) {  // a row is a sample
    plan.group.row = plan.group.image;
    plan.element.row = plan.element.image;
    plan.byte.row = plan.along ? plan.byte.image : 0;
  }
  if (recut > 0) {
    const int64_t elements = plan.rows * plan.columns;
    plan.rows = (elements + recut - 1) / recut;
    plan.last = elements - (plan.rows - 1) * recut;
    plan.columns = plan.row_step = plan.element.row = recut;
    plan.byte.row = recut * bits / 8;
    plan.mask.row = recut / 8;
  }
  return plan;
}

}  // namespace check
