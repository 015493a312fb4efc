// Backward of write on a GPU: one thread block a memory, one launch.
//
// For each chunk of 16 patterns, from the last to the first:
//   1. Go back to the memory before the chunk (conditioning_backward.cuh) and repeat the search with the known weights.
//   2. Pull the cotangents through the conditioning, then through the search.
//   3. Pull them down to R and Z: with X = Z Rᵀ, Q = Z Zᵀ, A = R Rᵀ + λI, and the Z̄ of the conditioning,
//        Z̄ += X̄ R + (Q̄ + Q̄ᵀ) Z      R̄ = R̄' − Wᵀ Z̄ + 2 Ā R + X̄ᵀ Z
//      where 2 Ā R = −Wᵀ (V R) − Vᵀ (W R) unless the search refactored.
//
// Bytes a memory: inputs and cotangents are read once, Z and the weights once more for the way back, and cotangents are
// written once. That is 1.2 times the least while R and R̄ fit on chip, at K = 32 and C = 100. Beyond, R̄ is read three
// times a chunk and written once, 3.6 times the least at C = 200 and K = 64 or 128, and the copy of R is in the
// workspace.
#include "cuda/writing/search_refactored_backward.cuh"

namespace fastkm {
namespace {

__host__ __device__ void allocate_refactored_grads(RefactoredGrads& grad, Arena& arena, const WritingArgs<float>& args,
                                                   int width) {
  const int64_t square = int64_t(width) * width;
  grad.saved_rows = arena.allocate_global(args.num_opt_iters * 5 * width);
  grad.saved_scalars = arena.allocate_global(args.num_opt_iters * 3);
  grad.w = arena.allocate(width);
  grad.a = arena.allocate(width);
  grad.c = arena.allocate(width);
  grad.r = arena.allocate(width);
  grad.solved = arena.allocate(width);
  grad.solved_x = arena.allocate(width);
  grad.left = arena.allocate(width);
  grad.right = arena.allocate(width);
  grad.gram = arena.allocate(square);
  grad.solved_gram = arena.allocate(square);
  grad.cov = arena.allocate(square);
}

// The buffers of a thread block, most used first. W, V and X̄ lie one behind the other, and so do Z̄, E and Z: one
// product sums over all three.
__host__ __device__ void lay_out(WriteBackward& chunk, Arena& arena, const WritingArgs<float>& args) {
  set_sizes(chunk, args.posterior);
  Search& search = chunk.search;
  const int64_t rows = kChunk * chunk.width, codes = kChunk * chunk.columns;
  const int64_t square = int64_t(chunk.width) * chunk.width;
  chunk.a = arena.allocate(chunk.width);
  search.product = arena.allocate(chunk.width);
  chunk.w = arena.allocate(3 * rows);
  chunk.grad.v = chunk.w + rows;
  chunk.grad.x = chunk.grad.v + rows;
  chunk.c = arena.allocate(rows);
  search.p = arena.allocate(rows);
  search.q = arena.allocate(rows);
  search.x = arena.allocate(rows);
  chunk.grad_w = arena.allocate(rows);
  chunk.grad.a = arena.allocate(rows);
  search.inverse = arena.allocate(square);
  chunk.cov = arena.allocate(square);
  chunk.grad_values = arena.allocate(3 * codes);
  chunk.whitened = chunk.grad_values + codes;
  chunk.values = chunk.whitened + codes;
  chunk.grad_projected = arena.allocate(rows);
  chunk.gain = arena.allocate(rows);
  chunk.grad_cov = arena.allocate(square);
  if (needs_refactoring(args)) {
    allocate_refactored(chunk.refactored, arena, args, chunk.width);
    allocate_refactored_grads(chunk.solve_grad, arena, args, chunk.width);
    search.system = arena.allocate(square);
  }
  allocate_passes(chunk, arena, args.posterior);
}

// Z̄ of step 3, into the caller's result. The cotangents of masked patterns are zero.
__device__ __forceinline__ void store_grad_values(WriteBackward& chunk, const Batch<float>& to_values, int64_t b,
                                                  int64_t first) {
  const int C = chunk.C, columns = chunk.columns, count = chunk.count;
  const auto store = [&](int i, int j, const auto& sums) {
    constexpr int kEach = sizeof(sums) / sizeof(sums[0]);
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int k = j + n;
      if (k >= C) continue;
      float sum = sums[n] + chunk.grad_values[i * columns + k];
      for (int t = 0; t < count; ++t)
        sum += (chunk.grad.value_gram[i][t] + chunk.grad.value_gram[t][i]) * chunk.values[t * columns + k];
      *element(to_values, b, first + i, k) = chunk.unmasked[i] ? sum : 0;
    }
  };
  product<kAnyCores, 16, 128>(store, {count, C, chunk.K}, Operand{chunk.grad.x, chunk.width, 1},
                              Operand{chunk.own_mean, 1, columns}, chunk);
}

// R̄ of step 3. Replaces E by W R = Z − L E, Z̄ by Z̄ + V R, and X̄ by −X̄.
template <bool kRefactor>
__device__ __forceinline__ void add_to_grad_mean(WriteBackward& chunk) {
  const int K = chunk.K, C = chunk.C, width = chunk.width, columns = chunk.columns, count = chunk.count;
  const Operand mean{chunk.own_mean, 1, columns};  // columns of R
  if constexpr (kRefactor)
    product<kAnyCores, 64, 64>(AddToGradMean{chunk, 2}, {K, C, K}, Operand{chunk.solve_grad.gram, width, 1}, mean,
                               chunk);
  else
    product<kAnyCores, 16, 128>(AddRows{chunk.grad_values, columns, C, 1}, {count, C, K},
                                Operand{chunk.grad.v, width, 1}, mean, chunk);

  // Wᵀ Z̄ + Vᵀ (W R) − X̄ᵀ Z as one product over three whole chunks.
  const int missing = kChunk - count;
  fill_zero(chunk.row(chunk.w, count), int64_t(missing) * width);
  fill_zero(chunk.grad_values + count * columns, int64_t(missing) * columns);
  fill_zero(chunk.whitened + count * columns, int64_t(missing) * columns);
  for (int n = threadIdx.x; n < kChunk * width; n += kThreads) chunk.grad.x[n] = -chunk.grad.x[n];
  __syncthreads();
  product<kAnyCores, 64, 64>(AddToGradMean{chunk, -1}, {K, C, 3 * kChunk}, Operand{chunk.w, 1, width},
                             Operand{chunk.grad_values, 1, columns}, chunk);
}

// Step 3, and Ū.
template <bool kRefactor>
__device__ void codes_backward(WriteBackward& chunk, const Batch<float>& to_values, int64_t b, int64_t first) {
  const int C = chunk.C, width = chunk.width, columns = chunk.columns, count = chunk.count;
  for (int k = threadIdx.x; k < C; k += kThreads)
    for (int t = count - 1; t >= 0; --t) {
      float sum = chunk.values[t * columns + k];
      for (int j = 0; j <= t; ++j) sum -= chunk.factor_at(t, j) * chunk.whitened[j * columns + k];
      chunk.whitened[t * columns + k] = sum;
    }
  store_grad_values(chunk, to_values, b, first);
  add_to_grad_mean<kRefactor>(chunk);
  if constexpr (kRefactor)
    for (int64_t n = threadIdx.x; n < int64_t(width) * width; n += kThreads)
      chunk.grad_cov[n] += chunk.solve_grad.cov[n];
  else
    for (int n = threadIdx.x; n < count * width; n += kThreads) chunk.grad_projected[n] += chunk.grad.a[n];
  __syncthreads();
  add_to_grad_cov(chunk);
}

// Step 1 after the memory before the chunk is back.
template <bool kRefactor>
__device__ void repeat_search(WriteBackward& chunk) {
  Search& search = chunk.search;
  if constexpr (kRefactor) {
    inner_products<true>(chunk, search, search.system, 0);
    search_refactored(chunk, search, chunk.refactored);
  } else {
    inner_products<true>(chunk, search, search.inverse, search.ridge);
    if (!invert(search.inverse, chunk.K, chunk.width, search.p, chunk)) mask_chunk(chunk);
    search_weights<kReplay>(chunk, search);
  }
}

template <bool kRefactor>
__global__ void __launch_bounds__(kThreads, 1)
    write_backward_kernel(FASTKM_IN_PLACE WritingArgs<float> args, FASTKM_IN_PLACE WritingGrads<float> grads, int64_t B,
                          FASTKM_IN_PLACE Workspace workspace) {
  const PosteriorArgs<float>& posterior = args.posterior;
  const PosteriorGrads<float>& posterior_grads = grads.posterior;
  WriteBackward& chunk = *reinterpret_cast<WriteBackward*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Arena arena = arena_behind<WriteBackward>(workspace);
    lay_out(chunk, arena, args);
    chunk.precision = posterior.precision;
  }
  clear_buffers<WriteBackward>(workspace);
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    if (threadIdx.x == 0) {
      chunk.search.ridge = *element(args.ridge, b);
      chunk.grad.ridge = 0;
    }
    load_memory(chunk, posterior, posterior_grads, b);
    condition_all(chunk, posterior, b);
    for (int64_t first = (count_chunks(posterior.T) - 1) * kChunk; first >= 0; first -= kChunk) {
      restore_chunk(chunk, posterior, b, first);
      repeat_search<kRefactor>(chunk);
      condition_backward(chunk, posterior_grads, grads.weights, b, first);
      if constexpr (kRefactor)
        search_refactored_backward(chunk);
      else
        search_backward(chunk);
      codes_backward<kRefactor>(chunk, posterior_grads.to_values, b, first);
      if (threadIdx.x < chunk.count)
        *element(posterior_grads.to_noise_var, b, first + threadIdx.x) = chunk.grad_noise[threadIdx.x];
      __syncthreads();
    }
    store_cotangents(chunk, posterior_grads, b);
    if (threadIdx.x == 0) *element(grads.to_ridge, b) = chunk.grad.ridge;
    __syncthreads();
  }
}

template <bool kRefactor>
const char* start(const WritingArgs<float>& args, const WritingGrads<float>& grads, int64_t B, cuda::Context& context) {
  const Device device = current_device();
  const auto layout = [&](WriteBackward& head, Arena& arena) { lay_out(head, arena, args); };
  Workspace workspace = measure_workspace<WriteBackward>(device, layout);
  const int64_t blocks = min(B, resident_blocks(device, write_backward_kernel<kRefactor>, workspace));
  if (workspace.block_floats > 0) workspace.data = context.allocate(context, blocks * workspace.block_floats);
  return launch(write_backward_kernel<kRefactor>, blocks, kThreads, workspace.shared_bytes(), context.stream, args,
                grads, B, workspace);
}

}  // namespace

const char* cuda::write_backward(const WritingArgs<float>& args, const WritingGrads<float>& grads, int64_t B,
                                 Context& context) {
  if (B == 0) return nullptr;
  return needs_refactoring(args) ? start<true>(args, grads, B, context) : start<false>(args, grads, B, context);
}

}  // namespace fastkm
