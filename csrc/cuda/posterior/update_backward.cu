// Backward of update_posterior on a GPU: one block a memory, one launch.
#include "cuda/posterior/conditioning_backward.cuh"

namespace fastkm {
namespace {

// Where the buffers of a block are; most used first.
__host__ __device__ void lay_out(Conditioned& chunk, Space& space, const PosteriorArgs<float>& args) {
  set_sizes(chunk, args);
  const int64_t panel = kChunk * chunk.width, codes = kChunk * chunk.columns;
  const int64_t square = int64_t(chunk.width) * chunk.width;
  chunk.a = space.take(chunk.width), chunk.product = space.take(chunk.width);
  chunk.w = space.take(panel), chunk.c = space.take(panel), chunk.gain = space.take(panel);
  chunk.given = space.take(panel), chunk.w_bar = space.take(panel);
  chunk.cov = space.take(square), chunk.cov_bar = space.take(square);
  chunk.values = space.take(codes), chunk.delta = space.take(codes), chunk.values_bar = space.take(codes);
  take_passes(chunk, space, args);
}

// Bytes a memory: inputs and cotangents are read once, Z and W once more for the way back, and cotangents are written
// once, 1.2 times the least, while R and its cotangent fit on chip, up to K = 64 at C = 200. Where the cotangent does
// not, it is read three times a chunk and written once, 3.6 times the least at K = 128; the working copy of R and
// T (K + C) numbers then go to the workspace and back.
__global__ void __launch_bounds__(kThreads, 1)
    update_backward_kernel(FASTKM_IN_PLACE PosteriorArgs<float> args, FASTKM_IN_PLACE PosteriorGrads<float> grads,
                           int64_t B, FASTKM_IN_PLACE Workspace workspace) {
  Conditioned& chunk = *reinterpret_cast<Conditioned*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Space space = space_of_block<Conditioned>(workspace);
    lay_out(chunk, space, args);
    chunk.precision = args.precision;
  }
  clear_space<Conditioned>(workspace);
  const int K = chunk.K, C = chunk.C, width = chunk.width, columns = chunk.columns;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    load_memory(chunk, args, grads, b);
    condition_all(chunk, args, b);
    for (int64_t first = (args.T_ - 1) / kChunk * kChunk; first >= 0 && args.T_ > 0; first -= kChunk) {
      restore_chunk(chunk, args, b, first);
      condition(chunk);
      condition_backward(chunk, grads, {}, b, first);
      const int count = chunk.count;
      for (int n = threadIdx.x; n < count * K; n += kThreads) {
        const int t = n / K, k = n % K;
        *element(grads.to_weights, b, first + t, k) = chunk.seen[t] ? chunk.w_bar[t * width + k] : 0;
      }
      for (int n = threadIdx.x; n < count * C; n += kThreads) {
        const int t = n / C, k = n % C;
        *element(grads.to_values, b, first + t, k) = chunk.seen[t] ? chunk.values_bar[t * columns + k] : 0;
      }
      if (threadIdx.x < kChunk && int(threadIdx.x) < count)
        *element(grads.to_noise_var, b, first + threadIdx.x) = chunk.noise_bar[threadIdx.x];

      // R̄ = R̄' − Wᵀ Z̄, Ū = Ū' + sym(Wᵀ V̄)
      product<kEither, 64, 64>(K, C, count, Side{chunk.w, 1, width}, Side{chunk.values_bar, 1, columns}, chunk, false,
                               [&](int i, int j, const auto& sums) {
                                 float* const at = mean_bar_at(chunk, i, j);
                                 put_sum(at, at, 1, -1, sums, C - j);
                               });
      add_to_cov_bar(chunk);
    }
    store_mean_bar(chunk, grads, b);
    store_cov_bar(chunk, grads, b);
    __syncthreads();
  }
}

}  // namespace

const char* cuda::update_posterior_backward(const PosteriorArgs<float>& args, const PosteriorGrads<float>& grads,
                                            int64_t B, Context& context) {
  if (B == 0) return nullptr;
  const Device device = current_device();
  Workspace workspace =
      measure<Conditioned>(device, [&](Conditioned& head, Space& space) { lay_out(head, space, args); });
  const int64_t blocks = min(B, resident_blocks(device, update_backward_kernel, workspace));
  if (workspace.block_floats > 0) workspace.data = context.allocate(context, blocks * workspace.block_floats);
  return launch(update_backward_kernel, blocks, kThreads, workspace.shared_bytes(), context.stream, args, grads, B,
                workspace);
}

}  // namespace fastkm
