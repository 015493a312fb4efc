// Vectors of one instruction set: lanes, sums, and transposes in registers.
//
// Included once for each instruction set, inside its namespace. FASTKM_VECTOR_BYTES is the size of a vector.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

namespace fastkm::FASTKM_LEVEL {

template <class T>
using Vec [[gnu::vector_size(FASTKM_VECTOR_BYTES)]] = T;

template <class T>
constexpr int64_t kLanes = FASTKM_VECTOR_BYTES / sizeof(T);

template <class T>
using LaneNumber = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// 0, 1, 2, … in the lanes: to be compared with.
template <class T>
inline auto lane_numbers() {
  return []<size_t... LANE>(std::index_sequence<LANE...>) {
    typedef LaneNumber<T> Numbers [[gnu::vector_size(FASTKM_VECTOR_BYTES)]];
    return Numbers{LANE...};
  }(std::make_index_sequence<kLanes<T>>());
}

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

// The bits of |x|, which are in the order of the numbers, with NaN above them all; their greatest takes one
// instruction.
template <class T>
inline auto magnitude(Vec<T> vec) {
  return reinterpret_cast<decltype(lane_numbers<T>())>(vec) & std::numeric_limits<LaneNumber<T>>::max();
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

// Of two rows `stage` apart in a square: one of the halves that a stage of its transposition puts together.
template <int STAGE, bool LOWER, class T, size_t... LANE>
[[gnu::always_inline]] inline Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<LANE...>) {
  constexpr int W = static_cast<int>(kLanes<T>);
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Mask [[gnu::vector_size(FASTKM_VECTOR_BYTES)]];
  constexpr Mask mask = {(static_cast<int>(LANE) & STAGE ? W + static_cast<int>(LANE) - (LOWER ? 0 : STAGE)
                                                         : static_cast<int>(LANE) + (LOWER ? STAGE : 0))...};
  return __builtin_shuffle(a, b, mask);
}

// The sums of the lanes of as many vectors as one has lanes, as one vector: each stage halves their number.
template <class T>
[[gnu::always_inline]] inline Vec<T> lane_sums(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int W = static_cast<int>(kLanes<T>);
  constexpr auto lanes = std::make_index_sequence<W>();
  const auto halve = [&]<int STAGE>() {
    if constexpr (STAGE < W)
#pragma GCC unroll 16
      for (int i = 0; i < W; i += 2 * STAGE)
        rows[i] = interleave<STAGE, false, T>(rows[i], rows[i + STAGE], lanes) +
                  interleave<STAGE, true, T>(rows[i], rows[i + STAGE], lanes);
  };
  halve.template operator()<1>();
  halve.template operator()<2>();
  halve.template operator()<4>();
  halve.template operator()<8>();
  return rows[0];
}

// Transpose a square of kLanes × kLanes in registers: at every stage the off-diagonal quarters of squares of twice the
// stage change places.
template <class T>
[[gnu::always_inline]] inline void transpose_square(T* to, int64_t to_ld, const T* from, int64_t from_ld) {
  constexpr int W = static_cast<int>(kLanes<T>);
  constexpr auto lanes = std::make_index_sequence<W>();
  Vec<T> rows[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = load(from + i * from_ld);
  const auto exchange = [&]<int STAGE>() {
    if constexpr (STAGE < W)
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        if (!(i & STAGE)) {
          const Vec<T> a = rows[i], b = rows[i + STAGE];
          rows[i] = interleave<STAGE, false, T>(a, b, lanes);
          rows[i + STAGE] = interleave<STAGE, true, T>(a, b, lanes);
        }
  };
  exchange.template operator()<1>();
  exchange.template operator()<2>();
  exchange.template operator()<4>();
  exchange.template operator()<8>();
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store<T>(to + i * to_ld, rows[i]);
}

}  // namespace fastkm::FASTKM_LEVEL
