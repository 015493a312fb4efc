// One pattern of a stream: what it does to a memory and to the inverse that is carried with it.
//
// With weights w, innovation δ = z − Rᵀ w, a = U w, s = w·a + σ² and c = a/s:
//   (1)  R' = R + c δᵀ,  U' = U − (a/√s) (a/√s)ᵀ
//   (2)  A' = A + c rᵀ + r cᵀ + d c cᵀ  for A = R Rᵀ + λI, with r = R δ and d = δ·δ
//   (3)  H' = A'⁻¹ = H − p pᵀ/α + (α/D) h hᵀ  for H = A⁻¹, with p = H c, q = H r,
//        α = c·p,  β = c·q,  κ = d − r·q ≥ 0,  D = (1 + β)² + α κ = |A'|/|A|,  h = q − p (1 + β)/α.
// (3) takes c out of H, and then adds what A' has along it. Neither term is larger than H or H', so neither loses more
// digits than they have. Both, and the term of U, are squares: symmetric matrices stay so to the last bit.
#pragma once

#include <cmath>

#include "cpu/posterior/conditioning.h"
#include "cpu/streaming/passes.h"

namespace fastkm::FASTKM_LEVEL {

// One memory, in the caller's rows.
template <class Real>
struct StreamMemory {
  Matrix<Real> mean, cov, inverse;  // R [K, C], U [K, K], H [K, K]; rows are padded with zeros to their stride
  Real ridge;                       // λ
  const Team* team;

  int64_t size() const { return mean.rows; }
  int64_t padded() const { return cov.ld; }  // numbers in a vector of length K
};

template <class Real>
StreamMemory<Real> view_stream(const StreamingArgs<Real>& args, int64_t b) {
  const auto view = [&](const Batch<Real>& m, int64_t columns) {
    return Matrix<Real>{m.at(b), args.K, columns, round_up(columns, kStreamPadding)};
  };
  return {view(args.mean, args.C), view(args.cov, args.K), view(args.inverse, args.K), *args.ridge.at(b),
          team_for_passes(args.K, args.C)};
}

// What a pattern does to a memory, by (1) to (3). Vectors have zeros in their padding.
template <class Real>
struct Change {
  Real *w, *a, *c, *r;  // [K]
  Real* delta;          // δ [C]
  Real *p, *h;          // [K], p/√α and h √(α/D)
  Real explained, d;    // w·a, d
};

template <class Real>
Change<Real> allocate_change(const StreamMemory<Real>& memory, Arena& arena) {
  const Matrix<Real> v = allocate_zero<Real>(arena, 6, memory.padded());
  const Matrix<Real> delta = allocate_zero<Real>(arena, 1, memory.mean.ld);
  return {v.row(0), v.row(1), v.row(2), v.row(3), delta.data, v.row(4), v.row(5), 0, 0};
}

// Workspace of the passes over one memory.
template <class Real>
struct StreamWork {
  Matrix<Real> sums;               // [units, C], sums over the rows of a unit
  Real *x, *target, *residual;     // [K]
  Real *correction, *q, *squares;  // [K]
  Real* z;                         // [C]
};

template <class Real>
StreamWork<Real> allocate_stream_work(const StreamMemory<Real>& memory, Arena& arena) {
  const Matrix<Real> v = allocate_zero<Real>(arena, 6, memory.padded());
  const Matrix<Real> z = allocate_zero<Real>(arena, 1, memory.mean.ld);
  const Matrix<Real> sums = allocate_matrix<Real>(arena, count_units(memory.size()), memory.mean.ld);
  return {sums, v.row(0), v.row(1), v.row(2), v.row(3), v.row(4), v.row(5), z.data};
}

// δ and r = R δ for the weights of `change`.
template <class Real>
void compute_innovation(const StreamMemory<Real>& memory, const Change<Real>& change, const StreamWork<Real>& work) {
  subtract_product_transposed(memory.team, change.delta, work.z, memory.mean, change.w, work.sums);
  product_by_units<1, false, Real>(memory.team, {change.r}, memory.mean, {change.delta});
}

// a, c, w·a and d for weights and an innovation. The status says whether the pattern can be written: U is positive
// definite along w, and the new U holds its digits there.
template <class Real>
Status compute_change(const StreamMemory<Real>& memory, Change<Real>& change, Real noise_var,
                      const StreamWork<Real>& work) {
  const int64_t padded = memory.padded();
  product_by_units<1, false, Real>(memory.team, {change.a}, memory.cov, {change.w});
  change.explained = dot(padded, change.w, change.a);
  change.d = dot(memory.mean.ld, change.delta, change.delta);
  const Real slack = rounding_slack(memory.size(), 1, change.explained + noise_var);
  if (change.d - change.d != 0) return kNotPositiveDefinite;
  Real s = change.explained;
  if (!check_pivot(s, AddedDiagonal<Real>{&noise_var, &slack, &change.explained}, 0)) return kNotPositiveDefinite;
  const Real reciprocal = 1 / s;
  for (int64_t i = 0; i < padded; ++i) change.c[i] = change.a[i] * reciprocal;
  for (int64_t i = 0; i < memory.size(); ++i) work.squares[i] = memory.cov.row(i)[i];
  const Real scale = weighted_norm(memory.size(), change.w, work.squares);
  return change.explained * (noise_var * reciprocal) * no_limits<Real>().variance >= scale ? kGood : kLost;
}

// (3): p and h. Returns false if rounding leaves no positive definite H'.
template <class Real>
bool compute_inverse_change(const StreamMemory<Real>& memory, const Change<Real>& change,
                            const StreamWork<Real>& work) {
  const int64_t padded = memory.padded();
  product_by_units<2, false, Real>(memory.team, {change.p, work.q}, memory.inverse, {change.c, change.r});
  const Real alpha = dot(padded, change.c, change.p), beta = dot(padded, change.c, work.q);
  const Real kappa = change.d - dot(padded, change.r, work.q);
  const Real determinant = (1 + beta) * (1 + beta) + alpha * (kappa > 0 ? kappa : 0);
  const Real of_p = 1 / std::sqrt(alpha), of_h = std::sqrt(alpha / determinant), along = (1 + beta) / alpha;
  if (!(alpha > 0 && of_p <= std::numeric_limits<Real>::max() && of_h > 0 && along - along == 0)) return false;
  for (int64_t i = 0; i < padded; ++i) {
    change.h[i] = of_h * (work.q[i] - along * change.p[i]);
    change.p[i] *= of_p;
  }
  return true;
}

// (1) and, with `follows`, (3), in one pass over the rows.
template <class Real>
void apply_change(const StreamMemory<Real>& memory, const Change<Real>& change, Real s, bool follows) {
  const Real reciprocal = 1 / std::sqrt(s);
  for (int64_t i = 0; i < memory.padded(); ++i) change.a[i] *= reciprocal;
  each_unit(memory.team, memory.size(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      add_to_row<1, Real>(memory.mean.row(i), memory.mean.ld, {change.c[i]}, {change.delta});
      add_to_row<1, Real>(memory.cov.row(i), memory.cov.ld, {-change.a[i]}, {change.a});
      if (follows)
        add_to_row<2, Real>(memory.inverse.row(i), memory.inverse.ld, {-change.p[i], change.h[i]},
                            {change.p, change.h});
    }
  });
}

}  // namespace fastkm::FASTKM_LEVEL
