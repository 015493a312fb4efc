// Symmetric matrices.
#pragma once

#include "cuda/linalg/matrix.cuh"

namespace fastkm {
namespace {

// Not symmetric, by more than rounding explains; or not finite, which no positive definite matrix is. Into the status.
__device__ FASTKM_OUT_OF_LINE inline void check_symmetry(const float* m, int size, int width, Block& block) {
  float scale = 0, gap = 0, total = 0;
  for (int64_t n = threadIdx.x; n < int64_t(size) * size; n += kThreads) {
    const int64_t i = n / size, j = n % size;
    if (j > i) continue;
    const float entry = fabsf(m[i * width + j]), difference = fabsf(m[i * width + j] - m[j * width + i]);
    scale = fmaxf(scale, entry);
    gap = fmaxf(gap, difference);
    total += entry + difference;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    scale = fmaxf(scale, __shfl_xor_sync(~0u, scale, offset));
    gap = fmaxf(gap, __shfl_xor_sync(~0u, gap, offset));
    total += __shfl_xor_sync(~0u, total, offset);
  }
  if (threadIdx.x % 32 == 0) {
    float* mine = block.part[threadIdx.x / 32];
    mine[0] = scale, mine[1] = gap, mine[2] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int n = 1; n < kWarps; ++n) {
      scale = fmaxf(scale, block.part[n][0]);
      gap = fmaxf(gap, block.part[n][1]);
      total += block.part[n][2];
    }
    const float allowed = 3.4526698e-4f * scale;  // √ε
    block.status = total - total != 0 ? kNotPositiveDefinite : gap <= allowed ? kGood : kAsymmetric;
  }
  __syncthreads();
}

// Zero what no row or column of a padded square matrix holds.
__device__ inline void clear_padding(float* m, int size, int width) {
  const int extra = width - size;
  for (int n = threadIdx.x; n < extra * width; n += kThreads)
    m[int64_t(n / extra) * width + size + n % extra] = m[(int64_t(size) + n % extra) * width + n / extra] = 0;
}

__device__ inline void store_mirrored(const Batch<float>& to, int64_t b, const float* m, int size, int width,
                                      float factor) {
  for (int64_t n = threadIdx.x; n < int64_t(size) * size; n += kThreads) {
    const int64_t i = n / size, j = n % size;
    *element(to, b, i, j) = factor * (j <= i ? m[i * width + j] : m[j * width + i]);
  }
}

__device__ inline void transpose_in_place(float* m, int size, int width) {
  for (int64_t n = threadIdx.x; n < int64_t(size) * size; n += kThreads) {
    const int64_t i = n / size, j = n % size;
    if (j >= i) continue;
    const float lower = m[i * width + j];
    m[i * width + j] = m[j * width + i];
    m[j * width + i] = lower;
  }
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
