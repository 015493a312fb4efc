// Backward of addressing and reading. One factor serves the solves of both directions.
//
// A tile of queries is read again, by the equations of read.h with y_i = A⁻¹ w_i, and gone through backwards. Bars are
// cotangents:
//   (1)  through ẑ = Rᵀ w_n:             w̄ += R z̄,  R̄ += w_n z̄ᵀ
//   (2)  through w_i+1 = w_i − λ y_i:    u = λ A⁻¹ w̄,  Ā += u y_iᵀ,  w̄ ← w̄ − u,  λ̄ −= w̄·y_i
//   (3)  through w_1 = A⁻¹ x:            x̄ = A⁻¹ w̄,  Ā −= x̄ w_1ᵀ,  λ̄ −= x̄·w_1
//   (4)  through x = R z:                R̄ += x̄ zᵀ,  z̄ = Rᵀ x̄;  through x = G R z also Ḡ += x̄ (R z)ᵀ, and x̄ ← G x̄
//   (5)  through A once a memory:        Ḡ = Ā, or Ḡ += Ā G + G Ā for A = G² + λI;  R̄ += (Ḡ + Ḡᵀ) R.
// If the system is solved in C, w_n = R y_n is one step more, R̄ += w̄ y_nᵀ and ȳ = Rᵀ w̄; (2), (3) and (5) are those of
// B, with Rᵀ for R; and (4) is z̄ = x̄.
// With few queries Ā = Xᵀ Y is of low rank and never formed: S̄ += Xᵀ (Y S) + Yᵀ (X S), with u and −x̄ in the rows of X,
// and y and w_1 in those of Y.
// Where (2) of read.h is replaced, w̄ − u is computed as G A⁻¹ w̄, or with G².
//
// λ̄ contains the trace of Ā. In (2) that is u·y_i, which w̄·y_i counts because it comes after w̄ ← w̄ − u.
//
// A memory without a factor has no gradient: its cotangents are NaN.
#pragma once

#include "cpu/reading/read.h"

