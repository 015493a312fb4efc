// One chunk of a filter: a few steps are written and read at once. Equations (F4) to (F9) of docs/math/filtering.md.
//
// With R [K, C] and U [K, K] the memory before the chunk, and W [t, K], Z [t, C], Q [t, K], σ² [t] its steps:
//   (1)  W~ = diag(a) W,  Q~ = diag(a) Q,  V = W~ U,  X = Q~ U
//   (2)  S = V W~ᵀ + D∘(W Wᵀ) + diag(σ²) = L Lᵀ,  H = X W~ᵀ + D∘(Q Wᵀ)
//   (3)  E = L⁻¹ (Z~ − W~ R),  G = L⁻¹ (e V + diag(D_t·) W),  P = tril(H L⁻ᵀ)
//   (4)  O~ = Q~ R + P E,  v = rowsum(X∘Q~ − P∘P) + (1 − a²) u ‖q‖²
//   (5)  R' = e R + Gᵀ E,  U' = e² U + (1 − e²) u I − Gᵀ G.
// With retention α, a is its product since the start of the chunk, e the last a, and D what relaxation has added. With
// forgetting γ, a is the product of 1/√γ, Z~ = diag(a) Z, O = O~ / a, U' = a_t² (U − Gᵀ G), e = 1, D = 0. Without
// decay a = e = 1, D = 0.
//
// D follows from row to row, D_ij = α_i D_(i−1)j and D_ii = α_i² D_(i−1)(i−1) + (1 − α_i²) u, so nothing is divided and
// nothing underflows that counts.
//
// A chunk costs about t (5 K² + 6 K C) + t² (3 K + 2 C) operations and passes over the memory once.
#pragma once

#include "cpu/posterior/conditioning.h"

namespace fastkm::FASTKM_LEVEL {

// Steps of a chunk. Smaller ones pass over the memory more often, larger ones do more work in S, H and P. A memory that
// does not fit the second-level cache, and the backward, which does more in each pass, have the larger ones.
constexpr int64_t kFilterChunk = 32, kSmallFilterChunk = 16;
static_assert(kFilterChunk <= kLargestChunk);

template <class Real>
int64_t forward_filter_chunk(int64_t K, int64_t C) {
  return chunk_size<Real>(K, C) > kChunk ? kFilterChunk : kSmallFilterChunk;
}

// With forgetting, S is up to a_t² times as large as what the factor leaves of it, and rounds at its own size. A chunk
// ends before that is more.
constexpr double kMostGrowth = 1.5;

// How many steps from `first` on make a chunk: at least one, at most `largest`.
template <class Real>
int64_t filter_chunk_size(const FilteringArgs<Real>& args, int64_t b, int64_t first, int64_t largest) {
  const int64_t most = smaller(largest, args.posterior.T - first);
  double left = 1;
  for (int64_t t = 0; args.forgetting.data && t < most; ++t) {
    left *= args.decay(args.forgetting, b, first + t);
    if (t > 0 && left * kMostGrowth < 1) return t;
  }
  return most;
}

// Prefetch the steps of the chunk that begins with `next`, and, if it `reads`, the rows of its reads, while the chunk
// before it of `count` steps is computed. Products with a memory that does not fit the cache are packed, and do not
// prefetch.
template <class Real>
Prefetch plan_steps_prefetch(const FilteringArgs<Real>& args, int64_t b, int64_t next, int64_t count, bool reads) {
  const PosteriorArgs<Real>& given = args.posterior;
  const int64_t K = given.K, C = given.C, most = smaller(count, given.T - next);
  const int64_t tiles = (count + FASTKM_TILE_ROWS - 1) / FASTKM_TILE_ROWS * (strips<Real>(K) + strips<Real>(C));
  Prefetch prefetch(reads ? 2 * tiles : tiles);
  if (chunk_size<Real>(K, C) > kChunk) return prefetch;
  prefetch.add(given.weights, b, next, most, K);
  prefetch.add(given.values, b, next, most, C);
  if (!reads) return prefetch;
  prefetch.add(args.queries, b, next, most, K);
  prefetch.add(args.read_values, b, next, most, C);
  return prefetch;
}

// The decay of a chunk. A masked step has none.
template <class Real>
struct ChunkDecay {
  bool retains, forgets;
  Real prior_var;              // u
  Real factor[kFilterChunk];   // α or γ; 1 without decay
  Real scale[kFilterChunk];    // a
  Real relaxed[kFilterChunk];  // (1 − a²) u, the diagonal of D
  Matrix<Real> drift;          // D [t, t], zero above its diagonal; with retention only
  Real end = 1;                // e
  Real growth = 1;             // a_t² with forgetting

