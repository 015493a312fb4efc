// Asks the caches for memory that is needed soon.
#pragma once

#include "kernel_args.h"

namespace fastkm::FASTKM_LEVEL {

// Fetched part by part, between the tiles of products, so that waiting for it and computing go on together: many
// fetches at once wait for one another, and computing for them. A store waits for its line as a load does.
class Prefetch {
 public:
  explicit Prefetch(int64_t parts) : parts_(parts) {}

  // Rows that lie apart are left to come when they are needed; there may be none.
  template <class Real>
  void add(const Batch<Real>& rows, int64_t b, int64_t first, int64_t count, int64_t columns) {
    if (!rows.data || rows.stride[2] != 1 || rows.stride[1] != columns) return;
    const char* begin = reinterpret_cast<const char*>(rows.at(b, first));
    const int64_t bytes = count * columns * static_cast<int64_t>(sizeof(Real));
    regions_[count_++] = {begin, begin + bytes, bytes / parts_ + 1};
  }

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
    int64_t part;  // bytes
  };
  Region regions_[10];
  int count_ = 0;
  int64_t parts_;
};

}  // namespace fastkm::FASTKM_LEVEL
