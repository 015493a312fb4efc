// The search for the weights of a chunk of patterns in Gram space.
//
// The weights of a pattern z are those of the ridge solve (R Rᵀ + λI) w = R z, against the mean that the patterns
// before it left. They depend on the codes only through inner products: with A = R Rᵀ + λI, X = Z Rᵀ and Q = Z Zᵀ, the
// search is in K and T. A chunk reads the codes once, for one Gram product; its patterns change A, X and U as follows,
// with x the pattern's row of X:
//   (1)  w = A⁻¹ x
//   (2)  a = U w,  s = w·a + σ²,  c = a/s                        the update is R + c δᵀ with δ = z − Rᵀ w, and U − a cᵀ
//   (3)  d = δ·δ = Q_tt − w·x − λ w·w                            as R δ = λ w when w is exact
//   (4)  x_later += c (δ·z_later),  δ·z_later = Q_later,t − w·x_later
//   (5)  A += [c w] [[d, λ], [λ, 0]] [c w]ᵀ
//   (6)  H = A⁻¹ by Woodbury: H −= [p q] N⁻¹ [p q]ᵀ, p = H c, q = H w, N = [[d, λ], [λ, 0]]⁻¹ + [c w]ᵀ [p q].
//
// A chunk costs one factor and one inverse. H, A and U stay as the chunk found them, in K² numbers each, and changes of
// low rank are kept apart. A pattern reads H twice, A and U once. H loses digits by (6), which a step of refinement
// against A restores in w.
#pragma once

#include "cpu/linalg/low_rank.h"
#include "cpu/posterior/conditioning.h"

namespace fastkm::FASTKM_LEVEL {

// Patterns whose weights are found before the mean is updated. A larger chunk has fewer Gram products, factors and
// inverses, of K³ steps each, and more terms of low rank for each pattern, of K steps.
constexpr int64_t kLargestSearchChunk = 16 * kChunk;
inline int64_t search_chunk(int64_t K) {
  return K < 128 ? kChunk : K < 512 ? 2 * kChunk : K < 1024 ? 4 * kChunk : kLargestSearchChunk;
}

// The inner products of a chunk, which the search keeps up to date.
template <class Real>
struct GramSpace {
  Matrix<Real> gram;   // G = R Rᵀ [K, K]
  Matrix<Real> cross;  // X = Z Rᵀ [t, K]
  Matrix<Real> inner;  // Q = Z Zᵀ [t, t], lower triangle
  Matrix<Real> cov;    // U [K, K]

  int64_t size() const { return gram.rows; }
  int64_t count() const { return cross.rows; }
};

// How the weights are found.
template <class Real>
struct SearchSettings {
  Real ridge;  // λ
  int64_t num_opt_iters;
  bool squared_gram;
  Limits<Real> limits;

