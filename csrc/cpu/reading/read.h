// Addressing and reading: factor a memory once, then solve for any number of queries in K.
//
// With A = R Rᵀ + λI, or (R Rᵀ)² + λI for the squared-Gram solve, a query z is answered by
//   (1)  w_1 = A⁻¹ R z, or A⁻¹ (R Rᵀ) R z
//   (2)  w_n+1 = w_n − λ A⁻¹ w_n, which is the same as addressing with the value read so far
//   (3)  ẑ = Rᵀ w_n.
// Where λ dominates A, λ A⁻¹ w_n is nearly w_n, and (2) keeps few digits of the difference. There the value read so far
// is addressed literally: w_n+1 = A⁻¹ R (Rᵀ w_n).
// Bytes: the memory, the queries and the results once. Operations: K² C + K³/3 a memory, 4 K C + 2 n K² a query.
//
// With many queries, (1) to (3) are folded into two products: w_n = (P R) z with P = H (I − λH)ⁿ⁻¹, H = A⁻¹. P is
// computed in double, because powers of a matrix lose digits that iterations keep.
#pragma once

#include <utility>

#include "cpu/linalg/codes.h"
#include "cpu/linalg/in_double.h"
#include "cpu/linalg/solve.h"
#include "cpu/linalg/symmetric.h"
#include "cpu/reading/lanes.h"

namespace fastkm::FASTKM_LEVEL {

// Whether there are enough queries that computing P costs less than it saves.
template <class Real>
bool folds(const ReadingArgs<Real>& args) {
  return args.Q >= 4 * (args.K + args.C) && !args.squared_gram;
}

// What a query needs of a memory.
template <class Real>
struct FactoredMemory {
  Factor<Real> factor;            // of A = G + λI, or of G² + λI, with G = R Rᵀ
  Matrix<Real> lower_transposed;  // [K, K]
  Matrix<Real> mean;              // R [K, C]
  Matrix<Real> mean_transposed;   // Rᵀ [C, K], or (P R)ᵀ
  Matrix<Real> gram;              // G [K, K], or no rows if the solve is not the squared-Gram one
  Real* largest;                  // of the diagonal of A; −1 if the queries have been answered in double
};

// Lay a factored memory out in pieces of memory; `allocate(count)` returns the next.
template <class Real, class Allocate>
FactoredMemory<Real> lay_out(const ReadingArgs<Real>& args, const Allocate& allocate) {
  const int64_t K = args.K, C = args.C, blocks = round_up(K, kBlock) * kBlock;
  const auto matrix = [&](int64_t rows, int64_t columns) {
    const int64_t ld = row_stride<Real>(columns);
    return Matrix<Real>{allocate(rows * ld), rows, columns, ld};
  };
  return {.factor = {.lower = matrix(K, K), .inverse = allocate(blocks), .inverse_transposed = allocate(blocks)},
          .lower_transposed = matrix(K, K),
          .mean = matrix(K, C),
          .mean_transposed = matrix(C, K),
          .gram = matrix(args.squared_gram ? K : 0, K),
          .largest = allocate(kBlock)};
}

template <class Real>
FactoredMemory<Real> lay_out(const ReadingArgs<Real>& args, Real* at) {
  return lay_out<Real>(args, [&at](int64_t count) {
    Real* piece = at;
    at += count;
    return piece;
  });
}

template <class Real>
int64_t factor_size(const ReadingArgs<Real>& args) {
  if (fits_lanes(args)) return 0;
  int64_t size = 0;
  lay_out<Real>(args, [&size](int64_t count) {
    size += count;
    return static_cast<Real*>(nullptr);
  });
  return size;
}

template <class Real>
Status factor_memory(const ReadingArgs<Real>& args, int64_t b, const FactoredMemory<Real>& memory,
                     const Limits<Real>& limits, Arena& arena) {
  load_matrix(memory.mean, args.mean, b);
  transpose(memory.mean_transposed, memory.mean);
  const Matrix<Real>& gram = args.squared_gram ? memory.gram : memory.factor.lower;
  product_lower<Into::kSet>(gram, args.C, operand(memory.mean), memory.mean_transposed);
  if (args.squared_gram) mirror(gram);
  regularise(memory.factor.lower, gram, *args.ridge.at(b), args.squared_gram);
  *memory.largest = largest_diagonal(memory.factor.lower);
  const bool good = cholesky(memory.factor, arena);
  transpose(memory.lower_transposed, memory.factor.lower);
  if (!good) return kNotPositiveDefinite;
  return well_conditioned(memory.factor, *memory.largest, limits) ? kGood : kInexactSystem;
}

// Whether λ dominates the system of memory `b`.
template <class Real>
bool is_dominated(const ReadingArgs<Real>& args, int64_t b, const FactoredMemory<Real>& memory) {
  return 2 * *args.ridge.at(b) > *memory.largest;
}

// y ← w G, or w G² for the squared-Gram solve, for the rows of a tile. `codes` [t, C] and `work` are overwritten.
template <class Real>
void multiply_gram(const Matrix<Real>& y, const Matrix<Real>& w, const FactoredMemory<Real>& memory,
                   const Matrix<Real>& codes, const Matrix<Real>& work) {
  const int64_t K = w.columns, C = codes.columns;
  const bool squared = memory.gram.rows > 0;
  product<Into::kSet>(codes, K, operand(w), memory.mean);
  product<Into::kSet>(squared ? work : y, C, operand(codes), memory.mean_transposed);
  if (squared) product<Into::kSet>(y, K, operand(work), memory.gram);
}

// memory.mean_transposed ← (P R)ᵀ
template <class Real>
void fold(const ReadingArgs<Real>& args, int64_t b, const FactoredMemory<Real>& memory, Arena& arena) {
  const int64_t K = args.K, C = args.C;
  const double ridge = *args.ridge.at(b);
  const Matrix<double> mean = allocate_matrix<double>(arena, K, C),
                       mean_transposed = allocate_matrix<double>(arena, C, K);
  const Matrix<double> power = allocate_matrix<double>(arena, K, K), step = allocate_matrix<double>(arena, K, K);
  const Matrix<double> scratch = allocate_matrix<double>(arena, K, K);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t c = 0; c < C; ++c) mean.row(k)[c] = memory.mean.row(k)[c];
  transpose(mean_transposed, mean);

