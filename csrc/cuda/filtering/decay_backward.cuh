// What the decay of a filter's chunk receives in its backward: equations (F16) and (F17) of docs/math/filtering.md.
//
// Every cotangent of ln a comes here, from the scaled rows, from D, and from the memory after the chunk; those of the
// factors of decay are sums over the steps after them. Steps past the end of a chunk do not decay, so that what belongs
// to its last step may be given to the last row.
#pragma once

#include "cuda/filtering/chunk_backward.cuh"

namespace fastkm {
namespace {

// ⟨x, y⟩ of `count` numbers; every thread gets it.
__device__ inline double inner_product(const float* x, const float* y, int64_t count, ThreadBlock& thread_block) {
  double sum = 0;
  for (int64_t n = threadIdx.x; n < count; n += kThreads) sum += x[n] * y[n];
  return block_sum(sum, thread_block);
}

// With forgetting: the cotangent of U' becomes that of U − Gᵀ G. Then −2 G Ū' in the place of Ḡ, and 2 ⟨Ū', U'⟩, what
// the scaling gives to ln a of the last step.
__device__ inline void begin_decay(FilterBackward& chunk) {
  const int64_t square = int64_t(chunk.width) * chunk.width;
  if (chunk.forgets) scale_numbers(chunk.grad_cov, square, chunk.growth);
  gain_through_cov(chunk);
  if (threadIdx.x < kChunk) chunk.to_scale[threadIdx.x] = 0;
  if (!chunk.forgets) return;
  double sum = 2 * inner_product(chunk.grad_cov, chunk.cov, square, chunk);
  sum += inner_product(chunk.to_gain, chunk.gain, kChunk * chunk.width, chunk);
  if (threadIdx.x == 0) chunk.at_end = static_cast<float>(sum);
}

// What forgetting's scaling of values, reads and energies gives to ln a. A warp computes a step. −Z̄ and Ō are known.
__device__ inline void back_through_values_scale(FilterBackward& chunk, const FilteringArgs<float>& args, int64_t b) {
  const Codes values = codes_of(args.posterior.values, args.posterior.values_type, b);
  for (int t = threadIdx.x / 32; t < kChunk; t += kWarps) {
    const int row = t * chunk.columns, read = (kChunk + t) * chunk.columns;
    float sum = 0;
    for (int c = threadIdx.x % 32 * 4; c < chunk.columns; c += 128) {
      const float4 z = load_values(chunk, values, t, c), grad = four_at(chunk.to_values, row + c);
      sum -= grad.x * z.x + grad.y * z.y + grad.z * z.z + grad.w * z.w;
    }
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    sum -= dot_by_warp(chunk.to_values + read, chunk.residual + read, chunk.columns);
    sum += chunk.to_evidence[t] * squared_norm_by_warp(chunk.residual + row, chunk.columns);
    if (threadIdx.x % 32 == 0) chunk.to_scale[t] = t == kChunk - 1 ? sum + chunk.at_end : sum;
  }
}

// What reaches ln a of the last step, and u, from the memory that retention relaxes. Before R̄' and Ū' change.
__device__ inline void back_through_relaxation(FilterBackward& chunk) {
  const int width = chunk.width;
  double trace = 0;
  for (int k = threadIdx.x; k < chunk.K; k += kThreads) trace += chunk.grad_cov[int64_t(k) * (width + 1)];
  trace = block_sum(trace, chunk);
  double of_mean = inner_product(chunk.grad_mean, chunk.mean, int64_t(chunk.K) * chunk.columns, chunk);
  of_mean += inner_product(chunk.to_gain, chunk.projected, kChunk * width, chunk);
  const double of_cov = inner_product(chunk.grad_cov, chunk.cov, int64_t(width) * width, chunk);
  if (threadIdx.x != 0) return;
  const double e = chunk.end, u = chunk.prior_var;
  chunk.to_scale[kChunk - 1] = static_cast<float>(e * (of_mean + 2 * e * (of_cov - u * trace)));
  chunk.to_prior_var += trace * chunk.end_relaxed / u;
}

// Cotangents of W~ and Q~ become those of diag(a) W and diag(a) Q. A warp computes a step.
__device__ inline void back_through_inputs_scale(FilterBackward& chunk) {
  const int width = chunk.width;
  for (int t = threadIdx.x / 32; t < kChunk; t += kWarps) {
    float sum = 0;
    for (int half = 0; half < 2; ++half) {
      const int row = (half * kChunk + t) * width;
      sum += dot_by_warp(chunk.to_inputs + row, chunk.inputs + row, width);
      for (int k = threadIdx.x % 32; k < width; k += 32) chunk.to_inputs[row + k] *= chunk.scale[t];
    }
    if (threadIdx.x % 32 == 0) chunk.to_scale[t] += sum;
  }
  __syncthreads();
}

// (F16) and the terms in D of (F17), for ln a and u. Leaves D̄ in `inner`, and in `work` what W and Q receive through
// D: 2 S̄∘D, both triangles, above H̄∘D.
__device__ inline void back_through_drift(FilterBackward& chunk) {
  const int i = threadIdx.x / kChunk, j = threadIdx.x % kChunk, width = chunk.width;
  const auto work = chunk.work();
  inner_products(work, chunk.plain, 2 * kChunk, chunk.plain, width);
  __syncthreads();
  const float square = chunk.to_squares[i][j], read = chunk.to_squares[kChunk + i][j];
  float to_drift = 0;
  if (j <= i) to_drift = (i == j ? 1 : 2) * square * work[i][j] + read * work[kChunk + i][j];
  chunk.inner[i][j] = to_drift;
  __syncthreads();
  work[i][j] = 2 * square * (j <= i ? chunk.drift[i][j] : chunk.drift[j][i]);
  work[kChunk + i][j] = read * chunk.drift[i][j];
  for (int t = threadIdx.x / 32; t < kChunk; t += kWarps) {
    const float of_end = dot_by_warp(chunk.to_gain + t * width, chunk.plain + t * width, width);
    if (threadIdx.x % 32 == 0) chunk.inner[kChunk - 1][t] += of_end;
  }
  __syncthreads();
  const int t = threadIdx.x;
  if (t < kChunk) {
    const float u = chunk.prior_var, of_norm = chunk.to_variance[t] * chunk.norms[t];
    float sum = -2 * of_norm * chunk.scale[t] * chunk.scale[t] * u;
    for (int s = 0; s < kChunk; ++s) {
      sum += chunk.inner[t][s] * chunk.drift[t][s];
      sum -= chunk.inner[s][t] * (chunk.drift[s][t] + 2 * u * chunk.scale[s] * chunk.scale[t]);
    }
    chunk.to_scale[t] += sum;
  }
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int s = 0; s < kChunk; ++s) {
      for (int p = 0; p <= s; ++p) sum += chunk.inner[s][p] * chunk.drift[s][p];
      sum += chunk.to_variance[s] * chunk.norms[s] * chunk.relaxed[s];
    }
    chunk.to_prior_var += sum / chunk.prior_var;
  }
}

