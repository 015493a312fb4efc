// The search that factors a matrix anew for every solve. It serves the squared-Gram solve, and patterns that are solved
// more than once: each solve then sees the mean that the solve before would give. It costs K³ a solve.
//
// As in search.cuh, matrices stay as they were before the chunk. With r = R δ = x − G w, written patterns change
//   (1)  G_t = G + Σ c rᵀ + r cᵀ + d c cᵀ.
// Solve n of pattern t, where row t holds the c, r and d of solve n − 1 as if it were a written pattern:
//   (2)  (G_t + λI) w = x, or (G_t² + λI) w = G_t x, with x = R_t z, refined once
//   (3)  a = U_t w      s = w · a + σ²      c = a / s      g = G_t w      r = x − g
//   (4)  δ · z = Q_tt − w · x      d = δ · δ = δ · z − w · x + w · g
#pragma once

#include "cuda/writing/search.cuh"

namespace fastkm {
namespace {

// What this search keeps beside a chunk and a Search, whose `q` holds r and whose `system` holds G.
struct Refactored {
  int64_t num_solves;  // of each pattern
  bool squared;
  float* gram;                       // G_t of the current solve [width, width]
  float *x, *target, *residual, *g;  // [width]; target is the right-hand side of (2)
  float delta_dot_z;                 // δ · z
};

__host__ __device__ inline bool needs_refactoring(const WritingArgs<float>& args) {
  return args.num_opt_iters != 1 || args.squared_gram;
}

__host__ __device__ inline void allocate_refactored(Refactored& refactored, Arena& arena,
                                                    const WritingArgs<float>& args, int width) {
  refactored.num_solves = args.num_opt_iters;
  refactored.squared = args.squared_gram;
  refactored.x = arena.allocate(width);
  refactored.target = arena.allocate(width);
  refactored.residual = arena.allocate(width);
  refactored.g = arena.allocate(width);
  refactored.gram = arena.allocate(int64_t(width) * width);
}

// out = G_t x, where `terms` patterns count as written.
__device__ inline void product_gram(float* out, Chunk& chunk, Search& search, int terms, const float* x) {
  const int width = chunk.width;
  dot_rows(search.product, search.system, width, chunk.K, width, x);
  dot_rows(chunk.dot[0], chunk.c, width, terms, width, x);
  dot_rows(chunk.dot[1], search.q, width, terms, width, x);
  __syncthreads();
  const float *c_dot_x = chunk.dot[0], *r_dot_x = chunk.dot[1];
  for (int k = threadIdx.x; k < chunk.K; k += kThreads) {
    float sum = 0;
    for (int j = 0; j < terms; ++j) {
      const float c = chunk.c[j * width + k], r = search.q[j * width + k];
      sum += c * (r_dot_x[j] + search.d[j] * c_dot_x[j]) + r * c_dot_x[j];
    }
    out[k] = search.product[k] + sum;
  }
  __syncthreads();
}

// out = U_t x. Leaves c_j · x in dot[0].
__device__ inline void product_cov(float* out, Chunk& chunk, Search& search, int t, const float* x) {
  dot_rows(search.product, chunk.cov, chunk.width, chunk.K, chunk.width, x);
  dot_rows(chunk.dot[0], chunk.c, chunk.width, t, chunk.width, x);
  __syncthreads();
  for (int k = threadIdx.x; k < chunk.K; k += kThreads)
    out[k] = subtract_earlier(chunk, t, k, search.product[k], chunk.dot[0]);
  __syncthreads();
}

// The matrix of solve n, its inverse and its right-hand side.
__device__ inline void prepare_solve(Chunk& chunk, Search& search, Refactored& refactored, int t, int64_t n) {
  const int K = chunk.K, width = chunk.width, terms = t + (n > 0);
  const float ridge = search.ridge;
  float* const inverse = search.inverse;
  for (int64_t at = threadIdx.x; at < int64_t(K) * K; at += kThreads) {
    const int i = at / K, j = at % K;
    float sum = search.system[int64_t(i) * width + j];
    for (int m = 0; m < terms; ++m) {
      const float *c = chunk.row(chunk.c, m), *r = chunk.row(search.q, m);
      sum += c[i] * r[j] + r[i] * c[j] + search.d[m] * c[i] * c[j];
    }
    refactored.gram[int64_t(i) * width + j] = sum;
    if (!refactored.squared) inverse[int64_t(i) * width + j] = sum + (i == j ? ridge : 0);
  }
  for (int k = threadIdx.x; k < K; k += kThreads) {
    const float moved = n > 0 ? refactored.delta_dot_z * chunk.row(chunk.c, t)[k] : 0;
    refactored.x[k] = chunk.row(search.x, t)[k] + moved;
    if (!refactored.squared) refactored.target[k] = refactored.x[k];
  }
  __syncthreads();
  if (refactored.squared) {
    const Operand gram{refactored.gram, width, 1};
    const auto store_both = [&](int i, int j, const auto& sums) {
      int m = 0;
      for (float sum : sums) {
        const int column = j + m++;
        if (column > i) continue;
        const float entry = sum + (i == column ? ridge : 0);
        inverse[int64_t(i) * width + column] = inverse[int64_t(column) * width + i] = entry;
      }
    };
    product<kCudaCores, 64, 64>(store_both, {K, K, K, true}, gram, gram, chunk);
    dot_rows(refactored.target, refactored.gram, width, K, width, refactored.x);
    __syncthreads();
  }
  invert(inverse, K, width, search.p, chunk);
}

// solution ← the solution of (2) for a right-hand side.
__device__ inline void solve(float* solution, Chunk& chunk, Search& search, const Refactored& refactored,
                             const float* target) {
  const int K = chunk.K, width = chunk.width;
  dot_rows(solution, search.inverse, width, K, width, target);
  __syncthreads();
  dot_rows(refactored.residual, refactored.gram, width, K, width, solution);
  __syncthreads();
  if (refactored.squared) {
    dot_rows(search.product, refactored.gram, width, K, width, refactored.residual);
    __syncthreads();
  }
  for (int k = threadIdx.x; k < K; k += kThreads)
    refactored.residual[k] =
        target[k] - (refactored.squared ? search.product[k] : refactored.residual[k]) - search.ridge * solution[k];
  __syncthreads();
  dot_rows(search.product, search.inverse, width, K, width, refactored.residual);
  __syncthreads();
  for (int k = threadIdx.x; k < K; k += kThreads) solution[k] += search.product[k];
  __syncthreads();
}

// Solve n of pattern t: (2) to (4) into row t of w, c and r, and into s and d.
__device__ inline void solve_pattern(Chunk& chunk, Search& search, Refactored& refactored, int t, int64_t n) {
  float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t), *x = chunk.row(search.x, t);
  const int K = chunk.K, width = chunk.width;
  float (&dot)[6][2 * kChunk] = chunk.dot;
  prepare_solve(chunk, search, refactored, t, n);
  solve(w, chunk, search, refactored, refactored.target);
  product_cov(chunk.a, chunk, search, t, w);
  if (threadIdx.x < t) chunk.c_dot_w[t][threadIdx.x] = dot[0][threadIdx.x];
  __syncthreads();
  product_gram(refactored.g, chunk, search, t, w);
  dot_rows(dot[0], w, width, 1, width, chunk.a);
  dot_rows(dot[1], x, width, chunk.count - t, width, w);
  dot_rows(dot[2], w, width, 1, width, refactored.g);
  __syncthreads();
  const float s = innovation_var(chunk, t, dot[0][0]), delta_dot_z = search.value_gram[t][t] - dot[1][0];
  for (int k = threadIdx.x; k < K; k += kThreads) {
    c[k] = chunk.a[k] / s;
    chunk.row(search.q, t)[k] = x[k] - refactored.g[k];
  }
  if (threadIdx.x == 0) {
    chunk.s[t] = s;
    search.d[t] = delta_dot_z - dot[1][0] + dot[2][0];
    refactored.delta_dot_z = delta_dot_z;
  }
  const int later = static_cast<int>(threadIdx.x) - t;
  if (threadIdx.x < kChunk)
    search.delta_dot_z[t][threadIdx.x] =
        later > 0 && later < chunk.count - t ? search.value_gram[threadIdx.x][t] - dot[1][later] : 0;
  __syncthreads();
}

__device__ inline void search_refactored(Chunk& chunk, Search& search, Refactored& refactored) {
  for (int t = 0; t < chunk.count; ++t) {
    if (!chunk.unmasked[t]) {
      clear_pattern(chunk, search, t);
      continue;
    }
    for (int64_t n = 0; n < refactored.num_solves; ++n) solve_pattern(chunk, search, refactored, t, n);
    for (int k = threadIdx.x; k < chunk.K; k += kThreads)
      for (int later = t + 1; later < chunk.count; ++later)
        chunk.row(search.x, later)[k] += search.delta_dot_z[t][later] * chunk.row(chunk.c, t)[k];
    __syncthreads();
  }
}

}  // namespace
}  // namespace fastkm
