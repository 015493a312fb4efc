// A symmetric matrix from which terms of rank one were subtracted, kept apart from it.
#pragma once

#include "cpu/linalg/vectors.h"

namespace fastkm::FASTKM_LEVEL {

// A symmetric matrix and what was taken from it since, of low rank: M = base − Σ_j l_j r_jᵀ. Products with it read the
// base and never write it; changes cost what their rank costs.
template <class T>
struct Downdated {
  Matrix<T> base;         // [K, K], or of no rows: then it is zero
  Matrix<T> left, right;  // [changes, K]
  Matrix<T> along;        // [2, changes], l_j · x of the last product
  int64_t count = 0;

  void subtract(const T* l, const T* r) {
    const size_t bytes = static_cast<size_t>(round_up(right.columns, kLanes<T>)) * sizeof(T);
    __builtin_memcpy(left.row(count), l, bytes);
    __builtin_memcpy(right.row(count++), r, bytes);
  }

  // y −= Σ_j r_j (l_j · x), all that changed since.
  template <size_t N>
  void correct(int64_t padded, const std::array<const T*, N>& x, const std::array<T*, N>& y) const {
    std::array<const T*, N> factors;
    for (size_t n = 0; n < N; ++n) {
      dots(left, count, padded, x[n], along.row(n));
      factors[n] = along.row(n);
    }
    combine<Into::kSubtract, N>(right, count, padded, factors, y);
  }

  // y = M x
  template <size_t N>
  void multiply(int64_t padded, const std::array<const T*, N>& x, const std::array<T*, N>& y) const {
    combine<Into::kSet, N>(base, base.rows, padded, x, y);
    correct<N>(padded, x, y);
  }
};

template <class T>
Downdated<T> take_downdated(const Matrix<T>& base, int64_t K, int64_t changes, Arena& arena) {
  const int64_t rows = round_up(changes, kLanes<T>);
  const Downdated<T> m{base, take_matrix<T>(arena, rows, K), take_matrix<T>(arena, rows, K),
                       take_matrix<T>(arena, 2, rows)};
  fill_zero(m.left);  // dots go over whole vectors of rows
  return m;
}

}  // namespace fastkm::FASTKM_LEVEL
