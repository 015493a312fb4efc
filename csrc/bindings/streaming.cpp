// Binds the steps of a stream to torch.ops.fastkm. They change their arguments. There are no kernels for a GPU, so the
// simulator has none either.
#ifndef FASTKM_SIMT
#include <tuple>

#include "bindings/make_tensor.h"
#include "bindings/register.h"
#include "bindings/tensor_args.h"

namespace fastkm {

// The three matrices of a stream, whose rows are padded.
template <class Real>
static StreamingArgs<Real> streaming_args(const Tensor& mean, const Tensor& cov, const Tensor& inverse, int64_t C) {
  const auto padded = [](int64_t n) { return (n + kStreamPadding - 1) / kStreamPadding * kStreamPadding; };
  const int64_t B = mean.size(0), K = mean.size(1);
  expect(mean, "mean", {B, K, padded(C)}, mean.scalar_type());
  expect(cov, "cov", {B, K, padded(K)}, mean.scalar_type());
  expect(inverse, "inverse", {B, K, padded(K)}, mean.scalar_type());
  for (const Tensor* rows : {&mean, &cov, &inverse})
    STD_TORCH_CHECK(rows->is_contiguous(), "fastkm: the matrices of a stream must be contiguous");
  StreamingArgs<Real> args;
  args.K = K;
  args.C = C;
  args.mean = batch_of<Real>(mean);
  args.cov = batch_of<Real>(cov);
  args.inverse = batch_of<Real>(inverse);
  return args;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> stream_patterns(
    const Tensor& mean, const Tensor& cov, const Tensor& inverse, const Tensor& refreshes,
    const std::optional<Tensor>& weights, const Tensor& values, const Tensor& noise_var, const Tensor& ridge,
    int64_t num_opt_iters, const std::optional<Tensor>& mask) {
  const Cpu place(mean, cov, inverse, refreshes, weights, values, noise_var, ridge, mask);
  const int64_t B = mean.size(0), K = mean.size(1), T = values.size(1), C = values.size(2);
  const Tensor new_weights = make_tensor(mean, {B, weights ? 0 : T, K});
  const Tensor innovation_var = make_tensor(mean, {B, T}), kl = make_tensor(mean, {B, T});
  const Tensor log_evidence = make_tensor(mean, {B}), info = make_tensor(mean, {B, T}, ScalarType::Int);
  STD_TORCH_CHECK(num_opt_iters >= 1, "fastkm: num_opt_iters must be at least 1");
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    StreamingArgs<Real> args = streaming_args<Real>(mean, cov, inverse, C);
    expect(refreshes, "refreshes", {B}, ScalarType::Long);
    expect(values, "values", {B, T, C}, mean.scalar_type());
    if (weights) expect(*weights, "weights", {B, T, K}, mean.scalar_type());
    if (mask) expect(*mask, "mask", {B, T}, ScalarType::Bool);
    args.T = T;
    if (weights) args.weights = batch_of<const Real>(*weights);
    args.values = batch_of<const Real>(values);
    args.noise_var = positive_numbers_of<Real>(place, noise_var, "noise_var", {B}, mean);
    args.ridge = positive_numbers_of<Real>(place, ridge, "ridge", {B}, mean);
    if (mask) args.mask = batch_of<const bool>(*mask);
    args.num_opt_iters = num_opt_iters;
    args.new_weights = batch_of<Real>(new_weights);
    args.innovation_var = batch_of<Real>(innovation_var);
    args.kl = batch_of<Real>(kl);
    args.log_evidence = data_of<Real>(log_evidence);
    args.info = batch_of<int32_t>(info);
    args.refreshes = batch_of<int64_t>(refreshes);
    place.run(B, &Kernels<Real>::stream_patterns, nullptr, args);
  });
  return {new_weights, innovation_var, kl, log_evidence, info};
}

static Tensor refresh_streams(const Tensor& mean, const Tensor& inverse, const Tensor& ridge) {
  const Cpu place(mean, inverse, ridge);
  const int64_t B = mean.size(0);
  const Tensor info = make_tensor(mean, {B}, ScalarType::Int);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    StreamingArgs<Real> args = streaming_args<Real>(mean, inverse, inverse, mean.size(2));
    args.ridge = positive_numbers_of<Real>(place, ridge, "ridge", {B}, mean);
    args.info = batch_of<int32_t>(info);
    place.run(B, &Kernels<Real>::refresh_streams, nullptr, args);
  });
  return info;
}

STABLE_TORCH_LIBRARY_IMPL(fastkm, CPU, m) {
  m.impl("stream_patterns", TORCH_BOX(&stream_patterns));
  m.impl("refresh_streams", TORCH_BOX(&refresh_streams));
}

}  // namespace fastkm
#endif  // FASTKM_SIMT
