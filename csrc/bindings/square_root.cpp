// Binds update_square_root and its backward to torch.ops.fastkm.
#include <tuple>

#include "bindings/conditioning_args.h"
#include "bindings/make_tensor.h"
#include "bindings/register.h"
#include "bindings/tensor_args.h"

namespace fastkm {

template <class Place>
static std::tuple<Tensor, Tensor, Tensor> update_square_root(const Tensor& mean, const Tensor& root,
                                                             const Tensor& weights, const Tensor& values,
                                                             const Tensor& noise_var,
                                                             const std::optional<Tensor>& mask) {
  const Place place(mean, root, weights, values, noise_var, mask);
  const NewMemory out(mean);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    PosteriorArgs<Real> args = patterns_args<Real>(place, mean, root, {weights, values, noise_var}, mask);
    out.into(args);
    place.run(mean.size(0), &Kernels<Real>::update_square_root, nullptr, args);
  });
  return {out.mean, out.cov, out.info};
}

template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> update_square_root_backward(
    const Tensor& mean, const Tensor& root, const Tensor& weights, const Tensor& values, const Tensor& noise_var,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_root) {
  const Place place(mean, root, weights, values, noise_var, mask, grad_mean, grad_root);
  expect(noise_var, "noise_var", {values.size(0), values.size(1)}, mean.scalar_type());
  const PatternsGradOutputs out(mean, values);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    const PosteriorArgs<Real> args = patterns_args<Real>(place, mean, root, {weights, values, noise_var}, mask);
    place.run(mean.size(0), &Kernels<Real>::update_square_root_backward, nullptr, args,
              out.grads<Real>(grad_mean, grad_root));
  });
  return {out.of.mean, out.of.cov, out.weights, out.of.values, out.of.noise_var};
}

template <class Place, class Library>
static void register_square_root(Library& m) {
  if constexpr (Place::kOnHost) {
    m.impl("update_square_root", TORCH_BOX(&update_square_root<Place>));
    m.impl("update_square_root_backward", TORCH_BOX(&update_square_root_backward<Place>));
  }
}
FASTKM_REGISTER(register_square_root)

}  // namespace fastkm
