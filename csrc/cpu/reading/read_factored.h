// Addressing and reading with what was computed once for a memory.
//
// With A, G and λ as in read.h:
//   (1)  R⁺ = Rᵀ A⁻¹, or B⁻¹ Rᵀ, or Rᵀ G A⁻¹: row c holds the weights of the c-th unit code
//   (2)  w_1 = z R⁺      w_n+1 = w_n − λ A⁻¹ w_n, or (w_n R) R⁺ where λ dominates A      ẑ = w_n R
// Bound of one query and one iteration: the bytes of R⁺ and R, 8 K C, each read once. Operations: K² C + K³/3 and
// 2 K² C for (1), 4 K C + 2 (n − 1) K² a query.
//
// R⁺ is as accurate as solving for each query; A⁻¹ and L⁻¹ are not: where A is badly conditioned, they lose up to two
// digits more. What (1) loses in float32, it computes again in double. With more queries than columns, the iterations
// of (2) are done for the rows of R⁺ instead.
#pragma once

#include <algorithm>

#include "cpu/linalg/few_rows.h"
#include "cpu/reading/read_backward.h"

namespace fastkm::FASTKM_LEVEL {

// Call f(first, count) for tiles of the rows of X, which threads share. Each row takes about `steps` steps.
template <class Real, class F>
void share_tiles(const Matrix<Real>& x, int64_t steps, const F& f) {
  share(team_for(x.rows * steps, kLargeProduct), (x.rows + kBlock - 1) / kBlock, [&](int64_t begin, int64_t end) {
    const int64_t stop = smaller(end * kBlock, x.rows);
    for (int64_t i = begin * kBlock; i < stop; i += kQueryTile) f(i, smaller(kQueryTile, stop - i));
  });
}

// R⁺ [C, K] by a system of size C. Sets `status` to that of this system.
template <class Real>
Matrix<Real> pseudoinverse_in_codes(const ReadingArgs<Real>& args, int64_t b, const Limits<Real>& limits,
                                    Status& status, Arena& arena) {
  const FactoredMemory<Real> memory = allocate_factored(args, args.C, arena);
  status = factor_memory(args, b, memory, limits, arena);
  const Matrix<Real> work = allocate_matrix<Real>(arena, args.K, kBlock);
  share_tiles(memory.mean, args.C * args.C, [&](int64_t first, int64_t count) {
    solve_cholesky(memory.factor, memory.lower_transposed, memory.mean.rows_from(first, count),
                   work.rows_from(first, count));
  });
  transpose(memory.mean_transposed, memory.mean);
  return memory.mean_transposed;
}

// R⁺ [C, K] of a memory with its factor.
template <class Real>
Matrix<Real> pseudoinverse_in_rows(const ReadingArgs<Real>& args, const FactoredMemory<Real>& memory, Arena& arena) {
  Matrix<Real> rows = memory.mean_transposed;
  if (args.squared_gram) {
    rows = allocate_matrix<Real>(arena, args.C, args.K);
    product<Into::kSet>(rows, args.K, operand(memory.mean_transposed), memory.gram);
  }
  const Matrix<Real> work = allocate_matrix<Real>(arena, args.C, kBlock);
  share_tiles(rows, args.K * args.K, [&](int64_t first, int64_t count) {
    solve_cholesky(memory.factor, memory.lower_transposed, rows.rows_from(first, count), work.rows_from(first, count));
  });
  return rows;
}

// Factor memory b and store what reads need of it. Args have no queries. One that is to be computed again is not
// stored.
template <class Real>
Status factor_one(const ReadingArgs<Real>& args, const AddressingFactors<Real>& factors, int64_t b,
                  const Limits<Real>& limits) {
  Arena& arena = Arena::fresh();
  const FactoredMemory<Real> memory = allocate_factored(args, args.K, arena);
  const bool in_codes = system_size(args) < args.K;
  Status status = factor_memory(args, b, memory, limits, arena);
  // In double, a system in C may have digits where A has few. Gradients look at L for themselves.
  if (in_codes && !kHasDouble<Real> && status == kInexactSystem) status = kGood;
  if (limits.again(status)) return status;
  Status of_codes = kGood;
  const Matrix<Real> pseudoinverse =
      in_codes ? pseudoinverse_in_codes(args, b, limits, of_codes, arena) : pseudoinverse_in_rows(args, memory, arena);
  if (limits.again(of_codes)) return of_codes;
  share_rows(memory.factor.lower, [&](int64_t i) {
    Real* const row = factors.lower.at(b, i);
    for (int64_t j = 0; j < args.K; ++j) row[j] = j <= i ? memory.factor.lower.row(i)[j] : 0;
  });
  if (args.squared_gram) store_matrix(factors.gram, b, memory.gram);
  store_matrix(factors.pseudoinverse, b, pseudoinverse);
  return status == kGood ? of_codes : status;
}

inline Status factor_in_double(const ReadingArgs<float>& args, const AddressingFactors<float>& factors, int64_t b) {
  Doubles doubles(b);
  const AddressingFactors<double> wide{.lower = doubles.result(factors.lower, args.K, args.K),
                                       .pseudoinverse = doubles.result(factors.pseudoinverse, args.C, args.K),
                                       .gram = doubles.result(factors.gram, args.squared_gram ? args.K : 0, args.K)};
  const Status status = factor_one(in_double(args, doubles), wide, 0, limits_for_float32());
  return doubles.put_out() && status == kGood ? kGood : kNotPositiveDefinite;
}

template <class Real>
void factor_addressing(const ReadingArgs<Real>& args, const AddressingFactors<Real>& factors, int64_t begin,
                       int64_t end) {
  const Limits<Real> limits = limits_of_solve<Real>(args.C);
  for (int64_t b = begin; b < end; ++b) {
    args.info[b] = factor_one(args, factors, b, limits);
    if constexpr (kHasDouble<Real>)
      if (limits.again(static_cast<Status>(args.info[b]))) args.info[b] = factor_in_double(args, factors, b);
  }
}

// The caller's rows if products can read them, else a copy.
template <class Real>
Matrix<Real> view_or_copy(const Batch<const Real>& from, int64_t b, int64_t rows, int64_t columns, Arena& arena) {
  if (from.stride[2] == 1 && columns >= kLanes<Real>)
    return {const_cast<Real*>(from.at(b)), rows, columns, from.stride[1], false};
  const Matrix<Real> copy = allocate_matrix<Real>(arena, rows, columns);
  load_matrix(copy, from, b);
  return copy;
}

// The factor L of a caller, with what solves need beside it.
template <class Real>
void load_factor(const Factor<Real>& factor, const Matrix<Real>& lower_transposed, const Batch<const Real>& lower,
                 int64_t b) {
  load_matrix(factor.lower, lower, b);
  invert_blocks(factor);
  transpose(lower_transposed, factor.lower);
}

// The largest entry of the diagonal of L Lᵀ. L is zero above its diagonal.
template <class Real>
Real largest_of_system(const Factor<Real>& factor, Arena& arena) {
  Real* const norms = arena.allocate<Real>(round_up(factor.size(), kLanes<Real>));
  squared_norms(factor.lower, norms);
  Real largest = 0;
  for (int64_t i = 0; i < factor.size(); ++i) largest = std::max(largest, norms[i]);
  return largest;
}

// What queries need of a memory.
template <class Real>
struct ReadyMemory {
  Matrix<Real> mean, pseudoinverse;      // R [K, C], R⁺ [C, K]
  int64_t literal_iters = 0;             // iterations after the first that address the value read so far
  const Factor<Real>* factor = nullptr;  // of A, if the weights of queries are iterated with it
  Matrix<Real> lower_transposed = {};
};

// Y = X M, where X has `rows` rows.
template <class Real>
void product_with(const Matrix<Real>& y, int64_t k, const Operand<Real>& x, const Matrix<Real>& m) {
  if (x.column == 1 && has_few_rows<Real>(y.rows, k, y.columns))
    return product_of_few(y, k, Matrix<Real>{const_cast<Real*>(x.data), y.rows, k, x.row, false}, m);
  product<Into::kSet>(y, k, x, m);
}

// Where a product puts rows [first, first + count) of a result: the caller's rows, or a copy if `direct` is false.
template <class Real>
Matrix<Real> result_rows(const Batch<Real>& to, int64_t b, int64_t first, int64_t count, int64_t columns, bool direct,
                         Arena& arena) {
  if (direct && columns >= kLanes<Real>) return {to.at(b, first), count, columns, to.stride[1], false};
  return allocate_cleared<Real>(arena, count, columns);
}

// Answer queries [first, first + count) of memory b, by (2).
template <class Real>
void read_ready(const ReadingArgs<Real>& args, int64_t b, int64_t first, int64_t count, const ReadyMemory<Real>& memory,
                Arena& arena) {
  const Matrix<Real> weights = result_rows(args.weights, b, first, count, args.K, memory.factor == nullptr, arena);
  product_with(weights, args.C, query_rows(args, b, first, count, arena), memory.pseudoinverse);
  if (memory.factor)
    iterate(args, b, *memory.factor, memory.lower_transposed, weights, allocate_matrix<Real>(arena, count, args.K),
            allocate_matrix<Real>(arena, count, kBlock));
  if (!args.values.data) return store_matrix(args.weights.from_row(first), b, weights);
  const Matrix<Real> values = result_rows(args.values, b, first, count, args.C, args.values_type == kFloat32, arena);
  for (int64_t n = 0; n < memory.literal_iters; ++n) {
    product_with(values, args.K, operand(weights), memory.mean);
    product_with(weights, args.C, operand(values), memory.pseudoinverse);
  }
  store_matrix(args.weights.from_row(first), b, weights);
  product_with(values, args.K, operand(weights), memory.mean);
  store_codes(args.values, args.values_type, b, first, values);
}

// Answer all queries of memory b. A small memory stays in the cache while tiles of queries pass, which threads share; a
// large one passes once for many queries, and threads share its columns.
template <class Real>
void read_all_ready(const ReadingArgs<Real>& args, int64_t b, const ReadyMemory<Real>& memory) {
  constexpr int64_t kFewBytes = 1 << 19, kManyQueries = 512;
  const bool small = args.K * args.C * static_cast<int64_t>(sizeof(Real)) <= kFewBytes;
  const int64_t tile = small ? kQueryTile : kManyQueries;
  const auto answer = [&](int64_t begin, int64_t end) {
    Arena& arena = Arena::of_thread();
    const Arena::Mark start = arena.mark();
    for (int64_t i = begin; i < end; ++i) {
      read_ready(args, b, i * tile, smaller(tile, args.Q - i * tile), memory, arena);
      arena.release(start);
    }
  };
  const int64_t tiles = (args.Q + tile - 1) / tile;
  if (small && tiles > 1)
    share(current_team(), tiles, answer);
  else
    answer(0, tiles);
}

// Iterate the rows of R⁺ in place of weights, by (2) with the factor.
template <class Real>
Matrix<Real> iterated_pseudoinverse(const ReadingArgs<Real>& args, const AddressingFactors<const Real>& factors,
                                    int64_t b, const ReadyMemory<Real>& memory, Arena& arena) {
  const auto allocate = [&](int64_t columns) { return allocate_matrix<Real>(arena, args.C, columns); };
  const Matrix<Real> rows = allocate(args.K), next = allocate(args.K), work = allocate(kBlock);
  load_matrix(rows, factors.pseudoinverse, b);
  share_tiles(rows, args.K * args.K * args.num_iters, [&](int64_t first, int64_t count) {
    iterate(args, b, *memory.factor, memory.lower_transposed, rows.rows_from(first, count),
            next.rows_from(first, count), work.rows_from(first, count));
  });
  return rows;
}

template <class Real>
void read_factored(const ReadingArgs<Real>& args, const AddressingFactors<const Real>& factors, int64_t begin,
                   int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    ReadyMemory<Real> memory{.mean = view_or_copy(args.mean, b, args.K, args.C, arena),
                             .pseudoinverse = view_or_copy(factors.pseudoinverse, b, args.C, args.K, arena)};
    Factor<Real> factor;
    if (args.num_iters > 1) {
      factor = allocate_factor<Real>(arena, args.K);
      memory.lower_transposed = allocate_matrix<Real>(arena, args.K, args.K);
      load_factor(factor, memory.lower_transposed, factors.lower, b);
      if (2 * *args.ridge.at(b) > largest_of_system(factor, arena))
        memory.literal_iters = args.num_iters - 1;
      else
        memory.factor = &factor;
    }
    if (memory.factor && args.Q > args.C) {
      memory.pseudoinverse = iterated_pseudoinverse(args, factors, b, memory, arena);
      memory.factor = nullptr;
    }
    read_all_ready(args, b, memory);
    if (args.info) args.info[b] = kGood;
  }
}

