// Binds update_posterior and its backward to torch.ops.fastkm on the CPU.
#include <tuple>

#include "posterior_args.h"

namespace fastkm {

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> update_posterior(
    const Tensor& mean, const Tensor& cov, const Tensor& weights, const Tensor& values, const Tensor& noise_var,
    const std::optional<Tensor>& mask, int64_t precision) {
  const PosteriorOutputs out(mean, values);
  const Tensor log_evidence = make(mean, {mean.size(0)});
  for_dtype(mean.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    PosteriorArgs<T> args = posterior_args<T>(mean, cov, values, noise_var, mask, precision);
    args.weights = weights_of<T>(weights, args, mean);
    args.log_evidence = data_of<T>(log_evidence);
    out.into(args);
    const auto& run = kernels<T>().update_posterior;
    over_threads(mean.size(0), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  });
  return {out.mean, out.cov, out.innovation_var, out.kl, log_evidence, out.info};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> update_posterior_backward(
    const Tensor& mean, const Tensor& cov, const Tensor& weights, const Tensor& values, const Tensor& noise_var,
    const std::optional<Tensor>& mask, int64_t precision, const std::optional<Tensor>& grad_mean,
    const std::optional<Tensor>& grad_cov, const std::optional<Tensor>& grad_innovation_var,
    const std::optional<Tensor>& grad_kl, const std::optional<Tensor>& grad_log_evidence) {
  const PosteriorGradOutputs out(mean, values);
  const Tensor to_weights = make(mean, {values.size(0), values.size(1), mean.size(1)});
  for_dtype(mean.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    PosteriorArgs<T> args = posterior_args<T>(mean, cov, values, noise_var, mask, precision);
    args.weights = weights_of<T>(weights, args, mean);
    PosteriorGrads<T> grads = out.grads<T>(grad_mean, grad_cov, grad_innovation_var, grad_kl);
    grads.log_evidence = cotangent_of<T>(grad_log_evidence, "grad_log_evidence", {mean.size(0)}, mean);
    grads.to_weights = batch_of<T>(to_weights);
    const auto& run = kernels<T>().update_posterior_backward;
    over_threads(mean.size(0), [&](int64_t begin, int64_t end) { run(args, grads, begin, end); });
  });
  return {out.mean, out.cov, to_weights, out.values, out.noise_var};
}

STABLE_TORCH_LIBRARY_IMPL(fastkm, CPU, m) {
  m.impl("update_posterior", TORCH_BOX(&update_posterior));
  m.impl("update_posterior_backward", TORCH_BOX(&update_posterior_backward));
}

}  // namespace fastkm
