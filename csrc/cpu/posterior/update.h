// Posterior update with given weights: equations (1) to (5) of conditioning.h, a chunk of patterns at a time.
//
// Bytes: every argument is read and every result written once, if a memory fits the cache. The first chunk reads the
// caller's memory and patterns where they are, if products run well on them; the last chunk writes the caller's result.
// In between the memory is in working memory.
#pragma once

#include "cpu/posterior/conditioning.h"
#include "cpu/posterior/in_double.h"
#include "cpu/posterior/lanes.h"
#include "cpu/posterior/update_into.h"

namespace fastkm::FASTKM_LEVEL {

// Prefetch the next memory, its patterns and its results. Small memories arrive in time without it, and of large ones
// two do not fit the cache.
template <class Real>
Prefetch plan_update_prefetch(const PosteriorArgs<Real>& args, int64_t b, int64_t end) {
  constexpr int64_t kLeastBytes = 1 << 17, kMostBytes = 1 << 19;
  const int64_t K = args.K, C = args.C, patterns = args.T;
  const int64_t rows = kChunk / FASTKM_TILE_ROWS, tiles = (2 * rows + K / FASTKM_TILE_ROWS) * strips<Real>(C);
  Prefetch prefetch(1 + (patterns + kChunk - 1) / kChunk * (tiles + rows * strips<Real>(K)));
  const int64_t bytes = (2 * K + patterns) * (K + C) * static_cast<int64_t>(sizeof(Real));
  if (b == end || bytes < kLeastBytes || bytes > kMostBytes) return prefetch;
  prefetch.add(args.cov, b, 0, K, K);
  prefetch.add(args.weights, b, 0, patterns, K);
  prefetch.add(args.mean, b, 0, K, C);
  prefetch.add(args.values, b, 0, patterns, C);
  prefetch.add(args.new_cov, b, 0, K, K);
  prefetch.add(args.new_mean, b, 0, K, C);
  return prefetch;
}

// One pattern for a memory that does not fit the first caches: it is then bound by the bytes of the memory.
template <class Real>
bool is_one_large_step(const PosteriorArgs<Real>& args) {
  constexpr int64_t kManyBytes = 1 << 18;
  return args.T == 1 && args.K * (args.K + args.C) * static_cast<int64_t>(sizeof(Real)) >= kManyBytes;
}

// Memory `b` of a batch that ends at `end`. One that is to be computed again is left half way.
template <class Real>
Status update_one(const PosteriorArgs<Real>& args, int64_t b, int64_t end, const Limits<Real>& limits) {
  const int64_t K = args.K, C = args.C, T = args.T;
  const int64_t size = smaller(chunk_size<Real>(K, C), limits.chunk), largest = smaller(size, T);
  const bool masks = args.mask.data;
  Arena& arena = Arena::fresh();
  const MemoryRows<Real> work{allocate_cleared<Real>(arena, K, C), allocate_cleared<Real>(arena, K, K)};
  const MemoryRows<Real> result{view_or_work(args.new_mean, b, work.mean), view_or_work(args.new_cov, b, work.cov)};
  MemoryRows<Real> memory{view_or_copy(args.mean, b, work.mean), view_or_copy(args.cov, b, work.cov)};
  const Matrix<Real> weights_work = allocate_matrix<Real>(arena, largest, K);
  const Matrix<Real> values_work = allocate_matrix<Real>(arena, largest, C);
  Prefetch prefetch = plan_update_prefetch(args, b + 1, end);
  Status status = symmetry(memory.cov);
  double log_evidence = 0;  // a sum over all patterns
  const Arena::Mark chunk_start = arena.mark();
  for (int64_t first = 0; first < T; first += size) {
    arena.release(chunk_start);
    const int64_t count = smaller(size, T - first);
    const Observations<Real> observed = load_observations(args, b, first, count, arena);
    const auto load = [&](const Batch<const Real>& from, const Matrix<Real>& to) {
      return view_or_copy_patterns(from.from_row(first), b, observed.unmasked, masks, to.rows_from(0, count));
    };
    const Matrix<Real> weights = load(args.weights, weights_work), values = load(args.values, values_work);
    const WhitenedRows<Real> chunk = whiten_rows(memory, weights, values, observed, limits, arena, &prefetch);
    if (status == kGood) status = chunk.status;
    if (limits.again(status)) return status;  // before the caller's memory is written, which may be `memory`
    const MemoryRows<Real>& after = first + count < T ? work : result;
    update_memory(after, memory, chunk, &prefetch);
    store_reports(args, b, first, chunk, &log_evidence);
    memory = after;
  }
  store_memory(memory, args, b);
  store_log_evidence(args, b, log_evidence);
  return status;
}

// Patterns from `progress.done` on, in double. The results hold the memory before them.
inline void update_rest_in_double(const PosteriorArgs<float>& args, int64_t b, const Progress& progress) {
  const auto argument = [](const Batch<float>& of) {
    return Batch<const float>{of.data, {of.stride[0], of.stride[1], of.stride[2]}};
  };
  const int64_t first = progress.done;
  PosteriorArgs<float> rest = args;
  rest.T -= first;
  rest.mean = argument(args.new_mean);
  rest.cov = argument(args.new_cov);
  rest.weights = args.weights.from_row(first);
  rest.values = args.values.from_row(first);
  rest.noise_var = args.noise_var.from_row(first);
  if (args.mask.data) rest.mask = args.mask.from_row(first);
  rest.innovation_var = args.innovation_var.from_row(first);
  rest.kl = args.kl.from_row(first);
  Doubles doubles(b);
  const PosteriorArgs<double> wide = in_double(rest, doubles);
  const auto update = [&](const Limits<double>& limits) { return update_one(wide, 0, 1, limits); };
  put_out(rest, b, wide, compute_in_double(update), doubles);
  if (args.log_evidence) args.log_evidence[b] += static_cast<float>(progress.log_evidence);
}

template <class Real>
void update_posterior_into(const PosteriorArgs<Real>& args, int64_t begin, int64_t end);

template <class Real>
void update_posterior(const PosteriorArgs<Real>& args, int64_t begin, int64_t end) {
  const bool lanes = fits_lanes(args);
  if (!lanes && is_one_large_step(args)) return update_posterior_into(args, begin, end);
  const Limits<Real> limits = limits_of<Real>(args.K, args.C);
  if (lanes) update_posterior_lanes(args, begin, end);
  for (int64_t b = begin; b < end; ++b) {
    if (!lanes) args.info[b] = update_one(args, b, end, limits);
    if constexpr (kHasDouble<Real>) {
      if (!limits.again(static_cast<Status>(args.info[b]))) continue;
      Doubles doubles(b);
      const PosteriorArgs<double> wide = in_double(args, doubles);
      const auto update = [&](const Limits<double>& least) { return update_one(wide, 0, 1, least); };
      put_out(args, b, wide, compute_in_double(update), doubles);
    }
  }
}

// The same into a memory of the caller, which may be the one that is updated.
template <class Real>
void update_posterior_into(const PosteriorArgs<Real>& args, int64_t begin, int64_t end) {
  if (fits_lanes(args)) return update_posterior(args, begin, end);
  const Limits<Real> limits = limits_of<Real>(args.K, args.C);
  for (int64_t b = begin; b < end; ++b) {
    const Progress progress = update_by_passes(args, b, limits);
    args.info[b] = progress.status;
    if constexpr (kHasDouble<Real>)
      if (limits.again(progress.status)) update_rest_in_double(args, b, progress);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
