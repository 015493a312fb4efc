// Replacement of patterns by as many others: an update and a removal as one change of the memory.
//
// Bound: the memory is read once and written once for a chunk of pairs. Algorithm: the rows of W and Z are the new
// patterns above the old ones. W U and Z − W R are taken for all of them at once. With G₁ and E₁ of the new ones by
// conditioning.h, the old ones are whitened against the memory that the new ones leave, without making it:
//   V₂ = −(W₂ U − (W₂ G₁ᵀ) G₁),  X₂ = Z₂ − W₂ R − (W₂ G₁ᵀ) E₁,  S₂ = diag(σ₂²) + V₂ W₂ᵀ = L₂ L₂ᵀ
//   G₂ = L₂⁻¹ V₂,  E₂ = L₂⁻¹ X₂,  R' = R + G₁ᵀ E₁ + G₂ᵀ E₂,  U' = U − G₁ᵀ G₁ + G₂ᵀ G₂.
// Promised and refused: what an update and a removal promise and refuse.
#pragma once

#include "cpu/removal/remove.h"

namespace fastkm::FASTKM_LEVEL {

// A chunk of pairs: new patterns in the upper half of the rows, old ones in the lower half.
template <class Real>
struct PairRows {
  Matrix<Real> weights;  // W [2 t, K]
  Matrix<Real> values;   // Z [2 t, C]
  Observations<Real> observed, old_observed;

