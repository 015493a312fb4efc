// Binds filter_posterior and its backward to torch.ops.fastkm.
#include <tuple>

#include "bindings/conditioning_args.h"
#include "bindings/make_tensor.h"
#include "bindings/register.h"
#include "bindings/tensor_args.h"

namespace fastkm {

// The arguments that describe the decay, and which reads see what is written.
struct FilterOptions {
  const std::optional<Tensor>&retention, &forgetting;
  const Tensor& prior_var;
  bool read_before;
};

template <class Real, class Place>
static FilteringArgs<Real> filtering_args(const Place& place, PosteriorArgs<Real> posterior, const Tensor& queries,
                                          const FilterOptions& options, const Tensor& mean) {
  const int64_t B = mean.size(0), T = posterior.T;
  STD_TORCH_CHECK(!options.retention || !options.forgetting,
                  "fastkm: retention and forgetting are two laws of decay; give one of them");
  const auto factors = [&](const std::optional<Tensor>& tensor, const char* name) {
    return tensor ? positive_numbers_of<Real>(place, *tensor, name, {B, T}, mean, Real(1)) : Batch<const Real>{};
  };
  return {.posterior = posterior,
          .queries = batch_of<const Real>(queries),
          .retention = factors(options.retention, "retention"),
          .forgetting = factors(options.forgetting, "forgetting"),
          .prior_var = positive_numbers_of<Real>(place, options.prior_var, "prior_var", {B}, mean),
          .read_before = options.read_before,
          .queries_type = place.expect_codes(queries, "queries", {B, T, posterior.K}, mean)};
}

template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> filter_posterior(
    const Tensor& mean, const Tensor& cov, const Tensor& weights, const Tensor& values, const Tensor& queries,
    const Tensor& noise_var, const std::optional<Tensor>& retention, const Tensor& prior_var,
    const std::optional<Tensor>& forgetting, bool read_before, const std::optional<Tensor>& mask, int64_t precision) {
  const Place place(mean, cov, weights, values, queries, noise_var, retention, prior_var, forgetting, mask);
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2), T = values.size(1);
  const Tensor new_mean = make_tensor(mean, {B, K, C}), new_cov = make_tensor(mean, {B, K, K});
  const Tensor read_values = make_tensor(mean, {B, T, C}), variance = make_tensor(mean, {B, T});
  const Tensor innovation_var = make_tensor(mean, {B, T}), log_evidence = make_tensor(mean, {B});
  const Tensor info = make_tensor(mean, {B}, ScalarType::Int);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    PosteriorArgs<Real> posterior = posterior_args<Real>(place, mean, cov, values, noise_var, mask, precision);
    set_weights(place, posterior, weights, mean);
    posterior.new_mean = batch_of<Real>(new_mean);
    posterior.new_cov = batch_of<Real>(new_cov);
    posterior.innovation_var = batch_of<Real>(innovation_var);
    posterior.log_evidence = data_of<Real>(log_evidence);
    posterior.info = data_of<int32_t>(info);
    const FilterOptions options{retention, forgetting, prior_var, read_before};
    FilteringArgs<Real> args = filtering_args<Real>(place, posterior, queries, options, mean);
    args.read_values = batch_of<Real>(read_values);
    args.variance = batch_of<Real>(variance);
    place.run(B, &Kernels<Real>::filter_posterior, FASTKM_LAUNCHER(filter_posterior), args);
  });
  return {new_mean, new_cov, read_values, variance, innovation_var, log_evidence, info};
}

template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> filter_posterior_backward(
    const Tensor& mean, const Tensor& cov, const Tensor& weights, const Tensor& values, const Tensor& queries,
    const Tensor& noise_var, const std::optional<Tensor>& retention, const Tensor& prior_var,
    const std::optional<Tensor>& forgetting, bool read_before, const std::optional<Tensor>& mask, int64_t precision,
    const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_cov,
    const std::optional<Tensor>& grad_values, const std::optional<Tensor>& grad_variance,
    const std::optional<Tensor>& grad_innovation_var, const std::optional<Tensor>& grad_log_evidence) {
  const Place place(mean, cov, weights, values, queries, noise_var, retention, prior_var, forgetting, mask, grad_mean,
                    grad_cov, grad_values, grad_variance, grad_innovation_var, grad_log_evidence);
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2), T = values.size(1);
  expect(noise_var, "noise_var", {B, T}, mean.scalar_type());
  expect(prior_var, "prior_var", {B}, mean.scalar_type());
  if (retention) expect(*retention, "retention", {B, T}, mean.scalar_type());
  if (forgetting) expect(*forgetting, "forgetting", {B, T}, mean.scalar_type());
  const PosteriorGradOutputs out(mean, values);
  const Tensor to_weights = make_tensor(mean, {B, T, K}), to_queries = make_tensor(mean, {B, T, K});
  const Tensor to_retention = retention ? make_tensor(mean, {B, T}) : make_tensor(mean, {0});
  const Tensor to_forgetting = forgetting ? make_tensor(mean, {B, T}) : make_tensor(mean, {0});
  const Tensor to_prior_var = make_tensor(mean, {B});
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    PosteriorArgs<Real> posterior = posterior_args<Real>(place, mean, cov, values, noise_var, mask, precision);
    set_weights(place, posterior, weights, mean);
    const FilterOptions options{retention, forgetting, prior_var, read_before};
    const FilteringArgs<Real> args = filtering_args<Real>(place, posterior, queries, options, mean);
    FilteringGrads<Real> grads{.posterior = out.grads<Real>(grad_mean, grad_cov, grad_innovation_var, std::nullopt),
                               .read_values = cotangent_of<Real>(grad_values, "grad_values", {B, T, C}, mean),
                               .variance = cotangent_of<Real>(grad_variance, "grad_variance", {B, T}, mean),
                               .to_queries = batch_of<Real>(to_queries),
                               .to_retention = batch_of<Real>(to_retention),
                               .to_forgetting = batch_of<Real>(to_forgetting),
                               .to_prior_var = batch_of<Real>(to_prior_var)};
    grads.posterior.log_evidence = cotangent_of<Real>(grad_log_evidence, "grad_log_evidence", {B}, mean);
    grads.posterior.to_weights = batch_of<Real>(to_weights);
    place.run(B, &Kernels<Real>::filter_posterior_backward, FASTKM_LAUNCHER(filter_posterior_backward), args, grads);
  });
  return {out.mean,
          out.cov,
          place.like_codes(to_weights, weights),
          place.like_codes(out.values, values),
          place.like_codes(to_queries, queries),
          out.noise_var,
          to_retention,
          to_prior_var,
          to_forgetting};
}

template <class Place, class Library>
static void register_filtering(Library& m) {
  m.impl("filter_posterior", TORCH_BOX(&filter_posterior<Place>));
  m.impl("filter_posterior_backward", TORCH_BOX(&filter_posterior_backward<Place>));
}
FASTKM_REGISTER(register_filtering)

}  // namespace fastkm
