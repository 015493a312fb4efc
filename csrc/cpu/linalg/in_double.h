// A memory that float32 cannot compute to its last digits is computed again in double, by the same kernel.
//
// A kernel in float32 knows such a memory by what it computes anyway: a pivot that is small beside its diagonal, a
// variance of which little is left. It then copies the arguments of that memory to double, computes them by the same
// templates, and rounds the results. If double has too few digits too, it goes on pattern by pattern, as the literal
// loop does. The price where nothing is wrong is a few comparisons.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/linalg/cholesky.h"
#include "cpu/linalg/codes.h"
#include "cpu/linalg/matrix.h"

namespace fastkm::FASTKM_LEVEL {

// Inside a kernel, beside the Status that it reports: the type has too few digits, of a system that is solved with, or
// of the covariance.
constexpr Status kInexactSystem = static_cast<Status>(-1), kInexactCovariance = static_cast<Status>(-2);

// Whether a kernel of this type is computed again in double.
template <class Real>
constexpr bool kHasDouble = std::is_same_v<Real, float>;

// How much a kernel may lose before its result is inexact. All but `chunk` and `eps` are ratios of what was to what is
// left.
template <class Real>
struct Limits {
  Real chunk_variance;  // of a variance before a chunk to that before a pattern, and of the traces around a chunk
  Real variance;        // of a variance before a chunk to that after a pattern, and of the traces around an episode
  Real condition;  // of the largest diagonal entry of a system that is solved with to the least pivot of its factor
  Real growth;     // of the terms that add up to a changed system to their sum
  Real explained;  // of ‖z‖² to ‖δ‖²
  Real sum;        // of the squared bound of a sum to its square
  Real removal;    // of a variance and its noise to what a removal leaves of the noise
  int64_t chunk = 1 << 20;                          // most patterns of a chunk
  Real eps = std::numeric_limits<Real>::epsilon();  // the rounding of the arguments

  bool exist() const { return condition < std::numeric_limits<Real>::infinity(); }
  // Whether a memory with this status is to be computed again. One that failed may fail by rounding alone; that it was
  // rounded before it came here, no computation mends.
  bool again(Status status) const { return exist() && status != kGood && status != kAsymmetric && status != kUntold; }
};

// A variance is lost when it is less than this many times the rounding of the sum that gives it.
constexpr int kLeastDigits = 16;

// Of a computation that is not done again.
template <class Real>
Limits<Real> no_limits() {
  constexpr Real kNone = std::numeric_limits<Real>::infinity();
  constexpr Real kVariance = 1 / (kLeastDigits * std::numeric_limits<Real>::epsilon());
  return {kNone, kVariance, kNone, kNone, kNone, kNone, kNone};
}

// In float32, where the kernel keeps the digits of the literal loop. With few rows every pattern takes from the same
// variances again and again; where a system is large because codes are long, their sums round less than they grow. A
// memory that is given in double has no limits but the last digits of its variances.
template <class Real>
Limits<Real> limits_of(int64_t K, int64_t C) {
  if constexpr (!kHasDouble<Real>) return no_limits<Real>();
  const Real codes = static_cast<Real>(C + 1);
  return {.chunk_variance = K < 4    ? Real(2)
                            : K < 16 ? Real(4)
                                     : Real(8),
          .variance = no_limits<Real>().variance,
          .condition = 32 * codes,
          .growth = 2,
          .explained = 5e3f * codes,
          .sum = 64,
          .removal = 64};
}

// In double, where a result is exact to float32.
inline Limits<double> limits_for_float32() {
  return {.chunk_variance = 1e6,
          .variance = 1e7,
          .condition = 1e9,
          .growth = 1e4,
          .explained = 1e9,
          .sum = std::numeric_limits<double>::infinity(),
          .removal = 1e9,
          .eps = std::numeric_limits<float>::epsilon()};
}
inline Limits<double> limits_for_float32_by_pattern() {
  Limits<double> limits = limits_for_float32();
  limits.chunk_variance = limits.variance;
  limits.explained = std::numeric_limits<double>::infinity();
  limits.chunk = 1;
  return limits;
}

// Whether the factor of a system whose largest diagonal entry is `largest` keeps the digits that are needed.
template <class Real>
bool well_conditioned(const Factor<Real>& factor, Real largest, const Limits<Real>& limits) {
  Real least = largest;
  for (int64_t i = 0; i < factor.size(); ++i) {
    const Real root = factor.lower.row(i)[i];
    least = root * root < least ? root * root : least;
  }
  return !(largest > least * limits.condition);
}

// Of a solve alone, where the kernel is the literal form but for the order of its sums.
template <class Real>
Limits<Real> limits_of_solve(int64_t C) {
  Limits<Real> limits = limits_of<Real>(0, C);
  limits.condition *= 4;
  return limits;
}

// Of a gradient, which sums and subtracts what the forward has found.
template <class Real>
Limits<Real> limits_of_gradient(int64_t K, int64_t C) {
  Limits<Real> limits = limits_of<Real>(K, C);
  limits.condition /= 8;
  limits.growth /= 2;
  limits.explained /= 8;
  limits.sum /= 8;
  return limits;
}

// Compute a memory in double by compute(limits), which returns its status: in chunks, and pattern by pattern if these
// lose too much. Returns the status to report.
template <class Compute>
Status compute_in_double(const Compute& compute) {
  const Limits<double> chunks = limits_for_float32();
  Status status = compute(chunks);
  if (chunks.again(status)) status = compute(limits_for_float32_by_pattern());
  return status == kInexactSystem ? kNotPositiveDefinite : status == kInexactCovariance ? kLost : status;
}

// The same for gradients, which have no status: what the forward has accepted is computed to its end.
template <class Compute>
void complete_in_double(const Compute& compute) {
  const Limits<double> chunks = limits_for_float32();
  Limits<double> patterns = limits_of<double>(0, 0);
  patterns.chunk = 1;
  if (chunks.again(compute(chunks))) compute(patterns);
}

// The arguments and results of memory `b` in double, each as memory 0 of a batch of one. Arguments that are missing
// stay missing.
class Doubles {
 public:
  explicit Doubles(int64_t b) : b_(b), arena_(Arena::fresh_copies()) {}

