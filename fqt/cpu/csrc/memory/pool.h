// Large blocks of memory that are used again. The system hands out zeroed pages one fault at a time, which for tens of megabytes
// costs several times as much as writing them, and malloc gives such memory back with every block that is freed.
#pragma once

#include <cstddef>

namespace fqt {

constexpr size_t kPage = 4096;

// A block of at least `bytes`, aligned to a page, with anything in it; null if there is no memory.
void* take_block(size_t bytes);

// Keeps a block that `take_block` returned for later, at most twice the bytes that were once in use together.
void give_block_back(void* block);

}  // namespace fqt
