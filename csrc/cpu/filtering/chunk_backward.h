// Backward of one chunk of a filter: equations (F10) to (F12) and (F19) of docs/math/filtering.md.
//
// With the chunk of chunk.h, bars for cotangents and primes for what comes after the chunk:
//   (1)  Ḡ = E R̄'ᵀ − 2 G Ū',  P̄ = tril(Ō Eᵀ) − 2 diag(v̄) P,  Ē = G R̄' + Pᵀ Ō − ℓ̄ E
//   (2)  B̄ = L⁻ᵀ Ḡ,  Z̄ = L⁻ᵀ Ē,  H̄ = P̄ L⁻¹
//   (3)  N = Ḡ Gᵀ + Ē Eᵀ + P̄ᵀ P, its lower triangle mirrored,  S̄ = L⁻ᵀ (diag(L_tt² p̄_t) − ½ N) L⁻¹
//   (4)  Y = S̄ W~ + H̄ᵀ Q~ + e B̄
//   (5)  [W~; Q~]‾ = [Y + S̄ W~; H̄ W~ + 2 diag(v̄) Q~] U + [−Z̄; Ō] Rᵀ
//   (6)  Ū = e² Ū' + sym([W~; Q~]ᵀ [Y; diag(v̄) Q~]),  R̄ᵀ = e R̄'ᵀ + [−Z̄; Ō]ᵀ [W~; Q~].
// X, which v alone needs, and the lower half of the product in Ū are left out where there is no v̄.
// p̄_t = s̄_t − ½ ℓ̄ C / s_t is the cotangent of e_t, or of σ_t² alone where rounding has made e_t zero.
//
// The memory, and its cotangent, are U above Rᵀ [K + C, K], so that (5) and (6) have contiguous right operands.
#pragma once

#include "cpu/filtering/chunk.h"
#include "cpu/posterior/conditioning_backward.h"

