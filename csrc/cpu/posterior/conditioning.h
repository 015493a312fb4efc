// Conditioning a memory on a chunk of patterns with known weights. Patterns and the memory's mean are rows.
//
// With R [K, C] and U [K, K] the memory, and W [t, K], Z [t, C], σ² [t] the patterns:
//   (1)  S = W U Wᵀ + diag(σ²) = L Lᵀ
//   (2)  G = L⁻¹ W U,  E = L⁻¹ (Z − W R)
//   (3)  R' = R + Gᵀ E,  U' = U − Gᵀ G
//   (4)  s_t = L_tt² = e_t + σ_t²,  KL_t = ½ [C (ln(s_t/σ_t²) − β_t) + β_t ‖E_t‖²] with β_t = e_t/s_t
//   (5)  ln p(Z) = −½ Σ_t [C ln(2π s_t) + ‖E_t‖²].
// A chunk reads and writes the memory once, K (C + K) numbers, and costs about 4 t K C + 3 t K² operations. G, E and L
// stay in working memory.
//
// e_t = w_tᵀ U_{t−1} w_t is what the memory explains. It is found before σ_t² is added: L_tt² − σ_t² would lose the
// digits of a small step. Rounding can leave e_t below zero; it is then zero. Further below, or NaN, means that U is
// not positive definite: the status says so, and the results are finite but meaningless.
//
// After the pattern, the variance along w_t is e_t σ_t²/s_t. It is a sum of w_i w_j U_ij, whose rounding is of the size
// ε Σ w_i² U_ii. If less than kLeastDigits times that is left, the new covariance need not be positive definite, and
// the status says that it is lost.
//
// A chunk subtracts from the memory before it what the literal loop would subtract from the memory before each pattern,
// so it loses the digits that the patterns before have taken away. In float32 a memory is therefore computed again in
// double when an e or tr U falls too far below what the chunk began with.
//
// An update and a write share this file: a write finds weights and then conditions on them. So does a removal, which is
// an update of −U: with −W U for W U, S is diag(σ²) − W U Wᵀ, R' is R − (L⁻¹ W U)ᵀ E, and U grows.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/linalg/cholesky.h"
#include "cpu/linalg/in_double.h"
#include "cpu/linalg/solve.h"
#include "cpu/linalg/symmetric.h"
#include "cpu/linalg/variance_divergence.h"
#include "cpu/linalg/vectors.h"

namespace fastkm::FASTKM_LEVEL {

// Patterns of a chunk. Every chunk passes over the memory once, so small chunks are slow if the memory does not fit the
// cache; large chunks round more.
constexpr int64_t kChunk = 16, kLargestChunk = 256;
static_assert(kChunk <= kBlock, "the factor of a small chunk has one diagonal block");

// Patterns are conditioned on, or taken out as if they had never been.
enum class Direction { kIn, kOut };

template <class Real>
int64_t chunk_size(int64_t K, int64_t C) {
  constexpr int64_t kMegabyte = 1 << 20;
  const int64_t bytes = K * (K + C) * static_cast<int64_t>(sizeof(Real));
  return bytes < kMegabyte ? kChunk : bytes < 8 * kMegabyte ? 64 : bytes < 16 * kMegabyte ? 128 : kLargestChunk;
}

// A memory in working memory, or views of the caller's rows.
template <class Real>
struct MemoryRows {
  Matrix<Real> mean;  // R [K, C]
  Matrix<Real> cov;   // U [K, K], both triangles
};

// Copy a memory in, and check its covariance.
template <class Real>
Status load_memory(const MemoryRows<Real>& memory, const PosteriorArgs<Real>& args, int64_t b) {
  load_matrix(memory.mean, args.mean, b);
  load_matrix(memory.cov, args.cov, b);
  return symmetry(memory.cov);
}

template <class Real>
void store_memory(const MemoryRows<Real>& memory, const PosteriorArgs<Real>& args, int64_t b) {
  store_matrix(args.new_mean, b, memory.mean);
  store_matrix(args.new_cov, b, memory.cov);
}

// A write has no evidence.
template <class Real>
void store_log_evidence(const PosteriorArgs<Real>& args, int64_t b, double log_evidence) {
  if (args.log_evidence) args.log_evidence[b] = static_cast<Real>(log_evidence);
}

// The noise variances of consecutive patterns, and which of them are not masked.
template <class Real>
struct Observations {
  const Real* noise_var;  // σ²
  const bool* unmasked;

