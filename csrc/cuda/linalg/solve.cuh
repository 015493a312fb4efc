// Solves with a Cholesky factor.
#pragma once

#include "cuda/linalg/cholesky.cuh"

namespace fastkm {
namespace {

// Rows [begin, end) of X lose Mᵀ X₁: rows of M, kRoot of them, are those of L or Lᵀ next to a diagonal block, and X₁
// are the rows just solved for. A thread takes four rows and four columns. Ends with a barrier.
__device__ inline void eliminate(const float* m, int width, int count, const float* solved, float* x, int ld, int begin,
                                 int end, int columns) {
  const int across = (columns + 3) / 4, down = (end - begin + 3) / 4;
  for (int tile = static_cast<int>(threadIdx.x); tile < across * down; tile += kThreads) {
    const int i = begin + tile / across * 4, j = tile % across * 4;
    float4 sum[4] = {};
#pragma unroll 4
    for (int t = 0; t < count; ++t) {
      const float4 left = *reinterpret_cast<const float4*>(m + int64_t(t) * width + i);
      const float4 right = *reinterpret_cast<const float4*>(solved + int64_t(t) * ld + j);
      const float each[4] = {left.x, left.y, left.z, left.w};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        sum[n].x += each[n] * right.x, sum[n].y += each[n] * right.y;
        sum[n].z += each[n] * right.z, sum[n].w += each[n] * right.w;
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float4* at = reinterpret_cast<float4*>(x + int64_t(i + n) * ld + j);
      float4 old = *at;
      old.x -= sum[n].x, old.y -= sum[n].y, old.z -= sum[n].z, old.w -= sum[n].w;
      *at = old;
    }
  }
  __syncthreads();
}

// X ← L⁻¹ X for X [size, columns], with `width` rows of room, `ld` apart.
__device__ inline void solve_lower(const Square& a, float* x, int ld, int columns) {
  for (int first = 0; first < a.size; first += kRoot) {
    const int count = min(kRoot, a.size - first);
    float* const rows = x + int64_t(first) * ld;
    apply_root<false>(a.roots + int64_t(first) * kRoot, count, rows, ld, columns);
    eliminate(a.data + int64_t(first) * a.width, a.width, count, rows, x, ld, first + count, a.size, columns);
  }
}

// X ← L⁻ᵀ X.
__device__ inline void solve_lower_transposed(const Square& a, float* x, int ld, int columns) {
  for (int first = (a.size - 1) / kRoot * kRoot; first >= 0 && a.size > 0; first -= kRoot) {
    const int count = min(kRoot, a.size - first);
    float* const rows = x + int64_t(first) * ld;
    apply_root<true>(a.roots + int64_t(first) * kRoot, count, rows, ld, columns);
    eliminate(a.data + int64_t(first) * a.width, a.width, count, rows, x, ld, 0, first, columns);
  }
}

// X ← A⁻¹ X.
__device__ inline void solve(const Square& a, float* x, int ld, int columns) {
  solve_lower(a, x, ld, columns);
  solve_lower_transposed(a, x, ld, columns);
}

}  // namespace
}  // namespace fastkm
