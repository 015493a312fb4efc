// Divergence of two memories and the log-determinant of a covariance, by Cholesky.
//
// With U = L Lᵀ, U0 = L0 L0ᵀ and Δ = R − R0,
//   (1)  KL = ½ [C (tr(U0⁻¹U) − K + ln|U0| − ln|U|) + tr(ΔᵀU0⁻¹Δ)]
//   (2)  tr(U0⁻¹U) = ‖L0⁻¹L‖²,  tr(ΔᵀU0⁻¹Δ) = ‖L0⁻¹Δ‖²,  ln|U| = 2 Σ ln L_ii.
// With M = L0⁻¹L and D its diagonal, whose entries are m_i = L_ii/L0_ii, this is a sum of terms that are not negative,
// so that nothing cancels where U is close to U0:
//   (3)  KL = ½ [C (Σ (m_i² − 1 − ln m_i²) + ‖M − D‖²) + ‖L0⁻¹Δ‖²],  M − D = L0⁻¹(L − L0 D).
// Bytes: both means and both covariances once. Operations: two factors, K³/3 each, a solve with a lower triangle, K³/3,
// and a solve with C columns, K² C. The solutions of (3) are never stored: a strip of columns is solved, squared and
// summed.
//
// Sums over a whole matrix are taken in double. Of a covariance only the lower triangle is used, but it must be
// symmetric.
#pragma once

#include <cmath>

#include "cpu/linalg/cholesky.h"
#include "cpu/linalg/symmetric.h"
#include "cpu/linalg/variance_divergence.h"
#include "cpu/matrix_normal/lanes.h"

namespace fastkm::FASTKM_LEVEL {

// Copy the lower triangle of a covariance, in whole diagonal blocks, and check the covariance. If its rows are
// contiguous, the check reads the caller's rows, so the upper triangle need not be copied.
template <class Real>
Status load_lower(const Matrix<Real>& to, const Batch<const Real>& cov, int64_t b) {
  constexpr int64_t W = kLanes<Real>;
  const int64_t n = to.rows;
  if (cov.stride[2] != 1) {
    load_matrix(to, cov, b);
    return symmetry(to);
  }
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t end = first + kBlock;  // of the diagonal block too
    for (int64_t i = first; i < smaller(end, n); ++i) {
      const Real* from = cov.at(b, i);
      const int64_t whole = end <= n ? end : n / W * W;
      for (int64_t j = 0; j < whole; j += W) store<Real>(to.row(i) + j, load(from + j));
      for (int64_t j = whole; j < end; ++j) to.row(i)[j] = j < n ? from[j] : 0;
    }
  }
  return symmetry(Matrix<Real>{const_cast<Real*>(cov.at(b)), n, n, cov.stride[1]});
}

template <class Real>
Status load_and_factor(const Factor<Real>& factor, const Batch<const Real>& cov, int64_t b, Arena& arena,
                       Inverses inverses = Inverses::kAll, Prefetch* prefetch = nullptr) {
  if (const Status status = load_lower(factor.lower, cov, b); status != kGood) return status;
  return cholesky(factor, arena, {}, prefetch, inverses) ? kGood : kNotPositiveDefinite;
}

// ln|U|. A double holds the product of eight floats, so eight pivots in float share one logarithm.
template <class Real>
double log_det(const Factor<Real>& factor) {
  constexpr int64_t kTogether = sizeof(Real) < sizeof(double) ? 8 : 1;
  double sum = 0;
  for (int64_t first = 0; first < factor.size(); first += kTogether) {
    double product = 1;
    for (int64_t i = first; i < smaller(first + kTogether, factor.size()); ++i) product *= factor.lower.row(i)[i];
    sum += std::log(product);
  }
  return 2 * sum;
}

