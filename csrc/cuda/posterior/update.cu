// update_posterior on a GPU: see update.cuh.
#include "cuda/posterior/update.cuh"

namespace fastkm {
namespace {

template <Cores kCores, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) update_kernel(PosteriorArgs<float> args, int64_t B, Plan plan) {
  update_memories<kCores, kColumns, Direction::kIn>(args, B, plan);
}

}  // namespace

const char* cuda::update_posterior(const PosteriorArgs<float>& args, int64_t B, Context& context) {
  if (B == 0) return nullptr;
  const bool exact = args.precision == kIeee;
  return launch_update<Direction::kIn>(
      {.factor = update_kernel<kCudaCores, 64>,
       .narrow = exact ? update_kernel<kCudaCores, 64> : update_kernel<kTensorCores, 64>,
       .wide = exact ? update_kernel<kCudaCores, 128> : update_kernel<kTensorCores, 128>},
      args, B, {}, context);
}

}  // namespace fastkm
