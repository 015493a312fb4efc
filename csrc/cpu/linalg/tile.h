// One register tile of a matrix product, written once for every vector width.
#pragma once

#include "cpu/linalg/simd.h"

namespace fastkm::FASTKM_LEVEL {

// ROWS × (VECS vectors), in registers.
template <int ROWS, int VECS, class Real>
struct Tile {
  static constexpr int64_t W = kLanes<Real>;
  Vec<Real> row[ROWS][VECS] = {};

  // Add A B, along k. A is read element by element with any strides, so a transposed A costs nothing; rows of B are
  // contiguous.
  [[gnu::always_inline]] void add_product(int64_t k, const Real* a, int64_t a_row, int64_t a_column, const Real* b,
                                          int64_t ldb) {
    for (int64_t p = 0; p < k; ++p) {
      Vec<Real> other[VECS];
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) other[j] = load(b + p * ldb + j * W);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Real factor = a[i * a_row + p * a_column];
#pragma GCC unroll 8
        for (int j = 0; j < VECS; ++j) row[i][j] += factor * other[j];
      }
    }
  }

  // Multiply by a lower triangle from the left: from the last row, as a row meets those above it.
  [[gnu::always_inline]] void multiply_lower(const Real* lower, int64_t ld) {
#pragma GCC unroll 16
    for (int above = 1; above <= ROWS; ++above) {
      const int i = ROWS - above;
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) row[i][j] *= lower[i * ld + i];
#pragma GCC unroll 16
      for (int s = 0; s < i; ++s)
#pragma GCC unroll 8
        for (int j = 0; j < VECS; ++j) row[i][j] += lower[i * ld + s] * row[s][j];
    }
  }

  // Call f(vector, i, j) on every vector.
  template <class F>
  [[gnu::always_inline]] void each(const F& f) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) f(row[i][j], i, j * W);
  }
};

enum class Into { kSet, kAdd, kSubtract };

// C = A B, or D ± A B, for a tile. Rows of C and D are contiguous; D may be C.
template <Into INTO, int ROWS, int VECS, class Real>
[[gnu::always_inline]] inline void product_tile(int64_t k, const Real* a, int64_t a_row, int64_t a_column,
                                                const Real* b, int64_t ldb, const Real* d, int64_t ldd, Real* c,
                                                int64_t ldc) {
  Tile<ROWS, VECS, Real> sum;
  sum.add_product(k, a, a_row, a_column, b, ldb);
  sum.each([&](Vec<Real>& x, int64_t i, int64_t j) __attribute__((always_inline)) {
    if constexpr (INTO == Into::kSet) store<Real>(c + i * ldc + j, x);
    if constexpr (INTO == Into::kAdd) store<Real>(c + i * ldc + j, load(d + i * ldd + j) + x);
    if constexpr (INTO == Into::kSubtract) store<Real>(c + i * ldc + j, load(d + i * ldd + j) - x);
  });
}

}  // namespace fastkm::FASTKM_LEVEL
