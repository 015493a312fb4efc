// Backward of the divergence of two memories and of the log-determinant of a covariance.
#pragma once

#include "cpu/linalg/solve.h"
#include "cpu/matrix_normal/divergence.h"

namespace fastkm::FASTKM_LEVEL {

template <class T>
struct FactoredCov {
  Factor<T> factor;
  Matrix<T> lower_transposed;  // [K, K]
};

template <class T>
FactoredCov<T> factor_cov(const Batch<const T>& cov, int64_t b, int64_t K, Arena& arena) {
  const FactoredCov<T> result{take_factor<T>(arena, K), take_matrix<T>(arena, K, K)};
  if (load_and_factor(result.factor, cov, b, arena) != kGood) poison(result.factor);
  transpose(result.lower_transposed, result.factor.lower);
  return result;
}

// X ← X U⁻¹
template <class T>
void solve_rows(const FactoredCov<T>& cov, const Matrix<T>& x, Arena& arena) {
  solve_rows(cov.factor, cov.lower_transposed, x, take_matrix<T>(arena, x.rows, kBlock));
}

// With g the cotangent of the divergence and E = U0⁻¹Δ: R̄ = g E = −R̄0, Ū = ½ g C (U0⁻¹ − U⁻¹) and
// Ū0 = ½ g (C (U0⁻¹ − U0⁻¹ U U0⁻¹) − E Eᵀ). Both differences start from P = U0⁻¹ (U0 − U), as −P U⁻¹ and P U0⁻¹:
// a posterior is often close to its prior, and subtracting two inverses would then leave their rounding.
template <class T>
void kl_memory_backward(const MatrixNormalArgs<T>& args, const MatrixNormalGrads<T>& grads, int64_t begin,
                        int64_t end) {
  const int64_t K = args.K, C = args.C;
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const FactoredCov<T> cov = factor_cov(args.cov, b, K, arena), prior_cov = factor_cov(args.prior_cov, b, K, arena);
    const T half = *grads.result.at(b) / 2, columns = static_cast<T>(C);

    // Both means.
    const Matrix<T> shift = take_matrix<T>(arena, K, C), prior_mean = take_matrix<T>(arena, K, C);
    const Matrix<T> pull = take_matrix<T>(arena, C, K);  // Eᵀ
    load_matrix(shift, args.mean, b);
    load_matrix(prior_mean, args.prior_mean, b);
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C; ++c) shift.row(k)[c] -= prior_mean.row(k)[c];
    transpose(pull, shift);
    solve_rows(prior_cov, pull, arena);
    transpose(shift, pull);
    scale(shift, 2 * half);
    store_matrix(grads.to_mean, b, shift);
    scale(shift, T(-1));
    store_matrix(grads.to_prior_mean, b, shift);

    // Both covariances, of which the divergence reads the lower triangles.
    const Matrix<T> gap = take_matrix<T>(arena, K, K), relative = take_matrix<T>(arena, K, K);
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j <= i; ++j) gap.row(i)[j] = *args.prior_cov.at(b, i, j) - *args.cov.at(b, i, j);
    mirror(gap);
    solve_rows(prior_cov, gap, arena);
    transpose(relative, gap);  // P
    copy_rows(gap, relative);
    solve_rows(cov, gap, arena);
    scale(gap, -half * columns);
    mirror(gap);
    store_matrix(grads.to_cov, b, gap);
    solve_rows(prior_cov, relative, arena);
    scale(relative, columns);
    product_lower<Into::kSubtract>(relative, C, transposed(pull), pull);
    scale(relative, half);
    mirror(relative);
    store_matrix(grads.to_prior_cov, b, relative);
  }
}

// Ū = g U⁻¹
template <class T>
void logdet_backward(const MatrixNormalArgs<T>& args, const MatrixNormalGrads<T>& grads, int64_t begin, int64_t end) {
  const int64_t K = args.K;
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Matrix<T> inverse = take_matrix<T>(arena, K, K);
    fill_zero(inverse);
    for (int64_t i = 0; i < K; ++i) inverse.row(i)[i] = *grads.result.at(b);
    solve_rows(factor_cov(args.cov, b, K, arena), inverse, arena);
    mirror(inverse);
    store_matrix(grads.to_cov, b, inverse);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
