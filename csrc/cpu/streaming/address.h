// The weights of a pattern of a stream, by the inverse that is carried with the memory.
//
// The weights solve A w = x for A = R Rᵀ + λI and x = R z. The carried H is not trusted: it is A⁻¹ up to the rounding
// of all patterns since it was computed. With the innovation δ = z − Rᵀ w, which the update needs anyway, the residual
// is
//   (1)  ρ = x − A w = R δ − λ w,
// taken from the memory itself, so it does not know H. Weights are corrected, w += H ρ, until
//   (2)  ‖ρ‖ ≤ ε [‖R‖_F (‖z‖ + ‖Rᵀ w‖) + λ ‖w‖],
// which is the rounding of (1). Each correction multiplies ρ by I − A H, whose size is thereby measured at every
// pattern, where it matters. If kMostCorrections are not enough, H is computed anew from R.
//
// With num_opt_iters > 1 a pattern is solved again, each time against the memory that its former weights would give.
// That is R + c' δ'ᵀ, whose products follow from those of R:
//   (3)  x + c' (δ'·z),  H − p pᵀ + h hᵀ,  and for the innovation δ of R, and g = c'·w,
//        ρ = R δ − g r' + c' (δ'·δ − g d') − λ w.
#pragma once

#include "cpu/linalg/solve.h"
#include "cpu/linalg/symmetric.h"
#include "cpu/streaming/step.h"

namespace fastkm::FASTKM_LEVEL {

constexpr int kMostCorrections = 3;

template <class Real>
Real norm(int64_t padded, const Real* x) {
  return std::sqrt(dot(padded, x, x));
}

// y = H x, or by (3) for the memory after `before`.
template <class Real>
void apply_inverse(const StreamMemory<Real>& memory, Real* y, const Real* x, const Change<Real>* before) {
  const int64_t padded = memory.padded();
  product_by_units<1, false, Real>(memory.team, {y}, memory.inverse, {x});
  if (!before) return;
  add_scaled(padded, y, -dot(padded, before->p, x), before->p);
  add_scaled(padded, y, dot(padded, before->h, x), before->h);
}

// (1) or (3), to work.residual.
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
  for (int corrections = 0;; ++corrections) {
    compute_innovation(memory, change, work);
    compute_residual(memory, change, before, work);
    const Real read = scales.z + norm(columns, change.delta);  // no less than ‖Rᵀ w‖
    const Real rounding = scales.mean * (scales.z + read) + memory.ridge * norm(padded, change.w);
    if (norm(padded, work.residual) <= std::numeric_limits<Real>::epsilon() * rounding || !finite) return true;
    if (corrections == kMostCorrections) return false;
    apply_inverse(memory, work.correction, work.residual, before);
    add_scaled(padded, change.w, Real(1), work.correction);
  }
}

// H = (R Rᵀ + λI)⁻¹. If that is not positive definite in this type, H stays and false is returned.
template <class Real>
bool refresh_inverse(const StreamMemory<Real>& memory, Arena& arena) {
  const int64_t K = memory.size(), C = memory.mean.columns;
  const Arena::Mark start = arena.mark();
  const Matrix<Real> mean_transposed = allocate_matrix<Real>(arena, C, K);
  const Matrix<Real> inverse = allocate_matrix<Real>(arena, K, K);
  const Factor<Real> factor = allocate_factor<Real>(arena, K);
  transpose(mean_transposed, memory.mean);
  product_lower<Into::kSet>(factor.lower, C, operand(memory.mean), mean_transposed);
  regularise(factor.lower, factor.lower, memory.ridge, false);
  const bool good = cholesky(factor, arena);
  if (good) {
    invert_cholesky(factor, inverse, arena);
    for (int64_t i = 0; i < K; ++i)
      __builtin_memcpy(memory.inverse.row(i), inverse.row(i), static_cast<size_t>(K) * sizeof(Real));
  }
  arena.release(start);
  return good;
}

}  // namespace fastkm::FASTKM_LEVEL
