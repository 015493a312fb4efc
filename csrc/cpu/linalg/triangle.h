// Products with a triangular matrix.
#pragma once

#include "cpu/linalg/product.h"

namespace fastkm::FASTKM_LEVEL {

// ROWS rows of C = A B for a triangular B [n, n], in two vectors of columns from `first` on. First come the rows of B
// where both vectors can be nonzero, then those where only one of them is.
template <bool UPPER, int ROWS, class Real>
[[gnu::always_inline]] inline void triangle_tile(int64_t n, int64_t first, const Real* a, int64_t a_row,
                                                 const Matrix<Real>& b, Real* c, int64_t c_row) {
  constexpr int64_t W = kLanes<Real>;
  const int64_t corner = smaller(first + W, n), end = smaller(first + 2 * W, n);
  Vec<Real> sum[ROWS][2] = {};
  for (int64_t p = UPPER ? 0 : corner; p < (UPPER ? corner : n); ++p) {
    const Vec<Real> near = load(b.row(p) + first), far = load(b.row(p) + first + W);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Real factor = a[i * a_row + p];
      sum[i][0] += factor * near;
      sum[i][1] += factor * far;
    }
  }
  for (int64_t p = UPPER ? corner : first; p < (UPPER ? end : corner); ++p) {
    const Vec<Real> only = load(b.row(p) + first + (UPPER ? W : 0));
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) sum[i][UPPER] += a[i * a_row + p] * only;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    store<Real>(c + i * c_row + first, sum[i][0]);
    store<Real>(c + i * c_row + first + W, sum[i][1]);
  }
}

// C = A B for a triangular B.
template <bool UPPER, class Real>
void product_of_triangle(const Matrix<Real>& c, const Matrix<Real>& a, const Matrix<Real>& b) {
  constexpr int64_t W = kLanes<Real>;
  const int64_t n = b.rows;
  int64_t first = 0;
  for (; first + W < n; first += 2 * W) {
    int64_t i = 0;
    for (; i + kNarrowTileRows <= c.rows; i += kNarrowTileRows)
      triangle_tile<UPPER, kNarrowTileRows>(n, first, a.row(i), a.ld, b, c.row(i), c.ld);
    for (; i + 4 <= c.rows; i += 4) triangle_tile<UPPER, 4>(n, first, a.row(i), a.ld, b, c.row(i), c.ld);
    for (; i < c.rows; ++i) triangle_tile<UPPER, 1>(n, first, a.row(i), a.ld, b, c.row(i), c.ld);
  }
  if (first < n) {
    const int64_t above = UPPER ? 0 : first;
    product<Into::kSet>(c.block(0, c.rows, first, n - first), n - above, Operand<Real>{a.data + above, a.ld, 1},
                        b.block(above, n - above, first, n - first));
  }
}

}  // namespace fastkm::FASTKM_LEVEL
