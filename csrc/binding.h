// From torch tensors to kernel arguments, on the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "cuda_kernels.h"
#include "kernels.h"

namespace fastkm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The public functions check every argument with words; these checks keep a direct call of an operator from
// reading memory that is not there.
inline void expect(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, ScalarType type) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.scalar_type() == type;
  int64_t axis = 0;
  for (int64_t size : sizes) same = same && tensor.size(axis++) == size;
  STD_TORCH_CHECK(same, "fastkm: ", name, " has a shape or dtype that does not fit the other arguments");
}

template <class T>
Batch<T> batch_of(const Tensor& tensor) {
  Batch<T> batch;
  batch.data = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) batch.stride[axis] = tensor.stride(axis);
  return batch;
}

inline Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes,
                   std::optional<ScalarType> type = std::nullopt) {
  const Tensor made =
      torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
#ifdef FASTKM_SIMT  // what a kernel forgets to write shall be seen
  __builtin_memset(made.mutable_data_ptr(), 0xFF, static_cast<size_t>(made.numel()) * sizeof(float));
#endif
  return made;
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A cotangent that may be missing.
template <class T>
Batch<const T> cotangent_of(const std::optional<Tensor>& grad, const char* name, std::initializer_list<int64_t> sizes,
                            const Tensor& like) {
  if (!grad) return {};
  expect(*grad, name, sizes, like.scalar_type());
  return batch_of<const T>(*grad);
}

// A launcher of cuda_kernels.h, named but not linked with until a place calls it.
#define FASTKM_LAUNCHER(name) [](auto&... arguments) { return cuda::name(arguments...); }

// Where the kernels of a call run: Cpu here, Gpu in cuda_binding.h. A binding is written once for both.
struct Cpu {
  template <class... Tensors>
  explicit Cpu(const Tensors&...) {}

  // Run `compute(T{})` for the dtype of the tensors.
  template <class F>
  void for_dtype(ScalarType type, const F& compute) const {
    switch (type) {
      case ScalarType::Float: return compute(float{});
      case ScalarType::Double: return compute(double{});
      default: STD_TORCH_CHECK(false, "fastkm: the CPU kernels take float32 and float64");
    }
  }

  // Codes may be of another type than the memory on a GPU only; the Element they are of.
  static int64_t expect_codes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                              const Tensor& memory) {
    expect(tensor, name, sizes, memory.scalar_type());
    return kFloat32;
  }
  static Tensor like_codes(const Tensor& result, const Tensor&) { return result; }

  // Compute `B` memories with an entry of the table, spread over torch's threads; a memory is always computed whole by
  // one thread, so its result does not depend on the batch it sits in.
  template <class T, class Entry, class Launcher, class... Arguments>
  void run(int64_t B, Entry Kernels<T>::* entry, const Launcher&, const Arguments&... arguments) const {
    const auto& compute = kernels<T>().*entry;
    over_threads(B, [&](int64_t begin, int64_t end) { compute(arguments..., begin, end); });
  }

  template <class F>
  static void over_threads(int64_t n, const F& compute) {
    torch::stable::parallel_for(0, n, 1, compute);
  }
};

}  // namespace fastkm
