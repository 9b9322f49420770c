// A machine for the kernels of fqt/cuda_kernels that needs no GPU: threads, shared memory, copies. Instructions:
// instructions.h.
//
// The threads of a block are fibers. Each runs until it meets the others (a barrier, or an instruction of its warp or
// warpgroup); who runs next is drawn at random.
//
// What a device may do at any time happens here at the worst time, and what is undefined is an error:
//   copies land when they are waited for, and their target is filled with noise until then;
//   wgmma reads shared memory and writes registers when it is waited for; its registers hold noise until then;
//   of every byte of shared memory is known who wrote and who read it last, and at which barrier: two threads that meet at a
//   byte without a barrier in between, one of them writing, are a race.
#pragma once

#include <array>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <vector>

#define DEVICE inline
#define KERNEL(threads) [[maybe_unused]] static void

namespace emulator {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A byte of shared memory: its writer and its latest reader (-1 none, -2 several), each with its count of barriers.
struct Byte {
  int writer = -1, reader = -1, written = 0, read = 0;
  bool pending = false;   // the target of a copy that has not landed
  bool proxied = true;    // seen by wgmma: fenced since it was written
  int products = 0;       // of wgmma, not waited for, that read it
};

struct Copy {
  uint32_t to;
  int size;
  std::vector<uint8_t> data;
};

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started = false, done = false;
  int barriers = 0;
  std::vector<Copy> issued;               // not committed
  std::vector<std::vector<Copy>> groups;  // committed, not waited for
  std::vector<uint32_t> unfenced;
};

// An instruction that several threads execute together: each brings an argument, the last one acts for all.
struct Meeting {
  const char* what = "";
  std::vector<void*> arguments;
  int arrived = 0;
};

struct Product {
  uint64_t a, b;
};

struct Warpgroup {
  std::vector<Product> issued, committed;
  std::vector<std::vector<int>> sums;  // of each thread: what its registers will hold
  std::vector<int*> registers;
  bool fenced = false;
};

struct Block {
  int threads;
  int64_t x;
  int z;
  std::vector<uint8_t> memory;
  std::vector<Byte> bytes;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps, groups;
  std::vector<Warpgroup> warpgroups;
  Meeting all;
  int current = 0;
  std::vector<int> ready;
  std::mt19937 random;
  jmp_buf scheduler;
  std::function<void()> body;
  std::exception_ptr error;
};

inline Block* block = nullptr;
inline int64_t instructions = 0;  // mma of a warp and wgmma of a warpgroup, since a launch began

constexpr size_t kStack = 1 << 16;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of a block's threads, kept from block to block

inline Fiber& self() { return block->fibers[block->current]; }

inline std::string who() {
  return "thread " + std::to_string(block->current) + " of block " + std::to_string(block->x) + ", " + std::to_string(block->z);
}

inline void park() {
  if (!_setjmp(self().at)) _longjmp(block->scheduler, 1);
}

inline void start() {
  try {
    block->body();
  } catch (...) {
    block->error = std::current_exception();
  }
  self().done = true;
  _longjmp(block->scheduler, 1);
}

// `argument` joins those of the threads first .. first + count; `act` runs once, with all of them there.
inline void meet(Meeting& meeting, const char* what, int first, int count, void* argument,
                 const std::function<void(std::vector<void*>&)>& act) {
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.arguments.assign(count, nullptr);
  }
  if (std::strcmp(meeting.what, what) != 0) throw Fault(who() + " is at " + what + ", others at " + meeting.what);
  meeting.arguments[block->current - first] = argument;
  if (++meeting.arrived < count) {
    park();
    return;
  }
  meeting.arrived = 0;
  act(meeting.arguments);
  for (int i = first; i < first + count; ++i) {
    if (i != block->current) block->ready.push_back(i);
  }
  block->ready.push_back(block->current);
  park();
}

inline void meet_warp(const char* what, void* argument, const std::function<void(std::vector<void*>&)>& act) {
  const int warp = block->current / 32;
  meet(block->warps[warp], what, warp * 32, 32, argument, act);
}

inline void meet_group(const char* what, void* argument, const std::function<void(std::vector<void*>&)>& act) {
  const int group = block->current / 128;
  if (group >= static_cast<int>(block->warpgroups.size())) throw Fault(who() + " belongs to no whole warpgroup");
  meet(block->groups[group], what, group * 128, 128, argument, act);
}

