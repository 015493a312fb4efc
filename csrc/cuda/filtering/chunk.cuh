// One chunk of a filter on a GPU: a few steps are written and read at once. Equations (F4) to (F9) of
// docs/math/filtering.md; one thread block computes a chunk.
//
// Weights lie above queries in matrices of 2 · 16 rows, so that one product with the memory serves both:
//   (1)  [V; X] = [W~; Q~] U,  [S; H] = [V; X] W~ᵀ + D∘([W; Q] Wᵀ),  S + diag(σ²) = L Lᵀ
//   (2)  G = L⁻¹ (e V + diag(D_t·) W),  P = tril(H L⁻ᵀ),  v = rowsum(X∘Q~ − P∘P) + (1 − a²) u ‖q‖²
//   (3)  [Z~ − E; O~] = [W~; Q~] R,  E ← L⁻¹ E,  O~ += P E
//   (4)  R' = e R + Gᵀ E,  U' = growth (e² U + (1 − e²) u I − Gᵀ G)
// (1), (2) and U' do not depend on values. (3) and R' take any of the columns alone.
#pragma once

#include "cuda/filtering/steps.cuh"
#include "cuda/linalg/cholesky.cuh"
#include "cuda/linalg/product.cuh"
#include "cuda/linalg/reduce.cuh"

