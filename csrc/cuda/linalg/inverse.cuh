// The inverse of a symmetric positive definite matrix in place, by sweeping sixteen rows at a time.
//
// For the diagonal block A₁₁ = L Lᵀ of the next rows and N = L⁻¹ A₁₂:
//   A₂₂ ← A₂₂ − Nᵀ N      A₁₂ ← L⁻ᵀ N      A₁₁ ← −A₁₁⁻¹
// After all rows are swept the matrix is −A⁻¹.
#pragma once

#include "cuda/linalg/cholesky.cuh"

namespace fastkm {
namespace {

// One column of a sweep: column k of the panel N, and what becomes of column k in the swept rows.
__device__ __forceinline__ void sweep_column(float* a, float* panel, int k, int first, int count, int size, int width,
                                             const ThreadBlock& thread_block) {
  const float (&inverse)[kBlock][kBlock + 1] = thread_block.inverse_factor;
  const bool swept = k >= first && k < first + count;
  float column[kBlock], solved[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i)
    column[i] = swept ? inverse[i][k - first] : i < count && k < size ? a[int64_t(first + i) * width + k] : 0;
#pragma unroll
  for (int i = kBlock - 1; i >= 0 && !swept; --i) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j <= i; ++j) sum += inverse[i][j] * column[j];
    column[i] = sum;
  }
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float sum = 0;
#pragma unroll
    for (int j = i; j < kBlock; ++j) sum += inverse[j][i] * column[j];
    solved[i] = swept ? -sum : sum;
    panel[i * width + k] = swept ? 0 : column[i];
  }
  float* down = a + int64_t(first) * width + k;
  float* const across = a + int64_t(k) * width + first;
#pragma unroll
  for (int i = 0; i < kBlock; ++i, down += width) {
    if (i >= count || k >= size) continue;
    *down = solved[i];
    if (!swept) across[i] = solved[i];
  }
}

// A ← A⁻¹ for A [size, size] with rows `width` apart, padded with zeros to width × width; `panel` is [16, width].
// Returns whether every pivot was positive. If one was not and the status was good, the status becomes
// kNotPositiveDefinite.
__device__ inline bool invert(float* a, int size, int width, float* panel, ThreadBlock& thread_block) {
  if (threadIdx.x == 0) thread_block.positive = true;
  __syncthreads();
  for (int first = 0; first < size; first += kBlock) {
    const int count = min(kBlock, size - first);
    if (threadIdx.x < 32) factor_block(thread_block, a + int64_t(first) * width + first, width, count);
    __syncthreads();
    for (int k = threadIdx.x; k < width; k += kThreads)
      sweep_column(a, panel, k, first, count, size, width, thread_block);
    __syncthreads();
    add_outer(a, width, -1, kBlock, panel, panel);
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < int64_t(size) * width; i += kThreads) a[i] = -a[i];
  if (threadIdx.x == 0 && !thread_block.positive && thread_block.status == kGood)
    thread_block.status = kNotPositiveDefinite;
  __syncthreads();
  return thread_block.positive;
}

}  // namespace
}  // namespace fastkm
