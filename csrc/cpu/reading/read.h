// Addressing and reading: factor a memory once, then solve for any number of queries, in K or in C.
//
// With A = R Rᵀ + λI, or (R Rᵀ)² + λI for the squared-Gram solve, a query z is answered by
//   (1)  w_1 = A⁻¹ R z, or A⁻¹ (R Rᵀ) R z
//   (2)  w_n+1 = w_n − λ A⁻¹ w_n, which is the same as addressing with the value read so far
//   (3)  ẑ = Rᵀ w_n.
// Where λ dominates A, λ A⁻¹ w_n is nearly w_n, and (2) keeps few digits of the difference. There the value read so far
// is addressed literally: w_n+1 = A⁻¹ R (Rᵀ w_n).
//
// With 2 C ≤ K and K ≥ 128 the system is solved in C, but for the squared-Gram solve. A⁻¹ R = R B⁻¹ with
// B = Rᵀ R + λI [C, C], so w_n = R y_n with
//   (1') y_1 = B⁻¹ z      (2') y_n+1 = y_n − λ B⁻¹ y_n, or y_n+1 = B⁻¹ (Rᵀ R) y_n.
// R has at most C singular values: the least eigenvalue of A is λ whatever R is, that of B is not, so B also keeps
// digits that A loses. S stands for R or Rᵀ [N, M], whichever has fewer rows: the system is S Sᵀ + λI.
//
// Bytes: the memory, the queries and the results once. Operations: N² M + N³/3 a memory, 4 K C + 2 n N² a query.
//
// With many queries, (1) to (3) are folded into two products: w_n = (P R) z with P = H (I − λH)ⁿ⁻¹, H = A⁻¹, or
// w_n = (R P) z with H = B⁻¹. P is computed in double, because powers of a matrix lose digits that iterations keep.
#pragma once

#include <atomic>
#include <utility>

#include "cpu/linalg/codes.h"
#include "cpu/linalg/in_double.h"
#include "cpu/linalg/solve.h"
#include "cpu/linalg/symmetric.h"
#include "cpu/linalg/vectors.h"
#include "cpu/reading/lanes.h"

namespace fastkm::FASTKM_LEVEL {

// Queries of a tile, which one thread answers.
constexpr int64_t kQueryTile = 64;

// Whether there are enough queries that computing P costs less than it saves.
template <class Real>
bool folds(const ReadingArgs<Real>& args) {
  return args.Q >= 4 * (args.K + args.C) && !args.squared_gram;
}

// The size N of the system that a read solves. A system in C pays where it is much smaller, and where its factor is the
// larger part of the work.
template <class Real>
int64_t system_size(const ReadingArgs<Real>& args) {
  constexpr int64_t kManyRows = 128;
  return args.K >= kManyRows && 2 * args.C <= args.K && !args.squared_gram ? args.C : args.K;
}

// Of a read. In C, weights are a product of R with solutions that may be much larger than they are.
template <class Real>
Limits<Real> limits_of_read(const ReadingArgs<Real>& args) {
  Limits<Real> limits = limits_of_solve<Real>(args.C);
  if (kHasDouble<Real> && system_size(args) < args.K) limits.condition = 8;
  return limits;
}

// What a query needs of a memory.
template <class Real>
struct FactoredMemory {
  Factor<Real> factor;            // of S Sᵀ + λI [N, N], or of G² + λI
  Matrix<Real> lower_transposed;  // [N, N]
  Matrix<Real> mean;              // R [K, C]
  Matrix<Real> mean_transposed;   // Rᵀ [C, K], or if the memory is folded (P R)ᵀ or (R P)ᵀ
  Matrix<Real> gram;              // G [K, K], or no rows if the solve is not the squared-Gram one
  Real* largest;                  // of the diagonal of the system

