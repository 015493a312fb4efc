// Solves with a Cholesky factor, block by block: apply the inverse of a diagonal block to its rows of X, then subtract
// what these rows contribute from the rows still to be solved.
#pragma once

#include "cuda/linalg/cholesky.cuh"

namespace fastkm {
namespace {

// Rows [begin, end) of X [·, columns] lose Mᵀ X₁: X₁ are `count` rows just solved for, and M are rows of L or Lᵀ beside
// the diagonal block. Ends with a barrier.
__device__ inline void eliminate(float* x, int ld, int begin, int end, int columns, const OuterRows& rows) {
  const int across = (columns + 3) / 4, down = (end - begin + 3) / 4;
  for (int tile = static_cast<int>(threadIdx.x); tile < across * down; tile += kThreads)
    add_outer_tile(x, ld, begin + tile / across * 4, tile % across * 4, -1, rows);
  __syncthreads();
}

// X ← L⁻¹ X for X [size, columns] with rows `ld` apart and room for `width` rows.
__device__ inline void solve_lower(float* x, int ld, int columns, const Factor& a) {
  for (int first = 0; first < a.size; first += kBlock) {
    const int count = min(kBlock, a.size - first);
    float* const rows = x + int64_t(first) * ld;
    apply_inverse_block<false>(rows, ld, count, columns, a.inverse_blocks + int64_t(first) * kBlock);
    const float* const right_of_block = a.data + int64_t(first) * a.width;
    eliminate(x, ld, first + count, a.size, columns, {count, right_of_block, a.width, rows, ld});
  }
}

// X ← L⁻ᵀ X
__device__ inline void solve_lower_transposed(float* x, int ld, int columns, const Factor& a) {
  for (int first = (a.size - 1) / kBlock * kBlock; first >= 0 && a.size > 0; first -= kBlock) {
    const int count = min(kBlock, a.size - first);
    float* const rows = x + int64_t(first) * ld;
    apply_inverse_block<true>(rows, ld, count, columns, a.inverse_blocks + int64_t(first) * kBlock);
    const float* const left_of_block = a.data + int64_t(first) * a.width;
    eliminate(x, ld, 0, first, columns, {count, left_of_block, a.width, rows, ld});
  }
}

// X ← A⁻¹ X
__device__ inline void solve_cholesky(float* x, int ld, int columns, const Factor& a) {
  solve_lower(x, ld, columns, a);
  solve_lower_transposed(x, ld, columns, a);
}

}  // namespace
}  // namespace fastkm
