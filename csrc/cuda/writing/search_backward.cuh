// Back through the search.
#pragma once

#include "cuda/posterior/conditioning_backward.cuh"
#include "cuda/writing/search_refactored.cuh"

namespace fastkm {
namespace {

struct Reverse : Conditioned {
  float *x_bar, *v, *a_bar;  // rows [count, width] of the search: cotangent of x, A⁻¹ w̄, cotangent of a

  // Of the afresh search: every attempt at a pattern, the cotangents of the one in hand and of G, its matrix and U.
  Attempts attempts;
  float *made, *made_numbers;                                // [attempts, 5, width]; [attempts, 3]
  float *of_w, *of_a, *of_c, *of_r, *solved, *solved_x_bar;  // [width]
  float *left, *right;                                       // [width], products
  float *gram_bar, *solved_bar, *search_cov_bar;             // [width, width]
  float of_along, of_d;

  float inner_bar[kChunk][kChunk];
  float ridge_bar;
};

// Reverse of the search. The cotangents of its A and U are sums of outer products too,
//   Ā = −½ Σ (v wᵀ + w vᵀ)      Ū = ½ Σ (ā wᵀ + w āᵀ),
// of the patterns after the one in hand.
__device__ void search_backward(Reverse& chunk) {
  const int K = chunk.K, width = chunk.width;
  const float ridge = chunk.ridge;
  float (&of)[6][2 * kChunk] = chunk.dot;
  for (int n = threadIdx.x; n < kChunk * kChunk; n += kThreads) chunk.inner_bar[n / kChunk][n % kChunk] = 0;
  fill_zero(chunk.x_bar, kChunk * width);
  fill_zero(chunk.v, kChunk * width);
  fill_zero(chunk.a_bar, kChunk * width);
  __syncthreads();
  for (int t = chunk.count - 1; t >= 0; --t) {
    if (!chunk.seen[t]) continue;
    const int after = t + 1, later = chunk.count - after;
    const float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t);
    multiply(chunk.row(chunk.v, after), width, later, width, w, of[0]);
    multiply(chunk.row(chunk.v, after), width, later, width, c, of[1]);
    multiply(chunk.row(chunk.a_bar, after), width, later, width, c, of[2]);
    multiply(chunk.row(chunk.w, t), width, later + 1, width, w, of[3]);
    multiply(chunk.row(chunk.w, after), width, later, width, c, of[4]);
    multiply(chunk.row(chunk.x_bar, after), width, later, width, c, of[5]);
    __syncthreads();

    // Through A' = A + λ (c wᵀ + w cᵀ) + d c cᵀ, U' = U − s c cᵀ, and x' = x + along c of the patterns after.
    const float s = chunk.s[t], d = chunk.d[t];
    float gram_cw = 0, gram_cc = 0, cov_cc = 0, along_c = 0;
    for (int j = 0; j < later; ++j) {
      gram_cw -= 0.5f * (of[1][j] * of[3][j + 1] + of[4][j] * of[0][j]);
      gram_cc -= of[1][j] * of[4][j];
      cov_cc += of[2][j] * of[4][j];
      along_c += chunk.along[t][after + j] * of[5][j];
    }
    const float s_bar = -(2 * ridge * gram_cw + 2 * d * gram_cc - s * cov_cc + along_c) / s;
    for (int k = threadIdx.x; k < K; k += kThreads) {
      float gram_w = 0, gram_c = 0, cov_c = 0;
      for (int j = 0; j < later; ++j) {
        const int at = (after + j) * width + k;
        gram_w -= 0.5f * (chunk.v[at] * of[3][j + 1] + chunk.w[at] * of[0][j]);
        gram_c -= 0.5f * (chunk.v[at] * of[4][j] + chunk.w[at] * of[1][j]);
        cov_c += 0.5f * (chunk.a_bar[at] * of[4][j] + chunk.w[at] * of[2][j]);
      }
      float c_bar = 2 * ridge * gram_w + 2 * d * gram_c - s * cov_c;
      float w_bar =
          chunk.row(chunk.w_bar, t)[k] + 2 * ridge * gram_c - gram_cc * (chunk.row(chunk.x, t)[k] + 2 * ridge * w[k]);
      chunk.row(chunk.x_bar, t)[k] -= gram_cc * w[k];
      for (int j = 0; j < later; ++j) {
        const int at = (after + j) * width + k;
        const float along = chunk.along[t][after + j], x = chunk.x[at] - along * c[k];
        chunk.x[at] = x;
        c_bar += along * chunk.x_bar[at];
        w_bar -= of[5][j] * x;
        chunk.x_bar[at] -= of[5][j] * w[k];
      }

      // Through c = a/s and s = w·a + σ².
      chunk.row(chunk.a_bar, t)[k] = c_bar / s - cov_c + s_bar * w[k];
      chunk.row(chunk.w_bar, t)[k] = w_bar + s_bar * s * c[k];
    }
    if (threadIdx.x < later) chunk.inner_bar[after + threadIdx.x][t] = of[5][threadIdx.x];
    if (threadIdx.x == 0) {
      chunk.inner_bar[t][t] = gram_cc;
      chunk.noise_bar[t] += s_bar;
      chunk.ridge_bar += 2 * gram_cw - gram_cc * of[3][0];
    }
    __syncthreads();

    // Through a = U w.
    const float* const a_bar = chunk.row(chunk.a_bar, t);
    multiply(chunk.cov, width, K, width, a_bar, chunk.product);
    multiply(chunk.c, width, t, width, a_bar, of[0]);
    __syncthreads();
    for (int k = threadIdx.x; k < K; k += kThreads) {
      float sum = chunk.product[k];
      for (int j = 0; j < t; ++j) sum -= chunk.c[j * width + k] * (chunk.s[j] * of[0][j]);
      chunk.row(chunk.w_bar, t)[k] += sum;
    }
    __syncthreads();

    // Through w = A⁻¹ x.
    const float* const w_bar = chunk.row(chunk.w_bar, t);
    multiply(chunk.inverse, width, K, width, w_bar, chunk.product);
    multiply(chunk.p, width, t, width, w_bar, of[0]);
    multiply(chunk.q, width, t, width, w_bar, of[1]);
    __syncthreads();
    for (int k = threadIdx.x; k < K; k += kThreads) {
      const float v = chunk.product[k] - inverse_terms(chunk, t, k, of[0], of[1]);
      chunk.row(chunk.v, t)[k] = v;
      chunk.row(chunk.x_bar, t)[k] += v;
    }
    __syncthreads();
  }
  for (int t = 0; t < chunk.count; ++t)
    multiply(chunk.row(chunk.v, t), width, 1, width, chunk.row(chunk.w, t), chunk.dot[0] + t);
  __syncthreads();
  if (threadIdx.x == 0)
    for (int t = 0; t < chunk.count; ++t) chunk.ridge_bar -= chunk.dot[0][t];
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
