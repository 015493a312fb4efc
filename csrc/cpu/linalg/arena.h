// Working memory of one thread: taken piece by piece while a memory is computed, given back all at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastkm {

// Grows to the largest memory it has seen and stays with its thread, so a steady state allocates nothing.
class Arena {
 public:
  // The arena of the calling thread, with everything that was taken from it given back.
  static Arena& fresh();

  // Uninitialised space for `count` elements, aligned to a cache line.
  template <class Real>
  Real* allocate(int64_t count) {
    return static_cast<Real*>(allocate_bytes(static_cast<size_t>(count) * sizeof(Real)));
  }

  // Give back everything taken after a mark.
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
