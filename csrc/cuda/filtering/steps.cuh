// Steps of a sequence: how they are cut into chunks, how a chunk decays, and its rows in the buffers of a thread block.
//
// A segment is 16 steps from a multiple of 16 on. Without forgetting it is one chunk. With forgetting, what a chunk
// subtracts from the covariance is up to Π 1/γ times what is left, and rounds at its own size; a segment is then cut
// into several chunks. A chunk always has 16 rows: those past its end hold zeros and do not decay.
#pragma once

#include "cuda/posterior/chunk.cuh"

namespace fastkm {
namespace {

constexpr float kMostGrowth = 1.5f;  // Π 1/γ that a chunk may have, beyond its first step

// A chunk of steps of one memory, of which a thread block computes `own` columns from `column0` on. It lies in shared
// memory. Buffers of 2 · 16 rows hold what belongs to weights above what belongs to queries.
struct FilterChunk : ThreadBlock {
  int K, width, column0, own, columns, C;  // width and columns are K and `own` in whole vectors
  bool retains, forgets, read_before;
  int64_t first;
  int count;  // steps
  int now;    // the status of this chunk alone

  float* cov;        // U before the chunk [width, width]
  float* mean;       // R [K, columns]
  float* inputs;     // W~ above Q~ [32, width]
  float* plain;      // W above Q, with retention [32, width]
  float* projected;  // V above X [32, width]
  float* gain;       // e V + diag(D_t·) W, then G [16, width]
  float* residual;   // Z~ − W~ R, then E, above Q~ R, then O~ [32, columns]

  float squares[2 * kChunk][kChunk];                                      // S − diag(σ²) above H
  float drift[kChunk][kChunk];                                            // D, zero above its diagonal
  float inverse[kChunk][kChunk];                                          // L⁻¹, zero above its diagonal
  float read_gain[kChunk][kChunk];                                        // P
  float noise[kChunk], slack[kChunk], explained[kChunk], pivots[kChunk];  // pivots: s
  float factor[kChunk];                                                   // α or γ; 1 without decay
  float scale[kChunk];                                                    // a
  float value_scale[kChunk];                                              // a with forgetting, else 1
  float relaxed[kChunk];                                                  // (1 − a²) u, the diagonal of D
  float norms[kChunk];                                                    // ‖q‖², with retention
  float variance[kChunk];                                                 // v, which rounding may leave below zero
  int held[kChunk];                                                       // float32 holds the variance of the step
  bool written[kChunk];                                                   // the row is a pattern that is written

  // Room for a square above another, where products stage their slices: the next product overwrites it.
  using Square = float[kChunk];
  __device__ Square* work() { return reinterpret_cast<Square*>(stage); }

