// The search for the weights of a chunk of patterns in Gram space.
//
// Each pattern's weights depend on what was written before it, but only through inner products. With A = R Rᵀ + λI,
// X = Z Rᵀ and Q = Z Zᵀ the search lives in K and T.
#pragma once

#include "cpu/linalg/low_rank.h"
#include "cpu/posterior/conditioning.h"

namespace fastkm::FASTKM_LEVEL {

// Patterns whose weights are found before the mean is moved. A chunk costs a Gram product, a factor and an inverse, and
// each of its patterns a correction for those before it.
constexpr int64_t kLargestSearchChunk = 2 * kChunk;
inline int64_t search_chunk(int64_t K) { return K < 128 ? kChunk : kLargestSearchChunk; }

// What the search for the weights needs, kept up to date with what was written.
template <class Real>
struct GramSpace {
  Matrix<Real> gram;     // G = R Rᵀ [K, K]
  Matrix<Real> cross;    // X = Z Rᵀ [T, K]
  Matrix<Real> inner;    // Q = Z Zᵀ [T, T], lower triangle
  Matrix<Real> cov;      // U [K, K]
  Matrix<Real> weights;  // [T, K], out
};

// The search as it went, for what conditions on it and for its backward. Rows are patterns, those of masked ones zero.
template <class Real>
struct Search {
  LowRankDifference<Real> inverse;  // H = A⁻¹: by p eᵀ + q fᵀ a pattern that is seen
  LowRankDifference<Real> cov;      // U: by c aᵀ, row for row
  Matrix<Real> past;                // [t, t], c_earlier · w_t
  Matrix<Real> along;               // [t, t], δ_t · z_later
  Real s[kLargestSearchChunk] = {}, d[kLargestSearchChunk] = {};
};

// The patterns still to come, after one with weights w moved the mean by c δᵀ: x ← x + c (δ · z). With `solved`, rows
// A⁻¹ x with the A that the chunk began with follow: by `solved_c`, that of c.
template <class Real>
void update_cross(const GramSpace<Real>& space, int64_t t, const Real* w, const Real* c, int64_t padded,
                  Real* delta_dot_z, const Matrix<Real>* solved = nullptr, const Real* solved_c = nullptr) {
  constexpr int64_t W = kLanes<Real>;
  for (int64_t later = t + 1; later < space.cross.rows; ++later) {
    Real* x = space.cross.row(later);
    const Real along = space.inner.row(later)[t] - dot(padded, w, x);
    for (int64_t i = 0; i < padded; i += W) store<Real>(x + i, load(x + i) + along * load(c + i));
    if (delta_dot_z) delta_dot_z[later] = along;
    if (!solved) continue;
    Real* h = solved->row(later);
    for (int64_t i = 0; i < padded; i += W) store<Real>(h + i, load(h + i) + along * load(solved_c + i));
  }
}

// The ridge solve, once a pattern. With w exact, R δ = λ w, so A changes by [c w] [[d, λ], [λ, 0]] [c w]ᵀ, and its
// inverse H by Woodbury: H −= [p q] N⁻¹ [p q]ᵀ with p = H c, q = H w, N = [[d, λ], [λ, 0]]⁻¹ + [c w]ᵀ H [c w]. What H
// has lost to rounding, one step of refinement against A gives back to w. One factorisation a chunk, and no matrix is
// written after it: a pattern reads H twice, A and U once.
template <class Real>
Status find_weights(const GramSpace<Real>& space, const WritingArgs<Real>& args, int64_t b, int64_t first,
                    Search<Real>& search, Arena& arena) {
  const int64_t K = args.posterior.K, padded = round_up(K, kLanes<Real>), count = space.weights.rows;
  const Real ridge = *args.ridge.at(b);
  const Matrix<Real>& inverse = search.inverse.base;
  const Matrix<Real>& system = space.gram;  // A = G + λI, as the chunk found it
  const Factor<Real> factor = allocate_factor<Real>(arena, K);
  for (int64_t i = 0; i < K; ++i) system.row(i)[i] += ridge;
  copy_rows(factor.lower, system);
  if (!cholesky(factor, arena)) return kNotPositiveDefinite;
  invert_cholesky(factor, inverse, arena);
  clear_padding(inverse);
  LowRankDifference<Real> now = allocate_difference<Real>(system, K, 2 * count, arena);
  const Matrix<Real> solved = allocate_matrix<Real>(arena, count, K);  // A⁻¹ x of every pattern, with the first A
  product<Into::kSet>(solved, K, operand(space.cross), inverse);

  // Vectors of length K with their padding at zero, so that dot products run over whole vectors.
  const Matrix<Real> vectors = allocate_matrix<Real>(arena, 6, K);
  fill_zero(vectors);
  Real *w = vectors.row(0), *p = vectors.row(1), *q = vectors.row(2), *e = vectors.row(3), *f = vectors.row(4),
       *residual = vectors.row(5);
  for (int64_t t = 0; t < count; ++t) {
    if (!args.posterior.unmasked(b, first + t)) continue;
    const Real* x = space.cross.row(t);
    Real *c = search.cov.left.row(t), *a = search.cov.right.row(t);
    __builtin_memcpy(w, solved.row(t), static_cast<size_t>(K) * sizeof(Real));
    search.inverse.subtract_terms({w}, padded, {x});
    now.product({residual}, padded, {w});
    for (int64_t i = 0; i < padded; ++i) residual[i] = x[i] - residual[i];
    search.inverse.product({p}, padded, {residual});
    for (int64_t i = 0; i < padded; ++i) w[i] += p[i];
    search.cov.count = t;
    search.cov.product({a}, padded, {w});
    __builtin_memcpy(space.weights.row(t), w, static_cast<size_t>(K) * sizeof(Real));
    __builtin_memcpy(search.past.row(t), search.cov.l_dot_x.row(0), static_cast<size_t>(t) * sizeof(Real));

    const Real s = dot(padded, w, a) + *args.posterior.noise_var.at(b, first + t), reciprocal = 1 / s;
    for (int64_t i = 0; i < padded; ++i) c[i] = a[i] * reciprocal;
    const Real d = space.inner.row(t)[t] - dot(padded, w, x) - ridge * dot(padded, w, w);
    search.s[t] = s;
    search.d[t] = d;
    product_transposed<Into::kSet>({p, q}, inverse, K, padded, {c, w});
    update_cross(space, t, w, c, padded, search.along.row(t), &solved, p);
    search.inverse.subtract_terms({p, q}, padded, {c, w});

    const Real n11 = dot(padded, c, p), n12 = dot(padded, c, q) + 1 / ridge,
               n22 = dot(padded, w, q) - d / (ridge * ridge);
    const Real scale = 1 / (n11 * n22 - n12 * n12);
    for (int64_t i = 0; i < padded; ++i) {
      e[i] = (n22 * p[i] - n12 * q[i]) * scale;
      f[i] = (n11 * q[i] - n12 * p[i]) * scale;
    }
    search.inverse.subtract(p, e);
    search.inverse.subtract(q, f);
    for (int64_t i = 0; i < padded; ++i) {
      e[i] = -ridge * w[i] - d * c[i];
      f[i] = -ridge * c[i];
    }
    now.subtract(c, e);
    now.subtract(w, f);
  }
  return kGood;
}

template <class Real>
Search<Real> allocate_search(const GramSpace<Real>& space, Arena& arena) {
  const int64_t K = space.cov.rows, count = space.weights.rows;
  const Matrix<Real> inverse = allocate_matrix<Real>(arena, K, K);
  const LowRankDifference<Real> cov = allocate_difference<Real>(space.cov, K, count, arena);
  const Matrix<Real> past = allocate_matrix<Real>(arena, count, count);
  for (const Matrix<Real>* m : {&cov.right, &past}) fill_zero(*m);
  return {.inverse = allocate_difference<Real>(inverse, K, 2 * count, arena),
          .cov = cov,
          .past = past,
          .along = allocate_matrix<Real>(arena, count, count)};
}

template <class Real>
bool factors_once(const WritingArgs<Real>& args) {
  return args.num_opt_iters == 1 && !args.squared_gram;
}

// The inner products of one chunk, whose patterns stand below the mean in `stacked`: Y = [R; Z]. `own`: G and U are
// copies, for the search that factors afresh writes to them.
template <class Real>
GramSpace<Real> compute_gram_space(const MemoryRows<Real>& memory, const Matrix<Real>& stacked,
                                   const Matrix<Real>& weights, bool own, Arena& arena) {
  const int64_t K = memory.cov.rows, count = weights.rows, both = stacked.rows;
  const Matrix<Real> stacked_transposed = allocate_matrix<Real>(arena, stacked.columns, both);
  const Matrix<Real> products = allocate_matrix<Real>(arena, both, both);  // Y Yᵀ = [G Xᵀ; X Q]
  transpose(stacked_transposed, stacked);
  product_lower<Into::kSet>(products, stacked.columns, operand(stacked), stacked_transposed);
  const Matrix<Real> gram = products.block(0, K, 0, K), cross = products.block(K, count, 0, K);
  mirror(gram);
  const auto copy = [&](const Matrix<Real>& from) {
    const Matrix<Real> to = allocate_matrix<Real>(arena, from.rows, K);
    copy_rows(to, from);
    return to;
  };
  const GramSpace<Real> space{.gram = own ? copy(gram) : gram,
                              .cross = copy(cross),
                              .inner = products.block(K, count, K, count),
                              .cov = own ? copy(memory.cov) : memory.cov,
                              .weights = weights};
  for (const Matrix<Real>* m : {&space.gram, &space.cross, &space.cov}) clear_padding(*m);
  fill_zero(weights);
  return space;
}

}  // namespace fastkm::FASTKM_LEVEL
