// The backward of the search of search_refactored.cuh. The solves of each pattern are made again from the state before
// it and saved; then the cotangents go back through them, from the last solve to the first.
//
// For solve n, whose results are in row t:
//   (1)  d = δ · z − w · x + w · g      δ · z = Q_tt − w · x      r = x − g      g = G w      c = a / s      s = w · a
//   + σ² (2)  a = U w (3)  (G + λI) w = x, or (G² + λI) w = G x, with the G and x that solve n − 1 left
#pragma once

#include "cuda/writing/search_backward.cuh"

namespace fastkm {
namespace {

// Keep what solve n left in row t.
__device__ void save_solve(WriteBackward& chunk, int t, int64_t n) {
  float* const rows = chunk.solve_grad.saved_rows + n * 5 * chunk.width;
  for (int k = threadIdx.x; k < chunk.width; k += kThreads) {
    rows[k] = chunk.row(chunk.w, t)[k];
    rows[chunk.width + k] = chunk.row(chunk.c, t)[k];
    rows[2 * chunk.width + k] = chunk.row(chunk.search.q, t)[k];
    rows[3 * chunk.width + k] = chunk.a[k];
    rows[4 * chunk.width + k] = chunk.refactored.g[k];
  }
  if (threadIdx.x == 0) {
    float* const scalars = chunk.solve_grad.saved_scalars + n * 3;
    scalars[0] = chunk.s[t];
    scalars[1] = chunk.search.d[t];
    scalars[2] = chunk.refactored.delta_dot_z;
  }
  __syncthreads();
}

__device__ void restore_solve(WriteBackward& chunk, int t, int64_t n) {
  const float* rows = chunk.solve_grad.saved_rows + n * 5 * chunk.width;
  const float* scalars = chunk.solve_grad.saved_scalars + n * 3;
  for (int k = threadIdx.x; k < chunk.width; k += kThreads) {
    chunk.row(chunk.w, t)[k] = rows[k];
    chunk.row(chunk.c, t)[k] = rows[chunk.width + k];
    chunk.row(chunk.search.q, t)[k] = rows[2 * chunk.width + k];
    chunk.a[k] = rows[3 * chunk.width + k];
    chunk.refactored.g[k] = rows[4 * chunk.width + k];
  }
  if (threadIdx.x == 0) {
    chunk.s[t] = scalars[0];
    chunk.search.d[t] = scalars[1];
    chunk.refactored.delta_dot_z = scalars[2];
  }
  __syncthreads();
}

// Set the cotangents of c, r and d of row t from that of G + c rᵀ + r cᵀ + d c cᵀ; clear those of w, a and δ · z.
__device__ void move_gram_backward(WriteBackward& chunk, const float* grad_gram, int t) {
  const int K = chunk.K, width = chunk.width;
  RefactoredGrads& grad = chunk.solve_grad;
  const float *c = chunk.row(chunk.c, t), *r = chunk.row(chunk.search.q, t);
  dot_rows(grad.left, grad_gram, width, K, width, c);
  dot_rows(grad.right, grad_gram, width, K, width, r);
  __syncthreads();
  dot_rows(chunk.dot[0], grad.left, width, 1, width, c);
  for (int k = threadIdx.x; k < K; k += kThreads) {
    grad.w[k] = grad.a[k] = 0;
    grad.c[k] = 2 * grad.right[k] + 2 * chunk.search.d[t] * grad.left[k];
    grad.r[k] = 2 * grad.left[k];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    grad.d = chunk.dot[0][0];
    grad.delta_dot_z = 0;
  }
  __syncthreads();
}

// (1) and (2): from the cotangents of a solve's w, a, c, r, d and δ · z to that of its w alone; adds those of G, U, x,
// Q and σ².
__device__ void results_backward(WriteBackward& chunk, int t) {
  const int K = chunk.K, width = chunk.width;
  const float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t), *x = chunk.row(chunk.search.x, t);
  const float* const g = chunk.refactored.g;
  RefactoredGrads& grad = chunk.solve_grad;
  dot_rows(chunk.dot[2], grad.c, width, 1, width, c);
  __syncthreads();
  const float grad_d = grad.d, grad_delta = grad.delta_dot_z + grad_d, s = chunk.s[t];
  const float grad_s = -chunk.dot[2][0] / s;
  for (int k = threadIdx.x; k < K; k += kThreads) {
    grad.left[k] = grad_d * w[k] - grad.r[k];
    grad.w[k] += grad_d * (g[k] - x[k]) - grad_delta * x[k] + grad_s * chunk.a[k];
    chunk.row(chunk.grad.x, t)[k] += grad.r[k] - (grad_d + grad_delta) * w[k];
    grad.a[k] += grad.c[k] / s + grad_s * w[k];
  }
  if (threadIdx.x == 0) {
    chunk.grad.value_gram[t][t] += grad_delta;
    chunk.grad_noise[t] += grad_s;
  }
  __syncthreads();
  product_gram(grad.right, chunk, chunk.search, t, grad.left);
  for (int k = threadIdx.x; k < K; k += kThreads) grad.w[k] += grad.right[k];
  add_symmetric_outer(grad.gram, K, width, 1, grad.left, w);
  add_symmetric_outer(grad.cov, K, width, 1, grad.a, w);
  __syncthreads();
  product_cov(grad.right, chunk, chunk.search, t, grad.a);
  for (int k = threadIdx.x; k < K; k += kThreads) grad.w[k] += grad.right[k];
  __syncthreads();
}

// (1) to (3) for solve n, which is in row t with its a and g. Leaves the cotangents of the matrix and the vector that
// it solved with in `solved_gram` and `solved_x`, and adds that of λ.
__device__ void solve_backward(WriteBackward& chunk, int t, int64_t n) {
  const int K = chunk.K, width = chunk.width;
  Refactored& refactored = chunk.refactored;
  RefactoredGrads& grad = chunk.solve_grad;
  results_backward(chunk, t);
  if (n > 0) restore_solve(chunk, t, n - 1);
  const float* const solution = grad.saved_rows + n * 5 * width;
  prepare_solve(chunk, chunk.search, refactored, t, n);
  solve(grad.solved, chunk, chunk.search, refactored, grad.w);
  dot_rows(chunk.dot[2], grad.solved, width, 1, width, solution);
  fill_zero(grad.solved_gram, int64_t(width) * width);
  if (refactored.squared) {
    dot_rows(grad.solved_x, refactored.gram, width, K, width, grad.solved);
    dot_rows(grad.right, refactored.gram, width, K, width, solution);
    __syncthreads();
    add_symmetric_outer(grad.solved_gram, K, width, -1, grad.solved, grad.right);
    add_symmetric_outer(grad.solved_gram, K, width, -1, grad.solved_x, solution);
    add_symmetric_outer(grad.solved_gram, K, width, 1, grad.solved, refactored.x);
  } else {
    for (int k = threadIdx.x; k < K; k += kThreads) grad.solved_x[k] = grad.solved[k];
    __syncthreads();
    add_symmetric_outer(grad.solved_gram, K, width, -1, grad.solved, solution);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < int64_t(width) * width; i += kThreads) grad.gram[i] += grad.solved_gram[i];
  for (int k = threadIdx.x; k < K; k += kThreads) chunk.row(chunk.grad.x, t)[k] += grad.solved_x[k];
  if (threadIdx.x == 0) chunk.grad.ridge -= chunk.dot[2][0];
  __syncthreads();
}

// Cotangents of what the last solve of pattern t wrote: G' = G + c rᵀ + r cᵀ + d c cᵀ, U' = U − s c cᵀ and
// x' = x + (δ · z') c of the patterns after it.
__device__ void written_backward(WriteBackward& chunk, int t) {
  const int K = chunk.K, width = chunk.width, after = t + 1, later = chunk.count - after;
  const float *c = chunk.row(chunk.c, t), *w = chunk.row(chunk.w, t);
  RefactoredGrads& grad = chunk.solve_grad;
  float* const dot = chunk.dot[3];
  move_gram_backward(chunk, grad.gram, t);
  dot_rows(grad.left, grad.cov, width, K, width, c);
  dot_rows(dot, chunk.row(chunk.grad.x, after), width, later, width, c);
  __syncthreads();
  for (int k = threadIdx.x; k < K; k += kThreads) {
    float grad_w = chunk.row(chunk.grad_w, t)[k], grad_c = grad.c[k] - chunk.s[t] * grad.left[k];
    for (int j = 0; j < later; ++j) {
      float& grad_x = chunk.row(chunk.grad.x, after + j)[k];
      grad_c += chunk.search.delta_dot_z[t][after + j] * grad_x;
      grad_w -= dot[j] * chunk.row(chunk.search.x, after + j)[k];
      grad_x -= dot[j] * w[k];
    }
    grad.w[k] = grad_w;
    grad.c[k] = grad_c;
    grad.a[k] = -grad.left[k];
  }
  if (threadIdx.x < later) chunk.grad.value_gram[after + threadIdx.x][t] = dot[threadIdx.x];
  __syncthreads();
}

__device__ void search_refactored_backward(WriteBackward& chunk) {
  const int K = chunk.K, width = chunk.width;
  const int64_t num_solves = chunk.refactored.num_solves;
  RefactoredGrads& grad = chunk.solve_grad;
  clear_search_grads(chunk);
  fill_zero(grad.gram, int64_t(width) * width);
  fill_zero(grad.cov, int64_t(width) * width);
  __syncthreads();
  for (int t = chunk.count - 1; t >= 0; --t) {
    if (!chunk.unmasked[t]) continue;
    const float* const c = chunk.row(chunk.c, t);
    for (int k = threadIdx.x; k < K; k += kThreads)
      for (int j = t + 1; j < chunk.count; ++j)
        chunk.row(chunk.search.x, j)[k] -= chunk.search.delta_dot_z[t][j] * c[k];
    __syncthreads();
    for (int64_t n = 0; n < num_solves; ++n) {
      solve_pattern(chunk, chunk.search, chunk.refactored, t, n);
      save_solve(chunk, t, n);
    }
    written_backward(chunk, t);
    for (int64_t n = num_solves - 1; n >= 0; --n) {
      solve_backward(chunk, t, n);
      if (n == 0) break;
      // Solve n found solve n − 1 in row t: G and x had moved by its c, r and d.
      move_gram_backward(chunk, grad.solved_gram, t);
      dot_rows(chunk.dot[3], grad.solved_x, width, 1, width, c);
      __syncthreads();
      if (threadIdx.x == 0) grad.delta_dot_z = chunk.dot[3][0];
      for (int k = threadIdx.x; k < K; k += kThreads) grad.c[k] += chunk.refactored.delta_dot_z * grad.solved_x[k];
      __syncthreads();
    }
    restore_solve(chunk, t, num_solves - 1);
  }
}

}  // namespace
}  // namespace fastkm
