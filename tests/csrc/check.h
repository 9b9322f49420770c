// What the checks of the three families share: random cases, memory with a fence behind it, and the comparison of what a kernel
// writes with what straight loops over the formulas of fqt/reference/ say.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../fqt/cpu/csrc/quantize/isa.h"

namespace check {

// splitmix64
class Random {
 public:
  Random(uint64_t seed, uint64_t number) : state_(seed * 0xD1342543DE82EF95u + number) { bits(), bits(); }
  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(bits() % (high - low + 1)); }
  float uniform() { return static_cast<float>(bits() >> 40) * 0x1p-24f; }
  float normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0f) * 1.7f; }
  bool chance(double p) { return uniform() < p; }
  template <class T>
  T choose(std::initializer_list<T> from) { return from.begin()[between(0, static_cast<int64_t>(from.size()) - 1)]; }
  // Sizes around those of vectors, and any other.
  int64_t size() {
    return choose<int64_t>({0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, between(1, 200)});
  }
  // Of a scale or an offset: now and then at the ends of what floats can be.
  float factor() {
    if (!chance(0.02)) return normal();
    return choose({fqt::kNaN, fqt::kInfinity, -fqt::kInfinity, 0.0f, -0.0f, 1e-45f, -1e-40f, 3e38f});
  }

 private:
  uint64_t state_;
};

// `count` values whose last one ends a page, with a page behind it that may not be touched: reading or writing past the end
// dies, whatever the machine and without a sanitizer. AddressSanitizer knows the heap better, and the near side too.
template <class T>
class Fenced {
 public:
  T* data;
  int64_t count;

  explicit Fenced(int64_t values) : count(values) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
#if defined(__SANITIZE_ADDRESS__)
    block_ = static_cast<char*>(std::malloc(bytes));
    data = reinterpret_cast<T*>(block_);
#else
    const int64_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
    size_ = room + page;
    block_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (block_ == MAP_FAILED || mprotect(block_ + room, page, PROT_NONE) != 0) std::abort();
    data = reinterpret_cast<T*>(block_ + room - bytes);
#endif
    std::memset(static_cast<void*>(data), 0xA5, bytes);  // what nobody wrote is seen
  }
  explicit Fenced(const std::vector<T>& from) : Fenced(static_cast<int64_t>(from.size())) {
    std::copy(from.begin(), from.end(), data);
  }
  Fenced(Fenced&& other)
      : data(other.data), count(other.count), block_(std::exchange(other.block_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  ~Fenced() {
#if defined(__SANITIZE_ADDRESS__)
    std::free(block_);
#else
    munmap(block_, size_);
#endif
  }
  T& operator[](int64_t i) { return data[i]; }
  // As poisoned at first, for the model to write on.
  std::vector<T> copy() const { return std::vector<T>(data, data + count); }

 private:
  char* block_;
  int64_t size_ = 0;
};

// Bits that a code takes in memory.
inline int storage_of(int bits) { return bits <= 2 ? bits : bits <= 4 ? 4 : bits <= 8 ? 8 : bits <= 16 ? 16 : 32; }
// A code of `storage` bits into a packed row of zeros, the first in the lowest bits.
inline void put(uint8_t* row, int64_t i, int storage, uint32_t code) {
  if (storage > 8) {
    std::memcpy(row + i * storage / 8, &code, storage / 8);
  } else {
    row[i * storage / 8] = static_cast<uint8_t>(row[i * storage / 8] | code << i * storage % 8);
  }
}
inline int64_t bytes_of(int64_t codes, int bits) { return (codes * bits + 7) / 8; }

// The case at hand; `about` says what it is when it fails.
struct Current {
  uint64_t seed;
  int64_t number;
  std::ostringstream about;
};
inline Current current;
inline std::map<std::string, std::map<std::string, int64_t>> served;  // cases by kernel and instruction set

// Each value equal, bit for bit; one NaN is like another.
template <class T>
void same(const char* kernel, const char* set, const T* actual, const std::vector<T>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const T a = actual[i], e = expected[i];
    if (std::memcmp(&a, &e, sizeof(T)) == 0 || (a != a && e != e)) continue;
    if constexpr (std::is_floating_point_v<T>) {
      std::printf("%s %s: value %zu of %zu is %.9g (%a), not %.9g (%a)\n", kernel, set, i, expected.size(), a, a, e, e);
    } else {
      std::printf("%s %s: value %zu of %zu is %lld, not %lld\n", kernel, set, i, expected.size(), (long long)a, (long long)e);
    }
    std::printf("seed %llu, case %lld: %s\n", (unsigned long long)current.seed, (long long)current.number,
                current.about.str().c_str());
    std::exit(1);
  }
}

inline int pieces = 1;  // that `fqt::parallel` cuts its work into; of 3 each has a thread of its own

void quantize(uint64_t seed, int64_t cases);
void decode(uint64_t seed, int64_t cases);
void products(uint64_t seed, int64_t cases);
void integers(uint64_t seed, int64_t cases);
void norm(uint64_t seed, int64_t cases);

// Calls body(random numbers of the case) for every case of a family.
template <class Body>
void each_case(uint64_t seed, int64_t cases, uint64_t family, const Body& body) {
  current.seed = seed;
  for (current.number = 0; current.number < cases; ++current.number) {
    Random random(seed, family << 32 | static_cast<uint64_t>(current.number));
    pieces = random.choose({1, 1, 2, 3, 8});
    current.about.str("");
    body(random);
  }
}

}  // namespace check
