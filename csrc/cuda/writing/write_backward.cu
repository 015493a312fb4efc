// Backward of the write on a GPU: one block a memory, one launch.
#include "cuda/writing/search_refactored_backward.cuh"

namespace fastkm {
namespace {

// Where the buffers of a block are; most used first.
__host__ __device__ void lay_out(Reverse& chunk, Space& space, const WritingArgs<float>& args) {
  set_sizes(chunk, args.posterior);
  const int64_t panel = kChunk * chunk.width, codes = kChunk * chunk.columns;
  const int64_t square = int64_t(chunk.width) * chunk.width;
  chunk.a = space.take(chunk.width), chunk.product = space.take(chunk.width);
  chunk.w = space.take(3 * panel), chunk.v = chunk.w + panel, chunk.x_bar = chunk.v + panel;
  chunk.c = space.take(panel), chunk.p = space.take(panel), chunk.q = space.take(panel);
  chunk.x = space.take(panel), chunk.w_bar = space.take(panel), chunk.a_bar = space.take(panel);
  chunk.inverse = space.take(square), chunk.cov = space.take(square);
  chunk.values_bar = space.take(3 * codes);
  chunk.delta = chunk.values_bar + codes, chunk.values = chunk.delta + codes;
  chunk.given = space.take(panel), chunk.gain = space.take(panel);
  chunk.cov_bar = space.take(square);
  if (factors_once(args)) return take_passes(chunk, space, args.posterior);
  take_attempts(chunk.attempts, space, args, chunk.width);
  chunk.made = space.take_global(args.num_opt_iters * 5 * chunk.width);
  chunk.made_numbers = space.take_global(args.num_opt_iters * 3);
  chunk.of_w = space.take(chunk.width), chunk.of_a = space.take(chunk.width), chunk.of_c = space.take(chunk.width);
  chunk.of_r = space.take(chunk.width), chunk.solved = space.take(chunk.width);
  chunk.solved_x_bar = space.take(chunk.width), chunk.left = space.take(chunk.width);
  chunk.right = space.take(chunk.width), chunk.system = space.take(square);
  chunk.gram_bar = space.take(square), chunk.solved_bar = space.take(square);
  chunk.search_cov_bar = space.take(square);
  take_passes(chunk, space, args.posterior);
}

// Down to the codes: what conditioning and the search say of R and Z.
//   Z̄ += X̄ R + (Q̄ + Q̄ᵀ) Z      R̄ = R̄' − Wᵀ Z̄ + 2 Ḡ R + X̄ᵀ Z, with the Z̄ of conditioning,
// where 2 Ḡ R = −Wᵀ (V R) − Vᵀ (W R) unless the search factored afresh.
template <bool kAfresh>
__device__ void codes_backward(Reverse& chunk, const Batch<float>& to_values, int64_t b, int64_t first) {
  const int K = chunk.K, C = chunk.C, width = chunk.width, columns = chunk.columns, count = chunk.count;

  // W R = Z − L E, in the place of E.
  for (int k = threadIdx.x; k < C; k += kThreads)
    for (int t = count - 1; t >= 0; --t) {
      float sum = chunk.values[t * columns + k];
      for (int j = 0; j <= t; ++j) sum -= chunk.root_at(t, j) * chunk.delta[j * columns + k];
      chunk.delta[t * columns + k] = sum;
    }
  const Side mean{chunk.state, 1, columns};  // columns of R
  product<kEither, 16, 128>(
      count, C, K, Side{chunk.x_bar, width, 1}, mean, chunk, false, [&](int i, int j, const auto& sums) {
        constexpr int kEach = sizeof(sums) / sizeof(sums[0]);
#pragma unroll
        for (int n = 0; n < kEach; ++n) {
          const int k = j + n;
          if (k >= C) continue;
          float sum = sums[n] + chunk.values_bar[i * columns + k];
          for (int t = 0; t < count; ++t)
            sum += (chunk.inner_bar[i][t] + chunk.inner_bar[t][i]) * chunk.values[t * columns + k];
          *element(to_values, b, first + i, k) = chunk.seen[i] ? sum : 0;
        }
      });
  if constexpr (kAfresh)
    product<kEither, 64, 64>(K, C, K, Side{chunk.gram_bar, width, 1}, mean, chunk, false,
                             [&](int i, int j, const auto& sums) {
                               float* const at = mean_bar_at(chunk, i, j);
                               put_sum(at, at, 1, 2, sums, C - j);
                             });
  else
    product<kEither, 16, 128>(count, C, K, Side{chunk.v, width, 1}, mean, chunk, false,
                              [&](int i, int j, const auto& sums) {
                                float* const at = chunk.values_bar + i * columns + j;
                                put_sum(at, at, 1, 1, sums, C - j);
                              });

  // Wᵀ Z̄ + Vᵀ (W R) − X̄ᵀ Z in one product: the panels lie one behind the other, whole chunks of them.
  const int hidden = kChunk - count;
  fill_zero(chunk.row(chunk.w, count), int64_t(hidden) * width);
  fill_zero(chunk.values_bar + count * columns, int64_t(hidden) * columns);
  fill_zero(chunk.delta + count * columns, int64_t(hidden) * columns);
  for (int n = threadIdx.x; n < kChunk * width; n += kThreads) chunk.x_bar[n] = -chunk.x_bar[n];
  __syncthreads();
  product<kEither, 64, 64>(K, C, 3 * kChunk, Side{chunk.w, 1, width}, Side{chunk.values_bar, 1, columns}, chunk, false,
                           [&](int i, int j, const auto& sums) {
                             float* const at = mean_bar_at(chunk, i, j);
                             put_sum(at, at, 1, -1, sums, C - j);
                           });
  if constexpr (kAfresh)
    for (int64_t n = threadIdx.x; n < int64_t(width) * width; n += kThreads)
      chunk.cov_bar[n] += chunk.search_cov_bar[n];
  else
    for (int n = threadIdx.x; n < count * width; n += kThreads) chunk.given[n] += chunk.a_bar[n];
  __syncthreads();
  add_to_cov_bar(chunk);
}

// Bytes a memory: inputs and cotangents are read once, Z and the weights once more for the way back, and cotangents are
// written once, 1.2 times the least, while R and its cotangent fit on chip, at K = 32 and C = 100. Where the cotangent
// does not, it is read three times a chunk and written once, 3.6 times the least at C = 200 and K = 64 or 128, beside
// what the working copy of R takes of the workspace.
template <bool kAfresh>
__global__ void __launch_bounds__(kThreads, 1)
    write_backward_kernel(FASTKM_IN_PLACE WritingArgs<float> args, FASTKM_IN_PLACE WritingGrads<float> grads, int64_t B,
                          FASTKM_IN_PLACE Workspace workspace) {
  const PosteriorArgs<float>& shared = args.posterior;
  const PosteriorGrads<float>& told = grads.posterior;
  Reverse& chunk = *reinterpret_cast<Reverse*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Space space = space_of_block<Reverse>(workspace);
    lay_out(chunk, space, args);
    chunk.precision = shared.precision;
  }
  clear_space<Reverse>(workspace);
  const int K = chunk.K, width = chunk.width;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    if (threadIdx.x == 0) {
      chunk.ridge = *element(args.ridge, b);
      chunk.ridge_bar = 0;
    }
    load_memory(chunk, shared, told, b);
    condition_all(chunk, shared, b);

