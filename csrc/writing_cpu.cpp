// Binds write to torch.ops.fastkm on the CPU.
#include <tuple>

#include "posterior_args.h"

namespace fastkm {

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> write(
    const Tensor& mean, const Tensor& cov, const Tensor& values, const Tensor& noise_var, const Tensor& ridge,
    int64_t num_opt_iters, bool squared_gram, const std::optional<Tensor>& mask) {
  PosteriorOutputs out(mean, cov, values, noise_var, mask);
  expect(ridge, "ridge", {mean.size(0)}, mean.scalar_type());
  const Tensor weights = make(mean, {values.size(0), values.size(1), mean.size(1)});
  for_dtype(mean.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    const WritingArgs<T> args{.posterior = out.args<T>(mean, cov, values, noise_var, mask),
                              .ridge = batch_of<const T>(ridge),
                              .num_opt_iters = num_opt_iters,
                              .squared_gram = squared_gram,
                              .new_weights = batch_of<T>(weights)};
    const auto& run = kernels<T>().write;
    over_threads(mean.size(0), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  });
  return {out.mean, out.cov, weights, out.innovation_var, out.kl, out.info};
}

STABLE_TORCH_LIBRARY_IMPL(fastkm, CPU, m) { m.impl("write", TORCH_BOX(&write)); }

}  // namespace fastkm
