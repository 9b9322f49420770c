// The functions of primitives.h on a host. Layouts are written from the PTX ISA manual (sections named), not from the kernels.
#pragma once
#include "emulator.h"

namespace emulator {

// "Matrix Descriptor Format" and "Strides" of wgmma, K-major with the 128-byte swizzle (mode 1 in bits 62-63): rows of 128
// bytes, eight of them an atom, atoms `stride` bytes apart; of an address, bits 7-9 are added (xor) to bits 4-6. Bits 0-13 hold
// the start and bits 32-45 the stride, both without their last four bits; bits 49-51 a base offset, 0 for atoms at multiples of
// 1024.
inline void visit(uint64_t descriptor, int rows, const std::function<void(int, int, uint32_t)>& see) {
  const uint32_t from = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) throw Fault("this emulator knows the 128-byte swizzle alone");
  if (stride % 1024 != 0) throw Fault("a descriptor's stride is not whole atoms of 1024 bytes");
  for (int row = 0; row < rows; ++row) {
    for (int byte = 0; byte < 32; ++byte) {
      uint32_t at = from + row / 8 * stride + row % 8 * 128 + byte;
      at ^= (at >> 7 & 7) << 4;
      if (at >= block->memory.size()) throw Fault("a descriptor reaches beyond the shared memory");
      see(row, byte, at);
    }
  }
}

using Bits = std::vector<std::array<uint64_t, 4>>;  // rows of 256 bits

inline Bits matrix(uint64_t descriptor, int rows) {
  Bits bits(rows);
  visit(descriptor, rows, [&](int row, int byte, uint32_t at) {
    reinterpret_cast<uint8_t*>(bits[row].data())[byte] = block->memory[at];
  });
  return bits;
}

// Of 256 bits.
inline int common_bits(const uint64_t* a, const uint64_t* b) {
  int count = 0;
  for (int i = 0; i < 4; ++i) count += __builtin_popcountll(a[i] & b[i]);
  return count;
}

}  // namespace emulator

inline int thread() { return emulator::block->current; }
inline int threads() { return emulator::block->threads; }
inline i64 block_x() { return emulator::block->x; }
inline int block_z() { return emulator::block->z; }
inline int popcount(u32 word) { return __builtin_popcount(word); }
inline u32 shared_memory() { return 0; }

inline void store_shared(u32 to, Int4 v) {
  emulator::range(to, 16, "writes");
  emulator::on_write(to, 16);
  std::memcpy(emulator::block->memory.data() + to, &v, 16);
}
inline Int4 load_shared(u32 from) {
  emulator::range(from, 16, "reads");
  emulator::on_read(from, 16);
  Int4 v;
  std::memcpy(&v, emulator::block->memory.data() + from, 16);
  return v;
}
inline void store_shared_int(u32 to, int v) {
  emulator::range(to, 4, "writes");
  emulator::on_write(to, 4);
  std::memcpy(emulator::block->memory.data() + to, &v, 4);
}
inline int load_shared_int(u32 from) {
  emulator::range(from, 4, "reads");
  emulator::on_read(from, 4);
  int v;
  std::memcpy(&v, emulator::block->memory.data() + from, 4);
  return v;
}

template <int kBytes>
void copy_async(u32 to, const void* from, bool valid) {
  using namespace emulator;
  range(to, kBytes, "copies");
  if (reinterpret_cast<uintptr_t>(from) % kBytes != 0) throw Fault(who() + " copies from a misaligned address");
  on_write(to, kBytes);
  Copy copy{to, kBytes, std::vector<uint8_t>(kBytes)};
  if (valid) std::memcpy(copy.data.data(), from, kBytes);
  for (int i = 0; i < kBytes; ++i) {
    block->bytes[to + i].pending = true;
    block->memory[to + i] = static_cast<uint8_t>(block->random());
  }
  self().issued.push_back(std::move(copy));
}
inline void copies_commit() {
  emulator::self().groups.push_back(std::move(emulator::self().issued));
  emulator::self().issued.clear();
}
template <int kLeft>
void copies_landed() {
  auto& groups = emulator::self().groups;
  while (static_cast<int>(groups.size()) > kLeft) {
    emulator::land(groups.front());
    groups.erase(groups.begin());
  }
}
inline void barrier() {
  using namespace emulator;
  meet(block->all, "barrier", 0, block->threads, nullptr, [](std::vector<void*>&) {
    for (Fiber& fiber : block->fibers) ++fiber.barriers;
  });
}

