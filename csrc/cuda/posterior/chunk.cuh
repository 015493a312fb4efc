// The patterns of a memory in chunks.
#pragma once

#include "cuda/linalg/codes.cuh"

namespace fastkm {
namespace {

constexpr int kChunk = 16;  // patterns of a chunk, as on the CPU: small chunks round less
static_assert(kChunk == kBlock && kChunk == kSlice, "a chunk is one block of a factorisation, and one slice");

__host__ __device__ inline int64_t count_chunks(int64_t T) { return (T + kChunk - 1) / kChunk; }

// A variance is lost when it is less than this many times the rounding of the sum that gives it.
constexpr float kLeastDigits = 16;

// Σ_k w_k² U_kk, the size of the terms of wᵀUw. By one warp.
__device__ inline float variance_scale(const float* w, const float* cov, int K, int width) {
  float sum = 0;
  for (int k = threadIdx.x % 32; k < K; k += 32) sum += w[k] * w[k] * cov[int64_t(k) * (width + 1)];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

// Whether float32 holds the variance along a pattern after it: see cpu/posterior/conditioning.h.
__device__ inline bool holds_variance(float scale, float explained, float noise) {
  return explained * (noise / (explained + noise)) >= kLeastDigits * kEpsilon * scale;
}

// The same. `w` is the weights of the pattern and `cov` is U before the chunk [K, width]. By one warp.
__device__ inline bool holds_variance(const float* w, const float* cov, int K, int width, float explained,
                                      float noise) {
  return holds_variance(variance_scale(w, cov, K, width), explained, noise);
}

// The status of a chunk. By one thread.
__device__ inline int chunk_status(bool positive, const int* held, int count) {
  if (!positive) return kNotPositiveDefinite;
  int all = 1;
  for (int t = 0; t < count; ++t) all &= held[t];
  return all ? kGood : kLost;
}

__device__ inline bool is_unmasked(const PosteriorArgs<float>& args, int64_t b, int64_t t) {
  return !args.mask.data || *element(args.mask, b, t);
}

}  // namespace
}  // namespace fastkm
