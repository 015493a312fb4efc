// Cholesky factors.
#pragma once

#include "cuda/linalg/outer_product.cuh"

namespace fastkm {
namespace {

// L and L⁻¹ of a 16 × 16 block, completed by the identity, into `lower` and `root`, by one warp: lane i holds row i. A
// pivot has to be positive; or, with `floors`, above its floor less the slack, and it is raised to its floor.
__device__ FASTKM_OUT_OF_LINE inline void factor_root(const float* from, int64_t ld, int size, Block& block,
                                                      const float* floors = nullptr, const float* slack = nullptr) {
  const int lane = threadIdx.x % 32, i = lane % kRoot;
  float row[kRoot];
#pragma unroll
  for (int j = 0; j < kRoot; ++j) row[j] = i < size && j <= i ? from[i * ld + j] : i == j ? 1.f : 0.f;
#pragma unroll
  for (int j = 0; j < kRoot; ++j) {
    float pivot = __shfl_sync(~0u, row[j], j);
    const float floor = floors && j < size ? floors[j] : 0.f;
    const bool holds = floors && j < size ? pivot >= floor - slack[j] : pivot > 0;
    if (!(holds && pivot - pivot == 0)) {
      if (lane == 0) block.positive = false;
      pivot = 1;
    } else if (pivot < floor) {
      pivot = floor;
    }
    const float root = sqrtf(pivot);
    row[j] = i == j ? root : row[j] / root;
#pragma unroll
    for (int k = j + 1; k < kRoot; ++k) row[k] -= row[j] * __shfl_sync(~0u, row[j], k);
  }
  if (lane < kRoot)
#pragma unroll
    for (int j = 0; j < kRoot; ++j) block.lower[i][j] = j <= i ? row[j] : 0;
  __syncwarp();
  // Lane i solves for column i.
  float column[kRoot];
#pragma unroll
  for (int j = 0; j < kRoot; ++j) {
    float sum = i == j ? 1.f : 0.f;
#pragma unroll
    for (int k = 0; k < j; ++k) sum -= block.lower[j][k] * column[k];
    column[j] = sum / block.lower[j][j];
    __syncwarp();  // or all of L would be loaded at once, into more registers than there are
  }
  if (lane < kRoot)
#pragma unroll
    for (int j = 0; j < kRoot; ++j) block.root[j][i] = column[j];
}

// A symmetric positive definite matrix [size, size], rows `width` apart and padded with zeros to width × width; after
// cholesky, L below its diagonal and Lᵀ above it, so that either solve reads whole rows.
struct Square {
  float* data;
  float* roots;  // [blocks, 16, 16], the inverses of the diagonal blocks of L
  int size, width;

  __host__ __device__ static int64_t root_floats(int size) { return int64_t(round_up(size, kRoot)) * kRoot; }
};

// Rows [first, first + count) of X ← their product with a diagonal block's inverse or its transpose. A thread computes
// four of the sixteen entries of a column.
template <bool kTransposed>
__device__ void apply_root(const float* root, int count, float* x, int ld, int columns) {
  for (int column0 = 0; column0 < columns; column0 += kThreads / 4) {
    const int column = column0 + static_cast<int>(threadIdx.x) % (kThreads / 4);
    const int quarter = static_cast<int>(threadIdx.x) / (kThreads / 4) * 4;
    float result[4] = {};
    if (column < columns) {
      const int from = kTransposed ? quarter : 0, to = kTransposed ? count : min(count, quarter + 4);
      for (int k = from; k < to; ++k) {
        const float given = x[int64_t(k) * ld + column];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          result[n] += (kTransposed ? root[k * kRoot + quarter + n] : root[(quarter + n) * kRoot + k]) * given;
      }
    }
    __syncthreads();
    if (column < columns)
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (quarter + n < count) x[int64_t(quarter + n) * ld + column] = result[n];
  }
  __syncthreads();
}

// A = L Lᵀ in place, from the lower triangle. `positive` says whether every pivot was positive; if not, the factor is
// finite but meaningless.
__device__ inline void cholesky(const Square& a, Block& block) {
  if (threadIdx.x == 0) block.positive = true;
  __syncthreads();
  for (int first = 0; first < a.size; first += kRoot) {
    const int count = min(kRoot, a.size - first), after = first + count, below = a.size - after;
    float* const panel = a.data + int64_t(first) * a.width;  // rows of Lᵀ
    float* const root = a.roots + int64_t(first) * kRoot;
    if (threadIdx.x < 32) factor_root(panel + first, a.width, count, block);
    __syncthreads();
    const int i = threadIdx.x / kRoot, j = threadIdx.x % kRoot;
    static_assert(kThreads == kRoot * kRoot, "a thread an entry");
    root[threadIdx.x] = j <= i ? block.root[i][j] : 0;
    if (i < count && j <= i)
      panel[int64_t(i) * a.width + first + j] = panel[int64_t(j) * a.width + first + i] = block.lower[i][j];

    // Right of the block, L₁₁⁻¹ A₂₁ᵀ = L₂₁ᵀ; and L₂₁ below it.
    for (int n = threadIdx.x; n < below * kRoot; n += kThreads) {
      const int row = after + n / kRoot, column = n % kRoot;
      panel[int64_t(column) * a.width + row] = a.data[int64_t(row) * a.width + first + column];
    }
    __syncthreads();
    apply_root<false>(root, count, panel + after, a.width, below);
    for (int n = threadIdx.x; n < below * kRoot; n += kThreads) {
      const int row = after + n / kRoot, column = n % kRoot;
      a.data[int64_t(row) * a.width + first + column] = panel[int64_t(column) * a.width + row];
    }

    // What is left: A₂₂ − L₂₁ L₂₁ᵀ, its lower triangle.
    if (below > 0) add_outer_part<true>(a.data, after, a.width, a.width, -1, kRoot, panel, panel);
    __syncthreads();
  }
}

}  // namespace
}  // namespace fastkm
