// Cholesky factors, with the inverses of their diagonal blocks.
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "cpu/linalg/product.h"
#include "cpu/linalg/transpose.h"

namespace fastkm::FASTKM_LEVEL {

// The lower factor L of a positive definite matrix, with the inverses of its diagonal blocks: with those, every solve
// is made of products.
template <class Real>
struct Factor {
  Matrix<Real> lower;  // [n, n], the upper triangle is meaningless
  Real* inverse;       // [blocks, kBlock, kBlock], lower triangular
  Real* inverse_transposed;

  int64_t size() const { return lower.rows; }
  Matrix<Real> inverse_block(int64_t first) const { return {inverse + first * kBlock, kBlock, kBlock, kBlock}; }
  Matrix<Real> inverse_transposed_block(int64_t first) const {
    return {inverse_transposed + first * kBlock, kBlock, kBlock, kBlock};
  }
};

// In whole blocks of rows, zero past the last, so that tiles may take part whole.
template <class Real>
Factor<Real> allocate_factor(Arena& arena, int64_t n) {
  const int64_t padded = round_up(n, kBlock);
  const Matrix<Real> lower = allocate_matrix<Real>(arena, padded, n);
  fill_zero(lower.rows_from(n, padded - n));
  return {lower.rows_from(0, n), arena.allocate<Real>(padded * kBlock), arena.allocate<Real>(padded * kBlock)};
}

// Least value each pivot may have. A pivot below its floor by no more than rounding is raised to it; one further
// below, or NaN, is not that of a positive definite matrix. With no floors, a pivot must be positive.
template <class Real>
struct PivotFloors {
  const Real* value = nullptr;  // [n]
  const Real* slack = nullptr;  // [n]
};

// A square of kBlock rows.
template <class Real>
struct SquareBlock {
  alignas(64) Real entry[kBlock][kBlock];
};

template <class Real>
void transpose_block(Real* to, int64_t to_ld, const Real* from, int64_t from_ld) {
  for (int64_t i = 0; i < kBlock; i += kLanes<Real>)
    for (int64_t j = 0; j < kBlock; j += kLanes<Real>)
      transpose_square(to + i * to_ld + j, to_ld, from + j * from_ld + i, from_ld);
}

// What is on and below the diagonal only, in whole squares of vectors; or on and above it.
template <class Real>
void transpose_lower(Real* to, int64_t to_ld, const Real* from, int64_t from_ld) {
  for (int64_t i = 0; i < kBlock; i += kLanes<Real>)
    for (int64_t j = i; j < kBlock; j += kLanes<Real>)
      transpose_square(to + i * to_ld + j, to_ld, from + j * from_ld + i, from_ld);
}
template <class Real>
void transpose_upper(Real* to, int64_t to_ld, const Real* from, int64_t from_ld) {
  for (int64_t i = 0; i < kBlock; i += kLanes<Real>)
    for (int64_t j = 0; j <= i; j += kLanes<Real>)
      transpose_square(to + i * to_ld + j, to_ld, from + j * from_ld + i, from_ld);
}

// f<0>(), f<1>(), … f<COUNT − 1>()
template <int64_t COUNT, class F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f.template operator()<I>(), ...);
  }(std::make_integer_sequence<int, static_cast<int>(COUNT)>());
}

// The pivot to go on with, and whether it is that of a positive definite matrix.
template <class Real>
bool check_pivot(Real& pivot, const PivotFloors<Real>& floors, int64_t j) {
  const Real floor = floors.value ? floors.value[j] : Real(0);
  const bool holds = floors.value ? pivot >= floor - floors.slack[j] : pivot > 0;
  const bool finite = pivot - pivot == 0;
  if (!holds || !finite)
    pivot = 1;
  else if (pivot < floor)
    pivot = floor;
  return holds && finite;
}

// One vector of columns of rows `first` to `first` + W of a square being eliminated, in registers. With `multipliers`
// in hand, which are the rows of Lᵀ unscaled and over their pivots, a panel of any square goes the way of Lᵀ itself.
template <class Real>
struct Panel {
  static constexpr int W = static_cast<int>(kLanes<Real>);
  const SquareBlock<Real>& multipliers;
  const int64_t first;
  Vec<Real> row[W];

