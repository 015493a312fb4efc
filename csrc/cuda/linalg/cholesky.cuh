// Cholesky factors of symmetric positive definite matrices, sixteen rows at a time.
//
// For the diagonal block A₁₁ of the next sixteen rows:
//   1. A₁₁ = L₁₁ L₁₁ᵀ and L₁₁⁻¹, by one warp in registers.
//   2. L₂₁ᵀ = L₁₁⁻¹ A₂₁ᵀ: a product, since the inverse of the block is known.
//   3. A₂₂ ← A₂₂ − L₂₁ L₂₁ᵀ in the lower triangle.
#pragma once

#include "cuda/linalg/outer_product.cuh"

namespace fastkm {
namespace {

// A matrix [size, size] with rows `width` apart, padded with zeros to width × width, and the inverses of the diagonal
// blocks of its factor. `cholesky` leaves L below the diagonal and Lᵀ above it, so that both solves read whole rows.
struct Factor {
  float* data;
  float* inverse_blocks;  // [blocks, 16, 16]
  int size, width;

  __host__ __device__ static int64_t inverse_floats(int size) { return int64_t(round_up(size, kBlock)) * kBlock; }
};

// A positive diagonal that is added to a block, each entry when its pivot is taken: what is left of the block itself
// keeps its digits, however small it is beside the diagonal. A negative rest within its slack becomes zero.
struct AddedDiagonal {
  const float *value = nullptr, *slack = nullptr;
  float* rest = nullptr;  // out: the pivots without the diagonal
};

// L and L⁻¹ of one diagonal block [size, size] into `factor` and `inverse_factor`, completed by the identity to 16
// × 16. One warp computes it; lane i holds row i. A pivot must be positive; with a diagonal its rest must not be below
// zero by more than the slack. `positive` becomes false if a pivot fails.
__device__ FASTKM_OUT_OF_LINE inline void factor_block(ThreadBlock& thread_block, const float* from, int64_t ld,
                                                       int size, AddedDiagonal added = {}) {
  const int lane = threadIdx.x % 32, i = lane % kBlock;
  float row[kBlock];
#pragma unroll
  for (int j = 0; j < kBlock; ++j) row[j] = i < size && j <= i ? from[i * ld + j] : i == j ? 1.f : 0.f;
#pragma unroll
  for (int j = 0; j < kBlock; ++j) {
    float pivot = __shfl_sync(~0u, row[j], j);
    const bool adds = added.value && j < size;
    const bool holds = (adds ? pivot >= -added.slack[j] : pivot > 0) && pivot - pivot == 0;
    if (!holds && lane == 0) thread_block.positive = false;
    if (adds) {
      const float rest = holds && pivot > 0 ? pivot : 0;
      if (lane == 0) added.rest[j] = rest;
      pivot = rest + added.value[j];
    } else if (!holds) {
      pivot = 1;
    }
    const float root = sqrtf(pivot);
    row[j] = i == j ? root : row[j] / root;
#pragma unroll
    for (int k = j + 1; k < kBlock; ++k) row[k] -= row[j] * __shfl_sync(~0u, row[j], k);
  }
  if (lane < kBlock)
#pragma unroll
    for (int j = 0; j < kBlock; ++j) thread_block.factor[i][j] = j <= i ? row[j] : 0;
  __syncwarp();
  // Lane i solves for column i.
  float column[kBlock];
#pragma unroll
  for (int j = 0; j < kBlock; ++j) {
    float sum = i == j ? 1.f : 0.f;
#pragma unroll
    for (int k = 0; k < j; ++k) sum -= thread_block.factor[j][k] * column[k];
    column[j] = sum / thread_block.factor[j][j];
    __syncwarp();  // without it the compiler loads all of L at once, into more registers than there are
  }
  if (lane < kBlock)
#pragma unroll
    for (int j = 0; j < kBlock; ++j) thread_block.inverse_factor[j][i] = column[j];
}

// `count` rows of X ← their product with the inverse of a diagonal block, or with its transpose. A thread computes four
// of the sixteen entries of a column.
template <bool kTransposed>
__device__ void apply_inverse_block(float* x, int ld, int count, int columns, const float* inverse) {
  for (int column0 = 0; column0 < columns; column0 += kThreads / 4) {
    const int column = column0 + static_cast<int>(threadIdx.x) % (kThreads / 4);
    const int quarter = static_cast<int>(threadIdx.x) / (kThreads / 4) * 4;
    float result[4] = {};
    if (column < columns) {
      const int from = kTransposed ? quarter : 0, to = kTransposed ? count : min(count, quarter + 4);
      for (int k = from; k < to; ++k) {
        const float entry = x[int64_t(k) * ld + column];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          result[n] += (kTransposed ? inverse[k * kBlock + quarter + n] : inverse[(quarter + n) * kBlock + k]) * entry;
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

// A = L Lᵀ in place, from the lower triangle. `positive` tells whether every pivot was positive. If one was not, the
// factor is finite but meaningless.
__device__ inline void cholesky(const Factor& a, ThreadBlock& thread_block) {
  if (threadIdx.x == 0) thread_block.positive = true;
  __syncthreads();
  for (int first = 0; first < a.size; first += kBlock) {
    const int count = min(kBlock, a.size - first), after = first + count, below = a.size - after;
    float* const panel = a.data + int64_t(first) * a.width;  // rows of Lᵀ
    float* const inverse = a.inverse_blocks + int64_t(first) * kBlock;
    if (threadIdx.x < 32) factor_block(thread_block, panel + first, a.width, count);
    __syncthreads();
    const int i = threadIdx.x / kBlock, j = threadIdx.x % kBlock;
    static_assert(kThreads == kBlock * kBlock, "a thread an entry");
    inverse[threadIdx.x] = j <= i ? thread_block.inverse_factor[i][j] : 0;
    if (i < count && j <= i)
      panel[int64_t(i) * a.width + first + j] = panel[int64_t(j) * a.width + first + i] = thread_block.factor[i][j];

    // L₂₁ᵀ = L₁₁⁻¹ A₂₁ᵀ to the right of the block, and L₂₁ below it.
    for (int n = threadIdx.x; n < below * kBlock; n += kThreads) {
      const int row = after + n / kBlock, column = n % kBlock;
      panel[int64_t(column) * a.width + row] = a.data[int64_t(row) * a.width + first + column];
    }
    __syncthreads();
    apply_inverse_block<false>(panel + after, a.width, count, below, inverse);
    for (int n = threadIdx.x; n < below * kBlock; n += kThreads) {
      const int row = after + n / kBlock, column = n % kBlock;
      a.data[int64_t(row) * a.width + first + column] = panel[int64_t(column) * a.width + row];
    }

    // A₂₂ ← A₂₂ − L₂₁ L₂₁ᵀ
    if (below > 0) add_outer_part<true>(a.data, a.width, after, a.width, -1, {kBlock, panel, a.width, panel, a.width});
    __syncthreads();
  }
}

// Make everything that is solved with this factor NaN: without a factor there is no gradient.
__device__ inline void poison_factor(const Factor& factor) {
  for (int64_t n = threadIdx.x; n < Factor::inverse_floats(factor.size); n += kThreads)
    factor.inverse_blocks[n] = __uint_as_float(0x7FC00000u);
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