  Observations from(int64_t t) const { return {noise_var + t, unmasked + t}; }
};

template <class Real>
Observations<Real> load_observations(const PosteriorArgs<Real>& args, int64_t b, int64_t first, int64_t count,
                                     Arena& arena) {
  Real* noise_var = arena.allocate<Real>(count);
  bool* unmasked = arena.allocate<bool>(count);
  for (int64_t t = 0; t < count; ++t) {
    noise_var[t] = *args.noise_var.at(b, first + t);
    unmasked[t] = args.unmasked(b, first + t);
  }
  return {noise_var, unmasked};
}

// Copy a chunk of patterns in. Masked ones become zero, because they may hold anything, even NaN.
template <class Real>
void load_patterns(const Matrix<Real>& to, const Batch<const Real>& from, int64_t b, const bool* unmasked) {
  load_matrix(to, from, b);
  for (int64_t t = 0; t < to.rows; ++t)
    if (!unmasked[t]) __builtin_memset(to.row(t), 0, static_cast<size_t>(to.columns) * sizeof(Real));
}

// The same for patterns that are only read: without a mask, a view of the caller's rows if products run well on them.
template <class Real>
Matrix<Real> view_or_copy_patterns(const Batch<const Real>& from, int64_t b, const bool* unmasked, bool masks,
                                   const Matrix<Real>& work) {
  if (!masks) return view_or_copy(from, b, work);
  load_patterns(work, from, b, unmasked);
  return work;
}

// One chunk of patterns, whitened by L against the memory before it.
template <class Real>
struct WhitenedRows {
  Matrix<Real> gain;              // G [t, K]
  Matrix<Real> values;            // E [t, C]
  Observations<Real> observed;    // [t]
  Real pivot[kLargestChunk];      // L_tt² [t]; σ² where masked
  Real explained[kLargestChunk];  // e [t]; 0 where masked
  Status status = kGood;          // of U before the chunk and after it

