// Backward of addressing and reading. One factor serves the solves of both directions.
//
// A tile of queries is read again, by the equations of read.h with y_i = A⁻¹ w_i, and gone through backwards. Bars are
// cotangents:
//   (1)  through ẑ = Rᵀ w_n:             w̄ += R z̄,  R̄ += w_n z̄ᵀ
//   (2)  through w_i+1 = w_i − λ y_i:    u = λ A⁻¹ w̄,  Ā += u y_iᵀ,  w̄ ← w̄ − u,  λ̄ −= w̄·y_i
//   (3)  through w_1 = A⁻¹ x:            x̄ = A⁻¹ w̄,  Ā −= x̄ w_1ᵀ,  λ̄ −= x̄·w_1
//   (4)  through x = R z:                R̄ += x̄ zᵀ,  z̄ = Rᵀ x̄;  through x = G R z also Ḡ += x̄ (R z)ᵀ, and x̄ ← G x̄
//   (5)  through A once a memory:        Ḡ = Ā, or Ḡ += Ā G + G Ā for A = G² + λI;  R̄ += (Ḡ + Ḡᵀ) R.
// With few queries Ā = Xᵀ Y is of low rank and never formed: R̄ += Xᵀ (Y R) + Yᵀ (X R), with u and −x̄ in the rows of X,
// and y and w_1 in those of Y.
// Where (2) of read.h is replaced, w̄ − u is computed as G A⁻¹ w̄, or with G².
//
// λ̄ contains the trace of Ā. In (2) that is u·y_i, which w̄·y_i counts because it comes after w̄ ← w̄ − u.
//
// A memory without a factor has no gradient: its cotangents are NaN.
#pragma once

#include "cpu/linalg/vectors.h"
#include "cpu/reading/read.h"

namespace fastkm::FASTKM_LEVEL {

// Sums over the queries of one memory.
template <class Real>
struct ReadingGradient {
  Matrix<Real> mean;    // R̄ [K, C], before (5) without its last part
  Matrix<Real> solved;  // Ā [K, K]; no rows if it is of low rank
  Matrix<Real> target;  // Σ x̄ (R z)ᵀ [K, K], then Ḡ; no rows if the solve is not the squared-Gram one
  double ridge = 0;     // λ̄
};

// Whether Ā has so low a rank that forming it costs more than it saves.
template <class Real>
bool has_low_rank(const ReadingArgs<Real>& args) {
  return !args.squared_gram && 4 * args.num_iters * args.Q <= args.K;
}

// mean += (Xᵀ Y + Yᵀ X) R
template <class Real>
void add_low_rank(const Matrix<Real>& mean, const Matrix<Real>& x, const Matrix<Real>& y, const Matrix<Real>& r,
                  Arena& arena) {
  const Matrix<Real> projected = allocate_matrix<Real>(arena, x.rows, r.columns);
  product<Into::kSet>(projected, r.rows, operand(y), r);
  product<Into::kAdd>(mean, x.rows, transposed(x), projected);
  product<Into::kSet>(projected, r.rows, operand(x), r);
  product<Into::kAdd>(mean, x.rows, transposed(y), projected);
}

// Add what queries [first, first + kQueryTile) of memory b contribute to `gradient`, and store their own cotangents.
template <class Real>
void read_tile_backward(const ReadingArgs<Real>& args, const ReadingGrads<Real>& grads, int64_t b, int64_t first,
                        const FactoredMemory<Real>& memory, ReadingGradient<Real>& gradient, Arena& arena) {
  const int64_t K = args.K, C = args.C, count = smaller(kQueryTile, args.Q - first);
  const Real ridge = *args.ridge.at(b);
  const auto allocate = [&](int64_t columns) { return allocate_matrix<Real>(arena, count, columns); };
  const Matrix<Real> queries = allocate(C), weights = allocate(K), work = allocate(kBlock);
  const Matrix<Real> solutions = allocate_matrix<Real>(arena, args.num_iters * count, K);  // w₁, then y₁, y₂, …
  const auto solution = [&](int64_t i) { return solutions.rows_from(i * count, count); };
  const auto solve = [&](const Matrix<Real>& x) { solve_cholesky(memory.factor, memory.lower_transposed, x, work); };

  const bool literally = args.num_iters > 1 && is_dominated(args, b, memory);
  const Matrix<Real> next = allocate(K), codes = allocate(C), spare = allocate(K);

  // Read again.
  const Matrix<Real> target = args.squared_gram ? allocate(K) : solution(0);
  load_codes(queries, args.queries, args.queries_type, b, first);
  product<Into::kSet>(target, C, operand(queries), memory.mean_transposed);
  if (args.squared_gram) product<Into::kSet>(solution(0), K, operand(target), memory.gram);
  solve(solution(0));
  copy_rows(weights, solution(0));
  for (int64_t n = 1; n < args.num_iters; ++n) {
    const Matrix<Real> y = solution(n);
    copy_rows(y, weights);
    solve(y);
    if (literally) {
      multiply_gram(next, weights, memory, codes, spare);
      copy_rows(weights, next);
      solve(weights);
    } else {
      subtract_scaled(weights, ridge, y);
    }
  }

  // Through the decoding, by (1).
  const Matrix<Real> cotangent = allocate(K);
  fill_zero(cotangent);
  if (grads.weights.data) load_matrix(cotangent, grads.weights.from_row(first), b);
  if (grads.values.data) {
    const Matrix<Real> grad_values = allocate(C);
    load_matrix(grad_values, grads.values.from_row(first), b);
    product<Into::kAdd>(cotangent, C, operand(grad_values), memory.mean_transposed);
    product<Into::kAdd>(gradient.mean, count, transposed(weights), grad_values);
  }

  // Through the iterations, by (2), and the address, by (3).
  const Matrix<Real> left = allocate_matrix<Real>(arena, args.num_iters * count, K);  // X: −x̄, then u₁, u₂, …
  for (int64_t n = args.num_iters - 1; n >= 0; --n) {
    const Matrix<Real> u = left.rows_from(n * count, count);
    copy_rows(u, cotangent);
    solve(u);
    if (n > 0 && literally) multiply_gram(cotangent, u, memory, codes, spare);
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < K; ++k) {
        u.row(q)[k] *= n > 0 ? ridge : -1;
        if (n == 0)
          cotangent.row(q)[k] = -u.row(q)[k];
        else if (!literally)
          cotangent.row(q)[k] -= u.row(q)[k];
      }
    gradient.ridge -= inner_product(cotangent, solution(n));
  }
  if (has_low_rank(args))
    add_low_rank(gradient.mean, left, solutions, memory.mean, arena);
  else
    product<Into::kAdd>(gradient.solved, left.rows, transposed(left), solutions);

