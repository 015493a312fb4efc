// Working memory of one thread: taken piece by piece while a memory is computed, given back all at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastkm {

// Grows to the largest memory it has seen and stays with its thread, so a steady state allocates nothing.
class Arena {
 public:
  static Arena& of_this_thread();

  // Uninitialised space for `count` elements, aligned to a cache line.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }

  void reset();
  ~Arena();

 private:
  void* take_bytes(size_t bytes);

  struct Block {
    std::byte* data;
    size_t size;
  };
  std::vector<Block> blocks_;
  size_t used_ = 0;  // of the last block
};

}  // namespace fastkm
