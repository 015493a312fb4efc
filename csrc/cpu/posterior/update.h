// Posterior update with given weights: the block form, a chunk of patterns at a time.
#pragma once

#include "cpu/posterior/conditioning.h"

namespace fastkm::FASTKM_LEVEL {

// What updating a memory touches. Small ones are there when they are needed; of large ones two do not fit the cache.
template <class Real>
Prefetch plan_update_prefetch(const PosteriorArgs<Real>& args, int64_t b, int64_t end) {
  constexpr int64_t kLeastBytes = 1 << 17, kMostBytes = 1 << 19;
  const int64_t K = args.K, C = args.C, patterns = args.T_;
  const int64_t rows = kChunk / FASTKM_TILE_ROWS, tiles = (2 * rows + K / FASTKM_TILE_ROWS) * strips<Real>(C);
  Prefetch prefetch(1 + (patterns + kChunk - 1) / kChunk * (tiles + rows * strips<Real>(K)));
  const int64_t bytes = (2 * K + patterns) * (K + C) * static_cast<int64_t>(sizeof(Real));
  if (b == end || bytes < kLeastBytes || bytes > kMostBytes) return prefetch;
  prefetch.add(args.cov, b, 0, K, K);
  prefetch.add(args.weights, b, 0, patterns, K);
  prefetch.add(args.mean, b, 0, K, C);
  prefetch.add(args.values, b, 0, patterns, C);
  prefetch.add(args.new_cov, b, 0, K, K);
  prefetch.add(args.new_mean, b, 0, K, C);
  return prefetch;
}

// The memory is read where the caller has it and written where the caller wants it; in between it is in working memory.
template <class Real>
void update_posterior(const PosteriorArgs<Real>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const MemoryRows<Real> work{allocate_cleared<Real>(arena, args.K, args.C),
                                allocate_cleared<Real>(arena, args.K, args.K)};
    const MemoryRows<Real> result{view_or_work(args.new_mean, b, work.mean), view_or_work(args.new_cov, b, work.cov)};
    MemoryRows<Real> memory{view_or_copy(args.mean, b, work.mean), view_or_copy(args.cov, b, work.cov)};
    const int64_t most = smaller(kChunk, args.T_);
    const Matrix<Real> weights = allocate_matrix<Real>(arena, most, args.K),
                       values = allocate_matrix<Real>(arena, most, args.C);
    Prefetch prefetch = plan_update_prefetch(args, b + 1, end);
    Status status = symmetry(memory.cov);
    double log_evidence = 0;  // a sum over all patterns
    const Arena::Mark chunk_start = arena.mark();
    for (int64_t first = 0; first < args.T_; first += kChunk) {
      arena.release(chunk_start);
      const int64_t count = smaller(kChunk, args.T_ - first);
      const Matrix<Real> chunk_weights =
          view_or_copy_patterns(args.weights, args, b, first, weights.rows_from(0, count));
      const Matrix<Real> chunk_values = view_or_copy_patterns(args.values, args, b, first, values.rows_from(0, count));
      const WhitenedRows<Real> chunk =
          whiten_rows(memory, chunk_weights, chunk_values, args, b, first, arena, &prefetch);
      const MemoryRows<Real>& after = first + count < args.T_ ? work : result;
      const Status done = condition(memory, chunk, after, args, b, first, log_evidence, &prefetch);
      memory = after;
      if (status == kGood) status = done;
    }
    store_memory(memory, args, b);
    args.log_evidence[b] = static_cast<Real>(log_evidence);
    args.info[b] = status;
  }
}

}  // namespace fastkm::FASTKM_LEVEL
