// What the write and its backward share on a GPU: one block computes one memory, 16 patterns at a time.
//
// The search for the weights needs H = (R Rᵀ + λI)⁻¹, A = R Rᵀ + λI and U as they were before the chunk, and nothing of
// size K × K changes while it runs: with w, c, p = H c and q = H w of each pattern written so far, what later patterns
// see is a matrix before the chunk plus a few outer products,
//   A_t = A + Σ d c cᵀ + λ (c wᵀ + w cᵀ)      H_t = H − Σ [p q] N [p q]ᵀ      U_t = U − Σ s c cᵀ.
// So a step reads each matrix once and writes none; undoing a step, as the backward does, is to leave its terms out.
#pragma once

#include "cuda/linalg/inverse.cuh"
#include "cuda/linalg/symmetric.cuh"
#include "cuda/posterior/conditioning.cuh"

namespace fastkm {
namespace {

// What the search is asked for.
enum Search {
  kFind,   // the weights
  kReplay  // the same steps again with weights that are known
};

// Σ_j of what the patterns before t change in a product with H, at row k; dots hold p_j · y and q_j · y.
__device__ inline float inverse_terms(const Chunk& chunk, int t, int k, const float* of_p, const float* of_q) {
  float sum = 0;
  for (int j = 0; j < t; ++j) {
    const float on_p = chunk.of_cc[j] * of_p[j] + chunk.of_cw[j] * of_q[j];
    const float on_q = chunk.of_cw[j] * of_p[j] + chunk.of_ww[j] * of_q[j];
    sum += chunk.p[j * chunk.width + k] * on_p + chunk.q[j * chunk.width + k] * on_q;
  }
  return sum;
}

// One step of refinement of w = y against A_t w = x: row t of w.
__device__ inline void refine(Chunk& chunk, int t) {
  const int width = chunk.width;
  const float *x = chunk.row(chunk.x, t), *y = chunk.row(chunk.y, t);
  float (&of)[6][2 * kChunk] = chunk.dot;
  multiply(chunk.system, width, chunk.K, width, y, chunk.product);
  multiply(chunk.c, width, t, width, y, of[0]);
  multiply(chunk.w, width, t, width, y, of[1]);
  __syncthreads();
  for (int k = threadIdx.x; k < chunk.K; k += kThreads) {
    float sum = chunk.product[k];
    for (int j = 0; j < t; ++j) {
      sum += chunk.c[j * width + k] * (chunk.d[j] * of[0][j] + chunk.ridge * of[1][j]);
      sum += chunk.w[j * width + k] * (chunk.ridge * of[0][j]);
    }
    chunk.v[k] = x[k] - sum;
  }
  __syncthreads();
  multiply(chunk.inverse, width, chunk.K, width, chunk.v, chunk.product);
  multiply(chunk.p, width, t, width, chunk.v, of[0]);
  multiply(chunk.q, width, t, width, chunk.v, of[1]);
  __syncthreads();
  for (int k = threadIdx.x; k < chunk.K; k += kThreads)
    chunk.row(chunk.w, t)[k] = y[k] + chunk.product[k] - inverse_terms(chunk, t, k, of[0], of[1]);
  __syncthreads();
}

// Steps through the patterns of a chunk.
template <Search kSearch>
__device__ void search(Chunk& chunk) {
  const int width = chunk.width, K = chunk.K;
  float (&of)[6][2 * kChunk] = chunk.dot;
  for (int t = 0; t < chunk.count; ++t) {
    float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t), *x = chunk.row(chunk.x, t);
    if (!chunk.seen[t]) {
      leave_out<true>(chunk, t);
      continue;
    }
    if (kSearch == kFind) refine(chunk, t);

    // a = U_t w, and q = H_t w.
    multiply(chunk.cov, width, K, width, w, chunk.a);
    multiply(chunk.c, width, t, width, w, chunk.step[t]);
    multiply(chunk.inverse, width, K, width, w, chunk.product);
    multiply(chunk.p, width, t, width, w, of[0]);
    multiply(chunk.q, width, t, width, w, of[1]);
    multiply(x, width, chunk.count - t, width, w, of[2]);
    multiply(w, width, 1, width, w, of[3]);
    __syncthreads();
    for (int k = threadIdx.x; k < K; k += kThreads) {
      float sum = chunk.a[k];
      for (int j = 0; j < t; ++j) sum -= chunk.c[j * width + k] * (chunk.s[j] * chunk.step[t][j]);
      chunk.a[k] = sum;
      chunk.row(chunk.q, t)[k] = chunk.product[k] - inverse_terms(chunk, t, k, of[0], of[1]);
    }
    __syncthreads();

    // s = w · a + σ², c = a / s, and p = H_t c.
    multiply(w, width, 1, width, chunk.a, of[4]);
    multiply(chunk.inverse, width, K, width, chunk.a, chunk.product);
    multiply(chunk.p, width, t, width, chunk.a, of[0]);
    multiply(chunk.q, width, t + 1, width, chunk.a, of[1]);
    multiply(w, width, 1, width, chunk.row(chunk.q, t), of[5]);
    __syncthreads();
    const float s = pivot(chunk, t, of[4][0]);
    for (int k = threadIdx.x; k < K; k += kThreads) {
      c[k] = chunk.a[k] / s;
      chunk.row(chunk.p, t)[k] = (chunk.product[k] - inverse_terms(chunk, t, k, of[0], of[1])) / s;
    }
    if (threadIdx.x == 0) chunk.s[t] = s;
    const float qc = of[1][t] / s, qw = of[5][0];
    __syncthreads();

    // Woodbury: N = ([[d, λ], [λ, 0]]⁻¹ + [c w]ᵀ H [c w])⁻¹, and what the patterns to come see of the step.
    const int later = chunk.count - t - 1;
    const float ridge = chunk.ridge, d = chunk.inner[t][t] - of[2][0] - ridge * of[3][0];
    multiply(chunk.p + t * width, width, 1, width, c, of[0]);
    multiply(x + width, width, later, width, chunk.row(chunk.p, t), of[0] + 1);
    multiply(x + width, width, later, width, chunk.row(chunk.q, t), of[1] + 1);
    __syncthreads();
    const float cc = of[0][0], cw = qc + 1 / ridge, ww = qw - d / (ridge * ridge);
    const float determinant = cc * ww - cw * cw;
    const float of_cc = ww / determinant, of_cw = -cw / determinant, of_ww = cc / determinant;
    if (threadIdx.x == 0) {
      chunk.d[t] = d;
      chunk.of_cc[t] = of_cc, chunk.of_cw[t] = of_cw, chunk.of_ww[t] = of_ww;
    }
    if (threadIdx.x < kChunk) {
      const int l = threadIdx.x - t;
      chunk.along[t][threadIdx.x] = l > 0 && l <= later ? chunk.inner[threadIdx.x][t] - of[2][l] : 0;
    }
    const float *p = chunk.row(chunk.p, t), *q = chunk.row(chunk.q, t);
    for (int k = threadIdx.x; k < K; k += kThreads)
      for (int l = 1; l <= later; ++l) {
        const float along = chunk.inner[t + l][t] - of[2][l];
        x[l * width + k] += along * c[k];
        if (kSearch != kFind) continue;
        const float px = of[0][l] + along * cc, qx = of[1][l] + along * qc;
        chunk.row(chunk.y, t + l)[k] +=
            along * p[k] - p[k] * (of_cc * px + of_cw * qx) - q[k] * (of_cw * px + of_ww * qx);
      }
    __syncthreads();
  }
}

// ---- around the search ---------------------------------------------------------------------------------------------

// The inner products a search starts from: A = R Rᵀ + λI, X = Z Rᵀ, Q = Z Zᵀ, with λ as given. They are what is solved,
// so they are always float32. One pass over R saves bytes and costs registers.
template <bool kOnePass>
__device__ void take_inner_products(Chunk& chunk, float* gram, float ridge) {
  const Side mean = chunk.mean;
  const Side values{chunk.values, chunk.columns, 1};
  const int K = chunk.K, width = chunk.width;
  clear_padding(gram, K, width);
  const auto store_gram = [&](int i, int j, const auto& sums) {
    int n = 0;
    for (float sum : sums) {
      const int column = j + n++;
      if (column > i) continue;
      gram[int64_t(i) * width + column] = sum + (i == column ? ridge : 0);
      gram[int64_t(column) * width + i] = sum + (i == column ? ridge : 0);
    }
  };
  const auto store_x = [&](int i, int j, const auto& sums) { put(chunk.row(chunk.x, i) + j, sums, K - j); };
  if (kOnePass && K <= kOnePassRows) {
    products_in_one_pass<true>(K, chunk.C, mean, chunk.count, values, chunk, store_gram, store_x);
  } else {
    product<kExact, 64, 64>(K, K, chunk.C, mean, mean, chunk, true, store_gram);
    product<kExact, 16, 128>(chunk.count, K, chunk.C, values, mean, chunk, false, store_x);
  }
  product<kExact, 16, 128>(chunk.count, chunk.count, chunk.C, values, values, chunk, false,
                           [&](int i, int j, const auto& sums) { put(chunk.inner[i] + j, sums, chunk.count - j); });
}

// A memory that cannot be addressed is left as it is.
__device__ inline void hide_patterns(Chunk& chunk) {
  if (threadIdx.x < kChunk) chunk.seen[threadIdx.x] = false;
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
