// Backward of the search that factors anew for every solve.
#pragma once

#include "cpu/writing/search_backward.h"
#include "cpu/writing/search_refactored.h"

namespace fastkm::FASTKM_LEVEL {

// Reverse of one attempt. Takes the cotangents of its w, a, c, r, along and d, adds those of G, U, x, Q and λ, and
// leaves those of the matrix and vector it solved with in `gram_bar` and `x_bar`.
template <class T>
struct AttemptCotangents {
  T *w, *a, *c, *r;  // [K]
  T along = 0, d = 0;
};

template <class T>
void attempt_backward(const AfreshSolver<T>& solver, int64_t t, const Attempt<T>& made, const Attempt<T>* before,
                      AttemptCotangents<T>& of, SearchCotangents<T>& bar, const Matrix<T>& gram_bar, T* solved_x_bar,
                      Arena& arena) {
  const GramSpace<T>& space = solver.space;
  const int64_t K = solver.K, padded = solver.padded;
  const Matrix<T> vectors = take_matrix<T>(arena, 5, K);
  fill_zero(vectors);
  T *g_bar = vectors.row(0), *moved = vectors.row(1), *v = vectors.row(2), *gram_w = vectors.row(3),
    *gram_v = vectors.row(4);
  const T* x = space.cross.row(t);
  T* x_bar = bar.cross.row(t);

  // d = along − w·x + w·g,  along = Q_tt − w·x,  r = x − g,  g = G w
  of.along += of.d;
  bar.inner.row(t)[t] += of.along;
  for (int64_t i = 0; i < padded; ++i) {
    g_bar[i] = of.d * made.w[i] - of.r[i];
    of.w[i] += of.d * (made.g[i] - x[i]) - of.along * x[i];
    x_bar[i] += of.r[i] - (of.d + of.along) * made.w[i];
  }
  multiply(space.gram, padded, g_bar, moved);
  add_scaled(padded, of.w, T(1), moved);
  add_symmetric_outer(bar.gram, T(1), g_bar, made.w);

  // c = a/s,  s = w·a + σ²,  a = U w
  const T s_bar = -dot(padded, of.c, made.c) / made.s;
  bar.noise[t] += s_bar;
  for (int64_t i = 0; i < padded; ++i) {
    of.a[i] += of.c[i] / made.s + s_bar * made.w[i];
    of.w[i] += s_bar * made.a[i];
  }
  multiply(space.cov, padded, of.a, moved);
  add_scaled(padded, of.w, T(1), moved);
  add_symmetric_outer(bar.cov, T(1), of.a, made.w);

  // (G + λI) w = x, or (G² + λI) w = G x, with the G and x that the attempt before left.
  solver.prepare(x, before, arena);
  __builtin_memcpy(v, of.w, static_cast<size_t>(padded) * sizeof(T));
  solver.solve(v);
  bar.ridge -= dot(padded, v, made.w);
  fill_zero(gram_bar);
  if (solver.args.squared_gram) {
    multiply(solver.gram, padded, v, gram_v);
    multiply(solver.gram, padded, made.w, gram_w);
    add_symmetric_outer(gram_bar, T(-1), v, gram_w);
    add_symmetric_outer(gram_bar, T(-1), gram_v, made.w);
    add_symmetric_outer(gram_bar, T(1), v, solver.target.data);
    __builtin_memcpy(solved_x_bar, gram_v, static_cast<size_t>(padded) * sizeof(T));
  } else {
    add_symmetric_outer(gram_bar, T(-1), v, made.w);
    __builtin_memcpy(solved_x_bar, v, static_cast<size_t>(padded) * sizeof(T));
  }
}

// Cotangents of an attempt's c, r and d from that of G + c rᵀ + r cᵀ + d c cᵀ.
template <class T>
void move_gram_backward(const Matrix<T>& gram_bar, const Attempt<T>& by, int64_t padded, AttemptCotangents<T>& of,
                        T* gram_c, T* gram_r) {
  combine<Into::kSet, 2>(gram_bar, gram_bar.rows, padded, {by.c, by.r}, {gram_c, gram_r});
  of.d += dot(padded, by.c, gram_c);
  for (int64_t i = 0; i < padded; ++i) {
    of.c[i] += 2 * gram_r[i] + 2 * by.d * gram_c[i];
    of.r[i] += 2 * gram_c[i];
  }
}

// Reverse of find_weights_afresh. `space` arrives as the search left it; each pattern is undone, and its attempts are
// made again from the state before it.
template <class T>
void find_weights_afresh_backward(const GramSpace<T>& space, const AfreshTape<T>& tape, const WritingArgs<T>& args,
                                  int64_t b, int64_t first, SearchCotangents<T>& bar, Arena& arena) {
  const AfreshSolver<T> solver(space, args, *args.ridge.at(b), arena);
  const int64_t K = solver.K, padded = solver.padded, attempts = args.num_opt_iters;
  const Matrix<T> gram_bar = take_matrix<T>(arena, K, K), vectors = take_matrix<T>(arena, 8, K);
  T *gram_c = vectors.row(4), *gram_r = vectors.row(5), *solved_x_bar = vectors.row(6), *cov_c = vectors.row(7);
  Attempt<T>* made = arena.take<Attempt<T>>(attempts);
  for (int64_t n = 0; n < attempts; ++n) made[n] = take_attempt<T>(K, arena);
  const Arena::Mark step_start = arena.mark();
  for (int64_t t = space.weights.rows - 1; t >= 0; --t) {
    if (!args.posterior.seen(b, first + t)) continue;
    solver.undo(tape.written(t, space.weights));
    const T noise = *args.posterior.noise_var.at(b, first + t);
    for (int64_t n = 0; n < attempts; ++n) {
      arena.release(step_start);
      solver.attempt(t, noise, n > 0 ? &made[n - 1] : nullptr, made[n], arena);
    }

    // Through what the last attempt wrote.
    const Attempt<T>& last = made[attempts - 1];
    fill_zero(vectors);
    AttemptCotangents<T> of{vectors.row(0), vectors.row(1), vectors.row(2), vectors.row(3)};
    __builtin_memcpy(of.w, bar.weights.row(t), static_cast<size_t>(K) * sizeof(T));
    move_gram_backward(bar.gram, last, padded, of, gram_c, gram_r);
    multiply(bar.cov, padded, last.c, cov_c);
    add_scaled(padded, of.a, T(-1), cov_c);
    add_scaled(padded, of.c, -last.s, cov_c);
    retreat_cross(space, bar, t, tape.along.row(t), last.w, last.c, of.w, of.c, padded);

    // Through the attempts.
    T* x_bar = bar.cross.row(t);
    for (int64_t n = attempts - 1; n >= 0; --n) {
      arena.release(step_start);
      attempt_backward(solver, t, made[n], n > 0 ? &made[n - 1] : nullptr, of, bar, gram_bar, solved_x_bar, arena);
      for (int64_t k = 0; k < K; ++k) add_scaled(padded, bar.gram.row(k), T(1), gram_bar.row(k));
      add_scaled(padded, x_bar, T(1), solved_x_bar);
      if (n == 0) break;
      const Attempt<T>& before = made[n - 1];
      fill_zero(vectors.rows_from(0, 4));
      of.d = 0;
      move_gram_backward(gram_bar, before, padded, of, gram_c, gram_r);
      of.along = dot(padded, before.c, solved_x_bar);
      add_scaled(padded, of.c, before.along, solved_x_bar);
    }
  }
}

}  // namespace fastkm::FASTKM_LEVEL
