// Backward of the write: through the block update to the weights, then through the search that found them.
//
// Patterns and the rows of the mean are columns from the first load to the last store, as in
// posterior/conditioning_backward.h. For a chunk, from the last to the first:
//   (1)  condition_backward: the cotangents of the memory before the chunk, of Z, and of W
//   (2)  G = R Rᵀ, X = Z Rᵀ, Q = Z Zᵀ, and the search replayed with the weights that it found
//   (3)  the search backward, in K and t: from W̄ to Ḡ, X̄, Q̄, Ū, and those of σ² and λ
//   (4)  R̄ᵀ += Rᵀ (2 Ḡ) + Zᵀ X̄,  Z̄ᵀ += Rᵀ X̄ᵀ + Zᵀ (Q̄ + Q̄ᵀ).
// A chunk costs about 8 t K C + 6 t K² operations for (1), K² C + K³ for (2), 16 t K² for the search in (2) and (3),
// and 2 K² C + 4 t K C for (4).
//
// A memory without a factor has no gradient: its cotangents are NaN.
#pragma once

#include <utility>

#include "cpu/posterior/conditioning_backward.h"
#include "cpu/posterior/in_double.h"
#include "cpu/writing/search_backward.h"
#include "cpu/writing/search_refactored_backward.h"
#include "cpu/writing/write.h"

