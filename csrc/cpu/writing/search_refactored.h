// The search for weights that factors a matrix anew for every solve.
//
// It serves the squared-Gram solve, (G² + λI) w = G x, and patterns that are solved several times. The n-th solve of a
// pattern is against the mean that the (n−1)-th weights would give, R + c δᵀ, which changes the Gram matrix and x by
//   (1)  G + c rᵀ + r cᵀ + d c cᵀ,  x + c (δ·z),  with r = R δ = x − G w and d = δ·δ.
// The last solution is written: G, U and the x of later patterns change for good.
//
// A solve costs a factor, K³/3, and about 5 K² operations.
#pragma once

#include <utility>

#include "cpu/writing/search.h"

namespace fastkm::FASTKM_LEVEL {

// Weights of one pattern, and the change that they make.
template <class Real>
struct Solution {
  Real *w, *a, *c, *g, *r;  // [K]: weights, U w, a/s, G w, x − G w
  Real s, delta_dot_z, d;   // innovation variance, δ·z, δ·δ
};

template <class Real>
Solution<Real> allocate_solution(int64_t K, Arena& arena) {
  const Matrix<Real> vectors = allocate_zero<Real>(arena, 5, K);
  return {vectors.row(0), vectors.row(1), vectors.row(2), vectors.row(3), vectors.row(4), 0, 0, 0};
}

// Compute the change that the weights of pattern t make.
template <class Real>
void compute_change(Solution<Real>& solution, const GramSpace<Real>& space, int64_t t, Real noise_var) {
  const int64_t padded = round_up(space.size(), kLanes<Real>);
  const Real* x = space.cross.row(t);
  product_symmetric(solution.a, space.cov, padded, solution.w);
  product_symmetric(solution.g, space.gram, padded, solution.w);
  solution.s = dot(padded, solution.w, solution.a) + noise_var;
  solution.delta_dot_z = space.inner.row(t)[t] - dot(padded, solution.w, x);
  solution.d = solution.delta_dot_z - dot(padded, solution.w, x) + dot(padded, solution.w, solution.g);
  for (int64_t i = 0; i < padded; ++i) {
    solution.c[i] = solution.a[i] / solution.s;
    solution.r[i] = x[i] - solution.g[i];
  }
}

// G += sign · (c rᵀ + r cᵀ + d c cᵀ)
template <class Real>
void update_gram(const Matrix<Real>& gram, const Solution<Real>& by, Real sign) {
  for (int64_t i = 0; i < gram.rows; ++i) {
    const Real of_c = sign * by.c[i], of_r = sign * (by.r[i] + by.d * by.c[i]);
    for (int64_t j = 0; j < gram.rows; ++j) gram.row(i)[j] += of_c * by.r[j] + of_r * by.c[j];
  }
}

// Write a solution to G and U, or take it back with a `sign` of −1.
template <class Real>
void write_solution(const GramSpace<Real>& space, const Solution<Real>& last, Real sign) {
  update_gram(space.gram, last, sign);
  for (int64_t i = 0; i < space.size(); ++i)
    for (int64_t j = 0; j < space.size(); ++j) space.cov.row(i)[j] -= sign * last.a[i] * last.c[j];
}

template <class Real>
struct RefactoringSolver {
  const GramSpace<Real>& space;
  const SearchSettings<Real>& settings;
  const int64_t K, padded;
  const Factor<Real> factor;
  const Matrix<Real> lower_transposed, gram, work, target;

  RefactoringSolver(const GramSpace<Real>& space, const SearchSettings<Real>& settings, Arena& arena)
      : space(space),
        settings(settings),
        K(space.size()),
        padded(round_up(K, kLanes<Real>)),
        factor(allocate_factor<Real>(arena, K)),
        lower_transposed(allocate_matrix<Real>(arena, K, K)),
        gram(allocate_matrix<Real>(arena, K, K)),
        work(allocate_matrix<Real>(arena, 1, kBlock)),
        target(allocate_zero<Real>(arena, 2, K)) {}

