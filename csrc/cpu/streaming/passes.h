// Passes over the rows of one memory of a stream, unit by unit.
#pragma once

#include "cpu/linalg/units.h"
#include "cpu/linalg/vectors.h"

namespace fastkm::FASTKM_LEVEL {

// The team that shares the passes over a memory of K rows.
inline const Team* team_for_passes(int64_t K, int64_t C) { return team_for(K * (K + C)); }

// The vector of lanes i, i + 1, … with zeros from `end` on.
template <class Real>
[[gnu::always_inline]] inline Vec<Real> clear_from(Vec<Real> vec, int64_t i, int64_t end) {
  return end - i >= kLanes<Real>                                         ? vec
         : lane_numbers<Real>() < static_cast<LaneNumber<Real>>(end - i) ? vec
                                                                         : Vec<Real>{};
}

// Sums of kLanes rows of M from row `i` on: Σ_j of M_ij x_j for each of N vectors x or, with SQUARES, of M_ij x_j and
// M_ij². With N = 2, half of the rows come first, so that all sums stay in registers.
template <class Real, bool SQUARES, bool WHOLE, size_t N>
[[gnu::always_inline]] inline void sum_rows(Vec<Real> (&total)[N], const Matrix<Real>& m, int64_t i, int64_t padded,
                                            const Real* const (&x)[N]) {
  constexpr int64_t W = kLanes<Real>, kRows = W / N;
  Vec<Real> sums[N][W];
#pragma GCC unroll 2
  for (int64_t part = 0; part < static_cast<int64_t>(N); ++part) {
    Vec<Real> sum[N][kRows] = {};
    const int64_t first = i + part * kRows;
    for (int64_t j = 0; j < padded; j += W) {
      Vec<Real> factor[N];
#pragma GCC unroll 2
      for (size_t n = 0; n < N; ++n) factor[n] = load(x[n] + j);
#pragma GCC unroll 16
      for (int64_t row = 0; row < kRows; ++row) {
        const Vec<Real> entry = load(m.row(WHOLE ? first + row : smaller(first + row, m.rows - 1)) + j);
#pragma GCC unroll 2
        for (size_t n = 0; n < N; ++n) sum[n][row] += entry * (SQUARES && n == 1 ? entry : factor[n]);
      }
    }
#pragma GCC unroll 2
    for (size_t n = 0; n < N; ++n)
#pragma GCC unroll 16
      for (int64_t row = 0; row < kRows; ++row) sums[n][part * kRows + row] = sum[n][row];
  }
#pragma GCC unroll 2
  for (size_t n = 0; n < N; ++n) total[n] = lane_sums<Real>(sums[n]);
}

// y_n = M x_n for rows [begin, end) and each of N pairs of vectors, with zeros after the last row. `begin` is that of a
// unit. With SQUARES, y_1 gets the squared norms of the rows.
template <size_t N, bool SQUARES = false, class Real>
void product_of_rows(Real* const (&y)[N], const Matrix<Real>& m, int64_t begin, int64_t end, int64_t padded,
                     const Real* const (&x)[N]) {
  constexpr int64_t W = kLanes<Real>;
  for (int64_t i = begin; i < end; i += W) {
    Vec<Real> total[N];
    if (i + W <= end)
      sum_rows<Real, SQUARES, true>(total, m, i, padded, x);
    else
      sum_rows<Real, SQUARES, false>(total, m, i, padded, x);
#pragma GCC unroll 2
    for (size_t n = 0; n < N; ++n) store<Real>(y[n] + i, clear_from<Real>(total[n], i, end));
  }
}

// y_n = M x_n for every row.
template <size_t N, bool SQUARES = false, class Real>
void product_by_units(const Team* team, Real* const (&y)[N], const Matrix<Real>& m, const Real* const (&x)[N]) {
  each_unit(team, m.rows, [&](int64_t begin, int64_t end) { product_of_rows<N, SQUARES>(y, m, begin, end, m.ld, x); });
}

// y = z − Mᵀ w, from sums over the rows of each unit, which go to `sums`.
template <class Real>
void subtract_product_transposed(const Team* team, Real* y, const Real* z, const Matrix<Real>& m, const Real* w,
                                 const Matrix<Real>& sums) {
  each_unit(team, m.rows, [&](int64_t begin, int64_t end) {
    sum_scaled_rows(sums.row(begin / kUnitRows), m.rows_from(begin, end - begin), m.ld, w + begin);
  });
  for (int64_t j = 0; j < m.ld; j += kLanes<Real>) {
    Vec<Real> rest = load(z + j);
    for (int64_t unit = 0; unit < count_units(m.rows); ++unit) rest -= load(sums.row(unit) + j);
    store<Real>(y + j, rest);
  }
}

// row += Σ_n factor_n · x_n
template <size_t N, class Real>
[[gnu::always_inline]] inline void add_to_row(Real* row, int64_t padded, const Real (&factor)[N],
                                              const Real* const (&x)[N]) {
  for (int64_t j = 0; j < padded; j += kLanes<Real>) {
    Vec<Real> entry = load(row + j);
#pragma GCC unroll 2
    for (size_t n = 0; n < N; ++n) entry += factor[n] * load(x[n] + j);
    store<Real>(row + j, entry);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
