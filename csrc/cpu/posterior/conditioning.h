// Conditioning a memory on a chunk of patterns whose weights are known. An update and a write share it: a write finds
// weights and then conditions on them, so writing/ includes this file and no other of posterior/.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/linalg/cholesky.h"
#include "cpu/linalg/solve.h"
#include "cpu/linalg/symmetric.h"
#include "cpu/linalg/vectors.h"

namespace fastkm::FASTKM_LEVEL {

// Patterns conditioned on at once. Products shrink with the chunk, passes over the state grow with the episode's
// number of chunks; small chunks also round less.
constexpr int64_t kChunk = 16;
static_assert(kChunk <= kBlock);

// A memory being computed, in working memory.
template <class Real>
struct MemoryRows {
  Matrix<Real> mean;  // R [K, C]
  Matrix<Real> cov;   // U [K, K], both triangles
};

// Bring a memory in, and say whether its covariance can be one.
template <class Real>
Status load_memory(const MemoryRows<Real>& memory, const PosteriorArgs<Real>& args, int64_t b) {
  load_matrix(memory.mean, args.mean, b);
  load_matrix(memory.cov, args.cov, b);
  return symmetry(memory.cov);
}

// Bring a chunk of patterns in, with zeros where the mask hides one: a hidden pattern may hold anything, even NaN.
template <class Real>
void load_patterns(const Matrix<Real>& to, const Batch<const Real>& from, const PosteriorArgs<Real>& args, int64_t b,
                   int64_t first) {
  load_matrix(to, from.from_row(first), b);
  for (int64_t t = 0; t < to.rows; ++t)
    if (!args.unmasked(b, first + t)) __builtin_memset(to.row(t), 0, static_cast<size_t>(to.columns) * sizeof(Real));
}

// The same, only to be read: where nothing is hidden, the caller's own rows.
template <class Real>
Matrix<Real> view_or_copy_patterns(const Batch<const Real>& from, const PosteriorArgs<Real>& args, int64_t b,
                                   int64_t first, const Matrix<Real>& work) {
  if (!args.mask.data) return view_or_copy(from.from_row(first), b, work);
  load_patterns(work, from, args, b, first);
  return work;
}

// One chunk of patterns against the memory before it, whitened by L, the factor of S = W U Wᵀ + diag(σ²).
template <class Real>
struct WhitenedRows {
  Matrix<Real> gain;                  // G = L⁻¹ W U [t, K]
  Matrix<Real> values;                // E = L⁻¹ (Z − W R) [t, C]
  Real noise[kChunk], pivot[kChunk];  // σ² and L_tt² [t]
  bool good = true;                   // S is what a positive definite U gives

