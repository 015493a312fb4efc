// The search for the weights of a chunk: w_t = (R_t R_tᵀ + λI)⁻¹ R_t z_t for each pattern, where R_t is the mean after
// the patterns before it. One thread block computes one memory.
//
// The search needs A = R Rᵀ + λI, H = A⁻¹ and U as they were before the chunk, X = Z Rᵀ and Q = Z Zᵀ. Nothing of size
// K × K changes while it runs. With w, c, p = H c and q = H w of each earlier pattern, what a later one needs is a
// matrix before the chunk plus a few outer products:
//   (1)  A_t = A + Σ d c cᵀ + λ (c wᵀ + w cᵀ)      H_t = H − Σ [p q] N [p q]ᵀ      U_t = U − Σ s c cᵀ
// For pattern t:
//   (2)  w = H_t x, refined once against A_t w = x
//   (3)  a = U_t w      q = H_t w      s = w · a + σ²      c = a / s      p = H_t c
//   (4)  d = δ · δ = Q_tt − x · w − λ w · w      N = ([[d, λ], [λ, 0]]⁻¹ + [c w]ᵀ H_t [c w])⁻¹   (Woodbury)
//   (5)  x' = x + (δ · z') c for each later pattern, with δ · z' = Q − x' · w; y = H_t x follows likewise
// So a pattern reads each matrix once or twice and writes none. Undoing a pattern, as the backward does, leaves its
// terms out of the sums.
#pragma once

#include "cuda/linalg/inverse.cuh"
#include "cuda/linalg/symmetric.cuh"
#include "cuda/posterior/conditioning.cuh"

namespace fastkm {
namespace {

// What the search keeps beside a chunk. It lies in shared memory.
struct Search {
  float ridge;                // λ
  float *inverse, *system;    // H and A before the chunk [width, width]
  float *p, *q;               // rows [kChunk, width] of written patterns
  float *x, *y;               // rows R_t z and H_t R_t z of later patterns; x of a written pattern stays as it was used
  float *residual, *product;  // [width], of the current pattern