  bool any() const { return retains || forgets; }
  const Real* drift_at_end() const { return drift.row(drift.rows - 1); }
};

// Products are taken in double: an error of a scales the noise of its step.
template <class Real>
ChunkDecay<Real> load_decay(const FilteringArgs<Real>& args, int64_t b, int64_t first, int64_t count, Arena& arena) {
  ChunkDecay<Real> decay{.retains = args.retention.data != nullptr, .forgets = args.forgetting.data != nullptr};
  decay.prior_var = *args.prior_var.at(b);
  if (!decay.any()) {
    for (int64_t t = 0; t < count; ++t) decay.factor[t] = decay.scale[t] = 1, decay.relaxed[t] = 0;
    return decay;
  }
  if (decay.retains) decay.drift = allocate_zero<Real>(arena, count, count);
  double left = 1, relaxed = 0;  // the product of the factors, and (1 − a²)
  for (int64_t t = 0; t < count; ++t) {
    const Real factor = decay.factor[t] = args.decay(decay.forgets ? args.forgetting : args.retention, b, first + t);
    left *= factor;
    decay.scale[t] = static_cast<Real>(decay.forgets ? 1 / std::sqrt(left) : left);
    relaxed = double(factor) * factor * relaxed + (1 - double(factor)) * (1 + double(factor));
    decay.relaxed[t] = decay.retains ? static_cast<Real>(relaxed * decay.prior_var) : 0;
    if (!decay.retains) continue;
    for (int64_t j = 0; j < t; ++j) decay.drift.row(t)[j] = factor * decay.drift.row(t - 1)[j];
    decay.drift.row(t)[t] = decay.relaxed[t];
  }
  (decay.forgets ? decay.growth : decay.end) = static_cast<Real>(decay.forgets ? 1 / left : left);
  return decay;
}

// The steps of a chunk. Masked ones have zeros for weights and values.
template <class Real>
struct Steps {
  Matrix<Real> weights, queries;                // W, Q [t, K]
  Matrix<Real> scaled_weights, scaled_queries;  // W~, Q~ [t, K]; W and Q themselves without decay
  Matrix<Real> values;                          // Z~ [t, C]
  Observations<Real> observed;                  // [t]
  ChunkDecay<Real> decay;

  int64_t count() const { return weights.rows; }
};

// to = diag(factors) from, padding included; `from` is padded.
template <class Real>
void scale_rows(const Matrix<Real>& to, const Matrix<Real>& from, const Real* factors) {
  const int64_t padded = round_up(from.columns, kLanes<Real>);
  for (int64_t i = 0; i < from.rows; ++i)
    for (int64_t j = 0; j < padded; j += kLanes<Real>) store<Real>(to.row(i) + j, factors[i] * load(from.row(i) + j));
}

// Bring steps [first, first + count) in: as copies, which are padded, or, unless a mask or decay changes them, as views
// of the caller's rows, if these are whole vector registers.
template <class Real>
Steps<Real> load_steps(const FilteringArgs<Real>& args, int64_t b, int64_t first, int64_t count, bool copies,
                       Arena& arena) {
  const PosteriorArgs<Real>& given = args.posterior;
  Steps<Real> steps{.observed = load_observations(given, b, first, count, arena),
                    .decay = load_decay(args, b, first, count, arena)};
  copies |= given.mask.data || steps.decay.any();
  const auto bring = [&](const Batch<const Real>& from, int64_t columns, const bool* unmasked) {
    const Matrix<Real> work = allocate_matrix<Real>(arena, count, columns);
    if (!copies && columns % kLanes<Real> == 0) return view_or_copy(from.from_row(first), b, work);
    load_matrix(work, from.from_row(first), b);
    for (int64_t t = 0; unmasked && t < count; ++t)
      if (!unmasked[t]) __builtin_memset(work.row(t), 0, static_cast<size_t>(columns) * sizeof(Real));
    return work;
  };
  const bool* unmasked = steps.observed.unmasked;
  steps.weights = steps.scaled_weights = bring(given.weights, given.K, unmasked);
  steps.queries = steps.scaled_queries = bring(args.queries, given.K, nullptr);
  steps.values = bring(given.values, given.C, unmasked);
  if (steps.decay.any()) {
    steps.scaled_weights = allocate_matrix<Real>(arena, count, given.K);
    steps.scaled_queries = allocate_matrix<Real>(arena, count, given.K);
    scale_rows(steps.scaled_weights, steps.weights, steps.decay.scale);
    scale_rows(steps.scaled_queries, steps.queries, steps.decay.scale);
  }
  if (steps.decay.forgets) scale_rows(steps.values, steps.values, steps.decay.scale);
  return steps;
}

// A chunk that is whitened against the memory before it.
template <class Real>
struct WhitenedSteps {
  WhitenedRows<Real> rows;  // G, E, L_tt², e
  Matrix<Real> projected;   // V [t, K]
  Factor<Real> factor;      // L
  Matrix<Real> inverse;     // L⁻¹ [t, t], zero above its diagonal
};

// The lower triangle of m += D∘(rows Wᵀ).
template <class Real>
void add_drift(const Matrix<Real>& m, const Matrix<Real>& drift, const Matrix<Real>& rows,
               const Matrix<Real>& weights_transposed, Arena& arena) {
  const Matrix<Real> product = allocate_zero<Real>(arena, m.rows, m.rows);
  product_lower<Into::kSet>(product, rows.columns, operand(rows), weights_transposed);
  const int64_t padded = round_up(m.rows, kLanes<Real>);
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < padded; j += kLanes<Real>)
      store<Real>(m.row(i) + j, load(m.row(i) + j) + load(drift.row(i) + j) * load(product.row(i) + j));
}

