// Products of matrices, made of register tiles.
//
// Columns of the result are cut into strips as wide as a tile. A strip goes down the rows tile by tile, so its share of
// B stays in the first-level cache. Every call has the destination first: product<INTO>(c, k, a, b).
#pragma once

#include "cpu/linalg/matrix.h"
#include "cpu/linalg/prefetch.h"
#include "cpu/linalg/tile.h"
#include "cpu/linalg/transpose.h"

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

// Width of the next strip if `remaining` vector registers of columns remain. Four are two and two: a tile that is one
// vector wide loads nearly as many numbers of A as it does multiply-adds.
inline int64_t tile_vectors(int64_t remaining) { return remaining == 4 ? 2 : smaller(kTileVectors, remaining); }

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
[[gnu::always_inline]] inline void product_strip(Rows<Real> c, Rows<const Real> d, int64_t rows, int64_t vectors,
                                                 int64_t k, Operand<Real> a, Rows<const Real> b, Prefetch* prefetch) {
  product_run<INTO, Real>(c, d, rows, vectors, smaller(kSumRun, k), a, b, prefetch);
  for (int64_t first = kSumRun; first < k; first += kSumRun)
    product_run<INTO == Into::kSet ? Into::kAdd : INTO, Real>(c, c, rows, vectors, smaller(kSumRun, k - first),
                                                              a.columns_from(first), b.from(first), prefetch);
}

// How many groups columns are shared in; each is as wide as the widest tile. The last one has the rest, and at least
// two strips, because the last strip of rows that are not padded may overlap the one before it.
template <class Real>
int64_t column_groups(int64_t columns) {
  const int64_t vectors = (columns + kLanes<Real> - 1) / kLanes<Real>;
  return vectors <= 2 * kTileVectors ? 1 : (vectors - 1) / kTileVectors;
}

// Call f(first, vectors) for the strips of groups [begin, end).
template <class Real, class F>
[[gnu::always_inline]] inline void each_strip(int64_t columns, bool padded, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kGroup = kTileVectors * kLanes<Real>;
  const int64_t stop = end == column_groups<Real>(columns) ? columns : end * kGroup;
  for (int64_t j = begin * kGroup; j < stop;) {
    const auto [first, vectors] = strip_at<Real>(j, columns, padded);
    f(first, vectors);
    j = first + vectors * kLanes<Real>;
  }
}

// B rows [0, count) of one strip, copied so that they are contiguous. The rows of a large matrix lie on pages of their
// own, and those of many sizes map to the same sets of the cache.
template <class Real>
struct PackedStrip {
  alignas(64) Real entry[kSumRun * kTileVectors * kLanes<Real>];

  Rows<const Real> load_from(Rows<const Real> b, int64_t count, int64_t vectors) {
    const int64_t width = vectors * kLanes<Real>;
    for (int64_t p = 0; p < count; ++p)
      for (int64_t j = 0; j < width; j += kLanes<Real>) store<Real>(entry + p * width + j, load(b.data + p * b.ld + j));
    return {entry, width};
  }
};

// Rows of A, copied in panels of kBlock rows, each column by column. Tiles then read A in its order; rows of a large
// matrix, or columns of a transposed one, lie on pages of their own and map to the same sets of the cache.
template <class Real>
struct PackedRows {
  Real* data;
  int64_t k;

  static constexpr int64_t panels(int64_t rows) { return (rows + kBlock - 1) / kBlock; }
  Operand<Real> panel(int64_t i) const { return {data + i * kBlock * k, 1, kBlock}; }

  // Copy a panel of `rows` rows of A in.
  void load_panel(int64_t i, int64_t rows, const Operand<Real>& a) const {
    const Operand<Real> from = a.rows_from(i * kBlock);
    Real* const to = data + i * kBlock * k;
    if (from.column == 1) return transpose(k, rows, to, kBlock, from.data, from.row);
    for (int64_t p = 0; p < k; ++p)
      for (int64_t row = 0; row < rows; ++row) to[p * kBlock + row] = from.data[row * from.row + p * from.column];
  }
};

// Request the rows that a panel of a product will add to.
template <class Real>
void prefetch_strip(Rows<const Real> d, int64_t rows, int64_t vectors) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < vectors; ++j) __builtin_prefetch(d.data + i * d.ld + j * kLanes<Real>, 0, 3);
}

