// The divergence of two normal laws that differ in their variance, without cancellation.
#pragma once

#include "cuda/linalg/device.cuh"

namespace fastkm {
namespace {

// r − 1 − ln r ≥ 0: twice the KL of two centred normal laws whose variances have the ratio r. `excess` is r − 1, which
// the caller knows with more digits than `ratio` holds. The series, its error and its sign are explained in
// cpu/linalg/variance_divergence.h.
__device__ inline float variance_divergence(float ratio, float excess) {
  if (!(ratio >= 0.5f && ratio <= 2)) return excess - logf(ratio);
  const float u = -excess / (1 + ratio), square = u * u;
  float series = 0;
#pragma unroll
  for (int n = 7; n > 0; --n) series = series * square + 1.f / static_cast<float>(2 * n + 1);
  return 2 * square * (1 / (1 + u) + u * series);
}

}  // namespace
}  // namespace fastkm
