// Products of matrices, made of register tiles.
//
// Columns of the result are cut into strips as wide as a tile. A strip goes down the rows tile by tile, so its share of
// B stays in the first-level cache. Every call has the destination first: product<INTO>(c, k, a, b).
#pragma once

#include "cpu/linalg/matrix.h"
#include "cpu/linalg/prefetch.h"
#include "cpu/linalg/tile.h"

namespace fastkm::FASTKM_LEVEL {

// Width of the widest tile, in vector registers. Its height is FASTKM_TILE_ROWS, which divides the 16 rows of a chunk
// and of a block, so these leave no rows for smaller tiles.
constexpr int64_t kTileVectors = 3;
template <class Real>
int64_t strips(int64_t columns) {
  return (columns + kTileVectors * kLanes<Real> - 1) / (kTileVectors * kLanes<Real>);
}

// Heights of tiles that are two and one vector registers wide. If the widest tile has four rows, these have more: four
// rows of them are too few independent sums to hide the latency of a multiply-add.
constexpr bool kLowTiles = FASTKM_TILE_ROWS < 6;
constexpr int kNarrowTileRows = kLowTiles ? 6 : FASTKM_TILE_ROWS, kThinTileRows = kLowTiles ? 8 : FASTKM_TILE_ROWS;

constexpr int tile_rows(int vectors) {
  return vectors == 1 ? kThinTileRows : vectors == 2 ? kNarrowTileRows : FASTKM_TILE_ROWS;
}

// Width of the next strip if `remaining` vector registers of columns remain.
inline int64_t tile_vectors(int64_t remaining) {
  return kLowTiles && remaining == 4 ? 2 : smaller(kTileVectors, remaining);
}

// Tiles of ROWS rows, from row `i` on, as long as they fit.
template <Into INTO, int ROWS, int VECS, class Real>
[[gnu::always_inline]] inline void product_tiles(int64_t& i, Rows<Real> c, Rows<const Real> d, int64_t rows, int64_t k,
                                                 const Operand<Real>& a, Rows<const Real> b, Prefetch* prefetch) {
  for (; i + ROWS <= rows; i += ROWS) {
    if (prefetch) prefetch->next_part();
    product_tile<INTO, ROWS, VECS>(c.from(i), d.from(i), k, a.rows_from(i), b);
  }
}

template <Into INTO, int VECS, class Real>
[[gnu::always_inline]] inline void product_column_inline(Rows<Real> c, Rows<const Real> d, int64_t rows, int64_t k,
                                                         const Operand<Real>& a, Rows<const Real> b,
                                                         Prefetch* prefetch) {
  int64_t i = 0;
  product_tiles<INTO, tile_rows(VECS), VECS>(i, c, d, rows, k, a, b, prefetch);
  if constexpr (tile_rows(VECS) > 4) product_tiles<INTO, 4, VECS>(i, c, d, rows, k, a, b, prefetch);
  product_tiles<INTO, 2, VECS>(i, c, d, rows, k, a, b, prefetch);
  product_tiles<INTO, 1, VECS>(i, c, d, rows, k, a, b, prefetch);
}

// Whether a column is inlined was measured. At AVX2, inlining makes the backward of a read faster, but the divergence,
// which subtracts, slower; at AVX-512 it makes the backward of an update slower. benchmarks/kernels times
// single kernels.
template <Into INTO, int VECS, class Real>
[[gnu::noinline]] void product_column_called(Rows<Real> c, Rows<const Real> d, int64_t rows, int64_t k,
                                             const Operand<Real>& a, Rows<const Real> b, Prefetch* prefetch) {
  product_column_inline<INTO, VECS>(c, d, rows, k, a, b, prefetch);
}
template <Into INTO, int VECS, class Real>
[[gnu::always_inline]] inline void product_column(Rows<Real> c, Rows<const Real> d, int64_t rows, int64_t k,
                                                  const Operand<Real>& a, Rows<const Real> b, Prefetch* prefetch) {
  if constexpr (kLowTiles && INTO != Into::kSubtract)
    product_column_inline<INTO, VECS>(c, d, rows, k, a, b, prefetch);
  else
    product_column_called<INTO, VECS>(c, d, rows, k, a, b, prefetch);
}

// Longest sum in registers. Longer ones are added up from parts: that bounds their rounding, and the rows of B that one
// part reads stay in the cache.
constexpr int64_t kSumRun = 128;

// A strip of columns: its first column, and its width in vector registers.
struct Strip {
  int64_t first, vectors;
};

// The strip from column `j` on. If rows are not padded, the last strip ends with the last column and overlaps the one
// before it; rows are then at least a vector register long.
template <class Real>
Strip strip_at(int64_t j, int64_t columns, bool padded) {
  constexpr int64_t W = kLanes<Real>;
  const int64_t vectors = tile_vectors((columns - j + W - 1) / W);
  if (padded) return {j, vectors};
  const int64_t whole = smaller(vectors, columns / W);
  return {smaller(j, columns - whole * W), whole};
}

// One strip of C = A B or D ± A B, for at most kSumRun columns of A.
template <Into INTO, class Real>
[[gnu::always_inline]] inline void product_run(Rows<Real> c, Rows<const Real> d, int64_t rows, int64_t vectors,
                                               int64_t k, const Operand<Real>& a, Rows<const Real> b,
                                               Prefetch* prefetch) {
  if (vectors == 3)
    product_column<INTO, 3>(c, d, rows, k, a, b, prefetch);
  else if (vectors == 2)
    product_column<INTO, 2>(c, d, rows, k, a, b, prefetch);
  else
    product_column<INTO, 1>(c, d, rows, k, a, b, prefetch);
}

// One strip of C = A B or D ± A B.
template <Into INTO, class Real>
void product_strip(Rows<Real> c, Rows<const Real> d, int64_t rows, int64_t vectors, int64_t k, Operand<Real> a,
                   Rows<const Real> b, Prefetch* prefetch) {
  product_run<INTO, Real>(c, d, rows, vectors, smaller(kSumRun, k), a, b, prefetch);
  for (int64_t first = kSumRun; first < k; first += kSumRun)
    product_run<INTO == Into::kSet ? Into::kAdd : INTO, Real>(c, c, rows, vectors, smaller(kSumRun, k - first),
                                                              a.columns_from(first), b.from(first), prefetch);
}

// C = A B or D ± A B, where C and D are [rows, columns] and B is [k, columns]. If one of them is not padded, D is not
// C.
template <Into INTO, class Real>
void product(const Matrix<Real>& c, const Matrix<Real>& d, int64_t k, const Operand<Real>& a, const Matrix<Real>& b,
             Prefetch* prefetch = nullptr) {
  for (int64_t j = 0; j < c.columns;) {
    const auto [first, vectors] = strip_at<Real>(j, c.columns, b.padded && c.padded && d.padded);
    product_strip<INTO, Real>(c.columns_from(first), d.columns_from(first), c.rows, vectors, k, a,
                              b.columns_from(first), prefetch);
    j = first + vectors * kLanes<Real>;
  }
}

// C (=, +=, −=) A B
template <Into INTO, class Real>
void product(const Matrix<Real>& c, int64_t k, const Operand<Real>& a, const Matrix<Real>& b,
             Prefetch* prefetch = nullptr) {
  product<INTO>(c, c, k, a, b, prefetch);
}

// The lower triangle of a square C, in blocks of rows that end with the diagonal. Entries above the diagonal are
// meaningless.
template <Into INTO, class Real>
void product_lower(const Matrix<Real>& c, const Matrix<Real>& d, int64_t k, const Operand<Real>& a,
                   const Matrix<Real>& b) {
  for (int64_t i = 0; i < c.rows; i += kBlock) {
    const int64_t count = smaller(kBlock, c.rows - i);
    const auto rows = [&](const Matrix<Real>& m) { return m.block(i, count, 0, i + count); };
    product<INTO>(rows(c), rows(d), k, a.rows_from(i), b);
  }
}
template <Into INTO, class Real>
void product_lower(const Matrix<Real>& c, int64_t k, const Operand<Real>& a, const Matrix<Real>& b) {
  product_lower<INTO>(c, c, k, a, b);
}

}  // namespace fastkm::FASTKM_LEVEL
