// The inverse of a symmetric positive definite matrix.
#pragma once

#include "cuda/linalg/cholesky.cuh"

namespace fastkm {
namespace {

// A ← A⁻¹ in place, A symmetric positive definite [size, size], rows `width` apart, padded with zeros to width × width.
// Sixteen rows at a time are swept: with N = L⁻¹ A₁₂ the rest loses Nᵀ N, A₁₂ becomes L⁻ᵀ N, and the block −A₁₁⁻¹;
// after every row was swept −A⁻¹ is left. Returns whether every pivot was positive, and leaves it in the status.
__device__ inline bool invert(float* a, int size, int width, float* panel, Block& block) {
  if (threadIdx.x == 0) block.positive = true;
  __syncthreads();
  for (int first = 0; first < size; first += kRoot) {
    const int count = min(kRoot, size - first);
    if (threadIdx.x < 32) factor_root(a + int64_t(first) * width + first, width, count, block);
    __syncthreads();
    const float (&root)[kRoot][kRoot + 1] = block.root;
    for (int k = threadIdx.x; k < width; k += kThreads) {
      const bool swept = k >= first && k < first + count;
      float column[kRoot], solved[kRoot];
#pragma unroll
      for (int i = 0; i < kRoot; ++i)
        column[i] = swept ? root[i][k - first] : i < count && k < size ? a[int64_t(first + i) * width + k] : 0;
#pragma unroll
      for (int i = kRoot - 1; i >= 0 && !swept; --i) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j <= i; ++j) sum += root[i][j] * column[j];
        column[i] = sum;
      }
#pragma unroll
      for (int i = 0; i < kRoot; ++i) {
        float sum = 0;
#pragma unroll
        for (int j = i; j < kRoot; ++j) sum += root[j][i] * column[j];
        solved[i] = swept ? -sum : sum;
        panel[i * width + k] = swept ? 0 : column[i];
      }
      float* down = a + int64_t(first) * width + k;
      float* const across = a + int64_t(k) * width + first;
#pragma unroll
      for (int i = 0; i < kRoot; ++i, down += width) {
        if (i >= count || k >= size) continue;
        *down = solved[i];
        if (!swept) across[i] = solved[i];
      }
    }
    __syncthreads();
    add_outer(a, width, -1, kRoot, panel, panel);
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < int64_t(size) * width; i += kThreads) a[i] = -a[i];
  if (threadIdx.x == 0 && !block.positive && block.status == kGood) block.status = kNotPositiveDefinite;
  __syncthreads();
  return block.positive;
}

}  // namespace
}  // namespace fastkm
