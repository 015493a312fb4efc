// Vectors of one instruction set: lanes, sums, and transposes in registers.
//
// Included once for each instruction set, inside its namespace. FASTKM_VECTOR_BYTES is the size of a vector.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

namespace fastkm::FASTKM_LEVEL {

template <class Real>
using Vec [[gnu::vector_size(FASTKM_VECTOR_BYTES)]] = Real;

template <class Real>
constexpr int64_t kLanes = FASTKM_VECTOR_BYTES / sizeof(Real);

template <class Real>
using LaneNumber = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;

// The vector (0, 1, 2, …), for comparisons that select lanes.
template <class Real>
inline auto lane_numbers() {
  return []<size_t... LANE>(std::index_sequence<LANE...>) {
    typedef LaneNumber<Real> Numbers [[gnu::vector_size(FASTKM_VECTOR_BYTES)]];
    return Numbers{LANE...};
  }(std::make_index_sequence<kLanes<Real>>());
}

// A vector at any address. GCC compiles a memcpy to a vector with AVX2 by way of the stack, and this by one
// instruction.
template <class Real>
struct [[gnu::packed, gnu::may_alias]] UnalignedVec {
  Vec<Real> vec;
};

template <class Real>
inline Vec<Real> load(const Real* from) {
  return reinterpret_cast<const UnalignedVec<Real>*>(from)->vec;
}

template <class Real>
inline void store(Real* to, Vec<Real> vec) {
  reinterpret_cast<UnalignedVec<Real>*>(to)->vec = vec;
}

// The bits of |x| as integers. They have the order of the numbers, with NaN above all, and the maximum of two vectors
// of integers is one instruction.
template <class Real>
inline auto magnitude(Vec<Real> vec) {
  return reinterpret_cast<decltype(lane_numbers<Real>())>(vec) & std::numeric_limits<LaneNumber<Real>>::max();
}

// Sum of the lanes: the upper half is added to the lower half until one lane is left.
template <class Real>
inline Real lane_sum(Vec<Real> vec) {
  Real lanes[kLanes<Real>];
  store<Real>(lanes, vec);
  for (int64_t half = kLanes<Real> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// One step of a transpose in registers: interleave the lower or the upper halves of two rows that are STAGE apart.
template <int STAGE, bool LOWER, class Real, size_t... LANE>
[[gnu::always_inline]] inline Vec<Real> interleave(Vec<Real> a, Vec<Real> b, std::index_sequence<LANE...>) {
  constexpr int W = static_cast<int>(kLanes<Real>);
  constexpr auto source = [](int lane) {
    return lane & STAGE ? W + lane - (LOWER ? 0 : STAGE) : lane + (LOWER ? STAGE : 0);
  };
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, source(static_cast<int>(LANE))...);
#else  // GCC 11
  typedef LaneNumber<Real> Mask [[gnu::vector_size(FASTKM_VECTOR_BYTES)]];
  constexpr Mask mask = {source(static_cast<int>(LANE))...};
  return __builtin_shuffle(a, b, mask);
#endif
}

// One stage of lane_sums: interleave and add pairs of vectors, which halves their number.
template <int STAGE, class Real>
[[gnu::always_inline]] inline void add_pairs(Vec<Real> (&rows)[kLanes<Real>]) {
  constexpr int W = static_cast<int>(kLanes<Real>);
  constexpr auto lanes = std::make_index_sequence<W>();
  if constexpr (STAGE < W)
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * STAGE)
      rows[i] = interleave<STAGE, false, Real>(rows[i], rows[i + STAGE], lanes) +
                interleave<STAGE, true, Real>(rows[i], rows[i + STAGE], lanes);
}

// The sums over the lanes of kLanes vectors, as one vector.
template <class Real>
[[gnu::always_inline]] inline Vec<Real> lane_sums(Vec<Real> (&rows)[kLanes<Real>]) {
  add_pairs<1, Real>(rows);
  add_pairs<2, Real>(rows);
  add_pairs<4, Real>(rows);
  add_pairs<8, Real>(rows);
  return rows[0];
}

// One stage of transpose_square: exchange the off-diagonal quarters of every square of 2 STAGE rows.
template <int STAGE, class Real>
[[gnu::always_inline]] inline void exchange_quarters(Vec<Real> (&rows)[kLanes<Real>]) {
  constexpr int W = static_cast<int>(kLanes<Real>);
  constexpr auto lanes = std::make_index_sequence<W>();
  if constexpr (STAGE < W)
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & STAGE)) {
        const Vec<Real> a = rows[i], b = rows[i + STAGE];
        rows[i] = interleave<STAGE, false, Real>(a, b, lanes);
        rows[i + STAGE] = interleave<STAGE, true, Real>(a, b, lanes);
      }
}

// to = fromᵀ for a square of kLanes × kLanes, in registers.
template <class Real>
[[gnu::always_inline]] inline void transpose_square(Real* to, int64_t to_ld, const Real* from, int64_t from_ld) {
  constexpr int W = static_cast<int>(kLanes<Real>);
  Vec<Real> rows[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = load(from + i * from_ld);
  exchange_quarters<1, Real>(rows);
  exchange_quarters<2, Real>(rows);
  exchange_quarters<4, Real>(rows);
  exchange_quarters<8, Real>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store<Real>(to + i * to_ld, rows[i]);
}

}  // namespace fastkm::FASTKM_LEVEL
