// Products of few rows with a large matrix.
//
// Bound: the bytes of the matrix, which is read once, row by row as it lies. Rows are read side by side, so that a sum
// is loaded and stored once for several of them.
#pragma once

#include "cpu/linalg/product.h"

namespace fastkm::FASTKM_LEVEL {

// Whether Y = X M is computed here: Y has few rows, which do not hide the time that a large M takes to arrive.
// Measured: register tiles are faster from 3 rows on if M fits the second-level cache with ease, and from about 10 on
// if not.
constexpr int64_t kMostRows = 8;
template <class Real>
bool has_few_rows(int64_t rows, int64_t k, int64_t columns) {
  const bool large = k * columns * static_cast<int64_t>(sizeof(Real)) >= (1 << 19);
  return rows <= (large ? kMostRows : 2) && columns >= kLanes<Real>;
}

// Columns whose sums one pass keeps in the first-level cache, in vectors.
constexpr int64_t kFewVectors = 32;

// Products that read fewer numbers are computed by one thread.
constexpr int64_t kManyNumbers = 1 << 16;

// Sums of N rows of Y for vectors [begin, end) of columns. The last vector ends with the last column, so it may overlap
// the one before it; both then compute the same numbers.
template <size_t N, class Real>
struct FewSums {
  static constexpr int64_t W = kLanes<Real>;
  const int64_t columns, begin, end;
  alignas(64) Real part[N][kFewVectors * kLanes<Real>], total[N][kFewVectors * kLanes<Real>];

  int64_t column(int64_t v) const { return smaller(v * W, columns - W); }

  // part_n += Σ x_ni M_i over rows [first, first + ROWS) of M, for sums n in [N0, N0 + COUNT).
  template <size_t N0, size_t COUNT, int ROWS>
  [[gnu::always_inline]] void add_rows_to(const Matrix<Real>& x, Rows<const Real> m, int64_t first) {
    Real factor[COUNT][ROWS];
    for (size_t n = 0; n < COUNT; ++n)
      for (int i = 0; i < ROWS; ++i) factor[n][i] = x.row(static_cast<int64_t>(N0 + n))[first + i];
    for (int64_t v = begin; v < end; ++v) {
      const Real* at = m.data + first * m.ld + column(v);
      Vec<Real> row[ROWS];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) row[i] = load(at + i * m.ld);
      if constexpr (N0 == 0)  // the rows that come next
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) __builtin_prefetch(at + (ROWS + i) * m.ld);
#pragma GCC unroll 4
      for (size_t n = 0; n < COUNT; ++n) {
        Real* to = part[N0 + n] + (v - begin) * W;
        Vec<Real> sum = load(to);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) sum += factor[n][i] * row[i];
        store<Real>(to, sum);
      }
    }
  }

  // The same for all sums. Registers hold the factors of four; the others find the rows in the first-level cache.
  template <int ROWS>
  [[gnu::always_inline]] void add_rows(const Matrix<Real>& x, Rows<const Real> m, int64_t first) {
    constexpr size_t kHeld = 4;
    add_rows_to < 0, N<kHeld ? N : kHeld, ROWS>(x, m, first);
    if constexpr (N > kHeld) add_rows_to<kHeld, N - kHeld, ROWS>(x, m, first);
  }

  // Long sums are added up from parts, which bounds their rounding.
  void compute(const Matrix<Real>& y, int64_t k, const Matrix<Real>& x, Rows<const Real> m) {
    constexpr int kSideBySide = N == 1 ? 8 : 4;
    const int64_t width = (end - begin) * W;
    for (size_t n = 0; n < N; ++n) fill(total[n], width);
    for (int64_t run = 0; run < k; run += kSumRun) {
      const int64_t stop = smaller(run + kSumRun, k);
      for (size_t n = 0; n < N; ++n) fill(part[n], width);
      int64_t i = run;
      for (; i + kSideBySide <= stop; i += kSideBySide) add_rows<kSideBySide>(x, m, i);
      for (; i < stop; ++i) add_rows<1>(x, m, i);
      for (size_t n = 0; n < N; ++n)
        for (int64_t j = 0; j < width; j += W) store<Real>(total[n] + j, load(total[n] + j) + load(part[n] + j));
    }
    for (size_t n = 0; n < N; ++n)
      for (int64_t v = begin; v < end; ++v)
        store<Real>(y.row(static_cast<int64_t>(n)) + column(v), load(total[n] + (v - begin) * W));
  }

 private:
  static void fill(Real* to, int64_t width) {
    for (int64_t j = 0; j < width; j += W) store<Real>(to + j, Vec<Real>{});
  }
};

template <size_t N, class Real>
void product_of_few(const Matrix<Real>& y, int64_t k, const Matrix<Real>& x, const Matrix<Real>& m) {
  const int64_t vectors = (y.columns + kLanes<Real> - 1) / kLanes<Real>;
  share(team_for(k * y.columns, kManyNumbers), vectors, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; v += kFewVectors) {
      FewSums<N, Real> sums{.columns = y.columns, .begin = v, .end = smaller(v + kFewVectors, end)};
      sums.compute(y, k, x, {m.data, m.ld});
    }
  });
}

// Y = X M if has_few_rows. Nothing needs padding.
template <class Real>
void product_of_few(const Matrix<Real>& y, int64_t k, const Matrix<Real>& x, const Matrix<Real>& m) {
  switch (y.rows) {
    case 1: return product_of_few<1>(y, k, x, m);
    case 2: return product_of_few<2>(y, k, x, m);
    case 3: return product_of_few<3>(y, k, x, m);
    case 4: return product_of_few<4>(y, k, x, m);
    case 5: return product_of_few<5>(y, k, x, m);
    case 6: return product_of_few<6>(y, k, x, m);
    case 7: return product_of_few<7>(y, k, x, m);
    default: return product_of_few<kMostRows>(y, k, x, m);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
