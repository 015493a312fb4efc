// Matrices in working memory, and copies between them and the caller's memory.
//
// Rows in working memory are padded to whole vector registers, and products compute the padding too, so their loops
// need no remainder. The padding of a result is meaningless, and no column of a result depends on the padding of
// another. A view of the caller's own rows is not padded.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/linalg/arena.h"
#include "cpu/linalg/simd.h"
#include "cpu/linalg/team.h"
#include "kernel_args.h"

namespace fastkm::FASTKM_LEVEL {

// Rows of a diagonal block of a factor: large enough that products do most of the work, small enough to invert in
// registers.
constexpr int64_t kBlock = 16;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// True if rows are a multiple of 512 bytes apart. The rows of a column of tiles then map to an eighth of the sets of
// the first-level cache and evict each other.
template <class Real>
inline bool shares_cache_sets(int64_t ld) {
  return ld * static_cast<int64_t>(sizeof(Real)) % 512 == 0;
}

// Elements from one row to the next.
template <class Real>
inline int64_t row_stride(int64_t columns) {
  const int64_t padded = round_up(columns, kBlock);
  return shares_cache_sets<Real>(padded) ? padded + kBlock : padded;
}

// The addresses of rows, without their sizes.
template <class Real>
struct Rows {
  Real* data;
  int64_t ld;

  operator Rows<const Real>() const
    requires(!std::is_const_v<Real>)
  {
    return {data, ld};
  }
  Rows from(int64_t i) const { return {data + i * ld, ld}; }
};

template <class Real>
struct Matrix {
  Real* data;
  int64_t rows, columns, ld;
  bool padded = true;

  Real* row(int64_t i) const { return data + i * ld; }
  Matrix block(int64_t first_row, int64_t count, int64_t first_column, int64_t width) const {
    return {row(first_row) + first_column, count, width, ld, padded};
  }
  Matrix rows_from(int64_t first, int64_t count) const { return block(first, count, 0, columns); }
  Rows<Real> columns_from(int64_t first) const { return {data + first, ld}; }
};

// The left operand of a product. Both strides are free, so a transpose is a view.
template <class Real>
struct Operand {
  const Real* data;
  int64_t row, column;  // strides

