// remove_patterns and replace_patterns on a GPU: the update of −U, and an update before it. See posterior/update.cuh.
//
// Bytes: those of an update; a replacement moves the memory twice.
#include "cuda/posterior/update.cuh"

namespace fastkm {
namespace {

template <Cores kCores, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) remove_kernel(PosteriorArgs<float> args, int64_t B, Plan plan) {
  update_memories<kCores, kColumns, Direction::kOut>(args, B, plan);
}

const char* launch_removal(const PosteriorArgs<float>& args, int64_t B, bool keeps_failures, cuda::Context& context) {
  if (B == 0) return nullptr;
  const UpdateKernel narrow = remove_kernel<kCudaCores, 64>, wide = remove_kernel<kCudaCores, 128>;
  Plan plan{};
  plan.keeps_failures = keeps_failures;
  return launch_update<Direction::kOut>({narrow, narrow, wide}, args, B, plan, context);
}

}  // namespace

const char* cuda::remove_patterns(const PosteriorArgs<float>& args, int64_t B, Context& context) {
  return launch_removal(args, B, false, context);
}

const char* cuda::replace_patterns(const PosteriorArgs<float>& update, const PosteriorArgs<float>& removal, int64_t B,
                                   Context& context) {
  if (const char* error = update_posterior(update, B, context)) return error;
  return launch_removal(removal, B, true, context);
}

}  // namespace fastkm
