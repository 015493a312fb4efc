// The search for weights that factors a matrix anew for every solve.
#pragma once

#include <utility>

#include "cpu/writing/search.h"

namespace fastkm::FASTKM_LEVEL {

// One solve of a pattern, and the change of the mean that its weights would make: R + c δᵀ.
template <class Real>
struct Solution {
  Real *w, *a, *c, *g, *r;  // [K]: weights, U w, a/s, G w, R δ = x − G w
  Real s, along, d;         // innovation variance, δ·z, δ·δ
};

template <class Real>
Solution<Real> allocate_solution(int64_t K, Arena& arena) {
  const Matrix<Real> vectors = allocate_matrix<Real>(arena, 5, K);
  fill_zero(vectors);
  return {vectors.row(0), vectors.row(1), vectors.row(2), vectors.row(3), vectors.row(4), 0, 0, 0};
}

// M += c rᵀ + r cᵀ + d c cᵀ: what the attempt does to the Gram matrix.
template <class Real>
void update_gram(const Matrix<Real>& m, const Solution<Real>& by, Real sign) {
  for (int64_t i = 0; i < m.rows; ++i) {
    const Real of_c = sign * by.c[i], of_r = sign * (by.r[i] + by.d * by.c[i]);
    for (int64_t j = 0; j < m.rows; ++j) m.row(i)[j] += of_c * by.r[j] + of_r * by.c[j];
  }
}

// Solves that factor afresh: needed for the squared-Gram solve, and when a pattern is solved more than once, each time
// against the mean that the attempt before would give.
template <class Real>
struct RefactoringSolver {
  const GramSpace<Real>& space;
  const WritingArgs<Real>& args;
  const int64_t K, padded;
  const Real ridge;
  const Factor<Real> factor;
  const Matrix<Real> lower_transposed, gram, work, target;

  RefactoringSolver(const GramSpace<Real>& space, const WritingArgs<Real>& args, Real ridge, Arena& arena)
      : space(space),
        args(args),
        K(args.posterior.K),
        padded(round_up(K, kLanes<Real>)),
        ridge(ridge),
        factor(allocate_factor<Real>(arena, K)),
        lower_transposed(allocate_matrix<Real>(arena, K, K)),
        gram(allocate_matrix<Real>(arena, K, K)),
        work(allocate_matrix<Real>(arena, 1, kBlock)),
        target(allocate_matrix<Real>(arena, 2, K)) {
    fill_zero(target);
  }

  // Factor the matrix of the next attempt: its Gram matrix in `gram`, its x in row 0 of `target`.
  bool prepare(const Real* x, const Solution<Real>* before, Arena& arena) const {
    copy_rows(gram, space.gram);
    __builtin_memcpy(target.data, x, static_cast<size_t>(padded) * sizeof(Real));
    if (before) {
      update_gram(gram, *before, Real(1));
      for (int64_t i = 0; i < padded; ++i) target.data[i] += before->along * before->c[i];
    }
    regularise(factor.lower, gram, ridge, args.squared_gram);
    const bool good = cholesky(factor, arena);
    transpose(lower_transposed, factor.lower);
    return good;
  }

  // y ← A⁻¹ y, or (G² + λI)⁻¹ y.
  void solve(Real* y) const {
    solve_cholesky(factor, lower_transposed, Matrix<Real>{y, 1, K, target.ld}, work);
    for (int64_t i = K; i < target.ld; ++i) y[i] = 0;
  }

  bool attempt(int64_t t, Real noise, const Solution<Real>* before, Solution<Real>& out, Arena& arena) const {
    const Real* x = space.cross.row(t);
    const bool good = prepare(x, before, arena);
    if (args.squared_gram)
      product_symmetric(out.w, gram, padded, target.data);
    else
      __builtin_memcpy(out.w, target.data, static_cast<size_t>(padded) * sizeof(Real));
    solve(out.w);
    product_symmetric(out.a, space.cov, padded, out.w);
    product_symmetric(out.g, space.gram, padded, out.w);
    out.s = dot(padded, out.w, out.a) + noise;
    out.along = space.inner.row(t)[t] - dot(padded, out.w, x);
    out.d = out.along - dot(padded, out.w, x) + dot(padded, out.w, out.g);
    for (int64_t i = 0; i < padded; ++i) {
      out.c[i] = out.a[i] / out.s;
      out.r[i] = x[i] - out.g[i];
    }
    return good;
  }

  // The last attempt is written: G and U move on; and back, when that is undone.
  void write(const Solution<Real>& last) const { move(last, Real(1)); }
  void undo(const Solution<Real>& last) const { move(last, Real(-1)); }

 private:
  void move(const Solution<Real>& last, Real sign) const {
    update_gram(space.gram, last, sign);
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < K; ++j) space.cov.row(i)[j] -= sign * last.a[i] * last.c[j];
  }
};

// What is needed to undo each pattern; rows are patterns.
template <class Real>
struct RefactoringTape {
  Matrix<Real> a, c, r;  // [t, K], of the last attempt
  Matrix<Real> along;    // [t, t]
  Real d[kChunk];

  Solution<Real> written(int64_t t, const Matrix<Real>& weights) const {
    return {
        .w = weights.row(t), .a = a.row(t), .c = c.row(t), .g = nullptr, .r = r.row(t), .s = 0, .along = 0, .d = d[t]};
  }
};

template <class Real>
RefactoringTape<Real> allocate_tape(int64_t K, int64_t count, Arena& arena) {
  return {allocate_matrix<Real>(arena, count, K), allocate_matrix<Real>(arena, count, K),
          allocate_matrix<Real>(arena, count, K), allocate_matrix<Real>(arena, count, count)};
}

template <class Real>
Status find_weights_refactored(const GramSpace<Real>& space, const WritingArgs<Real>& args, int64_t b, int64_t first,
                               Arena& arena, RefactoringTape<Real>* tape = nullptr) {
  const RefactoringSolver<Real> solver(space, args, *args.ridge.at(b), arena);
  Solution<Real> now = allocate_solution<Real>(solver.K, arena), before = allocate_solution<Real>(solver.K, arena);
  const Arena::Mark step_start = arena.mark();
  Status status = kGood;
  for (int64_t t = 0; t < space.weights.rows; ++t) {
    if (!args.posterior.unmasked(b, first + t)) continue;
    const Real noise = *args.posterior.noise_var.at(b, first + t);
    for (int64_t n = 0; n < args.num_opt_iters; ++n) {
      arena.release(step_start);
      std::swap(now, before);
      if (!solver.attempt(t, noise, n > 0 ? &before : nullptr, now, arena)) status = kNotPositiveDefinite;
    }
    __builtin_memcpy(space.weights.row(t), now.w, static_cast<size_t>(solver.K) * sizeof(Real));
    solver.write(now);
    update_cross(space, t, now.w, now.c, solver.padded, tape ? tape->along.row(t) : nullptr);
    if (!tape) continue;
    __builtin_memcpy(tape->a.row(t), now.a, static_cast<size_t>(solver.padded) * sizeof(Real));
    __builtin_memcpy(tape->c.row(t), now.c, static_cast<size_t>(solver.padded) * sizeof(Real));
    __builtin_memcpy(tape->r.row(t), now.r, static_cast<size_t>(solver.padded) * sizeof(Real));
    tape->d[t] = now.d;
  }
  return status;
}

}  // namespace fastkm::FASTKM_LEVEL
