// Addressing and reading of small memories, one in each lane: the equations of read.h, query by query.
#pragma once

#include "cpu/linalg/ridge_lanes.h"

namespace fastkm::FASTKM_LEVEL {

template <class Real>
bool fits_lanes(const ReadingArgs<Real>& args) {
  const int64_t K = args.K, C = args.C;
  return fits_lanes<Real>(K, C, ridge_steps(K, C, args.squared_gram) + args.Q * (2 * K * C + args.num_iters * K * K));
}

// Answer queries [first, first + queries.rows), which are in `queries`. The values take their place.
template <class Real>
void read_query_lanes(const ReadingArgs<Real>& args, const RidgeLanes<Real>& solve, const LaneMatrix<Real>& mean,
                      const LaneMatrix<Real>& queries, const LaneMatrix<Real>& weights, const LaneMatrix<Real>& next) {
  const Vec<Real> ridge = solve.ridge.get(0);
  for (int64_t q = 0; q < queries.rows; ++q) {
    const LaneMatrix<Real> w = weights.row(q);
    solve_ridge(w, solve, mean, queries.row(q));
    for (int64_t n = 1; n < args.num_iters; ++n) {
      __builtin_memcpy(next.data, w.data, static_cast<size_t>(args.K * kLanes<Real>) * sizeof(Real));
      lane_solve(solve.system, next);
      lane_subtract<Real>(w, ridge, next);
    }
    if (args.values.data) lane_product_transposed(queries.row(q), mean, w);
  }
}

template <class Real>
void read_lanes(const ReadingArgs<Real>& args, int64_t begin, int64_t end) {
  constexpr int64_t kQueries = 16;  // that are in working memory together
  each_group<Real>(begin, end, [&](const Group& group) {
    Arena& arena = Arena::fresh();
    const LaneMatrix<Real> mean = allocate_lanes<Real>(arena, args.K, args.C),
                           next = allocate_lanes<Real>(arena, 1, args.K);
    const RidgeLanes<Real> solve = load_ridge_lanes(args.ridge, args.K, args.squared_gram, group, arena);
    load_lanes(mean, args.mean, group);
    LaneStatus<Real> status;
    const LaneMask<Real> good = factor_ridge(solve, mean);
    status.expect(good, kNotPositiveDefinite);
    const PivotLanes<Real> pivots = extreme_pivots(solve);
    status.expect(pivots.good(limits_of_solve<Real>(args.C)), kInexactSystem);
    if (args.num_iters > 1) status.expect(2 * solve.ridge.get(0) <= pivots.largest, kInexactSystem);
    status.store(args.info, group);
    const Arena::Mark start = arena.mark();
    for (int64_t first = 0; first < args.Q; first += kQueries) {
      arena.release(start);
      const int64_t count = smaller(kQueries, args.Q - first);
      const LaneMatrix<Real> queries = allocate_lanes<Real>(arena, count, args.C),
                             weights = allocate_lanes<Real>(arena, count, args.K);
      load_lanes(queries, args.queries.from_row(first), group);
      read_query_lanes(args, solve, mean, queries, weights, next);
      store_lanes(args.weights.from_row(first), weights, group);
      if (args.values.data) store_lanes(args.values.from_row(first), queries, group);
    }
  });
}

}  // namespace fastkm::FASTKM_LEVEL
