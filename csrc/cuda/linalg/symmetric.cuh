// Symmetric matrices [size, size] with rows `width` apart.
#pragma once

#include "cuda/linalg/matrix.cuh"

namespace fastkm {
namespace {

// Set the status: kAsymmetric if M differs from Mᵀ by more than rounding explains, kNotPositiveDefinite if an entry is
// not finite, kGood otherwise.
__device__ FASTKM_OUT_OF_LINE inline void check_symmetry(const float* m, int size, int width,
                                                         ThreadBlock& thread_block) {
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
    float* part = thread_block.warp_part[threadIdx.x / 32];
    part[0] = scale;
    part[1] = gap;
    part[2] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int n = 1; n < kWarps; ++n) {
      scale = fmaxf(scale, thread_block.warp_part[n][0]);
      gap = fmaxf(gap, thread_block.warp_part[n][1]);
      total += thread_block.warp_part[n][2];
    }
    const float allowed = 3.4526698e-4f * scale;  // √ε
    const bool finite = total - total == 0;       // ∞ − ∞ and NaN − NaN are NaN
    thread_block.status = !finite ? kNotPositiveDefinite : gap <= allowed ? kGood : kAsymmetric;
  }
  __syncthreads();
}

// Zero the rows and columns from `size` to `width`. No barrier.
__device__ inline void clear_padding(float* m, int size, int width) {
  const int extra = width - size;
  for (int n = threadIdx.x; n < extra * width; n += kThreads)
    m[int64_t(n / extra) * width + size + n % extra] = m[(int64_t(size) + n % extra) * width + n / extra] = 0;
}

// Store `factor` times the symmetric matrix whose lower triangle M holds. No barrier.
__device__ inline void store_mirrored(const Batch<float>& to, int64_t b, const float* m, int size, int width,
                                      float factor) {
  for (int64_t n = threadIdx.x; n < int64_t(size) * size; n += kThreads) {
    const int64_t i = n / size, j = n % size;
    *element(to, b, i, j) = factor * (j <= i ? m[i * width + j] : m[j * width + i]);
  }
}

// Store ½ (M + Mᵀ). No barrier.
__device__ inline void store_symmetrised(const Batch<float>& to, int64_t b, const float* m, int size, int width) {
  for (int64_t n = threadIdx.x; n < int64_t(size) * size; n += kThreads) {
    const int64_t i = n / size, j = n % size;
    *element(to, b, i, j) = 0.5f * (m[i * width + j] + m[j * width + i]);
  }
}

// M ← ½ (M + Mᵀ)
__device__ inline void symmetrise(float* m, int size, int width) {
  for (int n = threadIdx.x; n < size * size; n += kThreads) {
    const int i = n / size, j = n % size;
    float &lower = m[i * width + j], &upper = m[j * width + i];
    if (j < i) lower = upper = 0.5f * (lower + upper);
  }
  __syncthreads();
}

// M ← Mᵀ
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

// M ← M + Mᵀ
__device__ inline void add_transpose(float* m, int size, int width) {
  for (int64_t n = threadIdx.x; n < int64_t(size) * size; n += kThreads) {
    const int64_t i = n / size, j = n % size;
    if (j > i) continue;
    m[i * width + j] = m[j * width + i] = m[i * width + j] + m[j * width + i];
  }
  __syncthreads();
}

// M += factor / 2 · (x yᵀ + y xᵀ). No barrier.
__device__ FASTKM_OUT_OF_LINE inline void add_symmetric_outer(float* m, int size, int width, float factor,
                                                              const float* x, const float* y) {
  for (int64_t n = threadIdx.x; n < int64_t(size) * size; n += kThreads) {
    const int64_t i = n / size, j = n % size;
    m[i * width + j] += 0.5f * factor * (x[i] * y[j] + y[i] * x[j]);
  }
}

}  // namespace
}  // namespace fastkm
