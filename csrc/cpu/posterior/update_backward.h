// Backward of the posterior update: equations (1) to (4) of conditioning_backward.h, from the last chunk to the first.
#pragma once

#include "cpu/posterior/conditioning_backward.h"
#include "cpu/posterior/in_double.h"

namespace fastkm::FASTKM_LEVEL {

// Patterns of a chunk. The backward passes over the state more often than the update, so its chunks are larger.
constexpr int64_t kUpdateBackwardChunk = kLargestBackwardChunk;

// Prefetch the results of a memory and the arguments of the next, if both fit the cache.
template <class Real>
Prefetch plan_gradient_prefetch(const PosteriorArgs<Real>& args, const PosteriorGrads<Real>& grads, int64_t b,
                                int64_t end) {
  constexpr int64_t kMostBytes = 1 << 20;
  const int64_t K = args.K, C = args.C, patterns = args.T, rows = FASTKM_TILE_ROWS;
  const int64_t tiles = (4 * K + C) / rows + (K + C) / rows * strips<Real>(K);
  Prefetch prefetch(1 + (patterns + kUpdateBackwardChunk - 1) / kUpdateBackwardChunk * tiles);
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

// Memory `b` of a batch that ends at `end`. One that is to be computed again is left half way.
template <class Real>
Status update_backward_one(const PosteriorArgs<Real>& args, const PosteriorGrads<Real>& grads, int64_t b, int64_t end,
                           const Limits<Real>& limits) {
  // Bring in.
  Arena& arena = Arena::fresh();
  const MemoryColumns<Real> grad = allocate_memory_columns<Real>(args.K, args.C, arena);
  load_cotangents(grad, grads, b);
  const int64_t size = smaller(kUpdateBackwardChunk, limits.chunk);
  const Episode<Real> episode = load_episode(args, grads, b, size, false, arena);
  Prefetch prefetch = plan_gradient_prefetch(args, grads, b, end);

  // Compute, and put out what belongs to a chunk.
  const Status status = whiten_episode(episode, limits, arena);
  if (limits.again(status)) return status;
  for (int64_t n = episode.count - 1; n >= 0; --n) {
    arena.release(episode.end);
    const ChunkColumns<Real>& chunk = episode.chunks[n];
    const ChunkCotangents<Real> to =
        condition_backward(grad, episode.before(n), chunk, episode.whitened[n], arena, &prefetch);
    const int64_t first = n * episode.size;
    store_patterns(grads.to_weights.from_row(first), b, to.weights, chunk.observed.unmasked);
    store_patterns(grads.to_values.from_row(first), b, to.values, chunk.observed.unmasked);
    for (int64_t t = 0; t < chunk.count(); ++t) *grads.to_noise_var.at(b, first + t) = to.noise[t];
  }

  // Put out what belongs to the memory.
  store_cotangents(grads, b, grad);
  return status;
}

template <class Real>
void update_posterior_backward(const PosteriorArgs<Real>& args, const PosteriorGrads<Real>& grads, int64_t begin,
                               int64_t end) {
  const Limits<Real> limits = limits_of_gradient<Real>(args.K, args.C);
  for (int64_t b = begin; b < end; ++b) {
    const Status status = update_backward_one(args, grads, b, end, limits);
    if constexpr (kHasDouble<Real>) {
      if (!limits.again(status)) continue;
      Doubles doubles(b);
      const PosteriorArgs<double> wide = in_double(args, doubles);
      const PosteriorGrads<double> wide_grads = in_double(args, grads, doubles);
      complete_in_double(
          [&](const Limits<double>& least) { return update_backward_one(wide, wide_grads, 0, 1, least); });
      doubles.put_out();
    }
  }
}

}  // namespace fastkm::FASTKM_LEVEL
