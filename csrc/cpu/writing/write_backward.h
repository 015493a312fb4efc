// Backward of the write: through the block update to the weights, then back through the search that found them.
//
// The search is undone pattern by pattern in K and T. Its cotangents of G, X and Q become those of the codes in one
// product at the end of a chunk.
#pragma once

#include "cpu/posterior/conditioning_backward.h"
#include "cpu/writing/search_backward.h"
#include "cpu/writing/search_refactored_backward.h"

namespace fastkm::FASTKM_LEVEL {

// P̄ + P̄ᵀ from the cotangents of G, X and Q, the parts of P = Y Yᵀ with Y = [R; Z].
template <class Real>
Matrix<Real> symmetric_cotangent(const SearchCotangents<Real>& bar, Arena& arena) {
  const int64_t K = bar.gram.rows, count = bar.cross.rows, both = K + count;
  const Matrix<Real> doubled = allocate_matrix<Real>(arena, both, both);
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j < K; ++j) doubled.row(i)[j] = 2 * bar.gram.row(i)[j];
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t k = 0; k < K; ++k) doubled.row(K + t)[k] = doubled.row(k)[K + t] = bar.cross.row(t)[k];
    for (int64_t j = 0; j < t; ++j) doubled.row(K + t)[K + j] = doubled.row(K + j)[K + t] = bar.inner.row(t)[j];
    doubled.row(K + t)[K + t] = 2 * bar.inner.row(t)[t];
  }
  return doubled;
}

// Cotangents of a chunk as the search is undone, its patterns for rows.
template <class Real>
struct RowCotangents {
  Matrix<Real> weights, values;  // [t, K], [t, C]
  Real* noise;                   // [t]
};

// Reverse of address_chunk: adds what the weights' cotangents say of the memory before the chunk and of its patterns.
template <class Real>
void address_chunk_backward(const WritingArgs<Real>& args, const MemoryView<Real>& state,
                            const MemoryColumns<Real>& grad, int64_t b, int64_t first, const RowCotangents<Real>& bar,
                            Real& ridge_bar, Arena& arena) {
  const int64_t K = args.posterior.K, C = args.posterior.C, count = bar.weights.rows;
  const Matrix<Real> stacked = allocate_matrix<Real>(arena, K + count, C);
  const MemoryRows<Real> memory{stacked.rows_from(0, K), allocate_matrix<Real>(arena, K, K)};
  load_mean(memory.mean, state);
  load_matrix(memory.cov, state.cov, 0);
  load_patterns(stacked.rows_from(K, count), args.posterior.values, args.posterior, b, first);
  const GramSpace<Real> space =
      compute_gram_space(memory, stacked, allocate_matrix<Real>(arena, count, K), !factors_once(args), arena);
  SearchCotangents<Real> search{.weights = bar.weights,
                                .gram = allocate_zero<Real>(arena, K, K),
                                .cross = allocate_zero<Real>(arena, count, K),
                                .inner = allocate_zero<Real>(arena, count, count),
                                .cov = allocate_zero<Real>(arena, K, K),
                                .noise = bar.noise};
  if (factors_once(args)) {
    Search<Real> made = allocate_search(space, arena);
    find_weights(space, args, b, first, made, arena);
    find_weights_backward(space, made, args, b, first, search, arena);
  } else {
    RefactoringTape<Real> tape = allocate_tape<Real>(K, count, arena);
    find_weights_refactored(space, args, b, first, arena, &tape);
    find_weights_refactored_backward(space, tape, args, b, first, search, arena);
  }
  // Ȳ = (P̄ + P̄ᵀ) Y
  const Matrix<Real> doubled = symmetric_cotangent(search, arena);
  product<Into::kAdd>(grad.mean, K + count, transposed(stacked), doubled.block(0, K + count, 0, K));
  product<Into::kAdd>(bar.values, K + count, operand(doubled.rows_from(K, count)), stacked);
  for (int64_t k = 0; k < K; ++k) add_scaled(round_up(K, kLanes<Real>), grad.cov.row(k), Real(1), search.cov.row(k));
  ridge_bar += search.ridge;
}

template <class Real>
void write_backward(const WritingArgs<Real>& args, const WritingGrads<Real>& grads, int64_t begin, int64_t end) {
  const PosteriorArgs<Real>& shared = args.posterior;
  const PosteriorGrads<Real>& told = grads.posterior;
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const MemoryColumns<Real> grad = allocate_memory_columns(shared, arena);
    load_cotangents(grad, told, b);
    Real ridge_bar = 0;
    reverse_chunks(shared, kChunk, b, arena,
                   [&](const MemoryView<Real>& state, const WhitenedColumns<Real>& chunk, int64_t first) {
                     const int64_t count = chunk.count();
                     ChunkCotangents<Real> columns =
                         condition_backward(state, grad, chunk, shared, told, b, first, arena);
                     const RowCotangents<Real> bar{allocate_matrix<Real>(arena, count, shared.K),
                                                   transposed_copy(columns.values, arena), columns.noise};
                     load_or_zero(bar.weights, grads.weights.data ? grads.weights.from_row(first) : grads.weights, b);
                     add_rows(bar.weights, transposed_copy(columns.weights, arena));
                     address_chunk_backward(args, state, grad, b, first, bar, ridge_bar, arena);
                     store_matrix(told.to_values.from_row(first), b, bar.values);
                     clear_masked(told.to_values, shared.C, shared, b, first, count);
                     for (int64_t t = 0; t < count; ++t) *told.to_noise_var.at(b, first + t) = bar.noise[t];
                   });
    store_cotangents(told, b, grad);
    *grads.to_ridge.at(b) = ridge_bar;
  }
}

}  // namespace fastkm::FASTKM_LEVEL
