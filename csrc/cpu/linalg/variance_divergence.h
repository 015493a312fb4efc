// The divergence of two normal laws that differ in their variance, without cancellation.
#pragma once

#include <cmath>

namespace fastkm::FASTKM_LEVEL {

// r − 1 − ln r ≥ 0: twice the KL of two centred normal laws whose variances have the ratio r. `excess` is r − 1, which
// the caller knows with more digits than `ratio` holds.
//
// Near r = 1 both terms cancel to (r − 1)²/2. Between ½ and 2 the result is therefore summed, with u = (1 − r)/(1 + r):
//   r − 1 − ln r = 2 [u²/(1 + u) + u³ (1/3 + u²/5 + u⁴/7 + …)],  |u| ≤ 1/3.
// N terms leave a relative error below |u|^(2N+1) / (2N + 3), which N = 7 in float and 16 in double bring below the
// rounding of one operation. The result is never negative: for u ≥ 0 no term is, and for u < 0 the second is at most
// 0.13 of the first.
// Numbers may be vectors, which then are summed lane by lane.
template <class Real>
constexpr auto divergence_series = [](auto ratio, auto excess) __attribute__((always_inline)) {
  constexpr int kTerms = sizeof(Real) < sizeof(double) ? 7 : 16;
  const auto u = -excess / (1 + ratio), square = u * u;
  auto series = square - square;
#pragma GCC unroll 16
  for (int n = kTerms; n > 0; --n) series = series * square + Real(1) / static_cast<Real>(2 * n + 1);
  return 2 * square * (1 / (1 + u) + u * series);
};

template <class Real>
bool is_near_one(Real ratio) {
  return ratio >= Real(0.5) && ratio <= 2;
}

template <class Real>
Real variance_divergence(Real ratio, Real excess) {
  return is_near_one(ratio) ? divergence_series<Real>(ratio, excess) : excess - std::log(ratio);
}

}  // namespace fastkm::FASTKM_LEVEL
