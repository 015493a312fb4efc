// Backward of the search for the weights.
//
// The search is undone pattern by pattern in K and T.
#pragma once

#include "cpu/writing/search.h"

namespace fastkm::FASTKM_LEVEL {

// Cotangents of a chunk's inner products and of what else the search reads.
template <class Real>
struct SearchCotangents {
  Matrix<Real> weights;  // [t, K], in
  Matrix<Real> gram;     // [K, K], symmetric
  Matrix<Real> cross;    // [t, K]
  Matrix<Real> inner;    // [t, t], lower triangle
  Matrix<Real> cov;      // [K, K], symmetric
  Real* noise;           // [t], added to
  Real ridge = 0;
};

// Undo x ← x + along c for the patterns after t, and gather what they say of w and c.
template <class Real>
void update_cross_backward(const GramSpace<Real>& space, const SearchCotangents<Real>& bar, int64_t t,
                           const Real* along, const Real* w, const Real* c, Real* w_bar, Real* c_bar, int64_t padded) {
  for (int64_t later = t + 1; later < space.cross.rows; ++later) {
    Real *x = space.cross.row(later), *x_bar = bar.cross.row(later);
    const Real of_along = dot(padded, c, x_bar);
    add_scaled(padded, x, -along[later], c);
    add_scaled(padded, c_bar, along[later], x_bar);
    add_scaled(padded, w_bar, -of_along, x);
    add_scaled(padded, x_bar, -of_along, w);
    bar.inner.row(later)[t] += of_along;
  }
}

// Reverse of find_weights. Nothing has to be undone but x: each pattern takes from H and U what those before it
// changed, and the cotangents of A and U are of low rank until they are wanted.
template <class Real>
void find_weights_backward(const GramSpace<Real>& space, Search<Real>& search, const WritingArgs<Real>& args, int64_t b,
                           int64_t first, SearchCotangents<Real>& bar, Arena& arena) {
  const int64_t K = args.posterior.K, padded = round_up(K, kLanes<Real>), count = space.weights.rows;
  const Real ridge = *args.ridge.at(b);
  const Matrix<Real> none{nullptr, 0, K, 0};
  LowRankDifference<Real> gram_bar = allocate_difference<Real>(none, K, 2 * count, arena);
  LowRankDifference<Real> cov_bar = allocate_difference<Real>(none, K, 2 * count, arena);
  const Matrix<Real> vectors = allocate_matrix<Real>(arena, 10, K);
  fill_zero(vectors);
  int next = 0;
  const auto vector = [&] { return vectors.row(next++); };
  Real *w = vector(), *w_bar = vector(), *a_bar = vector(), *c_bar = vector(), *moved = vector();
  Real *gram_w = vector(), *gram_c = vector(), *cov_c = vector(), *v = vector();
  for (int64_t t = count - 1; t >= 0; --t) {
    if (!args.posterior.unmasked(b, first + t)) continue;
    search.cov.count = t;
    search.inverse.count -= 2;
    const Real *c = search.cov.left.row(t), *a = search.cov.right.row(t), *x = space.cross.row(t);
    const Real s = search.s[t], d = search.d[t];
    Real* x_bar = bar.cross.row(t);
    __builtin_memcpy(w, space.weights.row(t), static_cast<size_t>(K) * sizeof(Real));
    __builtin_memcpy(w_bar, bar.weights.row(t), static_cast<size_t>(K) * sizeof(Real));

    // Through A' = A + λ (c wᵀ + w cᵀ) + d c cᵀ and U' = U − a cᵀ.
    gram_bar.product({gram_w, gram_c}, padded, {w, c});
    cov_bar.product({cov_c}, padded, {c});
    const Real d_bar = dot(padded, c, gram_c);
    for (int64_t i = 0; i < padded; ++i) {
      c_bar[i] = 2 * ridge * gram_w[i] + 2 * d * gram_c[i] - s * cov_c[i];
      w_bar[i] += 2 * ridge * gram_c[i] - d_bar * (x[i] + 2 * ridge * w[i]);
      x_bar[i] -= d_bar * w[i];
    }
    bar.ridge += 2 * dot(padded, c, gram_w) - d_bar * dot(padded, w, w);
    bar.inner.row(t)[t] += d_bar;
    update_cross_backward(space, bar, t, search.along.row(t), w, c, w_bar, c_bar, padded);

    // Through c = a/s, s = w·a + σ² and a = U w.
    const Real s_bar = -dot(padded, c_bar, c) / s;
    for (int64_t i = 0; i < padded; ++i) a_bar[i] = c_bar[i] / s - cov_c[i] + s_bar * w[i];
    bar.noise[t] += s_bar;
    search.cov.product({moved}, padded, {a_bar});
    for (int64_t i = 0; i < padded; ++i) w_bar[i] += s_bar * a[i] + moved[i];

    // Through w = A⁻¹ x: Ū += sym(ā wᵀ), Ā −= sym(v wᵀ).
    search.inverse.product({v}, padded, {w_bar});
    for (int64_t i = 0; i < padded; ++i) {
      x_bar[i] += v[i];
      v[i] *= Real(0.5);
      a_bar[i] *= Real(-0.5);
    }
    gram_bar.subtract(v, w);
    gram_bar.subtract(w, v);
    cov_bar.subtract(a_bar, w);
    cov_bar.subtract(w, a_bar);
  }
  product<Into::kSubtract>(bar.gram, gram_bar.count, transposed(gram_bar.left), gram_bar.right);
  product<Into::kSubtract>(bar.cov, cov_bar.count, transposed(cov_bar.left), cov_bar.right);
  for (int64_t k = 0; k < K; ++k) bar.ridge += bar.gram.row(k)[k];
}

}  // namespace fastkm::FASTKM_LEVEL
