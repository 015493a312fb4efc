// A stream: patterns are written to a memory one after the other, in place, with the inverse of R Rᵀ + λI carried
// along.
//
// Bound: a pattern reads and writes R, U and H once, K C + 2 K² numbers, and costs about 12 K C + 18 K² operations
// where a write on its own pays K² C + K³. Algorithm: address.h finds the weights, step.h applies them. With given
// weights the first is left out. Kept: nothing but R, U and H. A pattern that is refused changes none of them. Not
// promised: H need not be A⁻¹ to the last digits; what follows from it, the weights, is.
#pragma once

#include <utility>

#include "cpu/streaming/address.h"

namespace fastkm::FASTKM_LEVEL {

template <class Real>
struct StreamStep {
  Change<Real> now, before;
  Real s;        // innovation variance
  bool follows;  // whether H follows `now`
  int64_t refreshes;
};

// Find the weights of the pattern in work.z and the change that they make, with H as it is. Returns false if H is too
// far from the inverse.
template <class Real>
bool address_pattern(const StreamMemory<Real>& memory, const StreamingArgs<Real>& args, Real noise_var,
                     StreamStep<Real>& step, Status& status, const StreamWork<Real>& work) {
  product_by_units<2, true, Real>(memory.team, {work.x, work.squares}, memory.mean, {work.z, work.z});
  Real energy = 0;
  for (int64_t k = 0; k < memory.size(); ++k) energy += work.squares[k];
  AddressScales<Real> scales{norm(memory.mean.ld, work.z), std::sqrt(energy)};
  for (int64_t n = 0; n < args.num_opt_iters; ++n) {
    if (n > 0) {
      if (!compute_inverse_change(memory, step.now, work)) return false;
      scales.mean += norm(memory.padded(), step.now.c) * std::sqrt(step.now.d);
      std::swap(step.now, step.before);
    }
    if (!find_stream_weights(memory, step.now, n > 0 ? &step.before : nullptr, scales, work)) return false;
    status = compute_change(memory, step.now, noise_var, work);
    if (status != kGood) return true;
  }
  return true;
}

// The change of pattern t of memory `b`, whose codes are in work.z.
template <class Real>
Status prepare_step(const StreamMemory<Real>& memory, const StreamingArgs<Real>& args, int64_t b, int64_t t,
                    StreamStep<Real>& step, const StreamWork<Real>& work, Arena& arena) {
  const Real noise_var = *args.noise_var.at(b);
  Status status = kGood;
  if (args.weights.data) {
    for (int64_t k = 0; k < args.K; ++k) step.now.w[k] = *args.weights.at(b, t, k);
    compute_innovation(memory, step.now, work);
    status = compute_change(memory, step.now, noise_var, work);
  } else if (!address_pattern(memory, args, noise_var, step, status, work)) {
    const auto try_again = [&](auto wide) {
      ++step.refreshes;
      return refresh_inverse<decltype(wide)>(memory, arena) &&
             address_pattern(memory, args, noise_var, step, status, work);
    };
    if (!try_again(Real{}) && !(sizeof(Real) < sizeof(double) && try_again(double{}))) status = kNotPositiveDefinite;
  }
  step.s = step.now.explained + noise_var;
  return status;
}

// Write the change to the memory, and let H follow it. A change of zero leaves H as it is.
template <class Real>
void finish_step(const StreamMemory<Real>& memory, StreamStep<Real>& step, const StreamWork<Real>& work, Arena& arena) {
  const bool changes = dot(memory.padded(), step.now.c, step.now.c) > 0;
  const bool follows = changes && compute_inverse_change(memory, step.now, work);
  apply_change(memory, step.now, step.s, follows);
  if (!changes || follows) return;
  ++step.refreshes;
  refresh_inverse<Real>(memory, arena);  // if it fails, the next residual tells
}

// What is known of pattern t, as (4) and (5) of posterior/conditioning.h. A pattern that is not written tells nothing.
template <class Real>
double store_step(const StreamingArgs<Real>& args, int64_t b, int64_t t, const StreamStep<Real>& step, bool written) {
  constexpr double kTwoPi = 6.283185307179586476925286766559;
  const Real noise = *args.noise_var.at(b), C = static_cast<Real>(args.C);
  const Real s = written ? step.s : noise, beta = written ? step.now.explained / s : 0;
  const Real energy = written ? step.now.d / s : 0, divergence = variance_divergence(noise / s, -beta);
  *args.innovation_var.at(b, t) = s;
  *args.kl.at(b, t) = Real(0.5) * (C * divergence + beta * energy);
  if (!args.weights.data)
    for (int64_t k = 0; k < args.K; ++k) *args.new_weights.at(b, t, k) = written ? step.now.w[k] : 0;
  return written ? -0.5 * (args.C * std::log(kTwoPi * s) + energy) : 0;
}

template <class Real>
void stream_patterns(const StreamingArgs<Real>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const StreamMemory<Real> memory = view_stream(args, b);
    const StreamWork<Real> work = allocate_stream_work(memory, arena);
    StreamStep<Real> step{allocate_change(memory, arena), allocate_change(memory, arena), 0, 0, 0};
    double log_evidence = 0;
    for (int64_t t = 0; t < args.T; ++t) {
      const bool unmasked = args.unmasked(b, t);
      Status status = kGood;
      if (unmasked) {
        for (int64_t c = 0; c < args.C; ++c) work.z[c] = *args.values.at(b, t, c);
        status = prepare_step(memory, args, b, t, step, work, arena);
      }
      const bool written = unmasked && status == kGood;
      log_evidence += store_step(args, b, t, step, written);
      *args.info.at(b, t) = status;
      if (written) finish_step(memory, step, work, arena);
    }
    args.log_evidence[b] = static_cast<Real>(log_evidence);
    *args.refreshes.at(b) += step.refreshes;
  }
}

// Compute H in the type of the memory or, if it cannot be factored there, in float64.
template <class Real>
void refresh_streams(const StreamingArgs<Real>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const StreamMemory<Real> memory = view_stream(args, b);
    Arena& arena = Arena::fresh();
    const bool good = refresh_inverse<Real>(memory, arena) || refresh_inverse<double>(memory, arena);
    *args.info.at(b) = good ? kGood : kNotPositiveDefinite;
  }
}

}  // namespace fastkm::FASTKM_LEVEL
