// y = M x for a large symmetric M, of which one half is read: every entry below the diagonal serves its row and its
// column. Such a product is bound by the bytes of M, and rows are read in their order.
//
// Rows are dealt out to kHalfParts parts, each with a sum of its own over columns. The number of parts does not depend
// on the number of threads, nor does the order in which their sums are added.
#pragma once

#include <cmath>

#include "cpu/linalg/vectors.h"

namespace fastkm::FASTKM_LEVEL {

// Smaller matrices stay in the second-level cache, where reading all of M by columns is as fast.
constexpr int64_t kHalfRows = 512, kHalfParts = 8;

// What rows [i, i + ROWS) add to y, where their diagonal squares begin in column `square`. The squares are read whole.
template <int ROWS, size_t N, class Real>
[[gnu::always_inline]] inline void half_rows(Real* const (&y)[N], const Matrix<Real>& m, int64_t i, int64_t square,
                                             const Real* const (&x)[N]) {
  constexpr int64_t W = kLanes<Real>;
  Vec<Real> sum[N][ROWS] = {};
  for (int64_t j = 0; j <= square; j += W) {
    Vec<Real> entry[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) entry[r] = load(m.row(i + r) + j);
#pragma GCC unroll 2
    for (size_t n = 0; n < N; ++n) {
      const Vec<Real> other = load(x[n] + j);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sum[n][r] += entry[r] * other;
      if (j == square) continue;
      Vec<Real> across = load(y[n] + j);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) across += entry[r] * x[n][i + r];
      store<Real>(y[n] + j, across);
    }
  }
  for (size_t n = 0; n < N; ++n)
    for (int r = 0; r < ROWS; ++r) y[n][i + r] += lane_sum<Real>(sum[n][r]);
}

// The first row of a part: parts have about the same number of entries below the diagonal.
template <class Real>
int64_t first_row_of_part(int64_t part, int64_t rows) {
  const double share = std::sqrt(static_cast<double>(part) / static_cast<double>(kHalfParts));
  return part == kHalfParts ? rows : static_cast<int64_t>(share * static_cast<double>(rows)) / kBlock * kBlock;
}

// y = M x for each of N pairs of vectors, whose padding is zero like that of M.
template <size_t N, class Real>
void half_product(Real* const (&y)[N], const Matrix<Real>& m, int64_t padded, const Real* const (&x)[N]) {
  constexpr int64_t W = kLanes<Real>;
  constexpr int kRows = W < 4 ? W : 4;  // rows that are read at once, whose diagonal squares are one
  Arena& arena = Arena::of_thread();
  const Arena::Mark mark = arena.mark();
  Real* const sums = arena.allocate<Real>(kHalfParts * static_cast<int64_t>(N) * padded);
  share(team_for(m.rows * padded), kHalfParts, [=](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t part = begin; part < end; ++part) {
      Real* of_part[N];
      for (size_t n = 0; n < N; ++n)
        of_part[n] = sums + (part * static_cast<int64_t>(N) + static_cast<int64_t>(n)) * padded;
      __builtin_memset(of_part[0], 0, static_cast<size_t>(padded) * N * sizeof(Real));
      const int64_t last = first_row_of_part<Real>(part + 1, m.rows);
      int64_t i = first_row_of_part<Real>(part, m.rows);
      for (; i + kRows <= last; i += kRows) half_rows<kRows>(of_part, m, i, i / W * W, x);
      for (; i < last; ++i) half_rows<1>(of_part, m, i, i / W * W, x);
    }
  });
  for (size_t n = 0; n < N; ++n)
    for (int64_t j = 0; j < padded; j += W) {
      Vec<Real> sum = load(sums + static_cast<int64_t>(n) * padded + j);
      for (int64_t part = 1; part < kHalfParts; ++part)
        sum += load(sums + (part * static_cast<int64_t>(N) + static_cast<int64_t>(n)) * padded + j);
      store<Real>(y[n] + j, sum);
    }
  arena.release(mark);
}

// y = M x for each of N pairs of vectors and a symmetric M of any size.
template <size_t N, class Real>
void symmetric_product(Real* const (&y)[N], const Matrix<Real>& m, int64_t padded, const Real* const (&x)[N]) {
  if (m.rows >= kHalfRows) return half_product<N, Real>(y, m, padded, x);
  product_transposed<Into::kSet, N, Real>(y, m, m.rows, padded, x);
}

}  // namespace fastkm::FASTKM_LEVEL
