// The write: find the weights of a chunk of patterns in Gram space, then condition on all of them at once.
//
// A chunk of patterns Z is copied below the mean R, Y = [R; Z]. Then
//   (1)  Y Yᵀ = [G Xᵀ; X Q], one product                                    what the search needs
//   (2)  W by search.h, or by search_refactored.h                           in K and T, without the codes
//   (3)  R' and U' by (2) and (3) of posterior/conditioning.h               a block update
// The codes are read for (1) and (3) only. Bytes: the memory once a chunk, (K + t) C + K² numbers. Operations of a
// chunk: K² C for (1), K³ + 10 t K² for (2), 4 t K C for (3).
//
// One pattern alone is addressed by a read, which solves in C where that is cheaper, and then conditioned on.
//
// Every chunk starts from the mean itself, so that cost is linear in T and rounding does not build up over a long
// stream.
#pragma once

#include "cpu/posterior/conditioning.h"
#include "cpu/posterior/update.h"
#include "cpu/reading/read.h"
#include "cpu/writing/lanes.h"
#include "cpu/writing/search.h"
#include "cpu/writing/search_refactored.h"

namespace fastkm::FASTKM_LEVEL {

// (1) for a chunk below the mean in `stacked`. With `owns`, G and U are copies, because the search that factors anew
// changes them.
template <class Real>
GramSpace<Real> compute_gram_space(const MemoryRows<Real>& memory, const Matrix<Real>& stacked, bool owns,
                                   Arena& arena) {
  const int64_t K = memory.cov.rows, both = stacked.rows, count = both - K;
  const Matrix<Real> stacked_transposed = allocate_matrix<Real>(arena, stacked.columns, both);
  const Matrix<Real> products = allocate_matrix<Real>(arena, both, both);
  transpose(stacked_transposed, stacked);
  product_lower<Into::kSet>(products, stacked.columns, operand(stacked), stacked_transposed);
  const Matrix<Real> gram = products.block(0, K, 0, K), cross = products.block(K, count, 0, K);
  mirror(gram);
  const auto copy = [&](const Matrix<Real>& from) {
    const Matrix<Real> to = allocate_matrix<Real>(arena, from.rows, K);
    copy_rows(to, from);
    return to;
  };
  const GramSpace<Real> space{.gram = owns ? copy(gram) : gram,
                              .cross = copy(cross),
                              .inner = products.block(K, count, K, count),
                              .cov = owns ? copy(memory.cov) : memory.cov};
  for (const Matrix<Real>* m : {&space.gram, &space.cross, &space.cov}) clear_padding(*m);
  return space;
}

// (1) and G of (2) of conditioning.h from a search. For patterns [from, from + count) of it, with L̃ the
// c_earlier · w_t below a unit diagonal, S = L Lᵀ for L = L̃ diag(√s), and row t of G is a/√s.
template <class Real>
void gain_from_search(WhitenedRows<Real>& chunk, const Factor<Real>& factor, const Search<Real>& search, int64_t from,
                      const Matrix<Real>& weights, const Matrix<Real>& cov, const Limits<Real>& limits, Arena& arena) {
  const int64_t K = cov.rows, count = weights.rows;
  const Observations<Real>& observed = chunk.observed;
  Real std_dev[kLargestChunk];
  bool positive = true;
  for (int64_t t = 0; t < count; ++t) {
    Real s = search.explained[from + t];  // before σ² is added
    const Real noise = observed.noise_var[t], slack = rounding_slack(K, count, s + noise, limits.eps);
    positive &= check_pivot(s, AddedDiagonal<Real>{&noise, &slack, &chunk.explained[t]}, 0);
    chunk.pivot[t] = s;
    std_dev[t] = std::sqrt(s);
    const Real reciprocal = 1 / std_dev[t];
    Real *lower = factor.lower.row(t), *gain = chunk.gain.row(t);
    const Real *c_dot_w = search.c_dot_w.row(from + t) + from, *a = search.cov.right.row(from + t);
    for (int64_t j = 0; j < t; ++j) lower[j] = c_dot_w[j] * std_dev[j];
    lower[t] = std_dev[t];
    for (int64_t k = 0; k < chunk.gain.ld; ++k) gain[k] = a[k] * reciprocal;
  }
  const Real taken = static_cast<Real>(inner_product(chunk.gain, chunk.gain));
  chunk.status = chunk_status(positive, chunk, taken, observed, operand(cov), weights, limits, arena);
  invert_blocks(factor);
}

// (1) and (2) of conditioning.h from a search.
template <class Real>
WhitenedRows<Real> whiten_from_search(const MemoryRows<Real>& memory, const Search<Real>& search, int64_t from,
                                      const Matrix<Real>& weights, const Matrix<Real>& values,
                                      const Observations<Real>& observed, const Limits<Real>& limits, Arena& arena) {
  const int64_t count = weights.rows;
  WhitenedRows<Real> chunk = allocate_whitened_rows(memory.cov.rows, values.columns, count, observed, arena);
  const Factor<Real> factor = allocate_factor<Real>(arena, count);
  gain_from_search(chunk, factor, search, from, weights, memory.cov, limits, arena);
  whiten_values(chunk, factor, memory.mean, weights, values, arena);
  return chunk;
}

// Patterns of memory `b` from `first` on.
struct WrittenChunk {
  int64_t b, first;
};

// Find the weights of the chunk below the mean in `stacked`, and condition on it.
template <class Real>
Status write_chunk(const WritingArgs<Real>& args, const SearchSettings<Real>& settings, const WrittenChunk& at,
                   const MemoryRows<Real>& memory, const Matrix<Real>& stacked, const Matrix<Real>& weights,
                   const Observations<Real>& observed, Arena& arena) {
  const int64_t K = memory.cov.rows, count = weights.rows;
  // One pattern needs one solve; the inverse of the search would cost two more factorisations.
  const bool once = settings.factors_once() && count > 1;
  const GramSpace<Real> space = compute_gram_space(memory, stacked, !once, arena);
  fill_zero(weights);
  Search<Real> search = once ? allocate_search(space, arena) : Search<Real>{};
  Status status = once ? invert_system(search.inverse.base, space.gram, settings, arena) : kGood;
  if (status == kGood)
    status = once ? find_weights(weights, space, observed, settings, search, arena)
                  : find_weights_refactored(weights, space, observed, settings, arena);
  if (settings.limits.again(status)) return status;
  const Arena::Mark searched = arena.mark();
  const int64_t size = chunk_size<Real>(K, stacked.columns);
  for (int64_t t = 0; t < count; t += size) {
    arena.release(searched);
    const int64_t part = smaller(size, count - t);
    const Matrix<Real> found = weights.rows_from(t, part), values = stacked.rows_from(K + t, part);
    const Observations<Real> of = observed.from(t);
    const WhitenedRows<Real> chunk =
        once ? whiten_from_search(memory, search, t, found, values, of, settings.limits, arena)
             : whiten_rows(memory, found, values, of, settings.limits, arena);
    if (status == kGood) status = chunk.status;
    if (settings.limits.again(status)) return status;
    update_memory(memory, memory, chunk);
    store_reports<Real>(args.posterior, at.b, at.first + t, chunk, nullptr);
  }
  return status;
}

// Memory `b`. One that is to be computed again is left half way.
template <class Real>
Status write_one(const WritingArgs<Real>& args, int64_t b, const Limits<Real>& limits) {
  const PosteriorArgs<Real>& shared = args.posterior;
  const SearchSettings<Real> settings = load_settings(args, b, limits);
  const int64_t K = shared.K, T = shared.T;
  const int64_t size = smaller(search_chunk(K), limits.chunk), largest = smaller(size, T);
  Arena& arena = Arena::fresh();
  const Matrix<Real> stacked = allocate_matrix<Real>(arena, K + largest, shared.C);
  const Matrix<Real> all_weights = allocate_matrix<Real>(arena, largest, K);
  const MemoryRows<Real> memory{stacked.rows_from(0, K), allocate_matrix<Real>(arena, K, K)};
  Status status = load_memory(memory, shared, b);
  const Arena::Mark chunk_start = arena.mark();
  for (int64_t first = 0; first < T; first += size) {
    arena.release(chunk_start);
    const int64_t count = smaller(size, T - first);
    const Matrix<Real> weights = all_weights.rows_from(0, count);
    const Observations<Real> observed = load_observations(shared, b, first, count, arena);
    load_patterns(stacked.rows_from(K, count), shared.values.from_row(first), b, observed.unmasked);
    const Status written =
        write_chunk(args, settings, {b, first}, memory, stacked.rows_from(0, K + count), weights, observed, arena);
    if (status == kGood) status = written;
    if (settings.limits.again(status)) return status;
    store_matrix(args.new_weights.from_row(first), b, weights);
  }
  if (status != kGood && shared.keeps_refused) load_memory(memory, shared, b);
  store_memory(memory, shared, b);
  return status;
}

// Whether a write is the read of one pattern, whose weights the memory is then conditioned on.
template <class Real>
bool is_one_read(const WritingArgs<Real>& args) {
  const PosteriorArgs<Real>& shared = args.posterior;
  return shared.T == 1 && args.num_opt_iters == 1 && !args.squared_gram && !fits_lanes(shared);
}

// The weights of the one pattern of memory `b`; zero if it is masked.
template <class Real>
Status address_pattern(const WritingArgs<Real>& args, int64_t b) {
  const PosteriorArgs<Real>& shared = args.posterior;
  if (!shared.unmasked(b, 0)) {
    for (int64_t k = 0; k < shared.K; ++k) *args.new_weights.at(b, 0, k) = 0;
    return kGood;
  }
  read(ReadingArgs<Real>{.K = shared.K,
                         .C = shared.C,
                         .Q = 1,
                         .mean = shared.mean,
                         .queries = shared.values,
                         .ridge = args.ridge,
                         .num_iters = 1,
                         .squared_gram = false,
                         .values = {},
                         .weights = args.new_weights,
                         .info = shared.info},
       b, b + 1);
  return static_cast<Status>(shared.info[b]);
}

// Memory `b`, if is_one_read. One that cannot be addressed comes out as it came in.
template <class Real>
void write_one_read(const WritingArgs<Real>& args, int64_t b) {
  const Batch<Real>& weights = args.new_weights;
  PosteriorArgs<Real> update = args.posterior;
  update.weights = {weights.data, {weights.stride[0], weights.stride[1], weights.stride[2]}};
  const Status addressed = address_pattern(args, b);
  if (addressed == kGood) return update_posterior_into(update, b, b + 1);
  clear_reports(update, b, 0);
  close_memories(open_memories(update, b, Arena::fresh()), update, b);
}

inline WritingArgs<double> in_double(const WritingArgs<float>& args, Doubles& doubles) {
  return {.posterior = in_double(args.posterior, doubles),
          .ridge = doubles.argument(args.ridge, 1, 1),
          .num_opt_iters = args.num_opt_iters,
          .squared_gram = args.squared_gram,
          .new_weights = doubles.result(args.new_weights, args.posterior.T, args.posterior.K)};
}

template <class Real>
void write(const WritingArgs<Real>& args, int64_t begin, int64_t end) {
  const PosteriorArgs<Real>& shared = args.posterior;
  const Limits<Real> limits = limits_of<Real>(shared.K, shared.C);
  const bool lanes = fits_lanes(args);
  if (!lanes && is_one_read(args)) {
    for (int64_t b = begin; b < end; ++b) write_one_read(args, b);
    return;
  }
  if (lanes) write_lanes(args, begin, end);
  for (int64_t b = begin; b < end; ++b) {
    if (!lanes) shared.info[b] = write_one(args, b, limits);
    if constexpr (kHasDouble<Real>) {
      if (!limits.again(static_cast<Status>(shared.info[b]))) continue;
      Doubles doubles(b);
      const WritingArgs<double> wide = in_double(args, doubles);
      const auto write = [&](const Limits<double>& least) { return write_one(wide, 0, least); };
      put_out(shared, b, wide.posterior, compute_in_double(write), doubles);
    }
  }
}

}  // namespace fastkm::FASTKM_LEVEL