// product_strip for many rows, or for a B that does not fit the cache. Row 0 of C is the first of a panel of A.
template <Into INTO, class Real>
[[gnu::noinline]] void packed_product_strip(Rows<Real> c, Rows<const Real> d, int64_t rows, int64_t vectors,
                                            const PackedRows<Real>& a, int64_t first_panel, Rows<const Real> b) {
  PackedStrip<Real> packed;
  const auto run = [&]<Into OF_RUN>(Rows<const Real> from, int64_t first, int64_t count) {
    const Rows<const Real> here = packed.load_from(b.from(first), count, vectors);
    for (int64_t i = 0; i < rows; i += kBlock) {
      const int64_t height = smaller(kBlock, rows - i);
      if constexpr (OF_RUN != Into::kSet) prefetch_strip(from.from(i), height, vectors);
      product_run<OF_RUN, Real>(c.from(i), from.from(i), height, vectors, count,
                                a.panel(first_panel + i / kBlock).columns_from(first), here, nullptr);
    }
  };
  run.template operator()<INTO>(d, 0, smaller(kSumRun, a.k));
  for (int64_t first = kSumRun; first < a.k; first += kSumRun)
    run.template operator()<INTO == Into::kSet ? Into::kAdd : INTO>(c, first, smaller(kSumRun, a.k - first));
}

// All rows of A, shared by the threads of a team.
template <class Real>
PackedRows<Real> pack_rows(const Team* team, int64_t rows, int64_t k, const Operand<Real>& a, Arena& arena) {
  const int64_t panels = PackedRows<Real>::panels(rows);
  const PackedRows<Real> packed{arena.allocate<Real>(panels * kBlock * k), k};
  share(team, panels, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) packed.load_panel(i, smaller(kBlock, rows - i * kBlock), a);
  });
  return packed;
}

// Products of fewer multiply-adds go strip by strip, and those of fewer than kSharedProduct are not shared: waking a
// thread takes as long as a million of them.
constexpr int64_t kLargeProduct = 1 << 20, kSharedProduct = 1 << 22;

// A product that takes so few steps for each entry that it is bound by the bytes of C goes through C a few rows at a
// time, and B stays in the cache. Others go strip by strip, and pack A and B if it pays.
template <Into INTO, class Real>
[[gnu::noinline]] void large_product(const Matrix<Real>& c, const Matrix<Real>& d, int64_t k, const Operand<Real>& a,
                                     const Matrix<Real>& b) {
  constexpr int64_t kManyBytes = 1 << 20, kManyRows = 48, kFewRows = 16;
  const auto bytes = [](int64_t rows, int64_t columns) { return rows * columns * static_cast<int64_t>(sizeof(Real)); };
  const bool padded = b.padded && c.padded && d.padded;
  const bool by_rows = k <= kSumRun && bytes(c.rows, c.columns) > kManyBytes;
  const bool packs = k > kSumRun && c.rows >= (bytes(k, c.columns) > kManyBytes ? kFewRows : kManyRows);
  const Team* team = team_for(c.rows * c.columns * k, kSharedProduct);
  Arena& arena = Arena::of_thread();
  const Arena::Mark mark = arena.mark();
  const PackedRows<Real> rows_of_a = packs ? pack_rows(team, c.rows, k, a, arena) : PackedRows<Real>{};
  const auto compute = [&](int64_t first_row, int64_t rows, int64_t begin, int64_t end, const Operand<Real>& left) {
    each_strip<Real>(c.columns, padded, begin, end, [&](int64_t first, int64_t vectors) {
      const Rows<Real> to = c.columns_from(first).from(first_row), from = d.columns_from(first).from(first_row);
      if (packs)
        packed_product_strip<INTO, Real>(to, from, rows, vectors, rows_of_a, first_row / kBlock, b.columns_from(first));
      else
        product_strip<INTO, Real>(to, from, rows, vectors, k, left, b.columns_from(first), nullptr);
    });
  };
  const int64_t groups = column_groups<Real>(c.columns);
  if (!by_rows && (!team || groups >= 2 * team->threads))
    share(team, groups, [&](int64_t begin, int64_t end) { compute(0, c.rows, begin, end, a); });
  else
    share(team, PackedRows<Real>::panels(c.rows), [&](int64_t begin, int64_t end) {
      if (!by_rows)
        return compute(begin * kBlock, smaller(end * kBlock, c.rows) - begin * kBlock, 0, groups,
                       a.rows_from(begin * kBlock));
      alignas(64) Real panel[kBlock * kSumRun];
      for (int64_t i = begin; i < end; ++i) {
        const PackedRows<Real> packed{panel, k};
        const int64_t rows = smaller(kBlock, c.rows - i * kBlock);
        packed.load_panel(0, rows, a.rows_from(i * kBlock));
        compute(i * kBlock, rows, 0, groups, packed.panel(0));
      }
    });
  arena.release(mark);
}