inline u32 ballot(bool bit) {
  struct {
    bool bit;
    u32 result;
  } mine{bit, 0};
  emulator::meet_warp("ballot", &mine, [](std::vector<void*>& lanes) {
    u32 word = 0;
    for (int i = 0; i < 32; ++i) word |= static_cast<u32>(static_cast<decltype(mine)*>(lanes[i])->bit) << i;
    for (void* lane : lanes) static_cast<decltype(mine)*>(lane)->result = word;
  });
  return mine.result;
}
inline u32 shuffle_xor(u32 v, int lanes) {
  u32 mine = v;
  emulator::meet_warp("shuffle_xor", &mine, [lanes](std::vector<void*>& all) {
    u32 before[32];
    for (int i = 0; i < 32; ++i) before[i] = *static_cast<u32*>(all[i]);
    for (int i = 0; i < 32; ++i) *static_cast<u32*>(all[i]) = before[i ^ lanes];
  });
  return mine;
}
inline int warp_sum(int v) {
  int mine = v;
  emulator::meet_warp("warp_sum", &mine, [](std::vector<void*>& lanes) {
    int sum = 0;
    for (void* lane : lanes) sum += *static_cast<int*>(lane);
    for (void* lane : lanes) *static_cast<int*>(lane) = sum;
  });
  return mine;
}

// "ldmatrix", .x4 without .trans: threads 8i .. 8i+7 hold the addresses of the rows of matrix i, each of 16 bytes; register i
// of thread t then holds the t % 4-th pair of 16-bit elements, hence the t % 4-th word, of row t / 4 of matrix i.
inline void load_matrices(u32 (&r)[4], u32 from) {
  struct {
    u32 from;
    u32* r;
  } mine{from, r};
  emulator::range(from, 16, "loads a matrix row of");
  emulator::meet_warp("ldmatrix", &mine, [](std::vector<void*>& lanes) {
    const int last = emulator::block->current;
    for (int lane = 0; lane < 32; ++lane) {
      emulator::block->current = last / 32 * 32 + lane;
      for (int i = 0; i < 4; ++i) {
        const u32 row = static_cast<decltype(mine)*>(lanes[i * 8 + lane / 4])->from + lane % 4 * 4;
        emulator::on_read(row, 4);
        std::memcpy(static_cast<decltype(mine)*>(lanes[lane])->r + i, emulator::block->memory.data() + row, 4);
      }
    }
    emulator::block->current = last;
  });
}

// "Matrix Fragments for mma.m16n8k256" with .b1: groupID = lane / 4, threadID_in_group = lane % 4. Of A's 128 bits of a thread
// bit i stands at
//   row = groupID (i < 32 or 64 <= i < 96), else groupID + 8;  column = threadID_in_group * 32 + i % 32, + 128 from i = 64 on;
// of B's 64 bits at row = threadID_in_group * 32 + i % 32, + 128 from i = 32 on, column = groupID;
// of C's four at row = groupID (i < 2), else groupID + 8; column = threadID_in_group * 2 + i % 2.
// A register's 32 bits stand side by side, so a register is placed by its first.
inline void multiply_bits(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  struct {
    int* d;
    const u32* a;
    u32 b[2];
  } mine{d, a, {b0, b1}};
  emulator::meet_warp("mma", &mine, [](std::vector<void*>& lanes) {
    ++emulator::instructions;
    static uint64_t rows[16][4], columns[8][4];
    const auto put = [](uint64_t* bits, int at, u32 word) { std::memcpy(reinterpret_cast<u8*>(bits) + at / 8, &word, 4); };
    for (int lane = 0; lane < 32; ++lane) {
      const auto& of = *static_cast<decltype(mine)*>(lanes[lane]);
      const int group = lane / 4, member = lane % 4;
      for (int i = 0; i < 128; i += 32) {
        const int row = i < 32 || (64 <= i && i < 96) ? group : group + 8;
        put(rows[row], member * 32 + i % 32 + (i < 64 ? 0 : 128), of.a[i / 32]);
      }
      for (int i = 0; i < 64; i += 32) put(columns[group], member * 32 + i % 32 + (i < 32 ? 0 : 128), of.b[i / 32]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto& of = *static_cast<decltype(mine)*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        of.d[i] += emulator::common_bits(rows[lane / 4 + (i < 2 ? 0 : 8)], columns[lane % 4 * 2 + i % 2]);
      }
    }
  });
}

