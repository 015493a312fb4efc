// Divergence and log-determinant of small memories, one in each lane: the equations of divergence.h with L D Lᵀ in
// place of L Lᵀ. With M = L0⁻¹L, whose diagonal is one,
//   KL = ½ [C (Σ_i (D_i/D0_i − 1 − ln D_i/D0_i) + Σ_i>j M_ij² D_j/D0_i) + Σ_i ‖(L0⁻¹Δ)_i‖²/D0_i],  ln|U| = Σ ln D_i.
// Sums over rows are taken in double.
#pragma once

#include "cpu/linalg/lanes.h"

namespace fastkm::FASTKM_LEVEL {

template <class Real>
bool fits_lanes(const MatrixNormalArgs<Real>& args) {
  return fits_lanes<Real>(args.K, args.C, args.K * args.K * (args.K + args.C));
}

// A factored covariance in each lane.
template <class Real>
struct FactorLanes {
  LaneMatrix<Real> lower, pivots;  // [K, K], [K]
};

template <class Real>
FactorLanes<Real> load_factor_lanes(const Batch<const Real>& cov, int64_t K, const Group& group, Arena& arena,
                                    LaneStatus<Real>& status) {
  const FactorLanes<Real> factor{allocate_lanes<Real>(arena, K, K), allocate_lanes<Real>(arena, 1, K)};
  load_lanes(factor.lower, cov, group);
  status.expect_covariance(lane_symmetry(factor.lower));
  status.expect(lane_factor(factor.lower, factor.pivots), kNotPositiveDefinite);
  return factor;
}

// Σ of a lane, in double.
template <class Real>
struct LaneSum {
  double lane[kLanes<Real>] = {};

  void add(Vec<Real> x) {
    for (int64_t i = 0; i < kLanes<Real>; ++i) lane[i] += static_cast<double>(x[i]);
  }
};

// x ← L⁻¹ x for rows [first, K) of one column, whose rows before `first` are zero.
template <class Real>
void solve_unit_lower(const LaneMatrix<Real>& lower, const LaneMatrix<Real>& x, int64_t first) {
  constexpr int64_t W = kLanes<Real>;
  for (int64_t i = first + 1; i < lower.rows; ++i)
    x.set(i, x.get(i) - lane_dot(i - first, lower.at(i, first), x.data + first * W));
}

// What C multiplies.
template <class Real>
LaneSum<Real> spread_lanes(const FactorLanes<Real>& prior, const FactorLanes<Real>& factor,
                           const LaneMatrix<Real>& column) {
  const int64_t K = factor.lower.rows;
  LaneSum<Real> sum;
  for (int64_t j = 0; j < K; ++j) {
    const Vec<Real> own = factor.pivots.get(j), reciprocal = prior.lower.get(j, j);
    sum.add(lane_variance_divergence<Real>(own * reciprocal, (own - prior.pivots.get(j)) * reciprocal));
    // M − I = L0⁻¹ (L − L0): nothing cancels where U is close to U0.
    for (int64_t i = j + 1; i < K; ++i) column.set(i, factor.lower.get(i, j) - prior.lower.get(i, j));
    if (j + 1 < K) solve_unit_lower(prior.lower, column, j + 1);
    Vec<Real> norm = {};
    for (int64_t i = j + 1; i < K; ++i) norm += column.get(i) * column.get(i) * prior.lower.get(i, i);
    sum.add(norm * own);
  }
  return sum;
}

// Σ_i ‖(L0⁻¹Δ)_i‖²/D0_i; `difference` is Δ, whose place the solution takes.
template <class Real>
LaneSum<Real> shift_lanes(const FactorLanes<Real>& prior, const LaneMatrix<Real>& difference) {
  LaneSum<Real> sum;
  for (int64_t i = 0; i < difference.rows; ++i) {
    for (int64_t k = 0; k < i; ++k) lane_subtract<Real>(difference.row(i), prior.lower.get(i, k), difference.row(k));
    sum.add(lane_dot(difference.columns, difference.at(i), difference.at(i)) * prior.lower.get(i, i));
  }
  return sum;
}

template <class Real>
void kl_memory_lanes(const MatrixNormalArgs<Real>& args, int64_t begin, int64_t end) {
  each_group<Real>(begin, end, [&](const Group& group) {
    Arena& arena = Arena::fresh();
    LaneStatus<Real> status, prior_status;
    const FactorLanes<Real> factor = load_factor_lanes(args.cov, args.K, group, arena, status);
    const FactorLanes<Real> prior = load_factor_lanes(args.prior_cov, args.K, group, arena, prior_status);
    status.take_larger(prior_status);
    const LaneMatrix<Real> difference = allocate_lanes<Real>(arena, args.K, args.C),
                           prior_mean = allocate_lanes<Real>(arena, args.K, args.C);
    load_lanes(difference, args.mean, group);
    load_lanes(prior_mean, args.prior_mean, group);
    for (int64_t i = 0; i < args.K; ++i) lane_subtract<Real>(difference.row(i), broadcast<Real>(1), prior_mean.row(i));
    const LaneSum<Real> spread = spread_lanes(prior, factor, allocate_lanes<Real>(arena, 1, args.K)),
                        shift = shift_lanes(prior, difference);
    for (int64_t lane = 0; lane < group.count; ++lane)
      args.result[group.first + lane] =
          static_cast<Real>(0.5 * (static_cast<double>(args.C) * spread.lane[lane] + shift.lane[lane]));
    status.store(args.info, group);
  });
}

template <class Real>
void logdet_lanes(const MatrixNormalArgs<Real>& args, int64_t begin, int64_t end) {
  each_group<Real>(begin, end, [&](const Group& group) {
    Arena& arena = Arena::fresh();
    LaneStatus<Real> status;
    const FactorLanes<Real> factor = load_factor_lanes(args.cov, args.K, group, arena, status);
    // A double holds the product of seven floats.
    constexpr int64_t kTogether = sizeof(Real) < sizeof(double) ? 7 : 1;
    for (int64_t lane = 0; lane < group.count; ++lane) {
      double sum = 0;
      for (int64_t first = 0; first < args.K; first += kTogether) {
        double product = 1;
        for (int64_t k = first; k < smaller(first + kTogether, args.K); ++k) product *= factor.pivots.at(0, k)[lane];
        sum += std::log(product);
      }
      args.result[group.first + lane] = static_cast<Real>(sum);
    }
    status.store(args.info, group);
  });
}

}  // namespace fastkm::FASTKM_LEVEL
