// Conditioning a memory on a chunk of patterns with known weights: shared by writing and by all backward passes.
//
// One thread block computes one memory. With U_t the covariance before pattern t, and R the mean before the chunk,
//   (1)  s_t = w_t · U_t w_t + σ_t²      c_t = U_t w_t / s_t      U_{t+1} = U_t − s_t c_t c_tᵀ
//   (2)  δ_t = (z_t − Rᵀ w_t) − Σ_{j < t} δ_j (c_j · w_t)
//   (3)  R' = R + Cᵀ Δ      U' = U − Cᵀ diag(s) C
// U stays as it was before the chunk while the chunk is computed; (1) subtracts the terms of earlier patterns. A
// removal is the same for −U.
#pragma once

#include "cuda/linalg/outer_product.cuh"
#include "cuda/linalg/product.cuh"
#include "cuda/linalg/vectors.cuh"
#include "cuda/posterior/chunk.cuh"

namespace fastkm {
namespace {

// A chunk of one memory. It lies in shared memory: registers are needed for sums. Rows [kChunk, width] belong to
// patterns and are zero in the padding and where a pattern is masked. Index t is a pattern, j an earlier one.
struct Chunk : ThreadBlock {
  int K, width, C, columns, count;  // width and columns are K and C in whole vectors
  Operand mean;                     // R before the chunk
  float* cov;                       // U before the chunk [width, width]
  float *w, *c;                     // rows of W and C
  float* a;                         // U_t w of the current pattern [width]
  float* values;                    // Z, later Δ [kChunk, columns]

  float noise[kChunk], s[kChunk];
  float explained[kChunk];        // w_t · U_t w_t = s_t − σ_t², with its own digits
  float c_dot_w[kChunk][kChunk];  // c_j · w_t in row t
  float dot[6][2 * kChunk];       // dot products until they are used
  int unmasked[kChunk];