namespace fastkm::FASTKM_LEVEL {

// Sums over the queries of one memory.
template <class Real>
struct ReadingGradient {
  Matrix<Real> mean;    // R̄ [K, C], before (5) without its last part
  Matrix<Real> solved;  // Ā [N, N]; no rows if it is of low rank
  Matrix<Real> target;  // Σ x̄ (R z)ᵀ [K, K], then Ḡ; no rows if the solve is not the squared-Gram one
  double ridge = 0;     // λ̄
};

// Whether Ā has so low a rank that forming it costs more than it saves.
template <class Real>
bool has_low_rank(const ReadingArgs<Real>& args, int64_t N) {
  return !args.squared_gram && 4 * args.num_iters * args.Q <= N;
}

// mean += (Xᵀ Y + Yᵀ X) R, or R (Xᵀ Y + Yᵀ X) if the system is solved in C
template <class Real>
void add_low_rank(const Matrix<Real>& mean, const Matrix<Real>& x, const Matrix<Real>& y,
                  const FactoredMemory<Real>& memory, Arena& arena) {
  const Matrix<Real>& s = memory.system_rows();
  const Matrix<Real> projected = allocate_matrix<Real>(arena, x.rows, s.columns);
  const auto add = [&](const Matrix<Real>& left, const Matrix<Real>& right) {
    product<Into::kSet>(projected, s.rows, operand(right), s);
    if (memory.in_codes())
      product<Into::kAdd>(mean, x.rows, transposed(projected), left);
    else
      product<Into::kAdd>(mean, x.rows, transposed(left), projected);
  };
  add(x, y);
  add(y, x);
}

// Through the decoding of `weights`, by (1): the cotangent of `state` [count, N], which holds w_n or y_n.
template <class Real>
Matrix<Real> decode_backward(const ReadingArgs<Real>& args, const ReadingGrads<Real>& grads, int64_t b, int64_t first,
                             const FactoredMemory<Real>& memory, const Matrix<Real>& weights, const Matrix<Real>& state,
                             ReadingGradient<Real>& gradient, Arena& arena) {
  const int64_t K = args.K, C = args.C, count = state.rows;
  const auto allocate = [&](int64_t columns) { return allocate_matrix<Real>(arena, count, columns); };
  const Matrix<Real> cotangent = allocate(K);
  fill_zero(cotangent);
  if (grads.weights.data) load_matrix(cotangent, grads.weights.from_row(first), b);
  if (grads.values.data) {
    const Matrix<Real> grad_values = allocate(C);
    load_matrix(grad_values, grads.values.from_row(first), b);
    product<Into::kAdd>(cotangent, C, operand(grad_values), memory.mean_transposed);
    product<Into::kAdd>(gradient.mean, count, transposed(weights), grad_values);
  }
  if (!memory.in_codes()) return cotangent;
  const Matrix<Real> to_state = allocate(C);
  product<Into::kAdd>(gradient.mean, count, transposed(cotangent), state);
  product<Into::kSet>(to_state, K, operand(cotangent), memory.mean);
  return to_state;
}

// Add what queries [first, first + kQueryTile) of memory b contribute to `gradient`, and store their own cotangents.
// Returns false, and leaves them half way, if their weights are not exact.
template <class Real>
bool read_tile_backward(const ReadingArgs<Real>& args, const ReadingGrads<Real>& grads, int64_t b, int64_t first,
                        const FactoredMemory<Real>& memory, const Limits<Real>& limits, ReadingGradient<Real>& gradient,
                        Arena& arena) {
  const int64_t K = args.K, C = args.C, N = memory.factor.size(), count = smaller(kQueryTile, args.Q - first);
  const Real ridge = *args.ridge.at(b);
  const bool in_codes = memory.in_codes();
  const auto allocate = [&](int64_t columns) { return allocate_matrix<Real>(arena, count, columns); };
  const Matrix<Real> queries = allocate(C), state = allocate(N), work = allocate(kBlock);
  const Matrix<Real> solutions = allocate_matrix<Real>(arena, args.num_iters * count, N);  // w₁, then y₁, y₂, …
  const auto solution = [&](int64_t i) { return solutions.rows_from(i * count, count); };
  const auto solve = [&](const Matrix<Real>& x) { solve_cholesky(memory.factor, memory.lower_transposed, x, work); };

  const bool literally = args.num_iters > 1 && is_dominated(args, b, memory);
  const Matrix<Real> next = allocate(N), between = allocate(memory.system_rows().columns), spare = allocate(N);

  // Read again.
  const Matrix<Real> target = args.squared_gram ? allocate(K) : solution(0);
  load_codes(queries, args.queries, args.queries_type, b, first);
  if (in_codes)
    copy_rows(target, queries);
  else
    product<Into::kSet>(target, C, operand(queries), memory.mean_transposed);
  if (args.squared_gram) product<Into::kSet>(solution(0), K, operand(target), memory.gram);
  solve(solution(0));
  copy_rows(state, solution(0));
  for (int64_t n = 1; n < args.num_iters; ++n) {
    const Matrix<Real> y = solution(n);
    copy_rows(y, state);
    solve(y);
    if (literally) {
      multiply_gram(next, state, memory, between, spare);
      copy_rows(state, next);
      solve(state);
    } else {
      subtract_scaled(state, ridge, y);
    }
  }

  const Matrix<Real> weights = in_codes ? allocate(K) : state;
  if (in_codes) product<Into::kSet>(weights, C, operand(state), memory.mean_transposed);
  Real* const terms = arena.allocate<Real>(round_up(count, kLanes<Real>));
  squared_norms(literally ? state : solution(0), terms);
  if (in_codes && !sums_are_exact(weights, terms, *memory.largest - ridge, limits, arena)) return false;
  const Matrix<Real> cotangent = decode_backward(args, grads, b, first, memory, weights, state, gradient, arena);

  // Through the iterations, by (2), and the address, by (3).
  const Matrix<Real> left = allocate_matrix<Real>(arena, args.num_iters * count, N);  // X: −x̄, then u₁, u₂, …
  for (int64_t n = args.num_iters - 1; n >= 0; --n) {
    const Matrix<Real> u = left.rows_from(n * count, count);
    copy_rows(u, cotangent);
    solve(u);
    if (n > 0 && literally) multiply_gram(cotangent, u, memory, between, spare);
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < N; ++k) {
        u.row(q)[k] *= n > 0 ? ridge : -1;
        if (n == 0)
          cotangent.row(q)[k] = -u.row(q)[k];
        else if (!literally)
          cotangent.row(q)[k] -= u.row(q)[k];
      }
    gradient.ridge -= inner_product(cotangent, solution(n));
  }
  if (has_low_rank(args, N))
    add_low_rank(gradient.mean, left, solutions, memory, arena);
  else
    product<Into::kAdd>(gradient.solved, left.rows, transposed(left), solutions);