  [[gnu::always_inline]] void load_from(const SquareBlock<Real>& square, int64_t column) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) row[i] = load(square.entry[first + i] + column);
  }

  [[gnu::always_inline]] void store_to(SquareBlock<Real>& square, int64_t column) const {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store<Real>(square.entry[first + i] + column, row[i]);
  }

  // Take row `j` of the square off rows AFTER + 1 and on.
  template <int AFTER>
  [[gnu::always_inline]] void subtract_row(int64_t j, Vec<Real> other) {
    const Real* factors = multipliers.entry[j] + first;
#pragma GCC unroll 16
    for (int i = AFTER + 1; i < W; ++i) row[i] -= factors[i] * other;
  }

  // All rows above, from `start` on: before it they are zero in this column.
  [[gnu::always_inline]] void subtract_rows_above(const SquareBlock<Real>& square, int64_t start, int64_t column) {
    for (int64_t j = start; j < first; ++j) subtract_row<-1>(j, load(square.entry[j] + column));
  }

  [[gnu::always_inline]] void eliminate_within() {
    unrolled<W>([&]<int J>() __attribute__((always_inline)) { subtract_row<J>(first + J, row[J]); });
  }
};

// L Lᵀ and, where it is wanted, L⁻¹ of one diagonal block, in place; false if a pivot is not positive. Both come out of
// one elimination: what turns A into D Lᵀ turns the identity into D L⁻¹, and the roots in D, which no later row waits
// for, come last.
template <class Real>
bool factor_block(const Matrix<Real>& a, int64_t n, const PivotFloors<Real>& floors, Real* inverse,
                  Real* inverse_transposed) {
  constexpr int64_t W = kLanes<Real>;
  // Lᵀ, of which only what is on and right of the diagonal counts; its rows over their pivots; L⁻¹
  SquareBlock<Real> upper, multipliers, root;
  if (n == kBlock) {
    transpose_lower(upper.entry[0], kBlock, a.data, a.ld);
  } else {
    upper = {};
    for (int64_t i = n; i < kBlock; ++i) upper.entry[i][i] = 1;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) upper.entry[j][i] = a.row(i)[j];
  }
  bool good = true;
  Real pivots[kBlock], reciprocals[kBlock];
  for (int64_t first = 0; first < kBlock; first += W) {
    Panel<Real> panel{.multipliers = multipliers, .first = first};
    panel.load_from(upper, first);
    panel.subtract_rows_above(upper, 0, first);
    Real pivot = panel.row[0][0];
    unrolled<W>([&]<int J>() __attribute__((always_inline)) {
      const int64_t j = first + J;
      const auto& row = panel.row;
      if (j < n) good &= check_pivot(pivot, floors, j);
      pivots[j] = pivot;
      const Real reciprocal = reciprocals[j] = 1 / pivot;
      // The next pivot ahead of its row: nothing else is waited for.
      if constexpr (J + 1 < W) pivot = row[J + 1][J + 1] - row[J][J + 1] * reciprocal * row[J][J + 1];
      store<Real>(multipliers.entry[j] + first, row[J] * reciprocal);
      panel.template subtract_row<J>(j, row[J]);
    });
    panel.store_to(upper, first);
    for (int64_t column = first + W; column < kBlock; column += W) {
      panel.load_from(upper, column);
      panel.subtract_rows_above(upper, 0, column);
      panel.eliminate_within();
      panel.store_to(upper, column);
      for (int64_t i = 0; i < W; ++i)
        store<Real>(multipliers.entry[first + i] + column, panel.row[i] * reciprocals[first + i]);
    }
    for (int64_t column = 0; inverse && column <= first; column += W) {
      unrolled<W>([&]<int J>() __attribute__((always_inline)) {
        panel.row[J] = Vec<Real>{};
        if (column == first) panel.row[J][J] = 1;
      });
      panel.subtract_rows_above(root, column, column);
      panel.eliminate_within();
      panel.store_to(root, column);
    }
  }
  for (int64_t j = 0; j < kBlock; ++j) {
    Real* row = upper.entry[j];
    const Real* root_row = root.entry[j];
    const Real length = std::sqrt(pivots[j]), reciprocal = 1 / length;
    for (int64_t c = j / W * W; c < kBlock; c += W) store<Real>(row + c, load(row + c) * reciprocal);
    for (int64_t c = 0; inverse && c < kBlock; c += W)
      store<Real>(inverse + j * kBlock + c, c <= j ? load(root_row + c) * reciprocal : Vec<Real>{});
    row[j] = length;
  }
  if (n == kBlock) {
    transpose_upper(a.data, a.ld, upper.entry[0], kBlock);
  } else {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) a.row(i)[j] = upper.entry[j][i];
  }
  if (inverse) transpose_block(inverse_transposed, kBlock, inverse, kBlock);
  return good;
}

