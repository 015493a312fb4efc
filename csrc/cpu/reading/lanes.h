// Addressing and reading of small memories, one in each lane: the equations of read.h, query by query.
#pragma once

#include "cpu/linalg/codes.h"
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

// Codes of 16 bits pass through rows of working memory, those of one memory after those of another.
template <class Real>
void load_lanes_of_codes(const LaneMatrix<Real>& to, const Batch<const Real>& from, int64_t type, int64_t first,
                         const Group& group, Arena& arena) {
  if (type == kFloat32) return load_lanes(to, from.from_row(first), group);
  const Matrix<Real> rows = allocate_matrix<Real>(arena, group.count * to.rows, to.columns);
  for (int64_t lane = 0; lane < group.count; ++lane)
    load_codes(rows.rows_from(lane * to.rows, to.rows), from, type, group.first + lane, first);
  load_lanes(to, Batch<const Real>{rows.data, {to.rows * rows.ld, rows.ld, 1}}, Group{0, group.count});
}

template <class Real>
void store_lanes_of_codes(const Batch<Real>& to, int64_t type, int64_t first, const LaneMatrix<Real>& from,
                          const Group& group, Arena& arena) {
  if (type == kFloat32) return store_lanes(to.from_row(first), from, group);
  const Matrix<Real> rows = allocate_matrix<Real>(arena, group.count * from.rows, from.columns);
  store_lanes(Batch<Real>{rows.data, {from.rows * rows.ld, rows.ld, 1}}, from, Group{0, group.count});
  for (int64_t lane = 0; lane < group.count; ++lane)
    store_codes(to, type, group.first + lane, first, rows.rows_from(lane * from.rows, from.rows));
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
      load_lanes_of_codes(queries, args.queries, args.queries_type, first, group, arena);
      read_query_lanes(args, solve, mean, queries, weights, next);
      store_lanes(args.weights.from_row(first), weights, group);
      if (args.values.data) store_lanes_of_codes(args.values, args.values_type, first, queries, group, arena);
    }
  });
}

}  // namespace fastkm::FASTKM_LEVEL
