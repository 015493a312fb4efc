// Backward of remove_patterns on a GPU: see posterior/update_backward.cuh.
#include "cuda/posterior/update_backward.cuh"

namespace fastkm {
namespace {

__global__ void __launch_bounds__(kThreads, 1)
    remove_backward_kernel(FASTKM_IN_PLACE PosteriorArgs<float> args, FASTKM_IN_PLACE PosteriorGrads<float> grads,
                           int64_t B, FASTKM_IN_PLACE Workspace workspace) {
  update_memories_backward<Direction::kOut>(args, grads, B, workspace);
}

}  // namespace

const char* cuda::remove_patterns_backward(const PosteriorArgs<float>& args, const PosteriorGrads<float>& grads,
                                           int64_t B, Context& context) {
  return launch_update_backward(remove_backward_kernel, args, grads, B, context);
}

}  // namespace fastkm
