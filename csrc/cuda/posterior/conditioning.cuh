// Conditioning on a chunk of patterns with known weights, which an update's backward, a write and its backward share.
#pragma once

#include "cuda/linalg/outer_product.cuh"
#include "cuda/linalg/product.cuh"
#include "cuda/linalg/vectors.cuh"
#include "cuda/posterior/chunk.cuh"

namespace fastkm {
namespace {

// A chunk of a memory, at the start of shared memory: registers are for sums. Rows of panels are patterns, `width`
// long, zero in the padding and where a pattern is masked; index t is a pattern, j one written before it.
struct Chunk : Block {
  int K, width, C, columns, count;  // width, columns: K and C in whole vectors
  float ridge;
  Side mean;                      // R before the chunk
  float *cov, *inverse, *system;  // U, H, A before the chunk [width, width]
  float *w, *c, *p, *q;           // of each pattern, once it was written
  float *x, *y;                   // R_t z and H_t R_t z of each pattern to come; x stays as its own step left it
  float *a, *v, *product;         // [width], of the step in hand
  float* values;                  // Z [count, columns]

  float noise[kChunk], s[kChunk], d[kChunk];
  float step[kChunk][kChunk];                         // c_j · w_t
  float along[kChunk][kChunk];                        // δ_t · z_later
  float inner[kChunk][kChunk];                        // Q = Z Zᵀ
  float of_cc[kChunk], of_cw[kChunk], of_ww[kChunk];  // N of each pattern
  float dot[6][2 * kChunk];                           // products waiting to be used
  int seen[kChunk];

  __device__ float* row(float* panel, int t) const { return panel + t * width; }
};

// A hidden pattern is one that changes nothing.
template <bool kAll>
__device__ void leave_out(Chunk& chunk, int t) {
  for (int k = threadIdx.x; k < chunk.width; k += kThreads) {
    chunk.row(chunk.w, t)[k] = chunk.row(chunk.c, t)[k] = 0;
    if (kAll) chunk.row(chunk.p, t)[k] = chunk.row(chunk.q, t)[k] = 0;
  }
  if (threadIdx.x < kChunk) chunk.step[t][threadIdx.x] = chunk.along[t][threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    chunk.s[t] = chunk.noise[t];
    chunk.d[t] = chunk.of_cc[t] = chunk.of_cw[t] = chunk.of_ww[t] = 0;
  }
  __syncthreads();
}

// s = w · U_t w + σ² from its first term. Below σ² by more than rounding explains, U is not positive definite.
__device__ inline float pivot(Chunk& chunk, int t, float explained) {
  if (threadIdx.x == 0) {
    float prior = chunk.noise[t] + fabsf(explained);
    for (int j = 0; j < t; ++j) prior += chunk.s[j] * chunk.step[t][j] * chunk.step[t][j];
    const float slack = 4 * static_cast<float>(chunk.K + chunk.count) * kEpsilon * prior;
    if (!(explained >= -slack) && chunk.status == kGood) chunk.status = kNotPositiveDefinite;
  }
  return chunk.noise[t] + (explained > 0 ? explained : 0);
}

// Conditions on known weights: c, s and step of every pattern.
__device__ inline void condition(Chunk& chunk) {
  const int width = chunk.width, K = chunk.K;
  for (int t = 0; t < chunk.count; ++t) {
    float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t);
    if (!chunk.seen[t]) {
      leave_out<false>(chunk, t);
      continue;
    }

    // a = U_t w.
    multiply(chunk.cov, width, K, width, w, chunk.a);
    multiply(chunk.c, width, t, width, w, chunk.step[t]);
    __syncthreads();
    for (int k = threadIdx.x; k < K; k += kThreads) {
      float sum = chunk.a[k];
      for (int j = 0; j < t; ++j) sum -= chunk.c[j * width + k] * (chunk.s[j] * chunk.step[t][j]);
      chunk.a[k] = sum;
    }
    __syncthreads();

    // s = w · a + σ², c = a / s.
    multiply(w, width, 1, width, chunk.a, chunk.dot[4]);
    __syncthreads();
    const float s = pivot(chunk, t, chunk.dot[4][0]);
    for (int k = threadIdx.x; k < K; k += kThreads) c[k] = chunk.a[k] / s;
    if (threadIdx.x == 0) chunk.s[t] = s;
    __syncthreads();
  }
}

__host__ __device__ inline void set_sizes(Chunk& chunk, const PosteriorArgs<float>& args) {
  chunk.K = static_cast<int>(args.K), chunk.width = round_up(chunk.K, 4);
  chunk.C = static_cast<int>(args.C), chunk.columns = round_up(chunk.C, 4);
}

// Column by column, rows of Δ from those of Z − W R: δ_t = (z_t − Rᵀ w_t) − Σ_{j < t} δ_j (c_j · w_t).
__device__ inline void substitute(const Chunk& chunk, float* rows) {
  for (int k = threadIdx.x; k < chunk.C; k += kThreads) {
    float column[kChunk];
#pragma unroll
    for (int t = 0; t < kChunk; ++t) {
      column[t] = 0;
      if (t >= chunk.count) continue;  // leaving the loop would keep it from being unrolled
      float sum = rows[t * chunk.columns + k];
#pragma unroll
      for (int j = 0; j < t; ++j) sum -= chunk.step[t][j] * column[j];
      rows[t * chunk.columns + k] = column[t] = sum;
    }
  }
}

// Bring a chunk of patterns in, with zeros where the mask hides one: a hidden pattern may hold anything, even NaN.
__device__ inline void load_patterns(Chunk& chunk, const PosteriorArgs<float>& args, int64_t b, int64_t first) {
  if (threadIdx.x == 0) chunk.count = static_cast<int>(min(int64_t(kChunk), args.T_ - first));
  __syncthreads();
  const Codes values = codes_of(args.values, args.values_type, b);
  const int across = chunk.columns / 4;
  for (int n = threadIdx.x; n < kChunk * across; n += kThreads) {
    const int t = n / across, k = n % across * 4;
    const int room = t < chunk.count && seen(args, b, first + t) ? chunk.C - k : 0;
    reinterpret_cast<float4*>(chunk.values)[n] = values.four(first + t, k, values.inner, room);
  }
  if (threadIdx.x < chunk.count) {
    chunk.noise[threadIdx.x] = *element(args.noise_var, b, first + threadIdx.x);
    chunk.seen[threadIdx.x] = seen(args, b, first + threadIdx.x);
  }
  __syncthreads();
}

// Z to Δ, in place.
__device__ void whiten(Chunk& chunk) {
  product<kEither, 16, 128>(chunk.count, chunk.C, chunk.K, Side{chunk.w, chunk.width, 1}, transposed(chunk.mean), chunk,
                            false, [&](int i, int j, const auto& sums) {
                              float* const at = chunk.values + i * chunk.columns + j;
                              put_sum(at, at, 1, -1, sums, chunk.C - j);
                            });
  substitute(chunk, chunk.values);
  __syncthreads();
}

// Rows c_t to those of the gain, c_t √s_t.
__device__ inline void scale_rows(const Chunk& chunk, float* c) {
  for (int n = threadIdx.x; n < chunk.count * chunk.width; n += kThreads) c[n] *= sqrtf(chunk.s[n / chunk.width]);
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