  // P by repeated squaring.
  const Factor<double> factor = allocate_factor<double>(arena, K);
  product_lower<Into::kSet>(scratch, C, operand(mean), mean_transposed);
  regularise(factor.lower, scratch, ridge, false);
  cholesky(factor, arena);
  invert_cholesky(factor, power, arena);
  if (is_dominated(args, b, memory)) {
    mirror(scratch);
    product_lower<Into::kSet>(step, K, operand(power), scratch);
    mirror(step);
  } else {
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < K; ++j) step.row(i)[j] = -ridge * power.row(i)[j];
      step.row(i)[i] += 1;
    }
  }
  for (int64_t exponent = args.num_iters - 1; exponent > 0; exponent /= 2) {
    if (exponent & 1) product_commuting(power, step, scratch);
    if (exponent > 1) product_commuting(step, step, scratch);
  }

  const Matrix<double> folded = allocate_matrix<double>(arena, C, K);
  product<Into::kSet>(folded, K, operand(mean_transposed), power);
  for (int64_t c = 0; c < C; ++c)
    for (int64_t k = 0; k < K; ++k) memory.mean_transposed.row(c)[k] = static_cast<Real>(folded.row(c)[k]);
}

// Factor a memory for reads, and fold it if that pays.
template <class Real>
Status prepare_memory(const ReadingArgs<Real>& args, int64_t b, const FactoredMemory<Real>& memory,
                      const Limits<Real>& limits, Arena& arena) {
  const Status status = factor_memory(args, b, memory, limits, arena);
  if (folds(args) && !limits.again(status)) fold(args, b, memory, arena);
  return status;
}

// w ← w − λ y, for the rows of a tile.
template <class Real>
[[gnu::always_inline]] inline void subtract_scaled(const Matrix<Real>& w, Real ridge, const Matrix<Real>& y) {
  for (int64_t q = 0; q < w.rows; ++q)
    for (int64_t k = 0; k < w.columns; ++k) w.row(q)[k] -= ridge * y.row(q)[k];
}

// Queries [first, first + count) of memory b: the caller's rows, or a widened copy.
template <class Real>
Operand<Real> query_rows(const ReadingArgs<Real>& args, int64_t b, int64_t first, int64_t count, Arena& arena) {
  if (args.queries_type == kFloat32) {
    const Batch<const Real> here = args.queries.from_row(first);
    return {here.at(b), here.stride[1], here.stride[2]};
  }
  const Matrix<Real> rows = allocate_matrix<Real>(arena, count, args.C);
  load_codes(rows, args.queries, args.queries_type, b, first);
  return operand(rows);
}

