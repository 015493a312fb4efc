// Passes over the rows of a matrix that threads share.
//
// A pass goes through the rows in units of kUnitRows. The threads of a team share the units always in the same way, so
// a thread finds in its own cache the rows that it had in the pass before. A sum over rows is added up unit by unit in
// their order, whoever computed them: results do not depend on the number of threads.
#pragma once

#include "cpu/linalg/matrix.h"
#include "cpu/linalg/team.h"

namespace fastkm::FASTKM_LEVEL {

constexpr int64_t kUnitRows = 64;

inline int64_t count_units(int64_t rows) { return (rows + kUnitRows - 1) / kUnitRows; }

// Call f(begin, end) for the rows of every unit.
template <class F>
void each_unit(const Team* team, int64_t rows, const F& f) {
  share(team, count_units(rows), [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) f(unit * kUnitRows, smaller((unit + 1) * kUnitRows, rows));
  });
}

// sum += Σ x_r · row r of m, for ROWS rows from `i` on. Rows need no padding; entries from `columns` on are not read.
template <int ROWS, class Real>
[[gnu::always_inline]] inline void add_scaled_rows(Real* sum, const Matrix<Real>& m, int64_t i, int64_t columns,
                                                   const Real* x) {
  int64_t j = 0;
  for (; j + kLanes<Real> <= columns; j += kLanes<Real>) {
    Vec<Real> total = load(sum + j);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) total += x[i + row] * load(m.row(i + row) + j);
    store<Real>(sum + j, total);
  }
  for (; j < columns; ++j)
    for (int row = 0; row < ROWS; ++row) sum[j] += x[i + row] * m.row(i + row)[j];
}

// sum = Mᵀ x for a few rows, which are read from left to right, as caches expect it.
template <class Real>
void sum_scaled_rows(Real* sum, const Matrix<Real>& m, int64_t columns, const Real* x) {
  __builtin_memset(sum, 0, static_cast<size_t>(columns) * sizeof(Real));
  int64_t i = 0;
  for (; i + 8 <= m.rows; i += 8) add_scaled_rows<8>(sum, m, i, columns, x);
  for (; i < m.rows; ++i) add_scaled_rows<1>(sum, m, i, columns, x);
}

}  // namespace fastkm::FASTKM_LEVEL
