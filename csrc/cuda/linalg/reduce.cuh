// Sums over the threads of a warp or a thread block, and the meeting of thread blocks that share a memory.
#pragma once

#include "cuda/linalg/workspace.cuh"

namespace fastkm {
namespace {

// The sum of one number of each thread; every thread gets it.
__device__ inline double block_sum(double mine, ThreadBlock& thread_block) {
  for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_xor_sync(~0u, mine, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) thread_block.warp_sum[threadIdx.x / 32] = mine;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += thread_block.warp_sum[warp];
  return total;
}

// Σ of the squares of a row, by one warp. No barrier.
__device__ inline float squared_norm_by_warp(const float* row, int count) {
  float sum = 0;
  for (int k = threadIdx.x % 32; k < count; k += 32) sum += row[k] * row[k];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

// Whether this thread block is the last of `count` to arrive at a ticket, which starts at zero. What the others wrote
// before they arrived is then visible to it. Sums over thread blocks are added by the last one, in a fixed order: no
// two thread blocks ever add to the same float.
__device__ inline bool last_to_arrive(unsigned* ticket, unsigned count, ThreadBlock& thread_block) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    thread_block.last = atomicAdd(ticket, 1) == count - 1;
    __threadfence();
  }
  __syncthreads();
  return thread_block.last;
}

}  // namespace
}  // namespace fastkm
