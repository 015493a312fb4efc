// Solves with Cholesky factors, and their inverses.
#pragma once

#include "cpu/linalg/cholesky.h"
#include "cpu/linalg/symmetric.h"

namespace fastkm::FASTKM_LEVEL {

// One column of tiles of X = L⁻¹ (D − A B), from the top: a tile meets those above it.
template <int VECS, class Real>
void solve_lower_strip(const Factor<Real>& f, int64_t rows, int64_t k, const Operand<Real>& a, const Real* b,
                       int64_t ldb, const Real* d, int64_t ldd, Real* x, int64_t ldx, Prefetch* prefetch) {
  int64_t i = 0;
  const auto tiles = [&]<int ROWS>() {
    for (; i + ROWS <= rows; i += ROWS) {
      if (prefetch) prefetch->next_part();
      Tile<ROWS, VECS, Real> tile;
      tile.add_product(k, a.data + i * a.row, a.row, a.column, b, ldb);
      tile.add_product(i, f.lower.row(i), f.lower.ld, 1, x, ldx);
      tile.each([&](Vec<Real>& sum, int64_t r, int64_t j)
                    __attribute__((always_inline)) { sum = load(d + (i + r) * ldd + j) - sum; });
      // The inverse of a small diagonal block of L is that of the large one there.
      tile.multiply_lower(f.inverse + i * kBlock + i, kBlock);
      tile.each([&](Vec<Real>& y, int64_t r, int64_t j)
                    __attribute__((always_inline)) { store<Real>(x + (i + r) * ldx + j, y); });
    }
  };
  tiles.template operator()<tile_rows(VECS)>();
  if constexpr (tile_rows(VECS) > 4) tiles.template operator()<4>();
  tiles.template operator()<2>();
  tiles.template operator()<1>();
}

// X = L⁻¹ (D − A B) for an L of one block; A is [rows, k], and X is not D.
template <class Real>
void solve_lower(const Matrix<Real>& x, const Factor<Real>& f, const Matrix<Real>& d, int64_t k, const Operand<Real>& a,
                 const Matrix<Real>& b, Prefetch* prefetch = nullptr) {
  for (int64_t j = 0; j < x.columns;) {
    const auto [first, vectors] = strip_at<Real>(j, x.columns, b.padded && d.padded && x.padded);
    const auto strip = [&]<int VECS>() {
      solve_lower_strip<VECS>(f, x.rows, k, a, b.data + first, b.ld, d.data + first, d.ld, x.data + first, x.ld,
                              prefetch);
    };
    if (vectors == 3)
      strip.template operator()<3>();
    else if (vectors == 2)
      strip.template operator()<2>();
    else
      strip.template operator()<1>();
    j = first + vectors * kLanes<Real>;
  }
}

// X ← X (L Lᵀ)⁻¹ for rows of right-hand sides, X [m, n]; `lower_transposed` is Lᵀ [n, n].
template <class Real>
void solve_cholesky(const Factor<Real>& f, const Matrix<Real>& lower_transposed, const Matrix<Real>& x,
                    const Matrix<Real>& work) {
  const int64_t n = f.size();
  const auto set_aside = [&](int64_t j, int64_t width) {
    const Matrix<Real> rhs{work.data, x.rows, width, work.ld};
    copy_rows(rhs, x.block(0, x.rows, j, width));
    return rhs;
  };
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    const Matrix<Real> rhs = set_aside(j, width);
    if (j > 0) product<Into::kSubtract>(rhs, j, operand(x), lower_transposed.block(0, j, j, width));
    product<Into::kSet>(x.block(0, x.rows, j, width), width, operand(rhs), f.inverse_transposed_block(j));
  }
  for (int64_t j = (n - 1) / kBlock * kBlock; j >= 0 && n > 0; j -= kBlock) {
    const int64_t width = smaller(kBlock, n - j), after = j + width;
    const Matrix<Real> rhs = set_aside(j, width);
    if (after < n)
      product<Into::kSubtract>(rhs, n - after, Operand<Real>{x.data + after, x.ld, 1},
                               f.lower.block(after, n - after, j, width));
    product<Into::kSet>(x.block(0, x.rows, j, width), width, operand(rhs), f.inverse_block(j));
  }
}

// H = (L Lᵀ)⁻¹ in full.
template <class Real>
void invert_cholesky(const Factor<Real>& f, const Matrix<Real>& h, Arena& arena) {
  const int64_t n = f.size();
  const Matrix<Real> root = allocate_matrix<Real>(arena, n, n);
  fill_zero(root);
  for (int64_t i = 0; i < n; ++i) root.row(i)[i] = 1;
  // Columns right of a block are zero in its rows, so each block row stops at its own end.
  const Matrix<Real> work = allocate_matrix<Real>(arena, kBlock, n);
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    const Matrix<Real> rows = root.block(j, width, 0, j + width), rhs = work.block(0, width, 0, j + width);
    copy_rows(rhs, rows);
    if (j > 0) product<Into::kSubtract>(rhs.block(0, width, 0, j), j, operand(f.lower.rows_from(j, width)), root);
    product<Into::kSet>(rows, width, operand(f.inverse_block(j)), rhs);
  }
  // L⁻ᵀ L⁻¹: row i of the result meets only rows ≥ i of L⁻¹.
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    product<Into::kSet>(h.block(j, width, 0, j + width), n - j, transposed(root.block(j, n - j, j, width)),
                        root.rows_from(j, n - j));
  }
  mirror(h);
}

// L⁻¹ in full, zero above the diagonal.
template <class Real>
void invert_lower(const Factor<Real>& f, const Matrix<Real>& inverse, Arena& arena) {
  const int64_t n = f.size();
  const Matrix<Real> work = allocate_matrix<Real>(arena, kBlock, n);
  fill_zero(inverse);
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    copy_rows(inverse.block(j, width, j, width), f.inverse_block(j).block(0, width, 0, width));
    if (j == 0) continue;
    product<Into::kSet>(work.block(0, width, 0, j), j, operand(f.lower.rows_from(j, width)), inverse);
    const Matrix<Real> before = inverse.block(j, width, 0, j);
    product<Into::kSubtract>(before, width, operand(f.inverse_block(j)), work);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