  __device__ float* row(float* rows, int t) const { return rows + t * width; }
};

__host__ __device__ inline void set_sizes(Chunk& chunk, const PosteriorArgs<float>& args) {
  chunk.K = static_cast<int>(args.K);
  chunk.width = round_up(chunk.K, 4);
  chunk.C = static_cast<int>(args.C);
  chunk.columns = round_up(chunk.C, 4);
}

// Load the patterns of a chunk. Values of masked patterns become zero: they may hold anything, even NaN.
__device__ inline void load_patterns(Chunk& chunk, const PosteriorArgs<float>& args, int64_t b, int64_t first) {
  if (threadIdx.x == 0) chunk.count = static_cast<int>(min(int64_t(kChunk), args.T - first));
  __syncthreads();
  const Codes values = codes_of(args.values, args.values_type, b);
  const int across = chunk.columns / 4;
  for (int n = threadIdx.x; n < kChunk * across; n += kThreads) {
    const int t = n / across, k = n % across * 4;
    const int room = t < chunk.count && is_unmasked(args, b, first + t) ? chunk.C - k : 0;
    reinterpret_cast<float4*>(chunk.values)[n] = values.load_four(first + t, k, values.inner, room);
  }
  if (threadIdx.x < chunk.count) {
    chunk.noise[threadIdx.x] = *element(args.noise_var, b, first + threadIdx.x);
    chunk.unmasked[threadIdx.x] = is_unmasked(args, b, first + threadIdx.x);
  }
  __syncthreads();
}

// A masked pattern changes nothing: its w and c are zero and its s is σ².
__device__ inline void skip_pattern(Chunk& chunk, int t) {
  for (int k = threadIdx.x; k < chunk.width; k += kThreads) chunk.row(chunk.w, t)[k] = chunk.row(chunk.c, t)[k] = 0;
  if (threadIdx.x < kChunk) chunk.c_dot_w[t][threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    chunk.s[t] = chunk.noise[t];
    chunk.explained[t] = 0;
  }
  __syncthreads();
}

// Entry k of U_t x, given that of U x; `c_dot_x` holds c_j · x.
__device__ __forceinline__ float subtract_earlier(const Chunk& chunk, int t, int k, float sum, const float* c_dot_x) {
  for (int j = 0; j < t; ++j) sum -= chunk.c[j * chunk.width + k] * (chunk.s[j] * c_dot_x[j]);
  return sum;
}

// s_t from w · U_t w, which is kept too. If that is negative by more than rounding explains, U is not positive
// definite. −U explains less than nothing, and what it leaves of σ² was judged by the forward.
template <Direction kDirection = Direction::kIn>
__device__ inline float innovation_var(Chunk& chunk, int t, float explained) {
  if constexpr (kDirection == Direction::kOut) {
    if (threadIdx.x == 0) chunk.explained[t] = explained;
    return chunk.noise[t] + explained;
  }
  if (threadIdx.x == 0) {
    float prior = chunk.noise[t] + fabsf(explained);
    for (int j = 0; j < t; ++j) prior += chunk.s[j] * chunk.c_dot_w[t][j] * chunk.c_dot_w[t][j];
    const float slack = rounding_slack(chunk.K, chunk.count, prior);
    if (!(explained >= -slack) && chunk.status == kGood) chunk.status = kNotPositiveDefinite;
    chunk.explained[t] = explained > 0 ? explained : 0;
  }
  return chunk.noise[t] + (explained > 0 ? explained : 0);
}

// (1) for all patterns of a chunk with known weights.
template <Direction kDirection = Direction::kIn>
__device__ inline void condition(Chunk& chunk) {
  const int width = chunk.width, K = chunk.K;
  for (int t = 0; t < chunk.count; ++t) {
    if (!chunk.unmasked[t]) {
      skip_pattern(chunk, t);
      continue;
    }
    float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t);
    dot_rows(chunk.a, chunk.cov, width, K, width, w);
    dot_rows(chunk.c_dot_w[t], chunk.c, width, t, width, w);
    __syncthreads();
    for (int k = threadIdx.x; k < K; k += kThreads)
      chunk.a[k] = subtract_earlier(chunk, t, k, chunk.a[k], chunk.c_dot_w[t]);
    __syncthreads();
    dot_rows(chunk.dot[0], w, width, 1, width, chunk.a);
    __syncthreads();
    const float s = innovation_var<kDirection>(chunk, t, chunk.dot[0][0]);
    for (int k = threadIdx.x; k < K; k += kThreads) c[k] = chunk.a[k] / s;
    if (threadIdx.x == 0) chunk.s[t] = s;
    __syncthreads();
  }
}

// Rows of Δ from those of Z − W R, by (2). A thread computes whole columns.
__device__ inline void substitute(const Chunk& chunk, float* rows) {
  for (int k = threadIdx.x; k < chunk.C; k += kThreads) {
    float column[kChunk];
#pragma unroll
    for (int t = 0; t < kChunk; ++t) {
      column[t] = 0;
      if (t >= chunk.count) continue;  // with `break` the loop is not unrolled
      float sum = rows[t * chunk.columns + k];
#pragma unroll
      for (int j = 0; j < t; ++j) sum -= chunk.c_dot_w[t][j] * column[j];
      rows[t * chunk.columns + k] = column[t] = sum;
    }
  }
}

// Z ← Δ
__device__ void whiten(Chunk& chunk) {
  product<kAnyCores, 16, 128>(AddRows{chunk.values, chunk.columns, chunk.C, -1}, {chunk.count, chunk.C, chunk.K},
                              Operand{chunk.w, chunk.width, 1}, transposed(chunk.mean), chunk);
  substitute(chunk, chunk.values);
  __syncthreads();
}

// Rows √s_t c_t of the gain.
__device__ inline void scale_to_gain(const Chunk& chunk, float* gain) {
  for (int n = threadIdx.x; n < chunk.count * chunk.width; n += kThreads)
    gain[n] = chunk.c[n] * sqrtf(chunk.s[n / chunk.width]);
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