  // Through the target, by (4).
  if (in_codes) {
    store_codes(grads.to_queries, args.queries_type, b, first, cotangent);
    return true;
  }
  const Matrix<Real> projected = args.squared_gram ? state : cotangent;  // cotangent of R z
  if (args.squared_gram) {
    product<Into::kAdd>(gradient.target, count, transposed(cotangent), target);
    product<Into::kSet>(projected, K, operand(cotangent), memory.gram);
  }
  product<Into::kAdd>(gradient.mean, count, transposed(projected), queries);
  product<Into::kSet>(queries, K, operand(projected), memory.mean);
  store_codes(grads.to_queries, args.queries_type, b, first, queries);
  return true;
}

// The backward of a read of memory `b` by a system of size N, where prepare(memory, arena) makes or loads its factor
// and returns a status. A memory that is to be computed again is left half way.
template <class Real, class Prepare>
Status read_backward_one(const ReadingArgs<Real>& args, const ReadingGrads<Real>& grads, int64_t b, int64_t N,
                         const Limits<Real>& limits, const Prepare& prepare) {
  const int64_t K = args.K;
  Arena& arena = Arena::fresh();
  const FactoredMemory<Real> memory = allocate_factored(args, N, arena);
  const Status status = prepare(memory, arena);
  if (limits.again(status)) return status;
  if (status != kGood) poison_factor(memory.factor);
  ReadingGradient<Real> gradient{.mean = allocate_matrix<Real>(arena, K, args.C),
                                 .solved = allocate_matrix<Real>(arena, has_low_rank(args, N) ? 0 : N, N),
                                 .target = allocate_matrix<Real>(arena, args.squared_gram ? K : 0, K)};
  for (const Matrix<Real>& m : {gradient.mean, gradient.solved, gradient.target}) fill_zero(m);
  const Arena::Mark tile_start = arena.mark();
  for (int64_t first = 0; first < args.Q; first += kQueryTile) {
    arena.release(tile_start);
    if (!read_tile_backward(args, grads, b, first, memory, limits, gradient, arena)) return kInexactSystem;
  }

  // Through the Gram matrix, by (5).
  if (!has_low_rank(args, N)) {
    add_transpose(gradient.solved);
    if (args.squared_gram) {
      product<Into::kAdd>(gradient.target, K, operand(gradient.solved), memory.gram);
      add_transpose(gradient.target);
    }
    const Matrix<Real>& gram_gradient = args.squared_gram ? gradient.target : gradient.solved;
    if (memory.in_codes())
      product<Into::kAdd>(gradient.mean, N, operand(memory.mean), gram_gradient);
    else
      product<Into::kAdd>(gradient.mean, N, operand(gram_gradient), memory.mean);
  }
  store_matrix(grads.to_mean, b, gradient.mean);
  grads.to_ridge[b] = static_cast<Real>(gradient.ridge);
  return status;
}

// The same with a factor of its own.
template <class Real>
Status read_backward_one(const ReadingArgs<Real>& args, const ReadingGrads<Real>& grads, int64_t b,
                         const Limits<Real>& limits) {
  return read_backward_one(
      args, grads, b, system_size(args), limits,
      [&](const FactoredMemory<Real>& memory, Arena& arena) { return factor_memory(args, b, memory, limits, arena); });
}

inline void read_backward_in_double(const ReadingArgs<float>& args, const ReadingGrads<float>& grads, int64_t b) {
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

template <class Real>
void read_backward(const ReadingArgs<Real>& args, const ReadingGrads<Real>& grads, int64_t begin, int64_t end) {
  Limits<Real> limits = limits_of_gradient<Real>(args.K, args.C);
  if (kHasDouble<Real> && system_size(args) < args.K) limits.condition = 4;
  for (int64_t b = begin; b < end; ++b) {
    const Status status = read_backward_one(args, grads, b, limits);
    if constexpr (kHasDouble<Real>)
      if (limits.again(status)) read_backward_in_double(args, grads, b);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
