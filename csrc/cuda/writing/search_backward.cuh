// The backward of the search of search.cuh.
//
// It goes from the last pattern of a chunk to the first and leaves the terms of the current pattern out of the sums.
// The cotangents of A and U are sums of outer products over the patterns after it:
//   (1)  Ā = −½ Σ (v wᵀ + w vᵀ)      Ū = ½ Σ (ā wᵀ + w āᵀ)
// For pattern t, with x' and z' of a later pattern:
//   (2)  c̄, w̄, s̄, x̄ through A' = A + λ (c wᵀ + w cᵀ) + d c cᵀ,  U' = U − s c cᵀ,  x' = x + (δ · z') c
//   (3)  ā and w̄ through c = a / s and s = w · a + σ²;  w̄ += U ā
//   (4)  v = A⁻¹ w̄;  x̄ += v
#pragma once

#include "cuda/posterior/conditioning_backward.cuh"
#include "cuda/writing/search_refactored.cuh"

namespace fastkm {
namespace {

// The cotangents that both searches leave, and what they need for them.
struct SearchGrads {
  float *x, *a, *v;  // rows x̄, ā and v [kChunk, width]
  float value_gram[kChunk][kChunk];
  float ridge;
};

// Buffers of the backward of search_refactored.cuh.
struct RefactoredGrads {
  float *saved_rows, *saved_scalars;  // w, c, r, a, g [num_solves, 5, width]; s, d, δ · z [num_solves, 3]
  float *w, *a, *c, *r;               // [width], cotangents of the current solve
  float d, delta_dot_z;
  float *left, *right;       // [width], products
  float *gram, *cov;         // Ḡ and Ū [width, width]
  float *solved, *solved_x;  // [width], adjoint solution; cotangent of the solved x
  float* solved_gram;        // [width, width], cotangent of the Gram matrix that was solved with
};

struct WriteBackward : ConditioningBackward {
  Search search;
  Refactored refactored;
  SearchGrads grad;
  RefactoredGrads solve_grad;
};

__device__ inline void clear_search_grads(WriteBackward& chunk) {
  for (int n = threadIdx.x; n < kChunk * kChunk; n += kThreads) chunk.grad.value_gram[n / kChunk][n % kChunk] = 0;
  fill_zero(chunk.grad.x, kChunk * chunk.width);
}

// (2), and (3) but for U ā. The dot products of later patterns j are in dot: v_j · w, v_j · c, ā_j · c, w_j · w (from t
// on), w_j · c and x̄_j · c.
__device__ __forceinline__ void changes_backward(WriteBackward& chunk, int t) {
  const Search& search = chunk.search;
  SearchGrads& grad = chunk.grad;
  const int K = chunk.K, width = chunk.width, after = t + 1, later = chunk.count - after;
  const float ridge = search.ridge, s = chunk.s[t], d = search.d[t];
  const float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t);
  float (&dot)[6][2 * kChunk] = chunk.dot;
  float gram_cw = 0, gram_cc = 0, cov_cc = 0, delta_c = 0;
  for (int j = 0; j < later; ++j) {
    gram_cw -= 0.5f * (dot[1][j] * dot[3][j + 1] + dot[4][j] * dot[0][j]);
    gram_cc -= dot[1][j] * dot[4][j];
    cov_cc += dot[2][j] * dot[4][j];
    delta_c += search.delta_dot_z[t][after + j] * dot[5][j];
  }
  const float grad_s = -(2 * ridge * gram_cw + 2 * d * gram_cc - s * cov_cc + delta_c) / s;
  for (int k = threadIdx.x; k < K; k += kThreads) {
    float gram_w = 0, gram_c = 0, cov_c = 0;
    for (int j = 0; j < later; ++j) {
      const int at = (after + j) * width + k;
      gram_w -= 0.5f * (grad.v[at] * dot[3][j + 1] + chunk.w[at] * dot[0][j]);
      gram_c -= 0.5f * (grad.v[at] * dot[4][j] + chunk.w[at] * dot[1][j]);
      cov_c += 0.5f * (grad.a[at] * dot[4][j] + chunk.w[at] * dot[2][j]);
    }
    float grad_c = 2 * ridge * gram_w + 2 * d * gram_c - s * cov_c;
    float grad_w =
        chunk.row(chunk.grad_w, t)[k] + 2 * ridge * gram_c - gram_cc * (chunk.row(search.x, t)[k] + 2 * ridge * w[k]);
    chunk.row(grad.x, t)[k] -= gram_cc * w[k];
    for (int j = 0; j < later; ++j) {
      const int at = (after + j) * width + k;
      const float delta_dot_z = search.delta_dot_z[t][after + j], x = search.x[at] - delta_dot_z * c[k];
      search.x[at] = x;
      grad_c += delta_dot_z * grad.x[at];
      grad_w -= dot[5][j] * x;
      grad.x[at] -= dot[5][j] * w[k];
    }
    chunk.row(grad.a, t)[k] = grad_c / s - cov_c + grad_s * w[k];
    chunk.row(chunk.grad_w, t)[k] = grad_w + grad_s * s * c[k];
  }
  if (threadIdx.x < later) grad.value_gram[after + threadIdx.x][t] = dot[5][threadIdx.x];
  if (threadIdx.x == 0) {
    grad.value_gram[t][t] = gram_cc;
    chunk.grad_noise[t] += grad_s;
    grad.ridge += 2 * gram_cw - gram_cc * dot[3][0];
  }
  __syncthreads();
}

// The rest of (3), and (4).
__device__ __forceinline__ void solves_backward(WriteBackward& chunk, int t) {
  const Search& search = chunk.search;
  SearchGrads& grad = chunk.grad;
  const int K = chunk.K, width = chunk.width;
  float (&dot)[6][2 * kChunk] = chunk.dot;
  float* const grad_w = chunk.row(chunk.grad_w, t);
  const float* const grad_a = chunk.row(grad.a, t);
  dot_rows(search.product, chunk.cov, width, K, width, grad_a);
  dot_rows(dot[0], chunk.c, width, t, width, grad_a);
  __syncthreads();
  for (int k = threadIdx.x; k < K; k += kThreads) grad_w[k] += subtract_earlier(chunk, t, k, search.product[k], dot[0]);
  __syncthreads();
  dot_rows(search.product, search.inverse, width, K, width, grad_w);
  dot_rows(dot[0], search.p, width, t, width, grad_w);
  dot_rows(dot[1], search.q, width, t, width, grad_w);
  __syncthreads();
  for (int k = threadIdx.x; k < K; k += kThreads) {
    const float v = search.product[k] - inverse_terms(chunk, search, t, k, dot[0], dot[1]);
    chunk.row(grad.v, t)[k] = v;
    chunk.row(grad.x, t)[k] += v;
  }
  __syncthreads();
}

__device__ void search_backward(WriteBackward& chunk) {
  SearchGrads& grad = chunk.grad;
  const int width = chunk.width;
  float (&dot)[6][2 * kChunk] = chunk.dot;
  clear_search_grads(chunk);
  fill_zero(grad.v, kChunk * width);
  fill_zero(grad.a, kChunk * width);
  __syncthreads();
  for (int t = chunk.count - 1; t >= 0; --t) {
    if (!chunk.unmasked[t]) continue;
    const int after = t + 1, later = chunk.count - after;
    const float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t);
    dot_rows(dot[0], chunk.row(grad.v, after), width, later, width, w);
    dot_rows(dot[1], chunk.row(grad.v, after), width, later, width, c);
    dot_rows(dot[2], chunk.row(grad.a, after), width, later, width, c);
    dot_rows(dot[3], chunk.row(chunk.w, t), width, later + 1, width, w);
    dot_rows(dot[4], chunk.row(chunk.w, after), width, later, width, c);
    dot_rows(dot[5], chunk.row(grad.x, after), width, later, width, c);
    __syncthreads();
    changes_backward(chunk, t);
    solves_backward(chunk, t);
  }
  for (int t = 0; t < chunk.count; ++t)
    dot_rows(dot[0] + t, chunk.row(grad.v, t), width, 1, width, chunk.row(chunk.w, t));
  __syncthreads();
  if (threadIdx.x == 0)
    for (int t = 0; t < chunk.count; ++t) grad.ridge -= dot[0][t];
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
