// Backward of the divergence of two memories and of the log-determinant of a covariance.
//
// With g the cotangent of the divergence, Δ = R − R0 and E = U0⁻¹Δ:
//   (1)  to R = g E,  to R0 = −g E
//   (2)  to U = ½ g C (U0⁻¹ − U⁻¹)
//   (3)  to U0 = ½ g (C (U0⁻¹ − U0⁻¹ U U0⁻¹) − E Eᵀ).
// A posterior is often close to its prior, and a difference of two inverses would keep only their rounding. So both
// differences start from P = U0⁻¹ (U0 − U): that of (2) is −P U⁻¹, that of (3) is P U0⁻¹. For the log-determinant with
// cotangent g,
//   (4)  to U = g U⁻¹.
//
// Operations: two factors, 2 K³ for each of three solves, and 3 K² C. Where a covariance has no factor, its cotangents
// are NaN.
#pragma once

#include "cpu/linalg/solve.h"
#include "cpu/matrix_normal/divergence.h"

namespace fastkm::FASTKM_LEVEL {

template <class Real>
struct FactoredCovariance {
  Factor<Real> factor;
  Matrix<Real> lower_transposed;  // Lᵀ [K, K]
};

template <class Real>
FactoredCovariance<Real> factor_covariance(const Batch<const Real>& cov, int64_t b, int64_t K, Arena& arena) {
  const FactoredCovariance<Real> result{allocate_factor<Real>(arena, K), allocate_matrix<Real>(arena, K, K)};
  if (load_and_factor(result.factor, cov, b, arena) != kGood) poison_factor(result.factor);
  transpose(result.lower_transposed, result.factor.lower);
  return result;
}

// X ← X U⁻¹
template <class Real>
void solve_covariance(const FactoredCovariance<Real>& cov, const Matrix<Real>& x, Arena& arena) {
  solve_cholesky(cov.factor, cov.lower_transposed, x, allocate_matrix<Real>(arena, x.rows, kBlock));
}

template <class Real>
void kl_memory_backward(const MatrixNormalArgs<Real>& args, const MatrixNormalGrads<Real>& grads, int64_t begin,
                        int64_t end) {
  const int64_t K = args.K, C = args.C;
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const FactoredCovariance<Real> cov = factor_covariance(args.cov, b, K, arena),
                                   prior_cov = factor_covariance(args.prior_cov, b, K, arena);
    const Real half_grad = *grads.result.at(b) / 2, columns = static_cast<Real>(C);

    // Both means, by (1).
    const Matrix<Real> shift = allocate_matrix<Real>(arena, K, C), prior_mean = allocate_matrix<Real>(arena, K, C);
    const Matrix<Real> pull_transposed = allocate_matrix<Real>(arena, C, K);  // Eᵀ
    load_matrix(shift, args.mean, b);
    load_matrix(prior_mean, args.prior_mean, b);
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C; ++c) shift.row(k)[c] -= prior_mean.row(k)[c];
    transpose(pull_transposed, shift);
    solve_covariance(prior_cov, pull_transposed, arena);
    transpose(shift, pull_transposed);
    scale(shift, 2 * half_grad);
    store_matrix(grads.to_mean, b, shift);
    scale(shift, Real(-1));
    store_matrix(grads.to_prior_mean, b, shift);

    // Both covariances, by (2) and (3). The divergence reads their lower triangles.
    const Matrix<Real> gap = allocate_matrix<Real>(arena, K, K), relative = allocate_matrix<Real>(arena, K, K);
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j <= i; ++j) gap.row(i)[j] = *args.prior_cov.at(b, i, j) - *args.cov.at(b, i, j);
    mirror(gap);
    solve_covariance(prior_cov, gap, arena);
    transpose(relative, gap);  // P
    copy_rows(gap, relative);
    solve_covariance(cov, gap, arena);
    scale(gap, -half_grad * columns);
    mirror(gap);
    store_matrix(grads.to_cov, b, gap);
    solve_covariance(prior_cov, relative, arena);
    scale(relative, columns);
    product_lower<Into::kSubtract>(relative, C, transposed(pull_transposed), pull_transposed);
    scale(relative, half_grad);
    mirror(relative);
    store_matrix(grads.to_prior_cov, b, relative);
  }
}

template <class Real>
void logdet_backward(const MatrixNormalArgs<Real>& args, const MatrixNormalGrads<Real>& grads, int64_t begin,
                     int64_t end) {
  const int64_t K = args.K;
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Matrix<Real> inverse = allocate_matrix<Real>(arena, K, K);
    fill_zero(inverse);
    for (int64_t i = 0; i < K; ++i) inverse.row(i)[i] = *grads.result.at(b);
    solve_covariance(factor_covariance(args.cov, b, K, arena), inverse, arena);
    mirror(inverse);
    store_matrix(grads.to_cov, b, inverse);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
