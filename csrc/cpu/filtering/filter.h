// A filter: every step of a sequence is written to its memory and read from it, chunk by chunk, by chunk.h.
//
// Bytes: every argument is read and every result written once, if a memory fits the cache. The first chunk reads the
// caller's memory, and the last one writes the caller's result.
#pragma once

#include "cpu/filtering/chunk.h"
#include "cpu/filtering/step.h"

namespace fastkm::FASTKM_LEVEL {

// (4) to the caller's memory, for steps from `first` on.
template <class Real>
void store_reads(const FilteringArgs<Real>& args, int64_t b, int64_t first, const Matrix<Real>& mean,
                 const Steps<Real>& steps, const Reads<Real>& reads, const Matrix<Real>& error, Arena& arena,
                 Prefetch* prefetch) {
  const int64_t C = mean.columns, count = steps.count();
  const Batch<Real> to = args.read_values.from_row(first);
  const Matrix<Real> from_mean = allocate_cleared<Real>(arena, count, C),
                     work = allocate_cleared<Real>(arena, count, C);
  const Matrix<Real> values = view_or_work(to, b, work);
  product<Into::kSet>(from_mean, mean.rows, operand(steps.scaled_queries), mean, prefetch);
  product<Into::kAdd>(values, from_mean, count, operand(reads.gain), error);
  Real variances[kFilterChunk];
  read_variances(variances, steps, reads);
  for (int64_t t = 0; t < count; ++t) {
    *args.variance.at(b, first + t) = variances[t];
    const Real unscaled = 1 / steps.decay.scale[t];
    for (int64_t c = 0; steps.decay.forgets && c < C; ++c) values.row(t)[c] *= unscaled;
  }
  store_matrix(to, b, values);
}

// s to the caller's memory, and the log evidence added to `log_evidence`.
template <class Real>
void store_evidence(const FilteringArgs<Real>& args, int64_t b, int64_t first, const Steps<Real>& steps,
                    const WhitenedRows<Real>& rows, double& log_evidence) {
  constexpr Real kTwoPi = Real(6.283185307179586476925286766559);
  Real energies[kLargestChunk];
  squared_norms(rows.values, energies);
  for (int64_t t = 0; t < rows.count(); ++t) {
    const Real s = rows.pivot[t], a = steps.decay.scale[t];
    *args.posterior.innovation_var.at(b, first + t) = s;
    if (!steps.observed.unmasked[t]) continue;
    const Real energy = steps.decay.forgets ? energies[t] / (a * a) : energies[t];
    log_evidence -= Real(0.5) * (static_cast<Real>(args.posterior.C) * std::log(kTwoPi * s) + energy);
  }
}

template <class Real>
void filter_posterior(const FilteringArgs<Real>& args, int64_t begin, int64_t end) {
  const PosteriorArgs<Real>& given = args.posterior;
  const int64_t K = given.K, C = given.C, T = given.T;
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const MemoryRows<Real> work{allocate_cleared<Real>(arena, K, C), allocate_cleared<Real>(arena, K, K)};
    const MemoryRows<Real> result{view_or_work(given.new_mean, b, work.mean), view_or_work(given.new_cov, b, work.cov)};
    MemoryRows<Real> memory{view_or_copy(given.mean, b, work.mean), view_or_copy(given.cov, b, work.cov)};
    Status status = symmetry(memory.cov);
    double log_evidence = 0;
    const Arena::Mark chunk_start = arena.mark();
    int64_t first = 0;
    if (is_step_of_whole_vectors(args)) {
      const Status now = filter_step(args, b, result, memory, log_evidence, arena);
      memory = result, first = 1;
      if (status == kGood) status = now;
    }
    for (int64_t count; first < T; first += count) {
      arena.release(chunk_start);
      count = filter_chunk_size(args, b, first, forward_filter_chunk<Real>(K, C));
      Prefetch prefetch = plan_steps_prefetch(args, b, first + count, count, true);
      const Steps<Real> steps = load_steps(args, b, first, count, false, arena);
      const TransposedWeights<Real> transposes = transpose_weights(steps, arena);
      WhitenedSteps<Real> chunk = allocate_whitened_steps(K, C, count, steps.observed, arena);
      const Reads<Real> reads = project_queries(memory.cov, steps, transposes, arena, &prefetch);
      whiten_steps(chunk, memory, steps, transposes, arena, &prefetch);
      find_read_gain(reads, chunk, args.read_before, arena);
      store_reads(args, b, first, memory.mean, steps, reads, chunk.rows.values, arena, &prefetch);
      store_evidence(args, b, first, steps, chunk.rows, log_evidence);
      const MemoryRows<Real>& after = first + count < T ? work : result;
      const Status now = advance_memory(after, memory, work, chunk.rows, steps.decay);
      memory = after;
      if (status == kGood) status = now;
    }
    store_memory(memory, given, b);
    given.log_evidence[b] = static_cast<Real>(log_evidence);
    given.info[b] = status;
  }
}

}  // namespace fastkm::FASTKM_LEVEL
