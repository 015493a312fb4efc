// Backward of the search that factors anew for every solve.
#pragma once

#include "cpu/writing/search_backward.h"
#include "cpu/writing/search_refactored.h"

namespace fastkm::FASTKM_LEVEL {

// Reverse of one attempt. Takes the cotangents of its w, a, c, r, along and d, adds those of G, U, x, Q and λ, and
// leaves those of the matrix and vector it solved with in `gram_bar` and `x_bar`.
template <class Real>
struct SolutionCotangents {
  Real *w, *a, *c, *r;  // [K]
  Real along = 0, d = 0;
};

template <class Real>
void solve_weights_backward(const RefactoringSolver<Real>& solver, int64_t t, const Solution<Real>& made,
                            const Solution<Real>* before, SolutionCotangents<Real>& of, SearchCotangents<Real>& bar,
                            const Matrix<Real>& gram_bar, Real* solved_x_bar, Arena& arena) {
  const GramSpace<Real>& space = solver.space;
  const int64_t K = solver.K, padded = solver.padded;
  const Matrix<Real> vectors = allocate_matrix<Real>(arena, 5, K);
  fill_zero(vectors);
  Real *g_bar = vectors.row(0), *moved = vectors.row(1), *v = vectors.row(2), *gram_w = vectors.row(3),
       *gram_v = vectors.row(4);
  const Real* x = space.cross.row(t);
  Real* x_bar = bar.cross.row(t);

  // d = along − w·x + w·g,  along = Q_tt − w·x,  r = x − g,  g = G w
  of.along += of.d;
  bar.inner.row(t)[t] += of.along;
  for (int64_t i = 0; i < padded; ++i) {
    g_bar[i] = of.d * made.w[i] - of.r[i];
    of.w[i] += of.d * (made.g[i] - x[i]) - of.along * x[i];
    x_bar[i] += of.r[i] - (of.d + of.along) * made.w[i];
  }
  product_symmetric(moved, space.gram, padded, g_bar);
  add_scaled(padded, of.w, Real(1), moved);
  add_symmetric_outer(bar.gram, Real(1), g_bar, made.w);

  // c = a/s,  s = w·a + σ²,  a = U w
  const Real s_bar = -dot(padded, of.c, made.c) / made.s;
  bar.noise[t] += s_bar;
  for (int64_t i = 0; i < padded; ++i) {
    of.a[i] += of.c[i] / made.s + s_bar * made.w[i];
    of.w[i] += s_bar * made.a[i];
  }
  product_symmetric(moved, space.cov, padded, of.a);
  add_scaled(padded, of.w, Real(1), moved);
  add_symmetric_outer(bar.cov, Real(1), of.a, made.w);

  // (G + λI) w = x, or (G² + λI) w = G x, with the G and x that the attempt before left.
  solver.prepare(x, before, arena);
  __builtin_memcpy(v, of.w, static_cast<size_t>(padded) * sizeof(Real));
  solver.solve(v);
  bar.ridge -= dot(padded, v, made.w);
  fill_zero(gram_bar);
  if (solver.args.squared_gram) {
    product_symmetric(gram_v, solver.gram, padded, v);
    product_symmetric(gram_w, solver.gram, padded, made.w);
    add_symmetric_outer(gram_bar, Real(-1), v, gram_w);
    add_symmetric_outer(gram_bar, Real(-1), gram_v, made.w);
    add_symmetric_outer(gram_bar, Real(1), v, solver.target.data);
    __builtin_memcpy(solved_x_bar, gram_v, static_cast<size_t>(padded) * sizeof(Real));
  } else {
    add_symmetric_outer(gram_bar, Real(-1), v, made.w);
    __builtin_memcpy(solved_x_bar, v, static_cast<size_t>(padded) * sizeof(Real));
  }
}

// Cotangents of an attempt's c, r and d from that of G + c rᵀ + r cᵀ + d c cᵀ.
template <class Real>
void update_gram_backward(const Matrix<Real>& gram_bar, const Solution<Real>& by, int64_t padded,
                          SolutionCotangents<Real>& of, Real* gram_c, Real* gram_r) {
  product_transposed<Into::kSet>({gram_c, gram_r}, gram_bar, gram_bar.rows, padded, {by.c, by.r});
  of.d += dot(padded, by.c, gram_c);
  for (int64_t i = 0; i < padded; ++i) {
    of.c[i] += 2 * gram_r[i] + 2 * by.d * gram_c[i];
    of.r[i] += 2 * gram_c[i];
  }
}

// Reverse of find_weights_afresh. `space` arrives as the search left it; each pattern is undone, and its attempts are
// made again from the state before it.
template <class Real>
void find_weights_refactored_backward(const GramSpace<Real>& space, const RefactoringTape<Real>& tape,
                                      const WritingArgs<Real>& args, int64_t b, int64_t first,
                                      SearchCotangents<Real>& bar, Arena& arena) {
  const RefactoringSolver<Real> solver(space, args, *args.ridge.at(b), arena);
  const int64_t K = solver.K, padded = solver.padded, attempts = args.num_opt_iters;
  const Matrix<Real> gram_bar = allocate_matrix<Real>(arena, K, K), vectors = allocate_matrix<Real>(arena, 8, K);
  Real *gram_c = vectors.row(4), *gram_r = vectors.row(5), *solved_x_bar = vectors.row(6), *cov_c = vectors.row(7);
  Solution<Real>* made = arena.allocate<Solution<Real>>(attempts);
  for (int64_t n = 0; n < attempts; ++n) made[n] = allocate_solution<Real>(K, arena);
  const Arena::Mark step_start = arena.mark();
  for (int64_t t = space.weights.rows - 1; t >= 0; --t) {
    if (!args.posterior.unmasked(b, first + t)) continue;
    solver.undo(tape.written(t, space.weights));
    const Real noise = *args.posterior.noise_var.at(b, first + t);
    for (int64_t n = 0; n < attempts; ++n) {
      arena.release(step_start);
      solver.attempt(t, noise, n > 0 ? &made[n - 1] : nullptr, made[n], arena);
    }

    // Through what the last attempt wrote.
    const Solution<Real>& last = made[attempts - 1];
    fill_zero(vectors);
    SolutionCotangents<Real> of{vectors.row(0), vectors.row(1), vectors.row(2), vectors.row(3)};
    __builtin_memcpy(of.w, bar.weights.row(t), static_cast<size_t>(K) * sizeof(Real));
    update_gram_backward(bar.gram, last, padded, of, gram_c, gram_r);
    product_symmetric(cov_c, bar.cov, padded, last.c);
    add_scaled(padded, of.a, Real(-1), cov_c);
    add_scaled(padded, of.c, -last.s, cov_c);
    update_cross_backward(space, bar, t, tape.along.row(t), last.w, last.c, of.w, of.c, padded);

    // Through the attempts.
    Real* x_bar = bar.cross.row(t);
    for (int64_t n = attempts - 1; n >= 0; --n) {
      arena.release(step_start);
      solve_weights_backward(solver, t, made[n], n > 0 ? &made[n - 1] : nullptr, of, bar, gram_bar, solved_x_bar,
                             arena);
      for (int64_t k = 0; k < K; ++k) add_scaled(padded, bar.gram.row(k), Real(1), gram_bar.row(k));
      add_scaled(padded, x_bar, Real(1), solved_x_bar);
      if (n == 0) break;
      const Solution<Real>& before = made[n - 1];
      fill_zero(vectors.rows_from(0, 4));
      of.d = 0;
      update_gram_backward(gram_bar, before, padded, of, gram_c, gram_r);
      of.along = dot(padded, before.c, solved_x_bar);
      add_scaled(padded, of.c, before.along, solved_x_bar);
    }
  }
}

}  // namespace fastkm::FASTKM_LEVEL
