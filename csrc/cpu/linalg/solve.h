// Solves with Cholesky factors, and their inverses.
#pragma once

#include "cpu/linalg/cholesky.h"
#include "cpu/linalg/symmetric.h"

namespace fastkm::FASTKM_LEVEL {

// Tiles of ROWS rows of one block, from row `i` to row `end`, as long as they fit. The diagonal blocks of L⁻¹ are the
// inverses of those of L, of whatever size, so a tile reads its own from the inverse of the whole block.
template <int ROWS, int VECS, class Real>
[[gnu::always_inline]] inline void solve_lower_tiles(int64_t& i, int64_t end, Rows<Real> x, Rows<const Real> d,
                                                     const Factor<Real>& f, int64_t k, const Operand<Real>& a,
                                                     Rows<const Real> b, Prefetch* prefetch) {
  for (; i + ROWS <= end; i += ROWS) {
    if (prefetch) prefetch->next_part();
    Tile<ROWS, VECS, Real> tile;
    tile.add_product(k, a.rows_from(i), b);
    tile.add_product(i, operand(f.lower).rows_from(i), x);
    tile.each([&](Vec<Real>& sum, int64_t r, int64_t j)
                  __attribute__((always_inline)) { sum = load(d.data + (i + r) * d.ld + j) - sum; });
    tile.multiply_lower(f.inverse + i * kBlock + i % kBlock, kBlock);
    tile.each([&](Vec<Real>& y, int64_t r, int64_t j)
                  __attribute__((always_inline)) { store<Real>(x.data + (i + r) * x.ld + j, y); });
  }
}

// One strip of X = L⁻¹ (D − A B), from the top: a tile needs the solved rows above it.
template <int VECS, class Real>
void solve_lower_strip(Rows<Real> x, Rows<const Real> d, const Factor<Real>& f, int64_t k, const Operand<Real>& a,
                       Rows<const Real> b, Prefetch* prefetch) {
  for (int64_t i = 0; i < f.size();) {
    const int64_t end = smaller(i + kBlock, f.size());
    solve_lower_tiles<tile_rows(VECS), VECS>(i, end, x, d, f, k, a, b, prefetch);
    if constexpr (tile_rows(VECS) > 4) solve_lower_tiles<4, VECS>(i, end, x, d, f, k, a, b, prefetch);
    solve_lower_tiles<2, VECS>(i, end, x, d, f, k, a, b, prefetch);
    solve_lower_tiles<1, VECS>(i, end, x, d, f, k, a, b, prefetch);
  }
}

// X = L⁻¹ (D − A B). A is [rows, k], and X is not D.
template <class Real>
void solve_lower(const Matrix<Real>& x, const Factor<Real>& f, const Matrix<Real>& d, int64_t k, const Operand<Real>& a,
                 const Matrix<Real>& b, Prefetch* prefetch = nullptr) {
  const Team* team = team_for(x.rows * x.columns * (k + x.rows / 2), kSharedProduct);
  if (team) prefetch = nullptr;  // it belongs to one thread
  share(team, column_groups<Real>(x.columns), [=](int64_t begin, int64_t end) __attribute__((always_inline)) {
    each_strip<Real>(x.columns, b.padded && d.padded && x.padded, begin, end,
                     [=](int64_t first, int64_t vectors) __attribute__((always_inline)) {
                       const Rows<Real> out = x.columns_from(first), from = d.columns_from(first),
                                        other = b.columns_from(first);
                       if (vectors == 3)
                         solve_lower_strip<3, Real>(out, from, f, k, a, other, prefetch);
                       else if (vectors == 2)
                         solve_lower_strip<2, Real>(out, from, f, k, a, other, prefetch);
                       else
                         solve_lower_strip<1, Real>(out, from, f, k, a, other, prefetch);
                     });
  });
}

// X ← X (L Lᵀ)⁻¹ for rows X [m, n] of right-hand sides. `lower_transposed` is Lᵀ [n, n], `work` is [m, kBlock].
template <class Real>
void solve_cholesky(const Factor<Real>& f, const Matrix<Real>& lower_transposed, const Matrix<Real>& x,
                    const Matrix<Real>& work) {
  const int64_t n = f.size();
  const auto copy_block = [&](int64_t j, int64_t width) {
    const Matrix<Real> rhs{work.data, x.rows, width, work.ld};
    copy_rows(rhs, x.block(0, x.rows, j, width));
    return rhs;
  };
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    const Matrix<Real> rhs = copy_block(j, width);
    if (j > 0) product<Into::kSubtract>(rhs, j, operand(x), lower_transposed.block(0, j, j, width));
    product<Into::kSet>(x.block(0, x.rows, j, width), width, operand(rhs), f.inverse_transposed_block(j));
  }
  for (int64_t j = (n - 1) / kBlock * kBlock; j >= 0 && n > 0; j -= kBlock) {
    const int64_t width = smaller(kBlock, n - j), after = j + width;
    const Matrix<Real> rhs = copy_block(j, width);
    if (after < n)
      product<Into::kSubtract>(rhs, n - after, Operand<Real>{x.data + after, x.ld, 1},
                               f.lower.block(after, n - after, j, width));
    product<Into::kSet>(x.block(0, x.rows, j, width), width, operand(rhs), f.inverse_block(j));
  }
}

// H = (L Lᵀ)⁻¹, both triangles.
template <class Real>
void invert_cholesky(const Factor<Real>& f, const Matrix<Real>& h, Arena& arena) {
  const int64_t n = f.size();
  const Matrix<Real> lower_inverse = allocate_matrix<Real>(arena, n, n);
  fill_zero(lower_inverse);
  for (int64_t i = 0; i < n; ++i) lower_inverse.row(i)[i] = 1;
  // L⁻¹ is zero right of its diagonal, so a block row ends with its diagonal block.
  const Matrix<Real> work = allocate_matrix<Real>(arena, kBlock, n);
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    const Matrix<Real> rows = lower_inverse.block(j, width, 0, j + width), rhs = work.block(0, width, 0, j + width);
    copy_rows(rhs, rows);
    if (j > 0)
      product<Into::kSubtract>(rhs.block(0, width, 0, j), j, operand(f.lower.rows_from(j, width)), lower_inverse);
    product<Into::kSet>(rows, width, operand(f.inverse_block(j)), rhs);
  }
  // H = L⁻ᵀ L⁻¹: row i of H needs only rows ≥ i of L⁻¹.
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    product<Into::kSet>(h.block(j, width, 0, j + width), n - j, transposed(lower_inverse.block(j, n - j, j, width)),
                        lower_inverse.rows_from(j, n - j));
  }
  mirror(h);
}

// L⁻¹, with zeros above the diagonal.
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