// Whether U can be positive definite, what follows can be held, and, with forgetting, nothing has left the range of
// the type. `lower` is the factor.
template <class Real>
Status steps_status(bool positive, const WhitenedRows<Real>& rows, const Matrix<Real>& cov, const Steps<Real>& steps,
                    Arena& arena) {
  bool holds = true, in_range = true;
  Real scales[kFilterChunk], norms[kFilterChunk] = {};
  weighted_norms(steps.scaled_weights, copy_diagonal(operand(cov), cov.rows, arena), scales);
  if (steps.decay.retains) squared_norms(steps.weights, norms);
  for (int64_t t = 0; t < rows.count(); ++t) {
    const Real scale = scales[t] + steps.decay.relaxed[t] * norms[t];
    in_range &= scale - scale == 0;
    const Real left = rows.explained[t] * (rows.observed.noise_var[t] / rows.pivot[t]);
    holds &= left >= kLeastDigits * std::numeric_limits<Real>::epsilon() * scale;
  }
  if (steps.decay.forgets && !in_range) return kOutOfRange;
  return !positive ? kNotPositiveDefinite : holds ? kGood : kLost;
}

// (1) to (3) without reads. Wᵀ [K, t] is made on the way, of the scaled weights and of the weights.
template <class Real>
struct TransposedWeights {
  Matrix<Real> scaled, plain;
};

template <class Real>
TransposedWeights<Real> transpose_weights(const Steps<Real>& steps, Arena& arena) {
  const Matrix<Real> scaled = transposed_copy(steps.scaled_weights, arena);
  return {scaled, steps.decay.retains ? transposed_copy(steps.weights, arena) : scaled};
}

template <class Real>
WhitenedSteps<Real> allocate_whitened_steps(int64_t K, int64_t C, int64_t count, const Observations<Real>& observed,
                                            Arena& arena) {
  return {.rows = allocate_whitened_rows(K, C, count, observed, arena),
          .projected = allocate_cleared<Real>(arena, count, K),
          .factor = allocate_factor<Real>(arena, count),
          .inverse = allocate_matrix<Real>(arena, count > kBlock ? count : 0, count)};
}

template <class Real>
void whiten_steps(WhitenedSteps<Real>& chunk, const MemoryRows<Real>& memory, const Steps<Real>& steps,
                  const TransposedWeights<Real>& transposes, Arena& arena, Prefetch* prefetch = nullptr) {
  const int64_t K = memory.cov.rows, count = steps.count();
  const Factor<Real>& factor = chunk.factor;
  product<Into::kSet>(chunk.projected, K, operand(steps.scaled_weights), memory.cov, prefetch);
  product_lower<Into::kSet>(factor.lower, K, operand(chunk.projected), transposes.scaled);
  if (steps.decay.retains) add_drift(factor.lower, steps.decay.drift, steps.weights, transposes.plain, arena);
  WhitenedRows<Real>& rows = chunk.rows;
  const bool positive = factor_variances(factor, rows.pivot, rows.explained, K, steps.observed.noise_var, arena);
  rows.status = steps_status(positive, rows, memory.cov, steps, arena);
  Matrix<Real> crossed = chunk.projected;
  if (steps.decay.retains) {
    crossed = allocate_matrix<Real>(arena, count, K);
    const Real e = steps.decay.end, *drift = steps.decay.drift_at_end();
    for (int64_t t = 0; t < count; ++t)
      for (int64_t k = 0; k < K; k += kLanes<Real>)
        store<Real>(crossed.row(t) + k,
                    e * load(chunk.projected.row(t) + k) + drift[t] * load(steps.weights.row(t) + k));
  }
  solve_lower(rows.gain, factor, crossed, 0, {}, crossed);
  whiten_values(rows, factor, memory.mean, steps.scaled_weights, steps.values, arena, prefetch);
  if (count > kBlock)
    invert_lower(factor, chunk.inverse, arena);
  else
    chunk.inverse = factor.inverse_block(0).block(0, count, 0, count);
}

