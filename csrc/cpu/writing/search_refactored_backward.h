// Backward of the search that factors anew for every solve.
//
// First the patterns are written again with the weights that the search found, without solving. Then they go from the
// last to the first: a pattern is taken back, its solves but the last are repeated from the state before it, and they
// are gone through from the last to the first. That costs 2 n − 1 factors a pattern, for n solves.
//
// With bars for cotangents and the letters of search_refactored.h, a solve (G + λI) w = x is gone through by
//   (1)  v = (G + λI)⁻¹ w̄,  x̄ += v,  Ḡ −= sym(v wᵀ),  λ̄ −= v·w,
// and a solve (G² + λI) w = G x by
//   (2)  v = (G² + λI)⁻¹ w̄,  x̄ += G v,  Ḡ += sym(v xᵀ − v (G w)ᵀ − (G v) wᵀ),  λ̄ −= v·w.
#pragma once

#include "cpu/writing/search_backward.h"
#include "cpu/writing/search_refactored.h"

namespace fastkm::FASTKM_LEVEL {

// The changes that a chunk's patterns made. Rows are patterns.
template <class Real>
struct WrittenChanges {
  Matrix<Real> a, c, r;      // [t, K]
  Matrix<Real> delta_dot_z;  // [t, t], δ_t · z_later
  Real d[kChunk];

