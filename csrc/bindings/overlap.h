// Whether a tensor may be written while others are read.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <utility>
#include <vector>

#include "bindings/tensor_args.h"

namespace fastkm {

// The addresses from the first entry to behind the last.
inline std::pair<const char*, const char*> addresses_of(const Tensor& tensor) {
  const char* const begin = static_cast<const char*>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) last += tensor.stride(axis) * (tensor.size(axis) - 1);
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

inline bool share_memory(const Tensor& a, const Tensor& b) {
  const auto [begin, end] = addresses_of(a);
  const auto [other_begin, other_end] = addresses_of(b);
  return begin < other_end && other_begin < end;
}

inline bool are_same(const Tensor& a, const Tensor& b) {
  bool same = a.const_data_ptr() == b.const_data_ptr() && a.dim() == b.dim();
  for (int64_t axis = 0; same && axis < a.dim(); ++axis) same = a.stride(axis) == b.stride(axis);
  return same;
}

// Whether two entries may lie at one place: an axis steps no further than the axes inside it reach.
inline bool overlaps_itself(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  for (int64_t axis = 0; axis < tensor.dim(); ++axis)
    if (tensor.size(axis) > 1) axes.emplace_back(tensor.stride(axis), tensor.size(axis));
  std::sort(axes.begin(), axes.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : axes) {
    if (stride <= reach) return tensor.numel() > 0;
    reach += stride * (size - 1);
  }
  return false;
}

// `out` may be `own`, the argument that it replaces; it shares no memory with others, of which some may be missing.
inline void expect_apart(const Tensor& out, const Tensor& own, std::initializer_list<const Tensor*> others) {
  bool apart = !overlaps_itself(out) && (are_same(out, own) || !share_memory(out, own));
  for (const Tensor* other : others) apart = apart && !(other && share_memory(out, *other));
  STD_TORCH_CHECK(apart, "fastkm: out shares memory with another argument");
}

}  // namespace fastkm
