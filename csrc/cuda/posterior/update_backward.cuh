// Backward of an update on a GPU: one thread block a memory, one launch. That of a removal is the same for −U: the
// covariance and its cotangent change sign on the way in, and the cotangent again on the way out.
//
// Bytes a memory: inputs and cotangents are read once, Z and W once more for the way back, and cotangents are written
// once. That is 1.2 times the least while R and R̄ fit on chip, up to K = 64 at C = 200. Beyond, R̄ is read three times a
// chunk and written once, 3.6 times the least at K = 128; the copy of R and T (K + C) numbers then go to the workspace
// and back.
//
// The equations are those of conditioning_backward.cuh.
#pragma once

#include "cuda/posterior/conditioning_backward.cuh"

namespace fastkm {
namespace {

// The buffers of a thread block, most used first.
__host__ __device__ void lay_out(ConditioningBackward& chunk, Arena& arena, const PosteriorArgs<float>& args) {
  set_sizes(chunk, args);
  const int64_t rows = kChunk * chunk.width, codes = kChunk * chunk.columns;
  const int64_t square = int64_t(chunk.width) * chunk.width;
  chunk.a = arena.allocate(chunk.width);
  chunk.w = arena.allocate(rows);
  chunk.c = arena.allocate(rows);
  chunk.gain = arena.allocate(rows);
  chunk.grad_projected = arena.allocate(rows);
  chunk.grad_w = arena.allocate(rows);
  chunk.cov = arena.allocate(square);
  chunk.grad_cov = arena.allocate(square);
  chunk.values = arena.allocate(codes);
  chunk.whitened = arena.allocate(codes);
  chunk.grad_values = arena.allocate(codes);
  allocate_passes(chunk, arena, args);
}

// Store the cotangents of a chunk's patterns; those of masked ones are zero.
__device__ void store_chunk(const ConditioningBackward& chunk, const PosteriorGrads<float>& grads, int64_t b,
                            int64_t first) {
  const int K = chunk.K, C = chunk.C, count = chunk.count;
  for (int n = threadIdx.x; n < count * K; n += kThreads) {
    const int t = n / K, k = n % K;
    *element(grads.to_weights, b, first + t, k) = chunk.unmasked[t] ? chunk.grad_w[t * chunk.width + k] : 0;
  }
  for (int n = threadIdx.x; n < count * C; n += kThreads) {
    const int t = n / C, k = n % C;
    *element(grads.to_values, b, first + t, k) = chunk.unmasked[t] ? chunk.grad_values[t * chunk.columns + k] : 0;
  }
  if (threadIdx.x < kChunk && int(threadIdx.x) < count)
    *element(grads.to_noise_var, b, first + threadIdx.x) = chunk.grad_noise[threadIdx.x];
}

// U and its cotangent. Ends with a barrier, as it begins.
__device__ inline void negate_covariances(const ConditioningBackward& chunk) {
  __syncthreads();
  negate(chunk.cov, chunk.width * chunk.width);
  negate(chunk.grad_cov, chunk.width * chunk.width);
}

template <Direction kDirection>
__device__ __forceinline__ void update_memories_backward(const PosteriorArgs<float>& args,
                                                         const PosteriorGrads<float>& grads, int64_t B,
                                                         const Workspace& workspace) {
  constexpr bool kRemoves = kDirection == Direction::kOut;
  ConditioningBackward& chunk = *reinterpret_cast<ConditioningBackward*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Arena arena = arena_behind<ConditioningBackward>(workspace);
    lay_out(chunk, arena, args);
    chunk.precision = args.precision;
  }
  clear_buffers<ConditioningBackward>(workspace);
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    load_memory(chunk, args, grads, b);
    if constexpr (kRemoves) negate_covariances(chunk);
    condition_all<kDirection>(chunk, args, b);
    for (int64_t first = (args.T - 1) / kChunk * kChunk; first >= 0 && args.T > 0; first -= kChunk) {
      restore_chunk(chunk, args, b, first);
      condition<kDirection>(chunk);
      condition_backward(chunk, grads, {}, b, first);
      store_chunk(chunk, grads, b, first);
      product<kAnyCores, 64, 64>(AddToGradMean{chunk, -1}, {chunk.K, chunk.C, chunk.count},
                                 Operand{chunk.w, 1, chunk.width}, Operand{chunk.grad_values, 1, chunk.columns}, chunk);
      add_to_grad_cov(chunk);
    }
    if constexpr (kRemoves) negate_covariances(chunk);
    store_cotangents(chunk, grads, b);
    __syncthreads();
  }
}

using UpdateBackwardKernel = void (*)(PosteriorArgs<float>, PosteriorGrads<float>, int64_t B, Workspace);

inline const char* launch_update_backward(UpdateBackwardKernel kernel, const PosteriorArgs<float>& args,
                                          const PosteriorGrads<float>& grads, int64_t B, cuda::Context& context) {
  if (B == 0) return nullptr;
  const Device device = current_device();
  const auto layout = [&](ConditioningBackward& head, Arena& arena) { lay_out(head, arena, args); };
  Workspace workspace = measure_workspace<ConditioningBackward>(device, layout);
  const int64_t blocks = min(B, resident_blocks(device, kernel, workspace));
  if (workspace.block_floats > 0) workspace.data = context.allocate(context, blocks * workspace.block_floats);
  return launch(kernel, blocks, kThreads, workspace.shared_bytes(), context.stream, args, grads, B, workspace);
}

}  // namespace
}  // namespace fastkm