// total += ‖L⁻¹ X‖², lane by lane, for a strip X of VECS vector registers of columns whose rows above `first` are zero.
// `rhs(i, j)` is the vector from column j of row i. A tile of rows is solved in registers; the tiles below it read the
// solution from `y`.
template <int VECS, class Real, class Rhs>
void add_solution_norm(double (&total)[kLanes<Real>], const Factor<Real>& f, int64_t first, const Rhs& rhs, Real* y) {
  constexpr int64_t W = kLanes<Real>, kWidth = VECS * W;
  constexpr int kRows = FASTKM_TILE_ROWS;
  const int64_t n = f.size();
  for (int64_t i = first / kRows * kRows; i < n; i += kRows) {
    const int64_t start = first / kRows * kRows, ld = f.lower.ld;
    const Real* lower = f.lower.row(i);
    Tile<kRows, VECS, Real> tile;
    tile.add_product(i - start, {lower + start, ld, 1}, {y + start * kWidth, kWidth});
    tile.each([&](Vec<Real>& sum, int64_t r, int64_t j)
                  __attribute__((always_inline)) { sum = rhs(smaller(i + r, n - 1), j) - sum; });
    // The tile reads the inverse of its diagonal block from the inverse of the whole block.
    const int64_t within = i % kBlock;
    tile.multiply_lower(f.inverse_block(i - within).row(within) + within, kBlock);
    const int64_t count = smaller(kRows, n - i);
    Vec<Real> sum = {};
    tile.each([&](Vec<Real>& x, int64_t r, int64_t j) __attribute__((always_inline)) {
      store<Real>(y + (i + r) * kWidth + j, x);
      sum += r < count ? x * x : Vec<Real>{};
    });
    for (int64_t lane = 0; lane < W; ++lane) total[lane] += sum[lane];
  }
}

// ‖L⁻¹ X‖² for X [n, columns], a whole number of vector registers wide, in strips of at most WIDEST of them. The rows
// of column j above first(j) are zero; a strip skips the rows that are zero in its first column.
template <int WIDEST, class Real, class First, class Rhs>
double solution_norm(const Factor<Real>& f, int64_t columns, const First& first, const Rhs& rhs, Arena& arena) {
  constexpr int64_t W = kLanes<Real>;
  double total[W] = {};
  Real* y = arena.allocate<Real>(round_up(f.size(), kBlock) * kTileVectors * W);
  int64_t j = 0;
  const auto from_j = [&](int64_t i, int64_t within) { return rhs(i, j + within); };
  for (; WIDEST >= 3 && j + 3 * W <= columns; j += 3 * W) add_solution_norm<3>(total, f, first(j), from_j, y);
  for (; j + 2 * W <= columns; j += 2 * W) add_solution_norm<2>(total, f, first(j), from_j, y);
  if (j < columns) add_solution_norm<1>(total, f, first(j), from_j, y);
  double sum = 0;
  for (double lane : total) sum += lane;
  return sum;
}

// Σ (m_i² − 1 − ln m_i²) + ‖M − D‖² of (3). A column of L − L0 D is zero above its diagonal and on it, and so is its
// solution.
template <class Real>
double spread(const Factor<Real>& prior, const Factor<Real>& factor, Arena& arena) {
  const int64_t n = factor.size(), padded = round_up(n, kLanes<Real>);
  Real* m = arena.allocate<Real>(padded);
  double diagonal = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Real own = factor.lower.row(i)[i], other = prior.lower.row(i)[i], gap = (own - other) / other;
    m[i] = own / other;
    diagonal += variance_divergence(m[i] * m[i], gap * (2 + gap));
  }
  for (int64_t i = n; i < padded; ++i) m[i] = 0;
  const auto lane = lane_numbers<Real>();
  const auto rhs = [&](int64_t i, int64_t j) {
    const Vec<Real> gap = load(factor.lower.row(i) + j) - load(prior.lower.row(i) + j) * load(m + j);
    return lane < static_cast<LaneNumber<Real>>(i - j) ? gap : Vec<Real>{};
  };
  return diagonal + solution_norm<2>(prior, padded, [](int64_t j) { return j; }, rhs, arena);
}

