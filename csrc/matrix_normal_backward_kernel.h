// Backward of the divergence of two memories and of the log-determinant of a covariance.
#pragma once

#include <limits>

#include "matrix_normal_kernel.h"

namespace fastkm::FASTKM_LEVEL {

// U⁻¹ in full, or NaN if U is no covariance: then there is no gradient.
template <class T>
Matrix<T> take_inverse(const Batch<const T>& cov, int64_t b, int64_t K, Arena& arena) {
  const Factor<T> factor = take_factor<T>(arena, K);
  const Matrix<T> inverse = take_matrix<T>(arena, K, K);
  if (load_and_factor(factor, cov, b, arena) == kGood) {
    invert(factor, inverse, arena);
  } else {
    for (int64_t i = 0; i < K * inverse.ld; ++i) inverse.data[i] = std::numeric_limits<T>::quiet_NaN();
  }
  return inverse;
}

template <class T>
void scale(const Matrix<T>& m, T factor) {
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.columns; ++j) m.row(i)[j] *= factor;
}

// With g the cotangent of the divergence: ∂R = g U0⁻¹Δ = −∂R0, ∂U = ½ g C (U0⁻¹ − U⁻¹),
// ∂U0 = ½ g U0⁻¹ (C (U0 − U) − ΔΔᵀ) U0⁻¹.
template <class T>
void kl_memory_backward(const MatrixNormalArgs<T>& args, const MatrixNormalGrads<T>& grads, int64_t begin,
                        int64_t end) {
  const int64_t K = args.K, C = args.C;
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const T grad = *grads.result.at(b);
    const Matrix<T> inverse = take_inverse(args.cov, b, K, arena);
    const Matrix<T> prior_inverse = take_inverse(args.prior_cov, b, K, arena);

    // Both means.
    const Matrix<T> shift = take_matrix<T>(arena, K, C), prior_mean = take_matrix<T>(arena, K, C);
    const Matrix<T> grad_mean = take_matrix<T>(arena, K, C);
    load_matrix(shift, args.mean, b);
    load_matrix(prior_mean, args.prior_mean, b);
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C; ++c) shift.row(k)[c] -= prior_mean.row(k)[c];
    product<Into::kSet>(grad_mean, K, left(prior_inverse), shift);
    scale(grad_mean, grad);
    store_matrix(grads.to_mean, b, grad_mean);
    scale(grad_mean, T(-1));
    store_matrix(grads.to_prior_mean, b, grad_mean);

    // Both covariances, of which the divergence reads the lower triangles.
    const Matrix<T> shift_transposed = take_matrix<T>(arena, C, K), gap = take_matrix<T>(arena, K, K);
    const Matrix<T> half_way = take_matrix<T>(arena, K, K), grad_cov = take_matrix<T>(arena, K, K);
    const T half = grad / 2, columns = static_cast<T>(C);
    transpose(shift_transposed, shift);
    product_lower<Into::kSet>(gap, C, left(shift), shift_transposed);
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        const T shrinkage = *args.prior_cov.at(b, i, j) - *args.cov.at(b, i, j);
        gap.row(i)[j] = half * (columns * shrinkage - gap.row(i)[j]);
      }
    mirror(gap);
    product<Into::kSet>(half_way, K, left(gap), prior_inverse);
    product_lower<Into::kSet>(grad_cov, K, left(prior_inverse), half_way);
    mirror(grad_cov);
    store_matrix(grads.to_prior_cov, b, grad_cov);
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < K; ++j)
        grad_cov.row(i)[j] = half * columns * (prior_inverse.row(i)[j] - inverse.row(i)[j]);
    store_matrix(grads.to_cov, b, grad_cov);
  }
}

// ∂U = g U⁻¹
template <class T>
void logdet_backward(const MatrixNormalArgs<T>& args, const MatrixNormalGrads<T>& grads, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Matrix<T> inverse = take_inverse(args.cov, b, args.K, arena);
    scale(inverse, *grads.result.at(b));
    store_matrix(grads.to_cov, b, inverse);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