  bool in_codes() const { return factor.size() < mean.rows; }                                 // N = C < K
  const Matrix<Real>& system_rows() const { return in_codes() ? mean_transposed : mean; }     // S [N, M]
  const Matrix<Real>& system_columns() const { return in_codes() ? mean : mean_transposed; }  // Sᵀ [M, N]
};

// Room for a factored memory with a system of size N.
template <class Real>
FactoredMemory<Real> allocate_factored(const ReadingArgs<Real>& args, int64_t N, Arena& arena) {
  const int64_t K = args.K, C = args.C;
  return {.factor = allocate_factor<Real>(arena, N),
          .lower_transposed = allocate_matrix<Real>(arena, N, N),
          .mean = allocate_matrix<Real>(arena, K, C),
          .mean_transposed = allocate_matrix<Real>(arena, C, K),
          .gram = allocate_matrix<Real>(arena, args.squared_gram ? K : 0, K),
          .largest = arena.allocate<Real>(1)};
}

template <class Real>
Status factor_memory(const ReadingArgs<Real>& args, int64_t b, const FactoredMemory<Real>& memory,
                     const Limits<Real>& limits, Arena& arena) {
  load_matrix(memory.mean, args.mean, b);
  transpose(memory.mean_transposed, memory.mean);
  const Matrix<Real>& gram = args.squared_gram ? memory.gram : memory.factor.lower;
  const Matrix<Real>& columns = memory.system_columns();
  product_lower<Into::kSet>(gram, columns.rows, operand(memory.system_rows()), columns);
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

// y ← w S Sᵀ, or w G² for the squared-Gram solve, for the rows of a tile. `between` [t, M] and `work` are overwritten.
template <class Real>
void multiply_gram(const Matrix<Real>& y, const Matrix<Real>& w, const FactoredMemory<Real>& memory,
                   const Matrix<Real>& between, const Matrix<Real>& work) {
  const bool squared = memory.gram.rows > 0;
  product<Into::kSet>(between, w.columns, operand(w), memory.system_rows());
  product<Into::kSet>(squared ? work : y, between.columns, operand(between), memory.system_columns());
  if (squared) product<Into::kSet>(y, w.columns, operand(work), memory.gram);
}

// memory.mean_transposed ← (P R)ᵀ, or (R P)ᵀ
template <class Real>
void fold(const ReadingArgs<Real>& args, int64_t b, const FactoredMemory<Real>& memory, Arena& arena) {
  const int64_t K = args.K, C = args.C, N = system_size(args);
  const double ridge = *args.ridge.at(b);
  const Matrix<double> mean = allocate_matrix<double>(arena, K, C),
                       mean_transposed = allocate_matrix<double>(arena, C, K);
  const Matrix<double> power = allocate_matrix<double>(arena, N, N), step = allocate_matrix<double>(arena, N, N);
  const Matrix<double> scratch = allocate_matrix<double>(arena, N, N);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t c = 0; c < C; ++c) mean.row(k)[c] = memory.mean.row(k)[c];
  transpose(mean_transposed, mean);

  // P by repeated squaring.
  const Factor<double> factor = allocate_factor<double>(arena, N);
  const Matrix<double>&rows = N < K ? mean_transposed : mean, &columns = N < K ? mean : mean_transposed;
  product_lower<Into::kSet>(scratch, columns.rows, operand(rows), columns);
  regularise(factor.lower, scratch, ridge, false);
  cholesky(factor, arena);
  invert_cholesky(factor, power, arena);
  if (is_dominated(args, b, memory)) {
    mirror(scratch);
    product_lower<Into::kSet>(step, N, operand(power), scratch);
    mirror(step);
  } else {
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t j = 0; j < N; ++j) step.row(i)[j] = -ridge * power.row(i)[j];
      step.row(i)[i] += 1;
    }
  }
  for (int64_t exponent = args.num_iters - 1; exponent > 0; exponent /= 2) {
    if (exponent & 1) product_commuting(power, step, scratch);
    if (exponent > 1) product_commuting(step, step, scratch);
  }

  const Matrix<double> folded = allocate_matrix<double>(arena, C, K);
  if (N < K)
    product<Into::kSet>(folded, N, operand(power), mean_transposed);
  else
    product<Into::kSet>(folded, N, operand(mean_transposed), power);
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

// w_n from w_1, or y_n from y_1, in the rows of a tile, by (2). `next` and `work` are overwritten.
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
  const Matrix<Real> between = allocate_matrix<Real>(arena, weights.rows, memory.system_rows().columns),
                     spare = allocate_matrix<Real>(arena, weights.rows, weights.columns);
  for (int64_t n = 1; n < args.num_iters; ++n) {
    multiply_gram(next, weights, memory, between, spare);
    copy_rows(weights, next);
    solve_cholesky(memory.factor, memory.lower_transposed, weights, work);
  }
}

// w_n of queries, or y_n if the system is solved in C [count, N]. `terms` is their squared norms, or those of what (2)
// subtracts from.
template <class Real>
Matrix<Real> solve_tile(const ReadingArgs<Real>& args, int64_t b, int64_t first, int64_t count,
                        const FactoredMemory<Real>& memory, Real* terms, Arena& arena) {
  const int64_t N = memory.factor.size();
  Matrix<Real> solution = allocate_matrix<Real>(arena, count, N), next = allocate_matrix<Real>(arena, count, N);
  if (memory.in_codes())
    load_codes(solution, args.queries, args.queries_type, b, first);
  else
    product<Into::kSet>(solution, args.C, query_rows(args, b, first, count, arena), memory.mean_transposed);
  if (args.squared_gram) {
    product<Into::kSet>(next, args.K, operand(solution), memory.gram);
    std::swap(solution, next);
  }
  const Matrix<Real> work = allocate_matrix<Real>(arena, count, kBlock);
  solve_cholesky(memory.factor, memory.lower_transposed, solution, work);
  if (args.num_iters > 1 && is_dominated(args, b, memory)) {
    iterate_literally(args, memory, solution, next, work, arena);
    squared_norms(solution, terms);
  } else {
    squared_norms(solution, terms);
    iterate(args, b, memory.factor, memory.lower_transposed, solution, next, work);
  }
  return solution;
}

