// The write of a memory of which only inner products are known: the search of search.h, and what follows of the
// covariance. Where the columns of a memory are split over processes, these products are sums over all of them.
//
// With Y = [R; Z], the argument is Y Yᵀ = [G Xᵀ; X Q], for all patterns. A chunk of patterns goes as in write.h, but
// without the codes:
//   (1)  W, c, a and d by search.h or search_refactored.h, from G, X and Q of the chunk
//   (2)  L and G of conditioning.h (2) from them, U' by (3) and the reports by (4) there, with ‖E_t‖² = d_t/s_t
//   (3)  Y Yᵀ follows: the update R' = R + Gᵀ E with E = L⁻¹ (Z − W R), of its rows [R Yᵀ], then of its columns.
// (3) is left out after the last chunk. Bytes: (K + T)² + 2 K² numbers. Operations of a chunk: K³ + 10 t K² for (1),
// t K² for (2), 8 t K (K + T) for (3).
//
// Reported too are the pivots of Y Yᵀ + λI, K² T + T² K operations: beside its diagonal they tell whether products that
// were rounded before they came here hold the system.
#pragma once

#include "cpu/writing/write.h"

namespace fastkm::FASTKM_LEVEL {

// The inner products of one memory and all its patterns, in working memory.
template <class Real>
struct Products {
  Matrix<Real> all;  // Y Yᵀ [K + T, K + T]
  int64_t K;