    const int64_t chunks = (shared.T_ + kChunk - 1) / kChunk;
    for (int64_t first = (chunks - 1) * kChunk; first >= 0; first -= kChunk) {
      restore_chunk(chunk, shared, b, first);

      // The steps of the search again, and back through them.
      if constexpr (kAfresh) {
        take_inner_products<true>(chunk, chunk.system, 0);
        search_afresh(chunk, chunk.attempts);
      } else {
        take_inner_products<true>(chunk, chunk.inverse, chunk.ridge);
        if (!invert(chunk.inverse, K, width, chunk.p, chunk)) hide_patterns(chunk);
        search<kReplay>(chunk);
      }
      condition_backward(chunk, told, grads.weights, b, first);
      if constexpr (kAfresh)
        search_afresh_backward(chunk);
      else
        search_backward(chunk);
      codes_backward<kAfresh>(chunk, told.to_values, b, first);
      if (threadIdx.x < chunk.count) *element(told.to_noise_var, b, first + threadIdx.x) = chunk.noise_bar[threadIdx.x];
      __syncthreads();
    }
    store_mean_bar(chunk, told, b);
    store_cov_bar(chunk, told, b);
    if (threadIdx.x == 0) *element(grads.to_ridge, b) = chunk.ridge_bar;
    __syncthreads();
  }
}

template <bool kAfresh>
const char* start(const WritingArgs<float>& args, const WritingGrads<float>& grads, int64_t B, cuda::Context& context) {
  const Device device = current_device();
  Workspace workspace = measure<Reverse>(device, [&](Reverse& head, Space& space) { lay_out(head, space, args); });
  const int64_t blocks = min(B, resident_blocks(device, write_backward_kernel<kAfresh>, workspace));
  if (workspace.block_floats > 0) workspace.data = context.allocate(context, blocks * workspace.block_floats);
  return launch(write_backward_kernel<kAfresh>, blocks, kThreads, workspace.shared_bytes(), context.stream, args, grads,
                B, workspace);
}

}  // namespace

const char* cuda::write_backward(const WritingArgs<float>& args, const WritingGrads<float>& grads, int64_t B,
                                 Context& context) {
  if (B == 0) return nullptr;
  return factors_once(args) ? start<false>(args, grads, B, context) : start<true>(args, grads, B, context);
}

}  // namespace fastkm
