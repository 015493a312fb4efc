// Binds update_posterior and its backward to torch.ops.fastkm.
#include <tuple>

#include "bindings/conditioning_args.h"
#include "bindings/make_tensor.h"
#include "bindings/register.h"
#include "bindings/tensor_args.h"

namespace fastkm {

template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> update_posterior(
    const Tensor& mean, const Tensor& cov, const Tensor& weights, const Tensor& values, const Tensor& noise_var,
    const std::optional<Tensor>& mask, int64_t precision) {
  const Place place(mean, cov, weights, values, noise_var, mask);
  const PosteriorOutputs out(mean, values);
  const Tensor log_evidence = make_tensor(mean, {mean.size(0)});
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    PosteriorArgs<Real> args = posterior_args<Real>(place, mean, cov, values, noise_var, mask, precision);
    set_weights(place, args, weights, mean);
    args.log_evidence = data_of<Real>(log_evidence);
    out.into(args);
    place.run(mean.size(0), &Kernels<Real>::update_posterior, FASTKM_LAUNCHER(update_posterior), args);
  });
  return {out.mean, out.cov, out.innovation_var, out.kl, log_evidence, out.info};
}

// The same into a memory of the caller, on a CPU. `out_mean` may be `mean`, and `out_cov` may be `cov`.
template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor> update_posterior_into(
    const Tensor& mean, const Tensor& cov, const Tensor& weights, const Tensor& values, const Tensor& noise_var,
    const std::optional<Tensor>& mask, int64_t precision, const Tensor& out_mean, const Tensor& out_cov) {
  const Place place(mean, cov, weights, values, noise_var, mask, out_mean, out_cov);
  const int64_t B = mean.size(0), T = values.size(1);
  const Tensor innovation_var = make_tensor(mean, {B, T}), kl = make_tensor(mean, {B, T});
  const Tensor log_evidence = make_tensor(mean, {B}), info = make_tensor(mean, {B}, ScalarType::Int);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    PosteriorArgs<Real> args = posterior_args<Real>(place, mean, cov, values, noise_var, mask, precision);
    set_weights(place, args, weights, mean);
    MemoryOut{out_mean, out_cov}.into(args, mean, cov, {&weights, &values, &noise_var, mask ? &*mask : nullptr});
    args.innovation_var = batch_of<Real>(innovation_var);
    args.kl = batch_of<Real>(kl);
    args.log_evidence = data_of<Real>(log_evidence);
    args.info = data_of<int32_t>(info);
    place.run(B, &Kernels<Real>::update_posterior_into, nullptr, args);
  });
  return {innovation_var, kl, log_evidence, info};
}

template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> update_posterior_backward(
    const Tensor& mean, const Tensor& cov, const Tensor& weights, const Tensor& values, const Tensor& noise_var,
    const std::optional<Tensor>& mask, int64_t precision, const std::optional<Tensor>& grad_mean,
    const std::optional<Tensor>& grad_cov, const std::optional<Tensor>& grad_innovation_var,
    const std::optional<Tensor>& grad_kl, const std::optional<Tensor>& grad_log_evidence) {
  const Place place(mean, cov, weights, values, noise_var, mask, grad_mean, grad_cov, grad_innovation_var, grad_kl,
                    grad_log_evidence);
  expect(noise_var, "noise_var", {values.size(0), values.size(1)}, mean.scalar_type());
  const PosteriorGradOutputs out(mean, values);
  const Tensor to_weights = make_tensor(mean, {values.size(0), values.size(1), mean.size(1)});
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    PosteriorArgs<Real> args = posterior_args<Real>(place, mean, cov, values, noise_var, mask, precision);
    set_weights(place, args, weights, mean);
    PosteriorGrads<Real> grads = out.grads<Real>(grad_mean, grad_cov, grad_innovation_var, grad_kl);
    grads.log_evidence = cotangent_of<Real>(grad_log_evidence, "grad_log_evidence", {mean.size(0)}, mean);
    grads.to_weights = batch_of<Real>(to_weights);
    place.run(mean.size(0), &Kernels<Real>::update_posterior_backward, FASTKM_LAUNCHER(update_posterior_backward), args,
              grads);
  });
  return {out.mean, out.cov, place.like_codes(to_weights, weights), place.like_codes(out.values, values),
          out.noise_var};
}

template <class Place, class Library>
static void register_posterior(Library& m) {
  m.impl("update_posterior", TORCH_BOX(&update_posterior<Place>));
  m.impl("update_posterior_backward", TORCH_BOX(&update_posterior_backward<Place>));
  if constexpr (Place::kOnHost) m.impl("update_posterior_into", TORCH_BOX(&update_posterior_into<Place>));
}
FASTKM_REGISTER(register_posterior)

}  // namespace fastkm
