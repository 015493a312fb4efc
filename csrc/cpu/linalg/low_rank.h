// A symmetric matrix minus terms of rank one, which are kept apart from it:
//   M = base − Σ_j l_j r_jᵀ
//
// Products with M read the base and never write it. A product reads K² numbers of the base and 2 K numbers a term,
// where subtracting a term from the base would read and write K² numbers.
#pragma once

#include "cpu/linalg/half_product.h"

namespace fastkm::FASTKM_LEVEL {

template <class Real>
struct LowRankDifference {
  Matrix<Real> base;         // [K, K], or no rows for a base of zero
  Matrix<Real> left, right;  // l and r [terms, K]
  Matrix<Real> l_dot_x;      // [2, terms], of the last product
  int64_t count = 0;         // of terms

  void subtract(const Real* l, const Real* r) {
    const size_t bytes = static_cast<size_t>(round_up(right.columns, kLanes<Real>)) * sizeof(Real);
    __builtin_memcpy(left.row(count), l, bytes);
    __builtin_memcpy(right.row(count++), r, bytes);
  }

  // y −= Σ_j r_j (l_j · x), for each of N pairs of vectors.
  template <size_t N>
  void subtract_terms(Real* const (&y)[N], int64_t padded, const Real* const (&x)[N]) const {
    const Real* factors[N];
    for (size_t n = 0; n < N; ++n) {
      product_rows(l_dot_x.row(n), left, count, padded, x[n]);
      factors[n] = l_dot_x.row(n);
    }
    product_transposed<Into::kSubtract, N, Real>(y, right, count, padded, factors);
  }

  // y = M x, for each of N pairs of vectors.
  template <size_t N>
  void product(Real* const (&y)[N], int64_t padded, const Real* const (&x)[N]) const {
    symmetric_product<N, Real>(y, base, padded, x);
    subtract_terms(y, padded, x);
  }
};

template <class Real>
LowRankDifference<Real> allocate_difference(const Matrix<Real>& base, int64_t K, int64_t terms, Arena& arena) {
  const int64_t rows = round_up(terms, kLanes<Real>);
  const LowRankDifference<Real> m{base, allocate_matrix<Real>(arena, rows, K), allocate_matrix<Real>(arena, rows, K),
                                  allocate_matrix<Real>(arena, 2, rows)};
  fill_zero(m.left);  // product_rows reads rows past the last term
  return m;
}

}  // namespace fastkm::FASTKM_LEVEL
