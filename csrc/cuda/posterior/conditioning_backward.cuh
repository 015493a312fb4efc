// The backward of conditioning, shared by the backward of an update and of a write.
//
// One thread block computes one memory. The memory before each chunk is not stored. A first pass conditions on the
// weights and leaves c, s and Δ of every pattern in the workspace. A second pass goes back from the last state: it
// takes each chunk's terms out of the state again and then pulls the cotangents through the chunk.
//
// A bar marks a cotangent and a prime what belongs to the state after the chunk. With S = V Wᵀ + diag(σ²) = L Lᵀ,
// V = W U, G = L⁻¹ V and E = L⁻¹ (Z − W R):
//   (1)  V̄ = L⁻ᵀ (E R̄'ᵀ − 2 G Ū')       Z̄ = L⁻ᵀ (G R̄' + 2 diag(ē) E)
//   (2)  L̄ = −tril(V̄ Gᵀ + Z̄ Eᵀ)      S̄ = L⁻ᵀ (Φ(Lᵀ L̄) + diag(L_tt² p̄_t)) L⁻¹, symmetric
//   (3)  V̄ += S̄ W     W̄ += S̄ V − Z̄ Rᵀ + V̄ U
//   (4)  R̄ = R̄' − Wᵀ Z̄     Ū = Ū' + sym(Wᵀ V̄)
// ē_t and p̄_t are the cotangents of ‖E_t‖² and of w_tᵀUw_t = s_t − σ_t², from those of the pattern's s, KL and
// log-likelihood. σ_t² enters S_tt and leaves that difference again, so that S̄_tt − p̄_t reaches it; at a small step
// this is far less than p̄_t, which is therefore left out of the sum S̄_tt.
#pragma once

#include "cuda/linalg/reduce.cuh"
#include "cuda/linalg/symmetric.cuh"
#include "cuda/posterior/conditioning.cuh"

namespace fastkm {
namespace {

struct ConditioningBackward : Chunk {
  float* grad_w;                           // W̄ [kChunk, width]
  float *grad_projected, *gain;            // V̄ and G [kChunk, width]
  float* grad_cov;                         // [width, width]
  float *whitened, *grad_values;           // E and Z̄ [kChunk, columns]
  float* own_mean;                         // R [K, columns], a copy that moves back chunk by chunk
  float* own_grad_mean;                    // R̄ [K, columns] while it fits on chip; otherwise null
  Operand grad_mean;                       // R̄: own_grad_mean, or the caller's result
  float *saved_c, *saved_delta, *saved_s;  // of every pattern, from the first pass
  float* saved_explained;

  float grad_noise[kChunk], grad_explained[kChunk], grad_energy[kChunk];
  float square[4][kChunk][kChunk];  // S̄, Φ(Lᵀ L̄), then V̄ Gᵀ and later S̄ L, Z̄ Eᵀ

  // L of S = V Wᵀ + diag(σ²).
  __device__ float factor_at(int t, int j) const { return j > t ? 0 : sqrtf(s[j]) * (j == t ? 1 : c_dot_w[t][j]); }
  __device__ float* grad_mean_at(int i, int j) const { return const_cast<float*>(grad_mean.at(i, j)); }
};

// Buffers that are used a few times a chunk. Allocate them last.
__host__ __device__ inline void allocate_passes(ConditioningBackward& chunk, Arena& arena,
                                                const PosteriorArgs<float>& args) {
  const int64_t mean = int64_t(chunk.K) * chunk.columns;
  chunk.own_mean = arena.allocate(mean);
  chunk.own_grad_mean = arena.fits(mean) ? arena.allocate(mean) : nullptr;
  chunk.saved_s = arena.allocate(args.T);
  chunk.saved_explained = arena.allocate(args.T);
  chunk.saved_c = arena.allocate(args.T * chunk.width);
  chunk.saved_delta = arena.allocate(args.T * chunk.columns);
}

// Adds `factor` times a product to R̄.
struct AddToGradMean {
  const ConditioningBackward& chunk;
  float factor;

