// Binds write and its backward to torch.ops.fastkm.
#include <tuple>

#include "bindings/conditioning_args.h"
#include "bindings/make_tensor.h"
#include "bindings/register.h"
#include "bindings/tensor_args.h"

namespace fastkm {

struct WritingOptions {
  int64_t num_opt_iters;
  bool squared_gram;
  int64_t precision;
};

template <class Real, class Place>
static WritingArgs<Real> writing_args(const Place& place, const Tensor& mean, const Tensor& cov, const Tensor& values,
                                      const Tensor& noise_var, const Tensor& ridge, const WritingOptions& options,
                                      const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(options.num_opt_iters >= 1, "fastkm: num_opt_iters must be at least 1");
  return {.posterior = posterior_args<Real>(place, mean, cov, values, noise_var, mask, options.precision),
          .ridge = positive_numbers_of<Real>(place, ridge, "ridge", {mean.size(0)}, mean),
          .num_opt_iters = options.num_opt_iters,
          .squared_gram = options.squared_gram,
          .new_weights = {}};
}

template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> write(
    const Tensor& mean, const Tensor& cov, const Tensor& values, const Tensor& noise_var, const Tensor& ridge,
    int64_t num_opt_iters, bool squared_gram, const std::optional<Tensor>& mask, int64_t precision) {
  const Place place(mean, cov, values, noise_var, ridge, mask);
  const PosteriorOutputs out(mean, values);
  const Tensor weights = make_tensor(mean, {values.size(0), values.size(1), mean.size(1)});
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    WritingArgs<Real> args =
        writing_args<Real>(place, mean, cov, values, noise_var, ridge, {num_opt_iters, squared_gram, precision}, mask);
    args.new_weights = batch_of<Real>(weights);
    out.into(args.posterior);
    place.run(mean.size(0), &Kernels<Real>::write, FASTKM_LAUNCHER(write), args);
  });
  return {out.mean, out.cov, weights, out.innovation_var, out.kl, out.info};
}

// The same into a memory of the caller, on a CPU. `out_mean` may be `mean`, and `out_cov` may be `cov`.
template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor> write_into(const Tensor& mean, const Tensor& cov,
                                                             const Tensor& values, const Tensor& noise_var,
                                                             const Tensor& ridge, int64_t num_opt_iters,
                                                             bool squared_gram, const std::optional<Tensor>& mask,
                                                             int64_t precision, const Tensor& out_mean,
                                                             const Tensor& out_cov) {
  const Place place(mean, cov, values, noise_var, ridge, mask, out_mean, out_cov);
  const int64_t B = mean.size(0), T = values.size(1);
  const Tensor weights = make_tensor(mean, {B, T, mean.size(1)}), info = make_tensor(mean, {B}, ScalarType::Int);
  const Tensor innovation_var = make_tensor(mean, {B, T}), kl = make_tensor(mean, {B, T});
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    WritingArgs<Real> args =
        writing_args<Real>(place, mean, cov, values, noise_var, ridge, {num_opt_iters, squared_gram, precision}, mask);
    args.new_weights = batch_of<Real>(weights);
    MemoryOut{out_mean, out_cov}.into(args.posterior, mean, cov,
                                      {&values, &noise_var, &ridge, mask ? &*mask : nullptr});
    args.posterior.innovation_var = batch_of<Real>(innovation_var);
    args.posterior.kl = batch_of<Real>(kl);
    args.posterior.info = data_of<int32_t>(info);
    place.run(B, &Kernels<Real>::write, nullptr, args);
  });
  return {weights, innovation_var, kl, info};
}