  Batch<const double> argument(const Batch<const float>& from, int64_t rows, int64_t columns) {
    if (!from.data) return {};
    const Batch<double> copy = allocate(rows, columns);
    share(team_for(rows * columns), rows, [=, this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < columns; ++j) *copy.at(0, i, j) = *from.at(b_, i, j);
    });
    return {copy.data, {copy.stride[0], copy.stride[1], copy.stride[2]}};
  }

  // The same for codes, which may be of 16 bits.
  Batch<const double> codes(const Batch<const float>& from, int64_t type, int64_t rows, int64_t columns) {
    if (type == kFloat32) return argument(from, rows, columns);
    const Matrix<float> wide = allocate_matrix<float>(arena_, rows, columns);
    load_codes(wide, from, type, b_, 0);
    const Batch<double> copy = allocate(rows, columns);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) *copy.at(0, i, j) = wide.row(i)[j];
    return {copy.data, {copy.stride[0], copy.stride[1], copy.stride[2]}};
  }

  // The same for a matrix that is symmetric but for rounding, which double tells from zero.
  Batch<const double> symmetric_argument(const Batch<const float>& from, int64_t size) {
    if (!from.data) return {};
    const Batch<double> copy = allocate(size, size);
    share(team_for(size * size), size, [=, this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < size; ++j)
          *copy.at(0, i, j) = 0.5 * (static_cast<double>(*from.at(b_, i, j)) + *from.at(b_, j, i));
    });
    return {copy.data, {copy.stride[0], copy.stride[1], copy.stride[2]}};
  }

  Batch<const bool> mask(const Batch<const bool>& from) const {
    return {from.data ? from.at(b_) : nullptr, {0, from.stride[1], from.stride[2]}};
  }

  // Room for a result, which put_out rounds into `to`.
  Batch<double> result(const Batch<float>& to, int64_t rows, int64_t columns) {
    if (!to.data) return {};
    const Batch<double> from = allocate(rows, columns);
    results_[count_++] = {to, from, rows, columns, kFloat32};
    return from;
  }
  Batch<double> codes_result(const Batch<float>& to, int64_t type, int64_t rows, int64_t columns) {
    const Batch<double> from = result(to, rows, columns);
    if (to.data) results_[count_ - 1].type = type;
    return from;
  }
  double* result(float* to) { return result(Batch<float>{to, {1, 0, 0}}, to ? 1 : 0, 1).data; }

  // Room for a result that nobody asks for.
  Batch<double> scratch(int64_t rows, int64_t columns) { return allocate(rows, columns); }

  // Round all results. Returns whether float32 holds them: false if one is not finite.
  bool put_out() const {
    bool finite = true;
    for (int64_t n = 0; n < count_; ++n) {
      const auto& [to, from, rows, columns, type] = results_[n];
      const Matrix<float> row = allocate_matrix<float>(arena_, 1, columns);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          row.data[j] = static_cast<float>(*from.at(0, i, j));
          finite &= row.data[j] - row.data[j] == 0;
        }
        if (type != kFloat32) {
          store_codes(to, type, b_, i, row);
          continue;
        }
        for (int64_t j = 0; j < columns; ++j) *to.at(b_, i, j) = row.data[j];
      }
    }
    return finite;
  }

 private:
  struct Result {
    Batch<float> to;
    Batch<double> from;
    int64_t rows, columns;
    int64_t type;  // Element of `to`
  };

  Batch<double> allocate(int64_t rows, int64_t columns) {
    return {arena_.allocate<double>(rows * columns), {0, columns, 1}};
  }

  int64_t b_;
  Arena& arena_;
  Result results_[16];
  int64_t count_ = 0;
};

}  // namespace fastkm::FASTKM_LEVEL