  float d[kChunk];
  float delta_dot_z[kChunk][kChunk];               // δ_t · z_later in row t
  float value_gram[kChunk][kChunk];                // Q = Z Zᵀ
  float n_cc[kChunk], n_cw[kChunk], n_ww[kChunk];  // N of each written pattern
};

enum Task {
  kFind,   // find the weights
  kReplay  // take the same steps with weights that are known
};

__device__ inline void clear_pattern(Chunk& chunk, Search& search, int t) {
  for (int k = threadIdx.x; k < chunk.width; k += kThreads) chunk.row(search.p, t)[k] = chunk.row(search.q, t)[k] = 0;
  if (threadIdx.x < kChunk) search.delta_dot_z[t][threadIdx.x] = 0;
  if (threadIdx.x == 0) search.d[t] = search.n_cc[t] = search.n_cw[t] = search.n_ww[t] = 0;
  skip_pattern(chunk, t);
}

// Σ_j [p q] N [p q]ᵀ y at row k, over the patterns before t; p_dot and q_dot hold p_j · y and q_j · y.
__device__ inline float inverse_terms(const Chunk& chunk, const Search& search, int t, int k, const float* p_dot,
                                      const float* q_dot) {
  float sum = 0;
  for (int j = 0; j < t; ++j) {
    const float along_p = search.n_cc[j] * p_dot[j] + search.n_cw[j] * q_dot[j];
    const float along_q = search.n_cw[j] * p_dot[j] + search.n_ww[j] * q_dot[j];
    sum += search.p[j * chunk.width + k] * along_p + search.q[j * chunk.width + k] * along_q;
  }
  return sum;
}

// (2): row t of w from y = H_t x.
__device__ inline void refine(Chunk& chunk, Search& search, int t) {
  const int width = chunk.width;
  const float *x = chunk.row(search.x, t), *y = chunk.row(search.y, t);
  float (&dot)[6][2 * kChunk] = chunk.dot;
  dot_rows(search.product, search.system, width, chunk.K, width, y);
  dot_rows(dot[0], chunk.c, width, t, width, y);
  dot_rows(dot[1], chunk.w, width, t, width, y);
  __syncthreads();
  for (int k = threadIdx.x; k < chunk.K; k += kThreads) {
    float sum = search.product[k];
    for (int j = 0; j < t; ++j) {
      sum += chunk.c[j * width + k] * (search.d[j] * dot[0][j] + search.ridge * dot[1][j]);
      sum += chunk.w[j * width + k] * (search.ridge * dot[0][j]);
    }
    search.residual[k] = x[k] - sum;
  }
  __syncthreads();
  dot_rows(search.product, search.inverse, width, chunk.K, width, search.residual);
  dot_rows(dot[0], search.p, width, t, width, search.residual);
  dot_rows(dot[1], search.q, width, t, width, search.residual);
  __syncthreads();
  for (int k = threadIdx.x; k < chunk.K; k += kThreads)
    chunk.row(chunk.w, t)[k] = y[k] + search.product[k] - inverse_terms(chunk, search, t, k, dot[0], dot[1]);
  __syncthreads();
}

// (3). Leaves q · a in dot[1][t], the products x · w of this and all later patterns in dot[2], w · w in dot[3] and w ·
// q in dot[5]. Returns s; ends without a barrier.
__device__ __forceinline__ float write_pattern(Chunk& chunk, Search& search, int t) {
  const int width = chunk.width, K = chunk.K;
  float (&dot)[6][2 * kChunk] = chunk.dot;
  float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t), *x = chunk.row(search.x, t);
  dot_rows(chunk.a, chunk.cov, width, K, width, w);
  dot_rows(chunk.c_dot_w[t], chunk.c, width, t, width, w);
  dot_rows(search.product, search.inverse, width, K, width, w);
  dot_rows(dot[0], search.p, width, t, width, w);
  dot_rows(dot[1], search.q, width, t, width, w);
  dot_rows(dot[2], x, width, chunk.count - t, width, w);
  dot_rows(dot[3], w, width, 1, width, w);
  __syncthreads();
  for (int k = threadIdx.x; k < K; k += kThreads) {
    chunk.a[k] = subtract_earlier(chunk, t, k, chunk.a[k], chunk.c_dot_w[t]);
    chunk.row(search.q, t)[k] = search.product[k] - inverse_terms(chunk, search, t, k, dot[0], dot[1]);
  }
  __syncthreads();
  dot_rows(dot[4], w, width, 1, width, chunk.a);
  dot_rows(search.product, search.inverse, width, K, width, chunk.a);
  dot_rows(dot[0], search.p, width, t, width, chunk.a);
  dot_rows(dot[1], search.q, width, t + 1, width, chunk.a);
  dot_rows(dot[5], w, width, 1, width, chunk.row(search.q, t));
  __syncthreads();
  const float s = innovation_var(chunk, t, dot[4][0]);
  for (int k = threadIdx.x; k < K; k += kThreads) {
    c[k] = chunk.a[k] / s;
    chunk.row(search.p, t)[k] = (search.product[k] - inverse_terms(chunk, search, t, k, dot[0], dot[1])) / s;
  }
  if (threadIdx.x == 0) chunk.s[t] = s;
  return s;
}

// (4) and (5). With kReplay the weights of later patterns are known, so y is not needed.
template <Task kTask>
__device__ __forceinline__ void update_later_patterns(Chunk& chunk, Search& search, int t, float s) {
  const int width = chunk.width, later = chunk.count - t - 1;
  float (&dot)[6][2 * kChunk] = chunk.dot;
  const float *c = chunk.row(chunk.c, t), *p = chunk.row(search.p, t), *q = chunk.row(search.q, t);
  float* const x = chunk.row(search.x, t);
  const float q_dot_c = dot[1][t] / s, q_dot_w = dot[5][0];
  __syncthreads();
  const float ridge = search.ridge, d = search.value_gram[t][t] - dot[2][0] - ridge * dot[3][0];
  dot_rows(dot[0], p, width, 1, width, c);
  dot_rows(dot[0] + 1, x + width, width, later, width, p);
  dot_rows(dot[1] + 1, x + width, width, later, width, q);
  __syncthreads();
  const float cc = dot[0][0], cw = q_dot_c + 1 / ridge, ww = q_dot_w - d / (ridge * ridge);
  const float determinant = cc * ww - cw * cw;
  const float n_cc = ww / determinant, n_cw = -cw / determinant, n_ww = cc / determinant;
  if (threadIdx.x == 0) {
    search.d[t] = d;
    search.n_cc[t] = n_cc;
    search.n_cw[t] = n_cw;
    search.n_ww[t] = n_ww;
  }
  if (threadIdx.x < kChunk) {
    const int l = threadIdx.x - t;
    search.delta_dot_z[t][threadIdx.x] = l > 0 && l <= later ? search.value_gram[threadIdx.x][t] - dot[2][l] : 0;
  }
  for (int k = threadIdx.x; k < chunk.K; k += kThreads)
    for (int l = 1; l <= later; ++l) {
      const float delta_dot_z = search.value_gram[t + l][t] - dot[2][l];
      x[l * width + k] += delta_dot_z * c[k];
      if (kTask != kFind) continue;
      const float p_dot_x = dot[0][l] + delta_dot_z * cc, q_dot_x = dot[1][l] + delta_dot_z * q_dot_c;
      chunk.row(search.y, t + l)[k] +=
          delta_dot_z * p[k] - p[k] * (n_cc * p_dot_x + n_cw * q_dot_x) - q[k] * (n_cw * p_dot_x + n_ww * q_dot_x);
    }
  __syncthreads();
}

// (2) to (5) for all patterns of a chunk.
template <Task kTask>
__device__ void search_weights(Chunk& chunk, Search& search) {
  for (int t = 0; t < chunk.count; ++t) {
    if (!chunk.unmasked[t]) {
      clear_pattern(chunk, search, t);
      continue;
    }
    if (kTask == kFind) refine(chunk, search, t);
    const float s = write_pattern(chunk, search, t);
    update_later_patterns<kTask>(chunk, search, t, s);
  }
}

// What a search starts from: `gram` = R Rᵀ + ridge · I, X = Z Rᵀ, Q = Z Zᵀ. These are solved with, so they are always
// float32. One pass over R saves bytes and costs registers.
template <bool kOnePass>
__device__ void inner_products(Chunk& chunk, Search& search, float* gram, float ridge) {
  const Operand mean = chunk.mean, values{chunk.values, chunk.columns, 1};
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
  const StoreRows store_x{search.x, width, K};
  if (kOnePass && K <= kOnePassRows) {
    products_in_one_pass<true>(store_gram, store_x, {chunk.count, K, chunk.C}, mean, values, chunk);
  } else {
    product<kCudaCores, 64, 64>(store_gram, {K, K, chunk.C, true}, mean, mean, chunk);
    product<kCudaCores, 16, 128>(store_x, {chunk.count, K, chunk.C}, values, mean, chunk);
  }
  product<kCudaCores, 16, 128>(StoreRows{search.value_gram[0], kChunk, chunk.count},
                               {chunk.count, chunk.count, chunk.C}, values, values, chunk);
}

// Leave a memory whose Gram matrix could not be factored as it is.
__device__ inline void mask_chunk(Chunk& chunk) {
  if (threadIdx.x < kChunk) chunk.unmasked[threadIdx.x] = false;
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
