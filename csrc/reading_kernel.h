// Addressing and reading: factor a memory once, then solve for any number of queries without leaving K.
#pragma once

#include "dense.h"

namespace fastkm::FASTKM_LEVEL {

// One memory's factor as it lies in a flat buffer between the two phases.
template <class T>
struct FactoredMemory {
  Factor<T> factor;            // of A = G + λI, or of G² + λI
  Matrix<T> lower_transposed;  // [K, K]
  Matrix<T> mean;              // R [K, C]
  Matrix<T> mean_transposed;   // Rᵀ [C, K]
  Matrix<T> gram;              // G [K, K], used by the squared-Gram solve
};

template <class T>
FactoredMemory<T> lay_out(T* at, int64_t K, int64_t C) {
  const auto matrix = [&at](int64_t rows, int64_t columns) {
    const Matrix<T> m{at, rows, columns, row_stride<T>(columns)};
    at += rows * m.ld;
    return m;
  };
  const auto blocks = [&at, K] {
    T* start = at;
    at += round_up(K, kBlock) * kBlock;
    return start;
  };
  const Matrix<T> lower = matrix(K, K);
  T* inverse = blocks();
  T* inverse_transposed = blocks();
  const Matrix<T> lower_transposed = matrix(K, K), mean = matrix(K, C), mean_transposed = matrix(C, K);
  return {{lower, inverse, inverse_transposed}, lower_transposed, mean, mean_transposed, matrix(K, K)};
}

template <class T>
int64_t factor_size(int64_t K, int64_t C) {
  return K * (3 * row_stride<T>(K) + row_stride<T>(C)) + C * row_stride<T>(K) + 2 * round_up(K, kBlock) * kBlock;
}

// a ← G + λI, or G² + λI, ready to be factored.
template <class T>
void regularised(const Matrix<T>& a, const Matrix<T>& gram, T ridge, bool squared) {
  if (squared)
    product_lower<Into::kSet>(a, gram.rows, left(gram), gram);
  else
    for (int64_t i = 0; i < a.rows; ++i)
      __builtin_memcpy(a.row(i), gram.row(i), static_cast<size_t>(a.columns) * sizeof(T));
  for (int64_t i = 0; i < a.rows; ++i) a.row(i)[i] += ridge;
}

template <class T>
void factor_memory(const ReadingArgs<T>& args, T* factors, int64_t begin, int64_t end) {
  Arena& arena = Arena::of_this_thread();
  for (int64_t b = begin; b < end; ++b) {
    arena.reset();
    const FactoredMemory<T> memory = lay_out(factors + b * factor_size<T>(args.K, args.C), args.K, args.C);
    load_matrix(memory.mean, args.mean, b);
    transpose(memory.mean_transposed, memory.mean);
    product_lower<Into::kSet>(memory.gram, args.C, left(memory.mean), memory.mean_transposed);
    mirror(memory.gram);
    regularised(memory.factor.lower, memory.gram, *args.ridge.at(b), args.squared_gram);
    args.info[b] = cholesky(memory.factor, arena) ? kGood : kNotPositiveDefinite;
    transpose(memory.lower_transposed, memory.factor.lower);
  }
}

// Tile i holds queries [i mod tiles) of memory i div tiles; rows are queries, so nothing is transposed.
template <class T>
void read_tiles(const ReadingArgs<T>& args, const T* factors, int64_t begin, int64_t end) {
  Arena& arena = Arena::of_this_thread();
  const int64_t tiles = (args.Q + kQueryTile - 1) / kQueryTile;
  for (int64_t i = begin; i < end; ++i) {
    arena.reset();
    const int64_t b = i / tiles, first = i % tiles * kQueryTile, count = smaller(kQueryTile, args.Q - first);
    const FactoredMemory<T> memory =
        lay_out(const_cast<T*>(factors) + b * factor_size<T>(args.K, args.C), args.K, args.C);
    const Matrix<T> queries = take_matrix<T>(arena, count, args.C), weights = take_matrix<T>(arena, count, args.K);
    const Matrix<T> next = take_matrix<T>(arena, count, args.K), work = take_matrix<T>(arena, count, kBlock);

    // Address: w₁ = A⁻¹ R z, with G R z in place of R z for the squared-Gram solve.
    Batch<const T> from = args.queries;
    from.data = from.at(0, first);
    load_matrix(queries, from, b);
    product<Into::kSet>(weights, args.C, left(queries), memory.mean_transposed);
    if (args.squared_gram) {
      product<Into::kSet>(next, args.K, left(weights), memory.gram);
      copy_rows(weights, next);
    }
    solve_rows(memory.factor, memory.lower_transposed, weights, work);

    // Iterate: w ← w − λ A⁻¹ w.
    const T ridge = *args.ridge.at(b);
    for (int64_t n = 1; n < args.num_iters; ++n) {
      copy_rows(next, weights);
      solve_rows(memory.factor, memory.lower_transposed, next, work);
      for (int64_t q = 0; q < count; ++q)
        for (int64_t k = 0; k < args.K; ++k) weights.row(q)[k] -= ridge * next.row(q)[k];
    }

    // Decode: ẑ = Rᵀ w.
    Batch<T> to = args.weights;
    to.data = to.at(0, first);
    store_matrix(to, b, weights);
    if (!args.values.data) continue;
    product<Into::kSet>(queries, args.K, left(weights), memory.mean);
    to = args.values;
    to.data = to.at(0, first);
    store_matrix(to, b, queries);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