  Operand rows_from(int64_t i) const { return {data + i * row, row, column}; }
  Operand columns_from(int64_t j) const { return {data + j * column, row, column}; }
};
template <class Real>
Operand<Real> operand(const Matrix<Real>& m) {
  return {m.data, m.ld, 1};
}
template <class Real>
Operand<Real> transposed(const Matrix<Real>& m) {
  return {m.data, 1, m.ld};
}

template <class Real>
Operand<Real> operand(const Batch<const Real>& m) {
  return {m.data, m.stride[1], m.stride[2]};
}
template <class Real>
Operand<Real> transposed(const Batch<const Real>& m) {
  return {m.data, m.stride[2], m.stride[1]};
}

template <class Real>
Matrix<Real> allocate_matrix(Arena& arena, int64_t rows, int64_t columns) {
  const int64_t ld = row_stride<Real>(columns);
  return {arena.allocate<Real>(rows * ld), rows, columns, ld};
}

// Call f(i) for every row of a matrix that is copied.
template <class Real, class F>
[[gnu::always_inline]] inline void share_rows(const Matrix<Real>& m, const F& f) {
  share(team_for(m.rows * m.columns), m.rows, [=](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

template <class Real>
void fill_zero(Matrix<Real> m) {
  share_rows(m, [=](int64_t i) __attribute__((always_inline)) {
    __builtin_memset(m.row(i), 0, static_cast<size_t>(m.ld) * sizeof(Real));
  });
}

template <class Real>
void fill_nan(const Matrix<Real>& m) {
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.columns; ++j) m.row(i)[j] = std::numeric_limits<Real>::quiet_NaN();
}

// Set the padding to zero, up to the next whole vector register.
template <class Real>
void clear_padding(const Matrix<Real>& m) {
  constexpr int64_t W = kLanes<Real>;
  const int64_t whole = m.columns / W * W;
  if (whole == m.columns) return;
  const auto inside = lane_numbers<Real>() < static_cast<LaneNumber<Real>>(m.columns - whole);
  for (int64_t i = 0; i < m.rows; ++i) {
    Real* at = m.row(i) + whole;
    store<Real>(at, inside ? load(at) : Vec<Real>{});
  }
}

// A matrix for results of products that stop at its last column and never write the padding. Products then read the
// padding, and denormal numbers in it would be slow, so it is cleared.
template <class Real>
Matrix<Real> allocate_cleared(Arena& arena, int64_t rows, int64_t columns) {
  const Matrix<Real> m = allocate_matrix<Real>(arena, rows, columns);
  clear_padding(m);
  return m;
}

// Copy matrix `b` into working memory and set the padding to zero.
template <class Real>
void load_matrix(Matrix<Real> to, Batch<const Real> from, int64_t b) {
  share_rows(to, [=](int64_t i) __attribute__((always_inline)) {
    const Real* source = from.at(b, i);
    Real* target = to.row(i);
    if (from.stride[2] == 1) {
      __builtin_memcpy(target, source, static_cast<size_t>(to.columns) * sizeof(Real));
    } else {
      for (int64_t j = 0; j < to.columns; ++j) target[j] = source[j * from.stride[2]];
    }
    for (int64_t j = to.columns; j < to.ld; ++j) target[j] = 0;
  });
}

// Copy a result to the caller's memory. If it was computed in the caller's own rows, there is nothing to copy.
template <class Real>
void store_matrix(Batch<Real> to, int64_t b, Matrix<Real> from) {
  if (from.data == to.at(b)) return;
  share_rows(from, [=](int64_t i) __attribute__((always_inline)) {
    __builtin_memcpy(to.at(b, i), from.row(i), static_cast<size_t>(from.columns) * sizeof(Real));
  });
}

// A view of the caller's rows if products run well on them, else `work`, which has the same size.
template <class Real>
Matrix<Real> view_or_work(const Batch<Real>& of, int64_t b, const Matrix<Real>& work) {
  constexpr int64_t kFewBytes = 1 << 16;  // so small a matrix nearly fits the cache, whatever sets its rows map to
  const int64_t bytes = work.rows * of.stride[1] * static_cast<int64_t>(sizeof(Real));
  const bool few = bytes <= kFewBytes || bytes >= (1 << 20);
  if (of.stride[2] != 1 || work.columns < kLanes<Real> || (shares_cache_sets<Real>(of.stride[1]) && !few)) return work;
  return {of.at(b), work.rows, work.columns, of.stride[1], false};
}

// A matrix that is only read: a view of the caller's rows if products run well on them, else a copy in `work`.
template <class Real>
Matrix<Real> view_or_copy(const Batch<const Real>& from, int64_t b, const Matrix<Real>& work) {
  const Batch<Real> readable{const_cast<Real*>(from.data), {from.stride[0], from.stride[1], from.stride[2]}};
  const Matrix<Real> rows = view_or_work(readable, b, work);
  if (rows.padded) load_matrix(work, from, b);
  return rows;
}

// Copy a matrix to another of the same width, padding included.
template <class Real>
[[gnu::always_inline]] inline void copy_rows(Matrix<Real> to, Matrix<Real> from) {
  const int64_t width = smaller(smaller(to.ld, from.ld), round_up(from.columns, kBlock));
  share_rows(from, [=](int64_t i) __attribute__((always_inline)) {
    for (int64_t j = 0; j < width; j += kLanes<Real>) store<Real>(to.row(i) + j, load(from.row(i) + j));
  });
}

template <class Real>
Matrix<Real> allocate_zero(Arena& arena, int64_t rows, int64_t columns) {
  const Matrix<Real> m = allocate_matrix<Real>(arena, rows, columns);
  fill_zero(m);
  return m;
}

// Copy a cotangent in; a missing one is zero.
template <class Real>
void load_or_zero(const Matrix<Real>& to, const Batch<const Real>& from, int64_t b) {
  if (from.data)
    load_matrix(to, from, b);
  else
    fill_zero(to);
}

template <class Real>
Real value_or_zero(const Batch<const Real>& from, int64_t b, int64_t t) {
  return from.data ? *from.at(b, t) : Real(0);
}

// to += from, padding included.
template <class Real>
void add_rows(const Matrix<Real>& to, const Matrix<Real>& from) {
  const int64_t padded = round_up(from.columns, kLanes<Real>);
  for (int64_t i = 0; i < from.rows; ++i)
    for (int64_t j = 0; j < padded; j += kLanes<Real>)
      store<Real>(to.row(i) + j, load(to.row(i) + j) + load(from.row(i) + j));
}

template <class Real>
void scale(const Matrix<Real>& m, Real factor) {
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.columns; ++j) m.row(i)[j] *= factor;
}

}  // namespace fastkm::FASTKM_LEVEL