// The inverse of a factor of one block, row by row: L⁻¹ = diag(1/L_tt) (I − the rows above, by what L has of them).
template <class Real>
void invert_block(const Factor<Real>& f) {
  constexpr int64_t W = kLanes<Real>;
  SquareBlock<Real> root = {};
  for (int64_t i = 0; i < kBlock; ++i) {
    Real* row = root.entry[i];
    row[i] = 1;
    if (i >= f.size()) continue;
    const Real* lower = f.lower.row(i);
    const Real reciprocal = 1 / lower[i];
    for (int64_t c = 0; c <= i; c += W) {
      Vec<Real> sum = load(row + c);
      for (int64_t j = c; j < i; ++j) sum -= lower[j] * load(root.entry[j] + c);
      store<Real>(row + c, sum * reciprocal);
    }
  }
  __builtin_memcpy(f.inverse, root.entry, sizeof root.entry);
  transpose_block(f.inverse_transposed, kBlock, root.entry[0], kBlock);
}

// Which blocks a factor inverts: the last one's inverse is for solves alone.
enum class Inverses { kAll, kAllButLast };

// Factor f.lower (its lower triangle) in place, block column by block column, each first brought up to date from
// those on its left. Returns whether the matrix is positive definite; if not, the factor is finite but meaningless.
template <class Real>
bool cholesky(const Factor<Real>& f, Arena& arena, const PivotFloors<Real>& floors = {}, Prefetch* prefetch = nullptr,
              Inverses inverses = Inverses::kAll) {
  const int64_t n = f.size();
  const Matrix<Real> above = allocate_matrix<Real>(arena, n, kBlock);  // Lᵀ of this block row
  const Matrix<Real> panel = allocate_matrix<Real>(arena, n, kBlock);
  bool good = true;
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    const Matrix<Real> column = f.lower.block(j, n - j, j, width);
    if (j > 0) {
      transpose(above.block(0, j, 0, width), f.lower.block(j, width, 0, j));
      product<Into::kSubtract>(column, j, operand(f.lower.rows_from(j, n - j)), above, prefetch);
    }
    const PivotFloors<Real> here{floors.value ? floors.value + j : nullptr, floors.slack ? floors.slack + j : nullptr};
    const int64_t below = n - j - width;
    const bool inverted = below > 0 || inverses == Inverses::kAll;
    good &= factor_block(column, width, here, inverted ? f.inverse_block(j).data : nullptr,
                         f.inverse_transposed_block(j).data);
    if (below > 0) {
      const Matrix<Real> rest = column.rows_from(width, below);
      copy_rows(panel, rest);
      product<Into::kSet>(rest, kBlock, operand(panel), f.inverse_transposed_block(j), prefetch);
    }
  }
  return good;
}

// Without a factor there is no gradient: let every solve answer NaN.
template <class Real>
void poison_factor(const Factor<Real>& f) {
  for (int64_t i = 0; i < round_up(f.size(), kBlock) * kBlock; ++i)
    f.inverse[i] = f.inverse_transposed[i] = std::numeric_limits<Real>::quiet_NaN();
}

}  // namespace fastkm::FASTKM_LEVEL
