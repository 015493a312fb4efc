// Working memory of one thread: allocated piece by piece while a memory is computed, and released all at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastkm {

// An arena grows to what the largest memory needed and lives as long as its thread, so that a steady state makes no
// calls of `new`.
class Arena {
 public:
  // The arena of the calling thread, with nothing allocated.
  static Arena& fresh();
  // A second one, for arguments and results of a kernel that allocates from the first.
  static Arena& fresh_copies();

  // The same with what is allocated in it, for a part of a computation that this thread may have begun.
  static Arena& of_thread();

  // Uninitialised space for `count` elements, aligned to a cache line.
  template <class Real>
  Real* allocate(int64_t count) {
    return static_cast<Real*>(allocate_bytes(static_cast<size_t>(count) * sizeof(Real)));
  }

  // Release what was allocated after a mark.
  struct Mark {
    size_t blocks, used;
  };
  Mark mark() const { return {blocks_.size(), used_}; }
  void release(Mark mark);

  ~Arena();

 private:
  void reset();
  void* allocate_bytes(size_t bytes);

  struct Block {
    std::byte* data;
    size_t size;
  };
  std::vector<Block> blocks_;
  size_t used_ = 0;  // of the last block
};

}  // namespace fastkm