inline void fence_shared() {
  // of what is still on its way nothing is shown
  std::erase_if(emulator::self().unfenced, [](uint32_t at) {
    emulator::Byte& byte = emulator::block->bytes[at];
    if (!byte.pending) byte.proxied = true;
    return !byte.pending;
  });
}
template <int kCount>
void group_fence(int (&)[kCount]) {
  emulator::meet_group("wgmma.fence", nullptr, [](std::vector<void*>&) {
    emulator::block->warpgroups[emulator::block->current / 128].fenced = true;
  });
}
inline void group_commit() {
  emulator::meet_group("wgmma.commit_group", nullptr, [](std::vector<void*>&) {
    auto& group = emulator::block->warpgroups[emulator::block->current / 128];
    group.committed.insert(group.committed.end(), group.issued.begin(), group.issued.end());
    group.issued.clear();
  });
}

// "Register Fragments", D of m64nNk256: of thread t of the warpgroup, element i stands at
//   row = t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + t % 4 * 2 + i % 2.
template <int kCount>
void multiply_bits_group(int (&d)[kCount], u64 a, u64 b) {
  using namespace emulator;
  struct {
    int* d;
    u64 a, b;
  } mine{d, a, b};
  meet_group("wgmma", &mine, [](std::vector<void*>& lanes) {
    Warpgroup& group = block->warpgroups[block->current / 128];
    ++instructions;
    if (!group.fenced) throw Fault("wgmma without a fence since its registers were written");
    const auto& first = *static_cast<decltype(mine)*>(lanes[0]);
    for (int i = 0; i < 128; ++i) {
      const auto& of = *static_cast<decltype(mine)*>(lanes[i]);
      if (of.a != first.a || of.b != first.b) throw Fault("the threads of a warpgroup name different descriptors");
      if (group.registers[i] != of.d) {
        if (group.registers[i] != nullptr) throw Fault("products into other registers before these were waited for");
        group.registers[i] = of.d;
        group.sums[i].assign(of.d, of.d + kCount);
        for (int k = 0; k < kCount; ++k) of.d[k] = static_cast<int>(block->random());
      }
    }
    const auto see = [](int, int, uint32_t at) {
      Byte& byte = block->bytes[at];
      if (byte.pending || byte.writer < 0) throw Fault("wgmma reads byte " + std::to_string(at) + " before it is written");
      if (!byte.proxied) throw Fault("wgmma reads byte " + std::to_string(at) + ", not shown to the async proxy by a fence");
      if (byte.written >= self().barriers) race("reads (wgmma)", at, byte.writer);
      ++byte.products;
    };
    visit(first.a, 64, see);
    visit(first.b, kCount * 2, see);
    group.issued.push_back({first.a, first.b});
  });
}
template <int kCount>
void group_done(int (&)[kCount]) {
  using namespace emulator;
  meet_group("wgmma.wait_group", nullptr, [](std::vector<void*>&) {
    Warpgroup& group = block->warpgroups[block->current / 128];
    if (!group.issued.empty()) throw Fault("wgmma is waited for before it is committed");
    for (const Product& product : group.committed) {
      const Bits a = matrix(product.a, 64), b = matrix(product.b, kCount * 2);
      for (int t = 0; t < 128; ++t) {
        for (int i = 0; i < kCount; ++i) {
          const int row = t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + t % 4 * 2 + i % 2;
          group.sums[t][i] += common_bits(a[row].data(), b[column].data());
        }
      }
      const auto has_read = [](int, int, uint32_t at) {
        Byte& byte = block->bytes[at];
        --byte.products;
        byte.reader = -2;
        byte.read = self().barriers;
      };
      visit(product.a, 64, has_read);
      visit(product.b, kCount * 2, has_read);
    }
    for (int t = 0; t < 128; ++t) {
      if (group.registers[t] != nullptr) std::memcpy(group.registers[t], group.sums[t].data(), kCount * sizeof(int));
      group.registers[t] = nullptr;
    }
    group.committed.clear();
    group.fenced = false;
  });
}
