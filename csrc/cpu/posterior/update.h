// Posterior update with given weights: the block form, a chunk of patterns at a time.
#pragma once

#include "cpu/posterior/conditioning.h"

namespace fastkm::FASTKM_LEVEL {

// What updating a memory touches. Small ones are there when they are needed; of large ones two do not fit the cache.
template <class T>
Upcoming upcoming_memory(const PosteriorArgs<T>& args, int64_t b, int64_t end) {
  constexpr int64_t kLeastBytes = 1 << 17, kMostBytes = 1 << 19;
  const int64_t K = args.K, C = args.C, patterns = args.T_;
  const int64_t rows = kChunk / FASTKM_TILE_ROWS, tiles = (2 * rows + K / FASTKM_TILE_ROWS) * strips<T>(C);
  Upcoming upcoming(1 + (patterns + kChunk - 1) / kChunk * (tiles + rows * strips<T>(K)));
  const int64_t bytes = (2 * K + patterns) * (K + C) * static_cast<int64_t>(sizeof(T));
  if (b == end || bytes < kLeastBytes || bytes > kMostBytes) return upcoming;
  upcoming.add(args.cov, b, 0, K, K);
  upcoming.add(args.weights, b, 0, patterns, K);
  upcoming.add(args.mean, b, 0, K, C);
  upcoming.add(args.values, b, 0, patterns, C);
  upcoming.add(args.new_cov, b, 0, K, K);
  upcoming.add(args.new_mean, b, 0, K, C);
  return upcoming;
}

// The memory is read where the caller has it and written where the caller wants it; in between it is in working memory.
template <class T>
void update_posterior(const PosteriorArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Memory<T> work{take_cleared<T>(arena, args.K, args.C), take_cleared<T>(arena, args.K, args.K)};
    const Memory<T> result{own_rows(args.new_mean, b, work.mean), own_rows(args.new_cov, b, work.cov)};
    Memory<T> memory{rows_of(args.mean, b, work.mean), rows_of(args.cov, b, work.cov)};
    const int64_t most = smaller(kChunk, args.T_);
    const Matrix<T> weights = take_matrix<T>(arena, most, args.K), values = take_matrix<T>(arena, most, args.C);
    Upcoming upcoming = upcoming_memory(args, b + 1, end);
    Status status = symmetry(memory.cov);
    double log_evidence = 0;  // a sum over all patterns
    const Arena::Mark chunk_start = arena.mark();
    for (int64_t first = 0; first < args.T_; first += kChunk) {
      arena.release(chunk_start);
      const int64_t count = smaller(kChunk, args.T_ - first);
      const Matrix<T> chunk_weights = patterns_of(args.weights, args, b, first, weights.rows_from(0, count));
      const Matrix<T> chunk_values = patterns_of(args.values, args, b, first, values.rows_from(0, count));
      const Chunk<T> chunk = whiten(memory, chunk_weights, chunk_values, args, b, first, arena, &upcoming);
      const Memory<T>& after = first + count < args.T_ ? work : result;
      const Status done = condition(memory, chunk, after, args, b, first, log_evidence, &upcoming);
      memory = after;
      if (status == kGood) status = done;
    }
    store_memory(memory, args, b);
    args.log_evidence[b] = static_cast<T>(log_evidence);
    args.info[b] = status;
  }
}

}  // namespace fastkm::FASTKM_LEVEL
