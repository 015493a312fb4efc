// Update of the root S of a covariance U = S Sᵀ with given weights, a chunk of patterns at a time.
//
// Bound: three products of t K² operations with the root and two of t K C with the mean; a QR of the whole array costs
// another K³. Algorithm: the reflections of Householder that turn [[diag σ, 0], [(W S)ᵀ, Sᵀ]] into [[Lᵀ, G], [0, S'ᵀ]].
// The reflection of pattern t has one entry beside the K rows of Sᵀ, so that all of it stays in t vectors of length K:
//   (1)  P = W S
//   (2)  f_t = B_{t−1}ᵀ p_t,  s_t = ‖f_t‖² + σ_t²,  B_t = B_{t−1} (I − f_t f_tᵀ/c_t),  c_t = √s_t (√s_t + σ_t)
//   (3)  h_t = B_{t−1} f_t / √s_t,  L_tt = √s_t,  L_ti = f_i · (B_{i−1}ᵀ p_t) / √s_i for i < t
//   (4)  Gᵀ = S Hᵀ,  E = L⁻¹ (Z − W R),  R' = R + Gᵀ E,  S' = S − Gᵀ diag(1/(√s + σ)) F.
// B is never made: it is applied one reflection after the other. Kept: F, H and L, [t, K] and [t, t]. Promised: no
// difference of two large numbers is taken, so nothing can become negative, whatever σ² is. S' is not triangular.
#pragma once

#include <cmath>

#include "cpu/linalg/vectors.h"
#include "cpu/posterior/conditioning.h"

