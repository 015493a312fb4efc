// Conditioning small memories, one in each lane, on one pattern after the other.
//
//   (1)  a = U w,  e = w·a,  s = e + σ²,  g = a/s,  δ = z − Rᵀw
//   (2)  R' = R + g δᵀ,  U' = U − g aᵀ
// Bytes: the memory and the patterns once. Operations: 3 K² + 4 K C a pattern. What is reported is said in
// conditioning.h, with ‖E_t‖² = ‖δ‖²/s.
//
// (2) waits until kWaiting patterns can be added in one pass over the memory. Until then (1) takes R and U from before
// them, and with c_n = g_n·w of the patterns that wait: a = U w − Σ c_n a_n, δ = z − Rᵀw − Σ c_n δ_n.
#pragma once

#include "cpu/linalg/in_double.h"
#include "cpu/linalg/lanes.h"
#include "cpu/posterior/conditioning.h"

namespace fastkm::FASTKM_LEVEL {

template <class Real>
bool fits_lanes(const PosteriorArgs<Real>& args) {
  return fits_lanes<Real>(args.K, args.C, args.T * 2 * args.K * (args.K + args.C));
}

// A memory in each lane.
template <class Real>
struct MemoryLanes {
  LaneMatrix<Real> mean, cov;   // R [K, C], U [K, K] with both triangles
  LaneMatrix<Real> variances;   // the diagonal of U before the patterns, which their rounding is measured by
  LaneMatrix<Real> gain, loss;  // g, a of the patterns that wait [kWaiting, K]
  LaneMatrix<Real> innovation;  // their δ [kWaiting, C]
};

constexpr int64_t kWaiting = 4;

// Patterns that wait in float32 lose digits that the literal loop keeps when they take more of e than this many times
// what they leave of it.
constexpr int kMostTaken = 7;

template <class Real>
MemoryLanes<Real> allocate_memory_lanes(int64_t K, int64_t C, Arena& arena) {
  const auto allocate = [&](int64_t rows, int64_t columns) { return allocate_lanes<Real>(arena, rows, columns); };
  return {allocate(K, C),        allocate(K, K),        allocate(1, K),
          allocate(kWaiting, K), allocate(kWaiting, K), allocate(kWaiting, C)};
}

// Copy memories in, and check their covariances, which the lower triangle then gives alone.
template <class Real>
LaneStatus<Real> load_memory_lanes(const MemoryLanes<Real>& memory, const PosteriorArgs<Real>& args,
                                   const Group& group) {
  load_lanes(memory.mean, args.mean, group);
  load_lanes(memory.cov, args.cov, group);
  LaneStatus<Real> status;
  status.expect_covariance(lane_symmetry(memory.cov));
  for (int64_t i = 0; i < args.K; ++i)
    for (int64_t j = 0; j < i; ++j) memory.cov.set(j, i, memory.cov.get(i, j));
  return status;
}

// Copy memories to the caller. One that is refused comes out as it came in, because results may replace arguments.
template <class Real>
void store_memory_lanes(const MemoryLanes<Real>& memory, const PosteriorArgs<Real>& args, const Group& group,
                        const LaneStatus<Real>& status) {
  const auto restore = [&](const LaneMatrix<Real>& to, const Batch<const Real>& from, int64_t lane) {
    for (int64_t i = 0; i < to.rows; ++i)
      for (int64_t j = 0; j < to.columns; ++j) to.at(i, j)[lane] = *from.at(group.first + lane, i, j);
  };
  for (int64_t lane = 0; lane < group.count; ++lane) {
    if (status.code[lane] == kGood) continue;
    restore(memory.mean, args.mean, lane);
    restore(memory.cov, args.cov, lane);
  }
  store_lanes(args.new_mean, memory.mean, group);
  store_lanes(args.new_cov, memory.cov, group);
}

// The patterns of a group: masked ones are zero, with a variance of one where a lane has no memory.
template <class Real>
struct PatternLanes {
  LaneMatrix<Real> values, noise_var;                  // [T, C], [T, 1]
  LaneMatrix<Real> explained, innovation_var, energy;  // e, s, ‖E‖² [T, 1], which conditioning finds
};

// Row `t` of the patterns, where it is masked.
template <class Real>
void clear_masked_row(const LaneMatrix<Real>& row, const PosteriorArgs<Real>& args, int64_t t, const Group& group) {
  for (int64_t lane = 0; args.mask.data && lane < group.count; ++lane)
    for (int64_t j = 0; !args.unmasked(group.first + lane, t) && j < row.columns; ++j) row.at(0, j)[lane] = 0;
}

template <class Real>
void clear_masked(const LaneMatrix<Real>& rows, const PosteriorArgs<Real>& args, const Group& group) {
  for (int64_t t = 0; t < args.T; ++t) clear_masked_row(rows.row(t), args, t, group);
}

template <class Real>
PatternLanes<Real> load_pattern_lanes(const PosteriorArgs<Real>& args, const Group& group, Arena& arena) {
  const auto allocate = [&](int64_t columns) { return allocate_lanes<Real>(arena, args.T, columns); };
  const PatternLanes<Real> patterns{allocate(args.C), allocate(1), allocate(1), allocate(1), allocate(1)};
  load_lanes(patterns.values, args.values, group);
  load_lanes(patterns.noise_var, args.noise_var, group);
  for (int64_t t = 0; t < args.T; ++t)
    for (int64_t lane = group.count; lane < kLanes<Real>; ++lane) patterns.noise_var.at(t)[lane] = 1;
  clear_masked(patterns.values, args, group);
  return patterns;
}

// (1) of pattern `t` with weights `w`, while `waiting` patterns wait before it, and what is reported of it.
template <class Real>
void innovate(const MemoryLanes<Real>& memory, int64_t waiting, const LaneMatrix<Real>& w,
              const PatternLanes<Real>& patterns, int64_t t, LaneStatus<Real>& status) {
  const int64_t K = memory.cov.rows, C = memory.mean.columns;
  const LaneMatrix<Real> a = memory.loss.row(waiting), g = memory.gain.row(waiting),
                         delta = memory.innovation.row(waiting);
  lane_product(a, memory.cov, w);
  lane_residual(delta, patterns.values.row(t), memory.mean, w);
  Vec<Real> taken = {};  // from e by the patterns that wait
  for (int64_t n = 0; n < waiting; ++n) {
    const Vec<Real> c = lane_dot(K, memory.gain.at(n), w.data);
    taken += c * c * patterns.innovation_var.get(t - waiting + n, 0);
    lane_subtract<Real>(a, c, memory.loss.row(n));
    lane_subtract<Real>(delta, c, memory.innovation.row(n));
  }
  const Vec<Real> noise_var = patterns.noise_var.get(t, 0), found = lane_dot(K, w.data, a.data);
  const Vec<Real> explained = found > 0 ? found : Vec<Real>{}, s = explained + noise_var;
  for (int64_t k = 0; k < K; ++k) g.set(k, a.get(k) / s);
  patterns.explained.set(t, 0, explained);
  patterns.innovation_var.set(t, 0, s);
  patterns.energy.set(t, 0, lane_dot(C, delta.data, delta.data) / s);

  const Real slack = rounding_slack(K, 1, Real(1)), least = kLeastDigits * std::numeric_limits<Real>::epsilon();
  const Vec<Real> size = found > 0 ? found : -found;
  Vec<Real> rounding = {};
  for (int64_t k = 0; k < K; ++k) rounding += w.get(k) * w.get(k) * memory.variances.get(k);
  status.expect((found >= -slack * (size + noise_var)) & (size <= std::numeric_limits<Real>::max()),
                kNotPositiveDefinite);
  status.expect(explained * (noise_var / s) >= least * rounding, kLost);
  if (kHasDouble<Real>) status.expect(taken <= kMostTaken * explained, kInexactCovariance);
}

// (2) for the patterns that wait. COUNT of them is known at compile time, so that their numbers stay in registers.
template <int64_t COUNT, class Real>
void add_innovations(const MemoryLanes<Real>& memory) {
  for (int64_t i = 0; i < memory.mean.rows; ++i) {
    Vec<Real> g[COUNT];
    for (int64_t n = 0; n < COUNT; ++n) g[n] = memory.gain.get(n, i);
    for (int64_t j = 0; j < memory.mean.columns; ++j) {
      Vec<Real> entry = memory.mean.get(i, j);
      for (int64_t n = 0; n < COUNT; ++n) entry += g[n] * memory.innovation.get(n, j);
      memory.mean.set(i, j, entry);
    }
    for (int64_t j = 0; j <= i; ++j) {
      Vec<Real> entry = memory.cov.get(i, j);
      for (int64_t n = 0; n < COUNT; ++n) entry -= g[n] * memory.loss.get(n, j);
      memory.cov.set(i, j, entry);
      memory.cov.set(j, i, entry);
    }
  }
}

// The mean after the pattern that waits: the first line of (2).
template <class Real>
void add_innovation_to(const LaneMatrix<Real>& mean, const MemoryLanes<Real>& memory) {
  for (int64_t i = 0; i < mean.rows; ++i) {
    const Vec<Real> g = memory.gain.get(0, i);
    for (int64_t j = 0; j < mean.columns; ++j) mean.set(i, j, memory.mean.get(i, j) + g * memory.innovation.get(0, j));
  }
}

template <class Real>
void add_innovations(const MemoryLanes<Real>& memory, int64_t count) {
  static_assert(kWaiting == 4);
  if (count == 4) return add_innovations<4>(memory);
  if (count == 3) return add_innovations<3>(memory);
  if (count == 2) return add_innovations<2>(memory);
  if (count == 1) return add_innovations<1>(memory);
}

// Before every kChunk patterns: the variances that their rounding is measured by.
template <class Real>
void note_variances(const MemoryLanes<Real>& memory, int64_t t) {
  if (t % kChunk == 0)
    for (int64_t k = 0; k < memory.cov.rows; ++k) memory.variances.set(k, memory.cov.get(k, k));
}

// The reports of all patterns to the caller's memory. The energies make way for the divergences.
template <class Real>
void store_report_lanes(const PosteriorArgs<Real>& args, const PatternLanes<Real>& patterns, const Group& group) {
  constexpr int64_t W = kLanes<Real>;
  constexpr Real kTwoPi = Real(6.283185307179586476925286766559);
  const Real C = static_cast<Real>(args.C);
  double log_evidence[W] = {};
  Vec<Real> log_noise = {}, log_noise_of = {};  // ln(2πσ²) of the last σ²; patterns often share one
  for (int64_t t = 0; t < args.T; ++t) {
    const Vec<Real> noise = patterns.noise_var.get(t, 0), reciprocal = 1 / patterns.innovation_var.get(t, 0);
    const Vec<Real> beta = patterns.explained.get(t, 0) * reciprocal, energy = patterns.energy.get(t, 0);
    const Vec<Real> divergence = lane_variance_divergence<Real>(noise * reciprocal, -beta);
    patterns.energy.set(t, 0, Real(0.5) * (C * divergence + beta * energy));
    if (!args.log_evidence) continue;
    if (__builtin_memcmp(&noise, &log_noise_of, sizeof noise) != 0) {
      log_noise = lane_log<Real>(kTwoPi * noise);
      log_noise_of = noise;
    }
    const Vec<Real> term = Real(-0.5) * (C * (divergence + beta + log_noise) + energy);
    for (int64_t lane = 0; lane < group.count; ++lane)
      if (args.unmasked(group.first + lane, t)) log_evidence[lane] += term[lane];
  }
  store_lanes(args.innovation_var, patterns.innovation_var, group);
  store_lanes(args.kl, patterns.energy, group);
  for (int64_t lane = 0; args.log_evidence && lane < group.count; ++lane)
    args.log_evidence[group.first + lane] = static_cast<Real>(log_evidence[lane]);
}

template <class Real>
void update_posterior_lanes(const PosteriorArgs<Real>& args, int64_t begin, int64_t end) {
  each_group<Real>(begin, end, [&](const Group& group) {
    Arena& arena = Arena::fresh();
    const MemoryLanes<Real> memory = allocate_memory_lanes<Real>(args.K, args.C, arena);
    const LaneMatrix<Real> weights = allocate_lanes<Real>(arena, args.T, args.K);
    LaneStatus<Real> status = load_memory_lanes(memory, args, group);
    load_lanes(weights, args.weights, group);
    clear_masked(weights, args, group);
    const PatternLanes<Real> patterns = load_pattern_lanes(args, group, arena);
    for (int64_t first = 0; first < args.T; first += kWaiting) {
      const int64_t count = smaller(kWaiting, args.T - first);
      note_variances(memory, first);
      for (int64_t n = 0; n < count; ++n) innovate(memory, n, weights.row(first + n), patterns, first + n, status);
      add_innovations(memory, count);
    }
    store_memory_lanes(memory, args, group, status);
    store_report_lanes(args, patterns, group);
    status.store(args.info, group);
  });
}

}  // namespace fastkm::FASTKM_LEVEL
