// Backward of the posterior update: the block form differentiated, chunk by chunk from the last to the first.
#pragma once

#include "cpu/posterior/conditioning_backward.h"

namespace fastkm::FASTKM_LEVEL {

// What is still to be touched of a memory, and of the next, where both fit the cache.
template <class Real>
Prefetch plan_gradient_prefetch(const PosteriorArgs<Real>& args, const PosteriorGrads<Real>& grads, int64_t b,
                                int64_t end) {
  constexpr int64_t kMostBytes = 1 << 20;
  const int64_t K = args.K, C = args.C, patterns = args.T_, rows = FASTKM_TILE_ROWS;
  const int64_t tiles = (4 * K + C) / rows + (K + C) / rows * strips<Real>(K);
  Prefetch prefetch(1 + (patterns + kBackwardChunk - 1) / kBackwardChunk * tiles);
  if ((3 * K + 2 * patterns) * (K + C) * static_cast<int64_t>(sizeof(Real)) > kMostBytes) return prefetch;
  prefetch.add(grads.to_weights, b, 0, patterns, K);
  prefetch.add(grads.to_values, b, 0, patterns, C);
  prefetch.add(grads.to_mean, b, 0, K, C);
  prefetch.add(grads.to_cov, b, 0, K, K);
  if (b + 1 == end) return prefetch;
  prefetch.add(grads.mean, b + 1, 0, K, C);
  prefetch.add(grads.cov, b + 1, 0, K, K);
  prefetch.add(args.weights, b + 1, 0, patterns, K);
  prefetch.add(args.values, b + 1, 0, patterns, C);
  prefetch.add(args.mean, b + 1, 0, K, C);
  prefetch.add(args.cov, b + 1, 0, K, K);
  return prefetch;
}

template <class Real>
void update_posterior_backward(const PosteriorArgs<Real>& args, const PosteriorGrads<Real>& grads, int64_t begin,
                               int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const MemoryColumns<Real> grad = allocate_memory_columns(args, arena);
    load_cotangents(grad, grads, b);
    Prefetch prefetch = plan_gradient_prefetch(args, grads, b, end);
    reverse_chunks(args, kBackwardChunk, b, arena,
                   [&](const MemoryView<Real>& state, const WhitenedColumns<Real>& chunk, int64_t first) {
                     const ChunkCotangents<Real> bar =
                         condition_backward(state, grad, chunk, args, grads, b, first, arena, &prefetch);
                     store_patterns(grads.to_weights, bar.weights, args, b, first);
                     store_patterns(grads.to_values, bar.values, args, b, first);
                     for (int64_t t = 0; t < chunk.count(); ++t) *grads.to_noise_var.at(b, first + t) = bar.noise[t];
                   });
    store_cotangents(grads, b, grad);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