  int64_t count() const { return gain.rows; }
};

template <class Real>
WhitenedRows<Real> allocate_whitened_rows(int64_t K, int64_t C, int64_t count, const Observations<Real>& observed,
                                          Arena& arena) {
  return {.gain = allocate_matrix<Real>(arena, count, K),
          .values = allocate_cleared<Real>(arena, count, C),
          .observed = observed};
}

// How far below zero rounding by `eps` may bring e, in a chunk of `count` patterns; `variance` is that of w U wᵀ + σ².
template <class Real>
Real rounding_slack(int64_t K, int64_t count, Real variance, Real eps = std::numeric_limits<Real>::epsilon()) {
  return 4 * static_cast<Real>(K + count) * eps * std::abs(variance);
}

// (1) from W U Wᵀ, which is in the lower triangle of `factor`, and e. `MOST` is the room of `pivot`. Returns whether U
// can be positive definite.
template <class Real, size_t MOST>
bool factor_variances(const Factor<Real>& factor, Real (&pivot)[MOST], Real (&explained)[MOST], int64_t K,
                      const Real* noise_var, Arena& arena, Real eps = std::numeric_limits<Real>::epsilon()) {
  const int64_t count = factor.size();
  Real slack[MOST];
  for (int64_t t = 0; t < count; ++t) slack[t] = rounding_slack(K, count, factor.lower.row(t)[t] + noise_var[t], eps);
  const bool good = cholesky(factor, arena, AddedDiagonal<Real>{noise_var, slack, explained});
  for (int64_t t = 0; t < count; ++t) pivot[t] = explained[t] + noise_var[t];
  return good;
}

// The diagonal of a covariance, with zeros up to a whole vector register.
template <class Real>
Real* copy_diagonal(const Operand<Real>& cov, int64_t K, Arena& arena) {
  Real* diagonal = allocate_zero<Real>(arena, 1, K).data;
  for (int64_t k = 0; k < K; ++k) diagonal[k] = cov.data[k * (cov.row + cov.column)];
  return diagonal;
}

// The status of a chunk whose e are known, and whose gain has `taken` from tr U; `positive` says whether U can be
// positive definite. `cov` is that before the chunk. A whitened chunk is one of rows or of columns.
template <class Real, class Whitened>
Status chunk_status(bool positive, const Whitened& chunk, Real taken, const Observations<Real>& observed,
                    const Operand<Real>& cov, const Matrix<Real>& weights, const Limits<Real>& limits, Arena& arena) {
  if (!positive) return kNotPositiveDefinite;
  const int64_t K = weights.columns;
  const Real* diagonal = copy_diagonal(cov, K, arena);
  Real trace = 0;
  for (int64_t k = 0; k < K; ++k) trace += diagonal[k];
  bool holds = true, inexact = trace > (trace - taken) * limits.chunk_variance;
  for (int64_t t = 0; t < weights.rows; ++t) {
    const Real explained = chunk.explained[t], scale = weighted_norm(K, weights.row(t), diagonal);
    holds &= explained * (observed.noise_var[t] / chunk.pivot[t]) * limits.variance >= scale;
    inexact |= scale > explained * limits.chunk_variance;
  }
  // A single pattern is conditioned on as the literal loop does.
  if (inexact && weights.rows > 1 && limits.exist()) return kInexactCovariance;
  return holds ? kGood : kLost;
}

// (1) of a removal, from −W U Wᵀ in the lower triangle of `factor`. What the other patterns and this one leave of its
// σ², 1/(S⁻¹)_tt, must be positive. It is a difference from σ² of a sum, whose rounding is ε Σ w_i² U_ii; and what was
// written into a memory rounded as the wider memory before it did, which is σ² (S⁻¹)_tt times as wide. Of either,
// kLeastDigitsLeft times the rounding must be left. `diagonal` is that of U.
constexpr int kLeastDigitsLeft = 256;
template <class Real, size_t MOST>
Status factor_removal(const Factor<Real>& factor, Real (&pivot)[MOST], Real (&explained)[MOST],
                      const Matrix<Real>& weights, const Real* noise_var, const Real* diagonal,
                      const Limits<Real>& limits, Arena& arena) {
  const int64_t count = factor.size();
  const Real rounding = kLeastDigitsLeft * limits.eps;
  const Matrix<Real> inverse = allocate_matrix<Real>(arena, count, count);
  for (int64_t t = 0; t < count; ++t) factor.lower.row(t)[t] += noise_var[t];
  const bool positive = cholesky(factor, arena);
  invert_lower(factor, inverse, arena);
  bool inexact = false, told = true, definite = true;
  for (int64_t t = 0; t < count; ++t) {
    const Real entry = factor.lower.row(t)[t], noise = noise_var[t];
    const Real size = noise + weighted_norm(weights.columns, weights.row(t), diagonal);
    Real inverse_variance = 0;
    for (int64_t i = t; i < count; ++i) inverse_variance += inverse.row(i)[t] * inverse.row(i)[t];
    pivot[t] = entry * entry;
    explained[t] = pivot[t] - noise;
    definite &= explained[t] <= rounding_slack(weights.columns, count, size, limits.eps);
    told &=
        rounding * size * inverse_variance <= 1 && rounding * noise * noise * inverse_variance * inverse_variance <= 1;
    inexact |= size * inverse_variance > limits.removal;
  }
  if (!positive) return kNotWritten;
  if (!definite) return kNotPositiveDefinite;
  return !told ? kUntold : inexact && limits.exist() ? kInexactCovariance : kGood;
}

// (1) and G of (2), from `projected`, which is W U or, of a removal, −W U.
template <Direction DIRECTION, class Real>
void whiten_gain(WhitenedRows<Real>& chunk, const Factor<Real>& factor, const Matrix<Real>& projected,
                 const Matrix<Real>& weights, const Matrix<Real>& cov, const Limits<Real>& limits, Arena& arena) {
  const int64_t K = cov.rows;
  const Matrix<Real> weights_transposed = allocate_matrix<Real>(arena, K, weights.rows);
  const Observations<Real>& observed = chunk.observed;
  transpose(weights_transposed, weights);
  product_lower<Into::kSet>(factor.lower, K, operand(projected), weights_transposed);
  if constexpr (DIRECTION == Direction::kOut) {
    const Real* diagonal = copy_diagonal(operand(cov), K, arena);
    chunk.status =
        factor_removal(factor, chunk.pivot, chunk.explained, weights, observed.noise_var, diagonal, limits, arena);
    solve_lower(chunk.gain, factor, projected, 0, {}, projected);
  } else {
    const bool positive =
        factor_variances(factor, chunk.pivot, chunk.explained, K, observed.noise_var, arena, limits.eps);
    solve_lower(chunk.gain, factor, projected, 0, {}, projected);
    const Real taken = static_cast<Real>(inner_product(chunk.gain, chunk.gain));
    chunk.status = chunk_status(positive, chunk, taken, observed, operand(cov), weights, limits, arena);
  }
}

// E of (2). A long product W R is summed from parts, which does not fit into the registers of the solve.
template <class Real>
void whiten_values(const WhitenedRows<Real>& chunk, const Factor<Real>& factor, const Matrix<Real>& mean,
                   const Matrix<Real>& weights, const Matrix<Real>& values, Arena& arena,
                   Prefetch* prefetch = nullptr) {
  if (mean.rows <= kSumRun)
    return solve_lower(chunk.values, factor, values, mean.rows, operand(weights), mean, prefetch);
  const bool in_place = values.padded && mean.padded;
  const Matrix<Real> innovations = in_place ? values : allocate_cleared<Real>(arena, values.rows, values.columns);
  product<Into::kSubtract>(innovations, values, mean.rows, operand(weights), mean, prefetch);
  solve_lower(chunk.values, factor, innovations, 0, {}, mean);
}

// (1) and (2). `values` may be overwritten if they are padded.
template <Direction DIRECTION = Direction::kIn, class Real>
WhitenedRows<Real> whiten_rows(const MemoryRows<Real>& memory, const Matrix<Real>& weights, const Matrix<Real>& values,
                               const Observations<Real>& observed, const Limits<Real>& limits, Arena& arena,
                               Prefetch* prefetch = nullptr) {
  const int64_t K = memory.cov.rows, count = weights.rows;
  WhitenedRows<Real> chunk = allocate_whitened_rows(K, values.columns, count, observed, arena);
  const Matrix<Real> projected = allocate_cleared<Real>(arena, count, K);
  const Factor<Real> factor = allocate_factor<Real>(arena, count);
  product<Into::kSet>(projected, K, operand(weights), memory.cov, prefetch);
  if constexpr (DIRECTION == Direction::kOut) scale(projected, Real(-1));
  whiten_gain<DIRECTION>(chunk, factor, projected, weights, memory.cov, limits, arena);
  whiten_values(chunk, factor, memory.mean, weights, values, arena, prefetch);
  return chunk;
}

// (3). `after` may be `before`.
template <Direction DIRECTION = Direction::kIn, class Real>
void update_memory(const MemoryRows<Real>& after, const MemoryRows<Real>& before, const WhitenedRows<Real>& chunk,
                   Prefetch* prefetch = nullptr) {
  product<Into::kAdd>(after.mean, before.mean, chunk.count(), transposed(chunk.gain), chunk.values, prefetch);
  constexpr Into OF_COV = DIRECTION == Direction::kOut ? Into::kAdd : Into::kSubtract;
  product_lower<OF_COV>(after.cov, before.cov, chunk.count(), transposed(chunk.gain), chunk.gain);
  mirror(after.cov);
}

// (4) to the caller's memory, for patterns from `first` on, and (5) added to `log_evidence` unless that is null.
// `energies` are the ‖E_t‖².
template <class Real>
void store_reports(const PosteriorArgs<Real>& args, int64_t b, int64_t first, const WhitenedRows<Real>& chunk,
                   const Real* energies, double* log_evidence) {
  constexpr Real kTwoPi = Real(6.283185307179586476925286766559);
  const Real C = static_cast<Real>(args.C);
  Real log_noise = 0, log_noise_of = 0;  // ln(2πσ²) of the last σ²; patterns often share one
  for (int64_t t = 0; t < chunk.count(); ++t) {
    const Real noise = chunk.observed.noise_var[t], s = chunk.pivot[t], beta = chunk.explained[t] / s;
    const Real energy = energies[t], divergence = variance_divergence(noise / s, -beta);
    *args.innovation_var.at(b, first + t) = s;
    *args.kl.at(b, first + t) = Real(0.5) * (C * divergence + beta * energy);
    if (!log_evidence || !chunk.observed.unmasked[t]) continue;
    if (noise != log_noise_of) {
      log_noise = std::log(kTwoPi * noise);
      log_noise_of = noise;
    }
    *log_evidence -= Real(0.5) * (C * (divergence + beta + log_noise) + energy);
  }
}

template <class Real>
void store_reports(const PosteriorArgs<Real>& args, int64_t b, int64_t first, const WhitenedRows<Real>& chunk,
                   double* log_evidence) {
  Real energies[kLargestChunk];
  squared_norms(chunk.values, energies);
  store_reports(args, b, first, chunk, energies, log_evidence);
}

}  // namespace fastkm::FASTKM_LEVEL
