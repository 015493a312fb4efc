// Dense linear algebra on matrices in working memory: products, Cholesky factors, triangular solves.
//
// Rows are padded to whole vectors and padding takes part in every product, so no loop has a tail: what stands in the
// padding of an output is meaningless, and no output column depends on another column's padding. Only the caller's own
// rows are not padded.
#pragma once

#include <cmath>

#include "cpu/linalg/arena.h"
#include "kernel_args.h"
#include "cpu/linalg/simd.h"

namespace fastkm::FASTKM_LEVEL {

// Rows in one diagonal block of a factor: big enough that products do the work, small enough to invert in registers.
constexpr int64_t kBlock = 16;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Rows a multiple of 512 bytes apart: a column of tiles falls into an eighth of the first-level cache.
template <class T>
inline bool falls_together(int64_t ld) {
  return ld * static_cast<int64_t>(sizeof(T)) % 512 == 0;
}

// Elements from one row to the next.
template <class T>
inline int64_t row_stride(int64_t columns) {
  const int64_t padded = round_up(columns, kBlock);
  return falls_together<T>(padded) ? padded + kBlock : padded;
}

template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, ld;
  bool padded = true;

  T* row(int64_t i) const { return data + i * ld; }
  Matrix block(int64_t first_row, int64_t count, int64_t first_column, int64_t width) const {
    return {row(first_row) + first_column, count, width, ld, padded};
  }
  Matrix rows_from(int64_t first, int64_t count) const { return block(first, count, 0, columns); }
};

// The left factor of a product: strided, so that a transpose is a view.
template <class T>
struct Left {
  const T* data;
  int64_t row, column;
};
template <class T>
Left<T> left(const Matrix<T>& m) {
  return {m.data, m.ld, 1};
}
template <class T>
Left<T> transposed(const Matrix<T>& m) {
  return {m.data, 1, m.ld};
}

template <class T>
Matrix<T> take_matrix(Arena& arena, int64_t rows, int64_t columns) {
  const int64_t ld = row_stride<T>(columns);
  return {arena.take<T>(rows * ld), rows, columns, ld};
}

// ---- moving between the caller's memory and working memory -------------------------------------------------------

template <class T>
void fill_zero(const Matrix<T>& m) {
  for (int64_t i = 0; i < m.rows; ++i) __builtin_memset(m.row(i), 0, static_cast<size_t>(m.ld) * sizeof(T));
}

// Up to a whole vector.
template <class T>
void clear_padding(const Matrix<T>& m) {
  constexpr int64_t W = kLanes<T>;
  const int64_t whole = m.columns / W * W;
  if (whole == m.columns) return;
  const auto inside = lane_numbers<T>() < static_cast<LaneNumber<T>>(m.columns - whole);
  for (int64_t i = 0; i < m.rows; ++i) {
    T* at = m.row(i) + whole;
    store<T>(at, inside ? load(at) : Vec<T>{});
  }
}

// For products that end with the columns and leave the padding: what happens to stand in it can be denormal, on which
// processors are slow.
template <class T>
Matrix<T> take_cleared(Arena& arena, int64_t rows, int64_t columns) {
  const Matrix<T> m = take_matrix<T>(arena, rows, columns);
  clear_padding(m);
  return m;
}

// Copy in, with the padding set to zero.
template <class T>
void load_matrix(const Matrix<T>& to, const Batch<const T>& from, int64_t b) {
  for (int64_t i = 0; i < to.rows; ++i) {
    const T* source = from.at(b, i);
    T* target = to.row(i);
    if (from.stride[2] == 1) {
      __builtin_memcpy(target, source, static_cast<size_t>(to.columns) * sizeof(T));
    } else {
      for (int64_t j = 0; j < to.columns; ++j) target[j] = source[j * from.stride[2]];
    }
    for (int64_t j = to.columns; j < to.ld; ++j) target[j] = 0;
  }
}

// What was computed in the caller's own rows is there already.
template <class T>
void store_matrix(const Batch<T>& to, int64_t b, const Matrix<T>& from) {
  if (from.data == to.at(b)) return;
  for (int64_t i = 0; i < from.rows; ++i)
    __builtin_memcpy(to.at(b, i), from.row(i), static_cast<size_t>(from.columns) * sizeof(T));
}

