// Back through the search where every solve factors afresh.
#pragma once

#include "cuda/writing/search_backward.cuh"

namespace fastkm {
namespace {

// What an attempt leaves in row t, and back.
__device__ void save_attempt(Reverse& chunk, int t, int64_t n) {
  float* const made = chunk.made + n * 5 * chunk.width;
  for (int k = threadIdx.x; k < chunk.width; k += kThreads) {
    made[k] = chunk.row(chunk.w, t)[k], made[chunk.width + k] = chunk.row(chunk.c, t)[k];
    made[2 * chunk.width + k] = chunk.row(chunk.q, t)[k];
    made[3 * chunk.width + k] = chunk.a[k], made[4 * chunk.width + k] = chunk.attempts.g[k];
  }
  if (threadIdx.x == 0) {
    float* const numbers = chunk.made_numbers + n * 3;
    numbers[0] = chunk.s[t], numbers[1] = chunk.d[t], numbers[2] = chunk.attempts.along;
  }
  __syncthreads();
}

__device__ void restore_attempt(Reverse& chunk, int t, int64_t n) {
  const float *made = chunk.made + n * 5 * chunk.width, *numbers = chunk.made_numbers + n * 3;
  for (int k = threadIdx.x; k < chunk.width; k += kThreads) {
    chunk.row(chunk.w, t)[k] = made[k], chunk.row(chunk.c, t)[k] = made[chunk.width + k];
    chunk.row(chunk.q, t)[k] = made[2 * chunk.width + k];
    chunk.a[k] = made[3 * chunk.width + k], chunk.attempts.g[k] = made[4 * chunk.width + k];
  }
  if (threadIdx.x == 0) chunk.s[t] = numbers[0], chunk.d[t] = numbers[1], chunk.attempts.along = numbers[2];
  __syncthreads();
}

// Cotangents of c, r and d of row t from that of G + c rᵀ + r cᵀ + d c cᵀ, added; those of w and a are cleared.
__device__ void move_gram_backward(Reverse& chunk, const float* bar, int t) {
  const int K = chunk.K, width = chunk.width;
  const float *c = chunk.row(chunk.c, t), *r = chunk.row(chunk.q, t);
  multiply(bar, width, K, width, c, chunk.left);
  multiply(bar, width, K, width, r, chunk.right);
  __syncthreads();
  multiply(chunk.left, width, 1, width, c, chunk.dot[0]);
  for (int k = threadIdx.x; k < K; k += kThreads) {
    chunk.of_w[k] = chunk.of_a[k] = 0;
    chunk.of_c[k] = 2 * chunk.right[k] + 2 * chunk.d[t] * chunk.left[k];
    chunk.of_r[k] = 2 * chunk.left[k];
  }
  __syncthreads();
  if (threadIdx.x == 0) chunk.of_d = chunk.dot[0][0], chunk.of_along = 0;
  __syncthreads();
}

// Reverse of attempt n, which stands in row t with its a and g: takes the cotangents of its w, a, c, r, along and d,
// adds those of G, U, x, Q and λ, and leaves those of the matrix and vector it solved with in `solved_bar` and
// `solved_x_bar`.
__device__ void attempt_backward(Reverse& chunk, int t, int64_t n) {
  const int K = chunk.K, width = chunk.width;
  const float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t), *x = chunk.row(chunk.x, t);
  Attempts& attempts = chunk.attempts;
  float (&of)[6][2 * kChunk] = chunk.dot;

  // d = along − w·x + w·g,  along = Q_tt − w·x,  r = x − g,  g = G w
  multiply(chunk.of_c, width, 1, width, c, of[2]);
  __syncthreads();
  const float d_bar = chunk.of_d, along_bar = chunk.of_along + d_bar, s = chunk.s[t], s_bar = -of[2][0] / s;
  for (int k = threadIdx.x; k < K; k += kThreads) {
    chunk.left[k] = d_bar * w[k] - chunk.of_r[k];
    chunk.of_w[k] += d_bar * (attempts.g[k] - x[k]) - along_bar * x[k] + s_bar * chunk.a[k];
    chunk.row(chunk.x_bar, t)[k] += chunk.of_r[k] - (d_bar + along_bar) * w[k];

    // c = a/s,  s = w·a + σ²
    chunk.of_a[k] += chunk.of_c[k] / s + s_bar * w[k];
  }
  if (threadIdx.x == 0) {
    chunk.inner_bar[t][t] += along_bar;
    chunk.noise_bar[t] += s_bar;
  }
  __syncthreads();
  multiply_gram(chunk, t, chunk.left, chunk.right);
  for (int k = threadIdx.x; k < K; k += kThreads) chunk.of_w[k] += chunk.right[k];
  add_symmetric(chunk.gram_bar, K, width, 1, chunk.left, w);

  // a = U w
  add_symmetric(chunk.search_cov_bar, K, width, 1, chunk.of_a, w);
  __syncthreads();
  multiply_cov(chunk, t, chunk.of_a, chunk.right);
  for (int k = threadIdx.x; k < K; k += kThreads) chunk.of_w[k] += chunk.right[k];
  __syncthreads();

