// Divergence of two memories and the log-determinant of a covariance, by Cholesky.
#pragma once

#include "posterior_kernel.h"

namespace fastkm::FASTKM_LEVEL {

template <class T>
Status load_and_factor(const Factor<T>& factor, const Batch<const T>& cov, int64_t b, Arena& arena) {
  load_matrix(factor.lower, cov, b);
  if (const Status status = symmetry(factor.lower); status != kGood) return status;
  return cholesky(factor, arena) ? kGood : kNotPositiveDefinite;
}

// Sums over a whole matrix are taken in double: what is wanted is their small difference.
template <class T>
double log_det(const Factor<T>& factor) {
  double sum = 0;
  for (int64_t i = 0; i < factor.size(); ++i) sum += std::log(factor.lower.row(i)[i]);
  return 2 * sum;
}

template <class T>
double squared_norm(const Matrix<T>& m) {
  double sum = 0;
  for (int64_t i = 0; i < m.rows; ++i) sum += dot(m.columns, m.row(i), m.row(i));
  return sum;
}

// ½ [C tr(U0⁻¹U) + tr(ΔᵀU0⁻¹Δ) − KC + C (ln|U0| − ln|U|)]; a trace is the squared norm of L0⁻¹L, or of L0⁻¹Δ.
template <class T>
void kl_memory(const MatrixNormalArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Factor<T> factor = take_factor<T>(arena, args.K), prior = take_factor<T>(arena, args.K);
    const Status loaded = load_and_factor(factor, args.cov, b, arena);
    const Status prior_loaded = load_and_factor(prior, args.prior_cov, b, arena);
    args.info[b] = loaded > prior_loaded ? loaded : prior_loaded;
    if (args.info[b] != kGood) continue;

    const double growth = log_det(prior) - log_det(factor);
    const Matrix<T> shift = take_matrix<T>(arena, args.K, args.C), prior_mean = take_matrix<T>(arena, args.K, args.C);
    load_matrix(shift, args.mean, b);
    load_matrix(prior_mean, args.prior_mean, b);
    for (int64_t k = 0; k < args.K; ++k) {
      for (int64_t c = 0; c < args.C; ++c) shift.row(k)[c] -= prior_mean.row(k)[c];
      for (int64_t c = k + 1; c < factor.lower.ld; ++c) factor.lower.row(k)[c] = 0;
    }
    solve_lower(prior, factor.lower, arena);
    solve_lower(prior, shift, arena);
    const double columns = static_cast<double>(args.C), rows = static_cast<double>(args.K);
    const double kl = 0.5 * (columns * (squared_norm(factor.lower) - rows + growth) + squared_norm(shift));
    args.result[b] = static_cast<T>(kl);
  }
}

template <class T>
void logdet(const MatrixNormalArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Factor<T> factor = take_factor<T>(arena, args.K);
    args.info[b] = load_and_factor(factor, args.cov, b, arena);
    args.result[b] = static_cast<T>(log_det(factor));
  }
}

}  // namespace fastkm::FASTKM_LEVEL