// The caller's own rows, where products do well with them as they are; else `work`, of the same size.
template <class T>
Matrix<T> own_rows(const Batch<T>& of, int64_t b, const Matrix<T>& work) {
  constexpr int64_t kFewBytes = 1 << 16;  // rows that fall together do no harm in a matrix that nearly fits the cache
  const bool few = work.rows * of.stride[1] * static_cast<int64_t>(sizeof(T)) <= kFewBytes;
  if (of.stride[2] != 1 || work.columns < kLanes<T> || (falls_together<T>(of.stride[1]) && !few)) return work;
  return {of.at(b), work.rows, work.columns, of.stride[1], false};
}

// A matrix of the caller's, only to be read: its own rows, else a copy in `work`.
template <class T>
Matrix<T> rows_of(const Batch<const T>& from, int64_t b, const Matrix<T>& work) {
  const Batch<T> readable{const_cast<T*>(from.data), {from.stride[0], from.stride[1], from.stride[2]}};
  const Matrix<T> rows = own_rows(readable, b, work);
  if (rows.padded) load_matrix(work, from, b);
  return rows;
}

// Copy between two matrices of one width, padding included.
template <class T>
void copy_rows(const Matrix<T>& to, const Matrix<T>& from) {
  const int64_t width = smaller(smaller(to.ld, from.ld), round_up(from.columns, kBlock));
  for (int64_t i = 0; i < from.rows; ++i)
    for (int64_t j = 0; j < width; j += kLanes<T>) store<T>(to.row(i) + j, load(from.row(i) + j));
}

// to = fromᵀ [rows, columns], squares of whole vectors at a time. The last squares of a row or column overlap those
// before them; a matrix too small for one goes entry by entry.
template <class T>
void transpose(int64_t rows, int64_t columns, T* to, int64_t to_ld, const T* from, int64_t from_ld) {
  constexpr int64_t W = kLanes<T>;
  if (rows < W || columns < W) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[i * to_ld + j] = from[j * from_ld + i];
    return;
  }
  for (int64_t next_i = 0; next_i < rows; next_i += W) {
    const int64_t i = smaller(next_i, rows - W);
    for (int64_t next_j = 0; next_j < columns; next_j += W) {
      const int64_t j = smaller(next_j, columns - W);
      transpose_square(to + i * to_ld + j, to_ld, from + j * from_ld + i, from_ld);
    }
  }
}

// to = fromᵀ; the padding is set to zero.
template <class T>
void transpose(const Matrix<T>& to, const Matrix<T>& from) {
  transpose(to.rows, to.columns, to.data, to.ld, from.data, from.ld);
  for (int64_t i = 0; i < to.rows; ++i)
    for (int64_t j = to.columns; j < to.ld; ++j) to.row(i)[j] = 0;
}

// Copy the lower triangle onto the upper one.
template <class T>
void mirror(const Matrix<T>& m) {
  constexpr int64_t W = kLanes<T>;
  const int64_t whole = m.rows / W * W;
  alignas(64) T across[W * W];
  for (int64_t i = 0; i < whole; i += W) {
    transpose_square(across, W, m.row(i) + i, m.ld);
    for (int64_t row = 0; row < W; ++row) {
      T* at = m.row(i + row) + i;
      store<T>(at, lane_numbers<T>() > static_cast<LaneNumber<T>>(row) ? load(across + row * W) : load(at));
    }
    for (int64_t j = i + W; j < whole; j += W) transpose_square(m.row(i) + j, m.ld, m.row(j) + i, m.ld);
  }
  for (int64_t j = whole; j < m.rows; ++j)
    for (int64_t i = 0; i < j; ++i) m.row(i)[j] = m.row(j)[i];
}

// ---- memory wanted soon ------------------------------------------------------------------------------------------

// Fetched part by part, between the tiles of products, so that waiting for it and computing go on together: many
// fetches at once wait for one another, and computing for them. A store waits for its line as a load does.
class Upcoming {
 public:
  explicit Upcoming(int64_t parts) : parts_(parts) {}