  // (G + λI) w = x, or (G² + λI) w = G x, with the G and x that the attempt before left.
  if (n > 0) restore_attempt(chunk, t, n - 1);
  const float* const solution = chunk.made + n * 5 * width;
  prepare(chunk, attempts, t, n);
  solve(chunk, attempts, chunk.of_w, chunk.solved);
  multiply(chunk.solved, width, 1, width, solution, of[2]);
  fill_zero(chunk.solved_bar, int64_t(width) * width);
  if (attempts.squared) {
    multiply(attempts.current, width, K, width, chunk.solved, chunk.solved_x_bar);
    multiply(attempts.current, width, K, width, solution, chunk.right);
    __syncthreads();
    add_symmetric(chunk.solved_bar, K, width, -1, chunk.solved, chunk.right);
    add_symmetric(chunk.solved_bar, K, width, -1, chunk.solved_x_bar, solution);
    add_symmetric(chunk.solved_bar, K, width, 1, chunk.solved, attempts.x);
  } else {
    for (int k = threadIdx.x; k < K; k += kThreads) chunk.solved_x_bar[k] = chunk.solved[k];
    __syncthreads();
    add_symmetric(chunk.solved_bar, K, width, -1, chunk.solved, solution);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < int64_t(width) * width; i += kThreads) chunk.gram_bar[i] += chunk.solved_bar[i];
  for (int k = threadIdx.x; k < K; k += kThreads) chunk.row(chunk.x_bar, t)[k] += chunk.solved_x_bar[k];
  if (threadIdx.x == 0) chunk.ridge_bar -= of[2][0];
  __syncthreads();
}

// Reverse of search_afresh: the attempts at each pattern are made again from the state before it.
__device__ void search_afresh_backward(Reverse& chunk) {
  const int K = chunk.K, width = chunk.width;
  const int64_t count = chunk.attempts.count;
  for (int n = threadIdx.x; n < kChunk * kChunk; n += kThreads) chunk.inner_bar[n / kChunk][n % kChunk] = 0;
  fill_zero(chunk.x_bar, kChunk * width);
  fill_zero(chunk.gram_bar, int64_t(width) * width);
  fill_zero(chunk.search_cov_bar, int64_t(width) * width);
  __syncthreads();
  for (int t = chunk.count - 1; t >= 0; --t) {
    if (!chunk.seen[t]) continue;
    const float *c = chunk.row(chunk.c, t), *w = chunk.row(chunk.w, t);
    const int after = t + 1, later = chunk.count - after;
    for (int k = threadIdx.x; k < K; k += kThreads)
      for (int j = after; j < chunk.count; ++j) chunk.row(chunk.x, j)[k] -= chunk.along[t][j] * c[k];
    __syncthreads();
    for (int64_t n = 0; n < count; ++n) {
      attempt(chunk, chunk.attempts, t, n);
      save_attempt(chunk, t, n);
    }

    // Through what the last attempt wrote.
    move_gram_backward(chunk, chunk.gram_bar, t);
    multiply(chunk.search_cov_bar, width, K, width, c, chunk.left);
    multiply(chunk.row(chunk.x_bar, after), width, later, width, c, chunk.dot[3]);
    __syncthreads();
    for (int k = threadIdx.x; k < K; k += kThreads) {
      float of_w = chunk.row(chunk.w_bar, t)[k], of_c = chunk.of_c[k] - chunk.s[t] * chunk.left[k];
      for (int j = 0; j < later; ++j) {
        float& x_bar = chunk.row(chunk.x_bar, after + j)[k];
        of_c += chunk.along[t][after + j] * x_bar;
        of_w -= chunk.dot[3][j] * chunk.row(chunk.x, after + j)[k];
        x_bar -= chunk.dot[3][j] * w[k];
      }
      chunk.of_w[k] = of_w, chunk.of_c[k] = of_c, chunk.of_a[k] = -chunk.left[k];
    }
    if (threadIdx.x < later) chunk.inner_bar[after + threadIdx.x][t] = chunk.dot[3][threadIdx.x];
    __syncthreads();

    // Through the attempts; each finds the one before it in row t.
    for (int64_t n = count - 1; n >= 0; --n) {
      attempt_backward(chunk, t, n);
      if (n == 0) break;
      move_gram_backward(chunk, chunk.solved_bar, t);
      multiply(chunk.solved_x_bar, width, 1, width, c, chunk.dot[3]);
      __syncthreads();
      if (threadIdx.x == 0) chunk.of_along = chunk.dot[3][0];
      for (int k = threadIdx.x; k < K; k += kThreads) chunk.of_c[k] += chunk.attempts.along * chunk.solved_x_bar[k];
      __syncthreads();
    }
    restore_attempt(chunk, t, count - 1);
  }
}

}  // namespace
}  // namespace fastkm