  // Through the target, by (4).
  const Matrix<Real> projected = args.squared_gram ? weights : cotangent;  // cotangent of R z
  if (args.squared_gram) {
    product<Into::kAdd>(gradient.target, count, transposed(cotangent), target);
    product<Into::kSet>(projected, K, operand(cotangent), memory.gram);
  }
  product<Into::kAdd>(gradient.mean, count, transposed(projected), queries);
  product<Into::kSet>(queries, K, operand(projected), memory.mean);
  store_codes(grads.to_queries, args.queries_type, b, first, queries);
}

// The backward of a read of memory `b`, where prepare(memory, arena) makes or loads its factor and returns a status. A
// memory that is to be computed again is left half way.
template <class Real, class Prepare>
Status read_backward_one(const ReadingArgs<Real>& args, const ReadingGrads<Real>& grads, int64_t b,
                         const Limits<Real>& limits, const Prepare& prepare) {
  const int64_t K = args.K;
  Arena& arena = Arena::fresh();
  const FactoredMemory<Real> memory = lay_out<Real>(args, [&](int64_t count) { return arena.allocate<Real>(count); });
  const Status status = prepare(memory, arena);
  if (limits.again(status)) return status;
  if (status != kGood) poison_factor(memory.factor);
  ReadingGradient<Real> gradient{.mean = allocate_matrix<Real>(arena, K, args.C),
                                 .solved = allocate_matrix<Real>(arena, has_low_rank(args) ? 0 : K, K),
                                 .target = allocate_matrix<Real>(arena, args.squared_gram ? K : 0, K)};
  for (const Matrix<Real>& m : {gradient.mean, gradient.solved, gradient.target}) fill_zero(m);
  const Arena::Mark tile_start = arena.mark();
  for (int64_t first = 0; first < args.Q; first += kQueryTile) {
    arena.release(tile_start);
    read_tile_backward(args, grads, b, first, memory, gradient, arena);
  }

  // Through the Gram matrix, by (5).
  if (!has_low_rank(args)) {
    add_transpose(gradient.solved);
    if (args.squared_gram) {
      product<Into::kAdd>(gradient.target, K, operand(gradient.solved), memory.gram);
      add_transpose(gradient.target);
    }
    const Matrix<Real>& gram_gradient = args.squared_gram ? gradient.target : gradient.solved;
    product<Into::kAdd>(gradient.mean, K, operand(gram_gradient), memory.mean);
  }
  store_matrix(grads.to_mean, b, gradient.mean);
  grads.to_ridge[b] = static_cast<Real>(gradient.ridge);
  return status;
}

// The same with a factor of its own.
template <class Real>
Status read_backward_one(const ReadingArgs<Real>& args, const ReadingGrads<Real>& grads, int64_t b,
                         const Limits<Real>& limits) {
  return read_backward_one(args, grads, b, limits, [&](const FactoredMemory<Real>& memory, Arena& arena) {
    return factor_memory(args, b, memory, limits, arena);
  });
}

template <class Real>
void read_backward(const ReadingArgs<Real>& args, const ReadingGrads<Real>& grads, int64_t begin, int64_t end) {
  const Limits<Real> limits = limits_of_gradient<Real>(args.K, args.C);
  for (int64_t b = begin; b < end; ++b) {
    const Status status = read_backward_one(args, grads, b, limits);
    if constexpr (kHasDouble<Real>) {
      if (!limits.again(status)) continue;
      Doubles doubles(b);
      const ReadingGrads<double> wide{
          .values = doubles.argument(grads.values, args.Q, args.C),
          .weights = doubles.argument(grads.weights, args.Q, args.K),
          .to_mean = doubles.result(grads.to_mean, args.K, args.C),
          .to_queries = doubles.codes_result(grads.to_queries, args.queries_type, args.Q, args.C),
          .to_ridge = doubles.result(grads.to_ridge)};
      read_backward_one(in_double(args, doubles), wide, 0, limits_of<double>(args.K, args.C));
      doubles.put_out();
    }
  }
}

}  // namespace fastkm::FASTKM_LEVEL
