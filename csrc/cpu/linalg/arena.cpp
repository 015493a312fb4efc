#include "cpu/linalg/arena.h"

#include <algorithm>
#include <new>

#include "kernel_args.h"

namespace fastkm {

// It stands here because it belongs to a thread, as an arena does.
const Team*& current_team() {
  static thread_local const Team* team = nullptr;
  return team;
}

namespace {
constexpr std::align_val_t kLine{64};
constexpr size_t kFirstBlock = size_t{1} << 18;
}  // namespace

Arena& Arena::of_thread() {
  static thread_local Arena arena;
  return arena;
}

Arena& Arena::fresh() {
  Arena& arena = of_thread();
  arena.reset();
  return arena;
}

Arena& Arena::fresh_copies() {
  static thread_local Arena arena;
  arena.reset();
  return arena;
}

void* Arena::allocate_bytes(size_t bytes) {
  bytes = (bytes + 63) & ~size_t{63};
  if (blocks_.empty() || used_ + bytes > blocks_.back().size) {
    const size_t size = std::max({bytes, kFirstBlock, blocks_.empty() ? 0 : 2 * blocks_.back().size});
    blocks_.push_back({static_cast<std::byte*>(::operator new(size, kLine)), size});
    used_ = 0;
  }
  void* piece = blocks_.back().data + used_;
  used_ += bytes;
  return piece;
}

// Keep only the last block. Blocks double in size, so it soon holds a whole memory.
void Arena::reset() {
  while (blocks_.size() > 1) {
    ::operator delete(blocks_.front().data, kLine);
    blocks_.erase(blocks_.begin());
  }
  used_ = 0;
}

// If blocks were added after the mark, keep them: they are the larger ones. The space before the last block is then
// unused until the next reset.
void Arena::release(Mark mark) {
  if (mark.blocks == blocks_.size())
    used_ = mark.used;
  else
    used_ = 0;
}

Arena::~Arena() {
  for (const Block& block : blocks_) ::operator delete(block.data, kLine);
}

}  // namespace fastkm