// The factor L of a caller and what solves need beside it. Returns whether it keeps the digits of a gradient.
template <class Real>
Status load_factored(const ReadingArgs<Real>& args, const AddressingFactors<const Real>& factors, int64_t b,
                     const FactoredMemory<Real>& memory, const Limits<Real>& limits, Arena& arena) {
  load_matrix(memory.mean, args.mean, b);
  transpose(memory.mean_transposed, memory.mean);
  load_factor(memory.factor, memory.lower_transposed, factors.lower, b);
  if (args.squared_gram) load_matrix(memory.gram, factors.gram, b);
  *memory.largest = largest_of_system(memory.factor, arena);
  return well_conditioned(memory.factor, *memory.largest, limits) ? kGood : kInexactSystem;
}

template <class Real>
void read_factored_backward(const ReadingArgs<Real>& args, const AddressingFactors<const Real>& factors,
                            const ReadingGrads<Real>& grads, int64_t begin, int64_t end) {
  const Limits<Real> limits = limits_of_gradient<Real>(args.K, args.C);
  for (int64_t b = begin; b < end; ++b) {
    const Status status =
        read_backward_one(args, grads, b, args.K, limits, [&](const FactoredMemory<Real>& memory, Arena& arena) {
          return load_factored(args, factors, b, memory, limits, arena);
        });
    if constexpr (kHasDouble<Real>)
      if (limits.again(status)) read_backward_in_double(args, grads, b);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
