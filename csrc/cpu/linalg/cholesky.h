// Cholesky factors, with the inverses of their diagonal blocks.
//
// A matrix of n rows costs n³ / 3 operations. Block columns of kBlock columns are factored from left to right:
//   (1)  A_:j −= L_:,<j (L_j,<j)ᵀ             a product
//   (2)  A_jj = L_jj L_jjᵀ, and L_jj⁻¹        in registers, by factor_block
//   (3)  L_>j,j = A_>j,j L_jj⁻ᵀ               a product
// Solves use the inverse of a diagonal block the same way, so everything but (2) is made of products.
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "cpu/linalg/product.h"
#include "cpu/linalg/transpose.h"

namespace fastkm::FASTKM_LEVEL {

// The lower factor L of a positive definite matrix, with the inverses of its diagonal blocks.
template <class Real>
struct Factor {
  Matrix<Real> lower;        // [n, n], the upper triangle is meaningless
  Real* inverse;             // [blocks, kBlock, kBlock], lower triangular
  Real* inverse_transposed;  // likewise, upper triangular

  int64_t size() const { return lower.rows; }
  Matrix<Real> inverse_block(int64_t first) const { return {inverse + first * kBlock, kBlock, kBlock, kBlock}; }
  Matrix<Real> inverse_transposed_block(int64_t first) const {
    return {inverse_transposed + first * kBlock, kBlock, kBlock, kBlock};
  }
};

// A factor in whole blocks of rows. Rows past the last are zero, so that tiles may read them.
template <class Real>
Factor<Real> allocate_factor(Arena& arena, int64_t n) {
  const int64_t padded = round_up(n, kBlock);
  const Matrix<Real> lower = allocate_matrix<Real>(arena, padded, n);
  fill_zero(lower.rows_from(n, padded - n));
  return {lower.rows_from(0, n), arena.allocate<Real>(padded * kBlock), arena.allocate<Real>(padded * kBlock)};
}

// A positive diagonal that is added to the matrix, each entry when its pivot is taken: what is left of the matrix
// itself keeps its digits, however small it is beside the diagonal. A negative rest within its slack becomes zero; one
// further below, or NaN, means that the matrix is not positive semidefinite. Without a diagonal, pivots must be
// positive.
template <class Real>
struct AddedDiagonal {
  const Real* value = nullptr;  // [n]
  const Real* slack = nullptr;  // [n]
  Real* rest = nullptr;         // [n], out: the pivots without the diagonal

  AddedDiagonal from(int64_t j) const { return value ? AddedDiagonal{value + j, slack + j, rest + j} : *this; }
};

// A diagonal block in working memory of its own.
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

// The same if only the lower triangle of `from` matters: squares above its diagonal are left out.
template <class Real>
void transpose_lower(Real* to, int64_t to_ld, const Real* from, int64_t from_ld) {
  for (int64_t i = 0; i < kBlock; i += kLanes<Real>)
    for (int64_t j = i; j < kBlock; j += kLanes<Real>)
      transpose_square(to + i * to_ld + j, to_ld, from + j * from_ld + i, from_ld);
}
// The same if only the upper triangle of `from` matters.
template <class Real>
void transpose_upper(Real* to, int64_t to_ld, const Real* from, int64_t from_ld) {
  for (int64_t i = 0; i < kBlock; i += kLanes<Real>)
    for (int64_t j = 0; j <= i; j += kLanes<Real>)
      transpose_square(to + i * to_ld + j, to_ld, from + j * from_ld + i, from_ld);
}

// Call f(0), f(1), … f(COUNT − 1) with constants that f can use at compile time.
template <int64_t COUNT, class F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, static_cast<int>(COUNT)>());
}

// Add the diagonal to a pivot. Returns whether the pivot is that of a positive definite matrix. If not, it is replaced
// by a value that is safe to divide by.
template <class Real>
bool check_pivot(Real& pivot, const AddedDiagonal<Real>& added, int64_t j) {
  const bool finite = pivot - pivot == 0;
  const bool holds = finite && (added.value ? pivot >= -added.slack[j] : pivot > 0);
  if (added.value) {
    const Real rest = added.rest[j] = holds && pivot > 0 ? pivot : 0;
    pivot = rest + added.value[j];
  } else if (!holds) {
    pivot = 1;
  }
  return holds;
}