// What W and Q receive through D, from `work`.
__device__ inline void add_drift_rows(FilterBackward& chunk) {
  const int width = chunk.width, rows = kChunk * width;
  const auto work = chunk.work();
  combine_rows<true>(work, 2 * kChunk, chunk.plain, kChunk, width, [&](int t, int at, float4 sum) {
    float4& to = four_at(chunk.to_inputs, at);
    to = sum_of(to, sum_of(sum, scaled(chunk.drift[kChunk - 1][t], four_at(chunk.to_gain, at))));
  });
  combine_rows<false>(work + kChunk, kChunk, chunk.plain, kChunk, width, [&](int t, int at, float4 sum) {
    float4& to = four_at(chunk.to_inputs, rows + at);
    const float of_norm = 2 * chunk.to_variance[t] * chunk.relaxed[t];
    to = sum_of(to, sum_of(sum, scaled(of_norm, four_at(chunk.plain, rows + at))));
  });
  __syncthreads();
}

// Σ_{i ≥ t} of the cotangents of ln a, times what ln a has of each factor; 0 for steps that are masked.
__device__ inline void store_decay_cotangents(const FilterBackward& chunk, const Batch<float>& to, int64_t b) {
  const int t = threadIdx.x;
  if (t >= chunk.count) return;
  float sum = 0;
  for (int i = kChunk - 1; i >= t; --i) sum += chunk.to_scale[i];
  const float exponent = chunk.forgets ? -0.5f : 1;
  *element(to, b, chunk.first + t) = chunk.written[t] ? exponent * sum / chunk.factor[t] : 0;
}

}  // namespace
}  // namespace fastkm
