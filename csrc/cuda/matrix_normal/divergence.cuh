// What the divergence and its backward share.
#pragma once

#include "cuda/linalg/reduce.cuh"
#include "cuda/linalg/solve.cuh"
#include "cuda/linalg/symmetric.cuh"

namespace fastkm {
namespace {

constexpr int kColumns = 64;  // of the means, brought in at once

struct Distance : Block {
  int worst;      // status of the covariances
  double growth;  // ln|U0| − ln|U|
  Square cov, prior;
  float *gap, *tile;
};

enum Task { kLogdet, kKl, kKlBackward };

// Where the buffers of a block are; most used first.
__host__ __device__ void lay_out(Distance& block, Space& space, int64_t rows, Task task) {
  const int K = static_cast<int>(rows), width = round_up(K, 4);
  const auto square = [&] {
    float* const data = space.take(int64_t(width) * width);
    return Square{data, space.take(Square::root_floats(K)), K, width};
  };
  block.cov = square();
  if (task == kLogdet) return;
  block.prior = square();
  block.tile = space.take(int64_t(width) * kColumns);
  if (task == kKlBackward) block.gap = space.take(int64_t(width) * width);
}

__device__ void start(Distance& block, const Workspace& workspace, int64_t K, Task task) {
  if (threadIdx.x == 0) {
    Space space = space_of_block<Distance>(workspace);
    lay_out(block, space, K, task);
  }
  __syncthreads();
}

// The factor of memory b's covariance, and its status.
__device__ int load_and_factor(const Square& square, const Batch<const float>& cov, int64_t b, Block& block) {
  load_rows(square.data, square.size, square.size, square.width, square.width, side_of(cov, b));
  __syncthreads();
  check_symmetry(square.data, square.size, square.width, block);
  const int symmetric = block.status;
  cholesky(square, block);
  const int status = symmetric != kGood ? symmetric : block.positive ? kGood : kNotPositiveDefinite;
  __syncthreads();
  return status;
}

// Columns [first, first + kColumns) of R − R0; returns how many there are.
__device__ int load_shift(float* tile, const MatrixNormalArgs<float>& args, int64_t b, int first) {
  const int K = static_cast<int>(args.K), count = min(kColumns, static_cast<int>(args.C) - first);
  const Side mean = side_of(args.mean, b), prior = side_of(args.prior_mean, b);
  for (int n = threadIdx.x; n < K * (kColumns / 4); n += kThreads) {
    const int row = n / (kColumns / 4), column = n % (kColumns / 4) * 4;
    const float4 left = mean.four(row, first + column, mean.inner, count - column);
    const float4 right = prior.four(row, first + column, prior.inner, count - column);
    reinterpret_cast<float4*>(tile)[n] = {left.x - right.x, left.y - right.y, left.z - right.z, left.w - right.w};
  }
  __syncthreads();
  return count;
}

// Sizes, workspace, and one launch over the memories.
template <class Kernel, class... Arguments>
const char* run(Kernel kernel, Task task, int64_t K, int64_t B, cuda::Context& context, const Arguments&... arguments) {
  if (B == 0) return nullptr;
  const Device device = current_device();
  Workspace workspace = measure<Distance>(device, [&](Distance& head, Space& space) { lay_out(head, space, K, task); });
  const int64_t blocks = min(B, resident_blocks(device, kernel, workspace));
  if (workspace.block_floats > 0) workspace.data = context.allocate(context, blocks * workspace.block_floats);
  return launch(kernel, blocks, kThreads, workspace.shared_bytes(), context.stream, arguments..., B, workspace);
}

}  // namespace
}  // namespace fastkm