// One vector of columns of rows [first, first + W) of a block, in registers, while it is eliminated. The multipliers
// are the rows of √D Lᵀ divided by their pivots; a panel of another block is eliminated with the same multipliers.
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

  // Subtract multiples of row `j` of the block, which is `other`, from rows AFTER + 1 and on.
  template <int AFTER>
  [[gnu::always_inline]] void subtract_row(int64_t j, Vec<Real> other) {
    const Real* factors = multipliers.entry[j] + first;
#pragma GCC unroll 16
    for (int i = AFTER + 1; i < W; ++i) row[i] -= factors[i] * other;
  }

  // Subtract multiples of rows [start, first) of the block. Earlier rows are zero in this column.
  [[gnu::always_inline]] void subtract_rows_above(const SquareBlock<Real>& square, int64_t start, int64_t column) {
    for (int64_t j = start; j < first; ++j) subtract_row<-1>(j, load(square.entry[j] + column));
  }

  [[gnu::always_inline]] void eliminate_within() {
    unrolled<W>([&](auto j) __attribute__((always_inline)) { subtract_row<j>(first + j, row[j]); });
  }
};

// The transpose of the lower triangle of A [n, n], with the identity after row n.
template <class Real>
[[gnu::always_inline]] inline void load_upper(SquareBlock<Real>& upper, const Matrix<Real>& a, int64_t n) {
  if (n == kBlock) return transpose_lower(upper.entry[0], kBlock, a.data, a.ld);
  upper = {};
  for (int64_t i = n; i < kBlock; ++i) upper.entry[i][i] = 1;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) upper.entry[j][i] = a.row(i)[j];
}

// The way back: the lower triangle of A [n, n] from its transpose.
template <class Real>
[[gnu::always_inline]] inline void store_lower(const Matrix<Real>& a, const SquareBlock<Real>& upper, int64_t n) {
  if (n == kBlock) return transpose_upper(a.data, a.ld, upper.entry[0], kBlock);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) a.row(i)[j] = upper.entry[j][i];
}

// Factor one diagonal block in place, and invert the factor unless `inverse` is null. Returns false if a pivot is not
// positive. The elimination that turns A into √D Lᵀ turns the identity into √D L⁻¹, where D holds the pivots. The
// square roots come last, because no row of the elimination needs them.
template <class Real>
bool factor_block(const Matrix<Real>& a, int64_t n, const AddedDiagonal<Real>& added, Real* inverse,
                  Real* inverse_transposed) {
  constexpr int64_t W = kLanes<Real>;
  SquareBlock<Real> upper;           // √D Lᵀ, then Lᵀ; only its upper triangle matters
  SquareBlock<Real> multipliers;     // the rows of √D Lᵀ divided by their pivots
  SquareBlock<Real> scaled_inverse;  // √D L⁻¹
  load_upper(upper, a, n);
  bool good = true;
  Real pivots[kBlock], reciprocals[kBlock];
  for (int64_t first = 0; first < kBlock; first += W) {
    Panel<Real> panel{.multipliers = multipliers, .first = first};
    panel.load_from(upper, first);
    panel.subtract_rows_above(upper, 0, first);
    Real pivot = panel.row[0][0];
    unrolled<W>([&](auto constant) __attribute__((always_inline)) {
      constexpr int J = constant;
      const int64_t j = first + J;
      const auto& row = panel.row;
      if (j < n) good &= check_pivot(pivot, added, j);
      pivots[j] = pivot;
      const Real reciprocal = reciprocals[j] = 1 / pivot;
      // Compute the next pivot before its row: the next division needs only the pivot.
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
      unrolled<W>([&](auto constant) __attribute__((always_inline)) {
        constexpr int I = constant;
        panel.row[I] = Vec<Real>{};
        if (column == first) panel.row[I][I] = 1;
      });
      panel.subtract_rows_above(scaled_inverse, column, column);
      panel.eliminate_within();
      panel.store_to(scaled_inverse, column);
    }
  }
  for (int64_t j = 0; j < kBlock; ++j) {
    Real* row = upper.entry[j];
    const Real* inverse_row = scaled_inverse.entry[j];
    const Real root = std::sqrt(pivots[j]), reciprocal = 1 / root;
    for (int64_t c = j / W * W; c < kBlock; c += W) store<Real>(row + c, load(row + c) * reciprocal);
    for (int64_t c = 0; inverse && c < kBlock; c += W)
      store<Real>(inverse + j * kBlock + c, c <= j ? load(inverse_row + c) * reciprocal : Vec<Real>{});
    row[j] = root;
  }
  store_lower(a, upper, n);
  if (inverse) transpose_block(inverse_transposed, kBlock, inverse, kBlock);
  return good;
}

// The inverse of the diagonal block of a factor from row `first` on, row by row:
// (L⁻¹)_i = (e_i − Σ_j<i L_ij (L⁻¹)_j) / L_ii.
template <class Real>
void invert_block(const Factor<Real>& f, int64_t first) {
  constexpr int64_t W = kLanes<Real>;
  SquareBlock<Real> inverse = {};
  for (int64_t i = 0; i < kBlock; ++i) {
    Real* row = inverse.entry[i];
    row[i] = 1;
    if (first + i >= f.size()) continue;
    const Real* lower = f.lower.row(first + i) + first;
    const Real reciprocal = 1 / lower[i];
    for (int64_t c = 0; c <= i; c += W) {
      Vec<Real> sum = load(row + c);
      for (int64_t j = c; j < i; ++j) sum -= lower[j] * load(inverse.entry[j] + c);
      store<Real>(row + c, sum * reciprocal);
    }
  }
  __builtin_memcpy(f.inverse_block(first).data, inverse.entry, sizeof inverse.entry);
  transpose_block(f.inverse_transposed_block(first).data, kBlock, inverse.entry[0], kBlock);
}

template <class Real>
void invert_blocks(const Factor<Real>& f) {
  for (int64_t first = 0; first < f.size(); first += kBlock) invert_block(f, first);
}

// The diagonal blocks that `cholesky` inverts. The last inverse is needed only by solves, not by the factorisation.
enum class Inverses { kAll, kAllButLast };

// Columns of a panel. Panels are updated by all columns before them in one wide product.
constexpr int64_t kPanelColumns = 128;
static_assert(kPanelColumns % kBlock == 0);

// What the factorisation of a panel needs beside the matrix.
template <class Real>
struct PanelWork {
  Matrix<Real> row_transposed;  // [kPanelColumns, kBlock], (L_j,<j)ᵀ
  Matrix<Real> column;          // [n, kBlock]
};

// Factor the block columns [first, end) of a panel, whose entries are up to date with the columns before `first`.
template <class Real>
bool factor_panel(const Factor<Real>& f, int64_t first, int64_t end, const PanelWork<Real>& work,
                  const AddedDiagonal<Real>& added, Prefetch* prefetch, Inverses inverses) {
  const int64_t n = f.size();
  bool good = true;
  for (int64_t j = first; j < end; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j), before = j - first;
    const Matrix<Real> column = f.lower.block(j, n - j, j, width);
    if (before > 0) {
      transpose(work.row_transposed.block(0, before, 0, width), f.lower.block(j, width, first, before));
      product<Into::kSubtract>(column, before, operand(f.lower.block(j, n - j, first, before)), work.row_transposed,
                               prefetch);
    }
    const int64_t below = n - j - width;
    const bool inverted = below > 0 || inverses == Inverses::kAll;
    good &= factor_block(column, width, added.from(j), inverted ? f.inverse_block(j).data : nullptr,
                         f.inverse_transposed_block(j).data);
    if (below > 0) {
      const Matrix<Real> rest = column.rows_from(width, below);
      copy_rows(work.column, rest);
      product<Into::kSet>(rest, kBlock, operand(work.column), f.inverse_transposed_block(j), prefetch);
    }
  }
  return good;
}

