// Solves with Cholesky factors, and their inverses.
#pragma once

#include "cpu/linalg/cholesky.h"
#include "cpu/linalg/symmetric.h"

namespace fastkm::FASTKM_LEVEL {

// One column of tiles of X = L⁻¹ (D − A B), from the top: a tile meets those above it.
template <int VECS, class T>
void solve_strip(const Factor<T>& f, int64_t rows, int64_t k, const Left<T>& a, const T* b, int64_t ldb, const T* d,
                 int64_t ldd, T* x, int64_t ldx, Upcoming* upcoming) {
  int64_t i = 0;
  const auto tiles = [&]<int ROWS>() {
    for (; i + ROWS <= rows; i += ROWS) {
      if (upcoming) upcoming->fetch();
      Tile<ROWS, VECS, T> tile;
      tile.add_product(k, a.data + i * a.row, a.row, a.column, b, ldb);
      tile.add_product(i, f.lower.row(i), f.lower.ld, 1, x, ldx);
      tile.each([&](Vec<T>& sum, int64_t r, int64_t j)
                    __attribute__((always_inline)) { sum = load(d + (i + r) * ldd + j) - sum; });
      // The inverse of a small diagonal block of L is that of the large one there.
      tile.multiply_lower(f.inverse + i * kBlock + i, kBlock);
      tile.each([&](Vec<T>& y, int64_t r, int64_t j)
                    __attribute__((always_inline)) { store<T>(x + (i + r) * ldx + j, y); });
    }
  };
  tiles.template operator()<tile_rows(VECS)>();
  if constexpr (tile_rows(VECS) > 4) tiles.template operator()<4>();
  tiles.template operator()<2>();
  tiles.template operator()<1>();
}

// X = L⁻¹ (D − A B) for an L of one block; A is [rows, k], and X is not D.
template <class T>
void solve(const Matrix<T>& x, const Factor<T>& f, const Matrix<T>& d, int64_t k, const Left<T>& a, const Matrix<T>& b,
           Upcoming* upcoming = nullptr) {
  for (int64_t j = 0; j < x.columns;) {
    const auto [first, vectors] = strip_at<T>(j, x.columns, b.padded && d.padded && x.padded);
    const auto strip = [&]<int VECS>() {
      solve_strip<VECS>(f, x.rows, k, a, b.data + first, b.ld, d.data + first, d.ld, x.data + first, x.ld, upcoming);
    };
    if (vectors == 3)
      strip.template operator()<3>();
    else if (vectors == 2)
      strip.template operator()<2>();
    else
      strip.template operator()<1>();
    j = first + vectors * kLanes<T>;
  }
}

// X ← X (L Lᵀ)⁻¹ for rows of right-hand sides, X [m, n]; `lower_transposed` is Lᵀ [n, n].
template <class T>
void solve_rows(const Factor<T>& f, const Matrix<T>& lower_transposed, const Matrix<T>& x, const Matrix<T>& work) {
  const int64_t n = f.size();
  const auto set_aside = [&](int64_t j, int64_t width) {
    const Matrix<T> rhs{work.data, x.rows, width, work.ld};
    copy_rows(rhs, x.block(0, x.rows, j, width));
    return rhs;
  };
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    const Matrix<T> rhs = set_aside(j, width);
    if (j > 0) product<Into::kSubtract>(rhs, j, left(x), lower_transposed.block(0, j, j, width));
    product<Into::kSet>(x.block(0, x.rows, j, width), width, left(rhs), f.inverse_transposed_block(j));
  }
  for (int64_t j = (n - 1) / kBlock * kBlock; j >= 0 && n > 0; j -= kBlock) {
    const int64_t width = smaller(kBlock, n - j), after = j + width;
    const Matrix<T> rhs = set_aside(j, width);
    if (after < n)
      product<Into::kSubtract>(rhs, n - after, Left<T>{x.data + after, x.ld, 1},
                               f.lower.block(after, n - after, j, width));
    product<Into::kSet>(x.block(0, x.rows, j, width), width, left(rhs), f.inverse_block(j));
  }
}

// H = (L Lᵀ)⁻¹ in full.
template <class T>
void invert(const Factor<T>& f, const Matrix<T>& h, Arena& arena) {
  const int64_t n = f.size();
  const Matrix<T> root = take_matrix<T>(arena, n, n);
  fill_zero(root);
  for (int64_t i = 0; i < n; ++i) root.row(i)[i] = 1;
  // Columns right of a block are zero in its rows, so each block row stops at its own end.
  const Matrix<T> work = take_matrix<T>(arena, kBlock, n);
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    const Matrix<T> rows = root.block(j, width, 0, j + width), rhs = work.block(0, width, 0, j + width);
    copy_rows(rhs, rows);
    if (j > 0) product<Into::kSubtract>(rhs.block(0, width, 0, j), j, left(f.lower.rows_from(j, width)), root);
    product<Into::kSet>(rows, width, left(f.inverse_block(j)), rhs);
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
template <class T>
void invert_lower(const Factor<T>& f, const Matrix<T>& inverse, Arena& arena) {
  const int64_t n = f.size();
  const Matrix<T> work = take_matrix<T>(arena, kBlock, n);
  fill_zero(inverse);
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    copy_rows(inverse.block(j, width, j, width), f.inverse_block(j).block(0, width, 0, width));
    if (j == 0) continue;
    product<Into::kSet>(work.block(0, width, 0, j), j, left(f.lower.rows_from(j, width)), inverse);
    const Matrix<T> before = inverse.block(j, width, 0, j);
    product<Into::kSubtract>(before, width, left(f.inverse_block(j)), work);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
