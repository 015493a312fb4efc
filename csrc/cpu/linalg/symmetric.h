// Symmetric matrices: the check, operations on their triangles, and the systems of the ridge solve.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/linalg/product.h"
#include "cpu/linalg/transpose.h"

namespace fastkm::FASTKM_LEVEL {

// largest ← max(largest, x), from any thread.
template <class Bits>
void raise(std::atomic<Bits>& largest, Bits x) {
  Bits seen = largest.load(std::memory_order_relaxed);
  while (x > seen && !largest.compare_exchange_weak(seen, x)) {
  }
}

// The largest entry of a matrix and its largest difference from its transpose, as bits of their magnitudes. A maximum
// does not depend on how threads share it.
template <class Real>
struct SymmetryOf {
  using Bits = LaneNumber<Real>;
  std::atomic<Bits> scale = 0, gap = 0;

  void compare(Bits size, Bits difference) { raise(scale, size), raise(gap, difference); }

  template <class Lanes>
  void compare_lanes(const Lanes& sizes, const Lanes& differences) {
    Bits size = 0, difference = 0;
    for (int64_t lane = 0; lane < kLanes<Real>; ++lane) {
      size = sizes[lane] > size ? sizes[lane] : size;
      difference = differences[lane] > difference ? differences[lane] : difference;
    }
    compare(size, difference);
  }

