// What an update and a write have in common at the boundary: the arguments they check and the outputs they make.
#pragma once

#include "bindings/make_tensor.h"
#include "bindings/overlap.h"
#include "bindings/tensor_args.h"

namespace fastkm {

template <class Real, class Place>
PosteriorArgs<Real> posterior_args(const Place& place, const Tensor& mean, const Tensor& cov, const Tensor& values,
                                   const Tensor& noise_var, const std::optional<Tensor>& mask, int64_t precision) {
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2), patterns = values.size(1);
  expect(mean, "mean", {B, K, C}, mean.scalar_type());
  expect(cov, "cov", {B, K, K}, mean.scalar_type());
  const int64_t values_type = place.expect_codes(values, "values", {B, patterns, C}, mean);
  if (mask) expect(*mask, "mask", {B, patterns}, ScalarType::Bool);
  PosteriorArgs<Real> args;
  args.K = K;
  args.C = C;
  args.T = patterns;
  args.mean = batch_of<const Real>(mean);
  args.cov = batch_of<const Real>(cov);
  args.values = batch_of<const Real>(values);
  args.values_type = values_type;
  args.noise_var = positive_numbers_of<Real>(place, noise_var, "noise_var", {B, patterns}, mean);
  if (mask) args.mask = batch_of<const bool>(*mask);
  args.precision = precision;
  return args;
}

template <class Real, class Place>
void set_weights(const Place& place, PosteriorArgs<Real>& args, const Tensor& weights, const Tensor& mean) {
  args.weights_type = place.expect_codes(weights, "weights", {mean.size(0), args.T, args.K}, mean);
  args.weights = batch_of<const Real>(weights);
}

struct PosteriorOutputs {
  Tensor mean, cov, innovation_var, kl, info;

  PosteriorOutputs(const Tensor& prior_mean, const Tensor& values)
      : mean(make_tensor(prior_mean, {prior_mean.size(0), prior_mean.size(1), prior_mean.size(2)})),
        cov(make_tensor(prior_mean, {prior_mean.size(0), prior_mean.size(1), prior_mean.size(1)})),
        innovation_var(make_tensor(prior_mean, {values.size(0), values.size(1)})),
        kl(make_tensor(prior_mean, {values.size(0), values.size(1)})),
        info(make_tensor(prior_mean, {prior_mean.size(0)}, ScalarType::Int)) {}

  template <class Real>
  void into(PosteriorArgs<Real>& args) const {
    args.new_mean = batch_of<Real>(mean);
    args.new_cov = batch_of<Real>(cov);
    args.innovation_var = batch_of<Real>(innovation_var);
    args.kl = batch_of<Real>(kl);
    args.info = data_of<int32_t>(info);
  }
};

// A memory of the caller that a result goes into. It may be the memory that comes in, and shares no memory with others.
struct MemoryOut {
  const Tensor &mean, &cov;

  // Let the new memory go there. One that is refused comes out as it came in.
  template <class Real>
  void into(PosteriorArgs<Real>& args, const Tensor& old_mean, const Tensor& old_cov,
            std::initializer_list<const Tensor*> others) const {
    const int64_t B = old_mean.size(0);
    expect(mean, "out.mean", {B, args.K, args.C}, old_mean.scalar_type());
    expect(cov, "out.cov", {B, args.K, args.K}, old_mean.scalar_type());
    for (const Tensor* rows : {&mean, &cov})
      STD_TORCH_CHECK(rows->stride(2) == 1 || rows->size(2) <= 1, "fastkm: the rows of out must be contiguous");
    expect_apart(mean, old_mean, {&old_cov, &cov});
    expect_apart(cov, old_cov, {&old_mean, &mean});
    for (const Tensor* out : {&mean, &cov}) expect_apart(*out, *out, others);
    args.new_mean = batch_of<Real>(mean);
    args.new_cov = batch_of<Real>(cov);
    args.keeps_refused = true;
  }
};

// The cotangents that an update and a write have in common.
struct PosteriorGradOutputs {
  Tensor mean, cov, values, noise_var;

  PosteriorGradOutputs(const Tensor& prior_mean, const Tensor& of_values)
      : mean(make_tensor(prior_mean, {prior_mean.size(0), prior_mean.size(1), prior_mean.size(2)})),
        cov(make_tensor(prior_mean, {prior_mean.size(0), prior_mean.size(1), prior_mean.size(1)})),
        values(make_tensor(prior_mean, {of_values.size(0), of_values.size(1), of_values.size(2)})),
        noise_var(make_tensor(prior_mean, {of_values.size(0), of_values.size(1)})) {}

  template <class Real>
  PosteriorGrads<Real> grads(const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_cov,
                             const std::optional<Tensor>& grad_innovation_var,
                             const std::optional<Tensor>& grad_kl) const {
    const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2), T = values.size(1);
    PosteriorGrads<Real> grads;
    grads.mean = cotangent_of<Real>(grad_mean, "grad_mean", {B, K, C}, mean);
    grads.cov = cotangent_of<Real>(grad_cov, "grad_cov", {B, K, K}, mean);
    grads.innovation_var = cotangent_of<Real>(grad_innovation_var, "grad_innovation_var", {B, T}, mean);
    grads.kl = cotangent_of<Real>(grad_kl, "grad_kl", {B, T}, mean);
    grads.to_mean = batch_of<Real>(mean);
    grads.to_cov = batch_of<Real>(cov);
    grads.to_values = batch_of<Real>(values);
    grads.to_noise_var = batch_of<Real>(noise_var);
    return grads;
  }
};

// The new memory of an operation that reports nothing but the status.
struct NewMemory {
  Tensor mean, cov, info;

  explicit NewMemory(const Tensor& old_mean)
      : mean(make_tensor(old_mean, {old_mean.size(0), old_mean.size(1), old_mean.size(2)})),
        cov(make_tensor(old_mean, {old_mean.size(0), old_mean.size(1), old_mean.size(1)})),
        info(make_tensor(old_mean, {old_mean.size(0)}, ScalarType::Int)) {}

  template <class Real>
  void into(PosteriorArgs<Real>& args) const {
    args.new_mean = batch_of<Real>(mean);
    args.new_cov = batch_of<Real>(cov);
    args.info = data_of<int32_t>(info);
  }
};

// Patterns with their weights.
struct Patterns {
  const Tensor &weights, &values, &noise_var;
};

template <class Real, class Place>
PosteriorArgs<Real> patterns_args(const Place& place, const Tensor& mean, const Tensor& cov, const Patterns& patterns,
                                  const std::optional<Tensor>& mask) {
  PosteriorArgs<Real> args = posterior_args<Real>(place, mean, cov, patterns.values, patterns.noise_var, mask, kIeee);
  set_weights(place, args, patterns.weights, mean);
  return args;
}

// Cotangents of a memory and of patterns.
struct PatternsGradOutputs {
  PosteriorGradOutputs of;
  Tensor weights;

  PatternsGradOutputs(const Tensor& mean, const Tensor& values)
      : of(mean, values), weights(make_tensor(mean, {values.size(0), values.size(1), mean.size(1)})) {}

  template <class Real>
  PosteriorGrads<Real> grads(const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_cov) const {
    PosteriorGrads<Real> grads = of.grads<Real>(grad_mean, grad_cov, std::nullopt, std::nullopt);
    grads.to_weights = batch_of<Real>(weights);
    return grads;
  }
};

}  // namespace fastkm