// Set a square to zero above its diagonal, and the diagonal too if `diagonal`, padding included.
template <class Real>
void clear_above(const Matrix<Real>& m, bool diagonal) {
  const int64_t padded = round_up(m.columns, kLanes<Real>);
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = diagonal ? i : i + 1; j < padded; ++j) m.row(i)[j] = 0;
}

// X, and P, which is zero above its diagonal, or from it on for reads before the write.
template <class Real>
struct Reads {
  Matrix<Real> projected;  // X [t, K]
  Matrix<Real> crossed;    // H [t, t]
  Matrix<Real> gain;       // P [t, t]
};

// X and H, which need no factor.
template <class Real>
Reads<Real> project_queries(const Matrix<Real>& cov, const Steps<Real>& steps,
                            const TransposedWeights<Real>& transposes, Arena& arena, Prefetch* prefetch = nullptr) {
  const int64_t K = cov.rows, count = steps.count();
  const Reads<Real> reads{allocate_cleared<Real>(arena, count, K), allocate_zero<Real>(arena, count, count),
                          allocate_matrix<Real>(arena, count, count)};
  product<Into::kSet>(reads.projected, K, operand(steps.scaled_queries), cov, prefetch);
  product_lower<Into::kSet>(reads.crossed, K, operand(reads.projected), transposes.scaled);
  if (steps.decay.retains) add_drift(reads.crossed, steps.decay.drift, steps.queries, transposes.plain, arena);
  return reads;
}

// H alone, from V of the weights.
template <class Real>
Reads<Real> cross_queries(const Matrix<Real>& projected_weights, const Steps<Real>& steps,
                          const TransposedWeights<Real>& transposes, Arena& arena) {
  const int64_t K = steps.queries.columns, count = steps.count();
  const Reads<Real> reads{{}, allocate_zero<Real>(arena, count, count), allocate_matrix<Real>(arena, count, count)};
  product_lower<Into::kSet>(reads.crossed, K, operand(steps.scaled_queries), transposed_copy(projected_weights, arena));
  if (steps.decay.retains) add_drift(reads.crossed, steps.decay.drift, steps.queries, transposes.plain, arena);
  return reads;
}

// P.
template <class Real>
void find_read_gain(const Reads<Real>& reads, const WhitenedSteps<Real>& chunk, bool before, Arena& arena) {
  const int64_t count = reads.gain.rows;
  product_of_triangle<true>(reads.gain, reads.crossed,
                            count > kBlock ? transposed_copy(chunk.inverse, arena)
                                           : chunk.factor.inverse_transposed_block(0).block(0, count, 0, count));
  clear_above(reads.gain, before);
}

// v of (4), at least 0.
template <class Real>
void read_variances(Real (&variances)[kFilterChunk], const Steps<Real>& steps, const Reads<Real>& reads) {
  Real explained[kFilterChunk], norms[kFilterChunk] = {};
  dots_of_rows(reads.projected, steps.scaled_queries, variances);
  squared_norms(reads.gain, explained);
  if (steps.decay.retains) squared_norms(steps.queries, norms);
  for (int64_t t = 0; t < steps.count(); ++t) {
    const Real variance = variances[t] - explained[t] + steps.decay.relaxed[t] * norms[t];
    variances[t] = variance > 0 ? variance : 0;
  }
}

// The memory relaxed to the end of a chunk: e R and e² U + (1 − e²) u I.
template <class Real>
void relax_memory(const MemoryRows<Real>& to, const MemoryRows<Real>& from, const ChunkDecay<Real>& decay) {
  const Real e = decay.end, relaxed = decay.relaxed[decay.drift.rows - 1];
  const auto scaled = [](const Matrix<Real>& out, const Matrix<Real>& in, Real factor) {
    share_rows(in, [&](int64_t i) {
      for (int64_t j = 0; j < in.columns; ++j) out.row(i)[j] = factor * in.row(i)[j];
    });
  };
  scaled(to.mean, from.mean, e);
  scaled(to.cov, from.cov, e * e);
  for (int64_t k = 0; k < to.cov.rows; ++k) to.cov.row(k)[k] += relaxed;
}

// (5). `after` may be `before`; `work` is room for a memory, and may be either.
template <class Real>
Status advance_memory(const MemoryRows<Real>& after, const MemoryRows<Real>& before, const MemoryRows<Real>& work,
                      const WhitenedRows<Real>& rows, const ChunkDecay<Real>& decay) {
  if (decay.retains) relax_memory(work, before, decay);
  update_memory(after, decay.retains ? work : before, rows);
  if (!decay.forgets) return rows.status;
  bool in_range = true;
  scale(after.cov, decay.growth);
  for (int64_t k = 0; k < after.cov.rows; ++k) in_range &= after.cov.row(k)[k] - after.cov.row(k)[k] == 0;
  return in_range ? rows.status : kOutOfRange;
}

}  // namespace fastkm::FASTKM_LEVEL