namespace fastkm::FASTKM_LEVEL {

// The reflections of a chunk.
template <class Real>
struct Reflections {
  Matrix<Real> forward;   // F [t, K], zero in its padding
  Matrix<Real> backward;  // H [t, K], likewise
  Matrix<Real> along;     // f_i · x of each reflection that makes a row of H, below the diagonal [t, t]
  Factor<Real> factor;    // L [t, t]
  Real* scale;            // 1/c [t]
};

// x −= f (f · x) / c. Returns f · x.
template <class Real>
Real reflect(Real* x, const Real* f, Real scale, int64_t padded) {
  const Real along = dot(padded, f, x);
  add_scaled(padded, x, -along * scale, f);
  return along;
}

// (2) and (3). The rows of `projected`, P, become F. Every row depends on those before it; the work is t² K, of one
// thread.
template <class Real>
Reflections<Real> find_reflections(const Matrix<Real>& projected, const Real* noise_var, Arena& arena) {
  const int64_t count = projected.rows, K = projected.columns, padded = round_up(K, kLanes<Real>);
  const Reflections<Real> found{projected, allocate_zero<Real>(arena, count, K),
                                allocate_matrix<Real>(arena, count, count), allocate_factor<Real>(arena, count),
                                arena.allocate<Real>(count)};
  for (int64_t t = 0; t < count; ++t) {
    Real *const f = found.forward.row(t), *const h = found.backward.row(t), *const lower = found.factor.lower.row(t);
    for (int64_t i = 0; i < t; ++i)
      lower[i] = reflect(f, found.forward.row(i), found.scale[i], padded) / found.factor.lower.row(i)[i];
    const Real deviation = std::sqrt(dot(padded, f, f) + noise_var[t]);
    lower[t] = deviation;
    found.scale[t] = 1 / (deviation * (deviation + std::sqrt(noise_var[t])));
    __builtin_memcpy(h, f, static_cast<size_t>(padded) * sizeof(Real));
    for (int64_t i = t - 1; i >= 0; --i)
      found.along.row(t)[i] = reflect(h, found.forward.row(i), found.scale[i], padded);
    for (int64_t k = 0; k < padded; ++k) h[k] /= deviation;
  }
  invert_blocks(found.factor);
  return found;
}

// A chunk of patterns against the memory before it.
template <class Real>
struct ReflectedRows {
  Reflections<Real> found;
  Matrix<Real> gain_transposed;  // Gᵀ [K, t]
  Matrix<Real> shrunk;           // diag(1/(√s + σ)) F [t, K]
  Matrix<Real> values;           // E [t, C]
};

// (1) to (4) but for the new memory. The `cov` of a memory is its root.
template <class Real>
ReflectedRows<Real> reflect_rows(const MemoryRows<Real>& memory, const Matrix<Real>& weights,
                                 const Matrix<Real>& values, const Observations<Real>& observed, Arena& arena) {
  const int64_t K = memory.cov.rows, C = memory.mean.columns, count = weights.rows;
  const Matrix<Real> projected = allocate_zero<Real>(arena, count, K);
  product<Into::kSet>(projected, K, operand(weights), memory.cov);
  clear_padding(projected);
  const ReflectedRows<Real> chunk{find_reflections(projected, observed.noise_var, arena),
                                  allocate_matrix<Real>(arena, K, count), allocate_matrix<Real>(arena, count, K),
                                  allocate_cleared<Real>(arena, count, C)};
  const Factor<Real>& factor = chunk.found.factor;
  product<Into::kSet>(chunk.gain_transposed, K, operand(memory.cov), transposed_copy(chunk.found.backward, arena));
  copy_rows(chunk.shrunk, chunk.found.forward);
  for (int64_t t = 0; t < count; ++t)
    scale(chunk.shrunk.rows_from(t, 1), 1 / (factor.lower.row(t)[t] + std::sqrt(observed.noise_var[t])));
  const WhitenedRows<Real> whitened{.gain = {}, .values = chunk.values, .observed = observed};
  whiten_values(whitened, factor, memory.mean, weights, values, arena);
  return chunk;
}

// The new memory of (4). `after` may be `before`.
template <class Real>
void update_root(const MemoryRows<Real>& after, const MemoryRows<Real>& before, const ReflectedRows<Real>& chunk) {
  const int64_t count = chunk.values.rows;
  product<Into::kAdd>(after.mean, before.mean, count, operand(chunk.gain_transposed), chunk.values);
  product<Into::kSubtract>(after.cov, before.cov, count, operand(chunk.gain_transposed), chunk.shrunk);
}

// Whether all entries are finite: x − x is zero if x is, and else NaN.
template <class Real>
bool is_finite(const Matrix<Real>& m) {
  constexpr int64_t W = kLanes<Real>;
  Vec<Real> sum = {};
  Real rest = 0;
  for (int64_t i = 0; i < m.rows; ++i) {
    const Real* row = m.row(i);
    int64_t j = 0;
    for (; j + W <= m.columns; j += W) sum += load(row + j) - load(row + j);
    for (; j < m.columns; ++j) rest += row[j] - row[j];
  }
  return lane_sum<Real>(sum) + rest == 0;
}

// Copy the root in if its rows would evict each other from the cache: in G it is a left operand, whose rows are read
// side by side.
template <class Real>
Matrix<Real> view_or_copy_root(const Batch<const Real>& from, int64_t b, const Matrix<Real>& work) {
  if (!shares_cache_sets<Real>(from.stride[1])) return view_or_copy(from, b, work);
  load_matrix(work, from, b);
  return work;
}

// Memory `b`, whose `cov` is a root. It ends in working memory or in the caller's rows.
template <class Real>
Status update_square_root_one(const PosteriorArgs<Real>& args, int64_t b) {
  const int64_t K = args.K, C = args.C, T = args.T, size = chunk_size<Real>(K, C), largest = smaller(size, T);
  Arena& arena = Arena::fresh();
  const MemoryRows<Real> work{allocate_cleared<Real>(arena, K, C), allocate_cleared<Real>(arena, K, K)};
  const MemoryRows<Real> result{view_or_work(args.new_mean, b, work.mean), view_or_work(args.new_cov, b, work.cov)};
  MemoryRows<Real> memory{view_or_copy(args.mean, b, work.mean), view_or_copy_root(args.cov, b, work.cov)};
  const Matrix<Real> weights_work = allocate_matrix<Real>(arena, largest, K);
  const Matrix<Real> values_work = allocate_matrix<Real>(arena, largest, C);
  const Arena::Mark chunk_start = arena.mark();
  for (int64_t first = 0; first < T; first += size) {
    arena.release(chunk_start);
    const int64_t count = smaller(size, T - first);
    const Observations<Real> observed = load_observations(args, b, first, count, arena);
    const auto load = [&](const Batch<const Real>& from, const Matrix<Real>& to) {
      return view_or_copy_patterns(from.from_row(first), b, observed.unmasked, args.mask.data, to.rows_from(0, count));
    };
    const Matrix<Real> weights = load(args.weights, weights_work), values = load(args.values, values_work);
    const MemoryRows<Real>& after = first + count < T ? work : result;
    update_root(after, memory, reflect_rows(memory, weights, values, observed, arena));
    memory = after;
  }
  store_memory(memory, args, b);
  return is_finite(memory.cov) ? kGood : kNotPositiveDefinite;
}

template <class Real>
void update_square_root(const PosteriorArgs<Real>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) args.info[b] = update_square_root_one(args, b);
}

}  // namespace fastkm::FASTKM_LEVEL
