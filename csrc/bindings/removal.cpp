// Binds remove_patterns and replace_patterns, and their backwards, to torch.ops.fastkm.
#include <tuple>

#include "bindings/conditioning_args.h"
#include "bindings/make_tensor.h"
#include "bindings/register.h"
#include "bindings/tensor_args.h"

namespace fastkm {

using Removed = std::tuple<Tensor, Tensor, Tensor>;

template <class Place>
static Removed remove_patterns(const Tensor& mean, const Tensor& cov, const Tensor& weights, const Tensor& values,
                               const Tensor& noise_var, const std::optional<Tensor>& mask) {
  const Place place(mean, cov, weights, values, noise_var, mask);
  const NewMemory out(mean);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    PosteriorArgs<Real> args = patterns_args<Real>(place, mean, cov, {weights, values, noise_var}, mask);
    out.into(args);
    place.run(mean.size(0), &Kernels<Real>::remove_patterns, FASTKM_LAUNCHER(remove_patterns), args);
  });
  return {out.mean, out.cov, out.info};
}

// On a CPU in one pass over the memory; on a GPU the kernels of an update and of a removal run one after the other.
template <class Place>
static Removed replace_patterns(const Tensor& mean, const Tensor& cov, const Tensor& old_weights,
                                const Tensor& old_values, const Tensor& weights, const Tensor& values,
                                const Tensor& noise_var, const Tensor& old_noise_var,
                                const std::optional<Tensor>& mask) {
  const Place place(mean, cov, old_weights, old_values, weights, values, noise_var, old_noise_var, mask);
  const NewMemory out(mean);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    PosteriorArgs<Real> args = patterns_args<Real>(place, mean, cov, {weights, values, noise_var}, mask);
    out.into(args);
    PosteriorArgs<Real> old = patterns_args<Real>(place, mean, cov, {old_weights, old_values, old_noise_var}, mask);
    STD_TORCH_CHECK(old.T == args.T, "fastkm: as many patterns must come as leave");
    if constexpr (Place::kOnHost) {
      place.run(mean.size(0), &Kernels<Real>::replace_patterns, nullptr,
                ReplacingArgs<Real>{args, old.weights, old.values, old.noise_var});
    } else {
      const PosteriorOutputs between(mean, values);
      const Tensor log_evidence = make_tensor(mean, {mean.size(0)});
      out.into(old);
      between.into(args);
      args.log_evidence = data_of<Real>(log_evidence);
      args.info = old.info;
      old.mean = batch_of<const Real>(between.mean);
      old.cov = batch_of<const Real>(between.cov);
      place.run(mean.size(0), &Kernels<Real>::replace_patterns, FASTKM_LAUNCHER(replace_patterns), args, old);
    }
  });
  return {out.mean, out.cov, out.info};
}

template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> remove_patterns_backward(
    const Tensor& mean, const Tensor& cov, const Tensor& weights, const Tensor& values, const Tensor& noise_var,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_cov) {
  const Place place(mean, cov, weights, values, noise_var, mask, grad_mean, grad_cov);
  expect(noise_var, "noise_var", {values.size(0), values.size(1)}, mean.scalar_type());
  const PatternsGradOutputs out(mean, values);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    const PosteriorArgs<Real> args = patterns_args<Real>(place, mean, cov, {weights, values, noise_var}, mask);
    place.run(mean.size(0), &Kernels<Real>::remove_patterns_backward, FASTKM_LAUNCHER(remove_patterns_backward), args,
              out.grads<Real>(grad_mean, grad_cov));
  });
  return {out.of.mean, out.of.cov, place.like_codes(out.weights, weights), place.like_codes(out.of.values, values),
          out.of.noise_var};
}

// Through the memory between the update and the removal, which is computed again.
template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> replace_patterns_backward(
    const Tensor& mean, const Tensor& cov, const Tensor& old_weights, const Tensor& old_values, const Tensor& weights,
    const Tensor& values, const Tensor& noise_var, const Tensor& old_noise_var, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_cov) {
  const Place place(mean, cov, old_weights, old_values, weights, values, noise_var, old_noise_var, mask, grad_mean,
                    grad_cov);
  const int64_t B = mean.size(0);
  for (const auto& [noise, of] : {std::pair{&noise_var, &values}, std::pair{&old_noise_var, &old_values}})
    expect(*noise, "noise_var", {of->size(0), of->size(1)}, mean.scalar_type());
  const PosteriorOutputs between(mean, values);
  const Tensor log_evidence = make_tensor(mean, {B});
  const PatternsGradOutputs out(mean, values), old_out(mean, old_values);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    PosteriorArgs<Real> args = patterns_args<Real>(place, mean, cov, {weights, values, noise_var}, mask);
    args.log_evidence = data_of<Real>(log_evidence);
    between.into(args);
    place.run(B, &Kernels<Real>::update_posterior, FASTKM_LAUNCHER(update_posterior), args);
    const PosteriorArgs<Real> old =
        patterns_args<Real>(place, between.mean, between.cov, {old_weights, old_values, old_noise_var}, mask);
    place.run(B, &Kernels<Real>::remove_patterns_backward, FASTKM_LAUNCHER(remove_patterns_backward), old,
              old_out.grads<Real>(grad_mean, grad_cov));
    place.run(B, &Kernels<Real>::update_posterior_backward, FASTKM_LAUNCHER(update_posterior_backward), args,
              out.grads<Real>(old_out.of.mean, old_out.of.cov));
  });
  return {out.of.mean,
          out.of.cov,
          place.like_codes(old_out.weights, old_weights),
          place.like_codes(old_out.of.values, old_values),
          place.like_codes(out.weights, weights),
          place.like_codes(out.of.values, values),
          out.of.noise_var,
          old_out.of.noise_var};
}

template <class Place, class Library>
static void register_removal(Library& m) {
  m.impl("remove_patterns", TORCH_BOX(&remove_patterns<Place>));
  m.impl("remove_patterns_backward", TORCH_BOX(&remove_patterns_backward<Place>));
  m.impl("replace_patterns", TORCH_BOX(&replace_patterns<Place>));
  m.impl("replace_patterns_backward", TORCH_BOX(&replace_patterns_backward<Place>));
}
FASTKM_REGISTER(register_removal)

}  // namespace fastkm
