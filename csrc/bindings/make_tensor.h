// New tensors for results and workspaces.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "bindings/error_check.h"
#include "bindings/tensor_args.h"

namespace fastkm {

// Ask for large pages. The first write to each page of a new result costs a page fault; with small pages the faults of
// a large result can take longer than computing it.
inline void prefer_large_pages(const Tensor& made) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(made.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<size_t>(made.numel()) * made.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  if (end > first + kPage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // the request may fail
#endif
}

// On the simulator a new tensor holds NaN, so that a test notices an entry that no kernel wrote.
inline void fill_for_simulator([[maybe_unused]] const Tensor& made) {
#ifdef FASTKM_SIMT
  __builtin_memset(made.mutable_data_ptr(), 0xFF, static_cast<size_t>(made.numel()) * made.element_size());
#endif
}

// The number of a type in the C interface of torch.
inline int32_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::Int: return aoti_torch_dtype_int32();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    default: return aoti_torch_dtype_float32();
  }
}

// A new tensor on the device of `like`. This does what new_empty does without going through the dispatcher: a call
// makes up to six tensors, and on a small memory the dispatcher would take longer than the kernel.
inline Tensor make_tensor(const Tensor& like, std::initializer_list<int64_t> sizes,
                          std::optional<ScalarType> type = std::nullopt) {
  int64_t strides[3] = {1, 1, 1};
  for (size_t axis = sizes.size(); axis-- > 1;)
    strides[axis - 1] = strides[axis] * std::max<int64_t>(sizes.begin()[axis], 1);
  int32_t dtype, device, index;
  aoti_torch_get_dtype(like.get(), &dtype);
  aoti_torch_get_device_type(like.get(), &device);
  aoti_torch_get_device_index(like.get(), &index);
  if (type) dtype = dtype_code(*type);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                         dtype, device, index, &handle));
  const Tensor made(handle);
  if (device == aoti_torch_device_type_cpu()) prefer_large_pages(made);
  fill_for_simulator(made);
  return made;
}

}  // namespace fastkm
