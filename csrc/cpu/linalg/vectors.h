// Inner products and norms, products of a matrix with one or two vectors, and updates of rank one.
//
// Vectors of length `padded` end with a whole number of vector registers and hold zeros in their padding.
#pragma once

#include "cpu/linalg/matrix.h"
#include "cpu/linalg/tile.h"

namespace fastkm::FASTKM_LEVEL {

template <class Real>
Real dot(int64_t n, const Real* x, const Real* y) {
  constexpr int64_t W = kLanes<Real>;
  Vec<Real> sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sum[0] += load(x + i) * load(y + i);
    sum[1] += load(x + i + W) * load(y + i + W);
  }
  Real total = lane_sum<Real>(sum[0] + sum[1]);
  for (; i < n; ++i) total += x[i] * y[i];
  return total;
}

// Σ_i weight_i x_i²
template <class Real>
Real weighted_norm(int64_t n, const Real* x, const Real* weight) {
  constexpr int64_t W = kLanes<Real>;
  Vec<Real> sum = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) sum += load(x + i) * load(x + i) * load(weight + i);
  Real total = lane_sum<Real>(sum);
  for (; i < n; ++i) total += x[i] * x[i] * weight[i];
  return total;
}

// sums_i = Σ_j x_ij y_ij weight_j, or without weights. `sums` has room for a whole number of vector registers.
template <bool WEIGHTED, class Real>
[[gnu::always_inline]] inline void sum_products_of_rows(const Matrix<Real>& x, const Matrix<Real>& y,
                                                        const Real* weight, Real* sums) {
  constexpr int64_t W = kLanes<Real>;
  const int64_t whole = x.columns / W * W;
  const auto inside = lane_numbers<Real>() < static_cast<LaneNumber<Real>>(x.columns - whole);
  for (int64_t i = 0; i < x.rows; i += W) {
    Vec<Real> sum[W];
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < W; ++lane) {
      const int64_t row = smaller(i + lane, x.rows - 1);
      const Real *left = x.row(row), *right = y.row(row);
      const auto term = [&](int64_t j) __attribute__((always_inline)) {
        const Vec<Real> both = load(left + j) * load(right + j);
        return WEIGHTED ? both * load(weight + j) : both;
      };
      Vec<Real> last = {};
      if (whole < x.columns) last = inside ? term(whole) : last;
      sum[lane] = last;
      for (int64_t j = 0; j < whole; j += W) sum[lane] += term(j);
    }
    store<Real>(sums + i, lane_sums<Real>(sum));
  }
}

// sums_i = Σ_j x_ij y_ij
template <class Real>
void dots_of_rows(const Matrix<Real>& x, const Matrix<Real>& y, Real* sums) {
  sum_products_of_rows<false, Real>(x, y, nullptr, sums);
}

// norms = ‖row‖² of every row.
template <class Real>
void squared_norms(const Matrix<Real>& m, Real* norms) {
  sum_products_of_rows<false, Real>(m, m, nullptr, norms);
}

// norms_i = Σ_j weight_j m_ij²
template <class Real>
void weighted_norms(const Matrix<Real>& m, const Real* weight, Real* norms) {
  sum_products_of_rows<true, Real>(m, m, weight, norms);
}

// Σ_ij x_ij y_ij
template <class Real>
double inner_product(const Matrix<Real>& x, const Matrix<Real>& y) {
  double sum = 0;
  for (int64_t i = 0; i < x.rows; ++i) sum += dot(x.columns, x.row(i), y.row(i));
  return sum;
}

// to += factor · from
template <class Real>
void add_scaled(int64_t padded, Real* to, Real factor, const Real* from) {
  constexpr int64_t W = kLanes<Real>;
  for (int64_t i = 0; i < padded; i += W) store<Real>(to + i, load(to + i) + factor * load(from + i));
}

// M += factor · (x yᵀ + y xᵀ) / 2
template <class Real>
void add_symmetric_outer(const Matrix<Real>& m, Real factor, const Real* x, const Real* y) {
  for (int64_t i = 0; i < m.rows; ++i) {
    const Real of_y = Real(0.5) * factor * x[i], of_x = Real(0.5) * factor * y[i];
    for (int64_t j = 0; j < m.rows; ++j) m.row(i)[j] += of_y * y[j] + of_x * x[j];
  }
}

// product_transposed for VECS vector registers of columns, from column `j` on. An addition takes several cycles, so
// rows are dealt out to PARTS independent sums.
template <Into INTO, int VECS, int PARTS, size_t N, class Real>
[[gnu::always_inline]] inline void product_transposed_strip(Real* const (&y)[N], const Matrix<Real>& m, int64_t rows,
                                                            int64_t j, const Real* const (&x)[N]) {
  constexpr int64_t W = kLanes<Real>;
  Vec<Real> sum[PARTS][N][VECS] = {};
  const auto add = [&](int part, int64_t i) {
    const Real* row = m.row(i) + j;
    Vec<Real> entry[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) entry[v] = load(row + v * W);
#pragma GCC unroll 2
    for (size_t n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) sum[part][n][v] += x[n][i] * entry[v];
  };
  int64_t i = 0;
  for (; i + PARTS <= rows; i += PARTS)
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) add(part, i + part);
  for (; i < rows; ++i) add(0, i);
#pragma GCC unroll 2
  for (size_t n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
#pragma GCC unroll 4
      for (int part = 1; part < PARTS; ++part) sum[0][n][v] += sum[part][n][v];
      Real* at = y[n] + j + v * W;
      store<Real>(at, INTO == Into::kSubtract ? load(at) - sum[0][n][v] : sum[0][n][v]);
    }
}

// y (=, −=) Mᵀ x for the first `rows` rows of M and each of N pairs of vectors.
template <Into INTO, size_t N, class Real>
void product_transposed(Real* const (&y)[N], const Matrix<Real>& m, int64_t rows, int64_t padded,
                        const Real* const (&x)[N]) {
  constexpr int64_t W = kLanes<Real>;
  const int64_t wide = padded / (4 * W);  // strips of four vector registers
  share(team_for(rows * padded), wide, [=](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t strip = begin; strip < end; ++strip)
      product_transposed_strip<INTO, 4, 2 / N>(y, m, rows, strip * 4 * W, x);
  });
  int64_t j = wide * 4 * W;
  for (; j + 2 * W <= padded; j += 2 * W) product_transposed_strip<INTO, 2, 4 / N>(y, m, rows, j, x);
  for (; j < padded; j += W) product_transposed_strip<INTO, 1, 4>(y, m, rows, j, x);
}

// y = M x for a symmetric M.
template <class Real>
void product_symmetric(Real* y, const Matrix<Real>& m, int64_t padded, const Real* x) {
  product_transposed<Into::kSet, 1, Real>({y}, m, m.rows, padded, {x});
}

// y = M x for the first `rows` rows of M. Rows are read in groups of kLanes, so M has round_up(rows, kLanes) of them.
template <class Real>
void product_rows(Real* y, const Matrix<Real>& m, int64_t rows, int64_t padded, const Real* x) {
  constexpr int64_t W = kLanes<Real>;
  for (int64_t i = 0; i < rows; i += W) {
    Vec<Real> sum[W] = {};
    for (int64_t j = 0; j < padded; j += W) {
      const Vec<Real> entry = load(x + j);
#pragma GCC unroll 16
      for (int64_t row = 0; row < W; ++row) sum[row] += load(m.row(i + row) + j) * entry;
    }
    store<Real>(y + i, lane_sums<Real>(sum));
  }
}

}  // namespace fastkm::FASTKM_LEVEL