  // Rows that lie apart are left to come when they are needed; there may be none.
  template <class T>
  void add(const Batch<T>& rows, int64_t b, int64_t first, int64_t count, int64_t columns) {
    if (!rows.data || rows.stride[2] != 1 || rows.stride[1] != columns) return;
    const char* begin = reinterpret_cast<const char*>(rows.at(b, first));
    const int64_t bytes = count * columns * static_cast<int64_t>(sizeof(T));
    regions_[count_++] = {begin, begin + bytes, bytes / parts_ + 1};
  }

  void fetch() {
    for (int i = 0; i < count_; ++i) {
      Region& r = regions_[i];
      const char* stop = r.end - r.at > r.part ? r.at + r.part : r.end;
      for (; r.at < stop; r.at += kLine) __builtin_prefetch(r.at, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Region {
    const char *at, *end;
    int64_t part;  // bytes
  };
  Region regions_[10];
  int count_ = 0;
  int64_t parts_;
};

// ---- products ----------------------------------------------------------------------------------------------------

// Widest tile. Its height, FASTKM_TILE_ROWS, divides a chunk and a block: 16 rows leave no small tiles over.
constexpr int64_t kTileVectors = 3;
template <class T>
int64_t strips(int64_t columns) {
  return (columns + kTileVectors * kLanes<T> - 1) / (kTileVectors * kLanes<T>);
}

// Tiles two vectors and one vector wide: four rows of them are too few sums to hide how long each takes.
constexpr bool kLowTiles = FASTKM_TILE_ROWS < 6;
constexpr int kNarrowTileRows = kLowTiles ? 6 : FASTKM_TILE_ROWS, kThinTileRows = kLowTiles ? 8 : FASTKM_TILE_ROWS;

constexpr int tile_rows(int vectors) {
  return vectors == 1 ? kThinTileRows : vectors == 2 ? kNarrowTileRows : FASTKM_TILE_ROWS;
}

// How wide the next tiles are, with so many vectors of columns left.
inline int64_t tile_vectors(int64_t left) { return kLowTiles && left == 4 ? 2 : smaller(kTileVectors, left); }

template <Into INTO, int VECS, class T>
void product_column(int64_t rows, int64_t k, const Left<T>& a, const T* b, int64_t ldb, const T* d, int64_t ldd, T* c,
                    int64_t ldc, Upcoming* upcoming) {
  int64_t i = 0;
  const auto tiles = [&]<int ROWS>() {
    for (; i + ROWS <= rows; i += ROWS) {
      if (upcoming) upcoming->fetch();
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
template <class T>
Strip strip_at(int64_t j, int64_t columns, bool padded) {
  constexpr int64_t W = kLanes<T>;
  const int64_t vectors = tile_vectors((columns - j + W - 1) / W);
  if (padded) return {j, vectors};
  const int64_t whole = smaller(vectors, columns / W);
  return {smaller(j, columns - whole * W), whole};
}

// One column of tiles of C = A B or D ± A B, `vectors` wide.
template <Into INTO, class T>
void product_strip(int64_t rows, int64_t vectors, int64_t k, Left<T> a, const T* b, int64_t ldb, const T* d,
                   int64_t ldd, T* c, int64_t ldc, Upcoming* upcoming) {
  const auto run = [&]<Into HOW>(int64_t first, const T* from, int64_t ld_from) {
    const int64_t count = smaller(kSumRun, k - first);
    const Left<T> part{a.data + first * a.column, a.row, a.column};
    if (vectors == 3)
      product_column<HOW, 3>(rows, count, part, b + first * ldb, ldb, from, ld_from, c, ldc, upcoming);
    else if (vectors == 2)
      product_column<HOW, 2>(rows, count, part, b + first * ldb, ldb, from, ld_from, c, ldc, upcoming);
    else
      product_column<HOW, 1>(rows, count, part, b + first * ldb, ldb, from, ld_from, c, ldc, upcoming);
  };
  run.template operator()<INTO>(0, d, ldd);
  for (int64_t first = kSumRun; first < k; first += kSumRun)
    run.template operator()<INTO == Into::kSet ? Into::kAdd : INTO>(first, c, ldc);
}

// C = A B or D ± A B, where C and D are [rows, columns] and B is [k, columns]; where one of them is not padded, D is
// not C.
template <Into INTO, class T>
void product(const Matrix<T>& c, const Matrix<T>& d, int64_t k, const Left<T>& a, const Matrix<T>& b,
             Upcoming* upcoming = nullptr) {
  for (int64_t j = 0; j < c.columns;) {
    const auto [first, vectors] = strip_at<T>(j, c.columns, b.padded && c.padded && d.padded);
    product_strip<INTO>(c.rows, vectors, k, a, b.data + first, b.ld, d.data + first, d.ld, c.data + first, c.ld,
                        upcoming);
    j = first + vectors * kLanes<T>;
  }
}

// C (=, +=, −=) A B
template <Into INTO, class T>
void product(const Matrix<T>& c, int64_t k, const Left<T>& a, const Matrix<T>& b, Upcoming* upcoming = nullptr) {
  product<INTO>(c, c, k, a, b, upcoming);
}

// The same for a square C of which only the lower triangle is wanted, in blocks of rows that end with the diagonal;
// what ends up above it is meaningless.
template <Into INTO, class T>
void product_lower(const Matrix<T>& c, const Matrix<T>& d, int64_t k, const Left<T>& a, const Matrix<T>& b) {
  for (int64_t i = 0; i < c.rows; i += kBlock) {
    const int64_t count = smaller(kBlock, c.rows - i);
    const auto rows = [&](const Matrix<T>& m) { return m.block(i, count, 0, i + count); };
    product<INTO>(rows(c), rows(d), k, Left<T>{a.data + i * a.row, a.row, a.column}, b);
  }
}
template <Into INTO, class T>
void product_lower(const Matrix<T>& c, int64_t k, const Left<T>& a, const Matrix<T>& b) {
  product_lower<INTO>(c, c, k, a, b);
}

// ---- vectors -----------------------------------------------------------------------------------------------------

template <class T>
T dot(int64_t n, const T* x, const T* y) {
  constexpr int64_t W = kLanes<T>;
  Vec<T> sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sum[0] += load(x + i) * load(y + i);
    sum[1] += load(x + i + W) * load(y + i + W);
  }
  T total = lane_sum<T>(sum[0] + sum[1]);
  for (; i < n; ++i) total += x[i] * y[i];
  return total;
}

// ‖row‖² of every row, padded to a whole vector of them.
template <class T>
void squared_norms(const Matrix<T>& m, T* norms) {
  constexpr int64_t W = kLanes<T>;
  const int64_t whole = m.columns / W * W;
  const auto inside = lane_numbers<T>() < static_cast<LaneNumber<T>>(m.columns - whole);
  for (int64_t i = 0; i < m.rows; i += W) {
    Vec<T> sum[W];
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < W; ++lane) {
      const T* row = m.row(smaller(i + lane, m.rows - 1));
      Vec<T> last = {};
      if (whole < m.columns) last = inside ? load(row + whole) : last;
      sum[lane] = last * last;
      for (int64_t j = 0; j < whole; j += W) sum[lane] += load(row + j) * load(row + j);
    }
    store<T>(norms + i, lane_sums<T>(sum));
  }
}

// ---- Cholesky ----------------------------------------------------------------------------------------------------

// The lower factor L of a positive definite matrix, with the inverses of its diagonal blocks: with those, every solve
// is made of products.
template <class T>
struct Factor {
  Matrix<T> lower;  // [n, n], the upper triangle is meaningless
  T* inverse;       // [blocks, kBlock, kBlock], lower triangular
  T* inverse_transposed;

  int64_t size() const { return lower.rows; }
  Matrix<T> inverse_block(int64_t first) const { return {inverse + first * kBlock, kBlock, kBlock, kBlock}; }
  Matrix<T> inverse_transposed_block(int64_t first) const {
    return {inverse_transposed + first * kBlock, kBlock, kBlock, kBlock};
  }
};

// In whole blocks of rows, zero past the last, so that tiles may take part whole.
template <class T>
Factor<T> take_factor(Arena& arena, int64_t n) {
  const int64_t padded = round_up(n, kBlock);
  const Matrix<T> lower = take_matrix<T>(arena, padded, n);
  fill_zero(lower.rows_from(n, padded - n));
  return {lower.rows_from(0, n), arena.take<T>(padded * kBlock), arena.take<T>(padded * kBlock)};
}

// Least value each pivot may have. A pivot below its floor by no more than rounding is raised to it; one further
// below, or NaN, is not that of a positive definite matrix. With no floors, a pivot must be positive.
template <class T>
struct Floors {
  const T* value = nullptr;  // [n]
  const T* slack = nullptr;  // [n]
};

// A square of kBlock rows.
template <class T>
struct Square {
  alignas(64) T entry[kBlock][kBlock];
};

template <class T>
void transpose_block(T* to, int64_t to_ld, const T* from, int64_t from_ld) {
  for (int64_t i = 0; i < kBlock; i += kLanes<T>)
    for (int64_t j = 0; j < kBlock; j += kLanes<T>)
      transpose_square(to + i * to_ld + j, to_ld, from + j * from_ld + i, from_ld);
}

// What is on and below the diagonal only, in whole squares of vectors; or on and above it.
template <class T>
void transpose_lower(T* to, int64_t to_ld, const T* from, int64_t from_ld) {
  for (int64_t i = 0; i < kBlock; i += kLanes<T>)
    for (int64_t j = i; j < kBlock; j += kLanes<T>)
      transpose_square(to + i * to_ld + j, to_ld, from + j * from_ld + i, from_ld);
}
template <class T>
void transpose_upper(T* to, int64_t to_ld, const T* from, int64_t from_ld) {
  for (int64_t i = 0; i < kBlock; i += kLanes<T>)
    for (int64_t j = 0; j <= i; j += kLanes<T>)
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
template <class T>
bool admit(T& pivot, const Floors<T>& floors, int64_t j) {
  const T floor = floors.value ? floors.value[j] : T(0);
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
template <class T>
struct Panel {
  static constexpr int W = static_cast<int>(kLanes<T>);
  const Square<T>& multipliers;
  const int64_t first;
  Vec<T> row[W];

  [[gnu::always_inline]] void load_from(const Square<T>& square, int64_t column) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) row[i] = load(square.entry[first + i] + column);
  }

  [[gnu::always_inline]] void store_to(Square<T>& square, int64_t column) const {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store<T>(square.entry[first + i] + column, row[i]);
  }

  // Take row `j` of the square off rows AFTER + 1 and on.
  template <int AFTER>
  [[gnu::always_inline]] void take_off(int64_t j, Vec<T> other) {
    const T* factors = multipliers.entry[j] + first;
#pragma GCC unroll 16
    for (int i = AFTER + 1; i < W; ++i) row[i] -= factors[i] * other;
  }

  // All rows above, from `start` on: before it they are zero in this column.
  [[gnu::always_inline]] void take_off_above(const Square<T>& square, int64_t start, int64_t column) {
    for (int64_t j = start; j < first; ++j) take_off<-1>(j, load(square.entry[j] + column));
  }

  [[gnu::always_inline]] void take_off_within() {
    unrolled<W>([&]<int J>() __attribute__((always_inline)) { take_off<J>(first + J, row[J]); });
  }
};

// L Lᵀ and, where it is wanted, L⁻¹ of one diagonal block, in place; false if a pivot is not positive. Both come out of
// one elimination: what turns A into D Lᵀ turns the identity into D L⁻¹, and the roots in D, which no later row waits
// for, come last.
template <class T>
bool factor_block(const Matrix<T>& a, int64_t n, const Floors<T>& floors, T* inverse, T* inverse_transposed) {
  constexpr int64_t W = kLanes<T>;
  // Lᵀ, of which only what is on and right of the diagonal counts; its rows over their pivots; L⁻¹
  Square<T> upper, multipliers, root;
  if (n == kBlock) {
    transpose_lower(upper.entry[0], kBlock, a.data, a.ld);
  } else {
    upper = {};
    for (int64_t i = n; i < kBlock; ++i) upper.entry[i][i] = 1;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) upper.entry[j][i] = a.row(i)[j];
  }
  bool good = true;
  T pivots[kBlock], reciprocals[kBlock];
  for (int64_t first = 0; first < kBlock; first += W) {
    Panel<T> panel{.multipliers = multipliers, .first = first};
    panel.load_from(upper, first);
    panel.take_off_above(upper, 0, first);
    T pivot = panel.row[0][0];
    unrolled<W>([&]<int J>() __attribute__((always_inline)) {
      const int64_t j = first + J;
      const auto& row = panel.row;
      if (j < n) good &= admit(pivot, floors, j);
      pivots[j] = pivot;
      const T reciprocal = reciprocals[j] = 1 / pivot;
      // The next pivot ahead of its row: nothing else is waited for.
      if constexpr (J + 1 < W) pivot = row[J + 1][J + 1] - row[J][J + 1] * reciprocal * row[J][J + 1];
      store<T>(multipliers.entry[j] + first, row[J] * reciprocal);
      panel.template take_off<J>(j, row[J]);
    });
    panel.store_to(upper, first);
    for (int64_t column = first + W; column < kBlock; column += W) {
      panel.load_from(upper, column);
      panel.take_off_above(upper, 0, column);
      panel.take_off_within();
      panel.store_to(upper, column);
      for (int64_t i = 0; i < W; ++i)
        store<T>(multipliers.entry[first + i] + column, panel.row[i] * reciprocals[first + i]);
    }
    for (int64_t column = 0; inverse && column <= first; column += W) {
      unrolled<W>([&]<int J>() __attribute__((always_inline)) {
        panel.row[J] = Vec<T>{};
        if (column == first) panel.row[J][J] = 1;
      });
      panel.take_off_above(root, column, column);
      panel.take_off_within();
      panel.store_to(root, column);
    }
  }
  for (int64_t j = 0; j < kBlock; ++j) {
    T* row = upper.entry[j];
    const T* root_row = root.entry[j];
    const T length = std::sqrt(pivots[j]), reciprocal = 1 / length;
    for (int64_t c = j / W * W; c < kBlock; c += W) store<T>(row + c, load(row + c) * reciprocal);
    for (int64_t c = 0; inverse && c < kBlock; c += W)
      store<T>(inverse + j * kBlock + c, c <= j ? load(root_row + c) * reciprocal : Vec<T>{});
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
template <class T>
void invert_block(const Factor<T>& f) {
  constexpr int64_t W = kLanes<T>;
  Square<T> root = {};
  for (int64_t i = 0; i < kBlock; ++i) {
    T* row = root.entry[i];
    row[i] = 1;
    if (i >= f.size()) continue;
    const T* lower = f.lower.row(i);
    const T reciprocal = 1 / lower[i];
    for (int64_t c = 0; c <= i; c += W) {
      Vec<T> sum = load(row + c);
      for (int64_t j = c; j < i; ++j) sum -= lower[j] * load(root.entry[j] + c);
      store<T>(row + c, sum * reciprocal);
    }
  }
  __builtin_memcpy(f.inverse, root.entry, sizeof root.entry);
  transpose_block(f.inverse_transposed, kBlock, root.entry[0], kBlock);
}

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

// Which blocks a factor inverts: the last one's inverse is for solves alone.
enum class Inverses { kAll, kAllButLast };

// Factor f.lower (its lower triangle) in place, block column by block column, each first brought up to date from
// those on its left. Returns whether the matrix is positive definite; if not, the factor is finite but meaningless.
template <class T>
bool cholesky(const Factor<T>& f, Arena& arena, const Floors<T>& floors = {}, Upcoming* upcoming = nullptr,
              Inverses inverses = Inverses::kAll) {
  const int64_t n = f.size();
  const Matrix<T> above = take_matrix<T>(arena, n, kBlock);  // Lᵀ of this block row
  const Matrix<T> panel = take_matrix<T>(arena, n, kBlock);
  bool good = true;
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    const Matrix<T> column = f.lower.block(j, n - j, j, width);
    if (j > 0) {
      transpose(above.block(0, j, 0, width), f.lower.block(j, width, 0, j));
      product<Into::kSubtract>(column, j, left(f.lower.rows_from(j, n - j)), above, upcoming);
    }
    const Floors<T> here{floors.value ? floors.value + j : nullptr, floors.slack ? floors.slack + j : nullptr};
    const int64_t below = n - j - width;
    const bool inverted = below > 0 || inverses == Inverses::kAll;
    good &= factor_block(column, width, here, inverted ? f.inverse_block(j).data : nullptr,
                         f.inverse_transposed_block(j).data);
    if (below > 0) {
      const Matrix<T> rest = column.rows_from(width, below);
      copy_rows(panel, rest);
      product<Into::kSet>(rest, kBlock, left(panel), f.inverse_transposed_block(j), upcoming);
    }
  }
  return good;
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

}  // namespace fastkm::FASTKM_LEVEL
