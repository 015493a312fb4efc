// Conditioning on known weights and its backward, which the backward of an update and of a write share: one block
// computes one memory, 16 patterns at a time. The states before the chunks are not kept: the first pass conditions on
// the weights and leaves c, s and Δ of every pattern in the workspace, the second goes back from the last state and
// takes them out again.
#pragma once

#include "cuda/posterior/conditioning.cuh"

namespace fastkm {
namespace {

struct Conditioned : Chunk {
  float* w_bar;               // [count, width], cotangent of w
  float *given, *gain;        // rows [count, width]: cotangent of V = W U, and G = L⁻¹ V
  float* cov_bar;             // [width, width]
  float *delta, *values_bar;  // [count, columns]
  float* state;               // R [K, columns], working copy
  float* own_mean_bar;        // R̄ [K, columns] while it fits on chip, else null: then it is worked on where it goes
  Side mean_bar;
  float *all_c, *all_delta, *all_s;  // of every pattern

  float noise_bar[kChunk], pivot_bar[kChunk], energy_bar[kChunk];
  float square[4][kChunk][kChunk];

  // L of S = V Wᵀ + diag(σ²).
  __device__ float root_at(int t, int j) const { return j > t ? 0 : sqrtf(s[j]) * (j == t ? 1 : step[t][j]); }
};

// What is used a few times a chunk: the state and its cotangent, and what the first pass leaves.
__host__ __device__ inline void take_passes(Conditioned& chunk, Space& space, const PosteriorArgs<float>& args) {
  const int64_t state = int64_t(chunk.K) * chunk.columns;
  chunk.state = space.take(state);
  chunk.own_mean_bar = space.fits(state) ? space.take(state) : nullptr;
  chunk.all_s = space.take(args.T_);
  chunk.all_c = space.take(args.T_ * chunk.width);
  chunk.all_delta = space.take(args.T_ * chunk.columns);
}

__device__ inline float* mean_bar_at(const Conditioned& chunk, int i, int j) {
  return const_cast<float*>(chunk.mean_bar.at(i, j));
}

// Bring the prior and the cotangents of the posterior in, these into the places of the prior's.
__device__ inline void load_memory(Conditioned& chunk, const PosteriorArgs<float>& args,
                                   const PosteriorGrads<float>& told, int64_t b) {
  const int K = chunk.K, C = chunk.C, width = chunk.width, columns = chunk.columns;
  if (threadIdx.x == 0) {
    chunk.status = kGood;
    chunk.mean = {chunk.state, columns, 1};
    float* const own = chunk.own_mean_bar;
    chunk.mean_bar = own ? Side{own, columns, 1} : Side{element(told.to_mean, b), C, 1};
  }
  __syncthreads();
  load_rows(chunk.cov, K, K, width, width, side_of(args.cov, b));
  load_rows(chunk.state, K, C, K, columns, side_of(args.mean, b));
  for (int n = threadIdx.x; n < K * C; n += kThreads)
    *mean_bar_at(chunk, n / C, n % C) = told.mean.data ? *element(told.mean, b, n / C, n % C) : 0;
  if (!told.cov.data) {
    fill_zero(chunk.cov_bar, int64_t(width) * width);
    __syncthreads();
    return;
  }
  load_rows(chunk.cov_bar, K, K, width, width, side_of(told.cov, b));
  __syncthreads();
  for (int n = threadIdx.x; n < K * K; n += kThreads) {
    const int i = n / K, j = n % K;
    float &lower = chunk.cov_bar[i * width + j], &upper = chunk.cov_bar[j * width + i];
    if (j < i) lower = upper = 0.5f * (lower + upper);
  }
  __syncthreads();
}

__device__ inline void store_mean_bar(const Conditioned& chunk, const PosteriorGrads<float>& told, int64_t b) {
  if (chunk.own_mean_bar) store_rows(told.to_mean, b, chunk.K, chunk.C, chunk.own_mean_bar, chunk.columns);
}

// R + factor · Cᵀ Δ and U − factor · Cᵀ diag(s) C; the gain is left in `gain`.
__device__ void move_state(Conditioned& chunk, const float* delta, float factor) {
  for (int n = threadIdx.x; n < chunk.count * chunk.width; n += kThreads)
    chunk.gain[n] = chunk.c[n] * sqrtf(chunk.s[n / chunk.width]);
  __syncthreads();
  product<kEither, 64, 64>(chunk.K, chunk.C, chunk.count, Side{chunk.c, 1, chunk.width}, Side{delta, 1, chunk.columns},
                           chunk, false, [&](int i, int j, const auto& sums) {
                             float* const at = chunk.state + int64_t(i) * chunk.columns + j;
                             put_sum(at, at, 1, factor, sums, chunk.C - j);
                           });
  add_outer(chunk.cov, chunk.width, -factor, chunk.count, chunk.gain, chunk.gain);
  __syncthreads();
}

__device__ void load_chunk(Conditioned& chunk, const PosteriorArgs<float>& args, int64_t b, int64_t first) {
  load_patterns(chunk, args, b, first);
  const Codes weights = codes_of(args.weights, args.weights_type, b);
  const int across = chunk.width / 4;
  for (int n = threadIdx.x; n < chunk.count * across; n += kThreads) {
    const int t = n / across, k = n % across * 4;
    reinterpret_cast<float4*>(chunk.w)[n] = weights.four(first + t, k, weights.inner, chunk.seen[t] ? chunk.K - k : 0);
  }
  __syncthreads();
}

// Forward through all chunks, with the weights known.
__device__ void condition_all(Conditioned& chunk, const PosteriorArgs<float>& args, int64_t b) {
  for (int64_t first = 0; first < args.T_; first += kChunk) {
    load_chunk(chunk, args, b, first);
    condition(chunk);
    whiten(chunk);
    for (int n = threadIdx.x; n < chunk.count * chunk.width; n += kThreads)
      chunk.all_c[first * chunk.width + n] = chunk.c[n];
    for (int n = threadIdx.x; n < chunk.count * chunk.columns; n += kThreads)
      chunk.all_delta[first * chunk.columns + n] = chunk.values[n];
    if (threadIdx.x < chunk.count) chunk.all_s[first + threadIdx.x] = chunk.s[threadIdx.x];
    move_state(chunk, chunk.values, 1);
  }
}

// Columns of rows ← L⁻ᵀ (rows + 2 diag(scale) extra).
__device__ inline void solve_transposed(const Conditioned& chunk, float* rows, int ld, int size, const float* extra) {
  for (int k = threadIdx.x; k < size; k += kThreads) {
    float column[kChunk];
#pragma unroll
    for (int t = kChunk - 1; t >= 0; --t) {
      column[t] = 0;
      if (t >= chunk.count) continue;
      float sum = rows[t * ld + k];
      if (extra) sum += 2 * chunk.energy_bar[t] * extra[t * ld + k];
      sum /= sqrtf(chunk.s[t]);
#pragma unroll
      for (int i = t + 1; i < kChunk; ++i)
        if (i < chunk.count) sum -= chunk.step[i][t] * column[i];
      rows[t * ld + k] = column[t] = sum;
    }
  }
}

__device__ inline float value_or_zero(const Batch<const float>& from, int64_t b, int64_t t) {
  return from.data ? *element(from, b, t) : 0;
}

// From the cotangents of a pattern's s, KL and log-likelihood to those of its pivot s, energy ‖E_t‖² and σ², a warp a
// pattern.
__device__ void pattern_cotangents(Conditioned& chunk, const PosteriorGrads<float>& grads, int64_t b, int64_t first) {
  const int lane = threadIdx.x % 32;
  for (int t = threadIdx.x / 32; t < chunk.count; t += kWarps) {
    float energy = 0;
    for (int k = lane; k < chunk.C; k += 32) {
      const float e = chunk.delta[t * chunk.columns + k];
      energy += e * e;
    }
    for (int offset = 16; offset > 0; offset /= 2) energy += __shfl_xor_sync(~0u, energy, offset);
    if (lane != 0) continue;
    const float of_s = value_or_zero(grads.innovation_var, b, first + t), of_kl = value_or_zero(grads.kl, b, first + t);
    const float of_evidence = value_or_zero(grads.log_evidence, b, 0);
    const float noise = chunk.noise[t], s = chunk.s[t], C = static_cast<float>(chunk.C);
    chunk.pivot_bar[t] = chunk.energy_bar[t] = 0;
    chunk.noise_bar[t] = of_s;
    if (!chunk.seen[t]) continue;
    const float of_pivot = of_s + 0.5f * (of_kl * (C * (s - noise) + energy * noise) / (s * s) - of_evidence * C / s);
    if (s > noise) chunk.pivot_bar[t] = of_pivot;
    chunk.energy_bar[t] = 0.5f * (of_kl * (1 - noise / s) - of_evidence);
    chunk.noise_bar[t] = (s > noise ? 0 : of_pivot) + 0.5f * of_kl * (C * (1 / s - 1 / noise) - energy / s);
  }
  __syncthreads();
}

// S̄ from the cotangent of its factor, both of one chunk: S̄ = L⁻ᵀ Φ(Lᵀ L̄) L⁻¹, symmetric, and S̄ L beside it.
__device__ void factor_backward(Conditioned& chunk) {
  float (&bar)[kChunk][kChunk] = chunk.square[0], (&halved)[kChunk][kChunk] = chunk.square[1];
  float (&by_root)[kChunk][kChunk] = chunk.square[2];
  const int i = threadIdx.x / kChunk, j = threadIdx.x % kChunk, count = chunk.count;
  static_assert(kThreads == kChunk * kChunk, "a thread an entry");
  const bool inside = i < count && j < count;
  const float entry = inside && j <= i ? -(chunk.square[2][j][i] + chunk.square[3][j][i]) : 0;
  __syncthreads();
  bar[i][j] = entry + (inside && i == j ? 2 * chunk.root_at(i, i) * chunk.pivot_bar[i] : 0);
  __syncthreads();
  if (j <= i) {
    float sum = 0;
    for (int k = i; k < count; ++k) sum += chunk.root_at(k, i) * bar[k][j];
    halved[i][j] = halved[j][i] = 0.5f * sum;
  }
  __syncthreads();
  // Columns, and then the rows of what they became.
  for (int pass = 0; pass < 2; ++pass) {
    const bool rows = pass;
    if (threadIdx.x < count)
      for (int t = count - 1; t >= 0; --t) {
        float& at = rows ? halved[threadIdx.x][t] : halved[t][threadIdx.x];
        float sum = at;
        for (int k = t + 1; k < count; ++k)
          sum -= chunk.root_at(k, t) * (rows ? halved[threadIdx.x][k] : halved[k][threadIdx.x]);
        at = sum / chunk.root_at(t, t);
      }
    __syncthreads();
  }
  bar[i][j] = inside ? 0.5f * (halved[i][j] + halved[j][i]) : 0;
  __syncthreads();
  float sum = 0;
  for (int t = j; t < count; ++t) sum += bar[i][t] * chunk.root_at(t, j);
  by_root[i][j] = sum;
  if (inside && i == j) chunk.noise_bar[i] += bar[i][i];
  __syncthreads();
}

// With bars for cotangents and primes for what is after the chunk:
//   V̄ = L⁻ᵀ (E R̄'ᵀ − 2 G Ū')       Z̄ = L⁻ᵀ (G R̄' + 2 diag(ē) E)
//   L̄ = −tril(V̄ Gᵀ + Z̄ Eᵀ) + 2 diag(L_tt s̄_t)      S̄ from L̄
//   V̄ += S̄ W     W̄ += S̄ V − Z̄ Rᵀ + V̄ U
// Leaves V̄ in `given`, Z̄ in `values_bar`; E stands in `delta`.
__device__ void condition_backward(Conditioned& chunk, const PosteriorGrads<float>& told,
                                   const Batch<const float>& of_weights, int64_t b, int64_t first) {
  const Side mean_bar = chunk.mean_bar;
  const int K = chunk.K, C = chunk.C, width = chunk.width, columns = chunk.columns, count = chunk.count;
  pattern_cotangents(chunk, told, b, first);

  // Through the state.
  product<kEither, 16, 128>(count, K, C, Side{chunk.delta, columns, 1}, mean_bar, chunk, false,
                            [&](int i, int j, const auto& sums) { put(chunk.row(chunk.given, i) + j, sums, K - j); });
  product<kExact, 16, 128>(count, K, K, Side{chunk.gain, width, 1}, Side{chunk.cov_bar, width, 1}, chunk, false,
                           [&](int i, int j, const auto& sums) {
                             float* const at = chunk.row(chunk.given, i) + j;
                             put_sum(at, at, 1, -2, sums, K - j);
                           });
  product<kEither, 16, 128>(
      count, C, K, Side{chunk.gain, width, 1}, Side{mean_bar.data, mean_bar.inner, mean_bar.outer}, chunk, false,
      [&](int i, int j, const auto& sums) { put(chunk.values_bar + i * columns + j, sums, C - j); });

  // Through the whitening.
  solve_transposed(chunk, chunk.given, width, K, nullptr);
  solve_transposed(chunk, chunk.values_bar, columns, C, chunk.delta);
  __syncthreads();
  for (int t = 0; t < count; ++t) {
    multiply(chunk.given, width, count, width, chunk.row(chunk.gain, t), chunk.square[2][t]);
    multiply(chunk.values_bar, columns, count, columns, chunk.delta + t * columns, chunk.square[3][t]);
  }
  __syncthreads();
  factor_backward(chunk);

  // Down to the weights.
  for (int n = threadIdx.x; n < count * width; n += kThreads) {
    const int t = n / width, k = n % width;
    float of_given = chunk.given[n];
    float of_w = k < K && of_weights.data ? *element(of_weights, b, first + t, k) : 0;
    for (int j = 0; j < count; ++j) {
      of_given += chunk.square[0][t][j] * chunk.w[j * width + k];
      of_w += chunk.square[2][t][j] * chunk.gain[j * width + k];
    }
    chunk.given[n] = of_given;
    chunk.w_bar[n] = of_w;
  }
  __syncthreads();
  product<kExact, 16, 128>(count, K, K, Side{chunk.given, width, 1}, Side{chunk.cov, width, 1}, chunk, false,
                           [&](int i, int j, const auto& sums) {
                             float* const at = chunk.row(chunk.w_bar, i) + j;
                             put_sum(at, at, 1, 1, sums, K - j);
                           });
  product<kEither, 16, 128>(count, K, C, Side{chunk.values_bar, columns, 1}, Side{chunk.state, columns, 1}, chunk,
                            false, [&](int i, int j, const auto& sums) {
                              float* const at = chunk.row(chunk.w_bar, i) + j;
                              put_sum(at, at, 1, -1, sums, K - j);
                            });
}

// Back to the state before a chunk, with what conditioning on it left.
__device__ inline void restore_chunk(Conditioned& chunk, const PosteriorArgs<float>& args, int64_t b, int64_t first) {
  const int width = chunk.width, columns = chunk.columns;
  load_chunk(chunk, args, b, first);
  for (int n = threadIdx.x; n < chunk.count * width; n += kThreads) chunk.c[n] = chunk.all_c[first * width + n];
  for (int n = threadIdx.x; n < chunk.count * columns; n += kThreads)
    chunk.delta[n] = chunk.all_delta[first * columns + n];
  if (threadIdx.x < kChunk && int(threadIdx.x) < chunk.count) chunk.s[threadIdx.x] = chunk.all_s[first + threadIdx.x];
  __syncthreads();
  move_state(chunk, chunk.delta, -1);
  for (int n = threadIdx.x; n < chunk.count * columns; n += kThreads) chunk.delta[n] /= sqrtf(chunk.s[n / columns]);
  __syncthreads();
}

// The cotangent of the prior covariance loses nothing and gains sym(Wᵀ V̄).
__device__ inline void add_to_cov_bar(Conditioned& chunk) {
  add_outer(chunk.cov_bar, chunk.width, 0.5f, chunk.count, chunk.w, chunk.given);
  __syncthreads();
  add_outer(chunk.cov_bar, chunk.width, 0.5f, chunk.count, chunk.given, chunk.w);
  __syncthreads();
}

__device__ inline void store_cov_bar(const Conditioned& chunk, const PosteriorGrads<float>& told, int64_t b) {
  const int K = chunk.K, width = chunk.width;
  for (int64_t n = threadIdx.x; n < int64_t(K) * K; n += kThreads) {
    const int64_t i = n / K, j = n % K;
    *element(told.to_cov, b, i, j) = 0.5f * (chunk.cov_bar[i * width + j] + chunk.cov_bar[j * width + i]);
  }
}

}  // namespace
}  // namespace fastkm
