// Calls that run on a GPU. Compiled with FASTKM_WITH_CUDA, and with FASTKM_SIMT for the simulator, which runs CUDA
// threads on the host.
#pragma once

#include <torch/csrc/stable/ops.h>

#ifdef FASTKM_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <vector>

#include "bindings/make_tensor.h"
#include "bindings/tensor_args.h"
#include "cuda/kernels.h"

namespace fastkm {

class Gpu {
 public:
  static constexpr bool kOnHost = false;

  template <class... Tensors>
  explicit Gpu(const Tensor& memory, const Tensors&... others) : memory_(memory) {
#ifdef FASTKM_WITH_CUDA
    STD_TORCH_CHECK(memory.is_cuda(), "fastkm: the CUDA kernels take tensors on a CUDA device, got one on a CPU");
    guard_.emplace(memory.get_device_index());
#endif
    (expect_here(others), ...);
  }

  template <class F>
  void for_dtype(ScalarType type, const F& compute) const {
    STD_TORCH_CHECK(type == ScalarType::Float, "fastkm: the CUDA kernels take float32 memories");
    compute(float{});
  }

  static int64_t expect_codes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                              const Tensor& memory) {
    return expect_low_codes(tensor, name, sizes, memory);
  }

  // A cotangent in the dtype of what it belongs to.
  static Tensor like_codes(const Tensor& result, const Tensor& codes) { return as_type(result, codes.scalar_type()); }
  static ScalarType stored_type(ScalarType) { return ScalarType::Float; }
  static Tensor as_type(const Tensor& result, ScalarType type) {
    if (type == ScalarType::Float) return result;
    Tensor converted = make_tensor(result, {result.size(0), result.size(1), result.size(2)}, type);
    torch::stable::copy_(converted, result);
    return converted;
  }

  template <class Real, class Entry, class Launcher, class... Arguments>
  void run(int64_t B, Entry Kernels<Real>::*, const Launcher& launcher, const Arguments&... arguments) const {
    launch(launcher, arguments..., B);
  }

  template <class Launcher, class... Arguments>
  void launch(const Launcher& launcher, const Arguments&... arguments) const {
    Context context(memory_);
    const char* const error = launcher(arguments..., static_cast<cuda::Context&>(context));
    STD_TORCH_CHECK(!error, "fastkm: a CUDA kernel did not start: ", error);
  }

 private:
  struct Context : cuda::Context {
    const Tensor& memory;
    std::vector<Tensor> workspaces;

    explicit Context(const Tensor& memory) : memory(memory) {
      allocate = [](cuda::Context& self, int64_t floats) {
        Context& own = static_cast<Context&>(self);
        own.workspaces.push_back(make_tensor(own.memory, {floats}));
        return data_of<float>(own.workspaces.back());
      };
#ifdef FASTKM_WITH_CUDA
      // Look the function up by name: a CPU build of torch does not have it, and the extension must load there too.
      using CurrentStream = int32_t (*)(int32_t device, void** stream);
      static const auto current_stream =
          reinterpret_cast<CurrentStream>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
      STD_TORCH_CHECK(current_stream && current_stream(memory.get_device_index(), &stream) == 0,
                      "fastkm: this build of torch has no CUDA streams");
#endif
    }
  };

  void expect_here(const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.is_cuda() == memory_.is_cuda() && tensor.get_device_index() == memory_.get_device_index(),
                    "fastkm: the tensors are on different devices");
  }
  void expect_here(const std::optional<Tensor>& tensor) const {
    if (tensor) expect_here(*tensor);
  }

  const Tensor& memory_;
#ifdef FASTKM_WITH_CUDA
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

}  // namespace fastkm
