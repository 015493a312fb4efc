// Backward of a removal: that of an update of −U, by equations (1) to (4) of conditioning_backward.h. The covariance
// and its cotangent change sign on the way in, and the cotangent again on the way out.
#pragma once

#include "cpu/posterior/conditioning_backward.h"
#include "cpu/posterior/in_double.h"

namespace fastkm::FASTKM_LEVEL {

// Memory `b`. One that is to be computed again is left half way.
template <class Real>
Status remove_backward_one(const PosteriorArgs<Real>& args, const PosteriorGrads<Real>& grads, int64_t b,
                           const Limits<Real>& limits) {
  // Bring in.
  Arena& arena = Arena::fresh();
  const MemoryColumns<Real> grad = allocate_memory_columns<Real>(args.K, args.C, arena);
  load_cotangents(grad, grads, b);
  scale(grad.cov, Real(-1));
  const Episode<Real> episode = load_episode(args, grads, b, smaller(kLargestBackwardChunk, limits.chunk), true, arena);
  if (episode.count > 0) scale(episode.memories[0].cov, Real(-1));

  // Compute, and put out what belongs to a chunk.
  const Status status = whiten_episode<Direction::kOut>(episode, limits, arena);
  if (limits.again(status)) return status;
  for (int64_t n = episode.count - 1; n >= 0; --n) {
    arena.release(episode.end);
    const ChunkColumns<Real>& chunk = episode.chunks[n];
    const ChunkCotangents<Real> to = condition_backward(grad, episode.before(n), chunk, episode.whitened[n], arena);
    const int64_t first = n * episode.size;
    store_patterns(grads.to_weights.from_row(first), b, to.weights, chunk.observed.unmasked);
    store_patterns(grads.to_values.from_row(first), b, to.values, chunk.observed.unmasked);
    for (int64_t t = 0; t < chunk.count(); ++t) *grads.to_noise_var.at(b, first + t) = to.noise[t];
  }

  // Put out what belongs to the memory.
  scale(grad.cov, Real(-1));
  store_cotangents(grads, b, grad);
  return status;
}

template <class Real>
void remove_patterns_backward(const PosteriorArgs<Real>& args, const PosteriorGrads<Real>& grads, int64_t begin,
                              int64_t end) {
  const Limits<Real> limits = limits_of_gradient<Real>(args.K, args.C);
  for (int64_t b = begin; b < end; ++b) {
    const Status status = remove_backward_one(args, grads, b, limits);
    if constexpr (kHasDouble<Real>) {
      if (!limits.again(status)) continue;
      Doubles doubles(b);
      const PosteriorArgs<double> wide = in_double(args, doubles);
      const PosteriorGrads<double> wide_grads = in_double(args, grads, doubles);
      complete_in_double([&](const Limits<double>& least) { return remove_backward_one(wide, wide_grads, 0, least); });
      doubles.put_out();
    }
  }
}

}  // namespace fastkm::FASTKM_LEVEL