  template <int N>
  __device__ void operator()(int i, int j, const float (&values)[N]) const {
    float* const at = chunk.grad_mean_at(i, j);
    store_sum(at, at, 1, factor, values, chunk.C - j);
  }
};

// Load the prior, and the cotangents of the posterior into the places of the prior's.
__device__ inline void load_memory(ConditioningBackward& chunk, const PosteriorArgs<float>& args,
                                   const PosteriorGrads<float>& grads, int64_t b) {
  const int K = chunk.K, C = chunk.C, width = chunk.width, columns = chunk.columns;
  if (threadIdx.x == 0) {
    chunk.status = kGood;
    chunk.mean = {chunk.own_mean, columns, 1};
    float* const own = chunk.own_grad_mean;
    chunk.grad_mean = own ? Operand{own, columns, 1} : Operand{element(grads.to_mean, b), C, 1};
  }
  __syncthreads();
  load_rows(chunk.cov, K, K, width, width, operand_of(args.cov, b));
  load_rows(chunk.own_mean, K, C, K, columns, operand_of(args.mean, b));
  for (int n = threadIdx.x; n < K * C; n += kThreads)
    *chunk.grad_mean_at(n / C, n % C) = grads.mean.data ? *element(grads.mean, b, n / C, n % C) : 0;
  if (!grads.cov.data) {
    fill_zero(chunk.grad_cov, int64_t(width) * width);
    __syncthreads();
    return;
  }
  load_rows(chunk.grad_cov, K, K, width, width, operand_of(grads.cov, b));
  __syncthreads();
  symmetrise(chunk.grad_cov, K, width);
}

__device__ inline void store_cotangents(const ConditioningBackward& chunk, const PosteriorGrads<float>& grads,
                                        int64_t b) {
  if (chunk.own_grad_mean) store_rows(grads.to_mean, b, chunk.K, chunk.C, chunk.own_grad_mean, chunk.columns);
  store_symmetrised(grads.to_cov, b, chunk.grad_cov, chunk.K, chunk.width);
}

// R ← R + factor · Cᵀ Δ and U ← U − factor · Cᵀ diag(s) C. Leaves G in `gain`.
__device__ void move_memory(ConditioningBackward& chunk, const float* delta, float factor) {
  scale_to_gain(chunk, chunk.gain);
  product<kAnyCores, 64, 64>(AddRows{chunk.own_mean, chunk.columns, chunk.C, factor}, {chunk.K, chunk.C, chunk.count},
                             Operand{chunk.c, 1, chunk.width}, Operand{delta, 1, chunk.columns}, chunk);
  add_outer(chunk.cov, chunk.width, -factor, chunk.count, chunk.gain, chunk.gain);
  __syncthreads();
}

__device__ void load_chunk(ConditioningBackward& chunk, const PosteriorArgs<float>& args, int64_t b, int64_t first) {
  load_patterns(chunk, args, b, first);
  const Codes weights = codes_of(args.weights, args.weights_type, b);
  const int across = chunk.width / 4;
  for (int n = threadIdx.x; n < chunk.count * across; n += kThreads) {
    const int t = n / across, k = n % across * 4;
    const int room = chunk.unmasked[t] ? chunk.K - k : 0;
    reinterpret_cast<float4*>(chunk.w)[n] = weights.load_four(first + t, k, weights.inner, room);
  }
  __syncthreads();
}

// The first pass.
template <Direction kDirection = Direction::kIn>
__device__ void condition_all(ConditioningBackward& chunk, const PosteriorArgs<float>& args, int64_t b) {
  for (int64_t first = 0; first < args.T; first += kChunk) {
    load_chunk(chunk, args, b, first);
    condition<kDirection>(chunk);
    whiten(chunk);
    for (int n = threadIdx.x; n < chunk.count * chunk.width; n += kThreads)
      chunk.saved_c[first * chunk.width + n] = chunk.c[n];
    for (int n = threadIdx.x; n < chunk.count * chunk.columns; n += kThreads)
      chunk.saved_delta[first * chunk.columns + n] = chunk.values[n];
    if (threadIdx.x < chunk.count) {
      chunk.saved_s[first + threadIdx.x] = chunk.s[threadIdx.x];
      chunk.saved_explained[first + threadIdx.x] = chunk.explained[threadIdx.x];
    }
    move_memory(chunk, chunk.values, 1);
  }
}

// Go back to the state before a chunk. Brings back its patterns, W, C, s, G and E.
__device__ inline void restore_chunk(ConditioningBackward& chunk, const PosteriorArgs<float>& args, int64_t b,
                                     int64_t first) {
  const int width = chunk.width, columns = chunk.columns;
  load_chunk(chunk, args, b, first);
  for (int n = threadIdx.x; n < chunk.count * width; n += kThreads) chunk.c[n] = chunk.saved_c[first * width + n];
  for (int n = threadIdx.x; n < chunk.count * columns; n += kThreads)
    chunk.whitened[n] = chunk.saved_delta[first * columns + n];
  if (threadIdx.x < kChunk && int(threadIdx.x) < chunk.count) {
    chunk.s[threadIdx.x] = chunk.saved_s[first + threadIdx.x];
    chunk.explained[threadIdx.x] = chunk.saved_explained[first + threadIdx.x];
  }
  __syncthreads();
  move_memory(chunk, chunk.whitened, -1);
  for (int n = threadIdx.x; n < chunk.count * columns; n += kThreads) chunk.whitened[n] /= sqrtf(chunk.s[n / columns]);
  __syncthreads();
}

// Rows ← L⁻ᵀ (rows + 2 diag(ē) extra), where `extra` may be null. A thread computes whole columns. No barrier.
__device__ inline void solve_transposed(const ConditioningBackward& chunk, float* rows, int ld, int size,
                                        const float* extra) {
  for (int k = threadIdx.x; k < size; k += kThreads) {
    float column[kChunk];
#pragma unroll
    for (int t = kChunk - 1; t >= 0; --t) {
      column[t] = 0;
      if (t >= chunk.count) continue;
      float sum = rows[t * ld + k];
      if (extra) sum += 2 * chunk.grad_energy[t] * extra[t * ld + k];
      sum /= sqrtf(chunk.s[t]);
#pragma unroll
      for (int i = t + 1; i < kChunk; ++i)
        if (i < chunk.count) sum -= chunk.c_dot_w[i][t] * column[i];
      rows[t * ld + k] = column[t] = sum;
    }
  }
}

__device__ inline float load_or_zero(const Batch<const float>& from, int64_t b, int64_t t) {
  return from.data ? *element(from, b, t) : 0;
}

// p̄_t, ē_t and the part of σ̄² that does not come through S. A warp computes a pattern.
__device__ void pattern_cotangents(ConditioningBackward& chunk, const PosteriorGrads<float>& grads, int64_t b,
                                   int64_t first) {
  for (int t = threadIdx.x / 32; t < chunk.count; t += kWarps) {
    const float energy = squared_norm_by_warp(chunk.whitened + t * chunk.columns, chunk.C);
    if (threadIdx.x % 32 != 0) continue;
    const float grad_s = load_or_zero(grads.innovation_var, b, first + t);
    const float grad_kl = load_or_zero(grads.kl, b, first + t);
    const float grad_evidence = load_or_zero(grads.log_evidence, b, 0);
    const float noise = chunk.noise[t], s = chunk.s[t], explained = chunk.explained[t];
    const float C = static_cast<float>(chunk.C), beta = explained / s;
    chunk.grad_explained[t] = chunk.grad_energy[t] = 0;
    chunk.grad_noise[t] = grad_s;
    if (!chunk.unmasked[t]) continue;
    const float of_s = grad_s - 0.5f * grad_evidence * C / s, of_kl = 0.5f * grad_kl / s;
    if (explained > 0) chunk.grad_explained[t] = of_s + of_kl * (C * beta + energy * (noise / s));
    chunk.grad_energy[t] = 0.5f * (grad_kl * beta - grad_evidence);
    chunk.grad_noise[t] = of_s - of_kl * beta * (C * (explained / noise) + energy);
  }
  __syncthreads();
}

// (2): reads V̄ Gᵀ and Z̄ Eᵀ, leaves S̄ in square[0] and S̄ L in square[2], and adds S̄_tt without the term p̄_t of its sum
// to the cotangents of σ².
__device__ void factor_backward(ConditioningBackward& chunk) {
  float (&grad)[kChunk][kChunk] = chunk.square[0], (&halved)[kChunk][kChunk] = chunk.square[1];
  float (&grad_by_factor)[kChunk][kChunk] = chunk.square[2];
  const int i = threadIdx.x / kChunk, j = threadIdx.x % kChunk, count = chunk.count;
  static_assert(kThreads == kChunk * kChunk, "a thread an entry");
  const bool inside = i < count && j < count;
  const float entry = inside && j <= i ? -(chunk.square[2][j][i] + chunk.square[3][j][i]) : 0;
  __syncthreads();
  grad[i][j] = entry;
  __syncthreads();
  if (j <= i) {
    float sum = 0;
    for (int k = i; k < count; ++k) sum += chunk.factor_at(k, i) * grad[k][j];
    halved[i][j] = halved[j][i] = 0.5f * sum;
  }
  __syncthreads();
  // Solve for the columns first, then for the rows of the result. On the diagonal, `rest` is the entry without p̄_t.
  float rest = 0;
  for (int pass = 0; pass < 2; ++pass) {
    const bool rows = pass;
    if (threadIdx.x < count)
      for (int t = count - 1; t >= 0; --t) {
        const bool on_diagonal = t == int(threadIdx.x);
        float& at = rows ? halved[threadIdx.x][t] : halved[t][threadIdx.x];
        float sum = rows && on_diagonal ? rest : at;
        for (int k = t + 1; k < count; ++k)
          sum -= chunk.factor_at(k, t) * (rows ? halved[threadIdx.x][k] : halved[k][threadIdx.x]);
        sum /= chunk.factor_at(t, t);
        if (on_diagonal) {
          rest = sum;
          sum += (rows ? 1 : chunk.factor_at(t, t)) * chunk.grad_explained[t];
        }
        at = sum;
      }
    __syncthreads();
  }
  if (threadIdx.x < count) chunk.grad_noise[threadIdx.x] += rest;
  grad[i][j] = inside ? 0.5f * (halved[i][j] + halved[j][i]) : 0;
  __syncthreads();
  float sum = 0;
  for (int t = j; t < count; ++t) sum += grad[i][t] * chunk.factor_at(t, j);
  grad_by_factor[i][j] = sum;
  __syncthreads();
}

// (1): cotangents of V and Z, through the state and the whitening, and the products that (2) needs.
__device__ void whitening_backward(ConditioningBackward& chunk) {
  const Operand mean = chunk.grad_mean;
  const int K = chunk.K, C = chunk.C, width = chunk.width, columns = chunk.columns, count = chunk.count;
  const Operand whitened{chunk.whitened, columns, 1}, gain{chunk.gain, width, 1};
  product<kAnyCores, 16, 128>(StoreRows{chunk.grad_projected, width, K}, {count, K, C}, whitened, mean, chunk);
  product<kCudaCores, 16, 128>(AddRows{chunk.grad_projected, width, K, -2}, {count, K, K}, gain,
                               Operand{chunk.grad_cov, width, 1}, chunk);
  product<kAnyCores, 16, 128>(StoreRows{chunk.grad_values, columns, C}, {count, C, K}, gain, transposed(mean), chunk);
  solve_transposed(chunk, chunk.grad_projected, width, K, nullptr);
  solve_transposed(chunk, chunk.grad_values, columns, C, chunk.whitened);
  __syncthreads();
  for (int t = 0; t < count; ++t) {
    dot_rows(chunk.square[2][t], chunk.grad_projected, width, count, width, chunk.row(chunk.gain, t));
    dot_rows(chunk.square[3][t], chunk.grad_values, columns, count, columns, chunk.whitened + t * columns);
  }
  __syncthreads();
}

// (1) to (3). Leaves W̄, V̄ and Z̄; `grad_weights` is the caller's cotangent of W, or null.
__device__ void condition_backward(ConditioningBackward& chunk, const PosteriorGrads<float>& grads,
                                   const Batch<const float>& grad_weights, int64_t b, int64_t first) {
  const int K = chunk.K, C = chunk.C, width = chunk.width, columns = chunk.columns, count = chunk.count;
  pattern_cotangents(chunk, grads, b, first);
  whitening_backward(chunk);
  factor_backward(chunk);
  for (int n = threadIdx.x; n < count * width; n += kThreads) {
    const int t = n / width, k = n % width;
    float grad_projected = chunk.grad_projected[n];
    float grad_w = k < K && grad_weights.data ? *element(grad_weights, b, first + t, k) : 0;
    for (int j = 0; j < count; ++j) {
      grad_projected += chunk.square[0][t][j] * chunk.w[j * width + k];
      grad_w += chunk.square[2][t][j] * chunk.gain[j * width + k];
    }
    chunk.grad_projected[n] = grad_projected;
    chunk.grad_w[n] = grad_w;
  }
  __syncthreads();
  product<kCudaCores, 16, 128>(AddRows{chunk.grad_w, width, K, 1}, {count, K, K},
                               Operand{chunk.grad_projected, width, 1}, Operand{chunk.cov, width, 1}, chunk);
  product<kAnyCores, 16, 128>(AddRows{chunk.grad_w, width, K, -1}, {count, K, C},
                              Operand{chunk.grad_values, columns, 1}, Operand{chunk.own_mean, columns, 1}, chunk);
}

// Ū of (4).
__device__ inline void add_to_grad_cov(ConditioningBackward& chunk) {
  add_outer(chunk.grad_cov, chunk.width, 0.5f, chunk.count, chunk.w, chunk.grad_projected);
  __syncthreads();
  add_outer(chunk.grad_cov, chunk.width, 0.5f, chunk.count, chunk.grad_projected, chunk.w);
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
