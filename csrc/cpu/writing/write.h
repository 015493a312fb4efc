// The write: find the weights of a chunk of patterns in Gram space, then condition on all of them at once.
//
// Each pattern's weights depend on what was written before it, but only through inner products. With A = R Rᵀ + λI,
// X = Z Rᵀ and Q = Z Zᵀ the search lives in K and T; the codes themselves are needed twice a chunk, for one Gram
// product before it and for the block update after it. Starting each chunk from the mean itself keeps the cost linear
// in T, and keeps rounding from adding up over a long stream.
#pragma once

#include "cpu/posterior/conditioning.h"
#include "cpu/writing/search.h"
#include "cpu/writing/search_refactored.h"

namespace fastkm::FASTKM_LEVEL {

// What conditioning on the weights of a search needs is known from it: with L̃ the c_earlier · w_t and a unit diagonal,
// S = L Lᵀ for L = L̃ diag(√s), and G = L⁻¹ W U has the rows a/√s.
template <class Real>
WhitenedRows<Real> whiten_from_search(const MemoryRows<Real>& memory, const Search<Real>& search, int64_t from,
                                      const Matrix<Real>& weights, const Matrix<Real>& values,
                                      const PosteriorArgs<Real>& args, int64_t b, int64_t first, Arena& arena) {
  const int64_t count = weights.rows;
  WhitenedRows<Real> chunk = allocate_whitened_rows(args, count, arena);
  const Factor<Real> factor = allocate_factor<Real>(arena, count);
  Real root[kChunk];
  for (int64_t t = 0; t < count; ++t) {
    const Real noise = chunk.noise[t] = *args.noise_var.at(b, first + t);
    Real s = args.unmasked(b, first + t) ? search.s[from + t] : noise;
    const Real slack = rounding_slack(args.K, count, s);
    chunk.good &= check_pivot(s, PivotFloors<Real>{&noise, &slack}, 0);
    chunk.pivot[t] = s;
    root[t] = std::sqrt(s);
    const Real reciprocal = 1 / root[t];
    Real *lower = factor.lower.row(t), *gain = chunk.gain.row(t);
    const Real *past = search.past.row(from + t) + from, *a = search.cov.right.row(from + t);
    for (int64_t j = 0; j < t; ++j) lower[j] = past[j] * root[j];
    lower[t] = root[t];
    for (int64_t k = 0; k < chunk.gain.ld; ++k) gain[k] = a[k] * reciprocal;
  }
  invert_block(factor);
  whiten_values(chunk, factor, memory.mean, weights, values, arena);
  return chunk;
}

// Find the weights of a chunk of patterns, which stand below the mean in `stacked`, and condition on them.
template <class Real>
Status write_chunk(const WritingArgs<Real>& args, const MemoryRows<Real>& memory, const Matrix<Real>& stacked,
                   const Matrix<Real>& weights, int64_t b, int64_t first, double& log_evidence, Arena& arena) {
  const PosteriorArgs<Real>& shared = args.posterior;
  const int64_t count = weights.rows;
  const bool once = factors_once(args);
  const GramSpace<Real> space = compute_gram_space(memory, stacked, weights, !once, arena);
  Search<Real> search = once ? allocate_search(space, arena) : Search<Real>{};
  Status status =
      once ? find_weights(space, args, b, first, search, arena) : find_weights_refactored(space, args, b, first, arena);
  const Arena::Mark searched = arena.mark();
  for (int64_t t = 0; t < count; t += kChunk) {
    arena.release(searched);
    const int64_t now = smaller(kChunk, count - t);
    const Matrix<Real> found = weights.rows_from(t, now), values = stacked.rows_from(args.posterior.K + t, now);
    const WhitenedRows<Real> chunk =
        once ? whiten_from_search(memory, search, t, found, values, shared, b, first + t, arena)
             : whiten_rows(memory, found, values, shared, b, first + t, arena);
    const Status updated = condition(memory, chunk, memory, shared, b, first + t, log_evidence);
    status = status > updated ? status : updated;
  }
  return status;
}

template <class Real>
void write(const WritingArgs<Real>& args, int64_t begin, int64_t end) {
  const PosteriorArgs<Real>& shared = args.posterior;
  const int64_t K = shared.K, size = search_chunk(K), most = smaller(size, shared.T_);
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Matrix<Real> stacked = allocate_matrix<Real>(arena, K + most, shared.C),
                       all_weights = allocate_matrix<Real>(arena, most, K);
    const MemoryRows<Real> memory{stacked.rows_from(0, K), allocate_matrix<Real>(arena, K, K)};
    Status status = load_memory(memory, shared, b);
    double log_evidence = 0;
    const Arena::Mark chunk_start = arena.mark();
    for (int64_t first = 0; first < shared.T_; first += size) {
      arena.release(chunk_start);
      const int64_t count = smaller(size, shared.T_ - first);
      const Matrix<Real> weights = all_weights.rows_from(0, count);
      load_patterns(stacked.rows_from(K, count), shared.values, shared, b, first);
      const Matrix<Real> both = stacked.rows_from(0, K + count);
      const Status done = write_chunk(args, memory, both, weights, b, first, log_evidence, arena);
      store_matrix(args.new_weights.from_row(first), b, weights);
      if (status == kGood) status = done;
    }
    store_memory(memory, shared, b);
    shared.info[b] = status;
  }
}

}  // namespace fastkm::FASTKM_LEVEL
