// Backward of one chunk of a filter on a GPU: equations (F10) to (F15) of docs/math/filtering.md.
//
// With the chunk of chunk.cuh, bars for cotangents and primes for what comes after the chunk:
//   (1)  Ḡ = E R̄'ᵀ − 2 G Ū',  P̄ = tril(Ō Eᵀ) − 2 diag(v̄) P,  Ē = G R̄' + Pᵀ Ō − ℓ̄ E
//   (2)  N = Ḡ Gᵀ + Ē Eᵀ + P̄ᵀ P, its lower triangle mirrored,  S̄ = L⁻ᵀ (diag(L_tt² p̄_t) − ½ N) L⁻¹,  H̄ = P̄ L⁻¹
//   (3)  B̄ = L⁻ᵀ Ḡ,  Z̄ = L⁻ᵀ Ē
//   (4)  [V̄; X̄] = [S̄; H̄] W~ + [e B̄; diag(v̄) Q~]
//   (5)  [W~; Q~]‾ = [V̄; X̄] U + [−Z̄; Ō] Rᵀ + [S̄ V + H̄ᵀ X; diag(v̄) X]
//   (6)  Ū = e² Ū' + sym([W~; Q~]ᵀ [V̄; X̄]),  R̄ = e R̄' + [W~; Q~]ᵀ [−Z̄; Ō]
// p̄_t = s̄_t − ½ ℓ̄ C / s_t is the cotangent of s_t − σ_t², or of σ_t² alone where rounding has made that zero.
#pragma once

#include "cuda/filtering/chunk.cuh"

namespace fastkm {
namespace {

struct FilterBackward : FilterChunk {
  float* grad_cov;      // Ū [width, width]
  float* grad_mean;     // R̄ [K, columns]
  float* to_projected;  // V̄ above X̄ [32, width]
  float* to_inputs;     // cotangents of W~ above those of Q~ [32, width]
  float* to_gain;       // Ḡ, then B̄ [16, width]
  float* to_values;     // Ē, then −Z̄, above Ō [32, columns]
  float* saved;         // U, then R, of each memory that is kept

