// Backward of update_posterior on a GPU: see posterior/update_backward.cuh.
#include "cuda/posterior/update_backward.cuh"

namespace fastkm {
namespace {

__global__ void __launch_bounds__(kThreads, 1)
    update_backward_kernel(FASTKM_IN_PLACE PosteriorArgs<float> args, FASTKM_IN_PLACE PosteriorGrads<float> grads,
                           int64_t B, FASTKM_IN_PLACE Workspace workspace) {
  update_memories_backward<Direction::kIn>(args, grads, B, workspace);
}

}  // namespace

const char* cuda::update_posterior_backward(const PosteriorArgs<float>& args, const PosteriorGrads<float>& grads,
                                            int64_t B, Context& context) {
  return launch_update_backward(update_backward_kernel, args, grads, B, context);
}

}  // namespace fastkm