namespace fastkm::FASTKM_LEVEL {

// (2) from columns. With `owns`, U is a copy, because the search that factors anew changes it.
template <class Real>
GramSpace<Real> compute_gram_space(const MemoryColumns<Real>& memory, const Matrix<Real>& values, bool owns,
                                   Arena& arena) {
  const int64_t K = memory.cov.rows, C = memory.mean.rows, count = values.columns;
  const GramSpace<Real> space{.gram = allocate_matrix<Real>(arena, K, K),
                              .cross = allocate_matrix<Real>(arena, count, K),
                              .inner = allocate_matrix<Real>(arena, count, count),
                              .cov = owns ? allocate_matrix<Real>(arena, K, K) : memory.cov};
  product_lower<Into::kSet>(space.gram, C, transposed(memory.mean), memory.mean);
  mirror(space.gram);
  product<Into::kSet>(space.cross, C, transposed(values), memory.mean);
  product_lower<Into::kSet>(space.inner, C, transposed(values), values);
  if (owns) copy_rows(space.cov, memory.cov);
  for (const Matrix<Real>* m : {&space.gram, &space.cross, &space.cov}) clear_padding(*m);
  return space;
}

// (4), which adds to the cotangents of the mean and of the chunk's values. Ḡ and Q̄ are overwritten.
template <class Real>
void gram_space_backward(const MemoryColumns<Real>& grad, const Matrix<Real>& grad_values,
                         const MemoryColumns<Real>& memory, const Matrix<Real>& values,
                         const SearchCotangents<Real>& grads, Arena& arena) {
  const int64_t K = memory.cov.rows, count = values.columns;
  scale(grads.gram, Real(2));
  for (int64_t i = 0; i < count; ++i) {
    grads.inner.row(i)[i] *= 2;
    for (int64_t j = 0; j < i; ++j) grads.inner.row(j)[i] = grads.inner.row(i)[j];
  }
  product<Into::kAdd>(grad.mean, K, operand(memory.mean), grads.gram);
  product<Into::kAdd>(grad.mean, count, operand(values), grads.cross);
  product<Into::kAdd>(grad_values, K, operand(memory.mean), transposed_copy(grads.cross, arena));
  product<Into::kAdd>(grad_values, count, operand(values), grads.inner);
}

// (2), (3) and (4) of one chunk. `to` has the cotangents of its values and noise variances, which are added to;
// `grad_weights` [t, K] are those of its weights; `grad` are those of the memory before the chunk, which are added to.
// Returns the status of the search and what the chunk adds to the cotangent of λ.
template <class Real>
std::pair<Status, Real> search_chunk_backward(const MemoryColumns<Real>& grad, ChunkCotangents<Real>& to,
                                              const Matrix<Real>& grad_weights, const MemoryColumns<Real>& memory,
                                              const ChunkColumns<Real>& chunk, const WhitenedColumns<Real>& whitened,
                                              const SearchSettings<Real>& settings, Arena& arena) {
  const int64_t K = memory.cov.rows, count = chunk.count();
  const bool once = settings.factors_once();
  const GramSpace<Real> space = compute_gram_space(memory, chunk.values, !once, arena);
  SearchCotangents<Real> grads{.weights = grad_weights,
                               .gram = allocate_zero<Real>(arena, K, K),
                               .cross = allocate_zero<Real>(arena, count, K),
                               .inner = allocate_zero<Real>(arena, count, count),
                               .cov = allocate_zero<Real>(arena, K, K),
                               .noise = to.noise};
  if (once) {
    Search<Real> search = replay_search(space, chunk, whitened, settings, grads.status, arena);
    if (settings.limits.again(grads.status)) return {grads.status, 0};
    find_weights_backward(grads, space, search, chunk, settings.ridge, arena);
  } else {
    const WrittenChanges<Real> changes = replay_changes(space, chunk, arena);
    find_weights_refactored_backward(grads, space, changes, chunk, settings, arena);
    if (settings.limits.again(grads.status)) return {grads.status, 0};
  }
  gram_space_backward(grad, to.values, memory, chunk.values, grads, arena);
  add_rows(grad.cov, grads.cov);
  return {grads.status, grads.ridge};
}

// Memory `b`. One that is to be computed again is left half way.
template <class Real>
Status write_backward_one(const WritingArgs<Real>& args, const WritingGrads<Real>& grads, int64_t b,
                          const Limits<Real>& limits) {
  // Bring in.
  const PosteriorArgs<Real>& shared = args.posterior;
  const PosteriorGrads<Real>& out = grads.posterior;
  Arena& arena = Arena::fresh();
  const MemoryColumns<Real> grad = allocate_memory_columns<Real>(shared.K, shared.C, arena);
  load_cotangents(grad, out, b);
  const Matrix<Real> grad_weights = allocate_matrix<Real>(arena, shared.T, shared.K);
  load_or_zero(grad_weights, grads.weights, b);
  const SearchSettings<Real> settings = load_settings(args, b, limits);
  const Episode<Real> episode = load_episode(shared, out, b, smaller(kChunk, limits.chunk), true, arena);

  // Compute, and put out what belongs to a chunk.
  Real to_ridge = 0;
  Status status = whiten_episode(episode, limits, arena);
  if (limits.again(status)) return status;
  for (int64_t n = episode.count - 1; n >= 0; --n) {
    arena.release(episode.end);
    const ChunkColumns<Real>& chunk = episode.chunks[n];
    const WhitenedColumns<Real>& whitened = episode.whitened[n];
    const int64_t first = n * episode.size, count = chunk.count();
    ChunkCotangents<Real> to = condition_backward(grad, episode.before(n), chunk, whitened, arena);
    const Matrix<Real> chunk_weights = grad_weights.rows_from(first, count);
    add_rows(chunk_weights, transposed_copy(to.weights, arena));
    const auto [searched, of_ridge] =
        search_chunk_backward(grad, to, chunk_weights, episode.memories[n], chunk, whitened, settings, arena);
    if (limits.again(searched)) return searched;
    to_ridge += of_ridge;
    store_patterns(out.to_values.from_row(first), b, to.values, chunk.observed.unmasked);
    for (int64_t t = 0; t < count; ++t) *out.to_noise_var.at(b, first + t) = to.noise[t];
  }

  // Put out what belongs to the memory.
  store_cotangents(out, b, grad);
  *grads.to_ridge.at(b) = to_ridge;
  return status;
}

// The gradient of memory `b` in double. It is that at the weights which double finds: the rounded ones do not solve
// the system that the equations of the search are derived from.
inline void write_backward_in_double(const WritingArgs<float>& args, const WritingGrads<float>& grads, int64_t b) {
  const int64_t K = args.posterior.K, C = args.posterior.C, T = args.posterior.T;
  Doubles doubles(b);
  WritingArgs<double> wide = in_double(args, doubles);
  wide.posterior.new_mean = doubles.scratch(K, C);
  wide.posterior.new_cov = doubles.scratch(K, K);
  wide.posterior.innovation_var = doubles.scratch(T, 1);
  wide.posterior.kl = doubles.scratch(T, 1);
  wide.new_weights = doubles.scratch(T, K);
  complete_in_double([&](const Limits<double>& limits) { return write_one(wide, 0, limits); });
  const Batch<double>& found = wide.new_weights;
  wide.posterior.weights = {found.data, {found.stride[0], found.stride[1], found.stride[2]}};
  const WritingGrads<double> wide_grads{.posterior = in_double(args.posterior, grads.posterior, doubles),
                                        .weights = doubles.argument(grads.weights, T, K),
                                        .to_ridge = doubles.result(grads.to_ridge, 1, 1)};
  complete_in_double([&](const Limits<double>& limits) { return write_backward_one(wide, wide_grads, 0, limits); });
  doubles.put_out();
}

template <class Real>
void write_backward(const WritingArgs<Real>& args, const WritingGrads<Real>& grads, int64_t begin, int64_t end) {
  const Limits<Real> limits = limits_of_gradient<Real>(args.posterior.K, args.posterior.C);
  for (int64_t b = begin; b < end; ++b) {
    const Status status = write_backward_one(args, grads, b, limits);
    if constexpr (kHasDouble<Real>)
      if (limits.again(status)) write_backward_in_double(args, grads, b);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
