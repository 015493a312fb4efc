// The arguments of an update and of a write in double, and whether float32 holds their results.
#pragma once

#include "cpu/linalg/in_double.h"
#include "cpu/posterior/conditioning.h"

namespace fastkm::FASTKM_LEVEL {

inline PosteriorArgs<double> in_double(const PosteriorArgs<float>& args, Doubles& doubles) {
  const int64_t K = args.K, C = args.C, T = args.T;
  PosteriorArgs<double> wide;
  wide.K = K;
  wide.C = C;
  wide.T = T;
  wide.mean = doubles.argument(args.mean, K, C);
  wide.cov = doubles.symmetric_argument(args.cov, K);
  wide.weights = doubles.argument(args.weights, T, K);
  wide.values = doubles.argument(args.values, T, C);
  wide.noise_var = doubles.argument(args.noise_var, T, 1);
  wide.mask = doubles.mask(args.mask);
  wide.new_mean = doubles.result(args.new_mean, K, C);
  wide.new_cov = doubles.result(args.new_cov, K, K);
  wide.innovation_var = doubles.result(args.innovation_var, T, 1);
  wide.kl = doubles.result(args.kl, T, 1);
  wide.log_evidence = doubles.result(args.log_evidence);
  return wide;
}

inline PosteriorGrads<double> in_double(const PosteriorArgs<float>& args, const PosteriorGrads<float>& grads,
                                        Doubles& doubles) {
  const int64_t K = args.K, C = args.C, T = args.T;
  return {.mean = doubles.argument(grads.mean, K, C),
          .cov = doubles.argument(grads.cov, K, K),
          .innovation_var = doubles.argument(grads.innovation_var, T, 1),
          .kl = doubles.argument(grads.kl, T, 1),
          .log_evidence = doubles.argument(grads.log_evidence, 1, 1),
          .to_mean = doubles.result(grads.to_mean, K, C),
          .to_cov = doubles.result(grads.to_cov, K, K),
          .to_weights = doubles.result(grads.to_weights, T, K),
          .to_values = doubles.result(grads.to_values, T, C),
          .to_noise_var = doubles.result(grads.to_noise_var, T, 1)};
}

// Whether the rounded covariance of memory `b` still has a factor, so that it can go in again.
inline bool has_factor(const Batch<float>& cov, int64_t b, int64_t K) {
  Arena& arena = Arena::fresh();
  const Factor<float> factor = allocate_factor<float>(arena, K);
  load_matrix(factor.lower, {cov.data, {cov.stride[0], cov.stride[1], cov.stride[2]}}, b);
  return cholesky(factor, arena);
}

inline double trace_of(const double* matrix, int64_t K) {
  double sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += matrix[k * (K + 1)];
  return sum;
}

// Round the results of memory `b`, which was conditioned in double as `wide` with this status, and report. A memory
// that is refused comes out as it came in, where the caller wants that.
inline void put_out(const PosteriorArgs<float>& args, int64_t b, const PosteriorArgs<double>& wide, Status status,
                    const Doubles& doubles) {
  const bool finite = doubles.put_out();
  const double left = trace_of(wide.new_cov.data, args.K) * limits_for_float32().variance;
  const bool holds = finite && trace_of(wide.cov.data, args.K) <= left && has_factor(args.new_cov, b, args.K);
  args.info[b] = status == kGood && !holds ? kLost : status;
  if (args.info[b] == kGood || !args.keeps_refused) return;
  for (int64_t i = 0; i < args.K; ++i) {
    for (int64_t j = 0; j < args.C; ++j) *args.new_mean.at(b, i, j) = static_cast<float>(*wide.mean.at(0, i, j));
    for (int64_t j = 0; j < args.K; ++j) *args.new_cov.at(b, i, j) = static_cast<float>(*wide.cov.at(0, i, j));
  }
}

}  // namespace fastkm::FASTKM_LEVEL