// Factor the lower triangle of f.lower, plus a diagonal, in place. Returns whether the matrix is positive definite; if
// not, the factor is finite but meaningless.
template <class Real>
bool cholesky(const Factor<Real>& f, Arena& arena, const AddedDiagonal<Real>& added = {}, Prefetch* prefetch = nullptr,
              Inverses inverses = Inverses::kAll) {
  const int64_t n = f.size();
  const PanelWork<Real> work{allocate_matrix<Real>(arena, smaller(n, kPanelColumns), kBlock),
                             allocate_matrix<Real>(arena, n, kBlock)};
  const Matrix<Real> rows_transposed = allocate_matrix<Real>(arena, n > kPanelColumns ? n : 0, kPanelColumns);
  bool good = true;
  for (int64_t first = 0; first < n; first += kPanelColumns) {
    const int64_t width = smaller(kPanelColumns, n - first);
    if (first > 0) {
      const Matrix<Real> other = rows_transposed.block(0, first, 0, width);
      transpose(other, f.lower.block(first, width, 0, first));
      product<Into::kSubtract>(f.lower.block(first, n - first, first, width), first,
                               operand(f.lower.rows_from(first, n - first)), other, prefetch);
    }
    good &= factor_panel(f, first, first + width, work, added, prefetch, inverses);
  }
  return good;
}

// Make every solve with this factor return NaN. A memory without a factor has no gradient.
template <class Real>
void poison_factor(const Factor<Real>& f) {
  for (int64_t i = 0; i < round_up(f.size(), kBlock) * kBlock; ++i)
    f.inverse[i] = f.inverse_transposed[i] = std::numeric_limits<Real>::quiet_NaN();
}

}  // namespace fastkm::FASTKM_LEVEL
