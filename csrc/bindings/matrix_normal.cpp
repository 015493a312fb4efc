// Binds kl_memory, logdet and their backward to torch.ops.fastkm.
#include <tuple>

#include "bindings/make_tensor.h"
#include "bindings/register.h"
#include "bindings/tensor_args.h"

namespace fastkm {

template <class Place>
static std::tuple<Tensor, Tensor> kl_memory(const Tensor& mean, const Tensor& cov, const Tensor& prior_mean,
                                            const Tensor& prior_cov) {
  const Place place(mean, cov, prior_mean, prior_cov);
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2);
  expect(mean, "mean", {B, K, C}, mean.scalar_type());
  expect(cov, "cov", {B, K, K}, mean.scalar_type());
  expect(prior_mean, "prior_mean", {B, K, C}, mean.scalar_type());
  expect(prior_cov, "prior_cov", {B, K, K}, mean.scalar_type());
  const Tensor kl = make_tensor(mean, {B}), info = make_tensor(mean, {B}, ScalarType::Int);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    const MatrixNormalArgs<Real> args{K,
                                      C,
                                      batch_of<const Real>(mean),
                                      batch_of<const Real>(cov),
                                      batch_of<const Real>(prior_mean),
                                      batch_of<const Real>(prior_cov),
                                      data_of<Real>(kl),
                                      data_of<int32_t>(info)};
    place.run(B, &Kernels<Real>::kl_memory, FASTKM_LAUNCHER(kl_memory), args);
  });
  return {kl, info};
}

template <class Place>
static std::tuple<Tensor, Tensor> logdet(const Tensor& cov) {
  const Place place(cov);
  const int64_t B = cov.size(0), K = cov.size(1);
  expect(cov, "cov", {B, K, K}, cov.scalar_type());
  const Tensor result = make_tensor(cov, {B}), info = make_tensor(cov, {B}, ScalarType::Int);
  place.for_dtype(cov.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    MatrixNormalArgs<Real> args{};
    args.K = K;
    args.cov = batch_of<const Real>(cov);
    args.result = data_of<Real>(result);
    args.info = data_of<int32_t>(info);
    place.run(B, &Kernels<Real>::logdet, FASTKM_LAUNCHER(logdet), args);
  });
  return {result, info};
}

template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor> kl_memory_backward(const Tensor& mean, const Tensor& cov,
                                                                     const Tensor& prior_mean, const Tensor& prior_cov,
                                                                     const Tensor& grad_kl) {
  const Place place(mean, cov, prior_mean, prior_cov, grad_kl);
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2);
  const ScalarType type = mean.scalar_type();
  expect(cov, "cov", {B, K, K}, type);
  expect(prior_mean, "prior_mean", {B, K, C}, type);
  expect(prior_cov, "prior_cov", {B, K, K}, type);
  expect(grad_kl, "grad_kl", {B}, type);
  const Tensor to_mean = make_tensor(mean, {B, K, C}), to_cov = make_tensor(mean, {B, K, K});
  const Tensor to_prior_mean = make_tensor(mean, {B, K, C}), to_prior_cov = make_tensor(mean, {B, K, K});
  place.for_dtype(type, [&](auto scalar) {
    using Real = decltype(scalar);
    const MatrixNormalArgs<Real> args{.K = K,
                                      .C = C,
                                      .mean = batch_of<const Real>(mean),
                                      .cov = batch_of<const Real>(cov),
                                      .prior_mean = batch_of<const Real>(prior_mean),
                                      .prior_cov = batch_of<const Real>(prior_cov)};
    const MatrixNormalGrads<Real> grads{.result = batch_of<const Real>(grad_kl),
                                        .to_mean = batch_of<Real>(to_mean),
                                        .to_cov = batch_of<Real>(to_cov),
                                        .to_prior_mean = batch_of<Real>(to_prior_mean),
                                        .to_prior_cov = batch_of<Real>(to_prior_cov)};
    place.run(B, &Kernels<Real>::kl_memory_backward, FASTKM_LAUNCHER(kl_memory_backward), args, grads);
  });
  return {to_mean, to_cov, to_prior_mean, to_prior_cov};
}

template <class Place>
static Tensor logdet_backward(const Tensor& cov, const Tensor& grad_logdet) {
  const Place place(cov, grad_logdet);
  const int64_t B = cov.size(0), K = cov.size(1);
  expect(cov, "cov", {B, K, K}, cov.scalar_type());
  expect(grad_logdet, "grad_logdet", {B}, cov.scalar_type());
  const Tensor to_cov = make_tensor(cov, {B, K, K});
  place.for_dtype(cov.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    const MatrixNormalArgs<Real> args{.K = K, .cov = batch_of<const Real>(cov)};
    const MatrixNormalGrads<Real> grads{.result = batch_of<const Real>(grad_logdet), .to_cov = batch_of<Real>(to_cov)};
    place.run(B, &Kernels<Real>::logdet_backward, FASTKM_LAUNCHER(logdet_backward), args, grads);
  });
  return to_cov;
}

template <class Place, class Library>
static void register_matrix_normal(Library& m) {
  m.impl("kl_memory", TORCH_BOX(&kl_memory<Place>));
  m.impl("logdet", TORCH_BOX(&logdet<Place>));
  m.impl("kl_memory_backward", TORCH_BOX(&kl_memory_backward<Place>));
  m.impl("logdet_backward", TORCH_BOX(&logdet_backward<Place>));
}
FASTKM_REGISTER(register_matrix_normal)

}  // namespace fastkm