  Matrix<Real> gram() const { return all.block(0, K, 0, K); }
  Matrix<Real> rows_of_memory() const { return all.rows_from(0, K); }
  Matrix<Real> rows_of_patterns(int64_t first, int64_t count) const { return all.rows_from(K + first, count); }
};

// Masked patterns may hold anything, even NaN.
template <class Real>
Products<Real> load_products(const GramWritingArgs<Real>& args, int64_t b, const Observations<Real>& observed,
                             Arena& arena) {
  const int64_t K = args.writing.posterior.K, T = args.writing.posterior.T;
  const Matrix<Real> all = allocate_matrix<Real>(arena, K + T, K + T);
  load_matrix(all, args.gram, b);
  for (int64_t t = 0; t < T; ++t) {
    if (observed.unmasked[t]) continue;
    for (int64_t i = 0; i < K + T; ++i) all.row(i)[K + t] = 0;
    __builtin_memset(all.row(K + t), 0, static_cast<size_t>(K + T) * sizeof(Real));
  }
  return {all, K};
}

// G, X, Q and U of a chunk. With `owns`, U is a copy, because the search that factors anew changes it.
template <class Real>
GramSpace<Real> gram_space_of(const Products<Real>& products, const Matrix<Real>& cov, const WrittenChunk& at,
                              int64_t count, bool owns, Arena& arena) {
  const int64_t K = products.K;
  const auto copy = [&](const Matrix<Real>& from) {
    const Matrix<Real> to = allocate_matrix<Real>(arena, from.rows, K);
    copy_rows(to, from);
    clear_padding(to);
    return to;
  };
  return {.gram = copy(products.gram()),
          .cross = copy(products.all.block(K + at.first, count, 0, K)),
          .inner = products.all.block(K + at.first, count, K + at.first, count),
          .cov = owns ? copy(cov) : cov};
}

// The pivots of Y Yᵀ + λI, if its first K rows have the factor `factor`; zero where there is none.
template <class Real>
void store_pivots(const GramWritingArgs<Real>& args, int64_t b, const Products<Real>& products,
                  const Factor<Real>& factor, bool factored, Real ridge, Arena& arena) {
  const int64_t K = products.K, T = products.all.rows - K;
  const Matrix<Real> across = allocate_cleared<Real>(arena, K, T), solved = allocate_cleared<Real>(arena, K, T);
  transpose(across, products.all.block(K, T, 0, K));
  if (factored) solve_lower(solved, factor, across, 0, {}, across);
  const Factor<Real> rest = allocate_factor<Real>(arena, T);
  copy_rows(rest.lower, products.all.block(K, T, K, T));
  if (factored) product_lower<Into::kSubtract>(rest.lower, K, transposed(solved), solved);
  for (int64_t t = 0; t < T; ++t) rest.lower.row(t)[t] += ridge;
  const bool all_factored = factored && cholesky(rest, arena);
  const auto store_from = [&](int64_t first, const Factor<Real>& f, bool good) {
    for (int64_t i = 0; i < f.size(); ++i)
      *args.pivots.at(b, first + i) = good ? f.lower.row(i)[i] * f.lower.row(i)[i] : 0;
  };
  store_from(0, factor, factored);
  store_from(K, rest, all_factored);
}

// (3). `factor` is that of the chunk from pattern `first` on.
template <class Real>
void update_products(const Products<Real>& products, int64_t first, const Matrix<Real>& weights,
                     const Matrix<Real>& gain, const Factor<Real>& factor, Arena& arena) {
  const int64_t K = products.K, both = products.all.rows, count = weights.rows;
  const auto update = [&](const Matrix<Real>& memory, const Matrix<Real>& patterns) {
    const Matrix<Real> innovations = allocate_matrix<Real>(arena, count, memory.columns);
    const Matrix<Real> whitened = allocate_matrix<Real>(arena, count, memory.columns);
    copy_rows(innovations, patterns);
    product<Into::kSubtract>(innovations, K, operand(weights), memory);
    solve_lower(whitened, factor, innovations, 0, {}, innovations);
    product<Into::kAdd>(memory, count, transposed(gain), whitened);
  };
  update(products.rows_of_memory(), products.rows_of_patterns(first, count));
  const Matrix<Real> columns = allocate_matrix<Real>(arena, both, K);
  transpose(columns, products.rows_of_memory());
  update(columns.rows_from(0, K), columns.rows_from(K + first, count));
  for (int64_t i = 0; i < both; ++i)
    __builtin_memcpy(products.all.row(i), columns.row(i), static_cast<size_t>(K) * sizeof(Real));
  mirror(products.gram());
}

// (1): the weights and `d` of a chunk, and what the search leaves if it factors once.
template <class Real>
Status search_chunk_of(const GramWritingArgs<Real>& args, const SearchSettings<Real>& settings, const WrittenChunk& at,
                       const Products<Real>& products, const GramSpace<Real>& space, Search<Real>& search, bool once,
                       const Matrix<Real>& weights, const Observations<Real>& observed, Real* d, Arena& arena) {
  const bool reports = at.first == 0 && args.pivots.data;
  Status status = kGood;
  if (once || reports) {
    const Factor<Real> system = allocate_factor<Real>(arena, space.size());
    const Matrix<Real> gram = once ? space.gram : allocate_matrix<Real>(arena, space.size(), space.size());
    if (!once) copy_rows(gram, space.gram);
    status = factor_system(system, gram, settings, arena);
    if (reports) store_pivots(args, at.b, products, system, status != kNotPositiveDefinite, settings.ridge, arena);
    if (once && status == kGood) {
      invert_cholesky(system, search.inverse.base, arena);
      clear_padding(search.inverse.base);
    }
  }
  if (!once) return find_weights_refactored(weights, space, observed, settings, arena, d);
  if (status == kGood) status = find_weights(weights, space, observed, settings, search, arena);
  __builtin_memcpy(d, search.d, static_cast<size_t>(weights.rows) * sizeof(Real));
  return status;
}

// One chunk of patterns. `is_last` says that nobody needs the products after it.
template <class Real>
Status write_gram_chunk(const GramWritingArgs<Real>& args, const SearchSettings<Real>& settings, const WrittenChunk& at,
                        const Products<Real>& products, const Matrix<Real>& cov, const Matrix<Real>& weights,
                        const Observations<Real>& observed, bool is_last, Arena& arena) {
  const int64_t K = cov.rows, count = weights.rows;
  const bool once = settings.factors_once() && count > 1;
  const GramSpace<Real> space = gram_space_of(products, cov, at, count, !once, arena);
  Search<Real> search = once ? allocate_search(space, arena) : Search<Real>{};
  Real energies[kLargestSearchChunk] = {};
  fill_zero(weights);
  Status status =
      search_chunk_of(args, settings, at, products, space, search, once, weights, observed, energies, arena);
  if (settings.limits.again(status)) return status;

  // (2)
  WhitenedRows<Real> chunk = allocate_whitened_rows(K, 0, count, observed, arena);
  const Factor<Real> factor = allocate_factor<Real>(arena, count);
  if (once) {
    gain_from_search(chunk, factor, search, 0, weights, cov, settings.limits, arena);
  } else {
    const Matrix<Real> projected = allocate_cleared<Real>(arena, count, K);
    product<Into::kSet>(projected, K, operand(weights), cov);
    whiten_gain<Direction::kIn>(chunk, factor, projected, weights, cov, settings.limits, arena);
  }
  status = status == kGood ? chunk.status : status;
  if (settings.limits.again(status)) return status;
  for (int64_t t = 0; t < count; ++t) energies[t] = (energies[t] > 0 ? energies[t] : 0) / chunk.pivot[t];
  store_reports<Real>(args.writing.posterior, at.b, at.first, chunk, energies, nullptr);
  product_lower<Into::kSubtract>(cov, count, transposed(chunk.gain), chunk.gain);
  mirror(cov);
  if (!is_last) update_products(products, at.first, weights, chunk.gain, factor, arena);
  return status;
}

// Memory `b`. One that is to be computed again is left half way.
template <class Real>
Status write_gram_one(const GramWritingArgs<Real>& args, int64_t b, const Limits<Real>& limits) {
  const PosteriorArgs<Real>& shared = args.writing.posterior;
  const SearchSettings<Real> settings = load_settings(args.writing, b, limits);
  const int64_t K = shared.K, T = shared.T, size = smaller(search_chunk(K), limits.chunk);
  Arena& arena = Arena::fresh();
  const Observations<Real> observed = load_observations(shared, b, 0, T, arena);
  const Products<Real> products = load_products(args, b, observed, arena);
  const Matrix<Real> cov = allocate_matrix<Real>(arena, K, K);
  const Matrix<Real> all_weights = allocate_matrix<Real>(arena, smaller(size, T), K);
  load_matrix(cov, shared.cov, b);
  Status status = symmetry(cov);
  if (T == 0 && args.pivots.data)  // nothing is solved, so that products of any digits do
    for (int64_t k = 0; k < K; ++k) *args.pivots.at(b, k) = *args.gram.at(b, k, k) + settings.ridge;
  const Arena::Mark chunk_start = arena.mark();
  for (int64_t first = 0; first < T; first += size) {
    arena.release(chunk_start);
    const int64_t count = smaller(size, T - first);
    const Matrix<Real> weights = all_weights.rows_from(0, count);
    const Status written = write_gram_chunk(args, settings, {b, first}, products, cov, weights, observed.from(first),
                                            first + count == T, arena);
    if (status == kGood) status = written;
    if (limits.again(status)) return status;
    store_matrix(args.writing.new_weights.from_row(first), b, weights);
  }
  store_matrix(shared.new_cov, b, cov);
  return status;
}

template <class Real>
void write_gram(const GramWritingArgs<Real>& args, int64_t begin, int64_t end) {
  const PosteriorArgs<Real>& shared = args.writing.posterior;
  const int64_t both = shared.K + shared.T;
  const Limits<Real> limits = limits_of<Real>(shared.K, smaller(shared.C, both));
  for (int64_t b = begin; b < end; ++b) {
    shared.info[b] = write_gram_one(args, b, limits);
    if constexpr (kHasDouble<Real>) {
      if (!limits.again(static_cast<Status>(shared.info[b]))) continue;
      Doubles doubles(b);
      const GramWritingArgs<double> wide{.writing = in_double(args.writing, doubles),
                                         .gram = doubles.symmetric_argument(args.gram, both),
                                         .pivots = {}};
      const auto write = [&](const Limits<double>& least) { return write_gram_one(wide, 0, least); };
      put_out(shared, b, wide.writing.posterior, compute_in_double(write), doubles);
    }
  }
}

}  // namespace fastkm::FASTKM_LEVEL