template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> write_backward(
    const Tensor& mean, const Tensor& cov, const Tensor& values, const Tensor& noise_var, const Tensor& ridge,
    int64_t num_opt_iters, bool squared_gram, const std::optional<Tensor>& mask, int64_t precision,
    const Tensor& weights, const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_cov,
    const std::optional<Tensor>& grad_weights, const std::optional<Tensor>& grad_innovation_var,
    const std::optional<Tensor>& grad_kl) {
  const Place place(mean, cov, values, noise_var, ridge, mask, weights, grad_mean, grad_cov, grad_weights,
                    grad_innovation_var, grad_kl);
  expect(noise_var, "noise_var", {values.size(0), values.size(1)}, mean.scalar_type());
  expect(ridge, "ridge", {mean.size(0)}, mean.scalar_type());
  const PosteriorGradOutputs out(mean, values);
  const Tensor to_ridge = make_tensor(mean, {mean.size(0)});
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    WritingArgs<Real> args =
        writing_args<Real>(place, mean, cov, values, noise_var, ridge, {num_opt_iters, squared_gram, precision}, mask);
    expect(weights, "weights", {mean.size(0), values.size(1), mean.size(1)}, mean.scalar_type());
    args.posterior.weights = batch_of<const Real>(weights);
    const WritingGrads<Real> grads{
        .posterior = out.grads<Real>(grad_mean, grad_cov, grad_innovation_var, grad_kl),
        .weights = cotangent_of<Real>(grad_weights, "grad_weights", {mean.size(0), values.size(1), mean.size(1)}, mean),
        .to_ridge = batch_of<Real>(to_ridge)};
    place.run(mean.size(0), &Kernels<Real>::write_backward, FASTKM_LAUNCHER(write_backward), args, grads);
  });
  return {out.mean, out.cov, place.like_codes(out.values, values), out.noise_var, to_ridge};
}

#ifndef FASTKM_SIMT
// The write of a memory of which only inner products are known. There is no kernel for a GPU.
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> write_gram(const Tensor& gram, const Tensor& cov,
                                                                             const Tensor& noise_var,
                                                                             const Tensor& ridge, int64_t columns,
                                                                             int64_t num_opt_iters,
                                                                             const std::optional<Tensor>& mask) {
  const Cpu place(gram, cov, noise_var, ridge, mask);
  const int64_t B = cov.size(0), K = cov.size(1), T = gram.size(1) - K;
  STD_TORCH_CHECK(num_opt_iters >= 1, "fastkm: num_opt_iters must be at least 1");
  STD_TORCH_CHECK(columns >= 0 && T >= 0, "fastkm: gram must be [B, K + T, K + T], and columns at least 0");
  const Tensor new_cov = make_tensor(cov, {B, K, K}), weights = make_tensor(cov, {B, T, K});
  const Tensor innovation_var = make_tensor(cov, {B, T}), kl = make_tensor(cov, {B, T});
  const Tensor pivots = make_tensor(cov, {B, K + T}), info = make_tensor(cov, {B}, ScalarType::Int);
  place.for_dtype(cov.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    expect(cov, "cov", {B, K, K}, cov.scalar_type());
    expect(gram, "gram", {B, K + T, K + T}, cov.scalar_type());
    if (mask) expect(*mask, "mask", {B, T}, ScalarType::Bool);
    GramWritingArgs<Real> args{.gram = batch_of<const Real>(gram), .pivots = batch_of<Real>(pivots)};
    args.writing.ridge = positive_numbers_of<Real>(place, ridge, "ridge", {B}, cov);
    args.writing.num_opt_iters = num_opt_iters;
    args.writing.squared_gram = false;
    args.writing.new_weights = batch_of<Real>(weights);
    PosteriorArgs<Real>& posterior = args.writing.posterior;
    posterior.K = K;
    posterior.C = columns;
    posterior.T = T;
    posterior.cov = batch_of<const Real>(cov);
    posterior.noise_var = positive_numbers_of<Real>(place, noise_var, "noise_var", {B, T}, cov);
    if (mask) posterior.mask = batch_of<const bool>(*mask);
    posterior.new_cov = batch_of<Real>(new_cov);
    posterior.innovation_var = batch_of<Real>(innovation_var);
    posterior.kl = batch_of<Real>(kl);
    posterior.info = data_of<int32_t>(info);
    place.run(B, &Kernels<Real>::write_gram, nullptr, args);
  });
  return {new_cov, weights, innovation_var, kl, pivots, info};
}

STABLE_TORCH_LIBRARY_IMPL(fastkm, CPU, m) { m.impl("write_gram", TORCH_BOX(&write_gram)); }
#endif  // FASTKM_SIMT

template <class Place, class Library>
static void register_writing(Library& m) {
  m.impl("write", TORCH_BOX(&write<Place>));
  m.impl("write_backward", TORCH_BOX(&write_backward<Place>));
  if constexpr (Place::kOnHost) m.impl("write_into", TORCH_BOX(&write_into<Place>));
}
FASTKM_REGISTER(register_writing)

}  // namespace fastkm