// w_n from w_1 in the rows of a tile, by (2). `next` and `work` are overwritten.
template <class Real>
void iterate(const ReadingArgs<Real>& args, int64_t b, const Factor<Real>& factor, const Matrix<Real>& lower_transposed,
             const Matrix<Real>& weights, const Matrix<Real>& next, const Matrix<Real>& work) {
  const Real ridge = *args.ridge.at(b);
  for (int64_t n = 1; n < args.num_iters; ++n) {
    copy_rows(next, weights);
    solve_cholesky(factor, lower_transposed, next, work);
    subtract_scaled(weights, ridge, next);
  }
}

// The same where λ dominates.
template <class Real>
void iterate_literally(const ReadingArgs<Real>& args, const FactoredMemory<Real>& memory, const Matrix<Real>& weights,
                       const Matrix<Real>& next, const Matrix<Real>& work, Arena& arena) {
  const Matrix<Real> codes = allocate_matrix<Real>(arena, weights.rows, args.C),
                     spare = allocate_matrix<Real>(arena, weights.rows, args.K);
  for (int64_t n = 1; n < args.num_iters; ++n) {
    multiply_gram(next, weights, memory, codes, spare);
    copy_rows(weights, next);
    solve_cholesky(memory.factor, memory.lower_transposed, weights, work);
  }
}

// Answer queries [first, first + kQueryTile) of memory b. Queries are rows.
template <class Real>
void read_tile(const ReadingArgs<Real>& args, int64_t b, int64_t first, const FactoredMemory<Real>& memory,
               Arena& arena) {
  const int64_t count = smaller(kQueryTile, args.Q - first);
  Matrix<Real> weights = allocate_matrix<Real>(arena, count, args.K),
               next = allocate_matrix<Real>(arena, count, args.K);

  // Address, by (1); P R in place of R if the memory is folded.
  product<Into::kSet>(weights, args.C, query_rows(args, b, first, count, arena), memory.mean_transposed);
  if (args.squared_gram) {
    product<Into::kSet>(next, args.K, operand(weights), memory.gram);
    std::swap(weights, next);
  }
  if (!folds(args)) {
    const Matrix<Real> work = allocate_matrix<Real>(arena, count, kBlock);
    solve_cholesky(memory.factor, memory.lower_transposed, weights, work);
    if (args.num_iters > 1 && is_dominated(args, b, memory))
      iterate_literally(args, memory, weights, next, work, arena);
    else
      iterate(args, b, memory.factor, memory.lower_transposed, weights, next, work);
  }

  // Decode, by (3).
  store_matrix(args.weights.from_row(first), b, weights);
  if (!args.values.data) return;
  const Matrix<Real> values = allocate_matrix<Real>(arena, count, args.C);
  product<Into::kSet>(values, args.K, operand(weights), memory.mean);
  store_codes(args.values, args.values_type, b, first, values);
}

// Queries that a folded read answers together: whole register tiles at every level.
constexpr int64_t kFoldedRows = 16;
static_assert(kFoldedRows % FASTKM_TILE_ROWS == 0);

// Answer queries [begin, end) of a folded memory. The products read and write the caller's rows, unless these are codes
// of another type.
template <class Real>
void read_folded(const ReadingArgs<Real>& args, int64_t b, int64_t begin, int64_t end,
                 const FactoredMemory<Real>& memory, Arena& arena) {
  const bool wide_queries = args.queries_type == kFloat32, wide_values = args.values_type == kFloat32;
  const Arena::Mark start = arena.mark();
  const int64_t tiles = kFoldedRows / FASTKM_TILE_ROWS * (strips<Real>(args.K) + strips<Real>(args.C));
  for (int64_t first = begin; first < end; first += kFoldedRows) {
    const int64_t rows = smaller(kFoldedRows, end - first), next = first + rows;
    Prefetch prefetch(tiles);
    if (wide_queries) prefetch.add(args.queries, b, next, smaller(kFoldedRows, end - next), args.C);
    prefetch.add(args.weights, b, next, smaller(kFoldedRows, end - next), args.K);
    if (wide_values) prefetch.add(args.values, b, next, smaller(kFoldedRows, end - next), args.C);
    arena.release(start);
    const Matrix<Real> w{args.weights.at(b, first), rows, args.K, args.weights.stride[1], false};
    product<Into::kSet>(w, args.C, query_rows(args, b, first, rows, arena), memory.mean_transposed, &prefetch);
    if (!args.values.data) continue;
    const Matrix<Real> z = wide_values
                               ? Matrix<Real>{args.values.at(b, first), rows, args.C, args.values.stride[1], false}
                               : allocate_matrix<Real>(arena, rows, args.C);
    product<Into::kSet>(z, args.K, operand(w), memory.mean, &prefetch);
    store_codes(args.values, args.values_type, b, first, z);
  }
}

