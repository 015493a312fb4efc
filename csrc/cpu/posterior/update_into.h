// Posterior update into a memory of the caller, which may be the one that is updated.
//
// Bound: a chunk of patterns reads the memory once to find out what it does, reads it again and writes it. That is
// 3 K (C + K) numbers, as many as a copy moves: a copy reads the lines that it writes.
// Algorithm: equations (1) to (5) of conditioning.h, a chunk at a time. A single pattern is whitened in one pass over
// U, which also checks that U is symmetric, and one over R. A third pass writes both. Kept: nothing of the size of a
// memory, unless its rows are shorter than a vector register. Promised: a chunk is written when its status is known. A
// memory that is refused holds what it held before the chunk that was refused, and no later pattern is looked at.
#pragma once

#include "cpu/linalg/units.h"
#include "cpu/posterior/conditioning.h"

namespace fastkm::FASTKM_LEVEL {

// to = from + factor · x for part of a row without padding; `to` may be `from`.
template <class Real>
[[gnu::always_inline]] inline void add_scaled_row(Real* to, const Real* from, int64_t columns, Real factor,
                                                  const Real* x) {
  constexpr int64_t W = kLanes<Real>;
  int64_t j = 0;
  for (; j + W <= columns; j += W) store<Real>(to + j, load(from + j) + factor * load(x + j));
  for (; j < columns; ++j) to[j] = from[j] + factor * x[j];
}

// to −= the rows of m, in their order.
template <class Real>
void subtract_rows(const Matrix<Real>& m, Real* to) {
  for (int64_t i = 0; i < m.rows; ++i) add_scaled(round_up(m.columns, kLanes<Real>), to, Real(-1), m.row(i));
}

// The largest entry of a matrix, and its largest difference from its transpose, lane by lane.
template <class Real>
struct Asymmetry {
  decltype(lane_numbers<Real>()) scales = {}, gaps = {};

