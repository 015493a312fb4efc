// What the kernels of the matrix-normal family share: their buffers, the factor of a covariance, and the launch.
#pragma once

#include "cuda/linalg/reduce.cuh"
#include "cuda/linalg/solve.cuh"
#include "cuda/linalg/symmetric.cuh"
#include "cuda/linalg/variance_divergence.cuh"

namespace fastkm {
namespace {

constexpr int kColumns = 64;  // of the means, loaded at once

struct Divergence : ThreadBlock {
  int worst;          // status of the covariances
  Factor cov, prior;  // of U and U0
  float* difference;  // [width, width]
  float* tile;        // columns of R − R0 [width, kColumns]
};

enum Task { kLogdet, kKl, kKlBackward };

// The buffers of a thread block, most used first.
__host__ __device__ void lay_out(Divergence& divergence, Arena& arena, int64_t rows, Task task) {
  const int K = static_cast<int>(rows), width = round_up(K, 4);
  const auto allocate_factor = [&] {
    float* const data = arena.allocate(int64_t(width) * width);
    return Factor{data, arena.allocate(Factor::inverse_floats(K)), K, width};
  };
  divergence.cov = allocate_factor();
  if (task == kLogdet) return;
  divergence.prior = allocate_factor();
  divergence.tile = arena.allocate(int64_t(width) * kColumns);
  if (task == kKlBackward) divergence.difference = arena.allocate(int64_t(width) * width);
}

__device__ void set_buffers(Divergence& divergence, const Workspace& workspace, int64_t K, Task task) {
  if (threadIdx.x == 0) {
    Arena arena = arena_behind<Divergence>(workspace);
    lay_out(divergence, arena, K, task);
  }
  __syncthreads();
}

// Factor the covariance of memory b. Returns its status.
__device__ int load_and_factor(const Factor& factor, const Batch<const float>& cov, int64_t b,
                               ThreadBlock& thread_block) {
  load_rows(factor.data, factor.size, factor.size, factor.width, factor.width, operand_of(cov, b));
  __syncthreads();
  check_symmetry(factor.data, factor.size, factor.width, thread_block);
  const int symmetric = thread_block.status;
  cholesky(factor, thread_block);
  const int status = symmetric != kGood ? symmetric : thread_block.positive ? kGood : kNotPositiveDefinite;
  __syncthreads();
  return status;
}

// Load columns [first, first + kColumns) of R − R0. Returns how many there are.
__device__ int load_mean_difference(float* tile, const MatrixNormalArgs<float>& args, int64_t b, int first) {
  const int K = static_cast<int>(args.K), count = min(kColumns, static_cast<int>(args.C) - first);
  const Operand mean = operand_of(args.mean, b), prior = operand_of(args.prior_mean, b);
  for (int n = threadIdx.x; n < K * (kColumns / 4); n += kThreads) {
    const int row = n / (kColumns / 4), column = n % (kColumns / 4) * 4;
    const float4 x = mean.load_four(row, first + column, mean.inner, count - column);
    const float4 y = prior.load_four(row, first + column, prior.inner, count - column);
    reinterpret_cast<float4*>(tile)[n] = {x.x - y.x, x.y - y.y, x.z - y.z, x.w - y.w};
  }
  __syncthreads();
  return count;
}

// Measure the workspace and launch a kernel over all memories.
template <class Kernel, class... Arguments>
const char* run(Kernel kernel, Task task, int64_t K, int64_t B, cuda::Context& context, const Arguments&... arguments) {
  if (B == 0) return nullptr;
  const Device device = current_device();
  const auto layout = [&](Divergence& head, Arena& arena) { lay_out(head, arena, K, task); };
  Workspace workspace = measure_workspace<Divergence>(device, layout);
  const int64_t blocks = min(B, resident_blocks(device, kernel, workspace));
  if (workspace.block_floats > 0) workspace.data = context.allocate(context, blocks * workspace.block_floats);
  return launch(kernel, blocks, kThreads, workspace.shared_bytes(), context.stream, arguments..., B, workspace);
}

}  // namespace
}  // namespace fastkm