  float prior_var, end, end_relaxed, growth;  // u, e, (1 − e²) u, a_t² with forgetting
};

// The sizes of a chunk that has columns [column0, column0 + own).
__host__ __device__ inline void set_sizes(FilterChunk& chunk, const FilteringArgs<float>& args, int64_t column0,
                                          int64_t own) {
  chunk.K = static_cast<int>(args.posterior.K);
  chunk.width = round_up(chunk.K, 4);
  chunk.C = static_cast<int>(args.posterior.C);
  chunk.column0 = static_cast<int>(column0);
  chunk.own = static_cast<int>(own);
  chunk.columns = round_up(chunk.own, 4);
  chunk.retains = args.retention.data;
  chunk.forgets = args.forgetting.data;
  chunk.read_before = args.read_before;
}

__device__ inline float decay_factor(const FilteringArgs<float>& args, int64_t b, int64_t t) {
  const Batch<const float>& factors = args.retention.data ? args.retention : args.forgetting;
  return factors.data && is_unmasked(args.posterior, b, t) ? *element(factors, b, t) : 1;
}

// How many steps from `first` on make a chunk: at least one. Every thread finds it.
__device__ inline int chunk_size(const FilteringArgs<float>& args, int64_t b, int64_t first) {
  const int most = static_cast<int>(min(kChunk - first % kChunk, args.posterior.T - first));
  float left = 1;
  for (int t = 0; args.forgetting.data && t < most; ++t) {
    left *= decay_factor(args, b, first + t);
    if (t > 0 && left * kMostGrowth < 1) return t;
  }
  return most;
}

// (F4) and (F6). Nothing is divided, and no difference cancels: 1 − a_i² is the sum of Π_{s<p≤i} α_p² (1 − α_s²) over
// s ≤ i. Products are taken in double: an error of a scales the noise of its step.
__device__ FASTKM_OUT_OF_LINE inline void load_decay(FilterChunk& chunk, const FilteringArgs<float>& args, int64_t b) {
  const int t = threadIdx.x;
  if (t < kChunk) {
    const bool inside = t < chunk.count;
    chunk.written[t] = inside && is_unmasked(args.posterior, b, chunk.first + t);
    chunk.noise[t] = inside ? *element(args.posterior.noise_var, b, chunk.first + t) : 1;
    chunk.factor[t] = inside ? decay_factor(args, b, chunk.first + t) : 1;
  }
  if (threadIdx.x == 0) chunk.prior_var = *element(args.prior_var, b);
  __syncthreads();
  if (t < kChunk) {
    double left = 1, lost = 0;
    for (int s = 0; s <= t; ++s) {
      const double factor = chunk.factor[s];
      left *= factor;
      lost = factor * factor * lost + (1 - factor) * (1 + factor);
    }
    chunk.scale[t] = chunk.forgets ? 1 / sqrtf(static_cast<float>(left)) : static_cast<float>(left);
    chunk.value_scale[t] = chunk.forgets ? chunk.scale[t] : 1;
    chunk.relaxed[t] = chunk.retains ? static_cast<float>(lost * chunk.prior_var) : 0;
    if (t == kChunk - 1) {
      chunk.end = chunk.retains ? chunk.scale[t] : 1;
      chunk.end_relaxed = chunk.relaxed[t];
      chunk.growth = chunk.forgets ? static_cast<float>(1 / left) : 1;
    }
  }
  __syncthreads();
  const int i = threadIdx.x / kChunk, j = threadIdx.x % kChunk;
  static_assert(kThreads == kChunk * kChunk, "a thread an entry");
  float kept = j <= i ? chunk.relaxed[j] : 0;
  for (int s = j + 1; s <= i; ++s) kept *= chunk.factor[s];
  chunk.drift[i][j] = kept;
}

// Bring in W~ above Q~ and, with retention, W above Q. Weights of a step that is not written count as zero: they may
// hold NaN.
__device__ FASTKM_OUT_OF_LINE inline void load_rows(FilterChunk& chunk, const FilteringArgs<float>& args, int64_t b) {
  const Codes weights = codes_of(args.posterior.weights, args.posterior.weights_type, b);
  const Codes queries = codes_of(args.queries, args.queries_type, b);
  const int across = chunk.width / 4;
  for (int n = threadIdx.x; n < 2 * kChunk * across; n += kThreads) {
    const int row = n / across, k = n % across * 4, t = row % kChunk;
    const bool query = row >= kChunk, exists = query ? t < chunk.count : chunk.written[t];
    Codes from = weights;
    if (query) from = queries;
    float4 x = from.load_four(chunk.first + t, k, from.inner, exists ? chunk.K - k : 0);
    if (chunk.retains) reinterpret_cast<float4*>(chunk.plain)[n] = x;
    const float a = chunk.scale[t];
    x = {a * x.x, a * x.y, a * x.z, a * x.w};
    reinterpret_cast<float4*>(chunk.inputs)[n] = x;
  }
}

// Begin a chunk at step `first`: its decay and its rows. The caller's threads agree on `first`.
__device__ inline void load_steps(FilterChunk& chunk, const FilteringArgs<float>& args, int64_t b, int64_t first,
                                  int count) {
  if (threadIdx.x == 0) {
    chunk.first = first;
    chunk.count = count;
  }
  __syncthreads();
  load_decay(chunk, args, b);
  load_rows(chunk, args, b);
  __syncthreads();
}

// Four columns of z~ of step t, zero where it is not written.
__device__ inline float4 load_values(const FilterChunk& chunk, const Codes& values, int t, int column) {
  const int room = chunk.written[t] ? chunk.own - column : 0;
  const float4 z = values.load_four(chunk.first + t, chunk.column0 + column, values.inner, room);
  const float a = chunk.value_scale[t];
  return {a * z.x, a * z.y, a * z.z, a * z.w};
}

}  // namespace
}  // namespace fastkm
