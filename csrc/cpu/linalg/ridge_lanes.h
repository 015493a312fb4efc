// The ridge solve of small memories, one in each lane:
//   (R Rᵀ + λI) w = R z, or ((R Rᵀ)² + λI) w = R Rᵀ R z for the squared-Gram solve.
#pragma once

#include "cpu/linalg/in_double.h"
#include "cpu/linalg/lanes.h"

namespace fastkm::FASTKM_LEVEL {

// Steps of a vector register that a system and its factor take, and the weights of one pattern.
inline int64_t ridge_steps(int64_t K, int64_t C, bool squared_gram) {
  return K * K / 2 * (squared_gram ? C + K : C) + K * K * K / 6 + K * (K + C);
}

// The ridge solve of every lane, and its working memory.
template <class Real>
struct RidgeLanes {
  LaneMatrix<Real> ridge;           // λ [1]
  LaneMatrix<Real> gram, system;    // G [K, K]; A or its factor [K, K]
  LaneMatrix<Real> pivots, target;  // [K]
  bool squared_gram;
};

template <class Real>
RidgeLanes<Real> load_ridge_lanes(const Batch<const Real>& ridge, int64_t K, bool squared_gram, const Group& group,
                                  Arena& arena) {
  const auto allocate = [&](int64_t rows, int64_t columns) { return allocate_lanes<Real>(arena, rows, columns); };
  const RidgeLanes<Real> solve{allocate(1, 1), allocate(K, K), allocate(K, K),
                               allocate(1, K), allocate(1, K), squared_gram};
  load_lanes(solve.ridge, ridge, group);
  return solve;
}

// Factor the system of a mean. Returns the lanes where it is positive definite.
template <class Real>
LaneMask<Real> factor_ridge(const RidgeLanes<Real>& solve, const LaneMatrix<Real>& mean) {
  lane_gram(solve.squared_gram ? solve.gram : solve.system, mean);
  if (solve.squared_gram) lane_gram(solve.system, solve.gram);
  for (int64_t k = 0; k < mean.rows; ++k) solve.system.set(k, k, solve.system.get(k, k) + solve.ridge.get(0));
  return lane_factor(solve.system, solve.pivots);
}

// The pivots of every lane's factor. The largest is no larger than the largest entry of the diagonal.
template <class Real>
struct PivotLanes {
  Vec<Real> largest, least;

  LaneMask<Real> good(const Limits<Real>& limits) const { return ~(largest > least * limits.condition); }
};

template <class Real>
PivotLanes<Real> extreme_pivots(const RidgeLanes<Real>& solve) {
  if (solve.pivots.columns == 0) return {Vec<Real>{}, Vec<Real>{}};
  PivotLanes<Real> found{solve.pivots.get(0), solve.pivots.get(0)};
  for (int64_t k = 1; k < solve.pivots.columns; ++k) {
    const Vec<Real> pivot = solve.pivots.get(k);
    found.largest = pivot > found.largest ? pivot : found.largest;
    found.least = pivot < found.least ? pivot : found.least;
  }
  return found;
}

// The weights of a pattern `z`, by a factored system.
template <class Real>
void solve_ridge(const LaneMatrix<Real>& w, const RidgeLanes<Real>& solve, const LaneMatrix<Real>& mean,
                 const LaneMatrix<Real>& z) {
  lane_product(solve.squared_gram ? solve.target : w, mean, z);
  if (solve.squared_gram) lane_product(w, solve.gram, solve.target);
  lane_solve(solve.system, w);
}

}  // namespace fastkm::FASTKM_LEVEL
