// Binds write and its backward to torch.ops.fastkm on the CPU.
#include <tuple>

#include "posterior_args.h"

namespace fastkm {

template <class T>
static WritingArgs<T> writing_args(const Tensor& mean, const Tensor& cov, const Tensor& values, const Tensor& noise_var,
                                   const Tensor& ridge, int64_t num_opt_iters, bool squared_gram,
                                   const std::optional<Tensor>& mask, int64_t precision) {
  expect(ridge, "ridge", {mean.size(0)}, mean.scalar_type());
  STD_TORCH_CHECK(num_opt_iters >= 1, "fastkm: num_opt_iters must be at least 1");
  return {.posterior = posterior_args<T>(mean, cov, values, noise_var, mask, precision),
          .ridge = batch_of<const T>(ridge),
          .num_opt_iters = num_opt_iters,
          .squared_gram = squared_gram,
          .new_weights = {}};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> write(
    const Tensor& mean, const Tensor& cov, const Tensor& values, const Tensor& noise_var, const Tensor& ridge,
    int64_t num_opt_iters, bool squared_gram, const std::optional<Tensor>& mask, int64_t precision) {
  const PosteriorOutputs out(mean, values);
  const Tensor weights = make(mean, {values.size(0), values.size(1), mean.size(1)});
  for_dtype(mean.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    WritingArgs<T> args =
        writing_args<T>(mean, cov, values, noise_var, ridge, num_opt_iters, squared_gram, mask, precision);
    args.new_weights = batch_of<T>(weights);
    out.into(args.posterior);
    const auto& run = kernels<T>().write;
    over_threads(mean.size(0), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  });
  return {out.mean, out.cov, weights, out.innovation_var, out.kl, out.info};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> write_backward(
    const Tensor& mean, const Tensor& cov, const Tensor& values, const Tensor& noise_var, const Tensor& ridge,
    int64_t num_opt_iters, bool squared_gram, const std::optional<Tensor>& mask, int64_t precision,
    const Tensor& weights, const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_cov,
    const std::optional<Tensor>& grad_weights, const std::optional<Tensor>& grad_innovation_var,
    const std::optional<Tensor>& grad_kl) {
  const PosteriorGradOutputs out(mean, values);
  const Tensor to_ridge = make(mean, {mean.size(0)});
  for_dtype(mean.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    WritingArgs<T> args =
        writing_args<T>(mean, cov, values, noise_var, ridge, num_opt_iters, squared_gram, mask, precision);
    args.posterior.weights = weights_of<T>(weights, args.posterior, mean);
    const WritingGrads<T> grads{
        .posterior = out.grads<T>(grad_mean, grad_cov, grad_innovation_var, grad_kl),
        .weights = cotangent_of<T>(grad_weights, "grad_weights", {mean.size(0), values.size(1), mean.size(1)}, mean),
        .to_ridge = batch_of<T>(to_ridge)};
    const auto& run = kernels<T>().write_backward;
    over_threads(mean.size(0), [&](int64_t begin, int64_t end) { run(args, grads, begin, end); });
  });
  return {out.mean, out.cov, out.values, out.noise_var, to_ridge};
}

STABLE_TORCH_LIBRARY_IMPL(fastkm, CPU, m) {
  m.impl("write", TORCH_BOX(&write));
  m.impl("write_backward", TORCH_BOX(&write_backward));
}

}  // namespace fastkm