  int64_t count() const { return weights.rows / 2; }
};

template <class Real>
PairRows<Real> load_pairs(const ReplacingArgs<Real>& args, int64_t b, int64_t first, int64_t count, Arena& arena) {
  const PosteriorArgs<Real>& fresh = args.posterior;
  PosteriorArgs<Real> old = fresh;
  old.noise_var = args.old_noise_var;
  const PairRows<Real> pairs{
      allocate_matrix<Real>(arena, 2 * count, fresh.K), allocate_matrix<Real>(arena, 2 * count, fresh.C),
      load_observations(fresh, b, first, count, arena), load_observations(old, b, first, count, arena)};
  const bool* unmasked = pairs.observed.unmasked;
  load_patterns(pairs.weights.rows_from(0, count), fresh.weights.from_row(first), b, unmasked);
  load_patterns(pairs.values.rows_from(0, count), fresh.values.from_row(first), b, unmasked);
  load_patterns(pairs.weights.rows_from(count, count), args.old_weights.from_row(first), b, unmasked);
  load_patterns(pairs.values.rows_from(count, count), args.old_values.from_row(first), b, unmasked);
  return pairs;
}

// Both halves of a chunk, whitened. The rows of each matrix are those of the update above those of the removal.
template <class Real>
struct WhitenedPairs {
  Matrix<Real> gain;    // G₁ above G₂ [2 t, K]
  Matrix<Real> values;  // E₁ above E₂ [2 t, C]
  Status status = kGood;
};

template <class Real>
WhitenedPairs<Real> whiten_pairs(const MemoryRows<Real>& memory, const PairRows<Real>& pairs,
                                 const Limits<Real>& limits, Arena& arena) {
  const int64_t K = memory.cov.rows, C = memory.mean.columns, count = pairs.count();
  WhitenedPairs<Real> both{allocate_matrix<Real>(arena, 2 * count, K), allocate_cleared<Real>(arena, 2 * count, C)};
  const Matrix<Real> projected = allocate_cleared<Real>(arena, 2 * count, K);
  const Matrix<Real> innovations = allocate_cleared<Real>(arena, 2 * count, C);
  product<Into::kSet>(projected, K, operand(pairs.weights), memory.cov);
  product<Into::kSubtract>(innovations, pairs.values, K, operand(pairs.weights), memory.mean);
  const Factor<Real> factor = allocate_factor<Real>(arena, count);
  const auto half = [=](const Matrix<Real>& of, bool old) { return of.rows_from(old ? count : 0, count); };
  const auto whiten = [&]<Direction DIRECTION>(const Observations<Real>& observed) {
    const bool old = DIRECTION == Direction::kOut;
    WhitenedRows<Real> chunk{.gain = half(both.gain, old), .values = half(both.values, old), .observed = observed};
    whiten_gain<DIRECTION>(chunk, factor, half(projected, old), half(pairs.weights, old), memory.cov, limits, arena);
    solve_lower(chunk.values, factor, half(innovations, old), 0, {}, memory.mean);
    if (both.status == kGood) both.status = chunk.status;
  };
  whiten.template operator()<Direction::kIn>(pairs.observed);

  // What the new patterns change of the old ones' W U and Z − W R.
  const Matrix<Real> crossed = allocate_matrix<Real>(arena, count, count), gain = half(both.gain, false);
  product<Into::kSet>(crossed, K, operand(half(pairs.weights, true)), transposed_copy(gain, arena));
  product<Into::kSubtract>(half(projected, true), count, operand(crossed), gain);
  product<Into::kSubtract>(half(innovations, true), count, operand(crossed), half(both.values, false));
  scale(half(projected, true), Real(-1));
  whiten.template operator()<Direction::kOut>(pairs.old_observed);
  return both;
}

template <class Real>
void exchange_pairs(const MemoryRows<Real>& after, const MemoryRows<Real>& before, const WhitenedPairs<Real>& both,
                    Arena& arena) {
  const int64_t rows = both.gain.rows;
  const Matrix<Real> signed_gain = allocate_matrix<Real>(arena, rows, both.gain.columns);
  copy_rows(signed_gain, both.gain);
  scale(signed_gain.rows_from(rows / 2, rows / 2), Real(-1));
  product<Into::kAdd>(after.mean, before.mean, rows, transposed(both.gain), both.values);
  product_lower<Into::kSubtract>(after.cov, before.cov, rows, transposed(both.gain), signed_gain);
  mirror(after.cov);
}

// Memory `b`. One that is to be computed again is left half way.
template <class Real>
Status replace_one(const ReplacingArgs<Real>& args, int64_t b, const Limits<Real>& limits) {
  const PosteriorArgs<Real>& fresh = args.posterior;
  const int64_t K = fresh.K, C = fresh.C, T = fresh.T;
  const int64_t size = smaller(chunk_size<Real>(K, C), limits.chunk);
  Arena& arena = Arena::fresh();
  const MemoryRows<Real> work{allocate_cleared<Real>(arena, K, C), allocate_cleared<Real>(arena, K, K)};
  const MemoryRows<Real> result{view_or_work(fresh.new_mean, b, work.mean), view_or_work(fresh.new_cov, b, work.cov)};
  MemoryRows<Real> memory{view_or_copy(fresh.mean, b, work.mean), view_or_copy(fresh.cov, b, work.cov)};
  Status status = symmetry(memory.cov);
  const Arena::Mark chunk_start = arena.mark();
  for (int64_t first = 0; first < T; first += size) {
    arena.release(chunk_start);
    const int64_t count = smaller(size, T - first);
    const PairRows<Real> pairs = load_pairs(args, b, first, count, arena);
    const WhitenedPairs<Real> both = whiten_pairs(memory, pairs, limits, arena);
    if (status == kGood) status = both.status;
    if (limits.again(status)) return status;
    const MemoryRows<Real>& after = first + count < T ? work : result;
    exchange_pairs(after, memory, both, arena);
    memory = after;
  }
  store_memory(memory, fresh, b);
  return status;
}

template <class Real>
void replace_patterns(const ReplacingArgs<Real>& args, int64_t begin, int64_t end) {
  const Limits<Real> limits = limits_of<Real>(args.posterior.K, args.posterior.C);
  for (int64_t b = begin; b < end; ++b) {
    const Status status = replace_one(args, b, limits);
    args.posterior.info[b] = status;
    if constexpr (kHasDouble<Real>) {
      if (!limits.again(status)) continue;
      Doubles doubles(b);
      const int64_t K = args.posterior.K, C = args.posterior.C, T = args.posterior.T;
      const ReplacingArgs<double> wide{.posterior = in_double(args.posterior, doubles),
                                       .old_weights = doubles.argument(args.old_weights, T, K),
                                       .old_values = doubles.argument(args.old_values, T, C),
                                       .old_noise_var = doubles.argument(args.old_noise_var, T, 1)};
      const auto replace = [&](const Limits<double>& least) { return replace_one(wide, 0, least); };
      put_out(args.posterior, b, wide.posterior, compute_in_double(replace), doubles);
    }
  }
}

}  // namespace fastkm::FASTKM_LEVEL