  // kAsymmetric if the matrix is not symmetric up to rounding, kNotPositiveDefinite if an entry is not finite.
  Status status() const {
    const Real largest = __builtin_bit_cast(Real, gap.load());
    if (largest - largest != 0) return kNotPositiveDefinite;  // it is NaN if any entry is NaN or infinite
    return largest <= std::sqrt(std::numeric_limits<Real>::epsilon()) * __builtin_bit_cast(Real, scale.load())
               ? kGood
               : kAsymmetric;
  }
};

// Whether a matrix can be a covariance.
template <class Real>
Status symmetry(const Matrix<Real>& m) {
  constexpr int64_t W = kLanes<Real>;
  using Bits = LaneNumber<Real>;
  // Compare each square below the diagonal with the one across it, lane by lane; then the remaining rows entry by
  // entry.
  const int64_t whole = m.rows / W * W;
  SymmetryOf<Real> found;
  const Team* team = team_for(m.rows * m.rows / 2);
  share_triangle_parts(team, m.rows / W, [&](const auto& each_square_row) __attribute__((always_inline)) {
    const Matrix<Real> m_here = m;
    alignas(64) Real across[W * W];
    decltype(lane_numbers<Real>()) scales = {}, gaps = {};
    each_square_row([&](int64_t square_row) __attribute__((always_inline)) {
      const int64_t i = square_row * W;
      for (int64_t j = 0; j <= i; j += W) {
        transpose_square(across, W, m_here.row(j) + i, m_here.ld);
        for (int64_t row = 0; row < W; ++row) {
          const Vec<Real> entry = load(m_here.row(i + row) + j);
          const auto size = magnitude<Real>(entry), difference = magnitude<Real>(entry - load(across + row * W));
          scales = size > scales ? size : scales;
          gaps = difference > gaps ? difference : gaps;
        }
      }
    });
    found.compare_lanes(scales, gaps);
  });
  for (int64_t i = whole; i < m.rows; ++i)
    for (int64_t j = 0; j <= i; ++j)
      found.compare(__builtin_bit_cast(Bits, std::abs(m.row(i)[j])),
                    __builtin_bit_cast(Bits, std::abs(m.row(i)[j] - m.row(j)[i])));
  return found.status();
}

// Copy the lower triangle to the upper one.
template <class Real>
void mirror(Matrix<Real> m) {
  constexpr int64_t W = kLanes<Real>;
  // A block of rows is written column of squares by column of squares, so that rows that are read stay in the cache.
  constexpr int64_t kRows = 4 * W;
  const int64_t whole = m.rows / W * W;
  const auto mirror_diagonal = [=](int64_t i) __attribute__((always_inline)) {
    alignas(64) Real across[W * W];
    transpose_square(across, W, m.row(i) + i, m.ld);
    for (int64_t row = 0; row < W; ++row) {
      Real* at = m.row(i + row) + i;
      store<Real>(at, lane_numbers<Real>() > static_cast<LaneNumber<Real>>(row) ? load(across + row * W) : load(at));
    }
  };
  share_triangle(team_for(m.rows * m.rows / 2), (whole + kRows - 1) / kRows,
                 [=](int64_t block) __attribute__((always_inline)) {
                   const int64_t first = block * kRows, end = smaller(first + kRows, whole);
                   for (int64_t i = first; i < end; i += W) mirror_diagonal(i);
                   for (int64_t j = first + W; j < whole; j += W)
                     for (int64_t i = first; i < smaller(end, j); i += W)
                       transpose_square(m.row(i) + j, m.ld, m.row(j) + i, m.ld);
                 });
  for (int64_t j = whole; j < m.rows; ++j)
    for (int64_t i = 0; i < j; ++i) m.row(i)[j] = m.row(j)[i];
}

// a ← (a + aᵀ) / 2, in squares of kLanes × kLanes; then the remaining rows entry by entry.
template <class Real>
void symmetrise(const Matrix<Real>& a) {
  constexpr int64_t W = kLanes<Real>;
  const int64_t whole = a.rows / W * W;
  alignas(64) Real across[W * W], averaged[W * W];
  for (int64_t i = 0; i < whole; i += W)
    for (int64_t j = 0; j <= i; j += W) {
      transpose_square(across, W, a.row(j) + i, a.ld);
      for (int64_t row = 0; row < W; ++row) {
        const Vec<Real> mean = Real(0.5) * (load(a.row(i + row) + j) + load(across + row * W));
        store<Real>(averaged + row * W, mean);
        store<Real>(a.row(i + row) + j, mean);
      }
      transpose_square(a.row(j) + i, a.ld, averaged, W);
    }
  for (int64_t i = whole; i < a.rows; ++i)
    for (int64_t j = 0; j < i; ++j) a.row(i)[j] = a.row(j)[i] = Real(0.5) * (a.row(i)[j] + a.row(j)[i]);
}

// m ← m + mᵀ
template <class Real>
void add_transpose(const Matrix<Real>& m) {
  for (int64_t i0 = 0; i0 < m.rows; i0 += kBlock)
    for (int64_t j0 = 0; j0 <= i0; j0 += kBlock)
      for (int64_t i = i0; i < smaller(i0 + kBlock, m.rows); ++i)
        for (int64_t j = j0; j < smaller(j0 + kBlock, i + 1); ++j)
          m.row(i)[j] = m.row(j)[i] = m.row(i)[j] + m.row(j)[i];
}

// a ← G + λI, or G² + λI. Only the lower triangle is computed. `gram` may be `a` if it is not squared.
template <class Real>
void regularise(const Matrix<Real>& a, const Matrix<Real>& gram, Real ridge, bool squared) {
  if (squared)
    product_lower<Into::kSet>(a, gram.rows, operand(gram), gram);
  else if (a.data != gram.data)
    copy_rows(a, gram);
  for (int64_t i = 0; i < a.rows; ++i) a.row(i)[i] += ridge;
}

template <class Real>
Real trace(const Matrix<Real>& m) {
  Real sum = 0;
  for (int64_t i = 0; i < m.rows; ++i) sum += m.row(i)[i];
  return sum;
}

template <class Real>
Real largest_diagonal(const Matrix<Real>& m) {
  Real largest = 0;
  for (int64_t i = 0; i < m.rows; ++i) largest = m.row(i)[i] > largest ? m.row(i)[i] : largest;
  return largest;
}

// a ← a b for symmetric matrices that commute, so that the product is symmetric too.
template <class Real>
void product_commuting(const Matrix<Real>& a, const Matrix<Real>& b, const Matrix<Real>& scratch) {
  product_lower<Into::kSet>(scratch, a.rows, operand(a), b);
  copy_rows(a, scratch);
  mirror(a);
}

}  // namespace fastkm::FASTKM_LEVEL
