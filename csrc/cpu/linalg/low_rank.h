// A symmetric matrix from which terms of rank one were subtracted, kept apart from it.
#pragma once

#include "cpu/linalg/vectors.h"

namespace fastkm::FASTKM_LEVEL {

// A symmetric matrix and what was taken from it since, of low rank: M = base − Σ_j l_j r_jᵀ. Products with it read the
// base and never write it; changes cost what their rank costs.
template <class Real>
struct LowRankDifference {
  Matrix<Real> base;         // [K, K], or of no rows: then it is zero
  Matrix<Real> left, right;  // [changes, K]
  Matrix<Real> along;        // [2, changes], l_j · x of the last product
  int64_t count = 0;

  void subtract(const Real* l, const Real* r) {
    const size_t bytes = static_cast<size_t>(round_up(right.columns, kLanes<Real>)) * sizeof(Real);
    __builtin_memcpy(left.row(count), l, bytes);
    __builtin_memcpy(right.row(count++), r, bytes);
  }

  // y −= Σ_j r_j (l_j · x), all that changed since.
  template <size_t N>
  void correct(int64_t padded, const std::array<const Real*, N>& x, const std::array<Real*, N>& y) const {
    std::array<const Real*, N> factors;
    for (size_t n = 0; n < N; ++n) {
      dots(left, count, padded, x[n], along.row(n));
      factors[n] = along.row(n);
    }
    combine<Into::kSubtract, N>(right, count, padded, factors, y);
  }

  // y = M x
  template <size_t N>
  void multiply(int64_t padded, const std::array<const Real*, N>& x, const std::array<Real*, N>& y) const {
    combine<Into::kSet, N>(base, base.rows, padded, x, y);
    correct<N>(padded, x, y);
  }
};

template <class Real>
LowRankDifference<Real> allocate_difference(const Matrix<Real>& base, int64_t K, int64_t changes, Arena& arena) {
  const int64_t rows = round_up(changes, kLanes<Real>);
  const LowRankDifference<Real> m{base, allocate_matrix<Real>(arena, rows, K), allocate_matrix<Real>(arena, rows, K),
                                  allocate_matrix<Real>(arena, 2, rows)};
  fill_zero(m.left);  // dots go over whole vectors of rows
  return m;
}

}  // namespace fastkm::FASTKM_LEVEL
