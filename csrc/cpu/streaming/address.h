// The weights of a pattern of a stream, by the inverse that is carried with the memory.
//
// The weights solve A w = x for A = R Rᵀ + λI and x = R z. The carried H is A⁻¹ up to the rounding of all patterns
// since it was computed, so nothing rests on H alone. With the innovation δ = z − Rᵀ w, which the update needs anyway,
//   (1)  ρ = x − A w = R δ − λ w,  v = H ρ
// are the residual, taken from the memory itself, and the error of w up to what H is wrong by. Weights are corrected,
// w += v, until both are rounding:
//   (2)  ‖ρ‖ ≤ ε [‖R‖_F (‖z‖ + ‖R‖_F ‖w‖) + λ ‖w‖],
//   (3)  ‖v‖ ≤ ε (2 + √K/4) ‖w‖, or v is not half of the v before it, so that more corrections do not help.
// (2) alone is too weak where λ is small: an error across the columns of R hardly shows in ρ. A correction multiplies ρ
// by I − A H, so how good H is gets measured at every pattern, in the direction where it is used. If kMostCorrections
// do not reach (2), H is computed anew from R, and if that does not help, in float64.
//
// With num_opt_iters > 1 a pattern is solved again, each time against the memory that its former weights would give.
// That is R + c' δ'ᵀ, whose products follow from those of R:
//   (4)  x + c' (δ'·z),  H − p pᵀ + h hᵀ,  and for the innovation δ of R, and g = c'·w,
//        ρ = R δ − g r' + c' (δ'·δ − g d') − λ w.
#pragma once

#include "cpu/linalg/solve.h"
#include "cpu/linalg/symmetric.h"
#include "cpu/streaming/step.h"

namespace fastkm::FASTKM_LEVEL {

constexpr int kMostCorrections = 4;

template <class Real>
Real norm(int64_t padded, const Real* x) {
  return std::sqrt(dot(padded, x, x));
}

// y = H x, or by (4) for the memory after `before`.
template <class Real>
void apply_inverse(const StreamMemory<Real>& memory, Real* y, const Real* x, const Change<Real>* before) {
  const int64_t padded = memory.padded();
  product_by_units<1, false, Real>(memory.team, {y}, memory.inverse, {x});
  if (!before) return;
  add_scaled(padded, y, -dot(padded, before->p, x), before->p);
  add_scaled(padded, y, dot(padded, before->h, x), before->h);
}

// ρ of (1) or (4), to work.residual.
template <class Real>
void compute_residual(const StreamMemory<Real>& memory, const Change<Real>& change, const Change<Real>* before,
                      const StreamWork<Real>& work) {
  const int64_t padded = memory.padded();
  for (int64_t i = 0; i < padded; ++i) work.residual[i] = change.r[i] - memory.ridge * change.w[i];
  if (!before) return;
  const Real g = dot(padded, before->c, change.w);
  add_scaled(padded, work.residual, -g, before->r);
  add_scaled(padded, work.residual, dot(memory.mean.ld, before->delta, change.delta) - g * before->d, before->c);
}

// ‖z‖, and ‖R‖_F of the memory that is solved with.
template <class Real>
struct AddressScales {
  Real z, mean;
};

// Find the weights of the pattern in work.z, its δ and its r. x = R z is in work.x. Returns whether (2) was reached. No
// inverse serves a pattern that is not finite; it will be refused.
template <class Real>
bool find_stream_weights(const StreamMemory<Real>& memory, const Change<Real>& change, const Change<Real>* before,
                         const AddressScales<Real>& scales, const StreamWork<Real>& work) {
  const int64_t padded = memory.padded(), columns = memory.mean.ld;
  const bool finite = scales.z - scales.z == 0;
  __builtin_memcpy(work.target, work.x, static_cast<size_t>(padded) * sizeof(Real));
  if (before) add_scaled(padded, work.target, dot(columns, before->delta, work.z), before->c);
  apply_inverse(memory, change.w, work.target, before);
  constexpr Real kEpsilon = std::numeric_limits<Real>::epsilon();
  const Real least = kEpsilon * (2 + std::sqrt(static_cast<Real>(memory.size())) / 4);
  Real last = std::numeric_limits<Real>::max();  // ‖v‖ of the correction before
  for (int corrections = 0;; ++corrections) {
    compute_innovation(memory, change, work);
    if (!finite) return true;
    compute_residual(memory, change, before, work);
    const Real w = norm(padded, change.w);
    const Real rounding = scales.mean * (scales.z + scales.mean * w) + memory.ridge * w;
    const bool reached = norm(padded, work.residual) <= kEpsilon * rounding;
    if (corrections == kMostCorrections) return reached;
    apply_inverse(memory, work.correction, work.residual, before);
    const Real error = norm(padded, work.correction);
    if (reached && (error <= least * w || 2 * error > last)) return true;
    last = error;
    add_scaled(padded, change.w, Real(1), work.correction);
  }
}

// H = (R Rᵀ + λI)⁻¹, computed in `Wide`. If that is not positive definite in this type, H stays and false is returned.
template <class Wide, class Real>
bool refresh_inverse(const StreamMemory<Real>& memory, Arena& arena) {
  const int64_t K = memory.size(), C = memory.mean.columns;
  const Arena::Mark start = arena.mark();
  const Matrix<Wide> mean = allocate_zero<Wide>(arena, K, C), mean_transposed = allocate_matrix<Wide>(arena, C, K);
  const Matrix<Wide> inverse = allocate_matrix<Wide>(arena, K, K);
  const Factor<Wide> factor = allocate_factor<Wide>(arena, K);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t c = 0; c < C; ++c) mean.row(k)[c] = memory.mean.row(k)[c];
  transpose(mean_transposed, mean);
  product_lower<Into::kSet>(factor.lower, C, operand(mean), mean_transposed);
  regularise<Wide>(factor.lower, factor.lower, memory.ridge, false);
  const bool good = cholesky(factor, arena);
  if (good) {
    invert_cholesky(factor, inverse, arena);
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < K; ++j) memory.inverse.row(i)[j] = static_cast<Real>(inverse.row(i)[j]);
  }
  arena.release(start);
  return good;
}

}  // namespace fastkm::FASTKM_LEVEL
