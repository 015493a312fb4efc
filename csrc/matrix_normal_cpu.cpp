// Binds kl_memory, logdet and their backward to torch.ops.fastkm on the CPU.
#include <tuple>

#include "binding.h"

namespace fastkm {

static std::tuple<Tensor, Tensor> kl_memory(const Tensor& mean, const Tensor& cov, const Tensor& prior_mean,
                                            const Tensor& prior_cov) {
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2);
  expect(cov, "cov", {B, K, K}, mean.scalar_type());
  expect(prior_mean, "prior_mean", {B, K, C}, mean.scalar_type());
  expect(prior_cov, "prior_cov", {B, K, K}, mean.scalar_type());
  const Tensor kl = make(mean, {B}), info = make(mean, {B}, ScalarType::Int);
  for_dtype(mean.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    const MatrixNormalArgs<T> args{K,
                                   C,
                                   batch_of<const T>(mean),
                                   batch_of<const T>(cov),
                                   batch_of<const T>(prior_mean),
                                   batch_of<const T>(prior_cov),
                                   data_of<T>(kl),
                                   data_of<int32_t>(info)};
    const auto& run = kernels<T>().kl_memory;
    over_threads(B, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  });
  return {kl, info};
}

static std::tuple<Tensor, Tensor> logdet(const Tensor& cov) {
  const int64_t B = cov.size(0), K = cov.size(1);
  expect(cov, "cov", {B, K, K}, cov.scalar_type());
  const Tensor result = make(cov, {B}), info = make(cov, {B}, ScalarType::Int);
  for_dtype(cov.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    MatrixNormalArgs<T> args{};
    args.K = K;
    args.cov = batch_of<const T>(cov);
    args.result = data_of<T>(result);
    args.info = data_of<int32_t>(info);
    const auto& run = kernels<T>().logdet;
    over_threads(B, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  });
  return {result, info};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> kl_memory_backward(const Tensor& mean, const Tensor& cov,
                                                                     const Tensor& prior_mean, const Tensor& prior_cov,
                                                                     const Tensor& grad_kl) {
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2);
  const ScalarType type = mean.scalar_type();
  expect(cov, "cov", {B, K, K}, type);
  expect(prior_mean, "prior_mean", {B, K, C}, type);
  expect(prior_cov, "prior_cov", {B, K, K}, type);
  expect(grad_kl, "grad_kl", {B}, type);
  const Tensor to_mean = make(mean, {B, K, C}), to_cov = make(mean, {B, K, K});
  const Tensor to_prior_mean = make(mean, {B, K, C}), to_prior_cov = make(mean, {B, K, K});
  for_dtype(type, [&](auto scalar) {
    using T = decltype(scalar);
    const MatrixNormalArgs<T> args{.K = K,
                                   .C = C,
                                   .mean = batch_of<const T>(mean),
                                   .cov = batch_of<const T>(cov),
                                   .prior_mean = batch_of<const T>(prior_mean),
                                   .prior_cov = batch_of<const T>(prior_cov)};
    const MatrixNormalGrads<T> grads{.result = batch_of<const T>(grad_kl),
                                     .to_mean = batch_of<T>(to_mean),
                                     .to_cov = batch_of<T>(to_cov),
                                     .to_prior_mean = batch_of<T>(to_prior_mean),
                                     .to_prior_cov = batch_of<T>(to_prior_cov)};
    const auto& run = kernels<T>().kl_memory_backward;
    over_threads(B, [&](int64_t begin, int64_t end) { run(args, grads, begin, end); });
  });
  return {to_mean, to_cov, to_prior_mean, to_prior_cov};
}

static Tensor logdet_backward(const Tensor& cov, const Tensor& grad_logdet) {
  const int64_t B = cov.size(0), K = cov.size(1);
  expect(cov, "cov", {B, K, K}, cov.scalar_type());
  expect(grad_logdet, "grad_logdet", {B}, cov.scalar_type());
  const Tensor to_cov = make(cov, {B, K, K});
  for_dtype(cov.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    const MatrixNormalArgs<T> args{.K = K, .cov = batch_of<const T>(cov)};
    const MatrixNormalGrads<T> grads{.result = batch_of<const T>(grad_logdet), .to_cov = batch_of<T>(to_cov)};
    const auto& run = kernels<T>().logdet_backward;
    over_threads(B, [&](int64_t begin, int64_t end) { run(args, grads, begin, end); });
  });
  return to_cov;
}

STABLE_TORCH_LIBRARY_IMPL(fastkm, CPU, m) {
  m.impl("kl_memory", TORCH_BOX(&kl_memory));
  m.impl("logdet", TORCH_BOX(&logdet));
  m.impl("kl_memory_backward", TORCH_BOX(&kl_memory_backward));
  m.impl("logdet_backward", TORCH_BOX(&logdet_backward));
}

}  // namespace fastkm
