// The register tile that all products and solves are made of, written once for every vector width.
//
// Bound: the fused multiply-adds of a product, 2 m n k operations. A tile keeps its sums in registers; a step along k
// loads VECS vectors of B, broadcasts ROWS numbers of A and does ROWS × VECS multiply-adds.
#pragma once

#include "cpu/linalg/matrix.h"
#include "cpu/linalg/simd.h"

namespace fastkm::FASTKM_LEVEL {

// ROWS rows of VECS vector registers.
template <int ROWS, int VECS, class Real>
struct Tile {
  static constexpr int64_t W = kLanes<Real>;
  Vec<Real> row[ROWS][VECS] = {};

  // Add A B, for k columns of A. A is read number by number with any strides, so a transposed A costs nothing. Rows of
  // B are contiguous.
  [[gnu::always_inline]] void add_product(int64_t k, const Operand<Real>& a, Rows<const Real> b) {
    for (int64_t p = 0; p < k; ++p) {
      Vec<Real> other[VECS];
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) other[j] = load(b.data + p * b.ld + j * W);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Real factor = a.data[i * a.row + p * a.column];
#pragma GCC unroll 8
        for (int j = 0; j < VECS; ++j) row[i][j] += factor * other[j];
      }
    }
  }

  // Multiply by a lower triangle from the left. A row needs the old rows above it, so the last row comes first.
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

// Where a product goes: it is stored, added or subtracted.
enum class Into { kSet, kAdd, kSubtract };

// C = A B, or D ± A B, for a tile. Rows of C and D are contiguous; D may be C.
template <Into INTO, int ROWS, int VECS, class Real>
[[gnu::always_inline]] inline void product_tile(Rows<Real> c, Rows<const Real> d, int64_t k, const Operand<Real>& a,
                                                Rows<const Real> b) {
  Tile<ROWS, VECS, Real> sum;
  sum.add_product(k, a, b);
  sum.each([&](Vec<Real>& x, int64_t i, int64_t j) __attribute__((always_inline)) {
    Real* const out = c.data + i * c.ld + j;
    if constexpr (INTO == Into::kSet) store<Real>(out, x);
    if constexpr (INTO == Into::kAdd) store<Real>(out, load(d.data + i * d.ld + j) + x);
    if constexpr (INTO == Into::kSubtract) store<Real>(out, load(d.data + i * d.ld + j) - x);
  });
}

}  // namespace fastkm::FASTKM_LEVEL
