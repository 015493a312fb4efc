// From torch tensors to kernel arguments, on the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <limits>
#include <optional>

#include "kernel_args.h"

namespace fastkm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The public functions check every argument with words; these checks keep a direct call of an operator from reading
// memory that is not there.
inline void expect(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, ScalarType type) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.scalar_type() == type;
  int64_t axis = 0;
  for (int64_t size : sizes) same = same && tensor.size(axis++) == size;
  STD_TORCH_CHECK(same, "fastkm: ", name, " has a shape or dtype that does not fit the other arguments");
}

// The Element of codes of a type.
inline int64_t element_of(ScalarType type) {
  return type == ScalarType::BFloat16 ? kBFloat16 : type == ScalarType::Half ? kFloat16 : kFloat32;
}

// Check codes, which may be of 16 bits beside a memory of float32, and return their Element.
inline int64_t expect_low_codes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                                const Tensor& memory) {
  const int64_t element = element_of(tensor.scalar_type());
  const bool low = element != kFloat32 && memory.scalar_type() == ScalarType::Float;
  expect(tensor, name, sizes, low ? tensor.scalar_type() : memory.scalar_type());
  return element;
}

template <class Real>
Batch<Real> batch_of(const Tensor& tensor) {
  Batch<Real> batch;
  batch.data = static_cast<Real*>(const_cast<void*>(tensor.const_data_ptr()));
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) batch.stride[axis] = tensor.stride(axis);
  return batch;
}

template <class Real>
Real* data_of(const Tensor& tensor) {
  return static_cast<Real*>(tensor.mutable_data_ptr());
}

// Positive numbers: one for all memories, one for each memory or, if `sizes` has two axes, one for each pattern.
// Trailing axes may be missing. On the CPU the values are checked too: positive, and finite or at most `most`.
template <class Real, class Place>
Batch<const Real> positive_numbers_of(const Place&, const Tensor& tensor, const char* name,
                                      std::initializer_list<int64_t> sizes, const Tensor& memory,
                                      Real most = std::numeric_limits<Real>::max()) {
  bool same = tensor.dim() <= static_cast<int64_t>(sizes.size()) && tensor.scalar_type() == memory.scalar_type();
  for (int64_t axis = 0; same && axis < tensor.dim(); ++axis) same = tensor.size(axis) == sizes.begin()[axis];
  STD_TORCH_CHECK(same, "fastkm: ", name, " has a shape or dtype that does not fit the other arguments");
  const Batch<const Real> numbers = batch_of<const Real>(tensor);
  if constexpr (Place::kOnHost) {
    const auto distinct = [&](int64_t axis) {
      return axis >= tensor.dim() || (numbers.stride[axis] == 0 && tensor.size(axis) > 0) ? 1 : tensor.size(axis);
    };
    bool positive = true;
    for (int64_t b = 0; b < distinct(0); ++b)
      for (int64_t t = 0; t < distinct(1); ++t)
        positive &= *numbers.at(b, t) >= std::numeric_limits<Real>::min() && *numbers.at(b, t) <= most;
    STD_TORCH_CHECK(positive, "fastkm: ", name, " must be positive and ", most > 1 ? "finite" : "at most 1");
  }
  return numbers;
}

// A cotangent that may be missing.
template <class Real>
Batch<const Real> cotangent_of(const std::optional<Tensor>& grad, const char* name,
                               std::initializer_list<int64_t> sizes, const Tensor& like) {
  if (!grad) return {};
  expect(*grad, name, sizes, like.scalar_type());
  return batch_of<const Real>(*grad);
}

}  // namespace fastkm