  int64_t count() const { return gain.rows; }
};

template <class Real>
WhitenedRows<Real> allocate_whitened_rows(const PosteriorArgs<Real>& args, int64_t count, Arena& arena) {
  return {.gain = allocate_matrix<Real>(arena, count, args.K), .values = allocate_cleared<Real>(arena, count, args.C)};
}

// How far below σ² rounding may bring a variance in a chunk of `count` patterns.
template <class Real>
Real rounding_slack(int64_t K, int64_t count, Real variance) {
  return 4 * static_cast<Real>(K + count) * std::numeric_limits<Real>::epsilon() * std::abs(variance);
}

// From W U Wᵀ in the lower triangle of `factor` to L; tells σ² and L_tt², and whether U can be positive definite.
template <class Real, size_t MOST>
bool factor_variances(const Factor<Real>& factor, const PosteriorArgs<Real>& args, int64_t b, int64_t first,
                      Real (&noise)[MOST], Real (&pivot)[MOST], Arena& arena) {
  const int64_t count = factor.size();
  Real slack[MOST];
  for (int64_t t = 0; t < count; ++t) {
    noise[t] = *args.noise_var.at(b, first + t);
    Real& variance = factor.lower.row(t)[t];
    variance += noise[t];
    slack[t] = rounding_slack(args.K, count, variance);
  }
  const bool good = cholesky(factor, arena, PivotFloors<Real>{noise, slack});
  for (int64_t t = 0; t < count; ++t) pivot[t] = factor.lower.row(t)[t] * factor.lower.row(t)[t];
  return good;
}

// E = L⁻¹ (Z − W R); a chunk has one block. Long sums are summed part by part, out of registers.
template <class Real>
void whiten_values(const WhitenedRows<Real>& chunk, const Factor<Real>& factor, const Matrix<Real>& mean,
                   const Matrix<Real>& weights, const Matrix<Real>& values, Arena& arena,
                   Prefetch* prefetch = nullptr) {
  if (mean.rows <= kSumRun)
    return solve_lower(chunk.values, factor, values, mean.rows, operand(weights), mean, prefetch);
  const bool consume = values.padded && mean.padded;
  const Matrix<Real> innovations = consume ? values : allocate_cleared<Real>(arena, values.rows, values.columns);
  product<Into::kSubtract>(innovations, values, mean.rows, operand(weights), mean, prefetch);
  solve_lower(chunk.values, factor, innovations, 0, {}, mean);
}

template <class Real>
WhitenedRows<Real> whiten_rows(const MemoryRows<Real>& memory, const Matrix<Real>& weights, const Matrix<Real>& values,
                               const PosteriorArgs<Real>& args, int64_t b, int64_t first, Arena& arena,
                               Prefetch* prefetch = nullptr) {
  const int64_t K = args.K, count = weights.rows;
  WhitenedRows<Real> chunk = allocate_whitened_rows(args, count, arena);
  const Matrix<Real> projected = allocate_cleared<Real>(arena, count, K),
                     weights_transposed = allocate_matrix<Real>(arena, K, count);
  const Factor<Real> factor = allocate_factor<Real>(arena, count);
  transpose(weights_transposed, weights);
  product<Into::kSet>(projected, K, operand(weights), memory.cov, prefetch);
  product_lower<Into::kSet>(factor.lower, K, operand(projected), weights_transposed);
  chunk.good = factor_variances(factor, args, b, first, chunk.noise, chunk.pivot, arena);
  solve_lower(chunk.gain, factor, projected, 0, {}, projected);
  whiten_values(chunk, factor, memory.mean, weights, values, arena, prefetch);
  return chunk;
}

// R' = R + Gᵀ E, U' = U − Gᵀ G; `after` may be `before`.
template <class Real>
void update_memory(const MemoryRows<Real>& before, const WhitenedRows<Real>& chunk, const MemoryRows<Real>& after,
                   Prefetch* prefetch) {
  product<Into::kAdd>(after.mean, before.mean, chunk.count(), transposed(chunk.gain), chunk.values, prefetch);
  product_lower<Into::kSubtract>(after.cov, before.cov, chunk.count(), transposed(chunk.gain), chunk.gain);
  mirror(after.cov);
}

// Condition on one chunk of patterns, from `first` on, and write what is known of each:
// KL_t = ½ [C (ln(s/σ²) − β) + β ‖E_t‖²] with β = 1 − σ²/s, and of ln p of the values −½ [C ln(2πs) + ‖E_t‖²].
template <class Real>
Status condition(const MemoryRows<Real>& before, const WhitenedRows<Real>& chunk, const MemoryRows<Real>& after,
                 const PosteriorArgs<Real>& args, int64_t b, int64_t first, double& log_evidence,
                 Prefetch* prefetch = nullptr) {
  constexpr Real kTwoPi = Real(6.283185307179586476925286766559);
  update_memory(before, chunk, after, prefetch);
  Real energies[kChunk];
  squared_norms(chunk.values, energies);
  const Real C = static_cast<Real>(args.C);
  Real level = 0, level_of = 0;  // ln(2πσ²), often the same for all
  for (int64_t t = 0; t < chunk.count(); ++t) {
    const bool unmasked = args.unmasked(b, first + t);
    const Real noise = chunk.noise[t], pivot = chunk.pivot[t], s = unmasked && pivot > noise ? pivot : noise;
    const Real energy = energies[t], growth = std::log(s / noise), beta = 1 - noise / s;
    if (noise != level_of) level = std::log(kTwoPi * noise), level_of = noise;
    *args.innovation_var.at(b, first + t) = s;
    *args.kl.at(b, first + t) = Real(0.5) * (C * (growth - beta) + beta * energy);
    if (unmasked) log_evidence -= Real(0.5) * (C * (growth + level) + energy);
  }
  return chunk.good ? kGood : kNotPositiveDefinite;
}

template <class Real>
void store_memory(const MemoryRows<Real>& memory, const PosteriorArgs<Real>& args, int64_t b) {
  store_matrix(args.new_mean, b, memory.mean);
  store_matrix(args.new_cov, b, memory.cov);
}

}  // namespace fastkm::FASTKM_LEVEL
