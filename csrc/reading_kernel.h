// Addressing and reading: factor a memory once, then solve for any number of queries without leaving K.
#pragma once

#include "dense.h"

namespace fastkm::FASTKM_LEVEL {

// Everything a query needs of a memory.
template <class T>
struct FactoredMemory {
  Factor<T> factor;            // of A = G + λI, or of G² + λI, with G = R Rᵀ
  Matrix<T> lower_transposed;  // [K, K]
  Matrix<T> mean;              // R [K, C]
  Matrix<T> mean_transposed;   // Rᵀ [C, K]
  Matrix<T> gram;              // G [K, K], of no rows unless the solve is the squared-Gram one
};

// Lay a factored memory out in `take(count)`, which hands out space one piece after the other.
template <class T, class Take>
FactoredMemory<T> lay_out(const ReadingArgs<T>& args, const Take& take) {
  const int64_t K = args.K, C = args.C, blocks = round_up(K, kBlock) * kBlock;
  const auto matrix = [&](int64_t rows, int64_t columns) {
    const int64_t ld = row_stride<T>(columns);
    return Matrix<T>{take(rows * ld), rows, columns, ld};
  };
  return {.factor = {.lower = matrix(K, K), .inverse = take(blocks), .inverse_transposed = take(blocks)},
          .lower_transposed = matrix(K, K),
          .mean = matrix(K, C),
          .mean_transposed = matrix(C, K),
          .gram = matrix(args.squared_gram ? K : 0, K)};
}

template <class T>
FactoredMemory<T> lay_out(const ReadingArgs<T>& args, T* at) {
  return lay_out<T>(args, [&at](int64_t count) {
    T* piece = at;
    at += count;
    return piece;
  });
}

template <class T>
int64_t factor_size(const ReadingArgs<T>& args) {
  int64_t size = 0;
  lay_out<T>(args, [&size](int64_t count) {
    size += count;
    return static_cast<T*>(nullptr);
  });
  return size;
}

// a ← G + λI, or G² + λI, ready to be factored; `gram` may be `a` itself.
template <class T>
void regularise(const Matrix<T>& a, const Matrix<T>& gram, T ridge, bool squared) {
  if (squared)
    product_lower<Into::kSet>(a, gram.rows, left(gram), gram);
  else if (a.data != gram.data)
    copy_rows(a, gram);
  for (int64_t i = 0; i < a.rows; ++i) a.row(i)[i] += ridge;
}

template <class T>
void factor_memory(const ReadingArgs<T>& args, int64_t b, const FactoredMemory<T>& memory, Arena& arena) {
  load_matrix(memory.mean, args.mean, b);
  transpose(memory.mean_transposed, memory.mean);
  const Matrix<T>& gram = args.squared_gram ? memory.gram : memory.factor.lower;
  product_lower<Into::kSet>(gram, args.C, left(memory.mean), memory.mean_transposed);
  if (args.squared_gram) mirror(gram);
  regularise(memory.factor.lower, gram, *args.ridge.at(b), args.squared_gram);
  args.info[b] = cholesky(memory.factor, arena) ? kGood : kNotPositiveDefinite;
  transpose(memory.lower_transposed, memory.factor.lower);
}

// Answer queries [first, first + kQueryTile) of memory b; rows are queries, so nothing is transposed.
template <class T>
void read_tile(const ReadingArgs<T>& args, int64_t b, int64_t first, const FactoredMemory<T>& memory, Arena& arena) {
  const int64_t count = smaller(kQueryTile, args.Q - first);
  const Matrix<T> queries = take_matrix<T>(arena, count, args.C), weights = take_matrix<T>(arena, count, args.K);
  const Matrix<T> next = take_matrix<T>(arena, count, args.K), work = take_matrix<T>(arena, count, kBlock);

  // Address: w₁ = A⁻¹ R z, with G R z in place of R z for the squared-Gram solve.
  load_matrix(queries, args.queries.from_row(first), b);
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
  store_matrix(args.weights.from_row(first), b, weights);
  if (!args.values.data) return;
  product<Into::kSet>(queries, args.K, left(weights), memory.mean);
  store_matrix(args.values.from_row(first), b, queries);
}

// Whole memories, each factored and read while it is in the cache.
template <class T>
void read_memories(const ReadingArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const FactoredMemory<T> memory = lay_out<T>(args, [&](int64_t count) { return arena.take<T>(count); });
    factor_memory(args, b, memory, arena);
    const Arena::Mark tile_start = arena.mark();
    for (int64_t first = 0; first < args.Q; first += kQueryTile) {
      arena.release(tile_start);
      read_tile(args, b, first, memory, arena);
    }
  }
}

// The same in two phases, for fewer memories than threads: factors into `factors`, then tiles of queries from it.
template <class T>
void factor_memories(const ReadingArgs<T>& args, T* factors, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    factor_memory(args, b, lay_out(args, factors + b * factor_size(args)), Arena::fresh());
}

template <class T>
void read_tiles(const ReadingArgs<T>& args, T* factors, int64_t begin, int64_t end) {
  const int64_t tiles = (args.Q + kQueryTile - 1) / kQueryTile;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / tiles;
    read_tile(args, b, i % tiles * kQueryTile, lay_out(args, factors + b * factor_size(args)), Arena::fresh());
  }
}

}  // namespace fastkm::FASTKM_LEVEL
