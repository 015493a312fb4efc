// Backward of the search for weights with one factorisation.
//
// First the search is replayed with the weights that it found. The replay solves nothing and reads only H: row t of a
// is √s_t G_t, with G and s_t = L_tt² from conditioning on the chunk. Then patterns go from the last to the first. With
// bars for cotangents, and the equations of search.h in the second column:
//   (1)  through (5):  c̄ += 2 λ Ā w + 2 d Ā c,  w̄ += 2 λ Ā c,  d̄ = c·Ā c,  λ̄ += 2 c·Ā w
//   (2)  through U − a cᵀ and (2):  c̄ −= s Ū c,  ā = c̄/s − Ū c + s̄ w,  s̄ = −c̄·c/s,  w̄ += U ā + s̄ a
//   (3)  through (3):  Q̄_tt += d̄,  w̄ −= d̄ (x + 2 λ w),  x̄ −= d̄ w,  λ̄ −= d̄ w·w
//   (4)  through (4):  for later patterns, from their x̄ and x
//   (5)  through (1):  v = H w̄,  x̄ += v,  Ā −= sym(v wᵀ),  Ū += sym(ā wᵀ).
// Ā and Ū are sums of terms of low rank until the last pattern. Of the search, only X is undone; the states of H and U
// before pattern t are their first t terms.
#pragma once

#include "cpu/posterior/conditioning_backward.h"
#include "cpu/writing/search.h"

