// The search where every solve factors afresh: for the squared-Gram solve, and when a pattern is solved more than once,
// each time against the mean that the attempt before would give. The slow path: K³ for each attempt.
//
// As in the other search matrices stay as they were before the chunk. With r = R δ, what was written changes
//   G_t = G + Σ c rᵀ + r cᵀ + d c cᵀ,
// and the attempt in hand stands in row t, where the next one sees it as one more pattern.
#pragma once

#include "cuda/writing/search.cuh"

namespace fastkm {
namespace {

// Beside a chunk, whose `q` holds r and whose `system` G.
struct Attempts {
  int64_t count;
  bool squared;
  float* current;                    // [width, width], the Gram matrix the attempt solves with
  float *x, *target, *residual, *g;  // [width]: what it solves for; g = G_t w
  float along;                       // δ · z
};

__host__ __device__ inline bool factors_once(const WritingArgs<float>& args) {
  return args.num_opt_iters == 1 && !args.squared_gram;
}

__host__ __device__ inline void take_attempts(Attempts& attempts, Space& space, const WritingArgs<float>& args,
                                              int width) {
  attempts.count = args.num_opt_iters, attempts.squared = args.squared_gram;
  attempts.x = space.take(width), attempts.target = space.take(width);
  attempts.residual = space.take(width), attempts.g = space.take(width);
  attempts.current = space.take(int64_t(width) * width);
}

// M += factor / 2 · (x yᵀ + y xᵀ)
__device__ FASTKM_OUT_OF_LINE inline void add_symmetric(float* m, int size, int width, float factor, const float* x,
                                                        const float* y) {
  for (int64_t n = threadIdx.x; n < int64_t(size) * size; n += kThreads) {
    const int64_t i = n / size, j = n % size;
    m[i * width + j] += 0.5f * factor * (x[i] * y[j] + y[i] * x[j]);
  }
}

// G_t y at row k of what is already G y; `terms` patterns count, and of_c, of_r hold c · y and r · y.
__device__ inline float gram_terms(const Chunk& chunk, int terms, int k, const float* of_c, const float* of_r) {
  float sum = 0;
  for (int j = 0; j < terms; ++j) {
    const float c = chunk.c[j * chunk.width + k], r = chunk.q[j * chunk.width + k];
    sum += c * (of_r[j] + chunk.d[j] * of_c[j]) + r * of_c[j];
  }
  return sum;
}

// y ← G_t x.
__device__ inline void multiply_gram(Chunk& chunk, int terms, const float* x, float* y) {
  multiply(chunk.system, chunk.width, chunk.K, chunk.width, x, chunk.product);
  multiply(chunk.c, chunk.width, terms, chunk.width, x, chunk.dot[0]);
  multiply(chunk.q, chunk.width, terms, chunk.width, x, chunk.dot[1]);
  __syncthreads();
  for (int k = threadIdx.x; k < chunk.K; k += kThreads)
    y[k] = chunk.product[k] + gram_terms(chunk, terms, k, chunk.dot[0], chunk.dot[1]);
  __syncthreads();
}

// y ← U_t x.
__device__ inline void multiply_cov(Chunk& chunk, int t, const float* x, float* y) {
  multiply(chunk.cov, chunk.width, chunk.K, chunk.width, x, chunk.product);
  multiply(chunk.c, chunk.width, t, chunk.width, x, chunk.dot[0]);
  __syncthreads();
  for (int k = threadIdx.x; k < chunk.K; k += kThreads) {
    float sum = chunk.product[k];
    for (int j = 0; j < t; ++j) sum -= chunk.c[j * chunk.width + k] * (chunk.s[j] * chunk.dot[0][j]);
    y[k] = sum;
  }
  __syncthreads();
}

// The matrix of attempt n and its inverse, and the vector it solves for; with n > 0 the attempt before stands in row t.
__device__ inline void prepare(Chunk& chunk, Attempts& attempts, int t, int64_t n) {
  const int K = chunk.K, width = chunk.width, terms = t + (n > 0);
  const float ridge = chunk.ridge;
  for (int64_t at = threadIdx.x; at < int64_t(K) * K; at += kThreads) {
    const int i = at / K, j = at % K;
    float sum = chunk.system[int64_t(i) * width + j];
    for (int m = 0; m < terms; ++m) {
      const float *c = chunk.row(chunk.c, m), *r = chunk.row(chunk.q, m);
      sum += c[i] * r[j] + r[i] * c[j] + chunk.d[m] * c[i] * c[j];
    }
    attempts.current[int64_t(i) * width + j] = sum;
    if (!attempts.squared) chunk.inverse[int64_t(i) * width + j] = sum + (i == j ? ridge : 0);
  }
  for (int k = threadIdx.x; k < K; k += kThreads) {
    attempts.x[k] = chunk.row(chunk.x, t)[k] + (n > 0 ? attempts.along * chunk.row(chunk.c, t)[k] : 0);
    if (!attempts.squared) attempts.target[k] = attempts.x[k];
  }
  __syncthreads();
  if (attempts.squared) {
    const Side gram{attempts.current, width, 1};
    product<kExact, 64, 64>(K, K, K, gram, gram, chunk, true, [&](int i, int j, const auto& sums) {
      int m = 0;
      for (float sum : sums) {
        const int column = j + m++;
        if (column > i) continue;
        const float entry = sum + (i == column ? ridge : 0);
        chunk.inverse[int64_t(i) * width + column] = chunk.inverse[int64_t(column) * width + i] = entry;
      }
    });
    multiply(attempts.current, width, K, width, attempts.x, attempts.target);
    __syncthreads();
  }
  invert(chunk.inverse, K, width, chunk.p, chunk);
}

// solution ← (G + λI)⁻¹ target, or (G² + λI)⁻¹ target, with one step of refinement.
__device__ inline void solve(Chunk& chunk, const Attempts& attempts, const float* target, float* solution) {
  const int K = chunk.K, width = chunk.width;
  multiply(chunk.inverse, width, K, width, target, solution);
  __syncthreads();
  multiply(attempts.current, width, K, width, solution, attempts.residual);
  __syncthreads();
  if (attempts.squared) {
    multiply(attempts.current, width, K, width, attempts.residual, chunk.product);
    __syncthreads();
  }
  for (int k = threadIdx.x; k < K; k += kThreads)
    attempts.residual[k] =
        target[k] - (attempts.squared ? chunk.product[k] : attempts.residual[k]) - chunk.ridge * solution[k];
  __syncthreads();
  multiply(chunk.inverse, width, K, width, attempts.residual, chunk.product);
  __syncthreads();
  for (int k = threadIdx.x; k < K; k += kThreads) solution[k] += chunk.product[k];
  __syncthreads();
}

// Attempt n of pattern t, into row t of w, c and r, and s and d.
__device__ inline void attempt(Chunk& chunk, Attempts& attempts, int t, int64_t n) {
  float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t), *x = chunk.row(chunk.x, t);
  const int K = chunk.K, width = chunk.width;
  prepare(chunk, attempts, t, n);
  solve(chunk, attempts, attempts.target, w);
  multiply_cov(chunk, t, w, chunk.a);
  if (threadIdx.x < t) chunk.step[t][threadIdx.x] = chunk.dot[0][threadIdx.x];
  __syncthreads();
  multiply_gram(chunk, t, w, attempts.g);
  multiply(w, width, 1, width, chunk.a, chunk.dot[0]);
  multiply(x, width, chunk.count - t, width, w, chunk.dot[1]);
  multiply(w, width, 1, width, attempts.g, chunk.dot[2]);
  __syncthreads();
  const float s = pivot(chunk, t, chunk.dot[0][0]), along = chunk.inner[t][t] - chunk.dot[1][0];
  for (int k = threadIdx.x; k < K; k += kThreads) {
    c[k] = chunk.a[k] / s;
    chunk.row(chunk.q, t)[k] = x[k] - attempts.g[k];
  }
  if (threadIdx.x == 0) {
    chunk.s[t] = s;
    chunk.d[t] = along - chunk.dot[1][0] + chunk.dot[2][0];
    attempts.along = along;
  }
  const int later = static_cast<int>(threadIdx.x) - t;
  if (threadIdx.x < kChunk)
    chunk.along[t][threadIdx.x] =
        later > 0 && later < chunk.count - t ? chunk.inner[threadIdx.x][t] - chunk.dot[1][later] : 0;
  __syncthreads();
}

__device__ inline void search_afresh(Chunk& chunk, Attempts& attempts) {
  for (int t = 0; t < chunk.count; ++t) {
    if (!chunk.seen[t]) {
      leave_out<true>(chunk, t);
      continue;
    }
    for (int64_t n = 0; n < attempts.count; ++n) attempt(chunk, attempts, t, n);
    for (int k = threadIdx.x; k < chunk.K; k += kThreads)
      for (int later = t + 1; later < chunk.count; ++later)
        chunk.row(chunk.x, later)[k] += chunk.along[t][later] * chunk.row(chunk.c, t)[k];
    __syncthreads();
  }
}

}  // namespace
}  // namespace fastkm