  // One solve of (1) a pattern, so that (6) can replace all but the first factorisation.
  bool factors_once() const { return num_opt_iters == 1 && !squared_gram; }
};

template <class Real>
SearchSettings<Real> load_settings(const WritingArgs<Real>& args, int64_t b, const Limits<Real>& limits) {
  return {*args.ridge.at(b), args.num_opt_iters, args.squared_gram, limits};
}

// Whether a pattern changes A, of this trace, by more than the digits of d = ‖δ‖² allow, whose rounding is that of the
// `energy` ‖z‖².
template <class Real>
bool changes_too_much(Real energy, Real c_squared, Real d, Real trace, const Limits<Real>& limits) {
  constexpr Real kNone = std::numeric_limits<Real>::infinity();
  const bool grows = limits.growth < kNone && energy * c_squared > trace * limits.growth;
  return grows || (limits.explained < kNone && energy > d * limits.explained);
}

// What a search leaves for conditioning and for its backward. Rows are patterns; those of masked patterns are zero.
template <class Real>
struct Search {
  LowRankDifference<Real> inverse;  // H, less p eᵀ + q fᵀ for each pattern that is not masked
  LowRankDifference<Real> cov;      // U, less c aᵀ for each pattern; row t of c and a belongs to pattern t
  Matrix<Real> c_dot_w;             // [t, t], c_earlier · w_t
  Matrix<Real> delta_dot_z;         // [t, t], δ_t · z_later
  Real explained[kLargestSearchChunk] = {}, d[kLargestSearchChunk] = {};  // w · a, and d
};

template <class Real>
Search<Real> allocate_search(const GramSpace<Real>& space, Arena& arena) {
  const int64_t K = space.size(), count = space.count();
  const Matrix<Real> inverse = allocate_matrix<Real>(arena, K, K);
  const LowRankDifference<Real> cov = allocate_difference<Real>(space.cov, K, count, arena);
  const Matrix<Real> c_dot_w = allocate_matrix<Real>(arena, count, count);
  for (const Matrix<Real>* m : {&cov.right, &c_dot_w}) fill_zero(*m);
  return {.inverse = allocate_difference<Real>(inverse, K, 2 * count, arena),
          .cov = cov,
          .c_dot_w = c_dot_w,
          .delta_dot_z = allocate_matrix<Real>(arena, count, count)};
}

// (4) for the patterns after t, whose δ · z go to `delta_dot_z` unless that is null. With `solved`, whose rows are A⁻¹
// x for the A that the chunk began with, these follow: `solved_c` is A⁻¹ c.
template <class Real>
void update_cross(const GramSpace<Real>& space, int64_t t, const Real* w, const Real* c, Real* delta_dot_z,
                  const Matrix<Real>* solved = nullptr, const Real* solved_c = nullptr) {
  const int64_t padded = round_up(space.size(), kLanes<Real>);
  for (int64_t later = t + 1; later < space.count(); ++later) {
    Real* x = space.cross.row(later);
    const Real of_z = space.inner.row(later)[t] - dot(padded, w, x);
    add_scaled(padded, x, of_z, c);
    if (delta_dot_z) delta_dot_z[later] = of_z;
    if (solved) add_scaled(padded, solved->row(later), of_z, solved_c);
  }
}

// The change (5) of A.
template <class Real>
struct SystemChange {
  const Real *c, *w;
  Real d, ridge;
};

// (6): subtract from H the terms p eᵀ + q fᵀ, where [e f]ᵀ = N⁻¹ [p q]ᵀ. `e` and `f` are workspace.
template <class Real>
void update_inverse(LowRankDifference<Real>& inverse, const SystemChange<Real>& change, const Real* p, const Real* q,
                    Real* e, Real* f) {
  const auto [c, w, d, ridge] = change;
  const int64_t padded = round_up(inverse.right.columns, kLanes<Real>);
  const Real n11 = dot(padded, c, p), n12 = dot(padded, c, q) + 1 / ridge;
  const Real n22 = dot(padded, w, q) - d / (ridge * ridge);
  const Real scale = 1 / (n11 * n22 - n12 * n12);
  for (int64_t i = 0; i < padded; ++i) {
    e[i] = (n22 * p[i] - n12 * q[i]) * scale;
    f[i] = (n11 * q[i] - n12 * p[i]) * scale;
  }
  inverse.subtract(p, e);
  inverse.subtract(q, f);
}

// Factor A = G + λI, which replaces G.
template <class Real>
Status factor_system(const Factor<Real>& factor, const Matrix<Real>& gram, const SearchSettings<Real>& settings,
                     Arena& arena) {
  for (int64_t i = 0; i < gram.rows; ++i) gram.row(i)[i] += settings.ridge;
  copy_rows(factor.lower, gram);
  if (!cholesky(factor, arena)) return kNotPositiveDefinite;
  return well_conditioned(factor, largest_diagonal(gram), settings.limits) ? kGood : kInexactSystem;
}

// The same, and invert it.
template <class Real>
Status invert_system(const Matrix<Real>& inverse, const Matrix<Real>& gram, const SearchSettings<Real>& settings,
                     Arena& arena) {
  const Factor<Real> factor = allocate_factor<Real>(arena, gram.rows);
  const Status factored = factor_system(factor, gram, settings, arena);
  if (factored == kGood) invert_cholesky(factor, inverse, arena);
  if (factored == kGood) clear_padding(inverse);
  return factored;
}

// Find the weights [t, K] of a chunk. `space.gram` holds A, and `search.inverse` its inverse. Rows of masked patterns
// stay as they are.
template <class Real>
Status find_weights(const Matrix<Real>& weights, const GramSpace<Real>& space, const Observations<Real>& observed,
                    const SearchSettings<Real>& settings, Search<Real>& search, Arena& arena) {
  const int64_t K = space.size(), padded = round_up(K, kLanes<Real>), count = space.count();
  const Matrix<Real>& inverse = search.inverse.base;
  const Real ridge = settings.ridge, size = trace(space.gram);
  bool inexact = false;
  LowRankDifference<Real> system = allocate_difference<Real>(space.gram, K, 2 * count, arena);  // A
  const Matrix<Real> solved = allocate_matrix<Real>(arena, count, K);  // A⁻¹ x of every pattern, with the first A
  product<Into::kSet>(solved, K, operand(space.cross), inverse);

  // Vectors of length K with zeros in their padding.
  const Matrix<Real> vectors = allocate_zero<Real>(arena, 6, K);
  Real *w = vectors.row(0), *p = vectors.row(1), *q = vectors.row(2), *e = vectors.row(3), *f = vectors.row(4);
  Real* residual = vectors.row(5);
  for (int64_t t = 0; t < count; ++t) {
    if (!observed.unmasked[t]) continue;
    const Real* x = space.cross.row(t);
    Real *c = search.cov.left.row(t), *a = search.cov.right.row(t);

    // (1): w = H x, refined once.
    __builtin_memcpy(w, solved.row(t), static_cast<size_t>(K) * sizeof(Real));
    search.inverse.subtract_terms({w}, padded, {x});
    system.product({residual}, padded, {w});
    for (int64_t i = 0; i < padded; ++i) residual[i] = x[i] - residual[i];
    search.inverse.product({p}, padded, {residual});
    for (int64_t i = 0; i < padded; ++i) w[i] += p[i];
    __builtin_memcpy(weights.row(t), w, static_cast<size_t>(K) * sizeof(Real));

    // (2) and (3): a, s, c and d, the change that the pattern makes.
    search.cov.count = t;
    search.cov.product({a}, padded, {w});
    __builtin_memcpy(search.c_dot_w.row(t), search.cov.l_dot_x.row(0), static_cast<size_t>(t) * sizeof(Real));
    search.explained[t] = dot(padded, w, a);
    const Real reciprocal = 1 / (search.explained[t] + observed.noise_var[t]);
    for (int64_t i = 0; i < padded; ++i) c[i] = a[i] * reciprocal;
    const Real d = space.inner.row(t)[t] - dot(padded, w, x) - ridge * dot(padded, w, w);
    search.d[t] = d;
    inexact |= changes_too_much(space.inner.row(t)[t], dot(padded, c, c), d, size, settings.limits);

    // (4), (5) and (6): X, H and A follow.
    symmetric_product<2, Real>({p, q}, inverse, padded, {c, w});
    update_cross(space, t, w, c, search.delta_dot_z.row(t), &solved, p);
    search.inverse.subtract_terms({p, q}, padded, {c, w});
    update_inverse(search.inverse, SystemChange<Real>{c, w, d, ridge}, p, q, e, f);
    for (int64_t i = 0; i < padded; ++i) {
      e[i] = -ridge * w[i] - d * c[i];
      f[i] = -ridge * c[i];
    }
    system.subtract(c, e);
    system.subtract(w, f);
  }
  return inexact && count > 1 ? kInexactSystem : kGood;  // the change of the last pattern is not used
}

}  // namespace fastkm::FASTKM_LEVEL
