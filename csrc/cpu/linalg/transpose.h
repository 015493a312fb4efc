// Transposes, within working memory and on the way to and from the caller's memory.
#pragma once

#include "cpu/linalg/matrix.h"

namespace fastkm::FASTKM_LEVEL {

// to = fromᵀ [rows, columns], in squares of kLanes × kLanes. If the sizes are no multiple of kLanes, the last squares
// overlap those before them. A matrix smaller than a square is transposed entry by entry.
template <class Real>
void transpose(int64_t rows, int64_t columns, Real* to, int64_t to_ld, const Real* from, int64_t from_ld) {
  constexpr int64_t W = kLanes<Real>;
  if (rows < W || columns < W) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[i * to_ld + j] = from[j * from_ld + i];
    return;
  }
  share(team_for(rows * columns), rows / W, [=](int64_t begin, int64_t end) __attribute__((always_inline)) {
    const int64_t stop = end == rows / W ? rows : end * W;
    for (int64_t next_i = begin * W; next_i < stop; next_i += W) {
      const int64_t i = smaller(next_i, rows - W);
      for (int64_t next_j = 0; next_j < columns; next_j += W) {
        const int64_t j = smaller(next_j, columns - W);
        transpose_square(to + i * to_ld + j, to_ld, from + j * from_ld + i, from_ld);
      }
    }
  });
}

// to = fromᵀ, with the padding set to zero.
template <class Real>
void transpose(const Matrix<Real>& to, const Matrix<Real>& from) {
  transpose(to.rows, to.columns, to.data, to.ld, from.data, from.ld);
  for (int64_t i = 0; i < to.rows; ++i)
    for (int64_t j = to.columns; j < to.ld; ++j) to.row(i)[j] = 0;
}

template <class Real>
Matrix<Real> transposed_copy(const Matrix<Real>& m, Arena& arena) {
  const Matrix<Real> result = allocate_matrix<Real>(arena, m.columns, m.rows);
  transpose(result, m);
  return result;
}

// Copy the transpose of matrix `b` into working memory and set the padding to zero.
template <class Real>
void load_transposed(const Matrix<Real>& to, const Batch<const Real>& from, int64_t b) {
  if (from.stride[2] == 1) {
    transpose(to.rows, to.columns, to.data, to.ld, from.at(b), from.stride[1]);
  } else {
    for (int64_t i = 0; i < to.rows; ++i)
      for (int64_t j = 0; j < to.columns; ++j) to.row(i)[j] = *from.at(b, j, i);
  }
  clear_padding(to);
}

// Copy the transpose of a result to the caller's memory. Results have contiguous rows.
template <class Real>
void store_transposed(const Batch<Real>& to, int64_t b, const Matrix<Real>& from) {
  transpose(from.columns, from.rows, to.at(b), to.stride[1], from.data, from.ld);
}

}  // namespace fastkm::FASTKM_LEVEL
