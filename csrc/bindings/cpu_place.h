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

  // Check a tensor of codes and return its Element. Where a kernel does not widen codes itself, they have the type of
  // the memory.
  static int64_t expect_codes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                              const Tensor& memory) {
    expect(tensor, name, sizes, memory.scalar_type());
    return kFloat32;
  }
  static Tensor like_codes(const Tensor& result, const Tensor&) { return result; }
  // The type in which a kernel stores codes of a type, and what it has stored as that type.
  static ScalarType stored_type(ScalarType type) { return type; }
  static Tensor as_type(const Tensor& result, ScalarType) { return result; }

  // Compute `B` memories with an entry of the table. Many memories are spread over torch's threads; of few, all threads
  // share each. A result depends neither on the other memories of the batch nor on the number of threads.
  template <class Real, class Entry, class Launcher, class... Arguments>
  void run(int64_t B, Entry Kernels<Real>::* entry, const Launcher&, const Arguments&... arguments) const {
    const auto& compute = kernels<Real>().*entry;
    over_threads(B, [&](int64_t begin, int64_t end) { compute(arguments..., begin, end); });
  }

  // Call compute(begin, end) for parts of [0, n): each part on one thread, or one after the other with all threads as
  // its team if there are fewer parts than threads.
  template <class F>
  static void over_threads(int64_t n, const F& compute) {
    const int64_t threads = torch::stable::get_num_threads();
    if (n >= threads) return torch::stable::parallel_for(0, n, 1, compute);
    const Team team{threads, [](int64_t count, Part part, const void* context) {
                      torch::stable::parallel_for(0, count, 1,
                                                  [&](int64_t begin, int64_t end) { part(context, begin, end); });
                    }};
    const Gathered gathered(team);
    compute(int64_t{0}, n);
  }

 private:
  // The calling thread has a team while this lives.
  struct Gathered {
    const Team* before = current_team();
    explicit Gathered(const Team& team) { current_team() = &team; }
    ~Gathered() { current_team() = before; }
    Gathered(const Gathered&) = delete;
  };

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
