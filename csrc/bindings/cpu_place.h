// Calls that run on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "bindings/error_check.h"
#include "bindings/tensor_args.h"

namespace fastkm {

// A place is where the kernels of a call run. A binding is written once, as a template on the place; Gpu of gpu_place.h
// has the same members.
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

  // Check a tensor of codes and return its Element. Only on a GPU may codes have another type than the memory.
  static int64_t expect_codes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                              const Tensor& memory) {
    expect(tensor, name, sizes, memory.scalar_type());
    return kFloat32;
  }
  static Tensor like_codes(const Tensor& result, const Tensor&) { return result; }

  // Compute `B` memories with an entry of the table, spread over torch's threads. One thread computes a whole memory,
  // so its result does not depend on the other memories of the batch.
  template <class Real, class Entry, class Launcher, class... Arguments>
  void run(int64_t B, Entry Kernels<Real>::* entry, const Launcher&, const Arguments&... arguments) const {
    const auto& compute = kernels<Real>().*entry;
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
