// What the decay of a filter's chunk receives in its backward: equations (F16) and (F17) of docs/math/filtering.md.
//
// Every cotangent of ln a comes here, from the scaled rows, from D, and from the memory after the chunk; those of the
// factors of decay are sums over the steps after them.
#pragma once

#include "cpu/filtering/chunk_backward.h"

namespace fastkm::FASTKM_LEVEL {

// Cotangents of ln a [t], to which scaled weights and queries have come, and of u.
template <class Real>
struct DecayCotangents {
  Real log_scale[kFilterChunk] = {};
  double prior_var = 0;
};

// (F16) and (F17): what passes through D, to W, Q, ln a and u. `weights` and `queries` are those of W and Q.
template <class Real>
void drift_cotangents(DecayCotangents<Real>& to, const Matrix<Real>& to_weights, const Matrix<Real>& to_queries,
                      const InnerCotangents<Real>& inner, const ReportedCotangents<Real>& grad,
                      const Steps<Real>& steps, const TransposedWeights<Real>& transposes, Arena& arena) {
  const ChunkDecay<Real>& decay = steps.decay;
  const int64_t K = steps.weights.columns, count = steps.count(), last = count - 1;
  const auto square = [&] { return allocate_zero<Real>(arena, count, count); };
  const Matrix<Real> among = square(), across = square(), of_weights = square(), of_queries = square();
  product_lower<Into::kSet>(among, K, operand(steps.weights), transposes.plain);
  product_lower<Into::kSet>(across, K, operand(steps.queries), transposes.plain);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const Real flat = (i == j ? 1 : 2) * inner.variances.row(i)[j], read = inner.reads.row(i)[j];
      Real drift = flat * among.row(i)[j] + read * across.row(i)[j];  // D̄
      if (i == last) drift += dot(K, inner.crossed.row(j), steps.weights.row(j));
      of_weights.row(i)[j] = flat * decay.drift.row(i)[j];
      of_queries.row(i)[j] = read * decay.drift.row(i)[j];
      const Real scaled = drift * decay.drift.row(i)[j];
      to.prior_var += scaled / decay.prior_var;
      to.log_scale[i] += scaled;
      to.log_scale[j] -= scaled + 2 * decay.prior_var * drift * decay.scale[i] * decay.scale[j];
    }
  product<Into::kAdd>(to_weights, count, operand(of_weights), steps.weights);
  product<Into::kAdd>(to_weights, count, transposed(of_weights), steps.weights);
  product<Into::kAdd>(to_weights, count, transposed(of_queries), steps.queries);
  add_scaled_rows(to_weights, decay.drift_at_end(), inner.crossed);
  product<Into::kAdd>(to_queries, count, operand(of_queries), steps.weights);
  Real factors[kFilterChunk];
  for (int64_t t = 0; t < count; ++t) {
    const Real norm = dot(K, steps.queries.row(t), steps.queries.row(t)), a = decay.scale[t];
    factors[t] = 2 * grad.variance[t] * decay.relaxed[t];
    to.prior_var += grad.variance[t] * norm * decay.relaxed[t] / decay.prior_var;
    to.log_scale[t] -= 2 * grad.variance[t] * a * a * decay.prior_var * norm;
  }
  add_scaled_rows(to_queries, factors, steps.queries);
}

// What retention makes of the memory at the end of a chunk reaches ln a of its last step, and u.
template <class Real>
void end_cotangents(DecayCotangents<Real>& to, const Matrix<Real>& grad_memory, const KeptChunk<Real>& kept,
                    const Steps<Real>& steps, const Matrix<Real>& crossed) {
  const int64_t K = grad_memory.columns, C = grad_memory.rows - K, last = kept.count - 1;
  const Real e = steps.decay.end, u = steps.decay.prior_var;
  double trace = 0;
  for (int64_t k = 0; k < K; ++k) trace += grad_memory.row(k)[k];
  const auto inner = [&](int64_t first, int64_t rows) {
    return inner_product(grad_memory.rows_from(first, rows), kept.memory.rows_from(first, rows));
  };
  to.log_scale[last] += static_cast<Real>(e * (inner(K, C) + inner_product(crossed, kept.whitened.projected)) +
                                          2 * e * e * (inner(0, K) - u * trace));
  to.prior_var += trace * steps.decay.relaxed[last] / u;
}

// What forgetting's scaling of values, reads and energies adds to the cotangents of ln a.
template <class Real>
void growth_cotangents(DecayCotangents<Real>& to, const StackedRows<Real>& stacked,
                       const ReportedCotangents<Real>& grad, const KeptChunk<Real>& kept, const Steps<Real>& steps,
                       const Reads<Real>& reads, Real end, Arena& arena) {
  const WhitenedRows<Real>& rows = kept.whitened.rows;
  const int64_t K = steps.weights.columns, C = steps.values.columns, count = kept.count;
  const Matrix<Real> read_values = allocate_matrix<Real>(arena, count, C);  // O~
  product<Into::kSet>(read_values, K, operand(steps.scaled_queries),
                      transposed_copy(kept.memory.rows_from(K, C), arena));
  product<Into::kAdd>(read_values, count, operand(reads.gain), rows.values);
  for (int64_t t = 0; t < count; ++t) {
    const Real a = steps.decay.scale[t], *error = rows.values.row(t);
    to.log_scale[t] += dot(C, stacked.values.row(t), steps.values.row(t)) -
                       dot(C, grad.values.row(t), read_values.row(t)) +
                       grad.log_evidence * dot(C, error, error) / (a * a);
  }
  to.log_scale[count - 1] += end;
}

// ᾱ_s = Σ_{i ≥ s} c̄_i / α_s, or γ̄_s = −½ Σ_{i ≥ s} c̄_i / γ_s.
template <class Real>
void store_decay(const Batch<Real>& to, int64_t b, int64_t first, const DecayCotangents<Real>& of,
                 const Steps<Real>& steps) {
  Real sum = 0;
  for (int64_t t = steps.count() - 1; t >= 0; --t) {
    sum += of.log_scale[t];
    const Real cotangent = sum / steps.decay.factor[t];
    *to.at(b, first + t) = !steps.observed.unmasked[t] ? 0 : steps.decay.forgets ? Real(-0.5) * cotangent : cotangent;
  }
}

}  // namespace fastkm::FASTKM_LEVEL
