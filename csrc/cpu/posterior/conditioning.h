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
template <class T>
struct Memory {
  Matrix<T> mean;  // R [K, C]
  Matrix<T> cov;   // U [K, K], both triangles
};

// Bring a memory in, and say whether its covariance can be one.
template <class T>
Status load_memory(const Memory<T>& memory, const PosteriorArgs<T>& args, int64_t b) {
  load_matrix(memory.mean, args.mean, b);
  load_matrix(memory.cov, args.cov, b);
  return symmetry(memory.cov);
}

// Bring a chunk of patterns in, with zeros where the mask hides one: a hidden pattern may hold anything, even NaN.
template <class T>
void load_patterns(const Matrix<T>& to, const Batch<const T>& from, const PosteriorArgs<T>& args, int64_t b,
                   int64_t first) {
  load_matrix(to, from.from_row(first), b);
  for (int64_t t = 0; t < to.rows; ++t)
    if (!args.seen(b, first + t)) __builtin_memset(to.row(t), 0, static_cast<size_t>(to.columns) * sizeof(T));
}

// The same, only to be read: where nothing is hidden, the caller's own rows.
template <class T>
Matrix<T> patterns_of(const Batch<const T>& from, const PosteriorArgs<T>& args, int64_t b, int64_t first,
                      const Matrix<T>& work) {
  if (!args.mask.data) return rows_of(from.from_row(first), b, work);
  load_patterns(work, from, args, b, first);
  return work;
}

// One chunk of patterns against the memory before it, whitened by L, the factor of S = W U Wᵀ + diag(σ²).
template <class T>
struct Chunk {
  Matrix<T> gain;                  // G = L⁻¹ W U [t, K]
  Matrix<T> values;                // E = L⁻¹ (Z − W R) [t, C]
  T noise[kChunk], pivot[kChunk];  // σ² and L_tt² [t]
  bool good = true;                // S is what a positive definite U gives

  int64_t count() const { return gain.rows; }
};

template <class T>
Chunk<T> take_chunk(const PosteriorArgs<T>& args, int64_t count, Arena& arena) {
  return {.gain = take_matrix<T>(arena, count, args.K), .values = take_cleared<T>(arena, count, args.C)};
}

// How far below σ² rounding may bring a variance in a chunk of `count` patterns.
template <class T>
T slack_of(int64_t K, int64_t count, T variance) {
  return 4 * static_cast<T>(K + count) * std::numeric_limits<T>::epsilon() * std::abs(variance);
}

// From W U Wᵀ in the lower triangle of `factor` to L; tells σ² and L_tt², and whether U can be positive definite.
template <class T, size_t MOST>
bool factor_variances(const Factor<T>& factor, const PosteriorArgs<T>& args, int64_t b, int64_t first, T (&noise)[MOST],
                      T (&pivot)[MOST], Arena& arena) {
  const int64_t count = factor.size();
  T slack[MOST];
  for (int64_t t = 0; t < count; ++t) {
    noise[t] = *args.noise_var.at(b, first + t);
    T& variance = factor.lower.row(t)[t];
    variance += noise[t];
    slack[t] = slack_of(args.K, count, variance);
  }
  const bool good = cholesky(factor, arena, Floors<T>{noise, slack});
  for (int64_t t = 0; t < count; ++t) pivot[t] = factor.lower.row(t)[t] * factor.lower.row(t)[t];
  return good;
}

// E = L⁻¹ (Z − W R); a chunk has one block. Long sums are summed part by part, out of registers.
template <class T>
void whiten_values(const Chunk<T>& chunk, const Factor<T>& factor, const Matrix<T>& mean, const Matrix<T>& weights,
                   const Matrix<T>& values, Arena& arena, Upcoming* upcoming = nullptr) {
  if (mean.rows <= kSumRun) return solve(chunk.values, factor, values, mean.rows, left(weights), mean, upcoming);
  const bool consume = values.padded && mean.padded;
  const Matrix<T> innovations = consume ? values : take_cleared<T>(arena, values.rows, values.columns);
  product<Into::kSubtract>(innovations, values, mean.rows, left(weights), mean, upcoming);
  solve(chunk.values, factor, innovations, 0, {}, mean);
}

template <class T>
Chunk<T> whiten(const Memory<T>& memory, const Matrix<T>& weights, const Matrix<T>& values,
                const PosteriorArgs<T>& args, int64_t b, int64_t first, Arena& arena, Upcoming* upcoming = nullptr) {
  const int64_t K = args.K, count = weights.rows;
  Chunk<T> chunk = take_chunk(args, count, arena);
  const Matrix<T> projected = take_cleared<T>(arena, count, K), weights_transposed = take_matrix<T>(arena, K, count);
  const Factor<T> factor = take_factor<T>(arena, count);
  transpose(weights_transposed, weights);
  product<Into::kSet>(projected, K, left(weights), memory.cov, upcoming);
  product_lower<Into::kSet>(factor.lower, K, left(projected), weights_transposed);
  chunk.good = factor_variances(factor, args, b, first, chunk.noise, chunk.pivot, arena);
  solve(chunk.gain, factor, projected, 0, {}, projected);
  whiten_values(chunk, factor, memory.mean, weights, values, arena, upcoming);
  return chunk;
}

// R' = R + Gᵀ E, U' = U − Gᵀ G; `after` may be `before`.
template <class T>
void absorb(const Memory<T>& before, const Chunk<T>& chunk, const Memory<T>& after, Upcoming* upcoming) {
  product<Into::kAdd>(after.mean, before.mean, chunk.count(), transposed(chunk.gain), chunk.values, upcoming);
  product_lower<Into::kSubtract>(after.cov, before.cov, chunk.count(), transposed(chunk.gain), chunk.gain);
  mirror(after.cov);
}

// Condition on one chunk of patterns, from `first` on, and write what is known of each:
// KL_t = ½ [C (ln(s/σ²) − β) + β ‖E_t‖²] with β = 1 − σ²/s, and of ln p of the values −½ [C ln(2πs) + ‖E_t‖²].
template <class T>
Status condition(const Memory<T>& before, const Chunk<T>& chunk, const Memory<T>& after, const PosteriorArgs<T>& args,
                 int64_t b, int64_t first, double& log_evidence, Upcoming* upcoming = nullptr) {
  constexpr T kTwoPi = T(6.283185307179586476925286766559);
  absorb(before, chunk, after, upcoming);
  T energies[kChunk];
  squared_norms(chunk.values, energies);
  const T C = static_cast<T>(args.C);
  T level = 0, level_of = 0;  // ln(2πσ²), often the same for all
  for (int64_t t = 0; t < chunk.count(); ++t) {
    const bool seen = args.seen(b, first + t);
    const T noise = chunk.noise[t], pivot = chunk.pivot[t], s = seen && pivot > noise ? pivot : noise;
    const T energy = energies[t], growth = std::log(s / noise), beta = 1 - noise / s;
    if (noise != level_of) level = std::log(kTwoPi * noise), level_of = noise;
    *args.innovation_var.at(b, first + t) = s;
    *args.kl.at(b, first + t) = T(0.5) * (C * (growth - beta) + beta * energy);
    if (seen) log_evidence -= T(0.5) * (C * (growth + level) + energy);
  }
  return chunk.good ? kGood : kNotPositiveDefinite;
}

template <class T>
void store_memory(const Memory<T>& memory, const PosteriorArgs<T>& args, int64_t b) {
  store_matrix(args.new_mean, b, memory.mean);
  store_matrix(args.new_cov, b, memory.cov);
}

}  // namespace fastkm::FASTKM_LEVEL