[[noreturn]] inline void wrong(const char* what, uint32_t at, const std::string& why) {
  throw Fault(who() + " " + what + " byte " + std::to_string(at) + " of shared memory, " + why);
}

[[noreturn]] inline void race(const char* what, uint32_t at, int other) {
  wrong(what, at, (other < 0 ? "which others touch" : "which thread " + std::to_string(other) + " touches") +
                      std::string(" without a barrier in between"));
}

inline void range(uint32_t at, int size, const char* what) {
  if (at % size != 0 || at + size > block->memory.size()) {
    throw Fault(who() + " " + what + " " + std::to_string(size) + " bytes at " + std::to_string(at) + " of " +
                std::to_string(block->memory.size()) + " of shared memory: misaligned or beyond its end");
  }
}

inline void on_read(uint32_t at, int size) {
  for (uint32_t i = at; i < at + size; ++i) {
    Byte& byte = block->bytes[i];
    if (byte.pending) wrong("reads", i, "before its copy has landed");
    if (byte.writer < 0) wrong("reads", i, "which nobody has written");
    if (byte.writer != block->current && byte.written >= self().barriers) race("reads", i, byte.writer);
    if (byte.reader < 0 || byte.read < self().barriers) {
      byte.reader = block->current;
      byte.read = self().barriers;
    } else if (byte.reader != block->current) {
      byte.reader = -2;
    }
  }
}

inline void on_write(uint32_t at, int size) {
  for (uint32_t i = at; i < at + size; ++i) {
    Byte& byte = block->bytes[i];
    if (byte.pending) wrong("writes", i, "before its copy has landed");
    if (byte.products > 0) wrong("writes", i, "which wgmma still reads");
    const bool others_read = byte.reader != -1 && byte.reader != block->current;
    if (others_read && byte.read >= self().barriers) race("writes", i, byte.reader);
    if (byte.writer >= 0 && byte.writer != block->current && byte.written >= self().barriers) race("writes", i, byte.writer);
    byte.writer = block->current;
    byte.written = self().barriers;
    byte.proxied = false;
    self().unfenced.push_back(i);
  }
}

inline void land(std::vector<Copy>& copies) {
  for (Copy& copy : copies) {
    for (int i = 0; i < copy.size; ++i) {
      block->bytes[copy.to + i].pending = false;
      block->bytes[copy.to + i].written = self().barriers;
    }
    std::memcpy(block->memory.data() + copy.to, copy.data.data(), copy.size);
  }
}

// Runs `body` for every thread of every block.
inline void launch(int64_t blocks, int slices, int threads, int shared, unsigned seed, const std::function<void()>& body) {
  instructions = 0;
  for (int64_t i = 0; i < blocks * slices; ++i) {
    Block here;
    here.threads = threads;
    here.x = i % blocks;
    here.z = static_cast<int>(i / blocks);
    here.random.seed(seed + i);
    here.memory.resize(shared);
    for (uint8_t& byte : here.memory) byte = static_cast<uint8_t>(here.random());
    here.bytes.resize(shared);
    here.fibers.resize(threads);
    here.warps.resize((threads + 31) / 32);
    here.groups.resize(threads / 128);
    here.warpgroups.resize(threads / 128);
    for (Warpgroup& group : here.warpgroups) group.sums.resize(128), group.registers.resize(128);
    here.body = body;
    block = &here;
    while (static_cast<int>(stacks.size()) < threads) stacks.push_back(std::make_unique_for_overwrite<char[]>(kStack));
    for (int t = 0; t < threads; ++t) here.ready.push_back(t);
    while (!here.ready.empty() && !here.error) {
      const size_t next = here.random() % here.ready.size();
      here.current = here.ready[next];
      here.ready[next] = here.ready.back();
      here.ready.pop_back();
      Fiber& fiber = here.fibers[here.current];
      if (!_setjmp(here.scheduler)) {
        if (fiber.started) _longjmp(fiber.at, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[here.current].get();
        fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, start, 0);
        setcontext(&fiber.context);
      }
    }
    if (here.error) std::rethrow_exception(here.error);
    for (int t = 0; t < threads; ++t) {
      block->current = t;
      if (!here.fibers[t].done) throw Fault(who() + " waits for threads that have ended or stand elsewhere");
      if (!here.fibers[t].issued.empty() || !here.fibers[t].groups.empty()) throw Fault(who() + " ends before its copies land");
    }
  }
}

}  // namespace emulator