namespace fastkm::FASTKM_LEVEL {

// Cotangents of a chunk's inner products and of what else the search reads.
template <class Real>
struct SearchCotangents {
  Matrix<Real> weights;  // [t, K], in
  Matrix<Real> gram;     // Ḡ [K, K], symmetric
  Matrix<Real> cross;    // X̄ [t, K]
  Matrix<Real> inner;    // Q̄ [t, t], lower triangle
  Matrix<Real> cov;      // Ū [K, K], symmetric
  Real* noise;           // [t], added to
  Real ridge = 0;        // λ̄
  Status status = kGood;
};

// Go through the search again, with the weights of the chunk and its whitened patterns. `space` is left as after the
// chunk, and `status` says whether its digits suffice.
template <class Real>
Search<Real> replay_search(const GramSpace<Real>& space, const ChunkColumns<Real>& chunk,
                           const WhitenedColumns<Real>& whitened, const SearchSettings<Real>& settings, Status& status,
                           Arena& arena) {
  const int64_t K = space.size(), padded = round_up(K, kLanes<Real>), count = space.count();
  Search<Real> search = allocate_search(space, arena);
  const Matrix<Real>& inverse = search.inverse.base;
  const Real ridge = settings.ridge;
  status = invert_system(inverse, space.gram, settings, arena);
  if (status != kGood) fill_nan(inverse);  // no gradient without a factor
  const Real size = trace(space.gram);
  transpose(search.cov.right.rows_from(0, count), whitened.inputs.rows_from(0, K));
  const Matrix<Real> vectors = allocate_zero<Real>(arena, 4, K);
  Real *p = vectors.row(0), *q = vectors.row(1), *e = vectors.row(2), *f = vectors.row(3);
  for (int64_t t = 0; t < count; ++t) {
    if (!chunk.observed.unmasked[t]) continue;
    const Real *w = chunk.weights.row(t), *x = space.cross.row(t);
    Real *c = search.cov.left.row(t), *a = search.cov.right.row(t);
    const Real s = whitened.pivot[t], std_dev = std::sqrt(s), reciprocal = 1 / s;
    for (int64_t i = 0; i < padded; ++i) {
      a[i] *= std_dev;
      c[i] = a[i] * reciprocal;
    }
    const Real d = space.inner.row(t)[t] - dot(padded, w, x) - ridge * dot(padded, w, w);
    search.explained[t] = whitened.explained[t];
    search.d[t] = d;
    if (status == kGood && count > 1 &&
        changes_too_much(space.inner.row(t)[t], dot(padded, c, c), d, size, settings.limits))
      status = kInexactSystem;
    symmetric_product<2, Real>({p, q}, inverse, padded, {c, w});
    update_cross(space, t, w, c, search.delta_dot_z.row(t));
    search.inverse.subtract_terms({p, q}, padded, {c, w});
    update_inverse(search.inverse, SystemChange<Real>{c, w, d, ridge}, p, q, e, f);
  }
  return search;
}

// Undo x += c (δ·z) for the patterns after t, and add their share to the cotangents of w, c and Q.
template <class Real>
void update_cross_backward(const GramSpace<Real>& space, SearchCotangents<Real>& grads, int64_t t,
                           const Real* delta_dot_z, const Real* w, const Real* c, Real* grad_w, Real* grad_c) {
  const int64_t padded = round_up(space.size(), kLanes<Real>);
  for (int64_t later = t + 1; later < space.count(); ++later) {
    Real *x = space.cross.row(later), *grad_x = grads.cross.row(later);
    const Real grad_delta_dot_z = dot(padded, c, grad_x);
    add_scaled(padded, x, -delta_dot_z[later], c);
    add_scaled(padded, grad_c, delta_dot_z[later], grad_x);
    add_scaled(padded, grad_w, -grad_delta_dot_z, x);
    add_scaled(padded, grad_x, -grad_delta_dot_z, w);
    grads.inner.row(later)[t] += grad_delta_dot_z;
  }
}

// `space` and `search` go in as a search left them and come out as before it.
template <class Real>
void find_weights_backward(SearchCotangents<Real>& grads, const GramSpace<Real>& space, Search<Real>& search,
                           const ChunkColumns<Real>& chunk, Real ridge, Arena& arena) {
  const int64_t K = space.size(), padded = round_up(K, kLanes<Real>), count = space.count();
  const Matrix<Real> none{nullptr, 0, K, 0};
  LowRankDifference<Real> grad_A = allocate_difference<Real>(none, K, 2 * count, arena);
  LowRankDifference<Real> grad_U = allocate_difference<Real>(none, K, 2 * count, arena);
  const Matrix<Real> vectors = allocate_zero<Real>(arena, 8, K);
  Real *grad_w = vectors.row(0), *grad_a = vectors.row(1), *grad_c = vectors.row(2), *U_grad_a = vectors.row(3);
  Real *grad_A_w = vectors.row(4), *grad_A_c = vectors.row(5), *grad_U_c = vectors.row(6), *v = vectors.row(7);
  for (int64_t t = count - 1; t >= 0; --t) {
    if (!chunk.observed.unmasked[t]) continue;
    search.cov.count = t;
    search.inverse.count -= 2;
    const Real *c = search.cov.left.row(t), *a = search.cov.right.row(t), *x = space.cross.row(t);
    const Real *w = chunk.weights.row(t), d = search.d[t], s = search.explained[t] + chunk.observed.noise_var[t];
    Real* grad_x = grads.cross.row(t);
    __builtin_memcpy(grad_w, grads.weights.row(t), static_cast<size_t>(K) * sizeof(Real));

    // Through A' = A + λ (c wᵀ + w cᵀ) + d c cᵀ, U' = U − a cᵀ and d, by (1), the first part of (2), and (3).
    grad_A.product({grad_A_w, grad_A_c}, padded, {w, c});
    grad_U.product({grad_U_c}, padded, {c});
    const Real grad_d = dot(padded, c, grad_A_c);
    for (int64_t i = 0; i < padded; ++i) {
      grad_c[i] = 2 * ridge * grad_A_w[i] + 2 * d * grad_A_c[i] - s * grad_U_c[i];
      grad_w[i] += 2 * ridge * grad_A_c[i] - grad_d * (x[i] + 2 * ridge * w[i]);
      grad_x[i] -= grad_d * w[i];
    }
    grads.ridge += 2 * dot(padded, c, grad_A_w) - grad_d * dot(padded, w, w);
    grads.inner.row(t)[t] += grad_d;
    update_cross_backward(space, grads, t, search.delta_dot_z.row(t), w, c, grad_w, grad_c);

    // Through c = a/s, s = w·a + σ² and a = U w, by (2).
    const Real grad_s = -dot(padded, grad_c, c) / s;
    for (int64_t i = 0; i < padded; ++i) grad_a[i] = grad_c[i] / s - grad_U_c[i] + grad_s * w[i];
    grads.noise[t] += grad_s;
    search.cov.product({U_grad_a}, padded, {grad_a});
    for (int64_t i = 0; i < padded; ++i) grad_w[i] += grad_s * a[i] + U_grad_a[i];

    // Through w = A⁻¹ x, by (5). A term and its transpose make sym(·).
    search.inverse.product({v}, padded, {grad_w});
    for (int64_t i = 0; i < padded; ++i) {
      grad_x[i] += v[i];
      v[i] *= Real(0.5);
      grad_a[i] *= Real(-0.5);
    }
    grad_A.subtract(v, w);
    grad_A.subtract(w, v);
    grad_U.subtract(grad_a, w);
    grad_U.subtract(w, grad_a);
  }
  product<Into::kSubtract>(grads.gram, grad_A.count, transposed(grad_A.left), grad_A.right);
  product<Into::kSubtract>(grads.cov, grad_U.count, transposed(grad_U.left), grad_U.right);
  for (int64_t k = 0; k < K; ++k) grads.ridge += grads.gram.row(k)[k];
}

}  // namespace fastkm::FASTKM_LEVEL
