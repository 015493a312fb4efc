// Binds update_posterior to torch.ops.fastkm on the CPU.
#include "posterior_args.h"

#include <tuple>

namespace fastkm {

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> update_posterior(
    const Tensor& mean, const Tensor& cov, const Tensor& weights, const Tensor& values, const Tensor& noise_var,
    const std::optional<Tensor>& mask) {
  PosteriorOutputs out(mean, cov, values, noise_var, mask);
  expect(weights, "weights", {mean.size(0), values.size(1), mean.size(1)}, mean.scalar_type());
  const Tensor log_evidence = make(mean, {mean.size(0)});
  for_dtype(mean.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    PosteriorArgs<T> args = out.args<T>(mean, cov, values, noise_var, mask);
    args.weights = batch_of<const T>(weights);
    args.log_evidence = data_of<T>(log_evidence);
    const auto& run = kernels<T>().update_posterior;
    over_threads(mean.size(0), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  });
  return {out.mean, out.cov, out.innovation_var, out.kl, log_evidence, out.info};
}

STABLE_TORCH_LIBRARY_IMPL(fastkm, CPU, m) { m.impl("update_posterior", TORCH_BOX(&update_posterior)); }

}  // namespace fastkm
