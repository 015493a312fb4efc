// Backward of addressing and reading: one factor serves the solves of both directions.
#pragma once

#include "cpu/linalg/vectors.h"
#include "cpu/reading/read.h"

namespace fastkm::FASTKM_LEVEL {

// What the queries of one memory add up to. A bar marks a cotangent: R̄ is that of R.
template <class T>
struct ReadingGradient {
  Matrix<T> mean;    // R̄ [K, C], at first without what comes through G
  Matrix<T> solved;  // Ā [K, K]
  Matrix<T> target;  // of no rows unless the solve is the squared-Gram one: Σ v (R z)ᵀ [K, K], then Ḡ
  double ridge = 0;  // λ̄
};

// Add what queries [first, first + kQueryTile) of memory b contribute, and store their own cotangents.
template <class T>
void read_tile_backward(const ReadingArgs<T>& args, const ReadingGrads<T>& grads, int64_t b, int64_t first,
                        const FactoredMemory<T>& memory, ReadingGradient<T>& gradient, Arena& arena) {
  const int64_t K = args.K, C = args.C, count = smaller(kQueryTile, args.Q - first);
  const T ridge = *args.ridge.at(b);
  const auto take = [&](int64_t columns) { return take_matrix<T>(arena, count, columns); };
  const Matrix<T> queries = take(C), weights = take(K), work = take(kBlock);
  const Matrix<T> solutions = take_matrix<T>(arena, args.num_iters * count, K);  // w₁, then y₁, y₂, …
  const auto solution = [&](int64_t i) { return solutions.rows_from(i * count, count); };
  const auto solve = [&](const Matrix<T>& x) { solve_rows(memory.factor, memory.lower_transposed, x, work); };

  // Read again: w₁ = A⁻¹ x with x = R z or G R z, then yᵢ = A⁻¹ wᵢ and wᵢ₊₁ = wᵢ − λ yᵢ.
  const Matrix<T> target = args.squared_gram ? take(K) : solution(0);
  load_matrix(queries, args.queries.from_row(first), b);
  product<Into::kSet>(target, C, left(queries), memory.mean_transposed);
  if (args.squared_gram) product<Into::kSet>(solution(0), K, left(target), memory.gram);
  solve(solution(0));
  copy_rows(weights, solution(0));
  for (int64_t n = 1; n < args.num_iters; ++n) {
    const Matrix<T> y = solution(n);
    copy_rows(y, weights);
    solve(y);
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < K; ++k) weights.row(q)[k] -= ridge * y.row(q)[k];
  }

  // Back through the decoding ẑ = Rᵀ wₙ.
  const Matrix<T> cotangent = take(K), solved = take(K);
  fill_zero(cotangent);
  if (grads.weights.data) load_matrix(cotangent, grads.weights.from_row(first), b);
  if (grads.values.data) {
    const Matrix<T> grad_values = take(C);
    load_matrix(grad_values, grads.values.from_row(first), b);
    product<Into::kAdd>(cotangent, C, left(grad_values), memory.mean_transposed);
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
    product<Into::kSet>(solved, K, left(cotangent), memory.gram);
  }
  const Matrix<T>& projected = args.squared_gram ? solved : cotangent;  // cotangent of R z
  product<Into::kAdd>(gradient.mean, count, transposed(projected), queries);
  product<Into::kSet>(queries, K, left(projected), memory.mean);
  store_matrix(grads.to_queries.from_row(first), b, queries);
}

template <class T>
void read_backward(const ReadingArgs<T>& args, const ReadingGrads<T>& grads, int64_t begin, int64_t end) {
  const int64_t K = args.K;
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const FactoredMemory<T> memory = lay_out<T>(args, [&](int64_t count) { return arena.take<T>(count); });
    factor_memory(args, b, memory, arena);
    if (args.info[b] != kGood) poison(memory.factor);
    ReadingGradient<T> gradient{.mean = take_matrix<T>(arena, K, args.C),
                                .solved = take_matrix<T>(arena, K, K),
                                .target = take_matrix<T>(arena, args.squared_gram ? K : 0, K)};
    for (const Matrix<T>& m : {gradient.mean, gradient.solved, gradient.target}) fill_zero(m);
    const Arena::Mark tile_start = arena.mark();
    for (int64_t first = 0; first < args.Q; first += kQueryTile) {
      arena.release(tile_start);
      read_tile_backward(args, grads, b, first, memory, gradient, arena);
    }

    // Back through the Gram matrix: R̄ += (Ḡ + Ḡᵀ) R with Ḡ = Ā, or Ḡ = Ā G + G Ā + Σ v (R z)ᵀ.
    add_transpose(gradient.solved);
    if (args.squared_gram) {
      product<Into::kAdd>(gradient.target, K, left(gradient.solved), memory.gram);
      add_transpose(gradient.target);
    }
    const Matrix<T>& gram_gradient = args.squared_gram ? gradient.target : gradient.solved;
    product<Into::kAdd>(gradient.mean, K, left(gram_gradient), memory.mean);
    store_matrix(grads.to_mean, b, gradient.mean);
    grads.to_ridge[b] = static_cast<T>(gradient.ridge);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