  Solution<Real> of(int64_t t, const Matrix<Real>& weights) const {
    return {.w = weights.row(t),
            .a = a.row(t),
            .c = c.row(t),
            .g = nullptr,
            .r = r.row(t),
            .s = 0,
            .delta_dot_z = 0,
            .d = d[t]};
  }
};

// Write the patterns of a chunk again, with its weights. `space` is left as before the last pattern.
template <class Real>
WrittenChanges<Real> replay_changes(const GramSpace<Real>& space, const ChunkColumns<Real>& chunk, Arena& arena) {
  const int64_t K = space.size(), count = space.count();
  WrittenChanges<Real> changes{allocate_matrix<Real>(arena, count, K), allocate_matrix<Real>(arena, count, K),
                               allocate_matrix<Real>(arena, count, K), allocate_matrix<Real>(arena, count, count)};
  Solution<Real> solution = allocate_solution<Real>(K, arena);
  for (int64_t t = 0; t < count; ++t) {
    if (!chunk.observed.unmasked[t]) continue;
    solution.w = chunk.weights.row(t);
    solution.a = changes.a.row(t);
    solution.c = changes.c.row(t);
    solution.r = changes.r.row(t);
    compute_change(solution, space, t, chunk.observed.noise_var[t]);
    changes.d[t] = solution.d;
    if (t + 1 == count) break;
    write_solution(space, solution, Real(1));
    update_cross(space, t, solution.w, solution.c, changes.delta_dot_z.row(t));
  }
  return changes;
}

// Cotangents of a solution.
template <class Real>
struct SolutionCotangents {
  Real *w, *a, *c, *r;  // [K]
  Real delta_dot_z = 0, d = 0;
};

// Backward of compute_change: from the cotangents of a, c, r, δ·z and d to those of w, G, U, x, Q and σ².
template <class Real>
void compute_change_backward(SearchCotangents<Real>& grads, SolutionCotangents<Real>& grad,
                             const GramSpace<Real>& space, int64_t t, const Solution<Real>& solution, Arena& arena) {
  const int64_t padded = round_up(space.size(), kLanes<Real>);
  const Matrix<Real> vectors = allocate_zero<Real>(arena, 2, space.size());
  Real *grad_g = vectors.row(0), *product_of_grad = vectors.row(1), *grad_x = grads.cross.row(t);
  const Real* x = space.cross.row(t);

  // d = δ·z − w·x + w·g,  δ·z = Q_tt − w·x,  r = x − g,  g = G w
  grad.delta_dot_z += grad.d;
  grads.inner.row(t)[t] += grad.delta_dot_z;
  for (int64_t i = 0; i < padded; ++i) {
    grad_g[i] = grad.d * solution.w[i] - grad.r[i];
    grad.w[i] += grad.d * (solution.g[i] - x[i]) - grad.delta_dot_z * x[i];
    grad_x[i] += grad.r[i] - (grad.d + grad.delta_dot_z) * solution.w[i];
  }
  product_symmetric(product_of_grad, space.gram, padded, grad_g);
  add_scaled(padded, grad.w, Real(1), product_of_grad);
  add_symmetric_outer(grads.gram, Real(1), grad_g, solution.w);

  // c = a/s,  s = w·a + σ²,  a = U w
  const Real grad_s = -dot(padded, grad.c, solution.c) / solution.s;
  grads.noise[t] += grad_s;
  for (int64_t i = 0; i < padded; ++i) {
    grad.a[i] += grad.c[i] / solution.s + grad_s * solution.w[i];
    grad.w[i] += grad_s * solution.a[i];
  }
  product_symmetric(product_of_grad, space.cov, padded, grad.a);
  add_scaled(padded, grad.w, Real(1), product_of_grad);
  add_symmetric_outer(grads.cov, Real(1), grad.a, solution.w);
}

// Backward of the solve that `solver` holds the factor of, by (1) or (2): from w̄ to the cotangents of its own G and x,
// which are set, and of λ, which is added to.
template <class Real>
void solve_backward(const Matrix<Real>& grad_gram, Real* grad_x, Real& grad_ridge,
                    const RefactoringSolver<Real>& solver, const Solution<Real>& solution, const Real* grad_w,
                    Arena& arena) {
  const int64_t padded = solver.padded;
  const Matrix<Real> vectors = allocate_zero<Real>(arena, 3, solver.K);
  Real *v = vectors.row(0), *gram_w = vectors.row(1), *gram_v = vectors.row(2);
  __builtin_memcpy(v, grad_w, static_cast<size_t>(padded) * sizeof(Real));
  solver.solve(v);
  grad_ridge -= dot(padded, v, solution.w);
  fill_zero(grad_gram);
  if (!solver.settings.squared_gram) {
    add_symmetric_outer(grad_gram, Real(-1), v, solution.w);
    __builtin_memcpy(grad_x, v, static_cast<size_t>(padded) * sizeof(Real));
    return;
  }
  product_symmetric(gram_v, solver.gram, padded, v);
  product_symmetric(gram_w, solver.gram, padded, solution.w);
  add_symmetric_outer(grad_gram, Real(-1), v, gram_w);
  add_symmetric_outer(grad_gram, Real(-1), gram_v, solution.w);
  add_symmetric_outer(grad_gram, Real(1), v, solver.target.data);
  __builtin_memcpy(grad_x, gram_v, static_cast<size_t>(padded) * sizeof(Real));
}

// Backward of update_gram: add to the cotangents of c, r and d. `gram_c` and `gram_r` are workspace.
template <class Real>
void update_gram_backward(SolutionCotangents<Real>& grad, const Matrix<Real>& grad_gram, const Solution<Real>& by,
                          Real* gram_c, Real* gram_r) {
  const int64_t padded = round_up(grad_gram.rows, kLanes<Real>);
  product_transposed<Into::kSet>({gram_c, gram_r}, grad_gram, grad_gram.rows, padded, {by.c, by.r});
  grad.d += dot(padded, by.c, gram_c);
  for (int64_t i = 0; i < padded; ++i) {
    grad.c[i] += 2 * gram_r[i] + 2 * by.d * gram_c[i];
    grad.r[i] += 2 * gram_c[i];
  }
}

// `space` and `changes` go in as replay_changes left them; `space` comes out as before the chunk.
template <class Real>
void find_weights_refactored_backward(SearchCotangents<Real>& grads, const GramSpace<Real>& space,
                                      const WrittenChanges<Real>& changes, const ChunkColumns<Real>& chunk,
                                      const SearchSettings<Real>& settings, Arena& arena) {
  const RefactoringSolver<Real> solver(space, settings, arena);
  const int64_t K = solver.K, padded = solver.padded, solves = settings.num_opt_iters;
  const Matrix<Real> grad_gram = allocate_matrix<Real>(arena, K, K), vectors = allocate_matrix<Real>(arena, 8, K);
  Real *gram_c = vectors.row(4), *gram_r = vectors.row(5), *solved_grad_x = vectors.row(6), *cov_c = vectors.row(7);
  Solution<Real>* solutions = arena.allocate<Solution<Real>>(solves);
  for (int64_t n = 0; n < solves; ++n) solutions[n] = allocate_solution<Real>(K, arena);
  const auto before = [&](int64_t n) { return n > 0 ? &solutions[n - 1] : nullptr; };
  const Arena::Mark solve_start = arena.mark();
  for (int64_t t = space.count() - 1; t >= 0; --t) {
    if (!chunk.observed.unmasked[t]) continue;
    const Real noise_var = chunk.observed.noise_var[t];
    if (t + 1 < space.count()) write_solution(space, changes.of(t, chunk.weights), Real(-1));
    for (int64_t n = 0; n < solves - 1; ++n) {
      arena.release(solve_start);
      const Status found = solver.find(solutions[n], t, noise_var, before(n), arena);
      if (grads.status == kGood) grads.status = found;
    }
    Solution<Real>& last = solutions[solves - 1];
    last.w = chunk.weights.row(t);
    compute_change(last, space, t, noise_var);
    if (grads.status == kGood && solver.changes_too_much_of(last, t)) grads.status = kInexactSystem;
    if (settings.limits.again(grads.status)) return;

    // Through what the last solution wrote.
    fill_zero(vectors);
    SolutionCotangents<Real> grad{vectors.row(0), vectors.row(1), vectors.row(2), vectors.row(3)};
    __builtin_memcpy(grad.w, grads.weights.row(t), static_cast<size_t>(K) * sizeof(Real));
    update_gram_backward(grad, grads.gram, last, gram_c, gram_r);
    product_symmetric(cov_c, grads.cov, padded, last.c);
    add_scaled(padded, grad.a, Real(-1), cov_c);
    add_scaled(padded, grad.c, -last.s, cov_c);
    update_cross_backward(space, grads, t, changes.delta_dot_z.row(t), last.w, last.c, grad.w, grad.c);

    // Through the solutions.
    for (int64_t n = solves - 1; n >= 0; --n) {
      arena.release(solve_start);
      compute_change_backward(grads, grad, space, t, solutions[n], arena);
      const Status factored = solver.factor_system(t, before(n), arena);
      if (factored == kNotPositiveDefinite) poison_factor(solver.factor);
      if (grads.status == kGood) grads.status = factored;
      solve_backward(grad_gram, solved_grad_x, grads.ridge, solver, solutions[n], grad.w, arena);
      for (int64_t k = 0; k < K; ++k) add_scaled(padded, grads.gram.row(k), Real(1), grad_gram.row(k));
      add_scaled(padded, grads.cross.row(t), Real(1), solved_grad_x);
      if (n == 0) break;
      const Solution<Real>& previous = solutions[n - 1];
      fill_zero(vectors.rows_from(0, 4));
      grad.d = 0;
      update_gram_backward(grad, grad_gram, previous, gram_c, gram_r);
      grad.delta_dot_z = dot(padded, previous.c, solved_grad_x);
      add_scaled(padded, grad.c, previous.delta_dot_z, solved_grad_x);
    }
  }
}

}  // namespace fastkm::FASTKM_LEVEL
