// Backward of addressing and reading: one factor serves the solves of both directions.
#pragma once

#include "cpu/linalg/vectors.h"
#include "cpu/reading/read.h"

namespace fastkm::FASTKM_LEVEL {

// What the queries of one memory add up to. A bar marks a cotangent: R̄ is that of R.
template <class Real>
struct ReadingGradient {
  Matrix<Real> mean;    // R̄ [K, C], at first without what comes through G
  Matrix<Real> solved;  // Ā [K, K]
  Matrix<Real> target;  // of no rows unless the solve is the squared-Gram one: Σ v (R z)ᵀ [K, K], then Ḡ
  double ridge = 0;     // λ̄
};

// Add what queries [first, first + kQueryTile) of memory b contribute, and store their own cotangents.
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

  // Read again: w₁ = A⁻¹ x with x = R z or G R z, then yᵢ = A⁻¹ wᵢ and wᵢ₊₁ = wᵢ − λ yᵢ.
  const Matrix<Real> target = args.squared_gram ? allocate(K) : solution(0);
  load_matrix(queries, args.queries.from_row(first), b);
  product<Into::kSet>(target, C, operand(queries), memory.mean_transposed);
  if (args.squared_gram) product<Into::kSet>(solution(0), K, operand(target), memory.gram);
  solve(solution(0));
  copy_rows(weights, solution(0));
  for (int64_t n = 1; n < args.num_iters; ++n) {
    const Matrix<Real> y = solution(n);
    copy_rows(y, weights);
    solve(y);
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < K; ++k) weights.row(q)[k] -= ridge * y.row(q)[k];
  }

  // Back through the decoding ẑ = Rᵀ wₙ.
  const Matrix<Real> cotangent = allocate(K), solved = allocate(K);
  fill_zero(cotangent);
  if (grads.weights.data) load_matrix(cotangent, grads.weights.from_row(first), b);
  if (grads.values.data) {
    const Matrix<Real> grad_values = allocate(C);
    load_matrix(grad_values, grads.values.from_row(first), b);
    product<Into::kAdd>(cotangent, C, operand(grad_values), memory.mean_transposed);
    product<Into::kAdd>(gradient.mean, count, transposed(weights), grad_values);
  }

  // Back through the iterations: u = λ A⁻¹ w̄, Ā += u yᵀ, w̄ ← w̄ − u. The trace of Ā belongs to λ̄ as well, and
  // subtracting it before rather than after the sum over w̄ y leaves the new w̄ there.
  for (int64_t n = args.num_iters - 1; n > 0; --n) {
    copy_rows(solved, cotangent);
    solve(solved);
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < K; ++k) {
        solved.row(q)[k] *= ridge;
        cotangent.row(q)[k] -= solved.row(q)[k];
      }
    product<Into::kAdd>(gradient.solved, count, transposed(solved), solution(n));
    gradient.ridge -= inner_product(cotangent, solution(n));
  }

  // Back through the address: v = A⁻¹ w̄ = x̄, Ā −= v w₁ᵀ.
  solve(cotangent);
  product<Into::kSubtract>(gradient.solved, count, transposed(cotangent), solution(0));
  gradient.ridge -= inner_product(cotangent, solution(0));
  if (args.squared_gram) {
    product<Into::kAdd>(gradient.target, count, transposed(cotangent), target);
    product<Into::kSet>(solved, K, operand(cotangent), memory.gram);
  }
  const Matrix<Real>& projected = args.squared_gram ? solved : cotangent;  // cotangent of R z
  product<Into::kAdd>(gradient.mean, count, transposed(projected), queries);
  product<Into::kSet>(queries, K, operand(projected), memory.mean);
  store_matrix(grads.to_queries.from_row(first), b, queries);
}

template <class Real>
void read_backward(const ReadingArgs<Real>& args, const ReadingGrads<Real>& grads, int64_t begin, int64_t end) {
  const int64_t K = args.K;
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const FactoredMemory<Real> memory = lay_out<Real>(args, [&](int64_t count) { return arena.allocate<Real>(count); });
    factor_memory(args, b, memory, arena);
    if (args.info[b] != kGood) poison_factor(memory.factor);
    ReadingGradient<Real> gradient{.mean = allocate_matrix<Real>(arena, K, args.C),
                                   .solved = allocate_matrix<Real>(arena, K, K),
                                   .target = allocate_matrix<Real>(arena, args.squared_gram ? K : 0, K)};
    for (const Matrix<Real>& m : {gradient.mean, gradient.solved, gradient.target}) fill_zero(m);
    const Arena::Mark tile_start = arena.mark();
    for (int64_t first = 0; first < args.Q; first += kQueryTile) {
      arena.release(tile_start);
      read_tile_backward(args, grads, b, first, memory, gradient, arena);
    }

    // Back through the Gram matrix: R̄ += (Ḡ + Ḡᵀ) R with Ḡ = Ā, or Ḡ = Ā G + G Ā + Σ v (R z)ᵀ.
    add_transpose(gradient.solved);
    if (args.squared_gram) {
      product<Into::kAdd>(gradient.target, K, operand(gradient.solved), memory.gram);
      add_transpose(gradient.target);
    }
    const Matrix<Real>& gram_gradient = args.squared_gram ? gradient.target : gradient.solved;
    product<Into::kAdd>(gradient.mean, K, operand(gram_gradient), memory.mean);
    store_matrix(grads.to_mean, b, gradient.mean);
    grads.to_ridge[b] = static_cast<Real>(gradient.ridge);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
