// Writing to small memories, one in each lane: the literal loop. For each pattern
//   (R Rᵀ + λI) w = R z, or ((R Rᵀ)² + λI) w = R Rᵀ R z for the squared-Gram solve,
// and with more than one iteration again with the mean that the pattern would leave; then the memory is conditioned.
// Bytes: the memory and the patterns once. Operations: K² C + K³/3 a solve, 3 K² + 4 K C a pattern.
#pragma once

#include "cpu/linalg/ridge_lanes.h"
#include "cpu/posterior/lanes.h"

namespace fastkm::FASTKM_LEVEL {

template <class Real>
bool fits_lanes(const WritingArgs<Real>& args) {
  const int64_t K = args.posterior.K, C = args.posterior.C;
  const int64_t solve = ridge_steps(K, C, args.squared_gram) + 2 * K * (K + C);
  return fits_lanes<Real>(K, C, args.posterior.T * (args.num_opt_iters * solve + K * (K + C)));
}

template <class Real>
void write_lanes(const WritingArgs<Real>& args, int64_t begin, int64_t end) {
  const PosteriorArgs<Real>& shared = args.posterior;
  const Limits<Real> limits = limits_of_solve<Real>(shared.C);
  each_group<Real>(begin, end, [&](const Group& group) {
    Arena& arena = Arena::fresh();
    const MemoryLanes<Real> memory = allocate_memory_lanes<Real>(shared.K, shared.C, arena);
    const LaneMatrix<Real> mean_after = allocate_lanes<Real>(arena, shared.K, shared.C);
    const LaneMatrix<Real> weights = allocate_lanes<Real>(arena, shared.T, shared.K);
    const RidgeLanes<Real> solve = load_ridge_lanes(args.ridge, shared.K, args.squared_gram, group, arena);
    LaneStatus<Real> status = load_memory_lanes(memory, shared, group);
    const PatternLanes<Real> patterns = load_pattern_lanes(shared, group, arena);
    for (int64_t t = 0; t < shared.T; ++t) {
      note_variances(memory, t);
      const LaneMatrix<Real> w = weights.row(t), z = patterns.values.row(t);
      for (int64_t n = 0; n < args.num_opt_iters; ++n) {
        if (n > 0) add_innovation_to(mean_after, memory);
        const LaneMatrix<Real>& mean = n > 0 ? mean_after : memory.mean;
        const LaneMask<Real> good = factor_ridge(solve, mean);
        solve_ridge(w, solve, mean, z);
        clear_masked_row(w, shared, t, group);  // weights of masked patterns are zero
        LaneStatus<Real> before = status;
        status.expect(good, kNotPositiveDefinite);
        status.expect(extreme_pivots(solve).good(limits), kInexactSystem);
        innovate(memory, 0, w, patterns, t, n + 1 < args.num_opt_iters ? before : status);
      }
      add_innovations<1>(memory);
    }
    store_memory_lanes(memory, shared, group, status);
    store_lanes(args.new_weights, weights, group);
    store_report_lanes(shared, patterns, group);
    status.store(shared.info, group);
  });
}

}  // namespace fastkm::FASTKM_LEVEL
