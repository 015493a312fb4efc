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

// A removal divides by at least this many times the rounding of the sum that gives the divisor.
constexpr float kLeastDigitsLeft = 256;

// Patterns are conditioned on, or taken out as if they had never been.
enum class Direction { kIn, kOut };

// How far below zero rounding may bring wᵀUw in a chunk of `count` patterns; `variance` is that of w U wᵀ + σ².
__device__ inline float rounding_slack(int K, int count, float variance) {
  return 4 * static_cast<float>(K + count) * kEpsilon * fabsf(variance);
}

// Σ_k w_k² U_kk. `w` is the weights of a pattern and `cov` is U before the chunk [K, width]. By one warp.
__device__ inline float weighted_norm(const float* w, const float* cov, int K, int width) {
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
  return holds_variance(weighted_norm(w, cov, K, width), explained, noise);
}

// What the removal of a pattern says of U, from its pivot, (S⁻¹)_tt and Σ_k w_k² U_kk: see factor_removal of
// cpu/posterior/conditioning.h.
__device__ inline int removal_status(float pivot, float inverse_variance, float scale, float noise, int K, int count) {
  const float size = noise + fabsf(scale), rounding = kLeastDigitsLeft * kEpsilon, left = noise * inverse_variance;
  if (!(pivot - noise <= rounding_slack(K, count, size))) return kNotPositiveDefinite;
  return rounding * size * inverse_variance <= 1 && rounding * left * left <= 1 ? kGood : kUntold;
}

// The status of a chunk that is removed, from those of its patterns. By one thread.
__device__ inline int removed_chunk_status(bool positive, const int* of_patterns, int count) {
  if (!positive) return kNotWritten;
  int status = kGood;
  for (int t = 0; t < count; ++t)
    if (of_patterns[t] == kNotPositiveDefinite || status == kGood) status = of_patterns[t];
  return status;
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