  void compare(Vec<Real> entry, Vec<Real> across) {
    const auto size = magnitude<Real>(entry), difference = magnitude<Real>(entry - across);
    scales = size > scales ? size : scales;
    gaps = difference > gaps ? difference : gaps;
  }
};

// The squares (i, j) and (j, i) of U, i ≥ j, in U w: of_j += w_i U_ij, of_i += w_j U_ji. The square (j, i) of the next
// tile is requested: its rows are read in pieces too short for the hardware to follow.
template <class Real>
[[gnu::always_inline]] inline void add_squares(const Matrix<Real>& m, int64_t i, int64_t j, const Real* w, Real* sum,
                                               Asymmetry<Real>& found) {
  constexpr int64_t W = kLanes<Real>;
  alignas(64) Real across[W * W];
  transpose_square(across, W, m.row(j) + i, m.ld);
  Vec<Real> of_j[2] = {load(sum + j), {}}, of_i[2] = {load(sum + i), {}};
#pragma GCC unroll 16
  for (int64_t row = 0; row < W; ++row) {
    __builtin_prefetch(m.row(j + row + kUnitRows) + i, 0, 2);
    const Vec<Real> entry = load(m.row(i + row) + j);
    found.compare(entry, load(across + row * W));
    of_j[row % 2] += w[i + row] * entry;
    of_i[row % 2] += w[j + row] * load(m.row(j + row) + i);
  }
  store<Real>(sum + j, of_j[0] + of_j[1]);
  if (i != j) store<Real>(sum + i, of_i[0] + of_i[1]);
}

// The rows [begin, end) of U up to the diagonal, and what lies across it, in U w. Of `sum`, only entries before `end`
// are written. They are added up tile by tile of kUnitRows² numbers, which fit the first-level cache with their
// transpose.
template <class Real>
void multiply_unit(const Matrix<Real>& m, int64_t begin, int64_t end, const Real* w, Real* sum,
                   Asymmetry<Real>& found) {
  constexpr int64_t W = kLanes<Real>;
  const int64_t whole = smaller(end, m.rows / W * W);
  for (int64_t tile = 0; tile < whole; tile += kUnitRows)
    for (int64_t j = tile; j < smaller(tile + kUnitRows, whole); j += W)
      for (int64_t i = j > begin ? j : begin; i < whole; i += W) add_squares(m, i, j, w, sum, found);
  for (int64_t i = whole > begin ? whole : begin; i < end; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const Real entry = m.row(i)[j], across = m.row(j)[i];
      found.compare(Vec<Real>{} + entry, Vec<Real>{} + across);
      sum[j] += w[i] * entry;
      if (j < i) sum[i] += w[j] * across;
    }
}

// v = U w and y = −Rᵀ w, with zeros in their padding, and whether U can be a covariance.
template <class Real>
Status multiply_memory(Real* v, Real* y, const MemoryRows<Real>& memory, const Real* w, Arena& arena) {
  const int64_t K = memory.cov.rows, C = memory.mean.columns, units = count_units(K);
  const Matrix<Real> of_cov = allocate_zero<Real>(arena, units, K), of_mean = allocate_zero<Real>(arena, units, C);
  SymmetryOf<Real> symmetry;
  share_triangle_parts(team_for(K * (K + C)), units, [&](const auto& each) {
    Asymmetry<Real> found;
    each([&](int64_t unit) {
      const int64_t begin = unit * kUnitRows, end = smaller(begin + kUnitRows, K);
      multiply_unit(memory.cov, begin, end, w, of_cov.row(unit), found);
      sum_scaled_rows(of_mean.row(unit), memory.mean.rows_from(begin, end - begin), C, w + begin);
    });
    symmetry.compare_lanes(found.scales, found.gaps);
  });
  subtract_rows(of_cov, v);
  for (int64_t k = 0; k < K; ++k) v[k] = -v[k];
  subtract_rows(of_mean, y);
  return symmetry.status();
}

// (1) and (2) for one pattern, and the check of U.
template <class Real>
WhitenedRows<Real> whiten_one(const MemoryRows<Real>& memory, const Matrix<Real>& weights, const Matrix<Real>& values,
                              const Observations<Real>& observed, const Limits<Real>& limits, Arena& arena) {
  const int64_t K = memory.cov.rows, C = memory.mean.columns;
  WhitenedRows<Real> chunk = allocate_whitened_rows(K, C, 1, observed, arena);
  Real *const gain = chunk.gain.row(0), *const error = chunk.values.row(0);
  fill_zero(chunk.gain), fill_zero(chunk.values);
  const Status symmetric = multiply_memory(gain, error, memory, weights.row(0), arena);
  Real s = dot(K, weights.row(0), gain);
  const Real noise = observed.noise_var[0], slack = rounding_slack(K, 1, s + noise);
  const bool positive = check_pivot(s, AddedDiagonal<Real>{&noise, &slack, &chunk.explained[0]}, 0);
  chunk.pivot[0] = s;
  const Real reciprocal = 1 / std::sqrt(s), taken = dot(K, gain, gain) / s;
  chunk.status = symmetric != kGood
                     ? symmetric
                     : chunk_status(positive, chunk, taken, observed, operand(memory.cov), weights, limits, arena);
  for (int64_t c = 0; c < C; ++c) error[c] = (values.row(0)[c] + error[c]) * reciprocal;
  for (int64_t k = 0; k < K; ++k) gain[k] *= reciprocal;
  return chunk;
}

// (3) for one pattern. The last rows come first: the cache still has them.
template <class Real>
void apply_one(const MemoryRows<Real>& after, const MemoryRows<Real>& before, const WhitenedRows<Real>& chunk) {
  const int64_t K = after.cov.rows, C = after.mean.columns;
  const Real *gain = chunk.gain.row(0), *error = chunk.values.row(0);
  each_unit(team_for(K * (K + C)), K, [&](int64_t begin, int64_t end) {
    for (int64_t i = K - 1 - begin; i >= K - end; --i) {
      add_scaled_row(after.mean.row(i), before.mean.row(i), C, gain[i], error);
      add_scaled_row(after.cov.row(i), before.cov.row(i), K, -gain[i], gain);
    }
  });
}

// (3) of many patterns for rows without padding. Products write whole vector registers, and may write an entry twice
// where these do not end with a row; so the last columns, and the last rows of U, are added on their own.
template <class Real>
void apply_many(const MemoryRows<Real>& after, const MemoryRows<Real>& before, const WhitenedRows<Real>& chunk,
                Arena& arena) {
  const int64_t K = after.cov.rows, C = after.mean.columns, count = chunk.count();
  const int64_t columns = C / kLanes<Real> * kLanes<Real>, rows = K / kBlock * kBlock;
  product<Into::kAdd>(after.mean.block(0, K, 0, columns), before.mean.block(0, K, 0, columns), count,
                      transposed(chunk.gain), chunk.values.block(0, count, 0, columns));
  const Matrix<Real> last_columns = allocate_matrix<Real>(arena, K, C - columns);
  product<Into::kSet>(last_columns, count, transposed(chunk.gain), chunk.values.block(0, count, columns, C - columns));
  for (int64_t k = 0; k < K; ++k)
    for (int64_t c = columns; c < C; ++c)
      after.mean.row(k)[c] = before.mean.row(k)[c] + last_columns.row(k)[c - columns];

  product_lower<Into::kSubtract>(after.cov.block(0, rows, 0, rows), before.cov.block(0, rows, 0, rows), count,
                                 transposed(chunk.gain), chunk.gain);
  const Matrix<Real> last_rows = allocate_matrix<Real>(arena, K - rows, K);
  product<Into::kSet>(last_rows, count, transposed(chunk.gain.block(0, count, rows, K - rows)), chunk.gain);
  for (int64_t k = rows; k < K; ++k)
    for (int64_t i = 0; i <= k; ++i) after.cov.row(k)[i] = before.cov.row(k)[i] - last_rows.row(k - rows)[i];
  mirror(after.cov);
}

// The memories of a call, before and after it: views of the caller's rows, or twice the same working memory.
template <class Real>
struct MemoryPair {
  MemoryRows<Real> before, after;
  bool views;
};

template <class Real>
MemoryPair<Real> open_memories(const PosteriorArgs<Real>& args, int64_t b, Arena& arena) {
  const auto fits = [](const auto& m, int64_t columns) { return m.stride[2] == 1 && columns >= kLanes<Real>; };
  const auto view = [&](const auto& m, int64_t columns) {
    return Matrix<Real>{const_cast<Real*>(m.at(b)), args.K, columns, m.stride[1], false};
  };
  if (fits(args.mean, args.C) && fits(args.cov, args.K) && fits(args.new_mean, args.C) && fits(args.new_cov, args.K))
    return {{view(args.mean, args.C), view(args.cov, args.K)},
            {view(args.new_mean, args.C), view(args.new_cov, args.K)},
            true};
  const MemoryRows<Real> work{allocate_matrix<Real>(arena, args.K, args.C),
                              allocate_matrix<Real>(arena, args.K, args.K)};
  load_matrix(work.mean, args.mean, b);
  load_matrix(work.cov, args.cov, b);
  return {work, work, false};
}

// Write what no chunk has written.
template <class Real>
void close_memories(const MemoryPair<Real>& memories, const PosteriorArgs<Real>& args, int64_t b) {
  const auto copy = [&](const Batch<Real>& to, const Matrix<Real>& from) {
    if (from.data == to.at(b)) return;
    share_rows(from, [&](int64_t i) {
      for (int64_t j = 0; j < from.columns; ++j) *to.at(b, i, j) = from.row(i)[j];
    });
  };
  copy(args.new_mean, memories.before.mean);
  copy(args.new_cov, memories.before.cov);
}

// A pattern that was not looked at has no reports.
template <class Real>
void clear_reports(const PosteriorArgs<Real>& args, int64_t b, int64_t first) {
  for (int64_t t = first; t < args.T; ++t)
    *args.innovation_var.at(b, t) = *args.kl.at(b, t) = std::numeric_limits<Real>::quiet_NaN();
}

// How far an update came: patterns before `done` are in the results, and `log_evidence` is of these.
struct Progress {
  Status status = kGood;
  int64_t done = 0;
  double log_evidence = 0;
};

// Memory `b`, a chunk at a time, until the first chunk whose status is not good.
template <class Real>
Progress update_by_passes(const PosteriorArgs<Real>& args, int64_t b, const Limits<Real>& limits) {
  const int64_t T = args.T, size = chunk_size<Real>(args.K, args.C), largest = smaller(size, T);
  Arena& arena = Arena::fresh();
  const Matrix<Real> weights_work = allocate_matrix<Real>(arena, largest, args.K);
  const Matrix<Real> values_work = allocate_matrix<Real>(arena, largest, args.C);
  MemoryPair<Real> memories = open_memories(args, b, arena);
  const bool one = T == 1 && memories.views;
  Progress progress{.status = one ? kGood : symmetry(memories.before.cov)};
  const Arena::Mark chunk_start = arena.mark();
  while (progress.done < T && progress.status == kGood) {
    arena.release(chunk_start);
    const int64_t first = progress.done, count = smaller(size, T - first);
    const Observations<Real> observed = load_observations(args, b, first, count, arena);
    const Matrix<Real> weights = weights_work.rows_from(0, count), values = values_work.rows_from(0, count);
    load_patterns(weights, args.weights.from_row(first), b, observed.unmasked);
    load_patterns(values, args.values.from_row(first), b, observed.unmasked);
    const WhitenedRows<Real> chunk = one ? whiten_one(memories.before, weights, values, observed, limits, arena)
                                         : whiten_rows(memories.before, weights, values, observed, limits, arena);
    progress.status = chunk.status;
    if (chunk.status != kGood) break;
    if (one)
      apply_one(memories.after, memories.before, chunk);
    else if (memories.views)
      apply_many(memories.after, memories.before, chunk, arena);
    else
      update_memory(memories.after, memories.before, chunk);
    store_reports(args, b, first, chunk, &progress.log_evidence);
    memories.before = memories.after;
    progress.done += count;
  }
  clear_reports(args, b, progress.done);
  close_memories(memories, args, b);
  store_log_evidence(args, b, progress.log_evidence);
  return progress;
}

}  // namespace fastkm::FASTKM_LEVEL
