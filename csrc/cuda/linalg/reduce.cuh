// Sums over the threads of a block, and blocks that share a piece of work.
#pragma once

#include "cuda/linalg/workspace.cuh"

namespace fastkm {
namespace {

// Of one number a thread.
__device__ inline double block_sum(double mine, Block& block) {
  for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_xor_sync(~0u, mine, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) block.sum[threadIdx.x / 32] = mine;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += block.sum[warp];
  return total;
}

// Σ of squares of a row of shared memory, by one warp.
__device__ inline float warp_squares(const float* row, int count) {
  float sum = 0;
  for (int k = threadIdx.x % 32; k < count; k += 32) sum += row[k] * row[k];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

// Whether this block is the last of `count` to come here, on one ticket that starts at zero. What the others wrote
// before is then visible to it. No float is ever added by two blocks at once: the last one adds, in a fixed order.
__device__ inline bool last_to_arrive(unsigned* ticket, unsigned count, Block& block) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    block.last = atomicAdd(ticket, 1) == count - 1;
    __threadfence();
  }
  __syncthreads();
  return block.last;
}

}  // namespace
}  // namespace fastkm