  float to_squares[2 * kChunk][kChunk];  // S̄ above H̄
  float to_read_gain[kChunk][kChunk];    // P̄
  float inner[kChunk][kChunk];           // diag(L_tt² p̄_t) − ½ N
  float to_variance[kChunk];             // v̄; 0 where v was below zero by rounding
  float to_innovation[kChunk];           // p̄
  float to_evidence[kChunk];             // ℓ̄ where a pattern is written, with forgetting divided by a²
  float to_scale[kChunk];                // the cotangent of ln a
  float at_end;                          // what reaches ln a of the last step alone
  double to_prior_var;                   // of all chunks so far
  int starts[kChunk + 1];                // where the chunks of a segment start
};

__device__ inline float cotangent_or_zero(const Batch<const float>& from, int64_t b, int64_t t) {
  return from.data ? *element(from, b, t) : 0;
}

// What the caller gives of a chunk: Ō, v̄, p̄ and ℓ̄.
__device__ inline void load_reported(FilterBackward& chunk, const FilteringGrads<float>& grads, int64_t b) {
  const int across = chunk.columns / 4;
  const Operand values = operand_of(grads.read_values, b);
  for (int n = threadIdx.x; n < kChunk * across; n += kThreads) {
    const int t = n / across, column = n % across * 4;
    const int room = values.data && t < chunk.count ? chunk.own - column : 0;
    const float4 x = values.load_four(chunk.first + t, column, values.inner, room);
    const float a = chunk.value_scale[t];
    reinterpret_cast<float4*>(chunk.to_values + kChunk * chunk.columns)[n] = {x.x / a, x.y / a, x.z / a, x.w / a};
  }
  const int t = threadIdx.x;
  if (t < kChunk) {
    const bool inside = t < chunk.count;
    const float evidence = chunk.written[t] ? cotangent_or_zero(grads.posterior.log_evidence, b, 0) : 0;
    const float of_s = inside ? cotangent_or_zero(grads.posterior.innovation_var, b, chunk.first + t) : 0;
    const float of_v = inside ? cotangent_or_zero(grads.variance, b, chunk.first + t) : 0;
    chunk.to_variance[t] = chunk.variance[t] > 0 ? of_v : 0;
    chunk.to_innovation[t] = of_s - 0.5f * evidence * static_cast<float>(chunk.C) / chunk.pivots[t];
    chunk.to_evidence[t] = evidence / (chunk.value_scale[t] * chunk.value_scale[t]);
  }
  __syncthreads();
}

// out = Σ_j m_ji rows_j (kTransposed) or Σ_j m_ij rows_j, for `count` rows i of m. Entries are combined with those of
// `out` by `store(at, row, sums)`. A thread computes four columns. No barrier.
template <bool kTransposed, class Store>
__device__ __forceinline__ void combine_rows(const float (*m)[kChunk], int terms, const float* rows, int count, int ld,
                                             const Store& store) {
  const int across = ld / 4;
  for (int n = threadIdx.x; n < count * across; n += kThreads) {
    const int i = n / across, k = n % across * 4;
    float4 sum = {};
    for (int j = 0; j < terms; ++j) {
      const float4 x = *reinterpret_cast<const float4*>(rows + int64_t(j) * ld + k);
      const float factor = kTransposed ? m[j][i] : m[i][j];
      sum = {sum.x + factor * x.x, sum.y + factor * x.y, sum.z + factor * x.z, sum.w + factor * x.w};
    }
    store(i, i * ld + k, sum);
  }
}

__device__ inline float4 scaled(float factor, float4 x) {
  return {factor * x.x, factor * x.y, factor * x.z, factor * x.w};
}
__device__ inline float4 sum_of(float4 x, float4 y) { return {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w}; }
__device__ inline float4& four_at(float* rows, int at) { return *reinterpret_cast<float4*>(rows + at); }

// −2 G Ū' in the place of Ḡ.
__device__ inline void gain_through_cov(FilterBackward& chunk) {
  const int width = chunk.width;
  product<kCudaCores, 16, 128>(StoreRows{chunk.to_gain, width, width}, {kChunk, width, chunk.K},
                               Operand{chunk.gain, width, 1}, Operand{chunk.grad_cov, width, 1}, chunk);
  scale_numbers(chunk.to_gain, kChunk * width, -2);
}

// (1) but for the term that gain_through_cov left in Ḡ. Ē lies above Ō.
__device__ inline void back_through_memory(FilterBackward& chunk) {
  const int width = chunk.width, columns = chunk.columns;
  product<kAnyCores, 16, 128>(AddRows{chunk.to_gain, width, chunk.K, 1}, {kChunk, chunk.K, chunk.C},
                              Operand{chunk.residual, columns, 1}, Operand{chunk.grad_mean, columns, 1}, chunk);
  product<kAnyCores, 16, 128>(StoreRows{chunk.to_values, columns, columns}, {kChunk, columns, chunk.K},
                              Operand{chunk.gain, width, 1}, Operand{chunk.grad_mean, 1, columns}, chunk);
  const float* const reads = chunk.to_values + kChunk * columns;
  combine_rows<true>(chunk.read_gain, kChunk, reads, kChunk, columns, [&](int t, int at, float4 sum) {
    const float4 error = scaled(-chunk.to_evidence[t], four_at(chunk.residual, at));
    float4& to = four_at(chunk.to_values, at);
    to = sum_of(to, sum_of(sum, error));
  });
  inner_products(chunk.to_read_gain, reads, kChunk, chunk.residual, columns);  // a thread's own entry
  const int i = threadIdx.x / kChunk, j = threadIdx.x % kChunk;
  const bool kept = j < i || (j == i && !chunk.read_before);
  const float entry = chunk.to_read_gain[i][j] - 2 * chunk.to_variance[i] * chunk.read_gain[i][j];
  chunk.to_read_gain[i][j] = kept ? entry : 0;
  __syncthreads();
}

// (2) and (3).
__device__ inline void back_through_factor(FilterBackward& chunk) {
  const int width = chunk.width, columns = chunk.columns;
  const int i = threadIdx.x / kChunk, j = threadIdx.x % kChunk, upper = max(i, j), lower = min(i, j);
  const auto work = chunk.work();
  inner_products(work, chunk.to_gain, kChunk, chunk.gain, width);
  inner_products(work + kChunk, chunk.to_values, kChunk, chunk.residual, columns);
  __syncthreads();
  float sum = work[upper][lower] + work[kChunk + upper][lower], read = 0;
  for (int k = 0; k < kChunk; ++k) {
    sum += chunk.to_read_gain[k][upper] * chunk.read_gain[k][lower];
    read += chunk.to_read_gain[i][k] * chunk.inverse[k][j];
  }
  const bool varies = i == j && chunk.explained[i] > 0;
  chunk.inner[i][j] = (varies ? chunk.pivots[i] * chunk.to_innovation[i] : 0) - 0.5f * sum;
  chunk.to_squares[kChunk + i][j] = read;
  __syncthreads();
  float half = 0;
  for (int k = 0; k < kChunk; ++k) half += chunk.inner[i][k] * chunk.inverse[k][j];
  work[i][j] = half;
  __syncthreads();
  float full = 0;
  for (int k = 0; k < kChunk; ++k) full += chunk.inverse[k][i] * work[k][j];
  chunk.to_squares[i][j] = full;
  scale_numbers(chunk.to_values, kChunk * columns, -1);
  apply_inverse_block<true>(chunk.to_values, columns, kChunk, columns, chunk.inverse[0]);
  apply_inverse_block<true>(chunk.to_gain, width, kChunk, width, chunk.inverse[0]);
}

// (4) and (5).
__device__ inline void back_through_projections(FilterBackward& chunk) {
  const int width = chunk.width, columns = chunk.columns, rows = kChunk * width;
  combine_rows<false>(chunk.to_squares, kChunk, chunk.inputs, 2 * kChunk, width, [&](int i, int at, float4 sum) {
    const float4 other = i < kChunk ? scaled(chunk.end, four_at(chunk.to_gain, at))
                                    : scaled(chunk.to_variance[i - kChunk], four_at(chunk.inputs, at));
    four_at(chunk.to_projected, at) = sum_of(sum, other);
  });
  __syncthreads();
  product<kCudaCores, 32, 64>(StoreRows{chunk.to_inputs, width, width}, {2 * kChunk, width, chunk.K},
                              Operand{chunk.to_projected, width, 1}, Operand{chunk.cov, width, 1}, chunk);
  product<kAnyCores, 32, 64>(AddRows{chunk.to_inputs, width, chunk.K, 1}, {2 * kChunk, chunk.K, chunk.C},
                             Operand{chunk.to_values, columns, 1}, Operand{chunk.mean, columns, 1}, chunk);
  combine_rows<true>(chunk.to_squares, 2 * kChunk, chunk.projected, kChunk, width, [&](int t, int at, float4 sum) {
    float4 &to_weights = four_at(chunk.to_inputs, at), &to_queries = four_at(chunk.to_inputs, rows + at);
    to_weights = sum_of(to_weights, sum);
    to_queries = sum_of(to_queries, scaled(chunk.to_variance[t], four_at(chunk.projected, rows + at)));
  });
  __syncthreads();
}

// (6).
__device__ inline void back_to_memory(FilterBackward& chunk) {
  const int width = chunk.width, columns = chunk.columns;
  if (chunk.retains) {
    scale_numbers(chunk.grad_cov, int64_t(width) * width, chunk.end * chunk.end);
    scale_numbers(chunk.grad_mean, int64_t(chunk.K) * columns, chunk.end);
  }
  product<kAnyCores, 64, 64>(AddRows{chunk.grad_mean, columns, columns, 1}, {chunk.K, columns, 2 * kChunk},
                             Operand{chunk.inputs, 1, width}, Operand{chunk.to_values, 1, columns}, chunk);
  add_outer(chunk.grad_cov, width, 0.5f, 2 * kChunk, chunk.inputs, chunk.to_projected);
  __syncthreads();
  add_outer(chunk.grad_cov, width, 0.5f, 2 * kChunk, chunk.to_projected, chunk.inputs);
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
