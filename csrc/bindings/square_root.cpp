// Binds update_square_root to torch.ops.fastkm.
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
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2);
  const Tensor new_mean = make_tensor(mean, {B, K, C}), new_root = make_tensor(mean, {B, K, K});
  const Tensor info = make_tensor(mean, {B}, ScalarType::Int);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    PosteriorArgs<Real> args = posterior_args<Real>(place, mean, root, values, noise_var, mask, kIeee);
    set_weights(place, args, weights, mean);
    args.new_mean = batch_of<Real>(new_mean);
    args.new_cov = batch_of<Real>(new_root);
    args.info = data_of<int32_t>(info);
    place.run(B, &Kernels<Real>::update_square_root, nullptr, args);
  });
  return {new_mean, new_root, info};
}

template <class Place, class Library>
static void register_square_root(Library& m) {
  if constexpr (Place::kOnHost) m.impl("update_square_root", TORCH_BOX(&update_square_root<Place>));
}
FASTKM_REGISTER(register_square_root)

}  // namespace fastkm
