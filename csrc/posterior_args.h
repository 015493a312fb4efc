// What an update and a write have in common at the boundary: the arguments they check and the outputs they make.
#pragma once

#include "binding.h"

namespace fastkm {

struct PosteriorOutputs {
  Tensor mean, cov, innovation_var, kl, info;

  PosteriorOutputs(const Tensor& prior_mean, const Tensor& prior_cov, const Tensor& values, const Tensor& noise_var,
                   const std::optional<Tensor>& mask)
      : mean(make(prior_mean, {prior_mean.size(0), prior_mean.size(1), prior_mean.size(2)})),
        cov(make(prior_mean, {prior_mean.size(0), prior_mean.size(1), prior_mean.size(1)})),
        innovation_var(make(prior_mean, {values.size(0), values.size(1)})),
        kl(make(prior_mean, {values.size(0), values.size(1)})),
        info(make(prior_mean, {prior_mean.size(0)}, ScalarType::Int)) {
    const int64_t B = prior_mean.size(0), K = prior_mean.size(1), C = prior_mean.size(2), T = values.size(1);
    const ScalarType type = prior_mean.scalar_type();
    expect(prior_cov, "cov", {B, K, K}, type);
    expect(values, "values", {B, T, C}, type);
    expect(noise_var, "noise_var", {B, T}, type);
    if (mask) expect(*mask, "mask", {B, T}, ScalarType::Bool);
  }

  template <class T>
  PosteriorArgs<T> args(const Tensor& prior_mean, const Tensor& prior_cov, const Tensor& values,
                        const Tensor& noise_var, const std::optional<Tensor>& mask) const {
    PosteriorArgs<T> args;
    args.K = prior_mean.size(1);
    args.C = prior_mean.size(2);
    args.T_ = values.size(1);
    args.mean = batch_of<const T>(prior_mean);
    args.cov = batch_of<const T>(prior_cov);
    args.values = batch_of<const T>(values);
    args.noise_var = batch_of<const T>(noise_var);
    if (mask) args.mask = batch_of<const bool>(*mask);
    args.new_mean = batch_of<T>(mean);
    args.new_cov = batch_of<T>(cov);
    args.innovation_var = batch_of<T>(innovation_var);
    args.kl = batch_of<T>(kl);
    args.info = data_of<int32_t>(info);
    return args;
  }
};

}  // namespace fastkm