namespace fastkm {
namespace {

// out_ij = a_i · b_j for `rows` rows of A, a multiple of 16, and 16 rows of B, which are `width` apart and padded with
// zeros. A thread sums whole products. Each starts at another column, so that the lanes of a warp read different banks.
// No barrier.
__device__ FASTKM_OUT_OF_LINE inline void inner_products(float (*out)[kChunk], const float* a, int rows, const float* b,
                                                         int width) {
  const int j = threadIdx.x % kChunk;
  const float* const right = b + int64_t(j) * width;
  for (int i = threadIdx.x / kChunk; i < rows; i += kThreads / kChunk) {
    const float* const left = a + int64_t(i) * width;
    float sum = 0;
    int at = width > 0 ? 4 * j % width : 0;
    for (int k = 0; k < width; k += 4) {
      const float4 x = *reinterpret_cast<const float4*>(left + at), y = *reinterpret_cast<const float4*>(right + at);
      sum += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
      at = at + 4 < width ? at + 4 : 0;
    }
    out[i][j] = sum;
  }
}

__device__ inline bool is_finite(float x) { return x - x == 0; }

// x · y for rows of `count` numbers, by one warp. No barrier.
__device__ inline float dot_by_warp(const float* x, const float* y, int count) {
  float sum = 0;
  for (int k = threadIdx.x % 32; k < count; k += 32) sum += x[k] * y[k];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

// ---- what does not depend on values --------------------------------------------------------------------------------

// Rows of a product with the memory: weights alone, or queries below them.
enum Rows : int { kWeights = kChunk, kAllRows = 2 * kChunk };

template <Cores kCores, Rows kRows, class Store>
__device__ __forceinline__ void product_of_rows(const Store& store, int columns, int length, const Operand& rows,
                                                const Operand& memory, ThreadBlock& thread_block) {
  product<kCores, kRows, kRows == kWeights ? 128 : 64>(store, {kRows, columns, length}, rows, memory, thread_block);
}

// V and S of (1), and with kAllRows X and H.
template <Rows kRows>
__device__ FASTKM_OUT_OF_LINE void project_steps(FilterChunk& chunk) {
  const int width = chunk.width;
  product_of_rows<kCudaCores, kRows>(StoreRows{chunk.projected, width, width}, width, chunk.K,
                                     Operand{chunk.inputs, width, 1}, Operand{chunk.cov, width, 1}, chunk);
  inner_products(chunk.squares, chunk.projected, kRows, chunk.inputs, width);
  if (chunk.retains) {
    const auto work = chunk.work();
    inner_products(work, chunk.plain, kRows, chunk.plain, width);
    for (int n = threadIdx.x; n < kRows * kChunk; n += kThreads) {  // a thread's own entries
      const int i = n / kChunk, j = n % kChunk;
      chunk.squares[i][j] += chunk.drift[i % kChunk][j] * work[i][j];
    }
  }
  __syncthreads();
}

// L⁻¹, s and the status of the chunk. No barrier.
__device__ FASTKM_OUT_OF_LINE inline void factor_steps(FilterChunk& chunk) {
  const int i = threadIdx.x / kChunk, j = threadIdx.x % kChunk;
  if (threadIdx.x < kChunk) {
    const float variance = chunk.squares[threadIdx.x][threadIdx.x] + chunk.noise[threadIdx.x];
    chunk.slack[threadIdx.x] = 4 * static_cast<float>(chunk.K + chunk.count) * kEpsilon * fabsf(variance);
    chunk.explained[threadIdx.x] = 0;  // of rows past the end
  }
  if (threadIdx.x == 0) chunk.positive = true;
  __syncthreads();
  if (threadIdx.x < 32)
    factor_block(chunk, chunk.squares[0], kChunk, chunk.count,
                 AddedDiagonal{chunk.noise, chunk.slack, chunk.explained});
  __syncthreads();
  chunk.inverse[i][j] = j <= i ? chunk.inverse_factor[i][j] : 0;
  for (int t = threadIdx.x / 32; t < kChunk; t += kWarps) {
    float scale = weighted_norm(chunk.inputs + t * chunk.width, chunk.cov, chunk.K, chunk.width);
    if (chunk.retains) {
      const float *w = chunk.plain + t * chunk.width, *q = w + kChunk * chunk.width;
      scale += chunk.relaxed[t] * squared_norm_by_warp(w, chunk.K);
      const float norm = squared_norm_by_warp(q, chunk.K);
      if (threadIdx.x % 32 == 0) chunk.norms[t] = norm;
    }
    if (threadIdx.x % 32 != 0) continue;
    chunk.held[t] = holds_variance(scale, chunk.explained[t], chunk.noise[t]);
    chunk.pivots[t] = chunk.explained[t] + chunk.noise[t];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  chunk.now = chunk_status(chunk.positive, chunk.held, chunk.count);
  for (int t = 0; chunk.forgets && t < chunk.count; ++t)
    if (!is_finite(chunk.squares[t][t])) chunk.now = kOutOfRange;
}

// G of (2), in the place of e V + diag(D_t·) W.
__device__ FASTKM_OUT_OF_LINE inline void find_gain(FilterChunk& chunk) {
  for (int n = threadIdx.x; n < kChunk * chunk.width; n += kThreads) {
    float x = chunk.projected[n];
    if (chunk.retains) x = chunk.end * x + chunk.drift[kChunk - 1][n / chunk.width] * chunk.plain[n];
    chunk.gain[n] = x;
  }
  __syncthreads();
  apply_inverse_block<false>(chunk.gain, chunk.width, kChunk, chunk.width, chunk.inverse[0]);
}

// P and v of (2).
__device__ FASTKM_OUT_OF_LINE inline void find_read_gain(FilterChunk& chunk) {
  const int i = threadIdx.x / kChunk, j = threadIdx.x % kChunk;
  float sum = 0;
  for (int k = 0; k <= j; ++k) sum += chunk.squares[kChunk + i][k] * chunk.inverse[j][k];
  chunk.read_gain[i][j] = j < i || (j == i && !chunk.read_before) ? sum : 0;
  __syncthreads();
  for (int t = threadIdx.x / 32; t < kChunk; t += kWarps) {
    const int row = (kChunk + t) * chunk.width;
    float variance = dot_by_warp(chunk.projected + row, chunk.inputs + row, chunk.width);
    variance -= squared_norm_by_warp(chunk.read_gain[t], kChunk);
    if (chunk.retains) variance += chunk.relaxed[t] * chunk.norms[t];
    if (threadIdx.x % 32 == 0) chunk.variance[t] = variance;
  }
  __syncthreads();
}

// ---- values --------------------------------------------------------------------------------------------------------

// E of (3), and with kAllRows Q~ R below it.
template <Cores kCores, Rows kRows>
__device__ FASTKM_OUT_OF_LINE void find_errors(FilterChunk& chunk, const FilteringArgs<float>& args, int64_t b) {
  const int columns = chunk.columns, across = columns / 4;
  product_of_rows<kCores, kRows>(StoreRows{chunk.residual, columns, columns}, columns, chunk.K,
                                 Operand{chunk.inputs, chunk.width, 1}, Operand{chunk.mean, 1, columns}, chunk);
  const Codes values = codes_of(args.posterior.values, args.posterior.values_type, b);
  for (int n = threadIdx.x; n < kChunk * across; n += kThreads) {
    const float4 z = load_values(chunk, values, n / across, n % across * 4);
    float4& at = reinterpret_cast<float4*>(chunk.residual)[n];
    at = {z.x - at.x, z.y - at.y, z.z - at.z, z.w - at.w};
  }
  __syncthreads();
  apply_inverse_block<false>(chunk.residual, columns, kChunk, columns, chunk.inverse[0]);
}

// O~ of (3), below E.
template <Cores kCores>
__device__ FASTKM_OUT_OF_LINE void find_reads(FilterChunk& chunk) {
  const int columns = chunk.columns;
  float* const reads = chunk.residual + kChunk * columns;
  product<kCores, 16, 128>(AddRows{reads, columns, columns, 1}, {kChunk, columns, kChunk},
                           Operand{chunk.read_gain[0], kChunk, 1}, Operand{chunk.residual, 1, columns}, chunk);
}

// ---- the memory ----------------------------------------------------------------------------------------------------

__device__ inline void scale_numbers(float* at, int64_t count, float factor) {
  for (int64_t n = threadIdx.x; n < count; n += kThreads) at[n] *= factor;
  __syncthreads();
}

// (4). With forgetting, a diagonal that has left the range of float32 is the chunk's status. No barrier behind it.
template <Cores kCores>
__device__ FASTKM_OUT_OF_LINE void advance_memory(FilterChunk& chunk) {
  const int width = chunk.width, columns = chunk.columns;
  const int64_t square = int64_t(width) * width;
  if (chunk.retains) {
    scale_numbers(chunk.mean, int64_t(chunk.K) * columns, chunk.end);
    scale_numbers(chunk.cov, square, chunk.end * chunk.end);
    for (int k = threadIdx.x; k < chunk.K; k += kThreads) chunk.cov[int64_t(k) * (width + 1)] += chunk.end_relaxed;
  }
  product<kCores, 64, 64>(AddRows{chunk.mean, columns, columns, 1}, {chunk.K, columns, kChunk},
                          Operand{chunk.gain, 1, width}, Operand{chunk.residual, 1, columns}, chunk);
  add_outer(chunk.cov, width, -1, kChunk, chunk.gain, chunk.gain);
  __syncthreads();
  if (!chunk.forgets) return;
  scale_numbers(chunk.cov, square, chunk.growth);
  if (threadIdx.x >= 32) return;
  float beyond = 0;
  for (int k = threadIdx.x; k < chunk.K; k += 32) beyond += is_finite(chunk.cov[int64_t(k) * (width + 1)]) ? 0 : 1;
  for (int offset = 16; offset > 0; offset /= 2) beyond += __shfl_xor_sync(~0u, beyond, offset);
  if (threadIdx.x == 0 && beyond > 0) chunk.now = kOutOfRange;
}

}  // namespace
}  // namespace fastkm
