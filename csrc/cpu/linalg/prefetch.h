// Asks the caches for memory that is needed soon.
#pragma once

#include "cpu/linalg/matrix.h"

namespace fastkm::FASTKM_LEVEL {

// Regions of memory that are requested part by part, one part for each tile of a product. Computing then goes on while
// memory answers; requesting a whole region at once would fill the queue of outstanding misses and stop the loads of
// the product. Regions that will be written are requested too: a store needs its cache line like a load.
class Prefetch {
 public:
  explicit Prefetch(int64_t parts) : parts_(parts) {}

  // Add rows [first, first + count) of matrix `b`. Rows that are not contiguous, and null, are left out.
  template <class Real>
  void add(const Batch<Real>& rows, int64_t b, int64_t first, int64_t count, int64_t columns) {
    if (!rows.data || count == 0 || rows.stride[2] != 1 || rows.stride[1] != columns) return;
    const char* begin = reinterpret_cast<const char*>(rows.at(b, first));
    const int64_t bytes = count * columns * static_cast<int64_t>(sizeof(Real));
    regions_[count_++] = {begin, begin + bytes, bytes / parts_ + 1};
  }

  // Add a matrix in working memory.
  template <class Real>
  void add(const Matrix<Real>& m) {
    add(Batch<Real>{m.data, {0, m.ld, 1}}, 0, 0, m.rows, m.ld);
  }

  bool is_empty() const { return count_ == 0; }

  // Request the next part of every region.
  void next_part() {
    for (int i = 0; i < count_; ++i) {
      Region& r = regions_[i];
      const char* stop = r.end - r.at > r.part ? r.at + r.part : r.end;
      for (; r.at < stop; r.at += kLine) __builtin_prefetch(r.at, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Region {
    const char *at, *end;
    int64_t part;  // bytes of one call
  };
  Region regions_[10];
  int count_ = 0;
  int64_t parts_;
};

}  // namespace fastkm::FASTKM_LEVEL
