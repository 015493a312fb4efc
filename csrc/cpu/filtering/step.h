// One step of a filter, T = 1: the chunk of chunk.h with one row, made of vectors.
//
// Bound: the memory is read and written once, K (K + C) numbers each way, with about 8 K (K + C) operations.
// Algorithm: (1) to (5) of chunk.h, where S, H, L and P are numbers. U and R are read once for the weights and the
// query together, and once more for the result. Not promised: sizes that are no whole number of vector registers take
// the chunk form.
#pragma once

#include "cpu/filtering/chunk.h"

namespace fastkm::FASTKM_LEVEL {

template <class Real>
bool is_step_of_whole_vectors(const FilteringArgs<Real>& args) {
  const PosteriorArgs<Real>& given = args.posterior;
  return given.T == 1 && given.K > 0 && given.C > 0 && given.K % kLanes<Real> == 0 && given.C % kLanes<Real> == 0;
}

// to = factor from − left rightᵀ, or + left rightᵀ for INTO = kAdd. `to` is not `from`, or both are padded.
template <Into INTO, class Real>
void update_rank_one(const Matrix<Real>& to, const Matrix<Real>& from, Real factor, const Real* left,
                     const Real* right) {
  constexpr int64_t W = kLanes<Real>;
  share(team_for(to.rows * to.columns), to.rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Real times = INTO == Into::kSubtract ? -left[i] : left[i];
      for (int64_t j = 0; j < to.columns; j += W)
        store<Real>(to.row(i) + j, factor * load(from.row(i) + j) + times * load(right + j));
    }
  });
}

// Filter one step of memory `b` into `after`, and put its reads and reports out.
template <class Real>
Status filter_step(const FilteringArgs<Real>& args, int64_t b, const MemoryRows<Real>& after,
                   const MemoryRows<Real>& before, double& log_evidence, Arena& arena) {
  const int64_t K = args.posterior.K, C = args.posterior.C;
  const Steps<Real> steps = load_steps(args, b, 0, 1, true, arena);
  const Real *w = steps.scaled_weights.row(0), *q = steps.scaled_queries.row(0), *z = steps.values.row(0);
  const Real noise = steps.observed.noise_var[0], relaxed = steps.decay.relaxed[0], e = steps.decay.end;
  const Real a = steps.decay.scale[0];
  const auto vector = [&](int64_t n) { return allocate_matrix<Real>(arena, 1, n).data; };
  Real *const projected = vector(K), *const read = vector(K), *const forecast = vector(C), *const values = vector(C);
  product_transposed<Into::kSet, 2, Real>({projected, read}, before.cov, K, K, {w, q});
  product_transposed<Into::kSet, 2, Real>({forecast, values}, before.mean, K, C, {w, q});

  const Real *weights = steps.weights.row(0), *query = steps.queries.row(0);
  Real variance = dot(K, w, projected), crossed = dot(K, q, projected), own = dot(K, q, read), scale = 0;
  for (int64_t k = 0; k < K; ++k) scale += w[k] * w[k] * before.cov.row(k)[k];
  if (steps.decay.retains) {
    scale += relaxed * dot(K, weights, weights);
    variance += relaxed * dot(K, weights, weights);
    crossed += relaxed * dot(K, query, weights);
    own += relaxed * dot(K, query, query);
    for (int64_t k = 0; k < K; ++k) projected[k] = e * projected[k] + relaxed * weights[k];
  }
  const bool positive = variance - variance == 0 && variance >= -rounding_slack(K, 1, variance + noise);
  const Real explained = positive && variance > 0 ? variance : 0, s = explained + noise, root = 1 / std::sqrt(s);
  const Real gain = args.read_before ? 0 : crossed * root;
  for (int64_t k = 0; k < K; ++k) projected[k] *= root;                       // G
  for (int64_t c = 0; c < C; ++c) forecast[c] = (z[c] - forecast[c]) * root;  // E
  for (int64_t c = 0; c < C; ++c)
    *args.read_values.at(b, 0, c) = (values[c] + gain * forecast[c]) / (steps.decay.forgets ? a : 1);
  const Real left = own - gain * gain;
  *args.variance.at(b, 0) = left > 0 ? left : 0;
  *args.posterior.innovation_var.at(b, 0) = s;
  update_rank_one<Into::kAdd>(after.mean, before.mean, e, projected, forecast);
  update_rank_one<Into::kSubtract>(after.cov, before.cov, e * e, projected, projected);
  if (steps.decay.retains)
    for (int64_t k = 0; k < K; ++k) after.cov.row(k)[k] += relaxed;
  if (steps.decay.forgets) fastkm::FASTKM_LEVEL::scale(after.cov, steps.decay.growth);

  if (steps.observed.unmasked[0]) {
    const Real energy = dot(C, forecast, forecast) / (steps.decay.forgets ? a * a : 1);
    log_evidence -= Real(0.5) * (static_cast<Real>(C) * std::log(Real(6.283185307179586476925286766559) * s) + energy);
  }
  bool in_range = variance - variance == 0;
  for (int64_t k = 0; k < K; ++k) in_range &= after.cov.row(k)[k] - after.cov.row(k)[k] == 0;
  if (steps.decay.forgets && !in_range) return kOutOfRange;
  if (!positive) return kNotPositiveDefinite;
  return explained * (noise / s) >= kLeastDigits * std::numeric_limits<Real>::epsilon() * scale ? kGood : kLost;
}

}  // namespace fastkm::FASTKM_LEVEL
