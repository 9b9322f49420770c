// Kernels with one fault each: what the emulator has to find. "sound" has none.
#include <map>

#include "primitives.h"

namespace {

u8 memory[4096];

// Two threads of different warps meet at a word.
void sound() {
  store_shared_int(thread() * 4, thread());
  barrier();
  load_shared_int((thread() + 32) % 64 * 4);
  barrier();
  store_shared_int(thread() * 4, 0);
}
void read_without_barrier() {
  store_shared_int(thread() * 4, thread());
  load_shared_int((thread() + 32) % 64 * 4);
}
void write_without_barrier() {
  store_shared_int(thread() * 4, thread());
  barrier();
  load_shared_int((thread() + 32) % 64 * 4);
  store_shared_int(thread() * 4, 0);
}
void nobody_wrote() { load_shared_int(thread() * 4); }
void beyond_the_end() { store_shared_int(1 << 20, 1); }
void barrier_of_some() {
  if (thread() < 40) barrier();
}
void divergent() {
  if (thread() % 2) {
    ballot(true);
  } else {
    warp_sum(1);
  }
}

void copy_not_waited_for() {
  copy_async<16>(thread() * 16, memory + thread() * 16, true);
  copies_commit();
  copies_landed<1>();
  load_shared_int(thread() * 16);
  copies_landed<0>();
}
void copy_without_barrier() {
  copy_async<16>(thread() * 16, memory + thread() * 16, true);
  copies_commit();
  copies_landed<0>();
  load_shared_int((thread() + 32) % 64 * 16);
}
void copy_never_landed() {
  copy_async<16>(thread() * 16, memory + thread() * 16, true);
  copies_commit();
}
void copy_over_what_is_read() {
  store_shared_int(thread() * 16, 1);
  barrier();
  load_shared_int((thread() + 32) % 64 * 16);
  copy_async<16>(thread() * 16, memory + thread() * 16, true);
  copies_commit();
  copies_landed<0>();
}
void copy_misaligned() { copy_async<16>(thread() * 16, memory + thread() * 16 + 4, true); }

// One product of 64 x 128, by a warpgroup.
template <bool kFence, bool kProxy, bool kCommit, bool kDone>
void product() {
  for (int at = thread() * 16; at < 192 * 128; at += threads() * 16) store_shared(at, Int4{1, 2, 3, 4});
  if (kProxy) fence_shared();
  barrier();
  int d[64] = {};
  const u64 descriptor = u64{64} << 32 | u64{1} << 62;
  if (kFence) group_fence(d);
  multiply_bits_group(d, descriptor, descriptor + (64 * 128 >> 4));
  if (kCommit) group_commit();
  if (!kDone) store_shared(thread() * 16, Int4{});
  group_done(d);
}

const std::map<std::string, void (*)()> kKernels = {
    {"sound", sound},
    {"read_without_barrier", read_without_barrier},
    {"write_without_barrier", write_without_barrier},
    {"nobody_wrote", nobody_wrote},
    {"beyond_the_end", beyond_the_end},
    {"barrier_of_some", barrier_of_some},
    {"divergent", divergent},
    {"copy_not_waited_for", copy_not_waited_for},
    {"copy_without_barrier", copy_without_barrier},
    {"copy_never_landed", copy_never_landed},
    {"copy_over_what_is_read", copy_over_what_is_read},
    {"copy_misaligned", copy_misaligned},
    {"product", product<true, true, true, true>},
    {"product_without_fence", product<false, true, true, true>},
    {"product_unseen", product<true, false, true, true>},
    {"product_not_committed", product<true, true, false, true>},
    {"product_overwritten", product<true, true, true, false>},
};

}  // namespace

extern "C" const char* run(const char* name, int threads, unsigned seed) {
  static std::string said;
  said.clear();
  try {
    emulator::launch(1, 1, threads, 1 << 15, seed, kKernels.at(name));
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