// C = A B or D ± A B, where C and D are [rows, columns] and B is [k, columns]. If one of them is not padded, D is not
// C. A large product does not prefetch.
template <Into INTO, class Real>
void product(const Matrix<Real>& c, const Matrix<Real>& d, int64_t k, const Operand<Real>& a, const Matrix<Real>& b,
             Prefetch* prefetch = nullptr) {
  if (c.rows * c.columns * k >= kLargeProduct && (!prefetch || prefetch->is_empty() || current_team()))
    return large_product<INTO>(c, d, k, a, b);
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

// A block of rows of product_lower, which ends with the diagonal.
template <Into INTO, class Real>
void product_lower_block(const Matrix<Real>& c, const Matrix<Real>& d, int64_t k, const Operand<Real>& a,
                         const Matrix<Real>& b, int64_t i) {
  const int64_t count = smaller(kBlock, c.rows - i);
  const auto rows = [&](const Matrix<Real>& m) { return m.block(i, count, 0, i + count); };
  product<INTO>(rows(c), rows(d), k, a.rows_from(i), b);
}

// A short sum goes through C in blocks of rows. A long one goes strip by strip, from the rows of the diagonal on, so
// that a strip of B is read once.
template <Into INTO, class Real>
[[gnu::noinline]] void large_product_lower(const Matrix<Real>& c, const Matrix<Real>& d, int64_t k,
                                           const Operand<Real>& a, const Matrix<Real>& b) {
  constexpr int64_t kRowsInStrips = 256;  // with fewer, too much of the work would lie above the diagonal
  const Team* team = team_for(c.rows * c.rows * k / 2, kSharedProduct);
  if (k <= kSumRun || c.rows < kRowsInStrips)
    return share_triangle(team, (c.rows + kBlock - 1) / kBlock,
                          [&](int64_t block) { product_lower_block<INTO>(c, d, k, a, b, block * kBlock); });
  const bool padded = b.padded && c.padded && d.padded;
  Arena& arena = Arena::of_thread();
  const Arena::Mark mark = arena.mark();
  const PackedRows<Real> rows_of_a = pack_rows(team, c.rows, k, a, arena);
  share_triangle(team, column_groups<Real>(c.columns), [&](int64_t group) {
    each_strip<Real>(c.columns, padded, group, group + 1, [&](int64_t first, int64_t vectors) {
      const int64_t i = first / kBlock * kBlock;
      packed_product_strip<INTO, Real>(c.columns_from(first).from(i), d.columns_from(first).from(i), c.rows - i,
                                       vectors, rows_of_a, i / kBlock, b.columns_from(first));
    });
  });
  arena.release(mark);
}

// The lower triangle of a square C. Entries above the diagonal are meaningless.
template <Into INTO, class Real>
void product_lower(const Matrix<Real>& c, const Matrix<Real>& d, int64_t k, const Operand<Real>& a,
                   const Matrix<Real>& b) {
  if (c.rows * c.rows * k / 2 >= kLargeProduct) return large_product_lower<INTO>(c, d, k, a, b);
  for (int64_t i = 0; i < c.rows; i += kBlock) product_lower_block<INTO>(c, d, k, a, b, i);
}
template <Into INTO, class Real>
void product_lower(const Matrix<Real>& c, int64_t k, const Operand<Real>& a, const Matrix<Real>& b) {
  product_lower<INTO>(c, c, k, a, b);
}

}  // namespace fastkm::FASTKM_LEVEL
