// Backward of a filter, from the last chunk to the first.
//
// A step costs about 11 K² + 16 K C operations, and 4 K² more where the variances have a cotangent. The memories before
// all chunks, with V, G, E and L⁻¹, are computed first and kept: K (K + C) + t (2 K + C + t) numbers a chunk, for the
// memories that threads are working on.
#pragma once

#include "cpu/filtering/chunk_backward.h"
#include "cpu/filtering/decay_backward.h"

namespace fastkm::FASTKM_LEVEL {

template <class Real>
int64_t count_filter_chunks(const FilteringArgs<Real>& args, int64_t b) {
  int64_t chunks = 0;
  for (int64_t first = 0; first < args.posterior.T; ++chunks) first += filter_chunk_size(args, b, first, kFilterChunk);
  return chunks;
}

// Filter a sequence without its reads, and keep what its backward needs.
template <class Real>
KeptChunk<Real>* whiten_sequence(const FilteringArgs<Real>& args, int64_t b, int64_t chunks, Arena& arena) {
  const PosteriorArgs<Real>& given = args.posterior;
  const int64_t K = given.K, C = given.C;
  KeptChunk<Real>* kept = arena.allocate<KeptChunk<Real>>(chunks);
  const MemoryRows<Real> memory{allocate_matrix<Real>(arena, K, C), allocate_matrix<Real>(arena, K, K)};
  load_matrix(memory.mean, given.mean, b);
  load_matrix(memory.cov, given.cov, b);
  int64_t first = 0;
  for (int64_t n = 0; n < chunks; ++n) {
    const int64_t count = filter_chunk_size(args, b, first, kFilterChunk);
    kept[n] = {.first = first,
               .count = count,
               .memory = allocate_matrix<Real>(arena, K + C, K),
               .whitened = allocate_whitened_steps<Real>(K, C, count, {}, arena)};
    const Arena::Mark mark = arena.mark();
    const Steps<Real> steps = load_steps(args, b, first, count, false, arena);
    kept[n].whitened.rows.observed = steps.observed;
    copy_rows(kept[n].memory.rows_from(0, K), memory.cov);
    transpose(kept[n].memory.rows_from(K, C), memory.mean);
    Prefetch prefetch = plan_steps_prefetch(args, b, first + count, count, false);
    whiten_steps(kept[n].whitened, memory, steps, transpose_weights(steps, arena), arena, &prefetch);
    advance_memory(memory, memory, memory, kept[n].whitened.rows, steps.decay);
    arena.release(mark);
    first += count;
  }
  return kept;
}

// Prefetch what the backward of the chunk before reads and writes. Products of long sums are packed, and do not
// prefetch.
template <class Real>
Prefetch plan_backward_prefetch(const FilteringArgs<Real>& args, const FilteringGrads<Real>& grads, int64_t b,
                                const KeptChunk<Real>& kept) {
  const int64_t K = args.posterior.K, C = args.posterior.C, first = kept.first, count = kept.count;
  const int64_t rows = (4 * count + K + C) / FASTKM_TILE_ROWS;  // of tiles
  Prefetch prefetch(rows * strips<Real>(K));
  if (K > kSumRun || C > kSumRun) return prefetch;
  prefetch.add(args.posterior.weights, b, first, count, K);
  prefetch.add(args.queries, b, first, count, K);
  prefetch.add(grads.read_values, b, first, count, C);
  prefetch.add(grads.posterior.to_weights, b, first, count, K);
  prefetch.add(grads.posterior.to_values, b, first, count, C);
  prefetch.add(grads.to_queries, b, first, count, K);
  prefetch.add(kept.memory);
  prefetch.add(kept.whitened.rows.gain);
  prefetch.add(kept.whitened.rows.values);
  prefetch.add(kept.whitened.projected);
  return prefetch;
}

// Rows to the caller's memory; those of masked steps are zero.
template <class Real>
void store_steps(const Batch<Real>& to, int64_t b, const Matrix<Real>& rows, const bool* unmasked) {
  store_matrix(to, b, rows);
  for (int64_t t = 0; unmasked && t < rows.rows; ++t)
    if (!unmasked[t]) __builtin_memset(to.at(b, t), 0, static_cast<size_t>(rows.columns) * sizeof(Real));
}

// Backward of one chunk. Returns what reaches u.
template <class Real>
double filter_chunk_backward(const Matrix<Real>& grad_memory, const FilteringArgs<Real>& args,
                             const FilteringGrads<Real>& grads, int64_t b, const KeptChunk<Real>& kept, Arena& arena,
                             Prefetch* prefetch) {
  // Bring in.
  const int64_t K = args.posterior.K, C = args.posterior.C, count = kept.count, first = kept.first;
  const Steps<Real> steps = load_steps(args, b, first, count, true, arena);
  const ChunkDecay<Real>& decay = steps.decay;
  const TransposedWeights<Real> transposes = transpose_weights(steps, arena);
  const Matrix<Real> cov = kept.memory.rows_from(0, K);
  const Reads<Real> reads = grads.variance.data ? project_queries(cov, steps, transposes, arena)
                                                : cross_queries(kept.whitened.projected, steps, transposes, arena);
  find_read_gain(reads, kept.whitened, args.read_before, arena);
  const StackedRows<Real> stacked = allocate_stacked_rows<Real>(K, C, count, grads.variance.data, arena);
  const auto upper = [&](const Matrix<Real>& rows) { return rows.rows_from(0, count); };
  const auto lower = [&](const Matrix<Real>& rows) { return rows.rows_from(count, count); };
  const ReportedCotangents<Real> grad = load_reported(args, grads, b, kept, steps, reads, lower(stacked.values));
  copy_rows(upper(stacked.inputs), steps.scaled_weights);
  copy_rows(lower(stacked.inputs), steps.scaled_queries);

  // Compute.
  DecayCotangents<Real> to_decay;
  if (decay.forgets) scale(grad_memory.rows_from(0, K), decay.growth);
  const InnerCotangents<Real> inner =
      inner_cotangents(stacked, grad_memory, grad, kept, steps, reads, args.read_before, arena);
  if (decay.forgets) growth_cotangents(to_decay, stacked, grad, kept, steps, reads, inner.end, arena);
  if (decay.retains) end_cotangents(to_decay, grad_memory, kept, steps, inner.crossed);
  const Matrix<Real> to_values = allocate_matrix<Real>(arena, count, C);
  copy_rows(to_values, upper(stacked.values));
  if (decay.forgets) scale_rows(to_values, to_values, decay.scale);
  scale(upper(stacked.values), Real(-1));
  memory_cotangents(grad_memory, stacked, kept, decay.end, prefetch);
  const Matrix<Real> to_weights = upper(stacked.to_inputs), to_queries = lower(stacked.to_inputs);
  if (decay.any()) {
    for (int64_t t = 0; t < count; ++t)
      to_decay.log_scale[t] += dot(K, to_weights.row(t), steps.scaled_weights.row(t)) +
                               dot(K, to_queries.row(t), steps.scaled_queries.row(t));
    scale_rows(to_weights, to_weights, decay.scale);
    scale_rows(to_queries, to_queries, decay.scale);
  }
  if (decay.retains) drift_cotangents(to_decay, to_weights, to_queries, inner, grad, steps, transposes, arena);

  // Put out.
  const bool* unmasked = steps.observed.unmasked;
  store_steps(grads.posterior.to_weights.from_row(first), b, to_weights, unmasked);
  store_steps(grads.posterior.to_values.from_row(first), b, to_values, unmasked);
  store_steps(grads.to_queries.from_row(first), b, to_queries, nullptr);
  for (int64_t t = 0; t < count; ++t)
    *grads.posterior.to_noise_var.at(b, first + t) =
        inner.variances.row(t)[t] + (kept.whitened.rows.explained[t] > 0 ? 0 : grad.innovation[t]);
  if (decay.retains) store_decay(grads.to_retention, b, first, to_decay, steps);
  if (decay.forgets) store_decay(grads.to_forgetting, b, first, to_decay, steps);
  return to_decay.prior_var;
}

template <class Real>
void filter_posterior_backward(const FilteringArgs<Real>& args, const FilteringGrads<Real>& grads, int64_t begin,
                               int64_t end) {
  const int64_t K = args.posterior.K, C = args.posterior.C;
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Matrix<Real> grad_memory = allocate_matrix<Real>(arena, K + C, K);
    load_cotangents({grad_memory.rows_from(K, C), grad_memory.rows_from(0, K)}, grads.posterior, b);
    const int64_t chunks = count_filter_chunks(args, b);
    const KeptChunk<Real>* kept = whiten_sequence(args, b, chunks, arena);
    double to_prior_var = 0;
    const Arena::Mark sequence = arena.mark();
    for (int64_t n = chunks - 1; n >= 0; --n) {
      arena.release(sequence);
      Prefetch prefetch = n > 0 ? plan_backward_prefetch(args, grads, b, kept[n - 1]) : Prefetch(1);
      to_prior_var += filter_chunk_backward(grad_memory, args, grads, b, kept[n], arena, &prefetch);
    }
    store_cotangents(grads.posterior, b, {grad_memory.rows_from(K, C), grad_memory.rows_from(0, K)});
    *grads.to_prior_var.at(b) = static_cast<Real>(to_prior_var);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