// Answer queries [begin, end) of memory b.
template <class Real>
void read_queries(const ReadingArgs<Real>& args, int64_t b, int64_t begin, int64_t end,
                  const FactoredMemory<Real>& memory, Arena& arena) {
  if (folds(args) && smaller(args.K, args.C) >= kLanes<Real>) return read_folded(args, b, begin, end, memory, arena);
  const Arena::Mark tile_start = arena.mark();
  for (int64_t first = begin; first < end; first += kQueryTile) {
    arena.release(tile_start);
    read_tile(args, b, first, memory, arena);
  }
}

// Each memory is factored and read while it is in the cache. One that is to be computed again is not read.
template <class Real>
Status read_one(const ReadingArgs<Real>& args, int64_t b, const Limits<Real>& limits) {
  Arena& arena = Arena::fresh();
  const FactoredMemory<Real> memory = lay_out<Real>(args, [&](int64_t count) { return arena.allocate<Real>(count); });
  const Status status = prepare_memory(args, b, memory, limits, arena);
  if (!limits.again(status)) read_queries(args, b, 0, args.Q, memory, arena);
  return status;
}

inline ReadingArgs<double> in_double(const ReadingArgs<float>& args, Doubles& doubles) {
  return {.K = args.K,
          .C = args.C,
          .Q = args.Q,
          .mean = doubles.argument(args.mean, args.K, args.C),
          .queries = doubles.codes(args.queries, args.queries_type, args.Q, args.C),
          .ridge = doubles.argument(args.ridge, 1, 1),
          .num_iters = args.num_iters,
          .squared_gram = args.squared_gram,
          .values = doubles.codes_result(args.values, args.values_type, args.Q, args.C),
          .weights = doubles.result(args.weights, args.Q, args.K)};
}

inline Status read_in_double(const ReadingArgs<float>& args, int64_t b) {
  Doubles doubles(b);
  const Status status = read_one(in_double(args, doubles), 0, limits_for_float32());
  return doubles.put_out() && status != kInexactSystem ? status : kNotPositiveDefinite;
}

// A memory whose status says so is read again.
template <class Real>
void read_again(const ReadingArgs<Real>& args, int64_t b, const Limits<Real>& limits) {
  if constexpr (kHasDouble<Real>)
    if (limits.again(static_cast<Status>(args.info[b]))) args.info[b] = read_in_double(args, b);
}

template <class Real>
void read_memories(const ReadingArgs<Real>& args, int64_t begin, int64_t end) {
  const Limits<Real> limits = limits_of_solve<Real>(args.C);
  const bool lanes = fits_lanes(args);
  if (lanes) read_lanes(args, begin, end);
  for (int64_t b = begin; b < end; ++b) {
    if (!lanes || args.info[b] == kInexactSystem) args.info[b] = read_one(args, b, limits);
    read_again(args, b, limits);
  }
}

// The same in two steps, for fewer memories than threads: factors first, then tiles of queries.
template <class Real>
void factor_memories(const ReadingArgs<Real>& args, Real* factors, int64_t begin, int64_t end) {
  const Limits<Real> limits = limits_of_solve<Real>(args.C);
  for (int64_t b = begin; b < end; ++b) {
    const FactoredMemory<Real> memory = lay_out(args, factors + b * factor_size(args));
    const Status status = prepare_memory(args, b, memory, limits, Arena::fresh());
    args.info[b] = status;
    read_again(args, b, limits);
    if (limits.again(status)) *memory.largest = -1;
  }
}

template <class Real>
void read_tiles(const ReadingArgs<Real>& args, Real* factors, int64_t begin, int64_t end) {
  const int64_t tiles = (args.Q + kQueryTile - 1) / kQueryTile;
  for (int64_t i = begin; i < end;) {
    const int64_t b = i / tiles, stop = smaller(end, (b + 1) * tiles);
    const FactoredMemory<Real> memory = lay_out(args, factors + b * factor_size(args));
    const int64_t last = smaller((stop - b * tiles) * kQueryTile, args.Q);
    if (*memory.largest >= 0) read_queries(args, b, (i - b * tiles) * kQueryTile, last, memory, Arena::fresh());
    i = stop;
  }
}

}  // namespace fastkm::FASTKM_LEVEL