// Whether the sums R y that gave the rows of `weights` have kept their digits: ‖R‖² ‖y‖² bounds ‖w‖². `terms` is ‖y‖²
// of every row, `largest` the largest squared norm of a column of R.
template <class Real>
bool sums_are_exact(const Matrix<Real>& weights, const Real* terms, Real largest, const Limits<Real>& limits,
                    Arena& arena) {
  if (!limits.exist()) return true;
  Real* const sums = arena.allocate<Real>(round_up(weights.rows, kLanes<Real>));
  squared_norms(weights, sums);
  bool exact = true;
  for (int64_t q = 0; q < weights.rows; ++q) exact &= !(largest * terms[q] > limits.sum * sums[q]);
  return exact;
}

// Answer queries [first, first + kQueryTile) of memory b. Queries are rows. Returns whether the weights are exact.
template <class Real>
bool read_tile(const ReadingArgs<Real>& args, int64_t b, int64_t first, const FactoredMemory<Real>& memory,
               const Limits<Real>& limits, Arena& arena) {
  const int64_t count = smaller(kQueryTile, args.Q - first);
  Real* const terms = arena.allocate<Real>(round_up(count, kLanes<Real>));
  Matrix<Real> weights;
  bool exact = true;
  if (folds(args)) {
    weights = allocate_matrix<Real>(arena, count, args.K);
    product<Into::kSet>(weights, args.C, query_rows(args, b, first, count, arena), memory.mean_transposed);
  } else if (memory.in_codes()) {
    const Matrix<Real> y = solve_tile(args, b, first, count, memory, terms, arena);
    weights = allocate_matrix<Real>(arena, count, args.K);
    product<Into::kSet>(weights, args.C, operand(y), memory.mean_transposed);
    exact = sums_are_exact(weights, terms, *memory.largest - *args.ridge.at(b), limits, arena);
  } else {
    weights = solve_tile(args, b, first, count, memory, terms, arena);
  }
  store_matrix(args.weights.from_row(first), b, weights);

  // Decode, by (3).
  if (!args.values.data) return exact;
  const Matrix<Real> values = allocate_matrix<Real>(arena, count, args.C);
  product<Into::kSet>(values, args.K, operand(weights), memory.mean);
  store_codes(args.values, args.values_type, b, first, values);
  return exact;
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

// Answer all queries of memory b, in tiles that threads share.
template <class Real>
Status read_queries(const ReadingArgs<Real>& args, int64_t b, const FactoredMemory<Real>& memory,
                    const Limits<Real>& limits) {
  const int64_t tiles = (args.Q + kQueryTile - 1) / kQueryTile;
  std::atomic<bool> exact = true;
  const auto answer = [&](int64_t begin, int64_t end) {
    Arena& arena = Arena::of_thread();
    const Arena::Mark start = arena.mark();
    if (folds(args) && smaller(args.K, args.C) >= kLanes<Real>) {
      read_folded(args, b, begin * kQueryTile, smaller(end * kQueryTile, args.Q), memory, arena);
    } else {
      for (int64_t i = begin; i < end; ++i) {
        if (!read_tile(args, b, i * kQueryTile, memory, limits, arena)) exact = false;
        arena.release(start);
      }
    }
    arena.release(start);
  };
  share(current_team(), tiles, answer);
  return exact ? kGood : kInexactSystem;
}

// Each memory is factored and read while it is in the cache. One that is to be computed again is not read.
template <class Real>
Status read_one(const ReadingArgs<Real>& args, int64_t b, const Limits<Real>& limits) {
  Arena& arena = Arena::fresh();
  const FactoredMemory<Real> memory = allocate_factored(args, system_size(args), arena);
  const Status status = prepare_memory(args, b, memory, limits, arena);
  if (limits.again(status)) return status;
  const Status read = read_queries(args, b, memory, limits);
  return status == kGood ? read : status;
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
void read(const ReadingArgs<Real>& args, int64_t begin, int64_t end) {
  const Limits<Real> limits = limits_of_read(args);
  const bool lanes = fits_lanes(args);
  if (lanes) read_lanes(args, begin, end);
  for (int64_t b = begin; b < end; ++b) {
    if (!lanes || args.info[b] == kInexactSystem) args.info[b] = read_one(args, b, limits);
    read_again(args, b, limits);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
