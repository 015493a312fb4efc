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
template <class T>
Matrix<T> take_doubled(const SearchCotangents<T>& bar, Arena& arena) {
  const int64_t K = bar.gram.rows, count = bar.cross.rows, both = K + count;
  const Matrix<T> doubled = take_matrix<T>(arena, both, both);
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
template <class T>
struct RowCotangents {
  Matrix<T> weights, values;  // [t, K], [t, C]
  T* noise;                   // [t]
};

// Reverse of address_chunk: adds what the weights' cotangents say of the memory before the chunk and of its patterns.
template <class T>
void address_chunk_backward(const WritingArgs<T>& args, const State<T>& state, const Turned<T>& grad, int64_t b,
                            int64_t first, const RowCotangents<T>& bar, T& ridge_bar, Arena& arena) {
  const int64_t K = args.posterior.K, C = args.posterior.C, count = bar.weights.rows;
  const Matrix<T> stacked = take_matrix<T>(arena, K + count, C);
  const Memory<T> memory{stacked.rows_from(0, K), take_matrix<T>(arena, K, K)};
  load_mean(memory.mean, state);
  load_matrix(memory.cov, state.cov, 0);
  load_patterns(stacked.rows_from(K, count), args.posterior.values, args.posterior, b, first);
  const GramSpace<T> space =
      take_gram_space(memory, stacked, take_matrix<T>(arena, count, K), !factors_once(args), arena);
  SearchCotangents<T> search{.weights = bar.weights,
                             .gram = take_zero<T>(arena, K, K),
                             .cross = take_zero<T>(arena, count, K),
                             .inner = take_zero<T>(arena, count, count),
                             .cov = take_zero<T>(arena, K, K),
                             .noise = bar.noise};
  if (factors_once(args)) {
    Search<T> made = take_search(space, arena);
    find_weights(space, args, b, first, made, arena);
    find_weights_backward(space, made, args, b, first, search, arena);
  } else {
    AfreshTape<T> tape = take_afresh_tape<T>(K, count, arena);
    find_weights_afresh(space, args, b, first, arena, &tape);
    find_weights_afresh_backward(space, tape, args, b, first, search, arena);
  }
  // Ȳ = (P̄ + P̄ᵀ) Y
  const Matrix<T> doubled = take_doubled(search, arena);
  product<Into::kAdd>(grad.mean, K + count, transposed(stacked), doubled.block(0, K + count, 0, K));
  product<Into::kAdd>(bar.values, K + count, left(doubled.rows_from(K, count)), stacked);
  for (int64_t k = 0; k < K; ++k) add_scaled(round_up(K, kLanes<T>), grad.cov.row(k), T(1), search.cov.row(k));
  ridge_bar += search.ridge;
}

template <class T>
void write_backward(const WritingArgs<T>& args, const WritingGrads<T>& grads, int64_t begin, int64_t end) {
  const PosteriorArgs<T>& shared = args.posterior;
  const PosteriorGrads<T>& told = grads.posterior;
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Turned<T> grad = take_turned(shared, arena);
    load_cotangents(grad, told, b);
    T ridge_bar = 0;
    reverse_chunks(shared, kChunk, b, arena, [&](const State<T>& state, const Columns<T>& chunk, int64_t first) {
      const int64_t count = chunk.count();
      ChunkCotangents<T> columns = condition_backward(state, grad, chunk, shared, told, b, first, arena);
      const RowCotangents<T> bar{take_matrix<T>(arena, count, shared.K), take_transposed(columns.values, arena),
                                 columns.noise};
      load_or_zero(bar.weights, grads.weights.data ? grads.weights.from_row(first) : grads.weights, b);
      add_rows(bar.weights, take_transposed(columns.weights, arena));
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