namespace fastkm::FASTKM_LEVEL {

// What the backward of a chunk keeps of its forward.
template <class Real>
struct KeptChunk {
  int64_t first, count;
  Matrix<Real> memory;  // U above Rᵀ [K + C, K], before the chunk
  WhitenedSteps<Real> whitened;
};

// Cotangents of what a chunk reports.
template <class Real>
struct ReportedCotangents {
  Matrix<Real> values;            // Ō [t, C], of O~
  Real variance[kFilterChunk];    // v̄; 0 where v was below zero by rounding
  Real innovation[kFilterChunk];  // p̄
  Real log_evidence;              // ℓ̄
};

template <class Real>
ReportedCotangents<Real> load_reported(const FilteringArgs<Real>& args, const FilteringGrads<Real>& grads, int64_t b,
                                       const KeptChunk<Real>& kept, const Steps<Real>& steps, const Reads<Real>& reads,
                                       const Matrix<Real>& values) {
  ReportedCotangents<Real> grad{.values = values};
  grad.log_evidence = value_or_zero(grads.posterior.log_evidence, b, 0);
  load_or_zero(grad.values, grads.read_values.data ? grads.read_values.from_row(kept.first) : grads.read_values, b);
  const Real C = static_cast<Real>(args.posterior.C);
  Real variances[kFilterChunk];
  if (grads.variance.data) read_variances(variances, steps, reads);
  for (int64_t t = 0; t < kept.count; ++t) {
    grad.variance[t] = grads.variance.data && variances[t] > 0 ? *grads.variance.at(b, kept.first + t) : 0;
    const Real of_evidence = steps.observed.unmasked[t] ? grad.log_evidence * C / kept.whitened.rows.pivot[t] : 0;
    grad.innovation[t] = value_or_zero(grads.posterior.innovation_var, b, kept.first + t) - Real(0.5) * of_evidence;
    const Real unscaled = 1 / steps.decay.scale[t];
    for (int64_t c = 0; steps.decay.forgets && c < args.posterior.C; ++c) grad.values.row(t)[c] *= unscaled;
  }
  return grad;
}

// to += diag(factors) from, padding included.
template <class Real>
void add_scaled_rows(const Matrix<Real>& to, const Real* factors, const Matrix<Real>& from) {
  const int64_t padded = round_up(from.columns, kLanes<Real>);
  for (int64_t i = 0; i < from.rows; ++i) add_scaled(padded, to.row(i), factors[i], from.row(i));
}

// Cotangents inside a chunk.
template <class Real>
struct InnerCotangents {
  Matrix<Real> gain, error;       // Ḡ [t, K], Ē [t, C]
  Matrix<Real> crossed;           // B̄ [t, K]
  Matrix<Real> read_gain, reads;  // P̄, H̄ [t, t]
  Matrix<Real> variances;         // S̄ [t, t]
  Real end = 0;                   // what reaches ln a of the last step from the memory after the chunk
};

// Ḡ and Ē of (1). With forgetting, the cotangent of U' has become that of U − Gᵀ G.
template <class Real>
void gain_cotangents(InnerCotangents<Real>& to, const Matrix<Real>& grad_memory, const ReportedCotangents<Real>& grad,
                     const KeptChunk<Real>& kept, const Steps<Real>& steps, const Reads<Real>& reads, Arena& arena) {
  const WhitenedRows<Real>& rows = kept.whitened.rows;
  const int64_t K = grad_memory.columns, C = grad_memory.rows - K, count = kept.count;
  const Matrix<Real> grad_cov = grad_memory.rows_from(0, K), grad_mean = grad_memory.rows_from(K, C);
  product<Into::kSet>(to.gain, K, operand(rows.gain), grad_cov);
  Real factors[kFilterChunk];
  for (int64_t t = 0; t < count; ++t) factors[t] = -2;
  scale_rows(to.gain, to.gain, factors);
  if (steps.decay.forgets)
    to.end =
        static_cast<Real>(2 * inner_product(grad_cov, kept.memory.rows_from(0, K)) + inner_product(to.gain, rows.gain));
  product<Into::kAdd>(to.gain, C, operand(rows.values), grad_mean);
  product<Into::kSet>(to.error, K, operand(rows.gain), transposed_copy(grad_mean, arena));
  product<Into::kAdd>(to.error, count, transposed(reads.gain), grad.values);
  for (int64_t t = 0; t < count; ++t) {
    const Real a = steps.decay.scale[t];
    factors[t] = steps.decay.forgets ? -grad.log_evidence / (a * a) : -grad.log_evidence;
  }
  add_scaled_rows(to.error, factors, rows.values);
}

// S̄ of (3).
template <class Real>
void innovation_cotangents(const InnerCotangents<Real>& to, const ReportedCotangents<Real>& grad,
                           const KeptChunk<Real>& kept, const Reads<Real>& reads, const Matrix<Real>& error_transposed,
                           Arena& arena) {
  const WhitenedRows<Real>& rows = kept.whitened.rows;
  const int64_t K = rows.gain.columns, C = rows.values.columns, count = kept.count;
  const Matrix<Real> inner = allocate_matrix<Real>(arena, count, count);
  const Matrix<Real> solved = allocate_matrix<Real>(arena, count, count);
  product_lower<Into::kSet>(inner, K, operand(to.gain), transposed_copy(rows.gain, arena));
  product_lower<Into::kAdd>(inner, C, operand(to.error), error_transposed);
  product_lower<Into::kAdd>(inner, count, transposed(to.read_gain), reads.gain);
  mirror(inner);
  scale(inner, Real(-0.5));
  for (int64_t t = 0; t < count; ++t)
    if (rows.explained[t] > 0) inner.row(t)[t] += rows.pivot[t] * grad.innovation[t];
  product<Into::kSet>(solved, count, operand(inner), kept.whitened.inverse);
  product<Into::kSet>(to.variances, count, transposed(kept.whitened.inverse), solved);
}

// The stacked rows of (5) and (6), [2 t, K] and [2 t, C].
template <class Real>
struct StackedRows {
  Matrix<Real> inputs;     // W~ above Q~
  Matrix<Real> projected;  // what (5) multiplies by U
  Matrix<Real> outer;      // what (6) adds to Ū: Y above diag(v̄) Q~, or Y alone
  Matrix<Real> values;     // −Z̄ above Ō
  Matrix<Real> to_inputs;  // their cotangents
};

template <class Real>
StackedRows<Real> allocate_stacked_rows(int64_t K, int64_t C, int64_t count, bool of_variance, Arena& arena) {
  return {allocate_matrix<Real>(arena, 2 * count, K), allocate_matrix<Real>(arena, 2 * count, K),
          allocate_matrix<Real>(arena, of_variance ? 2 * count : count, K), allocate_matrix<Real>(arena, 2 * count, C),
          allocate_matrix<Real>(arena, 2 * count, K)};
}

// (4), and the left operands of (5) and (6) that are made of it.
template <class Real>
void stack_projected(const StackedRows<Real>& stacked, const InnerCotangents<Real>& inner,
                     const ReportedCotangents<Real>& grad, const Steps<Real>& steps) {
  const int64_t count = steps.count();
  const Matrix<Real> of_weights = stacked.projected.rows_from(0, count);
  const Matrix<Real> of_queries = stacked.projected.rows_from(count, count);
  const Matrix<Real> Y = stacked.outer.rows_from(0, count);
  Real factors[kFilterChunk];
  product<Into::kSet>(of_weights, count, operand(inner.variances), steps.scaled_weights);
  product<Into::kSet>(of_queries, count, operand(inner.reads), steps.scaled_weights);
  product<Into::kAdd>(Y, of_weights, count, transposed(inner.reads), steps.scaled_queries);
  for (int64_t t = 0; t < count; ++t) factors[t] = steps.decay.end;
  add_scaled_rows(Y, factors, inner.crossed);
  add_rows(of_weights, Y);
  if (stacked.outer.rows == count) return;
  scale_rows(stacked.outer.rows_from(count, count), steps.scaled_queries, grad.variance);
  for (int64_t t = 0; t < count; ++t) factors[t] = 2 * grad.variance[t];
  add_scaled_rows(of_queries, factors, steps.scaled_queries);
}

// (1) to (4): cotangents inside the chunk, and the stacked rows without their own.
template <class Real>
InnerCotangents<Real> inner_cotangents(const StackedRows<Real>& stacked, const Matrix<Real>& grad_memory,
                                       const ReportedCotangents<Real>& grad, const KeptChunk<Real>& kept,
                                       const Steps<Real>& steps, const Reads<Real>& reads, bool before, Arena& arena) {
  const int64_t K = grad_memory.columns, C = grad_memory.rows - K, count = kept.count;
  const auto square = [&] { return allocate_zero<Real>(arena, count, count); };
  InnerCotangents<Real> to{.gain = allocate_matrix<Real>(arena, count, K),
                           .error = allocate_matrix<Real>(arena, count, C),
                           .crossed = allocate_matrix<Real>(arena, count, K),
                           .read_gain = square(),
                           .reads = square(),
                           .variances = square()};
  const Matrix<Real>&inverse = kept.whitened.inverse, &error = kept.whitened.rows.values;
  const Matrix<Real> error_transposed = transposed_copy(error, arena);
  gain_cotangents(to, grad_memory, grad, kept, steps, reads, arena);
  product_lower<Into::kSet>(to.read_gain, C, operand(grad.values), error_transposed);
  Real factors[kFilterChunk];
  for (int64_t t = 0; t < count; ++t) factors[t] = -2 * grad.variance[t];
  add_scaled_rows(to.read_gain, factors, reads.gain);
  clear_above(to.read_gain, before);
  product<Into::kSet>(to.crossed, count, transposed(inverse), to.gain);                           // (2)
  product<Into::kSet>(stacked.values.rows_from(0, count), count, transposed(inverse), to.error);  // Z̄
  product<Into::kSet>(to.reads, count, operand(to.read_gain), inverse);
  innovation_cotangents(to, grad, kept, reads, error_transposed, arena);  // (3)
  stack_projected(stacked, to, grad, steps);                              // (4)
  return to;
}

// (5) and (6). `grad_memory` goes in as the cotangent of the memory after the chunk and comes out as that before it.
template <class Real>
void memory_cotangents(const Matrix<Real>& grad_memory, const StackedRows<Real>& stacked, const KeptChunk<Real>& kept,
                       Real end, Prefetch* prefetch) {
  const int64_t K = grad_memory.columns, C = grad_memory.rows - K;
  const Matrix<Real> grad_cov = grad_memory.rows_from(0, K), grad_mean = grad_memory.rows_from(K, C);
  product<Into::kSet>(stacked.to_inputs, K, operand(stacked.projected), kept.memory.rows_from(0, K), prefetch);
  product<Into::kAdd>(stacked.to_inputs, C, operand(stacked.values), kept.memory.rows_from(K, C), prefetch);
  if (end != 1) {
    scale(grad_cov, end * end);
    scale(grad_mean, end);
  }
  product<Into::kAdd>(grad_cov, stacked.outer.rows, transposed(stacked.inputs), stacked.outer, prefetch);
  product<Into::kAdd>(grad_mean, stacked.values.rows, transposed(stacked.values), stacked.inputs, prefetch);
  symmetrise(grad_cov);
}

}  // namespace fastkm::FASTKM_LEVEL