  // Factor the matrix of the next solve of pattern t. Its G, by (1), is left in `gram`, its x in row 0 of `target`.
  Status factor_system(int64_t t, const Solution<Real>* before, Arena& arena) const {
    copy_rows(gram, space.gram);
    __builtin_memcpy(target.data, space.cross.row(t), static_cast<size_t>(padded) * sizeof(Real));
    if (before) {
      update_gram(gram, *before, Real(1));
      for (int64_t i = 0; i < padded; ++i) target.data[i] += before->delta_dot_z * before->c[i];
    }
    regularise(factor.lower, gram, settings.ridge, settings.squared_gram);
    const Real largest = largest_diagonal(factor.lower);
    const bool good = cholesky(factor, arena);
    transpose(lower_transposed, factor.lower);
    if (!good) return kNotPositiveDefinite;
    return well_conditioned(factor, largest, settings.limits) ? kGood : kInexactSystem;
  }

  // y ← (G + λI)⁻¹ y, or (G² + λI)⁻¹ y.
  void solve(Real* y) const {
    solve_cholesky(factor, lower_transposed, Matrix<Real>{y, 1, K, target.ld}, work);
    for (int64_t i = K; i < target.ld; ++i) y[i] = 0;
  }

  // Find the weights of pattern t and the change they make.
  Status find(Solution<Real>& solution, int64_t t, Real noise_var, const Solution<Real>* before, Arena& arena) const {
    const Status status = factor_system(t, before, arena);
    if (settings.squared_gram)
      product_symmetric(solution.w, gram, padded, target.data);
    else
      __builtin_memcpy(solution.w, target.data, static_cast<size_t>(padded) * sizeof(Real));
    solve(solution.w);
    compute_change(solution, space, t, noise_var);
    return status == kGood && changes_too_much_of(solution, t) ? kInexactSystem : status;
  }

  // Whether the change loses digits of the system before it or after it, if another solve follows.
  bool changes_too_much_of(const Solution<Real>& solution, int64_t t) const {
    if (settings.num_opt_iters == 1 && space.count() == 1) return false;
    const Real energy = space.inner.row(t)[t], c_squared = dot(padded, solution.c, solution.c);
    Real size = trace(space.gram) + static_cast<Real>(K) * settings.ridge;
    if (space.count() == 1) size += solution.d * c_squared;  // a chunk of one pattern does not come back to G
    return changes_too_much(energy, c_squared, solution.d, size, settings.limits);
  }
};

// Find the weights [t, K] of a chunk. G, X and U of `space` are left as after the chunk. Rows of masked patterns stay
// as they are. `d` receives δ·δ of each pattern, unless it is null.
template <class Real>
Status find_weights_refactored(const Matrix<Real>& weights, const GramSpace<Real>& space,
                               const Observations<Real>& observed, const SearchSettings<Real>& settings, Arena& arena,
                               Real* d = nullptr) {
  const RefactoringSolver<Real> solver(space, settings, arena);
  Solution<Real> now = allocate_solution<Real>(solver.K, arena), before = allocate_solution<Real>(solver.K, arena);
  const Arena::Mark solve_start = arena.mark();
  Status status = kGood;
  for (int64_t t = 0; t < space.count(); ++t) {
    if (!observed.unmasked[t]) continue;
    for (int64_t n = 0; n < settings.num_opt_iters; ++n) {
      arena.release(solve_start);
      std::swap(now, before);
      const Status found = solver.find(now, t, observed.noise_var[t], n > 0 ? &before : nullptr, arena);
      if (status == kGood) status = found;
      if (settings.limits.again(status)) return status;
    }
    __builtin_memcpy(weights.row(t), now.w, static_cast<size_t>(solver.K) * sizeof(Real));
    if (d) d[t] = now.d;
    write_solution(space, now, Real(1));
    update_cross<Real>(space, t, now.w, now.c, nullptr);
  }
  return status;
}

}  // namespace fastkm::FASTKM_LEVEL
