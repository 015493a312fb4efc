// One register tile of a matrix product, written once for every vector width.
//
// Included once per instruction set, inside its namespace; FASTKM_VECTOR_BYTES and FASTKM_TILE_ROWS describe it.
#pragma once

namespace fastkm::FASTKM_LEVEL {

template <class T>
using Vec [[gnu::vector_size(FASTKM_VECTOR_BYTES)]] = T;

template <class T>
constexpr int64_t kLanes = FASTKM_VECTOR_BYTES / sizeof(T);

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> vec;
  __builtin_memcpy(&vec, from, sizeof vec);
  return vec;
}

template <class T>
inline void store(T* to, Vec<T> vec) {
  __builtin_memcpy(to, &vec, sizeof vec);
}

// Sum of the lanes, pairwise from the outside in.
template <class T>
inline T lane_sum(Vec<T> vec) {
  T lanes[kLanes<T>];
  store<T>(lanes, vec);
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

enum class Into { kSet, kAdd, kSubtract };

// C (=, +=, −=) A B for a tile of ROWS × (VECS vectors), held in registers while it runs along k.
//
// A is read element by element with any strides, so a transposed A costs nothing; rows of B and C are contiguous.
template <Into INTO, int ROWS, int VECS, class T>
[[gnu::always_inline]] inline void product_tile(int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b,
                                                int64_t ldb, T* c, int64_t ldc) {
  constexpr int64_t W = kLanes<T>;
  Vec<T> sum[ROWS][VECS] = {};
  for (int64_t p = 0; p < k; ++p) {
    Vec<T> row[VECS];
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) row[j] = load(b + p * ldb + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const T factor = a[i * a_row + p * a_column];
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) sum[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) {
      T* at = c + i * ldc + j * W;
      if constexpr (INTO == Into::kSet) store<T>(at, sum[i][j]);
      if constexpr (INTO == Into::kAdd) store<T>(at, load(at) + sum[i][j]);
      if constexpr (INTO == Into::kSubtract) store<T>(at, load(at) - sum[i][j]);
    }
}

}  // namespace fastkm::FASTKM_LEVEL
