// Removal of patterns that were written: equations (1) to (3) of conditioning.h for −U, a chunk of patterns at a time.
//
// Bound: as an update, whose products it shares. Algorithm: with −W U for W U, S is diag(σ²) − W U Wᵀ, and R' = R + Gᵀ
// E, U' = U + Gᵀ G. Kept: the memory between two chunks, in working memory. Promised: S is positive definite if and
// only if U holds the patterns. A memory that does not is reported as such; its results are finite but meaningless.
//
// A removal takes away from σ² what the memory explains of it, and has the digits of what is left. In float32 a memory
// is computed again in double where little is left, and refused where rounding U to float32 leaves less than two
// digits.
#pragma once

#include "cpu/posterior/conditioning.h"
#include "cpu/posterior/in_double.h"

namespace fastkm::FASTKM_LEVEL {

// Memory `b`. One that is to be computed again is left half way.
template <class Real>
Status remove_one(const PosteriorArgs<Real>& args, int64_t b, const Limits<Real>& limits) {
  const int64_t K = args.K, C = args.C, T = args.T;
  const int64_t size = smaller(chunk_size<Real>(K, C), limits.chunk), largest = smaller(size, T);
  Arena& arena = Arena::fresh();
  const MemoryRows<Real> work{allocate_cleared<Real>(arena, K, C), allocate_cleared<Real>(arena, K, K)};
  const MemoryRows<Real> result{view_or_work(args.new_mean, b, work.mean), view_or_work(args.new_cov, b, work.cov)};
  MemoryRows<Real> memory{view_or_copy(args.mean, b, work.mean), view_or_copy(args.cov, b, work.cov)};
  const Matrix<Real> weights_work = allocate_matrix<Real>(arena, largest, K);
  const Matrix<Real> values_work = allocate_matrix<Real>(arena, largest, C);
  Status status = symmetry(memory.cov);
  const Arena::Mark chunk_start = arena.mark();
  for (int64_t first = 0; first < T; first += size) {
    arena.release(chunk_start);
    const int64_t count = smaller(size, T - first);
    const Observations<Real> observed = load_observations(args, b, first, count, arena);
    const auto load = [&](const Batch<const Real>& from, const Matrix<Real>& to) {
      return view_or_copy_patterns(from.from_row(first), b, observed.unmasked, args.mask.data, to.rows_from(0, count));
    };
    const Matrix<Real> weights = load(args.weights, weights_work), values = load(args.values, values_work);
    const WhitenedRows<Real> chunk = whiten_rows<Direction::kOut>(memory, weights, values, observed, limits, arena);
    if (status == kGood) status = chunk.status;
    if (limits.again(status)) return status;
    const MemoryRows<Real>& after = first + count < T ? work : result;
    update_memory<Direction::kOut>(after, memory, chunk);
    memory = after;
  }
  store_memory(memory, args, b);
  return status;
}

template <class Real>
void remove_patterns(const PosteriorArgs<Real>& args, int64_t begin, int64_t end) {
  const Limits<Real> limits = limits_of<Real>(args.K, args.C);
  for (int64_t b = begin; b < end; ++b) {
    const Status status = remove_one(args, b, limits);
    args.info[b] = status;
    if constexpr (kHasDouble<Real>) {
      if (!limits.again(status)) continue;
      Doubles doubles(b);
      const PosteriorArgs<double> wide = in_double(args, doubles);
      const auto remove = [&](const Limits<double>& least) { return remove_one(wide, 0, least); };
      put_out(args, b, wide, compute_in_double(remove), doubles);
    }
  }
}

}  // namespace fastkm::FASTKM_LEVEL
