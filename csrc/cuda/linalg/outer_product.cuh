// Sums of outer products that are added to a matrix where it lies.
#pragma once

#include "cuda/linalg/matrix.cuh"

namespace fastkm {
namespace {

// Rows of the two factors of a sum of outer products: row t of x starts at x + t · ldx.
struct OuterRows {
  int count;
  const float* x;
  int ldx;
  const float* y;
  int ldy;
};

// The register tile of every update in place: the 4 × 4 part (i, j) of M += factor · Σ_t x_t y_tᵀ. It is read and
// written as whole vectors, so i and j are multiples of four.
__device__ __forceinline__ void add_outer_tile(float* m, int ld, int i, int j, float factor, const OuterRows& rows) {
  float4 sum[4] = {};
#pragma unroll 4
  for (int t = 0; t < rows.count; ++t) {
    const float4 left = *reinterpret_cast<const float4*>(rows.x + int64_t(t) * rows.ldx + i);
    const float4 right = *reinterpret_cast<const float4*>(rows.y + int64_t(t) * rows.ldy + j);
    const float each[4] = {left.x, left.y, left.z, left.w};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      sum[n].x += each[n] * right.x;
      sum[n].y += each[n] * right.y;
      sum[n].z += each[n] * right.z;
      sum[n].w += each[n] * right.w;
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float4* at = reinterpret_cast<float4*>(m + int64_t(i + n) * ld + j);
    float4 entries = *at;
    entries.x += factor * sum[n].x;
    entries.y += factor * sum[n].y;
    entries.z += factor * sum[n].z;
    entries.w += factor * sum[n].w;
    *at = entries;
  }
}

// M += factor · Σ_t x_t y_tᵀ in the square part [first, end)² of M, where `first` and `end` are multiples of four. With
// `kLower` only tiles that touch the lower triangle are computed. Called with y = x it keeps a symmetric M symmetric to
// the last bit. No barrier.
template <bool kLower>
__device__ void add_outer_part(float* m, int ld, int first, int end, float factor, const OuterRows& rows) {
  const int across = (end - first) / 4;
  for (int64_t tile = threadIdx.x; tile < int64_t(across) * across; tile += kThreads) {
    const int i = first + static_cast<int>(tile / across) * 4, j = first + static_cast<int>(tile % across) * 4;
    if (kLower && j > i) continue;
    add_outer_tile(m, ld, i, j, factor, rows);
  }
}

// The same for a whole matrix [width, width] and rows `width` apart. No barrier.
__device__ FASTKM_OUT_OF_LINE inline void add_outer(float* m, int width, float factor, int count, const float* x,
                                                    const float* y) {
  add_outer_part<false>(m, width, 0, width, factor, {count, x, width, y, width});
}

}  // namespace
}  // namespace fastkm
