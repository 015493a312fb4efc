// From torch tensors to kernel arguments, on the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>

#include "cuda/kernels.h"
#include "kernel_args.h"

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

// Positive numbers: one for all memories, one a memory or, where `sizes` has two axes, one a pattern; trailing axes may
// be missing. Where the host can read them it does.
template <class T, class Place>
Batch<const T> positive_numbers_of(const Place&, const Tensor& tensor, const char* name,
                                   std::initializer_list<int64_t> sizes, const Tensor& memory) {
  bool same = tensor.dim() <= static_cast<int64_t>(sizes.size()) && tensor.scalar_type() == memory.scalar_type();
  for (int64_t axis = 0; same && axis < tensor.dim(); ++axis) same = tensor.size(axis) == sizes.begin()[axis];
  STD_TORCH_CHECK(same, "fastkm: ", name, " has a shape or dtype that does not fit the other arguments");
  const Batch<const T> numbers = batch_of<const T>(tensor);
  if constexpr (Place::kOnHost) {
    const auto distinct = [&](int64_t axis) {
      return axis >= tensor.dim() || (numbers.stride[axis] == 0 && tensor.size(axis) > 0) ? 1 : tensor.size(axis);
    };
    bool positive = true;
    for (int64_t b = 0; b < distinct(0); ++b)
      for (int64_t t = 0; t < distinct(1); ++t)
        positive &=
            *numbers.at(b, t) >= std::numeric_limits<T>::min() && *numbers.at(b, t) <= std::numeric_limits<T>::max();
    STD_TORCH_CHECK(positive, "fastkm: ", name, " must be positive and finite");
  }
  return numbers;
}

// A large result is met page by page as it is written, which can take longer than to compute it: ask for large pages.
inline void prefer_large_pages(const Tensor& made) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(made.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<size_t>(made.numel()) * made.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  if (end > first + kPage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a wish: it may fail
#endif
}

// Like torch's own new_empty, without its way through the dispatcher, which a call on a small memory takes six times.
inline Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes,
                   std::optional<ScalarType> type = std::nullopt) {
  int64_t strides[3] = {1, 1, 1};
  for (size_t axis = sizes.size(); axis-- > 1;)
    strides[axis - 1] = strides[axis] * std::max<int64_t>(sizes.begin()[axis], 1);
  int32_t dtype, device, index;
  aoti_torch_get_dtype(like.get(), &dtype);
  aoti_torch_get_device_type(like.get(), &device);
  aoti_torch_get_device_index(like.get(), &index);
  if (type) dtype = *type == ScalarType::Int ? aoti_torch_dtype_int32() : dtype;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                         dtype, device, index, &handle));
  const Tensor made(handle);
  if (device == aoti_torch_device_type_cpu()) prefer_large_pages(made);
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
class Cpu {
 public:
  static constexpr bool kOnHost = true;

  template <class... Tensors>
  explicit Cpu(const Tensors&... tensors) {
    (expect_here(tensors), ...);
  }

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

 private:
  static void expect_here(const Tensor& tensor) {
    int32_t device;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
    STD_TORCH_CHECK(device == aoti_torch_device_type_cpu(), "fastkm: the tensors are on different devices");
  }
  static void expect_here(const std::optional<Tensor>& tensor) {
    if (tensor) expect_here(*tensor);
  }
};

}  // namespace fastkm
