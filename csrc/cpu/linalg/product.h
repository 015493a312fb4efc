// Products of matrices, made of register tiles.
#pragma once

#include "cpu/linalg/matrix.h"
#include "cpu/linalg/prefetch.h"
#include "cpu/linalg/tile.h"

namespace fastkm::FASTKM_LEVEL {

// Widest tile. Its height, FASTKM_TILE_ROWS, divides a chunk and a block: 16 rows leave no small tiles over.
constexpr int64_t kTileVectors = 3;
template <class Real>
int64_t strips(int64_t columns) {
  return (columns + kTileVectors * kLanes<Real> - 1) / (kTileVectors * kLanes<Real>);
}

// Tiles two vectors and one vector wide: four rows of them are too few sums to hide how long each takes.
constexpr bool kLowTiles = FASTKM_TILE_ROWS < 6;
constexpr int kNarrowTileRows = kLowTiles ? 6 : FASTKM_TILE_ROWS, kThinTileRows = kLowTiles ? 8 : FASTKM_TILE_ROWS;

constexpr int tile_rows(int vectors) {
  return vectors == 1 ? kThinTileRows : vectors == 2 ? kNarrowTileRows : FASTKM_TILE_ROWS;
}

// How wide the next tiles are, with so many vectors of columns left.
inline int64_t tile_vectors(int64_t left) { return kLowTiles && left == 4 ? 2 : smaller(kTileVectors, left); }

template <Into INTO, int VECS, class Real>
void product_column(int64_t rows, int64_t k, const Operand<Real>& a, const Real* b, int64_t ldb, const Real* d,
                    int64_t ldd, Real* c, int64_t ldc, Prefetch* prefetch) {
  int64_t i = 0;
  const auto tiles = [&]<int ROWS>() {
    for (; i + ROWS <= rows; i += ROWS) {
      if (prefetch) prefetch->next_part();
      product_tile<INTO, ROWS, VECS>(k, a.data + i * a.row, a.row, a.column, b, ldb, d + i * ldd, ldd, c + i * ldc,
                                     ldc);
    }
  };
  tiles.template operator()<tile_rows(VECS)>();
  if constexpr (tile_rows(VECS) > 4) tiles.template operator()<4>();
  tiles.template operator()<2>();
  tiles.template operator()<1>();
}

// Longest run of a sum in registers: bounds the rounding of long sums, and a tile's share of B stays in the cache.
constexpr int64_t kSumRun = 128;

// A column of tiles.
struct Strip {
  int64_t first, vectors;
};

// The strip from column `j` on. Where rows are not padded, the last one ends with them, and computes again what it has
// in common with the one before; rows are then a vector long at least.
template <class Real>
Strip strip_at(int64_t j, int64_t columns, bool padded) {
  constexpr int64_t W = kLanes<Real>;
  const int64_t vectors = tile_vectors((columns - j + W - 1) / W);
  if (padded) return {j, vectors};
  const int64_t whole = smaller(vectors, columns / W);
  return {smaller(j, columns - whole * W), whole};
}

// One column of tiles of C = A B or D ± A B, `vectors` wide.
template <Into INTO, class Real>
void product_strip(int64_t rows, int64_t vectors, int64_t k, Operand<Real> a, const Real* b, int64_t ldb, const Real* d,
                   int64_t ldd, Real* c, int64_t ldc, Prefetch* prefetch) {
  const auto run = [&]<Into HOW>(int64_t first, const Real* from, int64_t ld_from) {
    const int64_t count = smaller(kSumRun, k - first);
    const Operand<Real> part{a.data + first * a.column, a.row, a.column};
    if (vectors == 3)
      product_column<HOW, 3>(rows, count, part, b + first * ldb, ldb, from, ld_from, c, ldc, prefetch);
    else if (vectors == 2)
      product_column<HOW, 2>(rows, count, part, b + first * ldb, ldb, from, ld_from, c, ldc, prefetch);
    else
      product_column<HOW, 1>(rows, count, part, b + first * ldb, ldb, from, ld_from, c, ldc, prefetch);
  };
  run.template operator()<INTO>(0, d, ldd);
  for (int64_t first = kSumRun; first < k; first += kSumRun)
    run.template operator()<INTO == Into::kSet ? Into::kAdd : INTO>(first, c, ldc);
}

// C = A B or D ± A B, where C and D are [rows, columns] and B is [k, columns]; where one of them is not padded, D is
// not C.
template <Into INTO, class Real>
void product(const Matrix<Real>& c, const Matrix<Real>& d, int64_t k, const Operand<Real>& a, const Matrix<Real>& b,
             Prefetch* prefetch = nullptr) {
  for (int64_t j = 0; j < c.columns;) {
    const auto [first, vectors] = strip_at<Real>(j, c.columns, b.padded && c.padded && d.padded);
    product_strip<INTO>(c.rows, vectors, k, a, b.data + first, b.ld, d.data + first, d.ld, c.data + first, c.ld,
                        prefetch);
    j = first + vectors * kLanes<Real>;
  }
}

// C (=, +=, −=) A B
template <Into INTO, class Real>
void product(const Matrix<Real>& c, int64_t k, const Operand<Real>& a, const Matrix<Real>& b,
             Prefetch* prefetch = nullptr) {
  product<INTO>(c, c, k, a, b, prefetch);
}

// The same for a square C of which only the lower triangle is wanted, in blocks of rows that end with the diagonal;
// what ends up above it is meaningless.
template <Into INTO, class Real>
void product_lower(const Matrix<Real>& c, const Matrix<Real>& d, int64_t k, const Operand<Real>& a,
                   const Matrix<Real>& b) {
  for (int64_t i = 0; i < c.rows; i += kBlock) {
    const int64_t count = smaller(kBlock, c.rows - i);
    const auto rows = [&](const Matrix<Real>& m) { return m.block(i, count, 0, i + count); };
    product<INTO>(rows(c), rows(d), k, Operand<Real>{a.data + i * a.row, a.row, a.column}, b);
  }
}
template <Into INTO, class Real>
void product_lower(const Matrix<Real>& c, int64_t k, const Operand<Real>& a, const Matrix<Real>& b) {
  product_lower<INTO>(c, c, k, a, b);
}

}  // namespace fastkm::FASTKM_LEVEL
