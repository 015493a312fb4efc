// Sums of outer products, added to a matrix in place.
#pragma once

#include "cuda/linalg/matrix.cuh"

namespace fastkm {
namespace {

// M += factor · Σ_t (x_t y_tᵀ), rows of x and y [count, ·] `ld` apart, the part [first, end)² of M, whose rows are `ld`
// apart as well; with `kLower` only tiles that touch the lower triangle. `first` and `end` are multiples of four.
// Called with y = x it leaves M as symmetric as it was, to the last bit. No barrier.
template <bool kLower>
__device__ void add_outer_part(float* m, int first, int end, int ld, float factor, int count, const float* x,
                               const float* y) {
  const int across = (end - first) / 4;
  for (int64_t tile = threadIdx.x; tile < int64_t(across) * across; tile += kThreads) {
    const int i = first + static_cast<int>(tile / across) * 4, j = first + static_cast<int>(tile % across) * 4;
    if (kLower && j > i) continue;
    float4 sum[4] = {};
#pragma unroll 4
    for (int t = 0; t < count; ++t) {
      const float4 left = *reinterpret_cast<const float4*>(x + int64_t(t) * ld + i);
      const float4 right = *reinterpret_cast<const float4*>(y + int64_t(t) * ld + j);
      const float each[4] = {left.x, left.y, left.z, left.w};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        sum[n].x += each[n] * right.x, sum[n].y += each[n] * right.y;
        sum[n].z += each[n] * right.z, sum[n].w += each[n] * right.w;
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float4* at = reinterpret_cast<float4*>(m + int64_t(i + n) * ld + j);
      float4 old = *at;
      old.x += factor * sum[n].x, old.y += factor * sum[n].y, old.z += factor * sum[n].z, old.w += factor * sum[n].w;
      *at = old;
    }
  }
}

__device__ FASTKM_OUT_OF_LINE inline void add_outer(float* m, int width, float factor, int count, const float* x,
                                                    const float* y) {
  add_outer_part<false>(m, 0, width, width, factor, count, x, y);
}

}  // namespace
}  // namespace fastkm