// ‖L0⁻¹ (R − R0)‖². If both means have contiguous rows, their difference is taken in registers.
template <class Real>
double shift_norm(const Factor<Real>& prior, const Batch<const Real>& mean, const Batch<const Real>& prior_mean,
                  int64_t b, int64_t C, Arena& arena) {
  constexpr int64_t W = kLanes<Real>;
  const int64_t K = prior.size(), whole = mean.stride[2] == 1 && prior_mean.stride[2] == 1 ? C / W * W : 0;
  const auto top = [](int64_t) { return 0; };
  const auto rhs = [&](int64_t i, int64_t j) { return load(mean.at(b, i, j)) - load(prior_mean.at(b, i, j)); };
  const double sum = solution_norm<3>(prior, whole, top, rhs, arena);
  if (whole == C) return sum;
  if (whole > 0) {  // the last vector of each row overlaps the one before it: set the common columns to zero
    const auto rest = [&](int64_t i, int64_t) {
      return lane_numbers<Real>() >= static_cast<LaneNumber<Real>>(W - (C - whole)) ? rhs(i, C - W) : Vec<Real>{};
    };
    return sum + solution_norm<1>(prior, W, top, rest, arena);
  }
  const Matrix<Real> difference = allocate_matrix<Real>(arena, K, C);
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t j = 0; j < C; ++j) difference.row(i)[j] = *mean.at(b, i, j) - *prior_mean.at(b, i, j);
    for (int64_t j = C; j < difference.ld; ++j) difference.row(i)[j] = 0;
  }
  const auto row = [&](int64_t i, int64_t j) { return load(difference.row(i) + j); };
  return solution_norm<3>(prior, round_up(C, W), top, row, arena);
}

// Prefetch the means and the covariances of the next memory while the factors are computed. Small memories arrive in
// time without it.
template <class Real>
Prefetch plan_divergence_prefetch(const MatrixNormalArgs<Real>& args, int64_t b, int64_t end) {
  constexpr int64_t kLeastBytes = 1 << 18;
  const int64_t K = args.K, C = args.C, tiles = 2 * K * K / (kBlock * FASTKM_TILE_ROWS);
  Prefetch prefetch(1 + tiles);
  if (2 * K * (K + C) * static_cast<int64_t>(sizeof(Real)) < kLeastBytes) return prefetch;
  prefetch.add(args.mean, b, 0, K, C);
  prefetch.add(args.prior_mean, b, 0, K, C);
  if (b + 1 == end) return prefetch;
  prefetch.add(args.cov, b + 1, 0, K, K);
  prefetch.add(args.prior_cov, b + 1, 0, K, K);
  return prefetch;
}

template <class Real>
void kl_memory(const MatrixNormalArgs<Real>& args, int64_t begin, int64_t end) {
  if (fits_lanes(args)) return kl_memory_lanes(args, begin, end);
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Factor<Real> factor = allocate_factor<Real>(arena, args.K), prior = allocate_factor<Real>(arena, args.K);
    Prefetch prefetch = plan_divergence_prefetch(args, b, end);
    const Status loaded = load_and_factor(factor, args.cov, b, arena, Inverses::kAllButLast, &prefetch);
    const Status prior_loaded = load_and_factor(prior, args.prior_cov, b, arena, Inverses::kAll, &prefetch);
    args.info[b] = loaded > prior_loaded ? loaded : prior_loaded;
    if (args.info[b] != kGood) continue;

    const double shift = shift_norm(prior, args.mean, args.prior_mean, b, args.C, arena);
    args.result[b] = static_cast<Real>(0.5 * (static_cast<double>(args.C) * spread(prior, factor, arena) + shift));
  }
}

template <class Real>
void logdet(const MatrixNormalArgs<Real>& args, int64_t begin, int64_t end) {
  if (fits_lanes(args)) return logdet_lanes(args, begin, end);
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Factor<Real> factor = allocate_factor<Real>(arena, args.K);
    args.info[b] = load_and_factor(factor, args.cov, b, arena, Inverses::kAllButLast);
    args.result[b] = static_cast<Real>(log_det(factor));
  }
}

}  // namespace fastkm::FASTKM_LEVEL
